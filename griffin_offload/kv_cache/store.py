"""Where a layer's keys or values lie, tensors of their final size, written and moved in place, in 16, 8 or 4 bits.

Shapes: B batch, D size of a head; all parts of a store are [B, heads, tokens, ...].
"""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from griffin_offload.config import KVBits
from griffin_offload.devices.memory import untouched_zeros
from griffin_offload.errors import UnsupportedModel
from griffin_offload.kernels.attention import AS_THEY_COME, INT4_KEYS, INT4_VALUES, INT8, KeptStates

_LARGEST_INT8, _LARGEST_INT4, _CODE_BITS = 127, 15, 4
KV_GROUP = 32
"""Numbers that share a step and a least one, with 4 bits: of a value's head, or of as many tokens' keys."""
PIECE_TOKENS = 128
"""Tokens of a layer that are moved or quantised at once."""


class Store:
    """`tokens` tokens of keys or of values like `like`, [B, heads, any, D], in their own dtype."""

    kind: ClassVar[int] = AS_THEY_COME
    _group = 0  # of keys in 4 bits, the one that lies as it came

    def __init__(self, like: Tensor, tokens: int) -> None:
        batch, heads, _, self._size = like.shape
        # Zeros: a static step reads what was never written, too, and weighs it with 0, which NaN would survive.
        self._parts = [untouched_zeros((batch, heads, tokens, self._size), like.dtype, like.device)]

    @classmethod
    def shapes(cls, size: int, tokens: int) -> list[tuple[int, int]]:
        """Of each part of heads of `size` numbers: rows, and numbers in one, for so many tokens."""
        return [(tokens, size)]

    @classmethod
    def types(cls, dtype: torch.dtype) -> list[torch.dtype]:
        """Of each part, computing in `dtype`."""
        return [dtype]

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in self._parts)

    @property
    def kept_states(self) -> KeptStates:
        """Where they lie, for kernels."""
        return KeptStates(tuple(self._parts), self._size, self.kind, self._group)

    @property
    def addresses(self) -> tuple[int, ...]:
        """Where the parts lie: a captured graph reads and writes there."""
        return tuple(part.data_ptr() for part in self._parts)

    def suits(self, states: Tensor) -> bool:
        """Whether tokens like `states` can be kept here."""
        return self._parts[0].shape[:2] == states.shape[:2]

    def write(self, start: int, states: Tensor) -> None:
        self._parts[0][:, :, start : start + states.shape[-2]] = states

    def put(self, place: Tensor, states: Tensor) -> None:
        """Write one token [B, heads, 1, D] at `place` [1], which the host need not know."""
        self._parts[0].index_copy_(2, place, states)

    def at(self, place: int) -> None:
        """The next token will be `put` there: the host says so, who knows it, and `put` may be a graph's."""

    def read(self, start: int, end: int) -> Tensor:
        """Tokens from `start` to `end`, the last one, [B, heads, end - start, D]."""
        return self._parts[0][:, :, start:end]

    def read_put(self, place: Tensor, tokens: int) -> Tensor:
        """The first `tokens` of the store, whatever they are, of which the one at `place` [1] was `put` last."""
        return self.read(0, tokens)

    def parts(self, tokens: int) -> list[Tensor]:
        """Views of the first `tokens` as they are kept."""
        return [part[:, :, :tokens] for part in self._parts]

    def fill(self, parts: list[Tensor], tokens: int) -> None:
        """Begin with what `parts` of another store gave of so many tokens."""
        for part, given in zip(self._parts, parts, strict=True):
            part[:, :, : given.shape[2]] = given

    def move_to_start(self, start: int, tokens: int) -> None:
        """Move `tokens` from `start` on to the start; the two may overlap, so the first go first."""
        for piece in _pieces(tokens if start else 0):
            for part in self._parts:
                source = part[:, :, piece.start + start : piece.stop + start]
                part[:, :, piece] = source.clone()

    def replace(self, change: Callable[[Tensor], Tensor]) -> None:
        """Make every part what `change` makes of it: for another batch."""
        self._parts = [change(part) for part in self._parts]

    def reorder(self, indices: Tensor, tokens: int) -> None:
        for part, (rows, _) in zip(self._parts, self.shapes(1, tokens), strict=True):
            for piece in _pieces(rows):
                part[:, :, piece] = part[:, :, piece].index_select(0, indices.to(part.device))


class QuantizedStore(Store):
    """Codes of each token and head, and what it takes to read them, in `like`'s dtype. They are dequantised into a
    scratch that the stores of all layers share."""

    code_type: ClassVar[torch.dtype]

    def __init__(self, like: Tensor, tokens: int, scratch: "DequantBuffer") -> None:
        batch, heads, _, self._size = like.shape
        if self.code_type is torch.uint8 and self._size % 2:
            raise UnsupportedModel(
                f"kv_bits=4 keeps two numbers of a head in a byte, these have {self._size}: use kv_bits=8"
            )
        kinds = zip(self.shapes(self._size, tokens), self.types(like.dtype), strict=True)
        self._parts = [untouched_zeros((batch, heads, *shape), dtype, like.device) for shape, dtype in kinds]
        self._scratch = scratch
        self._reserve()

    @classmethod
    def types(cls, dtype: torch.dtype) -> list[torch.dtype]:
        return [cls.code_type, dtype]

    def _quantized(self, states: Tensor) -> tuple[Tensor, Tensor]:
        """Both parts of [B, heads, T, D]."""
        raise NotImplementedError

    def _fill_floats(self, out: Tensor, codes: Tensor, beside: Tensor) -> Tensor:
        """The numbers, in `out` [B, heads, T, D]."""
        raise NotImplementedError

    def _reserve(self) -> None:
        self._scratch.reserve(math.prod(self._parts[0].shape[:3]) * self._size)

    def replace(self, change: Callable[[Tensor], Tensor]) -> None:
        super().replace(change)
        self._reserve()

    def write(self, start: int, states: Tensor) -> None:
        for piece in _pieces(states.shape[-2]):
            there = slice(start + piece.start, start + piece.stop)
            for part, made in zip(self._parts, self._quantized(states[:, :, piece]), strict=True):
                part[:, :, there] = made

    def put(self, place: Tensor, states: Tensor) -> None:
        for part, made in zip(self._parts, self._quantized(states), strict=True):
            part.index_copy_(2, place, made.to(part.dtype))

    def read(self, start: int, end: int) -> Tensor:
        codes, beside = (part[:, :, start:end] for part in self._parts)
        return self._fill_floats(self._scratch.take((*codes.shape[:3], self._size), beside), codes, beside)


class Int8Store(QuantizedStore):
    """Numbers as int8 [B, heads, tokens, D], and a scale [B, heads, tokens, 1] by which they are to be multiplied."""

    code_type = torch.int8
    kind = INT8

    @classmethod
    def shapes(cls, size: int, tokens: int) -> list[tuple[int, int]]:
        return [(tokens, size), (tokens, 1)]

    def _quantized(self, states: Tensor) -> tuple[Tensor, Tensor]:
        exact = states.float()
        scale = (torch.linalg.vector_norm(exact, torch.inf, dim=-1, keepdim=True) / _LARGEST_INT8).to(states.dtype)
        scale.masked_fill_(scale == 0, 1)
        # By the scale as it is kept: its rounding costs nothing then.
        return (exact / scale).round_().clamp_(-_LARGEST_INT8, _LARGEST_INT8), scale

    def _fill_floats(self, out: Tensor, codes: Tensor, beside: Tensor) -> Tensor:
        return out.copy_(codes).mul_(beside)


class Int4Values(QuantizedStore):
    """Two codes a byte, number i (low) beside number i + D / 2 (high): [B, heads, tokens, D / 2]. Each KV_GROUP numbers
    of a head, the last ones may be fewer, have a step and a least number, [B, heads, tokens, 2 G], the steps first."""

    code_type = torch.uint8
    kind = INT4_VALUES

    @classmethod
    def shapes(cls, size: int, tokens: int) -> list[tuple[int, int]]:
        return [(tokens, -(-size // 2)), (tokens, 2 * -(-size // KV_GROUP))]

    def _quantized(self, states: Tensor) -> tuple[Tensor, Tensor]:
        exact = states.to(torch.float32, copy=True)
        grids = [_grid(numbers, -1, states.dtype) for numbers in exact.split(KV_GROUP, -1)]
        for numbers, grid in zip(exact.split(KV_GROUP, -1), grids, strict=True):
            _round(numbers, *grid)
        return _packed(exact), torch.cat([*(step for step, _ in grids), *(least for _, least in grids)], dim=-1)

    def _fill_floats(self, out: Tensor, codes: Tensor, beside: Tensor) -> Tensor:
        _unpack(codes, out)
        pairs = (part.split(1, -1) for part in beside.chunk(2, dim=-1))
        for numbers, step, least in zip(out.split(KV_GROUP, -1), *pairs, strict=True):
            numbers.mul_(step).add_(least)
        return out


class Int4Keys(QuantizedStore):
    """As values, but a step and a least number for each number of a head and KV_GROUP tokens, [B, heads, tokens / 32,
    2 D]: some of a key's numbers are large in all tokens, and would have the others of their group rounded away
    (KIVI: Liu et al. 2024, arXiv:2402.02750, section 3).

    The group that was written to last also lies as it came, [B, heads, 32, D], and is read so if nothing lies behind
    it: every token rounds it anew. Where tokens are taken back into an earlier one, that one's come out of its codes.
    """

    code_type = torch.uint8
    kind = INT4_KEYS

    @classmethod
    def types(cls, dtype: torch.dtype) -> list[torch.dtype]:
        return [cls.code_type, dtype, dtype]

    @classmethod
    def shapes(cls, size: int, tokens: int) -> list[tuple[int, int]]:
        groups = -(-tokens // KV_GROUP)
        return [(groups * KV_GROUP, -(-size // 2)), (groups, 2 * size), (KV_GROUP, size)]

    def write(self, start: int, states: Tensor) -> None:
        group, known = divmod(start, KV_GROUP)
        if known:
            self._hold(group)
        begun = self._parts[2][:, :, :known].clone()
        for piece in _pieces(known + states.shape[-2]):
            own = states[:, :, max(piece.start - known, 0) : piece.stop - known]
            whole = own if piece.start else torch.cat([begun, own], dim=2)
            for number, tokens in enumerate(whole.split(KV_GROUP, 2)):
                self._keep(group + piece.start // KV_GROUP + number, tokens)

    def _keep(self, group: int, tokens: Tensor) -> None:
        """Hold these, which `group` begins with, and write their codes."""
        codes, grids, held = self._parts
        held[:, :, : tokens.shape[2]] = tokens  # up to KV_GROUP
        self._group, first = group, group * KV_GROUP
        codes[:, :, first : first + tokens.shape[2]], grids[:, :, group : group + 1] = self._quantized(tokens)

    def put(self, place: Tensor, states: Tensor) -> None:
        """`at` was told the place before."""
        codes, grids, held = self._parts
        group = place // KV_GROUP
        held.index_copy_(2, place % KV_GROUP, states)
        # What lies behind it is of an earlier group; these codes are read when all are of this one.
        made, grid = self._quantized(held)
        codes.index_copy_(2, _places(group), made)
        grids.index_copy_(2, group, grid)

    def at(self, place: int) -> None:
        group, known = divmod(place, KV_GROUP)
        if known:
            self._hold(group)
        self._group = group

    def _hold(self, group: int) -> None:
        """Let `group` be the one that lies as it came, or, where another one came later, out of its codes."""
        if group != self._group:
            self._parts[2].copy_(self._floats(group, group + 1, self._parts[2]))
            self._group = group

    def _quantized(self, states: Tensor) -> tuple[Tensor, Tensor]:
        exact = states.to(torch.float32, copy=True)
        step, least = _grid(exact, -2, states.dtype)
        return _packed(_round(exact, step, least)), torch.cat([step, least], dim=-1)

    def _floats(self, group: int, end: int, out: Tensor) -> Tensor:
        """The numbers of groups, in `out` [B, heads, 32 groups, D]."""
        _unpack(self._parts[0][:, :, group * KV_GROUP : end * KV_GROUP], out)
        step, least = self._parts[1][:, :, group:end, None].chunk(2, dim=-1)
        out.unflatten(2, (-1, KV_GROUP)).mul_(step).add_(least)
        return out

    def read(self, start: int, end: int) -> Tensor:
        group, ends = start // KV_GROUP, -(-end // KV_GROUP)
        batch, heads = self._parts[0].shape[:2]
        out = self._scratch.take((batch, heads, (ends - group) * KV_GROUP, self._size), self._parts[1])
        self._floats(group, ends, out)
        if ends - 1 == self._group:
            out[:, :, -KV_GROUP:] = self._parts[2]
        first = group * KV_GROUP
        return out[:, :, start - first : end - first]

    def read_put(self, place: Tensor, tokens: int) -> Tensor:
        groups = -(-tokens // KV_GROUP)
        batch, heads = self._parts[0].shape[:2]
        out = self._floats(0, groups, self._scratch.take((batch, heads, groups * KV_GROUP, self._size), self._parts[1]))
        return out.index_copy_(2, _places(place // KV_GROUP), self._parts[2])[:, :, :tokens]

    def parts(self, tokens: int) -> list[Tensor]:
        self._hold(max(tokens - 1, 0) // KV_GROUP)
        shapes = self.shapes(self._size, tokens)
        return [part[:, :, :rows] for part, (rows, _) in zip(self._parts, shapes, strict=True)]

    def fill(self, parts: list[Tensor], tokens: int) -> None:
        super().fill(parts, tokens)
        self._group = max(tokens - 1, 0) // KV_GROUP

    def move_to_start(self, start: int, tokens: int) -> None:
        if not start or not tokens:
            return
        if start % KV_GROUP:  # other tokens share groups then
            self.write(0, self.read(start, start + tokens))
            return
        self._hold((start + tokens - 1) // KV_GROUP)
        for piece in _pieces(tokens):
            self._parts[0][:, :, piece] = self._parts[0][:, :, piece.start + start : piece.stop + start].clone()
        groups, first = -(-tokens // KV_GROUP), start // KV_GROUP
        self._parts[1][:, :, :groups] = self._parts[1][:, :, first : first + groups].clone()
        self._group -= first


def _places(group: Tensor) -> Tensor:
    """Of the tokens of a group [1]."""
    return group * KV_GROUP + torch.arange(KV_GROUP, dtype=group.dtype, device=group.device)


def _grid(exact: Tensor, axis: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Step and least number of groups along `axis`, as they are kept: number = step * code + least, code 0..15."""
    low, high = exact.aminmax(dim=axis, keepdim=True)
    step = ((high - low) / _LARGEST_INT4).to(dtype)
    return step.masked_fill_(step == 0, 1), low.to(dtype)


def _round(exact: Tensor, step: Tensor, least: Tensor) -> Tensor:
    return exact.sub_(least).div_(step).round_().clamp_(0, _LARGEST_INT4)


def _packed(codes: Tensor) -> Tensor:
    low, high = codes.to(torch.uint8).chunk(2, dim=-1)
    return low | (high << _CODE_BITS)


def _unpack(codes: Tensor, out: Tensor) -> None:
    low, high = out.chunk(2, dim=-1)
    low.copy_(codes & _LARGEST_INT4)
    high.copy_(codes >> _CODE_BITS)


class DequantBuffer:
    """Room for one layer's dequantised keys, or values, which all layers of a cache take in turn."""

    def __init__(self) -> None:
        self._numbers = 0
        self._buffer: Tensor | None = None

    @property
    def nbytes(self) -> int:
        return 0 if self._buffer is None else self._buffer.nbytes

    def reserve(self, numbers: int) -> None:
        """A layer will need room for so many numbers. All layers say so before the first one takes it."""
        self._numbers = max(self._numbers, numbers)

    def take(self, shape: tuple[int, ...], like: Tensor) -> Tensor:
        """Room in that shape, of `like`'s precision and place, until the next one takes it."""
        if self._buffer is None or self._buffer.numel() < self._numbers:
            self._buffer = like.new_empty(self._numbers)
        return self._buffer[: math.prod(shape)].view(shape)


def _pieces(tokens: int) -> Iterator[slice]:
    """[0, tokens) in pieces: what is made of one beside the cache stays small."""
    return (slice(start, min(start + PIECE_TOKENS, tokens)) for start in range(0, tokens, PIECE_TOKENS))


STORES: dict[KVBits, tuple[type[Any], type[Any]]] = {
    16: (Store, Store),
    8: (Int8Store, Int8Store),
    4: (Int4Keys, Int4Values),
}
"""Of keys and of values."""
MOST_PARTS = 5
"""Of a layer: the keys' and the values'."""


def part_types(bits: KVBits, dtype: torch.dtype) -> list[torch.dtype]:
    """Of the parts of a layer in a cache of `dtype`."""
    return [own for store in STORES[bits] for own in store.types(dtype)]


def head_sizes(bits: KVBits, heads: int, tokens: int, shapes: Sequence[Sequence[int]]) -> list[int] | None:
    """D of keys and of values, of whose parts for `tokens` of one sequence these are the shapes; None where they are
    of something else."""
    sizes, left = [], [list(shape) for shape in shapes]
    for store in STORES[bits]:
        if not left or len(left[0]) != 4:
            return None
        sizes.append(left[0][3] * (2 if bits == 4 else 1))
        expected = [[1, heads, *shape] for shape in store.shapes(sizes[-1], tokens)]
        if left[: len(expected)] != expected:
            return None
        left = left[len(expected) :]
    return None if left else sizes
