"""The table of kernels: rows stand best first, a row that is added is used, and torch has the last word everywhere."""

import dataclasses
import json
from collections.abc import Iterator
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from griffin_offload.checkpoint import gguf_blocks as _registered  # noqa: F401
from griffin_offload.cli.main import main
from griffin_offload.engine.build import use_own_linears
from griffin_offload.formats import every, get
from griffin_offload.formats.linear import QuantizedLinear
from griffin_offload.kernels import gemv, table
from griffin_offload.kernels.by_blocks import Scratch
from griffin_offload.kernels.library import built, library


@pytest.fixture
def called() -> Iterator[list[Tensor]]:
    """What was multiplied by a row of our own, which is added first: it says 7 everywhere."""
    seen: list[Tensor] = []

    def sevens(x: Tensor, tensors: table.Tensors, outputs: int, scratch: object) -> Tensor:
        seen.append(x)
        return torch.full((*x.shape[:-1], outputs), 7, dtype=x.dtype)

    rows = [
        table.Kernel("gemv", layout, "sevens", sevens, takes=lambda x, tensors: x.shape[-1] == 64, rows=(1, 3))
        for layout in ("int8", "float")
    ]
    table.add(*rows)
    yield seen
    table.remove(lambda kernel: kernel in rows)


def _int8(inputs: int) -> QuantizedLinear:
    layout, matrix = get("int8").resident(is_down=False), torch.ones(8, inputs)
    scratch = Scratch(2**12, torch.float32, torch.device("cpu"))
    module = QuantizedLinear(8, inputs, is_down=False, full=layout, resident=layout, scratch=scratch)
    for name, tensor in get("int8").quantize(matrix, torch.float32, is_down=False).items():
        setattr(module, name, nn.Parameter(tensor, requires_grad=False))
    return module


def test_a_row_that_is_added_is_used(called: list[Tensor]):
    """Of its rows and sizes alone, and not by what passes by once."""
    module = _int8(64)
    for rows, expected in ((1, 7), (3, 7), (4, 64)):
        assert torch.allclose(module(torch.ones(rows, 64)), torch.tensor(float(expected)), rtol=1e-2)
    assert [len(x) for x in called] == [1, 3]
    assert torch.allclose(_int8(32)(torch.ones(1, 32)), torch.tensor(32.0), rtol=1e-2)
    plain = nn.Sequential(nn.Linear(64, 4)).requires_grad_(False)
    use_own_linears(plain, Scratch(64, torch.float32, torch.device("cpu")), translated=False)
    assert bool((plain(torch.ones(2, 1, 64)) == 7).all())
    module.full, module.resident = module.layout, get("int4").resident(is_down=False)  # of a prompt's pass
    assert torch.allclose(module(torch.ones(1, 64)), torch.tensor(64.0), rtol=1e-2)
    assert len(called) == 3


def test_without_it_nothing_is_left():
    assert not any(kernel.name == "sevens" for kernel in table.rows())
    with table.leaving_out(lambda kernel: kernel.ours):
        assert not any(kernel.ours for kernel in table.rows())
    assert any(kernel.ours for kernel in table.rows())


def test_torch_has_the_last_word():
    """Every operation of every kind is done somehow for any type, on any device."""
    kinds = {(kernel.operation, kernel.layout) for kernel in table.rows() if kernel.operation not in ("gemv", "gemm")}
    kinds |= {("gemm", layout.name) for format in every() for layout in format.layouts()}
    for kind in kinds:
        last = [kernel for kernel in table.rows() if (kernel.operation, kernel.layout) == kind][-1]
        assert (last.ours, last.device, last.takes, last.numbers, last.computes) == (False, None, None, None, None)
        assert last.rows == (0, table.MANY)


def test_what_is_compiled_is_compiled_before_it_is_needed():
    done = []
    row = table.Kernel("gemv", "int8", "compiled", print, device="cpu", prepare=lambda *of: done.append(of))
    table.add(row)
    try:
        for layouts, device in ((["int8"], "cpu"), (["int4_rows"], "cpu"), (["int8"], "meta")):
            table.prepare(layouts, torch.device(device), torch.bfloat16)
    finally:
        table.remove(lambda kernel: kernel is row)
    assert done == [(torch.device("cpu"), torch.bfloat16)]


def test_a_processor_without_an_ability_is_told_so():
    row = next(kernel for kernel in table.rows() if kernel.name == "multiply_int8")
    missing = dataclasses.replace(row, needs=lambda: "this processor has no such thing")
    assert table.why_not(missing, ["cpu"]) == "this processor has no such thing"
    assert table.why_not(missing, ["cuda"]) == "no cpu device is here"
    assert (table.why_not(row, ["cpu"]) is None) == (library() is not None)


def test_the_table_is_printed(capsys: pytest.CaptureFixture[str]):
    assert main(["bench", "--kernels", "-o", "json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert len(rows) == len(table.rows())
    found = {(row["operation"], row["layout"], row["function"]): row for row in rows}
    assert found["gemv", "int8", "multiply_int8"]["rows"] == "up to 32"
    assert found["gemv", "float", "multiply_floats"]["device"] == "cpu"
    assert found["attention", "one_token", "sdpa, torch"]["why_not"] is None
    assert (found["gemv", "int8", "multiply_int8 (Triton)"]["why_not"] is None) == torch.cuda.is_available()
    assert main(["bench", "--kernels"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(rows) + 1
    assert lines[0].split() == ["operation", "layout", "rows", "device", "multiplies", "function", "here"]


def test_the_library_for_every_python_comes_first(tmp_path: Path):
    """An earlier version's, for one Python alone, may still lie beside it."""
    assert built(tmp_path) is None
    for suffix in (".cpython-39-x86_64-linux-gnu.so", EXTENSION_SUFFIXES[0], ".abi3.so"):
        (tmp_path / f"_library{suffix}").touch()
        usable = suffix in EXTENSION_SUFFIXES
        assert built(tmp_path) == (tmp_path / f"_library{suffix}" if usable else None)


@pytest.mark.skipif(library() is None or not library().sums_bytes, reason="a processor without AVX512-VNNI")
def test_a_few_rows_are_summed_in_another_order_where_they_are_sequences_alone():
    """A part of a prompt is the same to the last bit as in the whole; several sequences have what is faster."""
    tensors, scratch = {"weight": None}, torch.bfloat16

    def first(rows: int) -> str:
        x = torch.ones(rows, 64, dtype=torch.float32)
        found = table.products("int4_rows", rows, x, scratch, resident=True)
        return next(kernel.name for kernel in found if kernel.takes is None or kernel.takes(x, tensors))

    assert [first(rows) for rows in (3, 4, 22)] == ["multiply_int4_rows"] * 3
    assert first(23) == "multiply_int4_rows (lanes)"
    with gemv.rows_apart():
        assert [first(rows) for rows in (3, 4, 22)] == ["multiply_int4_rows", *["multiply_int4_rows (lanes)"] * 2]
    assert first(4) == "multiply_int4_rows"
