"""Contexts: a prompt goes on from what an earlier one left, and only what differs is computed."""

from pathlib import Path

import pytest
import torch
from conversation_reference import MaskedConversation
from hypothesis import given, settings
from hypothesis import strategies as st
from loaded_model import answer, load
from loaded_model import ids as prompt_of
from marks import by_turns, mostly_slow
from tiny_models import ARCHITECTURES
from transformers import AutoModelForCausalLM, StoppingCriteria

from griffin_offload import DoesNotFit, GriffinModel, UsageError

FAMILIES = ["llama2", "mistral", "gemma2", "gemma3", "gpt2", "opt", "falcon_alibi", "bloom", "phi3", "qwen3"]
CTX = 128


def _load(path: Path, **options: object) -> GriffinModel:
    return load(path, **{"ctx_size": CTX, "always_stream": True} | options)


@pytest.mark.parametrize(("name", "density"), by_turns(FAMILIES, (0.5, 1.0), whole=FAMILIES[:1]))
def test_turns_equal_a_masked_reference(checkpoints, name: str, density: float):
    """Past the windows of 16; at density 1 the reference is the dense model itself."""
    path = checkpoints(name)
    dense = AutoModelForCausalLM.from_pretrained(path)
    architecture = ARCHITECTURES[name]
    reference = MaskedConversation(dense, architecture.down, int(architecture.neurons * density))
    model = _load(path, density=density)
    context = model.new_context()
    ids = prompt_of(1, 20)
    for turn in range(3):
        expected = reference.turn(ids, 8)
        fetched, known = model.engine.loaded.layers.fetched_bytes, len(context.tokens)
        assert torch.equal(answer(model, ids, context=context), expected)
        report = model.last_report
        assert (report.cached_prompt_tokens, report.prompt_tokens) == (known, ids.shape[1] - known)
        assert model.engine.loaded.layers.fetched_bytes - fetched == model.plan.streamed_bytes
        assert all(torch.equal(model.selected[i], chosen) for i, chosen in enumerate(reference.selected))
        assert report.peak_device_bytes <= model.plan.budget_bytes
        ids = torch.cat([expected, prompt_of(turn + 2, 6)], dim=1)


def test_the_same_prompt_again_streams_nothing(checkpoints):
    model = _load(checkpoints("gemma2"))
    context, ids = model.new_context(), prompt_of(0, 30)
    first = answer(model, ids, context=context)
    selected = model.selected
    for _ in range(2):
        assert torch.equal(answer(model, ids, context=context), first)
        assert (model.last_report.prefill_streamed_bytes, model.last_report.prompt_tokens) == (0, 0)
        assert all(model.selected[layer] is selected[layer] for layer in selected)


@pytest.fixture(scope="module")
def dense_and_ours(checkpoints) -> dict[str, tuple[object, GriffinModel]]:
    return {
        name: (AutoModelForCausalLM.from_pretrained(checkpoints(name), dtype=torch.float64), model)
        for name in ("llama3", "gemma2")
        for model in [_load(checkpoints(name), density=1.0, dtype="float64")]
    }


@settings(max_examples=10)
@given(
    name=st.sampled_from(["llama3", "gemma2"]),
    turns=st.lists(st.tuples(st.floats(0, 1), st.integers(1, 20), st.integers(1, 6)), min_size=1, max_size=5),
    exact=st.booleans(),
)
def test_any_prompt_after_any_other_equals_dense(dense_and_ours, name, turns, exact):
    """Each turn keeps some share of the sequence so far, in its prompt or in its answer, and goes on otherwise."""
    dense, model = dense_and_ours[name]
    context, sequence = model.new_context(), prompt_of(0, 1)
    for number, (share, tokens, new_tokens) in enumerate(turns):
        kept = min(int(share * sequence.shape[1]), CTX - tokens - new_tokens)
        ids = torch.cat([sequence[:, :kept], prompt_of(number, tokens)], dim=1)
        expected = dense.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=new_tokens, do_sample=False)
        sequence = answer(model, ids, new_tokens, context=context, exact=exact)
        assert torch.equal(sequence, expected)


@pytest.mark.parametrize("name", ["llama2", "gemma2"])
def test_exact_mode_goes_on_from_the_full_models_entries_alone(checkpoints, name: str):
    """An answer of the residents left entries of theirs: behind it nothing would be exact."""
    path = checkpoints(name)
    dense, model = AutoModelForCausalLM.from_pretrained(path), _load(path)
    context, ids = model.new_context(), prompt_of(0, 24)
    for turn in range(4):
        exact = turn % 2 == 1
        ids = torch.cat(
            [answer(model, ids, context=context, exact=exact, refresh="never"), prompt_of(turn + 1, 5)], dim=1
        )
        again = answer(model, ids, context=context, exact=True)
        expected = dense.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False)
        assert torch.equal(again, expected)
        ids = again


@pytest.mark.parametrize("name", ["llama2", "gpt2", "phi3"])
def test_two_contexts_take_turns_on_one_model(checkpoints, name: str):
    """What another context chose is gathered again; of the full weights only rows that are needed are read."""
    path = checkpoints(name)
    alone = [_load(path) for _ in range(2)]
    expected = [answer(model, prompt_of(i, 24), context=model.new_context()) for i, model in enumerate(alone)]
    model = _load(path)
    contexts = [model.new_context() for _ in range(2)]
    for i in (0, 1):
        assert torch.equal(answer(model, prompt_of(i, 24), context=contexts[i]), expected[i])
    for i in (0, 1, 0):
        before = model.engine.loaded.layers.fetched_bytes
        assert torch.equal(answer(model, prompt_of(i, 24), context=contexts[i]), expected[i])
        read = model.engine.loaded.layers.fetched_bytes - before
        assert read == model.last_report.prefill_streamed_bytes > 0
        assert all(torch.equal(model.selected[layer], alone[i].selected[layer]) for layer in model.selected)


def test_only_rows_are_read_again(checkpoints):
    """Host RAM has no pages: exactly the rows of gate and up, and all of down, whose columns the neurons are."""
    model = _load(checkpoints("llama2"), offload="ram")
    first, second = model.new_context(), model.new_context()
    ids = prompt_of(0, 24)
    answer(model, ids, context=first)
    answer(model, prompt_of(1, 24), context=second)
    answer(model, ids, context=first)
    full = model.plan.streamed_bytes
    assert model.last_report.prefill_streamed_bytes == full // 3 + full // 3 * 2 // 2


def test_refresh_never_streams_the_first_prompt_alone(checkpoints):
    model = _load(checkpoints("llama2"), refresh="never")
    context = model.new_context()
    sequence = answer(model, prompt_of(0, 24), context=context)
    selected = model.selected
    answer(model, torch.cat([sequence, prompt_of(1, 5)], dim=1), context=context)
    assert model.last_report.prefill_streamed_bytes == 0
    assert all(torch.equal(model.selected[layer], selected[layer]) for layer in selected)


class _Boom(StoppingCriteria):
    def __call__(self, input_ids, scores, **kwargs):
        raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("name", "where", "exact"),
    mostly_slow(
        [("llama2", "pass", False), ("gemma2", "answer", False), ("gemma2", "pass", True), ("llama2", "answer", True)],
        2,
    ),
)
def test_an_interrupt_leaves_a_context_that_can_go_on(checkpoints, name: str, where: str, exact: bool):
    path = checkpoints(name)
    model = _load(path, exact=exact)
    context = model.new_context()
    first = answer(model, prompt_of(0, 24), context=context)
    tokens = list(context.tokens)
    ids = torch.cat([first, prompt_of(1, 9)], dim=1)
    if where == "pass":
        model.progress = lambda done, _: (_ for _ in ()).throw(KeyboardInterrupt) if done == 2 else None
    criteria = [_Boom()] if where == "answer" else []
    with pytest.raises(KeyboardInterrupt):
        answer(model, ids, context=context, stopping_criteria=criteria)
    model.progress = None
    assert context.tokens in (tokens, ids[0].tolist()[: len(context.tokens)])
    again = answer(model, ids, context=context)
    other = _load(path, exact=exact)
    fresh = other.new_context()
    answer(other, prompt_of(0, 24), context=fresh)
    assert torch.equal(again, answer(other, ids, context=fresh))
    if not exact:  # there the statistic fades with every pass, and how many there are depends on their seconds
        assert all(torch.equal(context.squared[i], fresh.squared[i]) for i in fresh.squared)


def test_what_does_not_fit_changes_nothing(checkpoints):
    path = checkpoints("llama2")
    model = _load(path)
    context = model.new_context()
    first = answer(model, prompt_of(0, 24), context=context)
    tokens = list(context.tokens)
    with pytest.raises(UsageError, match="the context is 128"):
        answer(model, torch.cat([first, prompt_of(1, 100)], dim=1), context=context)
    with pytest.raises(UsageError, match="another model"):
        answer(_load(path), first, context=context)
    with pytest.raises(UsageError, match="one sequence"):
        answer(model, first.repeat(2, 1), context=context)
    assert context.tokens == tokens
    tight = _load(path, max_gpu_mem=model.plan.peak_bytes)
    with pytest.raises(DoesNotFit, match="statistic"):
        answer(tight, prompt_of(0, CTX - 1), 1, context=tight.new_context())
