"""A few rows times a matrix, or several: int8 rows, rows and strips of 2 to 4 bits, or 16-bit floats (gemv.c).

torch 2.13 has its 8-bit kernel for bfloat16 in the first place, and none for forms like these of int4 or less
(benchmarks/NOTES.md has the rates).
"""

import contextlib
import functools
import itertools
import struct
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from griffin_offload.kernels.library import (
    HALVES,
    Library,
    calls_are_noted,
    check,
    library,
    needs_gradient,
    number_type,
    packed,
)

_INT8_GROUP = 128  # inputs that share a scale, and the most that may; gemv_int8.c knows it, too
_GROUP = 32
_HALF = 16
_STRIP = 64  # outputs
_FILLED = 256  # inputs of rows in groups are filled up to a multiple of it at most, as gemv.h says
_LANES = 16
_BY_TILES, _BY_LANES = 2, 3  # as gemv.c has them
_TILE = 256  # floats of a tile
_FEW = 3  # rows
_ALIKE = 22  # rows
_LEVELS = 2048  # floats, of a table of the tiles' kernel for strips
_TILED = ("int4_rows", "int4_strips", "int8", "float")
_CALLS = 512  # that are remembered
TILE_ROWS = 16
"""Up to so many rows fill tiles."""
ROWS = 32
"""Up to so many rows the kernels for quantised matrices are faster than translating the matrix."""
_FORMS = {f"int{bits}_{kind}": 3 * (kind == "strips") + bits - 2 for kind in ("rows", "strips") for bits in (2, 3, 4)}
_FORMS |= {"int8": 6, "float": 7}
"""Of layouts, as gemv.c counts them."""
# Of the structs Several and Matrix of gemv.c: the first behind its Product, and both parts of the second.
_SEVERAL, _MATRIX, _ROWS_OF = struct.Struct("@7q"), struct.Struct("@5Pq"), struct.Struct("@3q")
Tensors = Mapping[str, Tensor | None]
"""Of a matrix, by name; what is not there is as None."""


class Kind(NamedTuple):
    """What matrices have in common that one call multiplies."""

    layout: str
    outputs: int
    """Those that the matrix has, filled up to whole strips."""
    features: int
    """Those that are wanted."""
    inputs: int
    scaled: bool
    """Whether inputs have a scale."""
    dtype: torch.dtype
    """Of x."""


class CheckedMatrix(NamedTuple):
    """What kernels need of a matrix that rests, checked once: true as long as its tensors lie where they do."""

    kind: Kind
    addresses: bytes
    made: tuple[Tensor, ...] = ()
    """What lies elsewhere: of its tensors those that are of another type than x."""


_kind = functools.lru_cache(_CALLS)(Kind)  # of those that are the same one object, which is compared fast


def checked_matrix(layout: str, tensors: Tensors, features: int | None, dtype: torch.dtype) -> CheckedMatrix:
    """A matrix in a layout that gemv.c knows, whose first `features` outputs are wanted, for x of a `dtype`. ValueError
    for tensors that do not make one."""
    weight, scale, strips = tensors["weight"], tensors.get("scale"), layout.endswith("_strips")
    assert weight is not None
    outputs, inputs = weight.shape[0], weight.shape[1]
    if layout in ("int8", "float"):
        check(weight, (outputs, inputs), torch.int8 if layout == "int8" else dtype, "the matrix")
        groups = None
    else:
        groups = tensors["groups"]
        assert groups is not None
        outputs, inputs = _check_groups(layout, weight, groups)
    if scale is not None:
        check(scale, (outputs,), name="the scale")
    features = outputs if features is None else features
    if not (0 <= features <= outputs and (strips or features == outputs)):
        raise ValueError(f"features, {features}, must be some of {outputs} outputs of strips, or all of rows")
    input_scale, bias = tensors.get("input_scale"), tensors.get("bias")
    if input_scale is not None:
        check(input_scale, (inputs,), dtype, "the inputs' scale")
    if bias is not None:
        check(bias, (features,), dtype, "the bias")
    where = [0 if part is None else part.data_ptr() for part in (input_scale, weight, groups, scale, bias)]
    addresses = _MATRIX.pack(*where, 0 if scale is None else number_type(scale, "the scale"))
    return CheckedMatrix(_kind(layout, outputs, features, inputs, input_scale is not None, dtype), addresses)


def checked_typed(layout: str, tensors: Tensors, features: int, dtype: torch.dtype) -> CheckedMatrix:
    """The same of a matrix whose scale of inputs and bias may be of another type."""
    named = ((name, tensors.get(name)) for name in ("input_scale", "bias"))
    made = {name: own.to(dtype) for name, own in named if own is not None and own.dtype != dtype}
    found = checked_matrix(layout, {**tensors, **made} if made else tensors, features, dtype)
    return found._replace(made=tuple(made.values())) if made else found


def _check_groups(layout: str, codes: Tensor, groups: Tensor) -> tuple[int, int]:
    """Outputs and inputs of a matrix of 2 to 4 bits."""
    bits = int(layout[3])
    if layout.endswith("_strips"):
        strips, inputs = codes.shape[0], codes.shape[1]
        check(codes, (strips, inputs, _STRIP * bits // 8), torch.uint8, "the codes")
        check(groups, (strips * _STRIP // _GROUP, inputs, 2), torch.uint8, "the groups")
        if inputs % _LANES:
            raise ValueError(f"{inputs} inputs of strips must be a multiple of {_LANES}")
        return strips * _STRIP, inputs
    outputs, per_row = groups.shape[0], groups.shape[1]
    check(codes, (outputs, per_row * 4 * bits), torch.uint8, "the codes")
    check(groups, (outputs, per_row, 2), torch.uint8, "the groups")
    return outputs, per_row * _GROUP


Address = tuple[Any, int] | None
"""Of a tensor a weak reference and its address: what is known of it keeps no memory."""


def addresses_of(tensors: Iterable[Tensor | None]) -> list[Address]:
    """Where tensors lie now."""
    return [None if own is None else (weakref.ref(own), own.data_ptr()) for own in tensors]


def still_at(tensors: Iterable[Tensor | None], addresses: Sequence[Address]) -> bool:
    """Whether those are the same tensors, and lie there still."""
    pairs = itertools.zip_longest(tensors, addresses, fillvalue=())
    return all(
        address is None if own is None else address and address[0]() is own and address[1] == own.data_ptr()
        for own, address in pairs
    )


class Known:
    """The last checked matrix of one module; it is checked anew when its tensors are others."""

    def __init__(self) -> None:
        self._key: tuple[str, int, torch.dtype] | None = None
        self._addresses: list[Address] = []
        self._checked: CheckedMatrix | None = None

    def __call__(self, layout: str, tensors: Tensors, features: int, dtype: torch.dtype) -> CheckedMatrix:
        key = layout, features, dtype
        if self._checked is None or key != self._key or not still_at(tensors.values(), self._addresses):
            self._checked = checked_typed(layout, tensors, features, dtype)
            self._key, self._addresses = key, addresses_of(tensors.values())
        if self._checked.made and calls_are_noted():  # replays read the tensors themselves: what is made may be gone
            return checked_typed(layout, tensors, features, dtype)
        return self._checked


class Way(NamedTuple):
    """How rows are multiplied by a matrix of some kind."""

    wide: int
    parts: int
    group: int
    """Inputs that share a scale when they become integers."""
    made: tuple[int, int, int, int]
    """Floats, numbers, steps and lanes that are made of a row, in 32 bits; for tiles of all rows."""


class Call(NamedTuple):
    """What a call is made of but for addresses."""

    way: Way
    places: list[bytes]
    """Of each matrix which rows it multiplies, and where its product is."""
    total: int
    """Rows of the product."""
    floats: int
    """Of what is made on the way, the parts of which begin at `offsets`, in bytes."""
    offsets: list[int]
    sizes: tuple[int, ...]
    several: bytes


class GemvKernels:
    """The products of a library. With `tiles` those of int4, int8 and floats by instructions for whole tiles: of up to
    TILE_ROWS rows of bfloat16, whose products are the same however many there are, but summed in another order than
    without. With `lanes` those of int4 rows with outputs as lanes, and of int4 strips by bytes where others take 16
    bits, which is faster for more than a few rows and sums in another order, too. `wide` and `ahead` are for tests:
    those of older processors, and as another processor would read."""

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
        self._calls = functools.lru_cache(_CALLS)(self._call_of)

    def multiply_int8(
        self, x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None = None, input_scale: Tensor | None = None
    ) -> Tensor:
        """x [M, I], times `input_scale` [I], times int8 `weight` [O, I] and its rows' `scale` [O], plus `bias` [O]:
        [M, O] in the type of x."""
        return self._multiply("int8", x, weight=weight, scale=scale, bias=bias, input_scale=input_scale)

    def multiply_rows(
        self, x: Tensor, codes: Tensor, groups: Tensor, scale: Tensor, bias: Tensor | None = None, *, bits: int = 4
    ) -> Tensor:
        """x [M, I] times rows of 2 to 4 `bits`, codes [O, I bits / 8], groups [O, I / 32, 2] and `scale` [O], plus
        `bias` [O]: as of `multiply_int8`."""
        return self._multiply(f"int{bits}_rows", x, weight=codes, groups=groups, scale=scale, bias=bias)

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
        tensors = {"weight": codes, "groups": groups, "input_scale": input_scale, "bias": bias}
        return self._multiply(f"int{bits}_strips", x, features, **tensors)

    def multiply_floats(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """x [M, I] times `weight` [O, I] plus `bias` [O], all of the same 16-bit type: [M, O] in it; sums are in
        float32."""
        return self._multiply("float", x, weight=weight, bias=bias)

    def _multiply(self, layout: str, x: Tensor, features: int | None = None, **tensors: Tensor | None) -> Tensor:
        return self.multiply(x, checked_matrix(layout, tensors, features, x.dtype))

    def multiply(self, x: Tensor, matrix: CheckedMatrix) -> Tensor:
        """x [M, I] times a matrix: [M, features] in the type of x."""
        return self.multiply_several(x, (matrix,), ((0, x.shape[0]),))

    def multiply_several(self, x: Tensor, matrices: Sequence[CheckedMatrix], rows: Sequence[tuple[int, int]]) -> Tensor:
        """Several of one kind by one call: each of `matrices` times its rows of x [M, I], the first one and how many.
        They are those of the matrix before it, or behind them. Products [sum of these, features] stand behind each
        other, each the same as if it were the only one."""
        kind, x_type, x = matrices[0].kind, number_type(x, "x"), x.contiguous()
        check(x, (x.shape[0], kind.inputs), kind.dtype, "x")
        call = self._calls(kind, x.shape[0], tuple(rows))
        structs = list[bytes]()
        for (own, addresses, _), place in zip(matrices, call.places, strict=True):
            if own is not kind and own != kind:
                raise ValueError(f"matrices of one kind must be given, and not {own} beside {kind}")
            structs += addresses, place
        room = torch.empty(call.floats, dtype=torch.float32, device="cpu")
        product, made = x.new_empty(call.total, kind.features), room.data_ptr()
        where = x.data_ptr(), 0, 0, 0, 0, 0, product.data_ptr(), *[made + offset for offset in call.offsets]
        job = packed(where, (*call.sizes, x_type, 0), wide=call.way.wide, ahead=self._ahead)
        self._library.call("multiply_several", b"".join((job, call.several, *structs)))
        return product

    def _call_of(self, kind: Kind, x_rows: int, rows: tuple[tuple[int, int], ...]) -> Call:
        """All that is known of a call beforehand. ValueError for rows that are not there."""
        places, total, last = list[bytes](), 0, (0, 0)
        for first, count in rows:
            fits = sum(last) <= first <= first + count <= x_rows or last == (first, count)
            if not fits or not 0 <= count <= ROWS:
                raise ValueError(f"{count} rows from {first}: up to {ROWS} are known, of {x_rows} and behind {last}")
            places.append(_ROWS_OF.pack(first, count, total))
            total, last = total + count, (first, count)
        way, made = self._way_of(kind, x_rows), total if kind.scaled else x_rows
        if way.wide == _BY_TILES:
            assert len(rows) == 1, "tiles are filled by the rows of one"
            made = 1
        floats = [total * way.parts * kind.outputs, *(made * each for each in way.made)]
        ends = list(itertools.accumulate(floats))
        several = _SEVERAL.pack(_FORMS[kind.layout], len(rows), kind.scaled, *way.made)
        sizes = (x_rows, way.parts, kind.outputs, kind.features, kind.inputs, way.group)
        return Call(way, places, total, ends[-1], [0, *(4 * end for end in ends[:-1])], sizes, several)

    def _way_of(self, kind: Kind, rows: int) -> Way:
        tiled = self._tiles and kind.layout in _TILED
        return self._by_tiles(kind, rows) if tiled else self._by_rows(kind)

    def _by_rows(self, kind: Kind) -> Way:
        layout, inputs = kind.layout, kind.inputs
        parts = 2 if kind.dtype == torch.float32 else 1
        # 16 bits beside a group's largest number hold what a 16-bit float says, but for the last bits of numbers below
        # a hundredth of it; float32 takes two rows of them.
        if layout == "float":
            if kind.dtype not in HALVES:
                raise ValueError(f"x must be of 16-bit floats, and is of {kind.dtype}")
            wide = int(self._pairs and kind.dtype == torch.bfloat16)
            return Way(wide, 1, 1, (0 if wide else inputs, 0, 0, 0))
        if layout.endswith("_strips"):
            # Of float32, two numbers each, the bytes of AVX2's kernels are finer: fewer neurons share a scale.
            by_bytes = self._lanes and layout in _TILED and parts == 1
            wide = _BY_LANES if by_bytes else self.uses_bytes and (layout in _TILED or parts == 1)
            return Way(wide, parts, _GROUP, (inputs, 0, -(-inputs // _GROUP), 0))
        group = _INT8_GROUP if layout == "int8" else _GROUP if layout in _TILED else _HALF
        groups, numbers = parts * -(-inputs // group), parts * -(-inputs // _FILLED) * _FILLED // 2
        by_lanes = self._lanes and layout == "int4_rows"
        return Way(_BY_LANES if by_lanes else self.uses_bytes, parts, group, (groups, numbers, groups, _LANES))

    def _by_tiles(self, kind: Kind, rows: int) -> Way:
        if kind.dtype != torch.bfloat16 or not 0 < rows <= TILE_ROWS or not self._library.sums_tiles:
            raise ValueError(f"{rows} rows of {kind.dtype}: up to {TILE_ROWS} of bfloat16 are known, with AMX")
        groups = -(-kind.inputs // _GROUP)
        if kind.layout == "float":
            return Way(_BY_TILES, 1, 1, (0, _TILE * groups, 0, 0))
        if kind.layout == "int8":
            tiles = -(-kind.inputs // _INT8_GROUP) * (2 if rows > TILE_ROWS // 2 else 1)
            return Way(_BY_TILES, 1, _INT8_GROUP, (0, 2 * _TILE * tiles, TILE_ROWS * tiles, 0))
        if kind.layout == "int4_strips":
            filled = rows * groups * _GROUP
            return Way(_BY_TILES, 1, _GROUP, (filled, filled, 0, _LEVELS))
        filled, span = -(-groups // 4) * 4, 1 if rows > TILE_ROWS // 2 else 2 if rows > TILE_ROWS // 4 else 4
        units = filled // span * TILE_ROWS
        return Way(_BY_TILES, 1, _GROUP, (units, _TILE * filled // min(span, 2), units, 0))


@functools.cache
def kernels(*, tiles: bool = False, lanes: bool = False) -> GemvKernels | None:
    """Ours, or None where torch's have to do."""
    loaded = library()
    return GemvKernels(loaded, tiles=tiles, lanes=lanes) if loaded is not None else None


# As the table calls them: x [M, I], the matrix's tensors by name, its outputs, and the scratch of other kernels.


def product(
    layout: str,
    x: Tensor,
    tensors: Tensors,
    outputs: int,
    scratch: Any,
    *,
    tiles: bool = False,
    lanes: bool = False,
) -> Tensor:
    """Of a matrix in a `layout`; x may have more axes."""
    own = kernels(tiles=tiles, lanes=lanes)
    assert own is not None
    rows = x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
    found = own.multiply(rows, checked_typed(layout, tensors, outputs, x.dtype))
    return found if rows is x else found.view(*x.shape[:-1], outputs)


def several_product(x: Tensor, matrices: Sequence[CheckedMatrix], rows: Sequence[tuple[int, int]]) -> Tensor:
    """Of several matrices that rest."""
    own = kernels()
    assert own is not None
    return own.multiply_several(x, matrices, rows)


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


def takes_bytes(x: Tensor, tensors: Tensors) -> bool:
    """Whether strips' inputs may be bytes: of rows that are sequences of their own, not of float32."""
    return _apart and x.dtype in HALVES and not needs_gradient(x)


def takes_lanes(x: Tensor, tensors: Tensors) -> bool:
    """Whether outputs as lanes are the faster way: from four rows on."""
    return ((_apart and x.shape[0] > _FEW) or x.shape[0] > _ALIKE) and not needs_gradient(x)
