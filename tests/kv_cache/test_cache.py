"""The KV cache against transformers' own, number by number and bit by bit, and against the bytes that were planned."""

import copy

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from marks import by_turns, mostly_slow
from tiny_models import ARCHITECTURES, KINDS, VOCAB
from transformers import AutoModelForCausalLM, Cache, DynamicCache, GenerationConfig, Lfm2Config, LlamaConfig, T5Config

from griffin_offload import DoesNotFit, GriffinError, GriffinModel, UsageError
from griffin_offload.errors import UnsupportedModel
from griffin_offload.kv_cache.kv_cache import KVCache, can_cache
from griffin_offload.kv_cache.kv_layer import KVLayer
from griffin_offload.kv_cache.store import DequantBuffer
from griffin_offload.kv_cache.workload import kv_bytes

WINDOW, ROLLBACK, SLACK = 16, 32, 64
HEADS, SIZE = 2, 4
ALTERNATING = LlamaConfig(
    num_hidden_layers=2, sliding_window=WINDOW, layer_types=["sliding_attention", "full_attention"]
)


def _int8(states: torch.Tensor) -> torch.Tensor:
    """[B, heads, T, D] as 8 bits keep it, written plainly: each vector by its largest number."""
    kept = states.clone()
    for vector in kept.view(-1, states.shape[-1]):
        step = torch.tensor(max(abs(x) for x in vector.tolist()) / 127).to(states.dtype)
        exact = (vector.float() / step.float()).tolist() if step else [0] * len(vector)
        numbers = [max(-127, min(127, round(x))) for x in exact]
        vector.copy_(torch.tensor(numbers).to(states.dtype) * step)
    return kept


def _int4(states: torch.Tensor) -> torch.Tensor:
    """The same of 4 bits: each 32 numbers of a vector between their least and their largest."""
    kept = states.clone()
    for vector in kept.view(-1, states.shape[-1]):
        for group in vector.split(32):
            exact = group.tolist()
            least = torch.tensor(min(exact)).to(states.dtype)
            span = torch.tensor(max(exact)) - torch.tensor(min(exact))
            step = (span / 15).to(states.dtype)
            codes = [max(0, min(15, round((x - float(least)) / (float(step) or 1.0)))) for x in exact]
            group.copy_(torch.tensor(codes).to(states.dtype) * (step if step else 1) + least)
    return kept


def _int4_keys(states: torch.Tensor) -> torch.Tensor:
    """Of keys: each number's 32 tokens, but the last group of tokens, which is kept."""
    whole = (states.shape[2] - 1) // 32 * 32
    turned = _int4(states[:, :, :whole].transpose(2, 3).contiguous()).transpose(2, 3)
    return torch.cat([turned, states[:, :, whole:]], dim=2)


class Everything:
    """The plainest cache: every token that passed, of each layer, [B, heads, T, D]."""

    def __init__(self) -> None:
        self.past: list[list[torch.Tensor]] = [[], []]

    def tokens(self) -> int:
        return self.past[0][0].shape[2] if self.past[0] else 0

    def change(self, function) -> None:
        self.past = [[function(states) for states in layer] for layer in self.past]

    def append(self, layer: int, states: list[torch.Tensor]) -> list[torch.Tensor]:
        past = self.past[layer]
        self.past[layer] = [torch.cat(pair, 2) for pair in zip(past, states, strict=True)] if past else states
        return self.past[layer]


LENGTHS = st.one_of(st.integers(1, 5), st.integers(1, 90))
STEPS = st.one_of(
    st.tuples(st.just("update"), LENGTHS),
    st.tuples(st.just("update"), LENGTHS),
    st.tuples(st.just("crop"), st.integers(0, ROLLBACK)),
    st.tuples(st.sampled_from(["reorder", "repeat", "select", "reset"]), st.integers(0, 2)),
)


def _step_both(
    cache: KVCache, truth: Everything, kind: str, number: int, *, back: int, generator: torch.Generator
) -> None:
    """A step that adds nothing; a crop by `back` tokens at most."""
    seen = truth.tokens()
    if kind == "crop":
        number = min(number, back, seen)
        cache.crop(-number)
        truth.change(lambda states: states[:, :, : seen - number])
    elif kind == "reorder":
        batch = truth.past[0][0].shape[0] if truth.past[0] else 2
        order = torch.randint(batch, (batch,), generator=generator)
        cache.reorder_cache(order)
        truth.change(lambda states: states[order])
    elif kind == "repeat" and seen:
        cache.batch_repeat_interleave(number + 1)
        truth.change(lambda states: states.repeat_interleave(number + 1, 0))
    elif kind == "select" and seen:
        cache.batch_select_indices(torch.tensor([0]))
        truth.change(lambda states: states[:1])


@settings(max_examples=25)
@given(
    steps=st.lists(STEPS, max_size=12),
    prompt=LENGTHS,
    bits=st.sampled_from([16, 8]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    scale=st.sampled_from([1, 1, 5e-6, 0]),  # so small that the steps of float16 round by a third, and to nothing
    seed=st.integers(0, 99),
)
@example(steps=[("update", 9)], prompt=20, bits=8, dtype=torch.float16, scale=5e-6, seed=0)
def test_any_sequence_of_steps_reads_what_a_full_history_says(
    steps, prompt: int, bits: int, dtype, scale: float, seed: int
):
    """A layer with a window is asked for the last window - 1 tokens and the new ones; crops go back at most ROLLBACK
    from the furthest token."""
    generator = torch.Generator().manual_seed(seed)
    cache, truth, batch, furthest = KVCache(ALTERNATING, ctx_tokens=3000, bits=bits), Everything(), 2, 0
    for kind, number in [("update", prompt), *steps]:
        seen = truth.tokens()
        if kind == "update":
            for layer in (0, 1):
                shape = (batch, HEADS, number, SIZE)
                new = [(scale * torch.randn(shape, generator=generator)).to(dtype) for _ in range(2)]
                sizes = cache.get_mask_sizes(number, layer)
                read = cache.update(*new, layer)
                expected = truth.append(layer, [_int8(states) for states in new] if bits == 8 else new)
                visible = number + (seen if layer else min(seen, WINDOW - 1))
                assert sizes == (visible, seen + number - visible)
                expected = [states[:, :, -visible:].clone() for states in expected]
                if seen == 0 or (layer == 0 and visible > WINDOW - 1 + SLACK):
                    for states, exact in zip(expected, new, strict=True):
                        states[:, :, -number:] = exact
                assert all(torch.equal(*pair) for pair in zip(read, expected, strict=True))
            furthest = max(furthest, seen + number)
        elif kind == "reset":
            cache.reset()
            truth, furthest = Everything(), 0
        else:
            _step_both(cache, truth, kind, number, back=max(seen - furthest + ROLLBACK, 0), generator=generator)
        batch = truth.past[0][0].shape[0] if truth.past[0] else batch
        assert cache.get_seq_length() == cache.get_seq_length(1) == truth.tokens()


@pytest.mark.parametrize("prompt", [3, WINDOW - 1, WINDOW, 200])
def test_it_answers_as_dynamic_cache_does(prompt: int):
    """With the calls of assisted decoding: drafts in one update, and a crop after each."""
    ours, stock = KVCache(ALTERNATING, ctx_tokens=1000), DynamicCache(config=ALTERNATING)
    assert ours.is_sliding == stock.is_sliding
    stock.activate_past_recording()
    ours.activate_past_recording()
    for step in range(60):
        new = prompt if step == 0 else 1 + step % 7
        for layer in (0, 1):
            states = torch.randn(1, HEADS, new, SIZE), torch.randn(1, HEADS, new, SIZE)
            sizes = ours.get_mask_sizes(new, layer)
            assert step == 0 or sizes == stock.get_mask_sizes(new, layer)
            read, expected = ours.update(*states, layer), stock.update(*states, layer)
            assert all(torch.equal(a, b[:, :, -a.shape[2] :]) for a, b in zip(read, expected, strict=True))
            assert read[0].shape[2] == sizes[0]
        for cache in (ours, stock):
            cache.crop(-(step % (min(new, 6) + 1)))
        assert ours.get_seq_length() == stock.get_seq_length()
    assert not ours.is_compileable
    assert ours.is_initialized
    assert ours.get_max_length() == 1000


def _filled(bits: int = 16, tokens: int = 40, kinds: list[str] = ALTERNATING.layer_types) -> KVCache:
    config = LlamaConfig(num_hidden_layers=2, sliding_window=WINDOW, layer_types=kinds)
    cache = KVCache(config, ctx_tokens=100, bits=bits)
    states = torch.randn(1, HEADS, tokens, SIZE)
    for layer in (0, 1):
        cache.update(states, states, layer)
    return cache


@pytest.mark.parametrize("bits", [16, 8])
def test_memory_is_fixed_and_written_in_place(bits: int):
    cache = _filled(bits)
    one = torch.randn(1, HEADS, 1, SIZE)
    places, sizes = set(), set()
    for _ in range(60):
        keys, values = [cache.update(one, one, layer) for layer in (0, 1)][1]
        places.add((keys.untyped_storage().data_ptr(), values.untyped_storage().data_ptr()))
        sizes.add(cache.nbytes)
    assert len(places) == len(sizes) == 1


def test_a_window_can_always_go_back_half_its_slack():
    """Wherever in its store it stands: a draft made token by token has to be undone."""
    cache = _filled()
    for _ in range(59):
        one = torch.randn(1, HEADS, 1, SIZE)
        past = [cache.update(one, one, layer)[0] for layer in (0, 1)]
        undone = copy.deepcopy(cache)
        undone.crop(-ROLLBACK)
        read = undone.update(one, one, 0)[0]
        expected = past[1][:, :, :-ROLLBACK][:, :, -(WINDOW - 1) :]
        assert torch.equal(read[:, :, :-1], expected)


def test_what_cannot_be_done_is_refused_with_numbers_and_changes_nothing():
    cache = _filled(tokens=90, kinds=["full_attention", "sliding_attention"])
    more = torch.randn(1, HEADS, 11, SIZE)
    with pytest.raises(GriffinError, match="holds 100 tokens, and 11 more than its 90"):
        cache.update(more, more, 1)
    with pytest.raises(GriffinError, match="as a negative number"):
        cache.crop(3)
    with pytest.raises(GriffinError, match="91 tokens cannot be removed from a KV cache of 90"):
        cache.crop(-91)
    with pytest.raises(GriffinError, match=r"80 tokens cannot be removed from a layer with a window of 16.* only 79"):
        cache.crop(-80)
    assert cache.get_seq_length(0) == cache.get_seq_length(1) == 90
    cache.crop(-64)
    assert cache.get_seq_length() == 26


PROMPT_TOKENS = 40


def _ids(batch: int = 1, tokens: int = PROMPT_TOKENS) -> tuple[torch.Tensor, torch.Tensor]:
    ids = torch.randint(3, VOCAB, (batch, tokens), generator=torch.Generator().manual_seed(batch))
    mask = torch.ones_like(ids)
    for i in range(batch):
        mask[i, : 7 * i] = 0
    return ids * mask, mask


def _load(path, **options: object) -> GriffinModel:
    return GriffinModel.from_pretrained(path, device="cpu", **{"ctx_size": 256, "max_gpu_mem": "1GB"} | options)


STRATEGIES: dict[str, dict[str, object]] = {
    "greedy": {"do_sample": False},
    "beams": {"do_sample": False, "num_beams": 3},
    "several": {"do_sample": True, "num_return_sequences": 3, "temperature": 2.0},
    "lookup": {"do_sample": False, "prompt_lookup_num_tokens": 6},
    "far lookup": {"do_sample": False, "prompt_lookup_num_tokens": SLACK + 6},
}


@pytest.mark.parametrize(
    ("name", "strategy"),
    by_turns(["gemma3", "llama3", "mistral", "gemma2"], STRATEGIES, whole=["gemma3"]),
)
def test_generation_is_the_dense_models_own_far_beyond_its_window(checkpoints, name: str, strategy: str):
    """Behind a window of 16; in 150 tokens it has moved to the start of its store twice, in 90 once."""
    path = checkpoints(name)
    ids = _ids()[0].repeat(1, 2)[:, :44]  # so that there is something to look up
    settings = STRATEGIES[strategy] | {"max_new_tokens": 110 if strategy == "greedy" else 50}
    torch.manual_seed(0)
    expected = AutoModelForCausalLM.from_pretrained(path).generate(ids, **settings, use_cache=True)
    model = _load(path, density=1.0, batch_size=3)
    torch.manual_seed(0)
    output = model.generate(ids, **settings, return_dict_in_generate=True)
    assert torch.equal(output.sequences, expected)
    ours = strategy != "far lookup" or name == "llama3"
    assert type(output.past_key_values) is (KVCache if ours else DynamicCache)


@pytest.mark.parametrize("name", mostly_slow(("llama2", "gemma3", "mistral", "bloom"), 2))
def test_logits_of_a_padded_batch_are_those_with_transformers_cache_bit_for_bit(checkpoints, name: str):
    ids, mask = _ids(3)
    settings = {"max_new_tokens": 45, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    model = _load(checkpoints(name), density=0.5, batch_size=3)
    output, expected = (
        model.generate(ids, attention_mask=mask, **settings, **cache)
        for cache in ({}, {"cache_implementation": "dynamic"})
    )
    assert type(expected.past_key_values) is DynamicCache
    assert torch.equal(torch.stack(output.logits), torch.stack(expected.logits))


@pytest.mark.parametrize("name", ["llama3", "mistral"])
def test_an_assistant_may_draft(checkpoints, name: str):
    dense = AutoModelForCausalLM.from_pretrained(checkpoints(name))
    ids = _ids()[0]
    expected = dense.generate(ids, max_new_tokens=30, do_sample=False)
    model = _load(checkpoints(name), density=1.0)
    settings = {"max_new_tokens": 30, "do_sample": False, "return_dict_in_generate": True}
    output = model.generate(ids, **settings, assistant_model=dense)
    assert torch.equal(output.sequences, expected)
    # How much an assistant drafts is its own affair, and a window of ours rolls back only so far.
    assert type(output.past_key_values) is (DynamicCache if name == "mistral" else KVCache)


def test_drafts_reach_behind_the_context(checkpoints):
    """Prompt lookup drafts past the last token that is wanted."""
    ids = torch.tensor([[7, 8, 9, 10] * 10])
    for new in (1, 2, 5, 8):
        model = _load(checkpoints("llama3"), density=1.0, ctx_size=40 + new)
        output = model.generate(ids, max_new_tokens=new, do_sample=False, prompt_lookup_num_tokens=5)
        assert output.shape[1] <= 40 + new


@pytest.mark.parametrize(("keys", "values"), [(64, 64), (80, 80), (192, 128), (256, 256), (2, 2)])
def test_four_bits_of_heads_of_any_size(keys: int, values: int):
    """Groups of 32 and the rest of a head, to the byte, and back out of what a file would hold."""
    scratches = (DequantBuffer(), DequantBuffer())
    layer = KVLayer(50, None, 4, scratches)
    drawn = torch.Generator().manual_seed(0)
    given = [torch.randn(1, 3, 40, size, generator=drawn).bfloat16() for size in (keys, values)]
    layer.update(*(states[:, :, :39] for states in given))
    read = layer.update(*(states[:, :, 39:] for states in given))
    assert torch.equal(read[0], _int4_keys(given[0]))
    assert torch.equal(read[1], _int4(given[1]))
    groups = -(-values // 32)
    of_keys = 64 * keys // 2 + 2 * 2 * 2 * keys + 32 * 2 * keys  # room in groups, steps and least ones, the last group
    assert layer.nbytes == 3 * (of_keys + 50 * (values // 2 + 2 * 2 * groups))
    shapes = [list(part.shape) for part in layer.saved()]
    other = KVLayer(50, None, 4, scratches)
    assert other.could_load(40, shapes)
    for axis in range(4):
        for part in range(len(shapes)):
            changed = [[*shape] for shape in shapes]
            changed[part][axis] += 16  # so many that a value's groups are others, too
            assert not other.could_load(40, changed)
    assert not other.could_load(40, shapes[:-1])
    other.load(40, layer.saved())
    assert all(torch.equal(*pair) for pair in zip(other.saved(), layer.saved(), strict=True))
    other.grow(90)
    more = [torch.randn(1, 3, 30, size, generator=drawn).bfloat16() for size in (keys, values)]
    read = other.update(*more)
    assert torch.equal(read[0], _int4_keys(torch.cat([given[0], more[0]], dim=2)))


@settings(max_examples=30)
@given(steps=st.lists(STEPS, max_size=25), prompt=LENGTHS, seed=st.integers(0, 99))
@example(steps=[("update", 1)] * 90, prompt=31, seed=0)
@example(steps=[("update", 70), ("crop", 32), ("update", 3), ("update", 80)], prompt=40, seed=1)
def test_four_bits_read_nearly_what_a_full_history_says(steps, prompt: int, seed: int):
    """Groups are opened again by a crop, moved behind a window, and carried along with the batch: each is another
    rounding, by at most a fifteenth of what 32 normal numbers span. A wrong place would be off by 1.4 of the norm."""
    generator = torch.Generator().manual_seed(seed)
    cache, truth, batch, furthest = KVCache(ALTERNATING, ctx_tokens=3000, bits=4), Everything(), 2, 0
    for kind, number in [("update", prompt), *steps]:
        seen = truth.tokens()
        if kind == "update":
            for layer in (0, 1):
                new = [torch.randn(batch, HEADS, number, SIZE, generator=generator) for _ in range(2)]
                given = [states.clone() for states in new]
                read = cache.update(*new, layer)
                assert all(torch.equal(*pair) for pair in zip(new, given, strict=True))
                visible = number + (seen if layer else min(seen, WINDOW - 1))
                expected = [states[:, :, -visible:] for states in truth.append(layer, given)]
                assert all(
                    a.shape == b.shape and (a - b).norm() <= 0.3 * b.norm() for a, b in zip(read, expected, strict=True)
                )
            furthest = max(furthest, seen + number)
        elif kind == "reset":
            cache.reset()
            truth, furthest = Everything(), 0
        else:
            _step_both(cache, truth, kind, number, back=max(seen - furthest + ROLLBACK, 0), generator=generator)
        batch = truth.past[0][0].shape[0] if truth.past[0] else batch
        assert cache.get_seq_length() == cache.get_seq_length(1) == truth.tokens()


def test_an_odd_head_is_refused_four_bits():
    layer = KVLayer(50, None, 4, (DequantBuffer(), DequantBuffer()))
    with pytest.raises(UnsupportedModel, match="two numbers of a head in a byte, these have 5: use kv_bits=8"):
        layer.update(*(torch.randn(1, 3, 4, 5) for _ in range(2)))


@pytest.mark.parametrize(
    ("name", "dtype"),
    by_turns(("llama3", "gemma3", "mistral", "gpt2"), (torch.float32, torch.bfloat16), whole=()),
)
def test_fewer_bits_stay_near_sixteen(checkpoints, name: str, dtype: torch.dtype):
    """Rounding to 1/127 of a vector's largest number errs by 1/254 at most and 1/440 as a rule, which is under one
    per cent of a vector's usual number; errors of three layers' keys and values add as a root of squares. 5 per cent
    leaves room for scores that a softmax sharpens, and is far from what a wrong scale or place would do. 4 bits have a
    tenth of the steps, between a group's own ends."""
    ids, mask = _ids(2)
    forced = torch.randint(3, VOCAB, (2, 26), generator=torch.Generator().manual_seed(9))
    settings = {"max_new_tokens": 26, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    settings["prefix_allowed_tokens_fn"] = lambda sample, ids: [int(forced[sample, len(ids) - PROMPT_TOKENS])]
    logits = {}
    for bits in (16, 8, 4):
        model = _load(checkpoints(name, dtype), kv_bits=bits, density=0.5, batch_size=2)
        output = model.generate(ids, attention_mask=mask, **settings)
        assert torch.equal(output.sequences[:, PROMPT_TOKENS:], forced)  # the same tokens, so logits can be compared
        logits[bits] = torch.stack(output.logits).double()
    for bits, most in ((8, 0.05), (4, 0.5)):
        assert torch.equal(logits[16][0], logits[bits][0])  # the prompt's own pass reads it unquantised
        error = (logits[bits][1:] - logits[16][1:]).norm() / logits[16][1:].norm()
        assert 1e-4 < error < most, bits


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("llama3", {"refresh": 5}),
        pytest.param("mistral", {"num_beams": 3}, marks=pytest.mark.slow),
        pytest.param("llama3", {"num_return_sequences": 2, "do_sample": True}, marks=pytest.mark.slow),
    ],
)
def test_four_bits_with_tokens_that_pass_again_and_sequences_that_part(checkpoints, name: str, options: dict):
    sixteen, four = (_load(checkpoints(name), kv_bits=bits, density=0.5, batch_size=3) for bits in (16, 4))
    settings = {"max_new_tokens": 28, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    logits = []
    for model in (sixteen, four):
        torch.manual_seed(0)
        logits.append(torch.stack(model.generate(_ids()[0], **settings | options).logits[:2]))
        assert model.last_report.peak_device_bytes <= model.plan.peak_bytes
    assert 0 < (logits[1] - logits[0]).norm() < 0.5 * logits[0].norm()


@pytest.mark.parametrize(("name", "batch", "bits"), by_turns(KINDS, (1, 3), (16, 8, 4), whole=("mistral",)))
def test_planned_bytes_are_allocated_to_the_byte(checkpoints, name: str, batch: int, bits: int):
    context = 81  # more than a window and its slack
    model = _load(checkpoints(name), kv_bits=bits, batch_size=batch, density=0.5, ctx_size=context)
    ids, mask = _ids(batch, context - 3)
    settings = {"max_new_tokens": 3, "do_sample": False, "return_dict_in_generate": True}
    output = model.generate(ids, attention_mask=mask, **settings)
    shape = model.engine.model_spec.shape
    stored = kv_bytes(shape, batch, context, bits)
    scratch = batch * shape.kv_width * 4 * max(min(layer.window or context, context) for layer in shape.layers)
    if all(layer.window for layer in shape.layers):
        scratch = batch * shape.kv_width * 4 * (WINDOW - 1 + SLACK)
    if bits == 4:  # keys, in whole groups
        longest = scratch // (batch * shape.kv_width * 4)
        scratch = scratch // 2 + scratch // 2 // longest * -(-longest // 32) * 32
    assert output.past_key_values.nbytes == stored + (scratch if bits != 16 else 0)
    assert model.plan.prefill_parts["kv_cache"] == model.plan.decode_parts["kv_cache"] == stored
    assert model.last_report.peak_device_bytes <= model.plan.peak_bytes


def test_bytes_by_hand(checkpoints):
    """llama3: 3 layers, 2 KV heads of 8 numbers; mistral the same, all with windows of 16; float32 outside int8, two
    of them a group with 4 bits."""
    by_hand = {
        ("llama3", 16): 3 * 2 * 2 * 8 * 256 * 4,
        ("llama3", 8): 3 * 2 * 2 * 256 * (8 + 4),
        ("llama3", 4): 3 * 2 * (256 * (8 // 2 + 2 * 4) + 256 * 8 // 2 + 8 * 2 * 8 * 4 + 32 * 8 * 4),
        ("mistral", 16): 3 * 2 * 2 * 8 * (15 + 64) * 4,
        ("mistral", 8): 3 * 2 * 2 * (15 + 64) * (8 + 4),
    }
    for (name, bits), expected in by_hand.items():
        assert _load(checkpoints(name), kv_bits=bits).plan.decode_parts["kv_cache"] == expected
    sixteen, eight = (_load(checkpoints("llama3"), kv_bits=bits).plan.decode_parts["workspace"] for bits in (16, 8))
    scratch, piece_moved, piece_quantised = 2 * 2 * 8 * 256 * 4, 2 * 8 * 128 * 4, 2 * 8 * 128 * 8
    assert eight - sixteen == scratch + piece_quantised - piece_moved


@settings(max_examples=8)
@given(
    budget=st.integers(150_000, 700_000),
    prompt=st.integers(1, 60),
    new=st.integers(1, 60),
    beams=st.integers(1, 3),
    bits=st.sampled_from([8, 4]),
)
def test_fewer_bits_stay_within_any_budget(checkpoints, budget: int, prompt: int, new: int, beams: int, bits: int):
    options = {"max_gpu_mem": budget, "ctx_size": prompt + new + 1, "batch_size": beams, "kv_bits": bits}
    try:
        model = GriffinModel.from_pretrained(checkpoints("gemma3"), device="cpu", **options)
    except DoesNotFit:
        return
    model.generate(_ids(1, prompt)[0], max_new_tokens=new, do_sample=False, num_beams=beams)
    assert model.last_report.peak_device_bytes <= budget


def test_a_callers_own_cache_is_used(checkpoints):
    model = _load(checkpoints("llama3"), density=0.5)
    ids = _ids()[0]

    def cache_of(**settings: object) -> Cache:
        defaults = {"max_new_tokens": 4, "return_dict_in_generate": True}
        if "generation_config" in settings:
            defaults = {}
        return model.generate(ids, **defaults | settings).past_key_values

    assert type(cache_of()) is KVCache
    given_cache = DynamicCache(config=model.model.config)
    assert cache_of(past_key_values=given_cache) is given_cache
    assert type(cache_of(cache_implementation="dynamic")) is DynamicCache
    config = {"max_new_tokens": 4, "return_dict_in_generate": True, "pad_token_id": 0}
    assert type(cache_of(generation_config=GenerationConfig(**config))) is KVCache
    dynamic = GenerationConfig(**config, cache_implementation="dynamic")
    assert type(cache_of(generation_config=dynamic)) is DynamicCache
    model.model.generation_config.cache_implementation = "dynamic"
    assert type(cache_of()) is DynamicCache
    assert type(cache_of(generation_config=GenerationConfig(**config))) is DynamicCache  # transformers fills it in
    model.model.generation_config.cache_implementation = "hybrid"  # what old hub configs say, and nobody means
    assert type(cache_of()) is KVCache


def test_layers_of_other_kinds_keep_transformers_cache(checkpoints, monkeypatch: pytest.MonkeyPatch):
    """The way is walked with plain ones, whose bytes are known."""
    assert all(can_cache(architecture.build().config) for architecture in ARCHITECTURES.values())
    assert can_cache(Lfm2Config(num_hidden_layers=2, layer_types=["conv", "full_attention"]))
    assert not can_cache(T5Config())
    monkeypatch.setattr("griffin_offload.engine.spec.can_cache", lambda config: False)
    for bits in (8, 4):
        with pytest.raises(UsageError, match=f"kv_bits={bits} needs layers of llama that keep keys and values, some"):
            _load(checkpoints("llama3"), kv_bits=bits)
    model = _load(checkpoints("llama3"), ctx_size=72, prompt_tokens=40, density=0.5)
    output = model.generate(_ids()[0], max_new_tokens=32, do_sample=False, return_dict_in_generate=True)
    assert type(output.past_key_values) is DynamicCache
    parts = model.plan.prefill_parts, model.plan.decode_parts
    assert parts[0]["kv_cache"] * 72 == parts[1]["kv_cache"] * 40
    assert model.last_report.peak_device_bytes <= model.plan.peak_bytes


def test_the_cache_is_halved_before_anything_else(checkpoints):
    path, ids = checkpoints("llama3"), torch.arange(5, 25)[None]
    options = {"quantize": "none", "ctx_size": 500, "prompt_tokens": 100}
    whole = _load(path, density=1.0, **options).plan
    assert (whole.kv_bits, whole.density) == (16, 1)
    model = _load(path, **options | {"max_gpu_mem": whole.peak_bytes - 1})
    assert (model.plan.kv_bits, model.plan.density, model.plan.precision) == (8, 1, whole.precision)
    same = _load(path, density=1.0, kv_bits=8, **options)
    answers = [one.generate(ids, max_new_tokens=8, do_sample=False) for one in (model, same)]
    assert torch.equal(*answers)
    with pytest.raises(UsageError, match="needs the KV cache as it is computed: load with exact=True"):
        model.generate(ids, max_new_tokens=2, exact=True)
    with pytest.raises(DoesNotFit):  # its passes take memory, too, and the cache has to be as it is computed
        _load(path, exact=True, **options | {"max_gpu_mem": whole.peak_bytes - 1})
    assert _load(path, exact=True, **options).plan.kv_bits == 16


def test_kv_bits_is_checked():
    with pytest.raises(UsageError, match="kv_bits is 5: choose one of auto, 16, 8, 4"):
        GriffinModel.from_pretrained("anything", kv_bits=5)
