"""16-bit layers multiplied our way: the same numbers as float64 up to the last rounding, in every shape."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import VOCAB
from torch import nn

from griffin_offload import GriffinModel
from griffin_offload.devices.threads import choose_threads, limited_threads
from griffin_offload.engine import spec
from griffin_offload.engine.build import emulates_halves, use_own_linears
from griffin_offload.kernels.by_blocks import Scratch


@settings(max_examples=60)
@given(
    inputs=st.integers(1, 70),
    outputs=st.integers(1, 90),
    tokens=st.lists(st.integers(1, 9), min_size=1, max_size=3),
    bias=st.booleans(),
    scratch_bytes=st.integers(8, 4000),
    dtype=st.sampled_from([torch.bfloat16, torch.float16]),
    translated=st.booleans(),
)
def test_equals_float64_up_to_rounding(inputs, outputs, tokens, bias, scratch_bytes, dtype, translated):
    linear = nn.Linear(inputs, outputs, bias=bias).to(dtype).requires_grad_(False)
    x = torch.randn(*tokens, inputs, generator=torch.Generator().manual_seed(0)).to(dtype)
    exact = nn.functional.linear(x.double(), linear.weight.double(), linear.bias.double() if bias else None)
    use_own_linears(linear, Scratch(scratch_bytes, torch.float32, torch.device("cpu")), translated=translated)
    result = linear(x)
    assert result.dtype == dtype
    assert result.shape == (*tokens, outputs)
    step = torch.finfo(dtype).eps
    torch.testing.assert_close(result.double(), exact, rtol=2 * step, atol=2 * step)


def test_no_neurons_give_the_bias():
    linear = nn.Linear(1, 3).bfloat16().requires_grad_(False)
    linear.weight = nn.Parameter(torch.empty(3, 0, dtype=torch.bfloat16), requires_grad=False)
    linear.bias.copy_(torch.tensor([1.0, 2.0, 3.0]))
    use_own_linears(linear, Scratch(64, torch.float32, torch.device("cpu")), translated=True)
    assert torch.equal(linear(torch.empty(1, 2, 0).bfloat16())[0, 1], linear.bias)


def test_full_precision_and_other_devices_are_left_alone():
    assert not emulates_halves(torch.device("cpu"), torch.float32)
    assert not emulates_halves(torch.device("cuda"), torch.bfloat16)


@pytest.mark.parametrize("name", ["llama2", "opt", "falcon_new", "gpt2"])
def test_a_translated_model_stays_within_rounding(checkpoints, monkeypatch: pytest.MonkeyPatch, name: str):
    path = checkpoints(name, torch.bfloat16)
    ids = torch.randint(3, VOCAB, (1, 40), generator=torch.Generator().manual_seed(0))
    logits = {}
    for translated in (False, True):
        monkeypatch.setattr(spec, "emulates_halves", lambda *_, on=translated: on)
        model = GriffinModel.from_pretrained(path, device="cpu", max_gpu_mem="100MB", density=0.5, ctx_size=64)
        logits[translated] = model.model(ids).logits.float()
    error = (logits[True] - logits[False]).norm() / logits[False].norm()
    assert error < 0.02  # one rounding of bfloat16 is 0.004, and they accumulate over layers


def test_threads_are_limited_for_the_time_of_a_run():
    before = torch.get_num_threads()
    with limited_threads(before + 1):
        assert torch.get_num_threads() == before + 1
    assert torch.get_num_threads() == before


def test_omp_num_threads_decides(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    with limited_threads(3):
        assert choose_threads(64, 64, torch.float32) == 3
    monkeypatch.delenv("OMP_NUM_THREADS")
    with limited_threads(2):
        assert choose_threads(8, 8, torch.float32) == 1  # too small to share
        assert choose_threads(2048, 2048, torch.float32) in (1, 2)
