"""One table of kernels: which function does which operation, on which layout, device and number of rows.

Rows stand best first: the first that applies here, and takes what it is called with, does the work. torch's way is the
last one of every operation; formats add theirs when they are registered. A new kernel is a file, and a row in `_ours`
or by `add`. `griffin-offload bench --kernels` prints the table.
"""

import contextlib
import functools
import importlib.util
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from griffin_offload.kernels import attention, by_blocks, gather, gemm, gemv, gguf_blocks, quantize, small_operators
from griffin_offload.kernels.library import HALVES, NUMBER_TYPES, library, needs_gradient

Tensors = Mapping[str, Tensor | None]
"""Of a matrix, by name: weight, bias, and what its layout has beside them."""
Several = Callable[[Tensor, Sequence[gemv.CheckedMatrix], Sequence[tuple[int, int]]], Tensor]
MANY = gemv.ROWS + 1
"""From so many rows on it makes no difference to any kernel how many there are."""


def _anywhere() -> str | None:
    return None


@dataclass(frozen=True, eq=False)
class Kernel:
    """A row of the table."""

    operation: str
    """gemv and gemm (a resident matrix times a few rows, any matrix times many), gather, quantize, dequantize,
    attention, rms_norm."""
    layout: str
    """Of the matrix, as formats name it; of the other operations, what is made."""
    name: str
    function: Callable[..., Any]
    """gemv and gemm: of x [M, I] (floats: [..., I]), the matrix's tensors by name, its outputs, and the scratch."""
    device: str | None = None
    """None: any."""
    needs: Callable[[], str | None] = _anywhere
    """Why not on this machine; None: it works here. Asked once."""
    takes: Callable[..., bool] | None = None
    """Whether it does a call, by its arguments; None: every one. Products are asked with x and the tensors."""
    numbers: frozenset[torch.dtype] | None = None
    """Types that x may have; None: any."""
    computes: torch.dtype | None = None
    """The scratch's precision where it multiplies; None: any."""
    rows: tuple[int, int] = (0, MANY)
    """The fewest and the most rows of x that it is best for; MANY: no limit."""
    several: Several | None = None
    """The same of several matrices, each row as if alone: of x, of `gemv.checked_matrix`, and which
    rows are whose."""
    ours: bool = True
    """False: torch does it."""
    prepare: Callable[[torch.device, torch.dtype], object] | None = None
    """What is to be done at load, and not at the first token: compiling."""


_rows: list[Kernel] = []
# What applies on this machine, by the facts of a call that rarely change.
_found: dict[tuple[Any, ...], tuple[Kernel, ...]] = {}


def add(*kernels: Kernel, last: bool = False) -> None:
    """Put rows before all others, or behind them."""
    _rows[len(_rows) if last else 0 : len(_rows) if last else 0] = kernels
    _found.clear()


def remove(unwanted: Callable[[Kernel], bool]) -> None:
    """Take rows back."""
    _rows[:] = [kernel for kernel in _rows if not unwanted(kernel)]
    _found.clear()


def rows() -> tuple[Kernel, ...]:
    """The whole table, in its order."""
    return tuple(_rows)


@contextlib.contextmanager
def leaving_out(unwanted: Callable[[Kernel], bool]) -> Iterator[None]:
    """The table without some rows, for tests and comparisons: `leaving_out(lambda kernel: kernel.ours)` is torch's."""
    kept = list(_rows)
    _rows[:] = [kernel for kernel in kept if not unwanted(kernel)]
    _found.clear()
    try:
        yield
    finally:
        _rows[:] = kept
        _found.clear()


_alike = False


@contextlib.contextmanager
def rows_alike() -> Iterator[None]:
    """Up to gemv.ROWS rows are multiplied by what multiplies one: where that is ours, each row's product is then the
    same to the last bit, however many there are."""
    global _alike
    before, _alike = _alike, True
    try:
        yield
    finally:
        _alike = before


def products(layout: str, rows: int, x: Tensor, computes: torch.dtype | None, resident: bool) -> tuple[Kernel, ...]:
    """What multiplies `rows` rows like x by a matrix in `layout`, best first, in a scratch of `computes`. A matrix that
    is not `resident` passes by once, with a prompt: many rows are its case."""
    device = "cpu" if x.is_cpu else x.device.type
    rows = 1 if _alike and 1 < rows <= gemv.ROWS else rows
    key = (layout, rows if rows < MANY else MANY, device, x.dtype, computes, resident)
    found = _found.get(key)
    return _find(key, ("gemv", "gemm") if resident else ("gemm",), key[1], computes) if found is None else found


def candidates(operation: str, layout: str, like: Tensor) -> tuple[Kernel, ...]:
    """What does another operation with tensors like that, best first."""
    key = (layout, operation, like.device.type, like.dtype)
    found = _found.get(key)
    return _find(key, (operation,), None, None) if found is None else found


def choose(operation: str, layout: str, *arguments: Any, like: Tensor | None = None) -> Kernel:
    """The first kernel that takes these; `like` is the tensor whose device and type decide, else the first argument."""
    for kernel in candidates(operation, layout, arguments[0] if like is None else like):
        if kernel.takes is None or kernel.takes(*arguments):
            return kernel
    raise AssertionError(f"nothing does {operation} {layout}")


def call(operation: str, layout: str, *arguments: Any, like: Tensor | None = None) -> Any:
    """Its result."""
    return choose(operation, layout, *arguments, like=like).function(*arguments)


def prepare(layouts: Iterable[str], device: torch.device, dtype: torch.dtype) -> None:
    """Compile what multiplies matrices in `layouts` there and is compiled when it is needed first."""
    for kernel in _rows:
        if kernel.prepare is not None and kernel.layout in layouts and kernel.device == device.type:
            kernel.prepare(device, dtype)


def forget() -> None:
    """Ask again what this machine has."""
    _found.clear()


def why_not(kernel: Kernel, devices: Iterable[str]) -> str | None:
    """Why a row does nothing on this machine, which has `devices`; None where it does."""
    if kernel.device is not None and kernel.device not in devices:
        return f"no {kernel.device} device is here"
    return kernel.needs()


def _find(
    key: tuple[Any, ...], operations: tuple[str, ...], rows: int | None, computes: torch.dtype | None
) -> tuple[Kernel, ...]:
    layout, _, device, dtype = key[:4]
    found = tuple(
        kernel
        for kernel in _rows
        if kernel.operation in operations
        and kernel.layout == layout
        and kernel.device in (None, device)
        and (kernel.numbers is None or dtype in kernel.numbers)
        and (kernel.computes is None or kernel.computes == computes)
        and (rows is None or kernel.rows[0] <= rows <= kernel.rows[1])
        and kernel.needs() is None  # last: where there is no library, asking for it warns
    )
    _found[key] = found
    return found


# Our own rows, and of torch's those that belong to no format.


def _compiled() -> str | None:
    return None if library() is not None else "the compiled library is not here"


def _has(ability: str, name: str) -> Callable[[], str | None]:
    def needs() -> str | None:
        found = library()
        return _compiled() if found is None or getattr(found, ability) else f"this processor has no {name}"

    return needs


def _pairs() -> str | None:
    found = library()
    return "AMX does it" if found is not None and found.sums_tiles else _has("sums_pairs", "AVX512-BF16")()


def _float32() -> str | None:
    # Only what was measured is replaced.
    if torch.backends.cpu.get_cpu_capability() != "AVX2":
        return "torch multiplies float32 as fast here"
    return _compiled()


def _triton() -> str | None:
    return None if importlib.util.find_spec("triton") is not None else "Triton is not installed"


def _no_gradient(x: Tensor, tensors: Tensors) -> bool:
    return not (x.requires_grad and torch.is_grad_enabled())


def _even(x: Tensor, tensors: Tensors) -> bool:
    return x.shape[-1] % 2 == 0 and not needs_gradient(x)


def alike(x: Tensor, tensors: Tensors) -> bool:
    """Whether plain rows and weights are of one type, fit, and need no gradient."""
    weight = tensors["weight"]
    assert weight is not None
    same = x.dtype == weight.dtype and weight.shape[1] == x.shape[-1]
    return same and x.numel() > 0 and weight.numel() > 0 and not needs_gradient(x)


_NUMBERS = frozenset(NUMBER_TYPES)
_SHORT = frozenset((torch.int8, torch.uint8, torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.float8_e5m2))
_FEW_BITS = (4, 3, 2)  # of formats in groups
# From so many rows on a matrix is better turned into bfloat16, where nothing multiplies whole tiles (Zen 4).
_PAIRS_FROM = {"int8": 11, "int4_strips": 11, "int3_strips": 12, "int2_strips": 18, "int3_rows": 23, "int2_rows": 23}
_RESIDENT = ("int8", *(f"int{bits}_{form}" for bits in _FEW_BITS for form in ("rows", "strips")))


def _gemm(name: str, needs: Callable[[], str | None], computes: torch.dtype, best_from: dict[str, int]) -> list[Kernel]:
    """Of gemm.c: fewer rows than `best_from` are left to the kernels for a few."""
    pairs = computes == torch.bfloat16
    return [
        Kernel(
            "gemm",
            layout,
            f"multiply_many_{layout} ({name})",
            functools.partial(gemm.product, layout),
            device="cpu",
            needs=needs,
            takes=_even if pairs else _no_gradient,
            numbers=frozenset((torch.bfloat16,)) if pairs else _NUMBERS,
            computes=computes,
            rows=(best_from.get(layout, MANY if layout in _RESIDENT else 0), MANY),
        )
        for layout in (*_RESIDENT, *(f"int{bits}_neurons" for bits in _FEW_BITS))
    ]


_NAMES = {"float": "floats"}
_FEW: dict[str, Any] = {"device": "cpu", "needs": _compiled, "takes": _no_gradient, "numbers": _NUMBERS}


def _by_tiles() -> list[Kernel]:
    tiled: dict[str, Any] = _FEW | {
        "needs": _has("sums_tiles", "AMX"),
        "numbers": frozenset((torch.bfloat16,)),
        "rows": (3, gemv.TILE_ROWS),
    }
    return [
        Kernel(
            *("gemv", layout, f"multiply_{_NAMES.get(layout, layout)} (AMX)"),
            functools.partial(gemv.product, layout, tiles=True),
            **(tiled | ({"takes": alike} if layout == "float" else {})),
        )
        for layout in ("int4_rows", "int4_strips", "int8", "float")
    ]


def _by_rows() -> list[Kernel]:
    """Of a few rows of x, or of several matrices."""
    halves: dict[str, Any] = {"takes": alike, "numbers": HALVES}
    # Up to so many rows ours are faster than torch's with 16-bit instructions; than translated matrices without.
    plain: list[dict[str, Any]] = [
        halves | {"rows": (1, 2)},
        halves | {"computes": torch.float32, "rows": (1, gemv.ROWS)},
    ]
    forms = [f"int{bits}_{form}" for bits in _FEW_BITS for form in ("rows", "strips")]
    return [
        Kernel(
            *("gemv", layout, f"multiply_{_NAMES.get(layout, layout)}", functools.partial(gemv.product, layout)),
            several=gemv.several_product,
            **(_FEW | {"rows": (0, gemv.ROWS)} | own),
        )
        for layout, own in (("int8", {}), *((form, {}) for form in forms), *(("float", own) for own in plain))
    ]


def _products_of_ours() -> list[Kernel]:
    plain: dict[str, Any] = {"device": "cpu", "needs": _compiled, "takes": alike, "numbers": HALVES}
    pack: dict[str, Any] = {"numbers": _NUMBERS, "rows": (0, by_blocks.PACK_ROWS)}
    return [
        *_by_tiles(),
        *_gemm("AMX", _has("sums_tiles", "AMX"), torch.bfloat16, {"int8": 17, **dict.fromkeys(_RESIDENT[1:], 24)}),
        *_gemm("AVX512-BF16", _pairs, torch.bfloat16, _PAIRS_FROM),
        *_gemm("AVX2", _float32, torch.float32, {}),
        *(
            Kernel(
                *("gemv", f"int4_{form}", f"multiply_int4_{form} ({how})"),
                functools.partial(gemv.product, f"int4_{form}", lanes=True),
                **(_FEW | {"needs": _has("sums_bytes", "AVX512-VNNI"), "takes": takes}),
                rows=(3, gemv.ROWS),
            )
            for form, how, takes in (("rows", "lanes", gemv.takes_lanes), ("strips", "bytes", gemv.takes_bytes))
        ),
        *_by_rows(),
        Kernel(
            *("gemv", "int8", "multiply_int8 (Triton)", by_blocks.triton_product, "cuda", _triton),
            **(pack | {"takes": by_blocks.triton_takes, "prepare": by_blocks.triton_works}),
        ),
        Kernel(
            *("gemv", "int8", "_weight_int8pack_mm", by_blocks.pack_product),
            **(pack | {"takes": by_blocks.pack_takes, "ours": False}),
        ),
        Kernel(
            *("gemm", "float", "multiply_many_float (AVX2)", gemm.float_product),
            **(plain | {"needs": _float32}),
            computes=torch.float32,
        ),
    ]


def _forms_of_ours() -> list[Kernel]:
    own: dict[str, Any] = {"device": "cpu", "needs": _compiled}
    made: dict[str, Any] = {**own, "takes": quantize.takes, "numbers": _NUMBERS}
    return [
        Kernel("quantize", "largest_of_rows", "quantize_largest", quantize.largest_of_rows, **made),
        Kernel("quantize", "row_norms", "quantize_row_norms", quantize.row_norms, **made),
        Kernel("quantize", "column_norms", "quantize_column_norms", quantize.column_norms, **made),
        Kernel("quantize", "int8", "quantize_int8", quantize.quantize_int8, **made),
        Kernel("quantize", "norms_of_codes", "norms_of_codes", quantize.norms_of_codes, **own),
        Kernel("quantize", "pairs_of_codes", "pairs_of_codes", quantize.pairs_of_codes, **own),
        *(
            Kernel(
                "quantize", f"int{bits}_{form}", f"quantize_int{bits}_{form}", functools.partial(function, bits), **made
            )
            for bits in _FEW_BITS
            for form, function in (("rows", quantize.quantize_rows), ("neurons", quantize.quantize_neurons))
        ),
        Kernel("quantize", "int3_of_int4", "of_int4", functools.partial(quantize.of_int4, 3), **own),
        Kernel("quantize", "int2_of_int4", "of_int4", functools.partial(quantize.of_int4, 2), **own),
        *(
            Kernel("dequantize", layout, name, function, **own, takes=gguf_blocks.takes)
            for layout, (name, function) in gguf_blocks.BY_LAYOUT.items()
        ),
    ]


def _others_of_ours() -> list[Kernel]:
    own: dict[str, Any] = {"device": "cpu", "needs": _compiled}
    halves: dict[str, Any] = {**own, "numbers": HALVES}
    vbmi2 = _has("leaves_out", "AVX512-VBMI2")
    return [
        Kernel(
            *("gather", "columns", "gather_columns", gather.gather_columns, "cpu", vbmi2),
            takes=gather.takes_columns,
            numbers=_SHORT,
        ),
        Kernel("gather", "int4_columns", "columns_of_int4", gather.columns_of_int4, **own, takes=gather.takes_int4),
        Kernel("gather", "columns", "numpy.take", gather.columns_by_numpy, "cpu", ours=False),
        Kernel("gather", "columns", "index_select", gather.columns_by_torch, ours=False),
        *(
            Kernel(
                *("gather", f"int{bits}_strips", "gather_neurons_to_strips", gather.gather_neurons_to_strips),
                **own,
                takes=gather.takes_neurons,
            )
            for bits in _FEW_BITS
        ),
        Kernel(
            *("attention", "one_token", "attend_to", attention.one_token),
            **halves,
            takes=attention.takes_token,
        ),
        Kernel(
            *("attention", "one_token", "attend_to, token by token", attention.few_tokens),
            **halves,
            takes=attention.takes_few,
        ),
        Kernel(
            *("attention", "each_token", "attend_to_each", attention.each_token),
            **halves,
            takes=attention.takes_each,
        ),
        Kernel("rms_norm", "rows", "rms_norm", small_operators.rms_norm, **halves, takes=small_operators.takes_rows),
    ]


add(*_products_of_ours(), *_forms_of_ours(), *_others_of_ours())
