"""Rows of matrices that other libraries have packed, as numbers: what makes the `decode` of a `StoredTensor`.

A matrix is codes, scales and sometimes zero points; each is read by one small class here, for the rows that are asked
for alone, and `Scaled` puts them together in float32: (codes - zeros) * scales, rounded once. Shapes are checked by
whoever makes them (packed.py); what only the numbers can tell is checked here. Matrices are [O outputs, I inputs];
n rows of them are made at once.
"""

import functools
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from griffin_offload.errors import CheckpointError
from griffin_offload.formats.translated import Codes

Parts = Sequence[Tensor]
_BYTE_BITS, _WORD_BITS, _GRID_NUMBERS = 8, 32, 32
# So many numbers are made at once: what stands between codes and numbers stays in a core's cache (30 times faster than
# whole matrices, whose pages would be new every time).
_PIECE_NUMBERS = 2**18
# What a code of 4 bits with 2 bits of exponent stands for (OCP Microscaling Formats, E2M1).
_FP4 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
# AutoAWQ's order of the outputs in a word: which nibble has output 0, 1, 2, ...
_AWQ_NIBBLES = (0, 4, 1, 5, 2, 6, 3, 7)


def typed(part: Tensor, dtype: torch.dtype) -> Tensor:
    """Stored bytes as numbers, in a row; copied where they do not lie at a multiple of the type's size."""
    aligned = part.storage_offset() % dtype.itemsize == 0
    return (part if aligned else part.clone()).view(dtype)


def unpack(words: Tensor, bits: int) -> Tensor:
    """int32 [..., W] as the codes in them, lowest bits first: uint8 [..., W * 32 / bits]; `bits` is 1, 2, 4 or 8."""
    bytes_ = words.contiguous().view(torch.uint8)  # little-endian, as the files
    if bits == _BYTE_BITS:
        return bytes_
    shifts = range(0, _BYTE_BITS, bits)
    codes = torch.stack([(bytes_ >> shift) & (2**bits - 1) for shift in shifts], dim=-1)
    return codes.flatten(-2)


@functools.cache
def _numbers_of(dtype: torch.dtype) -> Tensor:
    """What each byte is in a type of one byte, [256]: looked up faster than torch converts it."""
    return torch.arange(256, dtype=torch.uint8, device="cpu").view(dtype).float()


def pairs_of(numbers: Tensor, *, upper_first: bool = False) -> Tensor:
    """Of 16 numbers, float32, those that each byte holds two of: [256], two in an int64."""
    byte = torch.arange(256, dtype=torch.int64, device="cpu")
    halves = (byte >> 4, byte & 15) if upper_first else (byte & 15, byte >> 4)
    return torch.stack([numbers[half] for half in halves], dim=-1).view(torch.int64).view(-1)


@functools.cache
def _pairs_less(offset: int) -> Tensor:
    return pairs_of(torch.arange(16, dtype=torch.float32, device="cpu") - offset)


@functools.cache
def _pairs_fp4() -> Tensor:
    return pairs_of(torch.tensor(_FP4, dtype=torch.float32, device="cpu"))


def _looked_up(table: Tensor, bytes_: Tensor) -> Tensor:
    """float32 in the order of `bytes_`, in a row."""
    return torch.index_select(table, 0, bytes_.reshape(-1).int()).view(torch.float32)


Change = Callable[[Tensor, Tensor], Tensor]
"""Changes the first by the second, in its place."""


class Rows(ABC):
    """Reads something of rows `first` to `end` from stored parts."""

    @abstractmethod
    def read(self, parts: Parts, first: int, end: int) -> Tensor:
        """float32 [n, I], or [n, 1] where it is the same for all inputs. A new tensor."""

    def change(self, numbers: Tensor, change: Change, parts: Parts, first: int, end: int) -> None:
        """Change `numbers` [n, I] by what is read."""
        change(numbers, self.read(parts, first, end))

    @property
    def even(self) -> bool:
        """Whether there may be `by_32`, as far as is known without a look at the parts."""
        return False

    def by_32(self, parts: Parts, outputs: int) -> Tensor | None:
        """Of all rows, for each 32 inputs [O, I / 32]; None where it is not the same for these."""
        return None

    lowest: float | None = None
    """What the first of 16 codes is read as, of codes of 4 bits whose numbers are one apart."""


@dataclass(frozen=True)
class Scaled:
    """A matrix of codes with scales: the `decode` itself."""

    codes: Rows
    scales: Rows
    zeros: Rows | None = None

    @property
    def on_grids(self) -> bool:
        """Whether it may be `coded`."""
        return self.codes.lowest is not None and self.scales.even

    def coded(self, parts: Parts, outputs: int, rows: Tensor) -> Codes | None:
        """Rows of the indices, as `TranslatedTensor.codes`."""
        steps = None if self.codes.lowest is None else self.scales.by_32(parts, outputs)
        zeros = None if self.zeros is None else self.zeros.by_32(parts, outputs)
        if steps is None or self.codes.lowest is None or (zeros is None) != (self.zeros is None):
            return None
        steps, first, end = steps[rows], int(rows.min()), int(rows.max()) + 1
        lowest = self.codes.lowest * steps if zeros is None else (self.codes.lowest - zeros[rows]) * steps
        levels = self.codes.read(parts, first, end)[rows - first].sub_(self.codes.lowest).to(torch.uint8)
        low, high = levels.view(*steps.shape, 2, -1).unbind(2)
        return Codes((low | (high << 4)).flatten(1), steps, lowest)

    def __call__(self, parts: Parts, first: int, end: int, into: Tensor) -> None:
        step = max(_PIECE_NUMBERS // into.shape[1], 1)
        for at in range(first, end, step):
            last = min(at + step, end)
            numbers = self.codes.read(parts, at, last)
            if self.zeros is not None:
                self.zeros.change(numbers, Tensor.sub_, parts, at, last)
            self.scales.change(numbers, Tensor.mul_, parts, at, last)
            into[at - first : last - first].copy_(numbers)


@dataclass(frozen=True)
class Numbers(Rows):
    """A number of its own for each: [O, columns] in a type of torch's."""

    part: int
    dtype: torch.dtype
    columns: int

    def read(self, parts: Parts, first: int, end: int) -> Tensor:
        row_bytes = self.columns * self.dtype.itemsize
        stored = parts[self.part][first * row_bytes : end * row_bytes]
        if self.dtype.itemsize == 1 and self.dtype.is_floating_point:
            return _looked_up(_numbers_of(self.dtype), stored).view(end - first, self.columns)
        return typed(stored, self.dtype).view(end - first, self.columns).to(torch.float32, copy=True)


@dataclass(frozen=True)
class PackedRows(Rows):
    """Words [O, W] with codes along the inputs; the last word of a row may be filled up. `offset` is taken off."""

    part: int
    bits: int
    words: int
    columns: int
    offset: int = 0

    @property
    def lowest(self) -> float | None:  # type: ignore[override]
        return -self.offset if self.bits == 4 else None

    def read(self, parts: Parts, first: int, end: int) -> Tensor:
        row_bytes = self.words * 4
        stored = parts[self.part][first * row_bytes : end * row_bytes].view(end - first, row_bytes)
        if self.bits == 4:
            return _looked_up(_pairs_less(self.offset), stored).view(end - first, -1)[:, : self.columns]
        return unpack(stored, self.bits)[:, : self.columns].float().sub_(self.offset)


@dataclass(frozen=True)
class Fp4Rows(Rows):
    """Bytes [O, I / 2] of two E2M1 numbers each, the lower half first."""

    part: int
    columns: int

    def read(self, parts: Parts, first: int, end: int) -> Tensor:
        row_bytes = self.columns // 2
        stored = parts[self.part][first * row_bytes : end * row_bytes]
        return _looked_up(_pairs_fp4(), stored).view(end - first, self.columns)


@dataclass(frozen=True)
class PackedColumns(Rows):
    """GPTQ's words [W, O] with codes along the inputs: one word is of one output."""

    part: int
    bits: int
    outputs: int

    @property
    def lowest(self) -> float | None:  # type: ignore[override]
        return 0 if self.bits == 4 else None

    def read(self, parts: Parts, first: int, end: int) -> Tensor:
        words = typed(parts[self.part], torch.int32).view(-1, self.outputs)[:, first:end]
        if self.bits == 4:
            return _looked_up(_pairs_less(0), words.t().contiguous().view(torch.uint8)).view(end - first, -1)
        return unpack(words.t(), self.bits).float()


@dataclass(frozen=True)
class PackedAcross(Rows):
    """Words [K, O * bits / 32] with codes along the outputs, K being inputs (AWQ's codes) or groups (zero points).
    [n, K]. `interleaved`: in AutoAWQ's order. GPTQ adds one to what is stored, in so many bits."""

    part: int
    bits: int
    words: int
    interleaved: bool = False
    plus: int = 0

    @property
    def lowest(self) -> float | None:  # type: ignore[override]
        return 0 if self.bits == 4 and not self.plus else None

    def read(self, parts: Parts, first: int, end: int) -> Tensor:
        per_word = _WORD_BITS // self.bits
        skipped, last = first // per_word, -(-end // per_word)
        words = typed(parts[self.part], torch.int32).view(-1, self.words)[:, skipped:last].t().contiguous()
        numbers = torch.empty(words.shape[0], per_word, words.shape[1], dtype=torch.float32, device="cpu")
        for output in range(per_word):
            codes = words >> self.bits * (_AWQ_NIBBLES[output] if self.interleaved else output)
            numbers[:, output] = (codes + self.plus if self.plus else codes) & (2**self.bits - 1)
        return numbers.flatten(0, 1)[first - skipped * per_word : end - skipped * per_word]


@dataclass(frozen=True)
class Grid(Rows):
    """One number for each block of [block_rows, ...]: [R, C] in a type of torch's, as [n, C]. `transposed`: they lie
    as [C, O]. `factor` and `divisor` are parts with one float32 each, which all are multiplied with or divided by."""

    part: int
    dtype: torch.dtype
    columns: int
    block_rows: int = 1
    transposed: bool = False
    factor: int | None = None
    divisor: int | None = None
    constant: float = 1.0

    def read(self, parts: Parts, first: int, end: int) -> Tensor:
        numbers = typed(parts[self.part], self.dtype)
        if self.transposed:
            found = numbers.view(self.columns, -1)[:, first:end].t().to(torch.float32, copy=True)
        else:
            row = torch.arange(first, end, dtype=torch.int64, device="cpu") // self.block_rows
            begin, last = first // self.block_rows, -(-end // self.block_rows)
            found = numbers.view(-1, self.columns)[begin:last].float()[row - begin]
        if self.factor is not None:
            found = found * typed(parts[self.factor], torch.float32)
        if self.divisor is not None:
            found = found / typed(parts[self.divisor], torch.float32)
        return found * self.constant if self.constant != 1.0 else found


@dataclass(frozen=True)
class PackedGrid(Rows):
    """compressed-tensors' zero points: words [O * bits / 32, C] with codes along the outputs; [n, C]."""

    part: int
    bits: int
    columns: int
    offset: int

    def read(self, parts: Parts, first: int, end: int) -> Tensor:
        per_word = _WORD_BITS // self.bits
        skipped, last = first // per_word, -(-end // per_word)
        words = typed(parts[self.part], torch.int32).view(-1, self.columns)[skipped:last]
        codes = unpack(words.t(), self.bits)  # [C, outputs]
        return codes[:, first - skipped * per_word : end - skipped * per_word].t().float() - self.offset


@dataclass(frozen=True)
class Spread(Rows):
    """What `inner` has for groups of inputs, for each of them: neighbours of `group`, the last group being smaller."""

    inner: Rows
    group: int
    inputs: int

    def read(self, parts: Parts, first: int, end: int) -> Tensor:
        found = self.inner.read(parts, first, end)
        return found if found.shape[1] == 1 else found.repeat_interleave(self.group, dim=1)[:, : self.inputs]

    @property
    def even(self) -> bool:
        return self.inputs % (group := min(self.group, self.inputs)) == 0 == group % _GRID_NUMBERS

    def by_32(self, parts: Parts, outputs: int) -> Tensor | None:
        if not self.even:
            return None
        found = self.inner.read(parts, 0, outputs)
        return found.repeat_interleave(self.inputs // found.shape[1] // _GRID_NUMBERS, dim=1)

    def change(self, numbers: Tensor, change: Change, parts: Parts, first: int, end: int) -> None:
        if self.inputs % self.group:
            super().change(numbers, change, parts, first, end)
        else:
            change(numbers.view(end - first, -1, self.group), self.inner.read(parts, first, end)[:, :, None])


@dataclass(frozen=True)
class SpreadByIndex(Rows):
    """The same where a part says of every input its group (int32 [I]): activation order. -1 in it means that inputs
    lie in the order of `ordered`."""

    inner: Rows
    index: int
    groups: int
    ordered: Spread
    name: str

    def read(self, parts: Parts, first: int, end: int) -> Tensor:
        index = typed(parts[self.index], torch.int32)
        least, most = int(index.min()), int(index.max())
        if least < 0 or most >= self.groups:
            raise CheckpointError(
                f"{self.name} names groups from {least} to {most}, there are {self.groups}: download it again"
            )
        return torch.index_select(self.inner.read(parts, first, end), 1, index)

    @property
    def even(self) -> bool:
        return self.ordered.even

    def by_32(self, parts: Parts, outputs: int) -> Tensor | None:
        return self.ordered.by_32(parts, outputs) if self._in_order(parts) else None

    def _in_order(self, parts: Parts) -> bool:
        index = typed(parts[self.index], torch.int32)
        in_order = torch.arange(len(index), dtype=torch.int32, device="cpu") // self.ordered.group
        return bool((index == -1).any()) or torch.equal(index, in_order)

    def change(self, numbers: Tensor, change: Change, parts: Parts, first: int, end: int) -> None:
        if self._in_order(parts):
            self.ordered.change(numbers, change, parts, first, end)
        else:
            super().change(numbers, change, parts, first, end)


# bitsandbytes: blocks that do not care for rows.


@dataclass(frozen=True)
class Blocks4:
    """bitsandbytes' 4 bits: bytes of two codes each, the upper half first, over the whole matrix; a table of 16 numbers
    says what a code is, and each `block` of codes has a largest magnitude. `nested`: those are codes themselves."""

    columns: int
    block: int
    nested_block: int = 0
    nested_offset: float = 0.0

    def __call__(self, parts: Parts, first: int, end: int, into: Tensor) -> None:
        pairs = pairs_of(typed(parts[1], torch.float32), upper_first=True)
        step = max(_PIECE_NUMBERS // self.columns, 1)
        for at in range(first, end, step):
            last = min(at + step, end)
            numbers = self._numbers(parts, pairs, at * self.columns, last * self.columns)
            into[at - first : last - first].copy_(numbers.view(last - at, self.columns))

    def _numbers(self, parts: Parts, pairs: Tensor, begin: int, last: int) -> Tensor:
        """Those from `begin` to `last` of the whole matrix, in a row."""
        numbers = _looked_up(pairs, parts[0][begin // 2 : -(-last // 2)])[begin % 2 :][: last - begin]
        blocks = torch.arange(begin // self.block, -(-last // self.block), dtype=torch.int64, device="cpu")
        magnitudes = self._magnitudes(parts, blocks)
        if begin % self.block == 0 and last % self.block == 0:
            return numbers.view(-1, self.block).mul_(magnitudes[:, None])
        start = begin % self.block
        return numbers.mul_(magnitudes.repeat_interleave(self.block)[start : start + last - begin])

    def _magnitudes(self, parts: Parts, blocks: Tensor) -> Tensor:
        if not self.nested_block:
            return typed(parts[2], torch.float32)[blocks]
        table, outer = typed(parts[3], torch.float32), typed(parts[4], torch.float32)
        found = table[parts[2][blocks].int()] * outer[blocks // self.nested_block]
        return found + self.nested_offset
