"""Which contexts are kept, and which one a prompt goes on from."""

import pytest
import torch

from griffin_offload import DoesNotFit, GriffinModel
from griffin_offload.kv_cache.sequence import Context
from griffin_offload.serving.model_manager import PrefixCache, session_limit


def say(model: GriffinModel, sessions: PrefixCache, *ids: int) -> Context:
    """One request: the context it used, given back."""
    prompt = torch.tensor([ids])
    context = sessions.take(prompt[0], exact=False)
    model.generate(prompt, context=context, max_new_tokens=2, do_sample=False)
    sessions.keep(context)
    return context


@pytest.fixture
def one_bytes(model: GriffinModel) -> int:
    """Of one context."""
    return say(model, PrefixCache(model.new_context, 0, 9), 5, 6, 7).nbytes


def test_bytes_are_all_that_a_context_keeps_alive(model: GriffinModel):
    context = say(model, PrefixCache(model.new_context, 0, 9), 5, 6, 7)
    seam, last = context.marks  # the seam has a statistic of its own
    parts = [*context.squared.values(), *context.selected.values(), *seam.squared.values(), last.logits]
    assert len(parts) == 3 * len(model.plan.streamed) + 1
    assert context.nbytes == model.plan.decode_parts["kv_cache"] + sum(part.nbytes for part in parts)


def test_the_longest_start_is_found(model: GriffinModel):
    sessions = PrefixCache(model.new_context, 10**9, 9)
    short, other, long = say(model, sessions, 5, 6), say(model, sessions, 9, 9, 9), say(model, sessions, 5, 7, 8)
    assert len({id(context) for context in (short, other, long)}) == 3
    assert say(model, sessions, 5, 7, 8, 9, 10) is long
    assert say(model, sessions, 5, 6, 9, 10) is short
    assert say(model, sessions, 9, 10) not in (short, other, long)


def test_the_longest_unused_goes_first_and_its_memory_is_used_again(model: GriffinModel, one_bytes: int):
    limit = one_bytes * 3 // 2  # one beside the one in use; a second turn adds a mark to it
    sessions = PrefixCache(model.new_context, limit, 9)
    first, second = say(model, sessions, 5, 6), say(model, sessions, 7, 8)
    assert first is not second
    assert say(model, sessions, 9, 10) is first
    assert (len(sessions), sessions.nbytes == 2 * one_bytes) == (2, True)
    assert say(model, sessions, 7, 8, 9) is second
    context = sessions.take(torch.tensor([11, 12]), exact=False)
    assert context is first
    assert 0 < sessions.nbytes <= limit


def test_without_room_there_is_one(model: GriffinModel):
    sessions = PrefixCache(model.new_context, 0, 9)
    context = say(model, sessions, 5, 6, 7)
    for ids in ((8, 9), (5, 6), (5, 6, 1, 2)):
        assert say(model, sessions, *ids) is context
        assert len(sessions) == 1


def test_their_number_is_bounded_too(model: GriffinModel):
    sessions = PrefixCache(model.new_context, 10**9, 2)
    for number in range(6):
        say(model, sessions, 5 + number, 20)
        assert len(sessions) <= 3


def test_a_long_conversation_is_not_given_for_its_first_question(model: GriffinModel):
    for room, spared in ((10**9, True), (0, False)):
        sessions = PrefixCache(model.new_context, room, 9)
        long = say(model, sessions, 5, 6)
        for word in (10, 20):
            assert say(model, sessions, *long.tokens, word, word + 1) is long
        assert long.known(torch.tensor([5, 6, 30]), exact=False) == 2
        assert (say(model, sessions, 5, 6, 30) is not long) == spared


def test_the_limit_is_what_the_plan_left_and_what_was_set_aside(chatty):
    options = {"device": "cpu", "density": 0.5, "ctx_size": 200, "keep_prompts": True, "max_gpu_mem": 2_000_000}
    with GriffinModel.from_pretrained(chatty, **options) as without:
        left = without.plan.budget_bytes - without.plan.peak_bytes
        assert session_limit(without.plan) == left > 0
    with GriffinModel.from_pretrained(chatty, **options, session_mem="100kB") as aside:
        assert aside.plan.decode_parts["sessions"] == 100_000
        assert aside.plan.peak_bytes == without.plan.peak_bytes + 100_000
        assert session_limit(aside.plan) == left


def test_idle_contexts_count_against_the_budget(model: GriffinModel):
    """What `generate` may take is what they leave."""
    room = model.plan.budget_bytes - model.plan.peak_bytes
    ids = torch.tensor([[5, 6, 7]])
    try:
        model.engine.keep_idle(room)
        model.generate(ids, max_new_tokens=2, do_sample=False)
        assert model.last_report.peak_device_bytes > room
        model.engine.keep_idle(model.plan.budget_bytes)
        with pytest.raises(DoesNotFit):
            model.generate(ids, max_new_tokens=2, do_sample=False)
    finally:
        model.engine.keep_idle(0)
