"""What is handed to kernels is refused by name before they read or write past an end."""

from collections.abc import Callable

import pytest
import torch

from griffin_offload.kernels import attention, gather, gemm, gemv, quantize, small_operators
from griffin_offload.kernels.library import Library, check, check_rows, library, number_type

LOADED = library()
pytestmark = pytest.mark.skipif(LOADED is None, reason="another processor, or no compiler")
HALF = torch.ones(3, 64, dtype=torch.bfloat16)
INT8 = torch.ones(4, 64, dtype=torch.int8)
ONES = torch.ones(4)
KEY = torch.ones(1, 2, 8, 16, dtype=torch.bfloat16)


def _library() -> Library:
    assert LOADED is not None
    return LOADED


def _few() -> gemv.GemvKernels:
    return gemv.GemvKernels(_library())


def _many() -> gemm.GemmKernels:
    return gemm.GemmKernels(_library(), torch.float32)


def _attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None = None) -> None:
    attention.attend(query, key, value, mask, 1.0)


@pytest.mark.parametrize(
    ("call", "named"),
    [
        (lambda: _few().multiply_int8(HALF.double(), INT8, ONES), "x, "),
        (lambda: _few().multiply_int8(HALF.to("meta"), INT8, ONES), "x, "),
        (lambda: _few().multiply_int8(HALF, INT8.to("meta"), ONES), "the matrix, "),
        (lambda: _few().multiply_int8(HALF, INT8.t().contiguous().t(), ONES), "the matrix, "),
        (lambda: _few().multiply_int8(HALF, INT8, ONES.double()), "the scale, "),
        (lambda: _few().multiply_int8(HALF, INT8, ONES[:3]), "the scale, "),
        (lambda: _few().multiply_int8(HALF, INT8, ONES, ONES), "the bias, "),
        (lambda: _few().multiply_int8(HALF, INT8, ONES, None, ONES), "the inputs' scale, "),
        (lambda: _few().multiply_floats(HALF, HALF.half()), "the matrix, "),
        (lambda: _many().multiply("int8", HALF, INT8, ONES.long()), "the scale, "),
        (lambda: _many().multiply("int8", HALF, INT8[:, ::2], ONES), "the matrix, "),
        (lambda: small_operators.rms_norm(HALF.t(), torch.ones(3, dtype=torch.bfloat16), 1e-6), "x, "),
        (lambda: small_operators.rms_norm(HALF, torch.ones(64), 1e-6), "the weight, "),
        (lambda: small_operators.rms_norm(HALF.float(), torch.ones(64), 1e-6), "x, "),
        (lambda: _attend(KEY[:, :, :1], KEY.half(), KEY), "the value, "),
        (lambda: _attend(KEY[:, :, :1], KEY.float(), KEY.float()), "the key, "),
        (lambda: _attend(KEY[:, :, :1], KEY.repeat(1, 1, 1, 2)[..., ::2], KEY), "the key, "),
        (lambda: _attend(KEY[:, :, :1], KEY, KEY.to("meta")), "the value, "),
        (lambda: _attend(KEY[:, :, :1], KEY, KEY, torch.ones(1, 1, 1, 8, device="meta")), "the mask, "),
        (lambda: quantize.quantize_int8(ONES[None], ONES[:1], INT8[:1, :3], None), "the numbers, "),
        (
            lambda: quantize.quantize_int8(torch.ones(2, 4), ONES[:2], INT8[:1, :4].expand(2, 4), None),
            "the numbers, ",
        ),
        (lambda: quantize.largest_of_rows(torch.ones(2, 4), ONES[:3]), "the divisor, "),
    ],
)
def test_is_refused_by_name(call: Callable[[], object], named: str):
    with pytest.raises(ValueError, match=f"^{named}.* must be "):
        call()


def test_columns_are_copied_to_rows_that_do_not_overlap():
    source, chosen = torch.ones(3, 8, dtype=torch.int8), torch.arange(4)
    if not _library().leaves_out:
        pytest.skip("this processor's columns are left to numpy")
    for out in (torch.empty(3, 5, dtype=torch.int8), torch.empty(3, 4), torch.empty(2, 4, dtype=torch.int8)):
        with pytest.raises(ValueError, match="do not make"):
            gather.gather_columns(source, chosen, out)
    with pytest.raises(ValueError, match="must be"):
        gather.gather_columns(source, chosen, torch.empty(3, 4, dtype=torch.int8, device="meta"))


def test_what_fits_passes():
    check(HALF, (3, 64), torch.bfloat16)
    check_rows(HALF[:, 5:], (3, 59), torch.bfloat16, "rows", written=True)
    check_rows(HALF[:1].expand(7, 64), (7, 64), torch.bfloat16, "read rows")
    assert number_type(HALF, "x") == 1
