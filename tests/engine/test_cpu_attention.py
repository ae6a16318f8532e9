"""Attention of one token by our kernel: float64's numbers up to the last rounding, in every shape."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssAttention, eager_attention_forward

from griffin_offload import GriffinModel
from griffin_offload.engine import build, spec
from griffin_offload.kernels import table
from griffin_offload.kernels.attention import EachTokenJob, KeptStates, SeenTokens, attend
from griffin_offload.kernels.library import library

needs_kernel = pytest.mark.skipif(library() is None, reason="another processor, or no compiler")


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
    shared=st.integers(1, 7),
    new=st.sampled_from([1, 1, 1, 6]),
    past=st.integers(0, 40),
    width=st.sampled_from([1, 4, 8, 17, 40, 64]),
    masked=st.sampled_from(["none", "bool", "float", "by head"]),
    room=st.integers(0, 9),
    size=st.sampled_from([0.1, 1, 30]),
    dtype=st.sampled_from([torch.bfloat16, torch.float16]),
)
def test_equals_float64_up_to_rounding(batch, kv_heads, shared, new, past, width, masked, room, size, dtype):
    generator = torch.Generator().manual_seed(0)
    if masked == "none" and new > 1:
        past = 0  # stock attention is causal without a mask in an empty cache alone
    seen = past + new

    def states(heads, tokens):
        return torch.randn(batch, heads, tokens, width, generator=generator).to(dtype)

    # Views of a store with room for more.
    query, key, value = (
        states(kv_heads * shared, new) * size,
        states(kv_heads, seen + room),
        states(kv_heads, seen + room),
    )
    key, value = key[:, :, :seen], value[:, :, :seen]
    heads = kv_heads * shared if masked == "by head" else 1
    mask = torch.rand(batch, heads, new, seen, generator=generator) < 0.7
    mask[..., 0] = True
    if masked == "float":
        mask = torch.zeros(mask.shape, dtype=dtype).masked_fill_(~mask, torch.finfo(dtype).min)
    mask = None if masked == "none" else mask
    module = nn.Module()
    module.num_key_value_groups = shared
    with torch.no_grad():
        result, _ = build.attention_forward(module, query, key, value, mask, scaling=width**-0.5)
    by = table.choose("attention", "one_token", module, query, key, value, mask, like=query)
    assert by.ours == (new == 1 and library() is not None)
    assert result.dtype == dtype
    step = torch.finfo(dtype).eps
    torch.testing.assert_close(
        result.double(), exact(query, key, value, mask, width**-0.5), rtol=2 * step, atol=2 * step
    )


@needs_kernel
@pytest.mark.parametrize("tokens", [1, 63, 64, 65, 1000])
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_every_token_is_seen_once(tokens, threads):
    """Equal scores: the mean of all values, for any number of blocks and threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        value = torch.arange(tokens, dtype=torch.float32).view(1, 1, -1, 1).expand(1, 3, tokens, 40).half()
        found = attend(
            torch.zeros(1, 6, 1, 8).half(), torch.ones(1, 3, tokens, 8).half(), value.contiguous(), None, 1.0
        )
    finally:
        torch.set_num_threads(before)
    torch.testing.assert_close(found, torch.full((1, 1, 6, 40), (tokens - 1) / 2).half())


@needs_kernel
@pytest.mark.parametrize("window", [None, 7])
@pytest.mark.parametrize("form", ["bool", "float"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_few_tokens_are_each_as_if_alone(window, form, dtype):
    """To the last bit, in a window, too; and torch does masks with holes."""
    generator, new, seen = torch.Generator().manual_seed(0), 5, 40
    query = torch.randn(1, 4, new, 16, generator=generator).to(dtype)
    key, value = (torch.randn(1, 2, seen, 16, generator=generator).to(dtype) for _ in range(2))
    last = torch.arange(seen - new, seen)[:, None]
    mask = (torch.arange(seen) <= last) & (torch.arange(seen) > last - (window or seen))
    mask = mask[None, None]
    given = mask if form == "bool" else torch.zeros(mask.shape, dtype=dtype).masked_fill_(~mask, torch.finfo(dtype).min)
    with torch.no_grad():
        found, _ = build.attention_forward(nn.Module(), query, key, value, given, scaling=0.25)
        for row in range(new):
            first, end = int(mask[0, 0, row].int().argmax()), seen - new + row + 1
            alone = attend(query[:, :, row : row + 1], key[:, :, first:end], value[:, :, first:end], None, 0.25)
            assert torch.equal(found[:, row : row + 1], alone)
        holed = mask.clone()
        holed[0, 0, 2, 20 if window is None else 34] = False
        by = table.choose("attention", "one_token", nn.Module(), query, key, value, holed, like=query)
        assert not by.ours


class _WithSinks(GptOssAttention):
    def __init__(self, sinks, shared):
        nn.Module.__init__(self)
        self.sinks, self.num_key_value_groups = nn.Parameter(sinks, requires_grad=False), shared


@settings(max_examples=40)
@given(
    batch=st.integers(1, 2),
    kv_heads=st.integers(1, 3),
    shared=st.integers(1, 7),
    new=st.sampled_from([1, 1, 1, 3]),
    past=st.integers(0, 80),
    masked=st.sampled_from(["none", "bool", "float"]),
    sink=st.sampled_from([-100.0, 0.0, 5.0, 100.0]),
    size=st.sampled_from([0.1, 1, 30]),
    dtype=st.sampled_from([torch.bfloat16, torch.float16]),
)
def test_sinks_take_their_share(batch, kv_heads, shared, new, past, masked, sink, size, dtype):
    """As transformers' own attention in float32; by ours for one token, and for a few that a mask tells apart."""
    generator, seen, heads = torch.Generator().manual_seed(0), past + new, kv_heads * shared
    query = (torch.randn(batch, heads, new, 16, generator=generator) * size).to(dtype)
    key, value = (torch.randn(batch, kv_heads, seen, 16, generator=generator).to(dtype) for _ in range(2))
    module = _WithSinks((torch.randn(heads, generator=generator) + sink).to(dtype), shared)
    mask = (torch.ones(new, seen, dtype=torch.bool).tril(seen - new))[None, None].expand(batch, 1, new, seen).clone()
    if new == 1 and past:
        mask[..., 0] = False
    added = torch.zeros(mask.shape, dtype=dtype).masked_fill_(~mask, torch.finfo(dtype).min)
    given = {"none": None, "bool": mask, "float": added}["float" if new > 1 and masked == "none" else masked]
    options = {"scaling": 0.25, "s_aux": module.sinks, "sliding_window": None}
    with torch.no_grad():
        found, _ = build.attention_forward(module, query, key, value, given, **options)
        exact = _WithSinks(module.sinks.float(), shared)
        least = None if given is None else torch.where(mask, 0.0, torch.finfo(torch.float32).min)
        expected, _ = eager_attention_forward(exact, *(part.float() for part in (query, key, value)), least, 0.25)
    by = table.choose("attention", "one_token", module, query, key, value, given, like=query)
    assert by.ours == (library() is not None and (new == 1 or (batch == 1 and past > 0)))
    if by.ours:  # torch's rounds weights to 16 bits
        step = torch.finfo(dtype).eps
        torch.testing.assert_close(found.float(), expected, rtol=2 * step, atol=2 * step)
    else:
        torch.testing.assert_close(found.float(), expected, rtol=0.1, atol=0.1)


@needs_kernel
def test_rows_of_several_lengths_have_their_sinks():
    """Bit by bit as each alone; and a number for every head is wanted."""
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(3, 4, 1, 16, generator=generator).bfloat16()
    keys, values = ([torch.randn(1, 2, n, 16, generator=generator).bfloat16() for n in (3, 70, 9)] for _ in range(2))
    options = {"scaling": 0.25, "s_aux": torch.randn(4, generator=generator).bfloat16()}
    with torch.no_grad():
        together, _ = build.attend_to_each(None, query, keys, values, **options)
        pairs = enumerate(zip(keys, values, strict=True))
        alone = [build.attention_forward(None, query[i : i + 1], *pair, None, **options)[0] for i, pair in pairs]
        none = build.attend_to_each(None, query, keys, values, scaling=0.25)[0]
    assert torch.equal(together, torch.cat(alone))
    assert not torch.allclose(together, none, rtol=0.1)
    with pytest.raises(ValueError, match="the sinks, "):
        attend(query, keys[0].expand(3, 2, 3, 16), values[0].expand(3, 2, 3, 16), None, 1.0, torch.ones(3))


@needs_kernel
def test_a_call_that_stays_attends_to_what_it_is_told():
    """To tokens from the middle of a window's store, of others than before, and to nothing that does not fit."""
    generator = torch.Generator().manual_seed(0)
    key, value = (torch.randn(1, 2, 40, 16, generator=generator).bfloat16() for _ in range(2))
    query, output = torch.randn(2, 6, 1, 16, generator=generator).bfloat16(), torch.empty(2, 6, 16)
    kept = KeptStates((key,), 16), KeptStates((value,), 16)
    floats, scores, kernels = query.float(), torch.empty(6 * 60), library()
    job = EachTokenJob((floats.data_ptr(), output.data_ptr()), 0, (2, 2, 3, 16, 16), 0.25, 2)
    for ranges in ([(3, 33), (0, 1)], [(39, 40), (5, 40)]):
        rows = [SeenTokens(*kept, *own) for own in ranges]
        job.attend_to(rows, scores.fill_(torch.nan))
        kernels.call("attend_to_each", job.packed)
        assert (~scores.isnan()).sum() == 6 * sum(end - first for first, end in ranges), "each has its places"
        for i, (first, end) in enumerate(ranges):
            alone = attend(query[i : i + 1], key[:, :, first:end], value[:, :, first:end], None, 0.25)
            assert torch.equal(output[i].bfloat16(), alone[0, 0])
    with pytest.raises(ValueError, match="359 scores"):
        job.attend_to([SeenTokens(*kept, 0, 40), SeenTokens(*kept, 0, 20)], scores[1:])
    with pytest.raises(ValueError, match=": 2 of 16, of one"):
        job.attend_to([SeenTokens(KeptStates((key,), 8), kept[1], 0, 1)] * 2, scores)


@needs_kernel
def test_what_is_no_number_stays_none():
    """In the head that has it and in no other."""
    query, key, value = torch.ones(1, 2, 1, 16), torch.ones(1, 2, 5, 16), torch.ones(1, 2, 5, 16)
    key[0, 1, 3, 0] = math.nan
    found = attend(query.bfloat16(), key.bfloat16(), value.bfloat16(), None, 1.0)
    assert found[0, 0, 0].isfinite().all()
    assert found[0, 0, 1].isnan().all()
    with pytest.raises(ValueError, match="key"):
        attend(query.bfloat16(), key[:, :, :, :8].bfloat16(), value.bfloat16(), None, 1.0)


@pytest.mark.parametrize("name", ["llama3", "mistral", "gemma3", "falcon_new"])
def test_a_loaded_model_answers_as_the_stock_one(checkpoints, monkeypatch, name):
    folder = checkpoints(name, torch.bfloat16)
    prompt = torch.arange(5, 35)[None]
    found = []
    for own in (True, False):
        monkeypatch.setattr(spec, "emulates_halves", lambda *_, own=own: own)
        monkeypatch.setattr(build, "STOCK_ATTENTION", "sdpa" if own else "none of ours")
        with GriffinModel.from_pretrained(folder, device="cpu", density=1.0, always_stream=True) as model:
            uses_ours = model.model.config._attn_implementation in build.OWN_ATTENTION
            assert uses_ours == (own and name != "falcon_new")  # whose attention is its own
            cache = model.model(prompt).past_key_values
            found.append(model.model(torch.tensor([[7]]), past_key_values=cache).logits.float())
    error = (found[0] - found[1]).norm() / found[1].norm()
    assert error < 0.02  # one rounding of bfloat16 is 0.004, and they accumulate over layers


def test_a_loaded_model_with_sinks_answers_as_the_stock_one(checkpoints, monkeypatch):
    """A prompt and a token behind it, in a window and without; experts may be others where routers hesitate."""
    folder, prompt, found = checkpoints("gpt_oss", torch.bfloat16), torch.arange(5, 35)[None], []
    for own in (True, False):
        monkeypatch.setattr(build, "STOCK_SINKS", "eager" if own else "none of ours")
        with GriffinModel.from_pretrained(folder, device="cpu", density=1.0, dtype="bfloat16") as model:
            assert (model.model.config._attn_implementation == build.SINKS_NAME) == own
            output = model.model(prompt)
            last = model.model(torch.tensor([[7]]), past_key_values=output.past_key_values)
            found.append([output.logits.detach().float(), last.logits.detach().float()])
    assert torch.equal(found[0][0], found[1][0])  # the prompt's is stock attention
    assert (found[0][1] - found[1][1]).norm() < 0.1 * found[1][1].norm()


@needs_kernel
@settings(max_examples=40)
@given(
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=5),
    kv_heads=st.integers(1, 4),
    shared=st.integers(1, 9),
    width=st.sampled_from([1, 8, 17, 64]),
    scaling=st.sampled_from([None, 0.3]),
    dtype=st.sampled_from([torch.bfloat16, torch.float16]),
)
def test_rows_of_several_lengths_are_those_of_each_alone(lengths, kv_heads, shared, width, scaling, dtype):
    """Bit by bit."""
    generator = torch.Generator().manual_seed(0)

    def states(rows, heads, tokens):
        return torch.randn(rows, heads, tokens + 3, width, generator=generator).to(dtype)[:, :, :tokens]

    query = states(len(lengths), kv_heads * shared, 1)
    keys, values = ([states(1, kv_heads, tokens) for tokens in lengths] for _ in range(2))
    pairs = enumerate(zip(keys, values, strict=True))
    options = {} if scaling is None else {"scaling": scaling}
    with torch.no_grad():
        alone = [build.attention_forward(None, query[i : i + 1], *pair, None, **options)[0] for i, pair in pairs]
        together, _ = build.attend_to_each(None, query, keys, values, **options)
        with table.leaving_out(lambda kernel: kernel.layout == "each_token" and kernel.ours):
            assert torch.equal(build.attend_to_each(None, query, keys, values, **options)[0], together)
    assert torch.equal(together, torch.cat(alone))
