"""Sequences that are decoded together: each answers as it does alone, and all choose the neurons."""

import itertools
import threading
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from loaded_model import load
from marks import mostly_slow
from reference import select_direct, statistic_float64
from tiny_models import ARCHITECTURES, FURTHER, MIXTURES, VOCAB
from transformers import LogitsProcessor, LogitsProcessorList

from griffin_offload import GriffinError, GriffinModel, UsageError
from griffin_offload.engine.decoding import HasToWait
from griffin_offload.engine.scheduler import SequenceScheduler

TOGETHER = tuple(
    name for name in (*ARCHITECTURES, *FURTHER, *MIXTURES)
    if not name.startswith(
        ("falcon", "stablelm", "gptj", "bloom", "deepseek", "lfm2", "qwen3_next", "nemotron", "llama4")
    )
)  # fmt: skip
"""Architectures whose sequences can be computed together."""

SETTINGS: tuple[dict[str, Any], ...] = (
    {"do_sample": False},
    {"do_sample": True, "temperature": 0.7, "top_p": 0.9},
    {"do_sample": True, "top_k": 5, "repetition_penalty": 1.3},
    {"do_sample": False, "no_repeat_ngram_size": 2, "eos_token_id": list(range(3, 40))},
)
ASKED = st.tuples(st.integers(1, 30), st.integers(1, 12), st.sampled_from(SETTINGS), st.integers(0, 2**40))


def prompt(tokens: int, seed: int) -> torch.Tensor:
    return torch.randint(3, VOCAB, (1, tokens), generator=torch.Generator().manual_seed(seed))


def alone(model: GriffinModel, ids: torch.Tensor, seed: int = 0, **options: Any) -> list[int]:
    torch.manual_seed(seed)
    answer: list[int] = model.generate(ids, **options)[0, ids.shape[1] :].tolist()
    return answer


# Every architecture by itself: test_joint_prompts.py.
MIXED = ("llama3", "gemma2", "mistral", "phi3", "opt_350m", "gpt2", "gpt_oss", "gemma4")


@pytest.mark.parametrize("name", mostly_slow(MIXED, 6))
@settings(max_examples=2, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(asked=st.lists(ASKED, min_size=2, max_size=5), most=st.integers(2, 4))
def test_each_answers_as_it_does_alone(model_of, name: str, asked: list[Any], most: int):
    """With all neurons, whoever joins or leaves meanwhile; drawn tokens, too."""
    model = model_of(name)
    asking = [(prompt(tokens, seed), {"max_new_tokens": new, "seed": seed, **how}) for tokens, new, how, seed in asked]
    expected = [alone(model, ids, **options) for ids, options in asking]
    found = {answer.index: answer for answer in model.generate_many(asking, most=most)}
    assert model.why_alone is None
    assert [found[index].tokens.tolist() for index in range(len(asking))] == expected
    assert all(answer.report.peak_device_bytes <= model.plan.budget_bytes for answer in found.values())
    assert {answer.report.activation_kept for answer in found.values()} == {1.0}


def test_sixteen_bits_differ_by_rounding_alone(model_of, checkpoints):
    """int4 rows go through one kernel whatever their number: the very same tokens."""
    model = load(checkpoints("llama3", torch.bfloat16), density=1.0, quantize="int4")
    asking = [(prompt(4 + seed, seed), {"max_new_tokens": 10, "do_sample": False}) for seed in range(2)]
    found = {answer.index: answer.tokens.tolist() for answer in model.generate_many(asking)}
    assert found == {index: alone(model, ids, **options) for index, (ids, options) in enumerate(asking)}


@pytest.mark.parametrize(("name", "bits"), [("llama3", 8), ("gemma2", 8), ("gemma2", 4)])
def test_caches_in_fewer_bits_are_read_each_for_itself(model_of, name: str, bits: int):
    model = model_of(name, kv_bits=bits, ctx_size=128)
    asking = [(prompt(40 + 3 * seed, seed), {"max_new_tokens": 24, "do_sample": False}) for seed in range(3)]
    found = {answer.index: answer.tokens.tolist() for answer in model.generate_many(asking)}
    assert model.why_alone is None
    assert found == {index: alone(model, ids, **options) for index, (ids, options) in enumerate(asking)}


@pytest.mark.parametrize("name", ["bloom", "deepseek_v3", "lfm2", "llama4"])
def test_others_are_answered_one_after_the_other(model_of, name: str):
    assert name not in TOGETHER
    model = model_of(name)
    asking = [(prompt(3 + seed, seed), {"max_new_tokens": 5, "do_sample": True, "seed": seed}) for seed in range(3)]
    found = [answer.tokens.tolist() for answer in model.generate_many(asking)]
    assert found == [alone(model, ids, **options) for ids, options in asking]
    assert model.why_alone is not None


def test_exact_answers_are_given_alone(checkpoints):
    model = load(checkpoints("llama3"), exact=True)
    asking = [(prompt(9, seed), {"max_new_tokens": 6, "do_sample": False}) for seed in range(3)]
    found = {
        answer.index: answer
        for answer in model.generate_many([*asking, (asking[0][0], asking[0][1] | {"exact": False})])
    }
    assert {index: found[index].tokens.tolist() for index in range(3)} == {
        index: alone(model, ids, **options) for index, (ids, options) in enumerate(asking)
    }
    assert [found[index].report.drafting is not None for index in range(4)] == [True, True, True, False]


# What is resident.


def squares(model: GriffinModel, dense: Any, name: str, prompts: list[torch.Tensor]) -> list[list[torch.Tensor]]:
    """s^2 over the number of tokens, by prompt and layer."""
    from reference import collect_z

    down = ARCHITECTURES[name].down
    return [[statistic_float64(z[0]) ** 2 / ids.shape[1] for z in collect_z(dense, down, ids)] for ids in prompts]


def test_neurons_are_chosen_by_all_that_are_decoded(model_of):
    """By the sum of their statistics over their lengths; a sequence that has left chooses no more, and each report says
    what share of its own activation was resident, token by token."""
    name, density = "llama3", 0.5
    model, dense = model_of(name, density=density), ARCHITECTURES[name].build()
    prompts = [prompt(tokens, tokens) for tokens in (30, 5, 12)]
    normed = squares(model, dense, name, prompts)
    k = model.plan.kept[0]
    scheduler = model.scheduler()

    def expected(*indices: int) -> list[list[int]]:
        return [select_direct("topk", k, sum(normed[i][layer] for i in indices)).tolist() for layer in range(3)]

    def resident() -> list[list[int]]:
        return [model.selected[layer].tolist() for layer in range(3)]

    def kept(index: int, *indices: int) -> float:
        chosen = expected(*indices)
        return sum(float(normed[index][layer][chosen[layer]].sum()) for layer in range(3)) / 3

    with scheduler.working():
        first = scheduler.begin(prompts[0], max_new_tokens=6, do_sample=False)
        assert resident() == expected(0)
        scheduler.step()
        second = scheduler.begin(prompts[1], max_new_tokens=3, do_sample=False)
        assert resident() == expected(0, 1)
        assert scheduler.step() == []
        assert scheduler.step() == [second]
        assert resident() == expected(0, 1)  # until another prompt passes
        third = scheduler.begin(prompts[2], max_new_tokens=9, do_sample=False)
        assert resident() == expected(0, 2)
        while scheduler.running:
            scheduler.step()
    shares = (kept(0, 0) + 2 * kept(0, 0, 1) + 2 * kept(0, 0, 2)) / 5
    assert first.report.activation_kept == pytest.approx(shares, abs=1e-5)
    assert third.report.activation_kept == pytest.approx(kept(2, 0, 2), abs=1e-5)
    for sequence in (first, second, third):
        assert sequence.report.decode_streamed_bytes == 0
        assert sequence.report.prefill_streamed_bytes > 0
    assert [sequence.report.generated_tokens for sequence in (first, second, third)] == [6, 3, 9]


def test_a_context_that_knows_its_prompt_chooses_with_the_others(model_of):
    """No token of it passes again."""
    model = model_of("llama3", density=0.5)
    prompts, context = [prompt(20, 1), prompt(9, 2)], model.new_context()
    model.generate(prompts[0], context=context, max_new_tokens=3, do_sample=False)
    scheduler = model.scheduler()
    with scheduler.working():
        scheduler.begin(prompts[1], max_new_tokens=20, do_sample=False)
        known = scheduler.begin(prompts[0], context=context, max_new_tokens=20, do_sample=False)
        together = {layer: chosen.tolist() for layer, chosen in model.selected.items()}
        scheduler.step()
        scheduler.abandon()
    assert known.run.cached_tokens == 20
    assert known.run.prefill.prompt_tokens == 0
    with scheduler.working():
        for ids in prompts[::-1]:
            scheduler.begin(ids, max_new_tokens=20, do_sample=False)
        assert {layer: chosen.tolist() for layer, chosen in model.selected.items()} == together
        scheduler.abandon()


def test_other_calls_between_two_answers_change_nothing(model_of):
    model = model_of("llama3", density=0.5)
    asking = [(prompt(9 + seed, seed), {"max_new_tokens": 4 + 3 * seed, "do_sample": False}) for seed in range(3)]
    expected = [(answer.index, answer.tokens.tolist()) for answer in model.generate_many(asking)]
    found = []
    for answer in model.generate_many(asking):
        found.append((answer.index, answer.tokens.tolist()))
        model.generate(prompt(15, 9), max_new_tokens=3)
    assert found == expected


# What goes wrong for one goes on for others.


class _Fails(LogitsProcessor):
    def __init__(self, after: int) -> None:
        self.left = after

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self.left -= 1
        if self.left < 0:
            raise ZeroDivisionError
        return scores


def test_a_processor_that_fails_ends_its_own_sequence(model_of):
    model = model_of("llama3")
    scheduler, options = model.scheduler(), {"max_new_tokens": 8, "do_sample": False}
    with scheduler.working():
        good = scheduler.begin(prompt(9, 1), **options)
        bad = scheduler.begin(prompt(5, 2), logits_processor=LogitsProcessorList([_Fails(3)]), **options)
        ended = list(itertools.chain.from_iterable(scheduler.step() for _ in range(7)))
    assert [(one, type(one.error)) for one in ended] == [(bad, ZeroDivisionError), (good, type(None))]
    assert good.answer.tolist() == alone(model, prompt(9, 1), **options)
    with pytest.raises(ZeroDivisionError):
        list(model.generate_many([prompt(5, 2)], logits_processor=LogitsProcessorList([_Fails(3)]), **options))
    assert model.engine.beside == ()


class Streamed:
    """What a streamer is given."""

    def __init__(self) -> None:
        self.tokens, self.ended = list[int](), 0

    def put(self, value: torch.Tensor) -> None:
        self.tokens += value.flatten().tolist()

    def end(self) -> None:
        self.ended += 1


def test_streamers_are_given_the_tokens_of_their_own(model_of):
    model, streamers = model_of("llama3"), [Streamed() for _ in range(3)]
    asked = [
        (prompt(9 + 5 * seed, seed), {"do_sample": False, "max_new_tokens": 4 + 3 * seed, "streamer": streamer})
        for seed, streamer in enumerate(streamers)
    ]
    for answer in model.generate_many(asked):
        ids, streamer = asked[answer.index][0], streamers[answer.index]
        assert (streamer.tokens, streamer.ended) == ([*ids[0].tolist(), *answer.tokens.tolist()], 1)


def test_a_pass_that_is_cut_short_leaves_the_others_their_neurons(model_of):
    model = model_of("llama3", density=0.5)
    options = {"max_new_tokens": 8, "do_sample": False}
    expected = alone(model, prompt(9, 1), **options)
    scheduler = model.scheduler()

    def stop(done: int, of: int) -> None:
        if done == 2:
            raise KeyError

    with scheduler.working():
        good = scheduler.begin(prompt(9, 1), **options)
        model.progress = stop
        with pytest.raises(KeyError):
            scheduler.begin(prompt(12, 2), **options)
        model.progress = None
        while scheduler.running:
            scheduler.step()
    assert good.answer.tolist() == expected
    model.generate(prompt(9, 1), **options)
    assert good.report.activation_kept == pytest.approx(model.last_report.activation_kept)


def test_a_sequence_may_leave_before_it_ends(model_of):
    model = model_of("llama3")
    options = {"max_new_tokens": 8, "do_sample": False}
    scheduler = model.scheduler()
    with scheduler.working():
        leaving, staying = (scheduler.begin(prompt(9, seed), **options) for seed in (1, 2))
        scheduler.step()
        scheduler.leave(leaving)
        assert scheduler.running == [staying]
        while scheduler.running:
            scheduler.step()
    assert leaving.answer.tolist() == alone(model, prompt(9, 1), **options)[:2]
    assert leaving.report.generated_tokens == 2
    assert staying.answer.tolist() == alone(model, prompt(9, 2), **options)


def test_the_model_is_others_between_two_answers_and_not_within_one(model_of):
    model = model_of("llama3")
    scheduler = model.scheduler()
    waited = []
    with scheduler.working():
        scheduler.begin(prompt(9, 1), max_new_tokens=4, do_sample=False)
        with pytest.raises(GriffinError, match="generating already"):
            model.generate(prompt(3, 1))
        thread = threading.Thread(target=lambda: waited.append(model.generate(prompt(3, 1), max_new_tokens=2)))
        thread.start()
        scheduler.step()
        assert waited == []
        scheduler.abandon()
    thread.join(60)
    assert len(waited) == 1


# Memory.


def largest_together(scheduler: SequenceScheduler, tokens: int) -> int:
    """How many prompts of so many tokens there is room for; every one is begun."""
    for count in itertools.count():
        try:
            scheduler.begin(prompt(tokens, count), max_new_tokens=4, do_sample=False)
        except HasToWait:
            return count
    raise AssertionError


def test_sequences_are_let_in_by_bytes(checkpoints):
    """Until the budget is full; the ledger stays within, and whoever does not fit beside the others fits alone."""
    plan = load(checkpoints("llama3")).plan
    model = load(checkpoints("llama3"), max_gpu_mem=plan.peak_bytes + 200_000, keep_prompts=True, quantize="none")
    scheduler = model.scheduler(100)
    with scheduler.working():
        counts = []
        for tokens in (80, 10):
            counts.append(largest_together(scheduler, tokens))
            scheduler.step()
            assert model.engine.loaded.ledger.peak_bytes <= model.plan.budget_bytes
            scheduler.abandon()
        scheduler.begin(prompt(80, 0), max_new_tokens=4, do_sample=False)
        scheduler.abandon()
    assert counts[0] >= 2
    answers = list(model.generate_many([prompt(80, seed) for seed in range(6)], max_new_tokens=4, do_sample=False))
    assert len(answers) == 6
    assert max(answer.report.peak_device_bytes for answer in answers) <= model.plan.budget_bytes


def test_what_fits_never_is_refused_with_the_numbers(model_of):
    model = model_of("llama3")
    with pytest.raises(UsageError, match="the context is 96"):
        list(model.generate_many([prompt(90, 0)], max_new_tokens=40))
    with pytest.raises(UsageError, match="most is 0"):
        model.generate_many([], most=0)


def test_an_iterator_that_is_left_gives_its_memory_back(model_of):
    model = model_of("llama3")
    answers = model.generate_many([(prompt(9, seed), {"max_new_tokens": 4 + seed}) for seed in range(4)])
    next(answers)
    assert model.engine.beside != ()
    answers.close()
    assert model.engine.beside == ()
    assert list(model.generate_many([], max_new_tokens=4)) == []
