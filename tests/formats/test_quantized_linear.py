"""`QuantizedLinear` in every form against float64, a few rows by kernels, ours or torch's, and many by blocks."""

import dataclasses
from collections.abc import Iterator

import pytest
import quantised_reference as ref
import torch
from torch import Tensor, nn

from griffin_offload.errors import UnsupportedModel
from griffin_offload.formats import every, get
from griffin_offload.formats.linear import QuantizedLinear, row_norms
from griffin_offload.kernels import gemv, table
from griffin_offload.kernels.by_blocks import Scratch
from griffin_offload.kernels.library import library

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# (form, outputs, inputs): ordinary sizes and, where the form allows them, no multiples of anything.
SIZES = [
    *(("float", o, i) for o, i in ((64, 96), (33, 50), (1, 1))),
    *(("int8", o, i) for o, i in ((64, 96), (50, 64), (33, 40), (70, 33), (5, 1))),
    *(("int4_rows", o, i) for o, i in ((64, 96), (33, 32), (7, 160))),
    *(("int4_neurons", o, i) for o, i in ((64, 96), (32, 33), (96, 1))),
    *(("int4_strips", o, i) for o, i in ((64, 96), (32, 16), (160, 272))),
]
DOWN = {"int4_neurons": (True,), "int4_strips": (True,), "int4_rows": (False,)}


LAYOUTS = {layout.name: layout for format in every() for layout in format.layouts()}


@pytest.fixture(params=["ours", "torch's"])
def whose(request: pytest.FixtureRequest) -> Iterator[str]:
    """Whose kernels multiply."""
    if request.param == "ours" and library() is None:
        pytest.skip("ours are not here: another processor, or no compiler")
    with table.leaving_out(lambda kernel: kernel.ours and request.param != "ours"):
        yield request.param


def _random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + len(shape)))


def _levels(lowest: int, highest: int, *shape: int) -> Tensor:
    return torch.randint(lowest, highest + 1, shape, generator=torch.Generator().manual_seed(0))


def _tensors(form: str, outputs: int, inputs: int, dtype: torch.dtype) -> tuple[dict[str, Tensor], Tensor]:
    """The tensors of a random matrix, without an input scale, and the matrix in float64."""
    if form == "float":
        weight = _random(outputs, inputs).to(dtype)
        return {"weight": weight}, weight.double()
    if form == "int8":
        levels, scale = _levels(-127, 127, outputs, inputs), (0.1 + _random(outputs).abs()).to(dtype)
        return {"weight": levels.to(torch.int8), "scale": scale}, levels * scale.double()[:, None]
    shape = (outputs, inputs) if form == "int4_rows" else (inputs, outputs)
    codes, groups = _levels(0, 255, shape[0], shape[1] // 2).byte(), _levels(0, 255, shape[0], shape[1] // 32, 2).byte()
    groups[..., 0] = 10 * 16 + groups[..., 0] % 32  # steps of half to two
    groups[..., 1] = (groups[..., 1].view(torch.int8) // 8).view(torch.uint8)  # the middle may be 2 levels off
    values = ref.Int4.of_bytes(codes, groups).values
    if form == "int4_rows":
        scale = (0.1 + _random(outputs).abs()).to(dtype)
        return {"weight": codes, "groups": groups, "scale": scale}, values * scale.double()[:, None]
    if form == "int4_strips":
        codes, groups = ref.rows_as_strips(codes, groups)
    return {"weight": codes, "groups": groups}, values.t()


def _module(
    form: str, tensors: dict[str, Tensor], outputs: int, inputs: int, scratch: Scratch, *, is_down: bool
) -> QuantizedLinear:
    layout = LAYOUTS[form]
    passes_by = form in ("float", "int4_neurons")
    resident = get("int8").resident(is_down=is_down) if passes_by else layout
    module = QuantizedLinear(outputs, inputs, is_down=is_down, full=layout, resident=resident, scratch=scratch)
    for name, tensor in tensors.items():
        setattr(module, name, nn.Parameter(tensor, requires_grad=False))
    return module


def _scratch(nbytes: int, dtype: torch.dtype) -> Scratch:
    return Scratch(nbytes, dtype, torch.device("cpu"))


Rows = list[tuple[Tensor, Tensor]]


def _rows(module: QuantizedLinear, matrix: Tensor, dtype: torch.dtype) -> Rows:
    """Inputs of several shapes, and what they become in float64."""
    bias = 0.0 if module.bias is None else module.bias.double()
    matrix = matrix if module.input_scale is None else matrix * module.input_scale.double()
    inputs = [
        _random(*shape, module.in_features, seed=1).to(dtype) for shape in ((1,), (4,), (5,), (40,), (2, 1), (1, 3, 7))
    ]
    return [(x, x.double() @ matrix.t() + bias) for x in inputs]


def _check(module: QuantizedLinear, rows: Rows, worst: torch.dtype) -> None:
    """All numbers against float64; `worst` is the coarsest precision of the calculation."""
    for x, exact in rows:
        found = module(x)
        assert found.dtype == x.dtype
        assert found.shape == exact.shape
        allowed = 3 * torch.finfo(worst).eps + _coarse(module.layout.name, x.dtype, x[..., 0].numel())
        assert (found.double() - exact).norm() <= allowed * exact.norm(), (module, x.shape)


def _coarse(form: str, dtype: torch.dtype, rows: int) -> float:
    """What 8 bits of inputs beside int4 rows cost, and beside strips by AVX2; of float32 inputs 15."""
    found = library()
    by_bytes = form == "int4_rows" or (form == "int4_strips" and found is not None and not found.sums_bytes)
    few = by_bytes and rows <= gemv.ROWS and found is not None
    return {torch.float32: 1e-4, torch.float64: 0.0}.get(dtype, 0.01) if few else 0.0


@pytest.mark.usefixtures("whose")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("form", "outputs", "inputs"), SIZES)
def test_equals_float64(form: str, outputs: int, inputs: int, dtype: torch.dtype):
    tensors, matrix = _tensors(form, outputs, inputs, dtype)
    for is_down in DOWN.get(form, (False, True)):
        more = {"input_scale": (0.5 + _random(inputs).abs()).to(dtype)} if is_down and form != "float" else {}
        # A bias is added to what was multiplied, in whatever scratch.
        for bias, scratches in (({}, (1, 2**20)), ({"bias": 30 * _random(outputs).to(dtype)}, (700,))):
            rows = None
            for scratch_bytes in scratches:
                # 16-bit blocks are translated to float32 where the processor multiplies nothing smaller.
                for scratch_dtype in {dtype, torch.float32 if dtype.itemsize == 2 else dtype}:
                    scratch = _scratch(scratch_bytes, scratch_dtype)
                    module = _module(form, tensors | more | bias, outputs, inputs, scratch, is_down=is_down)
                    rows = rows or _rows(module, matrix, dtype)
                    _check(module, rows, dtype)


@pytest.mark.parametrize("form", ["int8", "int4_rows", "int4_strips"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_few_rows_go_through_the_kernel_and_many_do_not(form: str, dtype: torch.dtype, whose: str):
    tensors, _ = _tensors(form, 64, 96, dtype)
    ours, is_down = whose == "ours", form == "int4_strips"
    more = {"input_scale": torch.ones(96, dtype=dtype)} if is_down else {}
    module = _module(form, tensors | more, 64, 96, _scratch(2**12, dtype), is_down=is_down)
    many = _many_from(form, dtype) if ours else None
    most = (many or gemv.ROWS + 1) - 1 if ours else 4
    slow = form == "int8" and torch.backends.cpu.get_cpu_capability() == "AVX2" and dtype != torch.bfloat16
    none = dtype == torch.float64 or ((slow or form != "int8") and not ours)
    few, many_by = ("gemv", ours), ("gemm", many is not None)
    taken = [_multiplies(module, torch.ones(rows, 96, dtype=dtype)) for rows in (1, most, most + 1)]
    assert taken == ([("gemm", False)] * 3 if none else [few, few, many_by])


def _many_from(form: str, dtype: torch.dtype) -> int | None:
    """From how many rows on our kernels for many multiply; None where there are none for this type."""
    found = library()
    if found is None or dtype not in (torch.float32, torch.bfloat16):
        return None
    if dtype == torch.bfloat16 and found.sums_pairs:
        of_pairs = {"int8": 11, "int4_strips": 11}
        return (17 if form == "int8" else 24) if found.sums_tiles else of_pairs.get(form, gemv.ROWS + 1)
    is_avx2 = torch.backends.cpu.get_cpu_capability() == "AVX2"
    return gemv.ROWS + 1 if dtype == torch.float32 and is_avx2 else None


def _multiplies(module: QuantizedLinear, x: Tensor) -> tuple[str, bool]:
    """The operation that does this product, and whether it is ours: by what is called, not by what would be."""
    called: list[tuple[str, bool]] = []

    def noting(kernel: table.Kernel) -> table.Kernel:
        def function(*arguments: object) -> Tensor:
            called.append((kernel.operation, kernel.ours))
            return kernel.function(*arguments)

        return dataclasses.replace(kernel, function=function, several=None)

    noted = [noting(kernel) for kernel in table.rows()]
    with table.leaving_out(lambda kernel: True):
        table.add(*noted)
        module(x)
    assert len(called) == 1
    return called[0]


@pytest.mark.parametrize("form", ["int8", "int4_rows", "int4_neurons", "int4_strips"])
def test_many_rows_are_not_translated_where_ours_multiply(form: str, monkeypatch: pytest.MonkeyPatch):
    dtype = torch.bfloat16 if _many_from(form, torch.bfloat16) else torch.float32
    if _many_from(form, dtype) is None:
        pytest.skip("ours are not here: another processor, or no compiler")
    tensors, matrix = _tensors(form, 64, 96, dtype)
    module = _module(form, tensors, 64, 96, _scratch(2**12, dtype), is_down=form == "int4_neurons")
    monkeypatch.delattr(Scratch, "block")
    x = _random(gemv.ROWS + 1, 96).to(dtype)
    exact = x.double() @ matrix.t()
    assert (module(x).double() - exact).norm() <= 3 * torch.finfo(dtype).eps * exact.norm()


@pytest.mark.parametrize("inputs", [1, 8, 33, 40, 50])
def test_the_int8_kernel_is_kept_from_widths_that_it_reads_past(inputs: int, monkeypatch: pytest.MonkeyPatch):
    """torch's kernel returns garbage there in bfloat16, or takes the process down: so it must not even be called."""

    def forbidden(*_: Tensor) -> Tensor:
        raise AssertionError("called")

    monkeypatch.setattr(torch, "_weight_int8pack_mm", forbidden)
    tensors, matrix = _tensors("int8", 40, inputs, torch.bfloat16)
    module = _module("int8", tensors, 40, inputs, _scratch(2**12, torch.bfloat16), is_down=False)
    with table.leaving_out(lambda kernel: kernel.ours and kernel.operation == "gemv"):
        _check(module, _rows(module, matrix, torch.bfloat16), torch.bfloat16)


@pytest.mark.usefixtures("whose")
@pytest.mark.parametrize("rows", range(1, 9))
@pytest.mark.parametrize("weight_offset", [0, 1, 8])
@pytest.mark.parametrize("input_offset", [0, 1, 5])
def test_nothing_needs_to_be_aligned(rows: int, weight_offset: int, input_offset: int):
    """As in a mapped file, and in the middle of a tensor: the kernel would end the process."""
    tensors, exact = _tensors("int8", 64, 96, torch.bfloat16)
    weight = torch.zeros(64 * 96 + 64, dtype=torch.int8)[weight_offset : weight_offset + 64 * 96].view(64, 96)
    x = torch.zeros(rows * 96 + 64, dtype=torch.bfloat16)[input_offset : input_offset + rows * 96].view(rows, 96)
    tensors["weight"] = weight.copy_(tensors["weight"])
    x.copy_(_random(rows, 96))
    linear = _module("int8", tensors, 64, 96, _scratch(2**12, torch.bfloat16), is_down=False)
    expected = x.double() @ exact.T
    assert (linear(x).double() - expected).norm() <= 0.01 * expected.norm()


def test_the_scratch_is_used_and_not_outgrown(monkeypatch: pytest.MonkeyPatch):
    """What many rows need beside it is a block that no scratch could hold."""
    for form, row_bytes in (("int8", 96 * 4), ("int4_rows", 96 * 4), ("int4_neurons", 64 * 4)):
        tensors, matrix = _tensors(form, 64, 96, torch.float32)
        scratch = _scratch(3 * row_bytes, torch.float32)
        blocks: list[Tensor] = []
        block = scratch.block
        monkeypatch.setattr(
            scratch, "block", lambda *shape, b=block, kept=blocks: (kept.append(b(*shape)), kept[-1])[1]
        )
        module = _module(form, tensors, 64, 96, scratch, is_down=form == "int4_neurons")
        with table.leaving_out(lambda kernel: kernel.ours and kernel.operation == "gemm"):
            module(torch.ones(40, 96))
        assert len(blocks) == -(-matrix.shape[form == "int4_neurons"] // 3), form
        assert {b.data_ptr() for b in blocks} == {scratch.buffer.data_ptr()}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("form", ["float", "int8", "int4_rows"])
def test_row_norms(form: str, dtype: torch.dtype):
    """Of every stored form of gate and up: what "magnitude" ranks by."""
    tensors, matrix = _tensors(form, 300, 64, dtype)
    rtol = 1e-5 if form != "float" else 1e-6
    if form == "int4_rows":  # the norms before they were rounded
        matrix = _random(300, 64).double()
        tensors, rtol = get("int4").quantize(matrix, dtype, is_down=False), max(1e-6, torch.finfo(dtype).eps)
    torch.testing.assert_close(
        row_norms(tensors, LAYOUTS[form], swapped=False).double(), matrix.norm(dim=1), rtol=rtol, atol=0
    )
    if form == "float":
        turned = {"weight": tensors["weight"].t()}
        torch.testing.assert_close(
            row_norms(turned, LAYOUTS[form], swapped=True).double(), matrix.norm(dim=1), rtol=rtol, atol=0
        )


@pytest.mark.parametrize(("outputs", "inputs", "is_down"), [(64, 40, False), (40, 64, True)])
def test_sizes_that_int4_cannot_group_are_refused(outputs: int, inputs: int, is_down: bool):
    with pytest.raises(UnsupportedModel, match=r"fc: int4 needs rows in groups of 32, this one has 40 numbers"):
        get("int4").check(outputs, inputs, "fc", is_down=is_down)
    get("int8").check(outputs, inputs, "fc", is_down=is_down)
    get("int4").check(outputs, inputs, "fc", is_down=not is_down)
