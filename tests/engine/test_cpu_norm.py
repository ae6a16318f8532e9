"""Root mean square norms by our kernel: float64's numbers, rounded where stock norms round, where they agree."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from griffin_offload import GriffinModel
from griffin_offload.engine.build import CpuNorm, use_own_norms
from griffin_offload.kernels import table
from griffin_offload.kernels.library import library
from griffin_offload.kernels.small_operators import ROWS, rms_norm

pytestmark = pytest.mark.skipif(library() is None, reason="another processor, or no compiler")


@given(
    rows=st.integers(1, 5),
    size=st.integers(1, 70),
    magnitude=st.sampled_from([0.0, 1e-4, 1.0, 200.0]),
    dtype=st.sampled_from([torch.bfloat16, torch.float16]),
)
def test_equals_float64_up_to_rounding(rows: int, size: int, magnitude: float, dtype: torch.dtype):
    generator = torch.Generator().manual_seed(size)
    x = torch.randn(rows, size, generator=generator).mul_(magnitude).to(dtype)
    weight = torch.randn(size, generator=generator).to(dtype)
    factor = (x.double().pow(2).mean(-1, keepdim=True) + 1e-5).rsqrt()
    step = torch.finfo(dtype).eps
    found = rms_norm(x, weight, 1e-5)
    assert found.dtype == dtype
    exact = x.double() * factor * weight.double()
    torch.testing.assert_close(found.double(), exact, rtol=2 * step, atol=torch.finfo(dtype).tiny * 4)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_no_number_stays_none(bad: float):
    x = torch.ones(2, 24).bfloat16()
    x[1, 17] = bad
    found = rms_norm(x, torch.ones(24).bfloat16(), 1e-5)
    assert found[0].isfinite().all()
    assert torch.equal(found[1].isnan(), LlamaRMSNorm(24).bfloat16()(x[1]).isnan())


def test_only_norms_that_do_the_same_are_replaced():
    class OtherRMSNorm(LlamaRMSNorm):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x) + x

    norms = nn.ModuleList([LlamaRMSNorm(16), OtherRMSNorm(16), GemmaRMSNorm(16), nn.LayerNorm(16)]).bfloat16()
    norms.append(LlamaRMSNorm(16))  # in float32
    norms[0].weight.data.zero_()  # still on its way
    use_own_norms(norms)
    assert [isinstance(norm.forward, CpuNorm) for norm in norms] == [True, False, False, False, False]
    x = torch.randn(ROWS + 1, 16, generator=torch.Generator().manual_seed(0)).bfloat16()
    norms[0].weight.data.uniform_(-2, 2)
    for rows in (x, x[:3], x[:3, :].t().contiguous().t()):  # many, few, and not side by side
        few = rows.shape[0] == 3 and rows.is_contiguous()
        assert table.choose("rms_norm", "rows", rows, norms[0].weight).ours == few
        expected = LlamaRMSNorm.forward(norms[0], rows)
        torch.testing.assert_close(norms[0](rows), expected, rtol=2**-7, atol=0)


@pytest.mark.parametrize("name", ["llama2", "qwen3"])
def test_a_loaded_model_has_them(checkpoints, name: str):
    with GriffinModel.from_pretrained(checkpoints(name, torch.bfloat16), device="cpu", density=0.5) as model:
        norms = [m for m in model.model.modules() if type(m).__name__.endswith("RMSNorm")]
        assert norms
        assert all(isinstance(norm.forward, CpuNorm) for norm in norms)
