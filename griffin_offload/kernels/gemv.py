"""A few rows times a matrix: int8 rows, rows and strips of 2 to 4 bits, or 16-bit floats (gemv.c).

torch 2.13 has its 8-bit kernel for bfloat16 in the first place, and none for forms like these of int4 or less
(benchmarks/NOTES.md has the rates).
"""

import contextlib
import functools
import itertools
import struct
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from griffin_offload.kernels.by_blocks import typed
from griffin_offload.kernels.library import HALVES, Library, Sizes, asked, check, library, needs_gradient, run

_INT8_GROUP = 128  # inputs that share a scale, and the most that may; gemv_int8.c knows it, too
_GROUP = 32
_HALF = 16
_STRIP = 64  # outputs
_FILLED = 256  # inputs of rows in groups are filled up to a multiple of it at most, as gemv.h says
_LANES = 16
_BY_TILES, _BY_LANES = 2, 3  # as gemv.c has them
_TILE = 256  # floats of a tile
_FEW, _NARROW = 4, 4096  # rows, inputs
_ALIKE = 22  # rows
_LEVELS = 2048  # floats, of a table of the tiles' kernel for strips
_TILED_BITS = 4
TILE_ROWS = 16
"""Up to so many rows fill tiles."""
ROWS = 32
"""Up to so many rows the kernels for quantised matrices are faster than translating the matrix."""
MOST_TIERS = 8
_TIERS = struct.Struct(f"@{1 + MOST_TIERS}q")
"""The beginning of the struct Tiers of gemv.c; as many structs of products follow."""
Tier = tuple[int, Tensor, Tensor, Tensor]
"""Bits, codes, groups, and the scale of the rows or of the strips' neurons."""
Asked = tuple[Tensor, bytes, Tensor]
"""Where a product will be, the struct that asks for it, and what is made on the way, which has to stay until then."""


class GemvKernels:
    """The products of a library. With `tiles` those of int4, int8 and floats by instructions for whole tiles: of up to
    TILE_ROWS rows of bfloat16, whose products are the same however many there are, but summed in another order than
    without. With `lanes` those of int4 rows with outputs as lanes, which is faster for more than a few rows and sums in
    another order, too. `wide` and `ahead` are for tests: those of older processors, and as another processor would
    read."""

    def __init__(
        self,
        library: Library,
        *,
        wide: bool = True,
        ahead: bool | None = None,
        tiles: bool = False,
        lanes: bool = False,
    ) -> None:
        self._library, self._tiles, self._lanes = library, tiles, lanes
        self._ahead = library.fetches_ahead if ahead is None else ahead
        self.uses_bytes, self._pairs = wide and library.sums_bytes, wide and library.sums_pairs

    def multiply_int8(
        self, x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None = None, input_scale: Tensor | None = None
    ) -> Tensor:
        """x [M, I], times `input_scale` [I], times int8 `weight` [O, I] and its rows' `scale` [O], plus `bias` [O]:
        [M, O] in the type of x, which is that of bias and input_scale, too."""
        (rows, inputs), outputs = x.shape, weight.shape[0]
        check(weight, (outputs, inputs), torch.int8, "the matrix")
        check(scale, (outputs,), name="the scale")
        sizes = (rows, _parts(x), outputs, outputs, inputs, _INT8_GROUP)
        beside = (input_scale, weight, None, scale, bias)
        if self._tiles:
            self._check_tiles(x)
            tiles = -(-inputs // _INT8_GROUP) * (2 if rows > TILE_ROWS // 2 else 1)
            _room, (sums, numbers, step) = _parted(rows * outputs, 2 * _TILE * tiles, TILE_ROWS * tiles)
            made: tuple[int, ...] = (sums, 0, numbers, step, 0)
            return run(self._library, "multiply_int8", x, beside, made, sizes, wide=_BY_TILES, ahead=self._ahead)
        _room, made = _made(sizes)
        return run(self._library, "multiply_int8", x, beside, made, sizes, wide=self.uses_bytes, ahead=self._ahead)

    def multiply_rows(
        self, x: Tensor, codes: Tensor, groups: Tensor, scale: Tensor, bias: Tensor | None = None, *, bits: int = 4
    ) -> Tensor:
        """x [M, I] times rows of 2 to 4 `bits`, codes [O, I bits / 8], groups [O, I / 32, 2] and `scale` [O], plus
        `bias` [O]: as of `multiply_int8`."""
        x = x.contiguous()
        product, job, _room = self._rows(x, codes, groups, scale, bias, bits)
        self._library.call(f"multiply_int{bits}_rows", job)
        return product

    def multiply_strips(
        self,
        x: Tensor,
        codes: Tensor,
        groups: Tensor,
        input_scale: Tensor,
        bias: Tensor | None = None,
        features: int | None = None,
        *,
        bits: int = 4,
    ) -> Tensor:
        """x [M, I] times `input_scale` [I] times strips of 2 to 4 `bits`, codes [O / 64, I, 8 bits] and groups
        [O / 32, I, 2], plus `bias`: the first `features` outputs, as of `multiply_int8`. M is at most ROWS, I a
        multiple of 16."""
        x = x.contiguous()
        product, job, _room = self._strips(x, codes, groups, input_scale, bias, features, bits)
        self._library.call(f"multiply_int{bits}_strips", job)
        return product

    def multiply_tiers_rows(self, x: Tensor, tiers: Sequence[Tier]) -> Tensor:
        """x [M, I] times several matrices of rows by one call: their outputs behind each other, [M, sum of O]."""
        x = x.contiguous()
        parts = [self._rows(x, codes, groups, scale, None, bits) for bits, codes, groups, scale in tiers]
        self._call_tiers("multiply_tiers_rows", tiers, parts)
        return torch.cat([part[0] for part in parts], dim=1)

    def multiply_tiers_strips(
        self, x: Sequence[Tensor], tiers: Sequence[Tier], bias: Tensor | None = None, features: int | None = None
    ) -> Tensor:
        """The sum of each x [M, I] times its matrix of strips, plus `bias`, by one call: [M, features]."""
        rows = [inputs.contiguous() for inputs in x]
        if len({(inputs.shape[0], inputs.dtype) for inputs in rows}) != 1 or len(rows) != len(tiers):
            raise ValueError(f"{len(rows)} inputs of {len(tiers)} tiers must be of one type and as many rows")
        if len({codes.shape[0] for _, codes, *_ in tiers}) != 1:
            raise ValueError("tiers that are added up must be of the same outputs")
        parts = [
            self._strips(inputs, codes, groups, scale, None if i else bias, features, bits)
            for i, (inputs, (bits, codes, groups, scale)) in enumerate(zip(rows, tiers, strict=True))
        ]
        self._call_tiers("multiply_tiers_strips", tiers, parts)
        return parts[0][0]

    def _call_tiers(self, function: str, tiers: Sequence[Tier], parts: Sequence[Asked]) -> None:
        bits = [tier[0] for tier in tiers]
        if not 0 < len(bits) <= MOST_TIERS:
            raise ValueError(f"{len(bits)} tiers: 1 to {MOST_TIERS} are known")
        header = _TIERS.pack(len(bits), *bits, *(MOST_TIERS - len(bits)) * [0])
        self._library.call(function, header + b"".join(part[1] for part in parts))

    def _rows(self, x: Tensor, codes: Tensor, groups: Tensor, scale: Tensor, bias: Tensor | None, bits: int) -> Asked:
        (rows, inputs), outputs = x.shape, codes.shape[0]
        per_row = inputs // _GROUP
        check(codes, (outputs, per_row * 4 * bits), torch.uint8, "the codes")
        check(groups, (outputs, per_row, 2), torch.uint8, "the groups")
        check(scale, (outputs,), name="the scale")
        if inputs % _GROUP:
            raise ValueError(f"{inputs} inputs must be whole groups of {_GROUP}")
        sizes = (rows, _parts(x), outputs, outputs, inputs, _GROUP if bits == 4 else _HALF)
        beside = (None, codes, groups, scale, bias)
        if self._tiles and bits == _TILED_BITS:
            self._check_tiles(x)
            filled, span = -(-per_row // 4) * 4, 1 if rows > TILE_ROWS // 2 else 2 if rows > TILE_ROWS // 4 else 4
            units = filled // span * TILE_ROWS
            room, (sums, floats, numbers, step) = _parted(rows * outputs, units, _TILE * filled // min(span, 2), units)
            made: tuple[int, ...] = (sums, floats, numbers, step, 0)
            return *asked(x, beside, made, sizes, wide=_BY_TILES, ahead=self._ahead), room
        room, made = _made(sizes)
        wide = _BY_LANES if self._lanes and bits == _TILED_BITS else self.uses_bytes
        return *asked(x, beside, made, sizes, wide=wide, ahead=self._ahead), room

    def _strips(
        self,
        x: Tensor,
        codes: Tensor,
        groups: Tensor,
        input_scale: Tensor,
        bias: Tensor | None,
        features: int | None,
        bits: int,
    ) -> Asked:
        (rows, inputs), outputs = x.shape, codes.shape[0] * _STRIP
        check(codes, (outputs // _STRIP, inputs, _STRIP * bits // 8), torch.uint8, "the codes")
        check(groups, (outputs // _GROUP, inputs, 2), torch.uint8, "the groups")
        if inputs % _LANES or rows > ROWS:
            raise ValueError(f"{rows} rows of {inputs} inputs: up to {ROWS} of a multiple of {_LANES} are known")
        parts = _parts(x)
        sizes = (rows, parts, outputs, outputs if features is None else features, inputs, _GROUP)
        beside = (input_scale, codes, groups, None, bias)
        if self._tiles and bits == _TILED_BITS:
            self._check_tiles(x)
            filled = rows * (-(-inputs // _GROUP) * _GROUP)
            room, (sums, floats, numbers, lanes) = _parted(rows * outputs, filled, filled, _LEVELS)
            made = (sums, floats, numbers, 0, lanes)
            return *asked(x, beside, made, sizes, wide=_BY_TILES, ahead=self._ahead), room
        room, (sums, floats) = _parted(rows * parts * outputs, rows * inputs)
        # Of float32, two numbers each, the bytes of AVX2's kernels are finer: fewer neurons share a scale.
        wide = self.uses_bytes and (bits == 4 or parts == 1)
        return *asked(x, beside, (sums, floats, 0, 0, 0), sizes, wide=wide, ahead=self._ahead), room

    def multiply_floats(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """x [M, I] times `weight` [O, I] plus `bias` [O], all of the same 16-bit type: [M, O] in it; sums are in
        float32."""
        if x.dtype not in HALVES:
            raise ValueError(f"x must be of 16-bit floats, and is of {x.dtype}")
        (rows, inputs), outputs, wide = x.shape, weight.shape[0], self._pairs and x.dtype == torch.bfloat16
        check(weight, (outputs, inputs), x.dtype, "the matrix")
        sizes = (rows, 1, outputs, outputs, inputs, 1)
        beside = (None, weight, None, None, bias)
        if self._tiles:
            self._check_tiles(x)
        tiled = _TILE * -(-inputs // _GROUP) if self._tiles else 0
        _room, (sums, floats, numbers) = _parted(rows * outputs, 0 if wide else rows * inputs, tiled)
        how = _BY_TILES if self._tiles else wide
        made = (sums, floats, numbers, 0, 0)
        return run(self._library, "multiply_floats", x, beside, made, sizes, wide=how, ahead=self._ahead)

    def _check_tiles(self, x: Tensor) -> None:
        if x.dtype != torch.bfloat16 or not 0 < x.shape[0] <= TILE_ROWS or not self._library.sums_tiles:
            raise ValueError(f"{x.shape[0]} rows of {x.dtype}: up to {TILE_ROWS} of bfloat16 are known, with AMX")


def _parted(*floats: int) -> tuple[Tensor, list[int]]:
    """One allocation for so many floats each, and the addresses of all."""
    room = torch.empty(sum(floats), dtype=torch.float32, device="cpu")
    first = room.data_ptr()
    return room, [first + 4 * before for before in itertools.accumulate(floats[:-1], initial=0)]


def _made(sizes: Sizes) -> tuple[Tensor, tuple[int, ...]]:
    """One allocation for all that is made on the way, sums, integers of 16 and 32 bits, and scales; and addresses."""
    rows, parts, outputs, _, inputs, group = sizes
    all_rows, groups, pairs = rows * parts, -(-inputs // group), -(-inputs // _FILLED) * _FILLED // 2
    of_groups = all_rows * groups
    room, (sums, numbers, step, floats, lanes) = _parted(
        all_rows * outputs, all_rows * pairs, of_groups, of_groups, _LANES * of_groups
    )
    return room, (sums, floats, numbers, step, lanes)


def _parts(x: Tensor) -> int:
    # 16 bits beside a group's largest number hold what a 16-bit float says, but for the last bits of numbers below a
    # hundredth of it; float32 takes two rows of them.
    return 2 if x.dtype == torch.float32 else 1


@functools.cache
def kernels(*, tiles: bool = False, lanes: bool = False) -> GemvKernels | None:
    """Ours, or None where torch's have to do."""
    loaded = library()
    return GemvKernels(loaded, tiles=tiles, lanes=lanes) if loaded is not None else None


# As the table calls them: x [M, I], the matrix's tensors by name, its outputs, and the scratch of other kernels.
Tensors = Mapping[str, Tensor | None]


def int8_product(x: Tensor, tensors: Tensors, outputs: int, scratch: Any, *, tiles: bool = False) -> Tensor:
    """Of int8 rows."""
    own, dtype, weight, scale = kernels(tiles=tiles), x.dtype, tensors["weight"], tensors["scale"]
    assert own is not None and weight is not None and scale is not None  # noqa: PT018
    return own.multiply_int8(x, weight, scale, typed(tensors["bias"], dtype), typed(tensors["input_scale"], dtype))


def rows_product(
    bits: int, x: Tensor, tensors: Tensors, outputs: int, scratch: Any, *, tiles: bool = False, lanes: bool = False
) -> Tensor:
    """Of rows of 2 to 4 `bits`."""
    own, weight, groups = kernels(tiles=tiles, lanes=lanes), tensors["weight"], tensors["groups"]
    scale = tensors["scale"]
    assert own is not None and weight is not None and groups is not None and scale is not None  # noqa: PT018
    return own.multiply_rows(x, weight, groups, scale, typed(tensors["bias"], x.dtype), bits=bits)


def strips_product(
    bits: int, x: Tensor, tensors: Tensors, outputs: int, scratch: Any, *, tiles: bool = False
) -> Tensor:
    """Of strips of 2 to 4 `bits`."""
    own, dtype, weight, groups = kernels(tiles=tiles), x.dtype, tensors["weight"], tensors["groups"]
    inputs = typed(tensors["input_scale"], dtype)
    assert own is not None and weight is not None and groups is not None and inputs is not None  # noqa: PT018
    return own.multiply_strips(x, weight, groups, inputs, typed(tensors["bias"], dtype), outputs, bits=bits)


_apart = False


@contextlib.contextmanager
def rows_apart() -> Iterator[None]:
    """Inside, rows are sequences of their own. Elsewhere they may be a part of a prompt, and a few are summed in one
    order, so that the part is the same to the last bit as it is in the whole."""
    global _apart
    before, _apart = _apart, True
    try:
        yield
    finally:
        _apart = before


def takes_lanes(x: Tensor, tensors: Tensors) -> bool:
    """Whether outputs as lanes are the faster way: from five rows on, and from three whose bytes would not stay in the
    first cache."""
    rows, inputs = x.shape
    return ((_apart and (rows > _FEW or inputs > _NARROW)) or rows > _ALIKE) and not needs_gradient(x)


def takes_tiers(x: Tensor | Sequence[Tensor], tiers: Sequence[Any], *beside: Any) -> bool:
    """Whether tiers, of each its layout's name and its tensors, are all of 2 to 4 bits, and few rows of x want them."""
    first = x if isinstance(x, Tensor) else x[0]
    known = all(name[:3] == "int" and name[3:4] in ("2", "3", "4") for name, _ in tiers)
    return known and len(tiers) <= MOST_TIERS and first.shape[0] <= ROWS and not needs_gradient(first)


def tiers_rows_product(x: Tensor, tiers: Sequence[tuple[str, Tensors]], scratch: Any) -> Tensor:
    """x [M, I] times several matrices of rows, their outputs behind each other."""
    own = kernels()
    assert own is not None
    return own.multiply_tiers_rows(x, [_tier(name, tensors, "scale", None) for name, tensors in tiers])


def tiers_strips_product(
    x: Sequence[Tensor], tiers: Sequence[tuple[str, Tensors]], bias: Tensor | None, outputs: int, scratch: Any
) -> Tensor:
    """The sum of each x [M, I] times its matrix of strips."""
    own, dtype = kernels(), x[0].dtype
    assert own is not None
    parts = [_tier(name, tensors, "input_scale", dtype) for name, tensors in tiers]
    return own.multiply_tiers_strips(x, parts, typed(bias, dtype), outputs)


def _tier(name: str, tensors: Tensors, scale: str, dtype: torch.dtype | None) -> Tier:
    weight, groups, own = tensors["weight"], tensors["groups"], tensors[scale]
    assert weight is not None and groups is not None and own is not None  # noqa: PT018
    return int(name[3]), weight, groups, own if dtype is None else own.to(dtype)


def float_product(x: Tensor, tensors: Tensors, outputs: int, scratch: Any, *, tiles: bool = False) -> Tensor:
    """Of 16-bit floats; x may have more axes."""
    own, weight = kernels(tiles=tiles), tensors["weight"]
    assert own is not None and weight is not None  # noqa: PT018
    return own.multiply_floats(x.reshape(-1, x.shape[-1]), weight, tensors["bias"]).view(*x.shape[:-1], -1)
