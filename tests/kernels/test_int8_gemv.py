"""The Triton kernel for int8 against float64, in Triton's interpreter, which needs no GPU. Skipped, visibly, where
there is no Triton: builds of torch for the CPU come without."""

import importlib.util
import os
import subprocess
import sys

import pytest
import torch
from torch import Tensor

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SIZES = ((8, 1024), (33, 96), (5, 2080), (1, 1))
ROWS = (1, 4)


def test_products_are_those_of_floats():
    # A process of its own: Triton interprets what is defined while the variable is set, its own functions included.
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, __file__], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["right"] * len(DTYPES) * len(SIZES) * len(ROWS) + ["found"]


def _product(outputs: int, inputs: int, rows: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """By the kernel and in float64."""
    from griffin_offload.kernels.triton_gemv import multiply_int8

    generator = torch.Generator().manual_seed(0)
    weight = torch.randint(-127, 128, (outputs, inputs), generator=generator, dtype=torch.int8)
    scale = (torch.rand(outputs, generator=generator) / 100).to(dtype)
    x = torch.randn(rows, inputs, generator=generator).to(dtype)
    return multiply_int8(x, weight, scale), x.double() @ weight.double().t() * scale.double()


def _interpreted() -> None:
    from griffin_offload.kernels import triton_gemv

    for dtype in DTYPES:
        for outputs, inputs in SIZES:
            for rows in ROWS:
                found, expected = _product(outputs, inputs, rows, dtype)
                assert found.dtype == dtype
                torch.testing.assert_close(found.double(), expected, rtol=torch.finfo(dtype).eps, atol=1e-4)
                print("right")
    right = triton_gemv.multiply_int8
    triton_gemv.check_kernel(torch.device("cpu"), torch.bfloat16)
    triton_gemv.multiply_int8 = lambda *args: right(*args) * 1.1
    with pytest.raises(RuntimeError, match=r"wrong by 0\."):
        triton_gemv.check_kernel(torch.device("cpu"), torch.bfloat16)
    print("found")


if __name__ == "__main__":
    _interpreted()
