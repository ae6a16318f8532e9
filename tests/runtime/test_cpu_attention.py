"""16-bit attention multiplied in float32: float64's numbers up to the last rounding, in every shape and group."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from griffin_offload import GriffinModel
from griffin_offload.runtime import cpu_attention, prospect


def exact(query, key, value, mask, scaling):
    """The formula in float64."""
    shared = query.shape[1] // key.shape[1]
    key, value = (states.double().repeat_interleave(shared, dim=1) for states in (key, value))
    scores = query.double() @ key.transpose(-1, -2) * scaling
    if mask is None:
        new, seen = scores.shape[-2:]
        mask = torch.ones(new, seen, dtype=torch.bool).tril(seen - new)
    scores = scores.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else scores + mask
    return (scores.softmax(-1) @ value).transpose(1, 2)


@settings(max_examples=80)
@given(
    batch=st.integers(1, 3),
    kv_heads=st.integers(1, 5),
    shared=st.integers(1, 3),
    new=st.sampled_from([1, 1, 1, 6]),
    past=st.integers(0, 40),
    width=st.sampled_from([1, 4, 8, 17]),
    masked=st.sampled_from(["none", "bool", "float", "by head"]),
    group=st.integers(1, 4000),
    dtype=st.sampled_from([torch.bfloat16, torch.float16]),
)
def test_equals_float64_up_to_rounding(batch, kv_heads, shared, new, past, width, masked, group, dtype):
    generator = torch.Generator().manual_seed(0)
    if masked == "none" and new > 1:
        past = 0  # stock attention is causal without a mask in an empty cache alone
    seen = past + new

    def states(heads, tokens):
        return torch.randn(batch, heads, tokens, width, generator=generator).to(dtype)

    query, key, value = states(kv_heads * shared, new), states(kv_heads, seen), states(kv_heads, seen)
    heads = kv_heads * shared if masked == "by head" else 1
    mask = torch.rand(batch, heads, new, seen, generator=generator) < 0.7
    mask[..., 0] = True
    if masked == "float":
        mask = torch.zeros(mask.shape, dtype=dtype).masked_fill_(~mask, torch.finfo(dtype).min)
    mask = None if masked == "none" else mask
    module = nn.Module()
    module.num_key_value_groups = shared
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cpu_attention, "ATTENTION_GROUP_NUMBERS", group)
        result, _ = cpu_attention._attention(module, query, key, value, mask, scaling=width**-0.5)
    assert result.dtype == dtype
    step = torch.finfo(dtype).eps
    torch.testing.assert_close(
        result.double(), exact(query, key, value, mask, width**-0.5), rtol=2 * step, atol=2 * step
    )


@pytest.mark.parametrize("name", ["llama3", "mistral", "gemma3", "falcon_new"])
def test_a_loaded_model_answers_as_the_stock_one(checkpoints, monkeypatch, name):
    folder = checkpoints(name, torch.bfloat16)
    prompt = torch.arange(5, 35)[None]
    found = []
    for translated in (True, False):
        monkeypatch.setattr(prospect, "emulates_halves", lambda *_, translated=translated: translated)
        with GriffinModel.from_pretrained(folder, device="cpu", density=1.0, always_stream=True) as model:
            uses_ours = model.model.config._attn_implementation == cpu_attention._NAME
            assert uses_ours == (translated and name != "falcon_new")  # whose attention is its own
            found.append(model.model(prompt).logits.float())
    error = (found[0] - found[1]).norm() / found[1].norm()
    assert error < 0.02  # one rounding of bfloat16 is 0.004, and they accumulate over layers
