"""Prompts that wait together pass in one streamed pass: each is answered as when they pass one by one."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import pytest
import torch
from alive_bytes import AliveBytes
from loaded_model import load
from marks import mostly_slow
from reference import collect_z, select_direct, statistic_float64
from tiny_models import ARCHITECTURES, FURTHER, MIXTURE_KINDS, QUICK, VOCAB, WINDOW
from transformers import LogitsProcessor, LogitsProcessorList

from griffin_offload import GriffinModel
from griffin_offload.engine.decoding import DecodingSequence, NextPass
from griffin_offload.engine.prompt_passes import PromptPasses
from griffin_offload.kernels import gemv

GREEDY = {"do_sample": False, "max_new_tokens": 4}
LENGTHS = (5, 1, 8, 3)  # none beyond the windows of the tiny models
ALONE = ("falcon", "stablelm", "gptj", "bloom", "deepseek", "lfm2", "llama4", "qwen3_next", "nemotron", "jetmoe")
PACKED = tuple(name for name in (*ARCHITECTURES, *FURTHER, *MIXTURE_KINDS) if not name.startswith(ALONE))


def prompt(tokens: int, seed: int) -> torch.Tensor:
    return torch.randint(3, VOCAB, (1, tokens), generator=torch.Generator().manual_seed(seed))


PROMPTS = [prompt(tokens, seed) for seed, tokens in enumerate(LENGTHS)]


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many prompts each pass took."""
    counts: list[int] = []
    alone, together = PromptPasses.prefill, PromptPasses.prefill_together

    def one(passes: PromptPasses, *args: Any, **options: Any) -> Any:
        counts.append(1)
        return alone(passes, *args, **options)

    def several(passes: PromptPasses, contexts: Sequence[Any], *args: Any) -> Any:
        counts.append(len(contexts))
        return together(passes, contexts, *args)

    monkeypatch.setattr(PromptPasses, "prefill", one)
    monkeypatch.setattr(PromptPasses, "prefill_together", several)
    return counts


class Logits(LogitsProcessor):
    """Keeps what a sequence's tokens are made of."""

    def __init__(self) -> None:
        self.seen: list[torch.Tensor] = []

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self.seen.append(scores.clone())
        return scores


class Fails(LogitsProcessor):
    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        raise ZeroDivisionError


def answered(model: GriffinModel, prompts: Sequence[torch.Tensor], *, together: bool) -> list[Any]:
    """Of each prompt the tokens, the logits, and the report of its answer; all have joined before the first step."""
    scheduler, logits = model.scheduler(), [Logits() for _ in prompts]
    with scheduler.working():
        sequences = []
        for ids, seen in zip(prompts, logits, strict=True):
            assert scheduler.has_room
            sequences.append(scheduler.prepare(ids, logits_processor=LogitsProcessorList([seen]), **GREEDY))
            if not together:
                scheduler.join()
        if together:
            scheduler.join()
        while scheduler.running:
            scheduler.step()
    rows = zip(sequences, logits, strict=True)
    return [(one.answer.tolist(), torch.cat(seen.seen), one.report) for one, seen in rows]


def answered_alone(model: GriffinModel) -> list[Any]:
    """Of each of PROMPTS the tokens and the logits, by a call of its own."""
    asked = GREEDY | {"output_logits": True, "return_dict_in_generate": True}
    outputs = [model.generate(ids, **asked) for ids in PROMPTS]
    return [
        (output.sequences[0, tokens:].tolist(), torch.cat(list(output.logits)))
        for output, tokens in zip(outputs, LENGTHS, strict=True)
    ]


def _quick(names: Iterable[str], *more: str) -> list[Any]:
    return [pytest.param(name, marks=() if name in (*QUICK, *more) else pytest.mark.slow) for name in names]


@pytest.mark.parametrize("name", _quick(PACKED, "gemma4", "mixtral"))
def test_answers_are_those_of_calls_of_their_own(model_of, passes, name: str):
    """With all neurons, every architecture that can: prompts pass together, and then tokens do."""
    model = model_of(name, density=1.0)
    expected = answered_alone(model)
    passes.clear()
    found = answered(model, PROMPTS, together=True)
    assert passes == [4]
    assert model.why_alone is None
    for (tokens, logits), (own_tokens, own_logits, report) in zip(expected, found, strict=True):
        assert own_tokens == tokens
        torch.testing.assert_close(own_logits, logits, atol=1e-4, rtol=1e-4)
        assert report.activation_kept == pytest.approx(1.0, abs=1e-5)
        assert report.peak_device_bytes <= model.plan.budget_bytes


@pytest.mark.parametrize("name", _quick([name for name in (*QUICK, *MIXTURE_KINDS[:2], "gemma4") if name in PACKED]))
def test_answers_are_those_of_prompts_that_pass_one_by_one(model_of, passes, name: str):
    """Tokens the same; logits, and the share of its own activation that each has, up to rounding."""
    model = model_of(name, density=0.5)
    expected = answered(model, PROMPTS, together=False)
    found = answered(model, PROMPTS, together=True)
    assert passes == [1, 1, 1, 1, 4]
    for (tokens, logits, report), (own_tokens, own_logits, own_report) in zip(expected, found, strict=True):
        assert own_tokens == tokens
        torch.testing.assert_close(own_logits, logits, atol=1e-4, rtol=1e-4)
        assert own_report.activation_kept == pytest.approx(report.activation_kept, abs=1e-5)
        assert own_report.prompt_tokens == report.prompt_tokens
        assert own_report.peak_device_bytes <= model.plan.budget_bytes


@pytest.mark.parametrize("bits", [8, 4])
def test_kv_caches_in_fewer_bits(model_of, bits: int):
    model = model_of("llama3", density=0.5, kv_bits=bits)
    expected, found = (answered(model, PROMPTS, together=together) for together in (False, True))
    assert [one[0] for one in found] == [one[0] for one in expected]


def test_all_choose_by_their_own_statistics(model_of):
    """By the sum of s^2 over lengths in float64, as if each had passed alone; and of each the first three quarters, in
    its place, choose what its last one measures."""
    name, density = "llama3", 0.5
    model, dense = model_of(name, density=density), ARCHITECTURES[name].build()
    prompts = [prompt(tokens, tokens) for tokens in (20, 17, 24)]
    z = [[one[0] for one in collect_z(dense, ARCHITECTURES[name].down, ids)] for ids in prompts]
    k, layers, scheduler = model.plan.kept[0], range(3), model.scheduler()

    def share(part: torch.Tensor) -> torch.Tensor:
        squared = statistic_float64(part) ** 2
        return squared / squared.sum()

    with scheduler.working():
        sequences = []
        for ids in prompts:
            assert scheduler.has_room
            sequences.append(scheduler.prepare(ids, **GREEDY))
        scheduler.join()
        chosen = {i: select_direct("topk", k, sum(share(own[i]) for own in z)).tolist() for i in layers}
        assert {i: found.tolist() for i, found in model.selected.items()} == chosen
        while scheduler.running:
            scheduler.step()
    for number, (own, sequence) in enumerate(zip(z, sequences, strict=True)):
        first = prompts[number].shape[1] - prompts[number].shape[1] // 4
        held_out = []
        for i in layers:
            shares = [share(other[i] if other is not own else own[i][:first]) for other in z]
            without = select_direct("topk", k, sum(shares)).tolist()
            held_out.append(float(share(own[i][first:])[without].sum()))
        assert sequence.report.activation_kept_heldout == pytest.approx(sum(held_out) / 3, abs=1e-5)


def test_each_layer_is_brought_once_for_all(model_of):
    model = model_of("llama3", density=0.5)
    one_by_one, together = (answered(model, PROMPTS, together=together) for together in (False, True))
    bytes_of_one = one_by_one[0][2].prefill_streamed_bytes
    assert bytes_of_one > 0
    assert [report.prefill_streamed_bytes for *_, report in one_by_one] == [bytes_of_one] * 4
    assert sum(report.prefill_streamed_bytes for *_, report in together) == bytes_of_one
    assert {report.decode_streamed_bytes for *_, report in together} == {0}


def test_an_expert_is_brought_once_for_all(model_of):
    """Whatever prompts are sent to it."""
    model = model_of("mixtral", density=0.5)
    answered(model, PROMPTS, together=False)  # the first prompt of a model brings the residents, too
    one_by_one, together = (
        [report.prefill_streamed_bytes for *_, report in answered(model, PROMPTS, together=how)]
        for how in (False, True)
    )
    assert max(one_by_one) <= sum(together) < sum(one_by_one)


def test_what_is_kept_of_a_prompt_goes_on_like_that_of_one_alone(model_of):
    """States at its end and a few tokens before: its context is rewound to them."""
    model, ids = model_of("llama3", density=0.5), prompt(20, 1)
    contexts = [model.new_context(), model.new_context()]
    model.generate(ids, context=contexts[0], **GREEDY)
    scheduler = model.scheduler()
    with scheduler.working():
        for own, context in ((prompt(9, 2), None), (ids, contexts[1])):
            assert scheduler.has_room
            scheduler.prepare(own, context=context, **GREEDY)
        scheduler.join()
        while scheduler.running:
            scheduler.step()
    assert [mark.tokens for mark in contexts[1].marks] == [mark.tokens for mark in contexts[0].marks]
    for own, mark in zip(contexts[1].marks, contexts[0].marks, strict=True):
        for index, squared in mark.squared.items():
            torch.testing.assert_close(own.squared[index], squared)
    longer = torch.cat([ids[:, :-3], prompt(6, 3)], dim=1)
    found = [model.generate(longer, context=context, **GREEDY).tolist() for context in contexts]
    assert found[0] == found[1]
    assert model.last_report.cached_prompt_tokens == 17


# Who passes alone.


def test_no_more_tokens_than_a_planned_prompt_pass_together(checkpoints, passes):
    model = load(checkpoints("llama3"), prompt_tokens=20)
    prompts = [prompt(tokens, tokens) for tokens in (9, 11, 12, 3, 6)]
    found = {answer.index: answer.tokens.tolist() for answer in model.generate_many(prompts, **GREEDY)}
    assert passes == [2, 2, 1]
    assert len(found) == 5
    scheduler = model.scheduler()
    with scheduler.working():
        scheduler.prepare(prompts[0], **GREEDY)
        with pytest.raises(NextPass, match="21 tokens in all are more than the 20 that may pass together"):
            scheduler.prepare(prompts[2], **GREEDY)
        scheduler.abandon()


def test_a_window_is_no_longer_than_what_passes_together(model_of, passes):
    model = model_of("mistral", density=1.0)
    prompts = [prompt(tokens, tokens) for tokens in (WINDOW, WINDOW - 1, WINDOW + 1, 3)]
    expected = [model.generate(ids, **GREEDY)[0, ids.shape[1] :].tolist() for ids in prompts]
    passes.clear()
    found = {answer.index: answer.tokens.tolist() for answer in model.generate_many(prompts, **GREEDY)}
    assert [found[index] for index in range(4)] == expected
    assert passes == [2, 1, 1]


def test_a_prompt_that_goes_on_passes_alone(model_of, passes):
    model, ids, context = model_of("llama3", density=0.5), prompt(12, 1), None
    context = model.new_context()
    model.generate(ids, context=context, **GREEDY)
    longer = torch.cat([ids, prompt(4, 2)], dim=1)
    scheduler = model.scheduler()
    with scheduler.working():
        scheduler.prepare(prompt(5, 3), **GREEDY)
        with pytest.raises(NextPass, match="goes on"):
            scheduler.prepare(longer, context=context, **GREEDY)
        scheduler.join()
        assert scheduler.begin(longer, context=context, **GREEDY).run.cached_tokens > 0
        scheduler.abandon()


def test_prompts_of_states_pass_alone(model_of, passes):
    model = model_of("lfm2", density=1.0)
    expected = [model.generate(ids, **GREEDY)[0, ids.shape[1] :].tolist() for ids in PROMPTS]
    passes.clear()
    found = {answer.index: answer.tokens.tolist() for answer in model.generate_many(PROMPTS, **GREEDY)}
    assert [found[index] for index in range(4)] == expected
    assert passes == [1, 1, 1, 1]


# Memory.


def test_those_that_pass_together_are_let_in_by_bytes(checkpoints, passes):
    """Their caches are not there yet, and counted; whoever has no room passes when others have left."""
    least = load(checkpoints("llama3"), prompt_tokens=60).plan
    budget_bytes = least.peak_bytes + 150_000
    model = load(checkpoints("llama3"), max_gpu_mem=budget_bytes, prompt_tokens=60)
    prompts = [prompt(8, seed) for seed in range(7)]
    answers = list(model.generate_many(prompts, max_new_tokens=30, do_sample=False))
    assert len(answers) == 7
    assert sum(passes) == 7
    assert 1 < max(passes) < 7
    assert max(answer.report.peak_device_bytes for answer in answers) <= model.plan.budget_bytes
    again = load(checkpoints("llama3"), prompt_tokens=60)
    passes.clear()
    assert len(list(again.generate_many(prompts, max_new_tokens=30, do_sample=False))) == 7
    assert passes == [7]


@pytest.fixture
def unpriced(monkeypatch: pytest.MonkeyPatch) -> Callable[[GriffinModel, int, int], int]:
    """Of so many prompts of so many tokens in one pass: bytes that operators make, over those that are booked; views of
    weights count among the first."""

    def measure(model: GriffinModel, count: int, tokens: int) -> int:
        scheduler, held = model.scheduler(count), {}
        booked: list[int] = []

        def hold(**parts: int) -> None:
            held.update(parts)
            if "workspace" in parts:
                booked.append(sum(held.values()))

        with scheduler.working(), monkeypatch.context() as patch:
            prepared = []
            for seed in range(count):
                assert scheduler.has_room
                prepared.append(scheduler.prepare(prompt(tokens, seed), **GREEDY))
            patch.setattr(model.engine.loaded.ledger, "hold", hold)
            with AliveBytes() as alive:
                scheduler.join()
            caches = [one.context.cache.nbytes for one in prepared]
            scheduler.abandon()
        assert booked[0] >= sum(caches)
        return alive.peak - booked[0]

    return measure


@pytest.mark.parametrize("density", mostly_slow([1.0, 0.5], 1))
@pytest.mark.parametrize(
    ("name", "count", "tokens"), [("llama3", 2, 45), ("llama3", 8, 11), ("gemma2", 4, 4), ("mixtral", 8, 11)]
)
def test_no_more_is_made_than_was_priced(checkpoints, unpriced, name: str, count: int, tokens: int, density: float):
    """Than by one prompt of as many tokens: caches, activations, statistics, logits; of gemma2 masks and scores."""
    model = load(checkpoints(name), density=density)
    answered(model, PROMPTS[:2], together=True)  # what is made once is there, and whether it works was tried
    assert unpriced(model, count, tokens) <= unpriced(model, 1, count * tokens)


# What goes wrong for one, or for all.


def test_a_first_token_that_fails_ends_its_own_sequence(model_of, monkeypatch: pytest.MonkeyPatch):
    model = model_of("llama3", density=1.0)
    scheduler = model.scheduler()
    closed: list[DecodingSequence] = []
    monkeypatch.setattr(DecodingSequence, "close", lambda sequence: closed.append(sequence))
    with scheduler.working():
        good = scheduler.prepare(PROMPTS[0], **GREEDY)
        assert scheduler.has_room
        bad = scheduler.prepare(PROMPTS[1], logits_processor=LogitsProcessorList([Fails()]), **GREEDY)
        scheduler.join()
        assert (good.error, type(bad.error)) == (None, ZeroDivisionError)
        assert scheduler.running == [good]
        assert closed == [bad]
        while scheduler.running:
            scheduler.step()
    assert good.answer.tolist() == model.generate(PROMPTS[0], **GREEDY)[0, LENGTHS[0] :].tolist()
    with pytest.raises(ZeroDivisionError):
        list(model.generate_many([PROMPTS[0], (PROMPTS[1], {"logits_processor": [Fails()]})], **GREEDY))
    assert model.engine.beside == ()


def test_a_pass_that_is_cut_short_has_begun_nothing(model_of):
    """The one that is being decoded goes on with its neurons."""
    model = model_of("llama3", density=0.5)
    expected = model.generate(PROMPTS[2], **GREEDY)[0, LENGTHS[2] :].tolist()
    scheduler = model.scheduler()

    def stop(done: int, of: int) -> None:
        if done == 2:
            raise KeyError

    with scheduler.working():
        good = scheduler.begin(PROMPTS[2], **GREEDY)
        for ids in PROMPTS[:2]:
            assert scheduler.has_room
            scheduler.prepare(ids, **GREEDY)
        model.progress = stop
        with pytest.raises(KeyError):
            scheduler.join()
        model.progress = None
        assert scheduler.running == [good]
        while scheduler.running:
            scheduler.step()
    assert good.answer.tolist() == expected


# Which kernels: rows that are sequences may be summed in another order than parts of a prompt.


def test_rows_are_sequences_in_a_decode_step_alone(model_of):
    """Of a joint step and of a batch; not in prompts, whether they pass alone, together or as a batch."""
    model = model_of("llama3", density=1.0)
    seen: list[tuple[int, bool]] = []

    def look(module: Any, inputs: Any, output: torch.Tensor) -> None:
        rows = torch.zeros(5, 64, dtype=torch.float32)
        seen.append((output.shape[0] * output.shape[1], gemv.takes_lanes(rows, {})))

    answered(model, PROMPTS[::2], together=True)  # it has been tried then whether it computes several at once
    hook = model.model.model.embed_tokens.register_forward_hook(look)
    try:
        answered(model, PROMPTS[::2], together=True)
        assert seen == [(13, False)] + [(2, True)] * 3
        seen.clear()
        model.generate(prompt(5, 1).repeat(3, 1), attention_mask=torch.ones(3, 5, dtype=torch.long), **GREEDY)
        assert seen == [(15, False)] + [(3, True)] * 3
        seen.clear()
        model.generate(prompt(5, 1), lookup=False, **GREEDY)
        assert seen == [(5, False)] + [(1, False)] * 3
    finally:
        hook.remove()
