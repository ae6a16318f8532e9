"""Drafts from the text: the tokens are those of decoding without, whatever is drafted; and when there are some."""

import contextlib
import functools
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from marks import by_turns
from scripted_model import byte_tokenizer, write_scripted
from tiny_models import HYBRIDS, MIXTURES, VOCAB
from transformers import AutoModelForCausalLM

from griffin_offload import GriffinModel, Structure
from griffin_offload.engine.drafts import MOST_DRAFTS, StepCosts, TextDrafts, expected_tokens
from griffin_offload.kernels.library import library

FAMILIES = "llama2 llama3 mistral gemma2 gemma3 qwen2 phi3 opt gpt_neox falcon_alibi gpt2 bloom cohere2".split()  # noqa: SIM905
CTX = 160
CHAIN = list(range(60, 120))
needs_kernels = pytest.mark.skipif(library() is None, reason="another processor, or no compiler")


@pytest.fixture
def eager(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever is found is drafted: what pays depends on the machine's moment."""
    monkeypatch.setattr(StepCosts, "best", lambda self, most, acceptance: most)


@contextlib.contextmanager
def drafting(answer: torch.Tensor, prompt: int, seed: int = 0) -> Iterator[None]:
    """Drafts are what the `answer` [1, T] goes on with, up to some place where another token comes."""
    draw, known = random.Random(seed), answer[0].tolist()

    def find(self: TextDrafts, most: int) -> list[int]:
        at = len(self._ids)
        found, wrong = known[at : at + draw.randint(0, most)], draw.randint(0, 2 * most)
        return [(token + 1) % VOCAB if place == wrong else token for place, token in enumerate(found)]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(StepCosts, "best", lambda self, most, acceptance: most)
        patch.setattr(TextDrafts, "find", find)
        yield


def _load(path: Path, **options: object) -> GriffinModel:
    defaults = {"device": "cpu", "max_gpu_mem": "1GB", "density": 0.5, "ctx_size": CTX, "always_stream": True}
    return GriffinModel.from_pretrained(path, **{**defaults, **options})


@functools.cache
def _kept(path: Path) -> GriffinModel:
    """For all examples of a property."""
    return _load(path, dtype="float64")


@functools.cache
def _dense(path: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float64)


def _repeating(seed: int, tokens: int, period: int) -> torch.Tensor:
    """Ids [1, tokens] of a few words, again and again."""
    words = torch.randint(3, VOCAB, (period,), generator=torch.Generator().manual_seed(seed))
    return words.repeat(-(-tokens // period))[None, :tokens]


@pytest.mark.slow
@example(name="gemma2", seed=0, prompt=2, period=2, new_tokens=15, penalty=None, sampled=False, end=False)
@settings(max_examples=9)
@given(
    name=st.sampled_from(FAMILIES),
    seed=st.integers(0, 2**16),
    prompt=st.integers(2, 60),
    period=st.integers(2, 9),
    new_tokens=st.integers(1, 50),
    penalty=st.sampled_from([None, 1.1]),
    sampled=st.booleans(),
    end=st.booleans(),
)
def test_tokens_are_those_without(checkpoints, name, seed, prompt, period, new_tokens, penalty, sampled, end):
    """In float64: greedy, and drawn with the same seed; windows of 16 are rolled back."""
    model = _kept(checkpoints(name))
    ids = _repeating(seed, prompt, period)
    options: dict[str, Any] = {"max_new_tokens": new_tokens, "do_sample": sampled, "return_dict_in_generate": True}
    options |= {"output_logits": True, "output_scores": True}
    if sampled:
        options["temperature"] = 0.2
    if penalty is not None:
        options["repetition_penalty"] = penalty

    def answer(**more: Any) -> Any:
        torch.manual_seed(seed)
        return model.generate(ids, **options, **more)

    plain = answer(lookup=False)
    if end:
        token = plain.sequences[0, prompt + (plain.sequences.shape[1] - prompt) // 2].item()
        options |= {"eos_token_id": token, "pad_token_id": 0}
        plain = answer(lookup=False)
    with drafting(plain.sequences, prompt, seed):
        found = answer(lookup=True)
    assert torch.equal(found.sequences, plain.sequences)
    for ours, theirs in ((found.logits, plain.logits), (found.scores, plain.scores)):
        assert torch.allclose(torch.stack(ours), torch.stack(theirs), atol=1e-5)  # they are float32


@pytest.fixture(scope="module")
def scripted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """It writes CHAIN, whatever is in front of the token that begins it."""
    return write_scripted(tmp_path_factory.mktemp("scripted"), byte_tokenizer(), CHAIN)


def test_fewer_forwards_where_the_text_repeats(scripted: Path, eager):
    with _load(scripted, dtype="float64", density=1.0) as model:
        ids = torch.tensor([[*CHAIN, CHAIN[0]]])
        found = model.generate(ids, max_new_tokens=50, do_sample=False, lookup=True)
        assert found[0, len(CHAIN) :].tolist() == CHAIN[:51]
        report = model.last_report.lookup
        assert (report.forwards, report.drafted, report.accepted) == (3, 45, 45)  # and four of the model's own
        assert any(line.startswith("lookup   ") for line in model.last_report.lines("CPU"))
        assert model.last_report.peak_device_bytes <= model.plan.budget_bytes
        assert model.last_report.drafting is None


@needs_kernels
@pytest.mark.parametrize(
    ("name", "quantize"),
    by_turns(("llama2", "mistral", "qwen3", "phi3"), ("none", "int8", "int4"), whole=("llama2",)),
)
def test_in_16_bits_not_one_bit_is_another(checkpoints, eager, name: str, quantize: str):
    """So that drafts change no tie: logits are equal to the last bit, by the kernels that multiply one row."""
    with _load(checkpoints(name, torch.bfloat16), quantize=quantize) as model:
        options: dict[str, Any] = {"max_new_tokens": 14, "do_sample": False, "return_dict_in_generate": True}
        options |= {"output_logits": True}
        for seed in range(2):
            ids = _repeating(seed, 40, 5)
            plain = model.generate(ids, lookup=False, **options)
            with drafting(plain.sequences, 40, seed):
                found = model.generate(ids, **options)
            assert torch.equal(found.sequences, plain.sequences)
            assert all(torch.equal(ours, theirs) for ours, theirs in zip(found.logits, plain.logits, strict=True))
        assert model.engine.step_costs.alike
        assert model.last_report.lookup.forwards


@needs_kernels
@pytest.mark.parametrize(("name", "bits"), [("llama2", 8), ("mistral", 4)])
def test_nor_is_it_of_a_cache_in_fewer_bits(checkpoints, name: str, bits: int):
    """Groups of tokens are rounded when the last one comes, and no draft makes that another moment; nor are any moved
    behind a window before they would be."""
    with _load(checkpoints(name, torch.bfloat16), kv_bits=bits) as model:
        options: dict[str, Any] = {"max_new_tokens": 60, "do_sample": False, "return_dict_in_generate": True}
        ids = _repeating(1, 40, 5)
        plain = model.generate(ids, lookup=False, output_logits=True, **options)
        for seed in range(2):
            with drafting(plain.sequences, 40, seed):
                found = model.generate(ids, output_logits=True, **options)
            assert all(torch.equal(ours, theirs) for ours, theirs in zip(found.logits, plain.logits, strict=True))
            assert model.last_report.lookup.forwards


def test_where_rows_differ_nobody_gets_drafts_who_did_not_ask(scripted: Path, eager, monkeypatch: pytest.MonkeyPatch):
    with _load(scripted) as model:
        model.engine.step_costs.alike = False
        ids = torch.tensor([[*CHAIN, CHAIN[0]]])
        model.generate(ids, max_new_tokens=30, do_sample=False)
        assert model.last_report.lookup is None
        model.generate(ids, max_new_tokens=30, do_sample=False, lookup=True)
        assert model.last_report.lookup.forwards
        model.engine.step_costs.alike = None
        monkeypatch.setattr(torch, "equal", lambda *_: False)
        found = model.generate(ids, max_new_tokens=30, do_sample=False)
        assert (model.engine.step_costs.alike, model.last_report.lookup.forwards) == (False, 0)
        assert found[0, len(CHAIN) :].tolist() == CHAIN[:31]


@pytest.mark.parametrize(
    "options",
    [
        {"num_beams": 2},
        {"num_return_sequences": 2, "do_sample": True},
        {"prompt_lookup_num_tokens": 3},
        {"lookup": False},
        {"refresh": 4},
        {"output_hidden_states": True, "return_dict_in_generate": True},
    ],
    ids=str,
)
def test_who_has_none(checkpoints, eager, options: dict[str, Any]):
    with _load(checkpoints("llama2")) as model:
        model.generate(
            _repeating(1, 40, 5)[:, : CTX - options.get("max_new_tokens", 0) or 1],
            **{"max_new_tokens": 10, "do_sample": False, "lookup": True, **options},
        )
        assert model.last_report.lookup is None


@pytest.mark.parametrize("name", [next(iter(HYBRIDS)), next(iter(MIXTURES))])
def test_states_and_experts_have_none(checkpoints, eager, name: str):
    with _load(checkpoints(name)) as model:
        model.generate(_repeating(1, 40, 5), max_new_tokens=10, do_sample=False, lookup=True)
        assert model.last_report.lookup is None


@pytest.mark.parametrize("sampled", [False, True])
def test_exact_mode_takes_them_for_nothing(scripted: Path, sampled: bool):
    """Passes over what the text suggests, in the place of the residents' drafts."""
    with _load(scripted, dtype="float64", exact=True) as model:
        ids = torch.tensor([[*CHAIN, CHAIN[0]]])
        options: dict[str, Any] = {"max_new_tokens": 50, "do_sample": sampled}
        options |= {"temperature": 0.01} if sampled else {}
        found = model.generate(ids, **options)
        assert found[0, len(CHAIN) :].tolist() == CHAIN[:51]
        report = model.last_report
        assert report.lookup.accepted == report.lookup.drafted > 16
        by_residents = report.drafting.drafted - report.lookup.drafted
        assert by_residents <= 16  # of the first pass, before two tokens are known
        for more in ({"lookup": False}, {"draft_tokens": 4}):
            assert torch.equal(model.generate(ids, **options, **more), found)
            assert model.last_report.lookup is None


@pytest.mark.slow
@settings(max_examples=6)
@given(name=st.sampled_from(FAMILIES), seed=st.integers(0, 99), new_tokens=st.integers(1, 50))
def test_exact_mode_with_drafts_of_any_kind(checkpoints, name: str, seed: int, new_tokens: int):
    path = checkpoints(name)
    model, dense = _kept(path), _dense(path)
    ids = _repeating(seed, 30, 5)
    options: dict[str, Any] = {"max_new_tokens": new_tokens, "do_sample": False}
    expected = dense.generate(ids, attention_mask=torch.ones_like(ids), **options)
    with drafting(expected, 30, seed):
        assert torch.equal(model.generate(ids, exact=True, **options), expected)


def test_a_structure_rules_drafts_out(checkpoints, eager):
    with _load(checkpoints("llama2"), dtype="float64") as model:
        structure = Structure(regex="(the cat |a dog ){9}")
        ids = model.tokenizer("the cat the cat the cat the dog a dog a cat", return_tensors="pt")["input_ids"]
        texts = []
        for lookup in (False, True):
            found = model.generate(ids, structure=structure, max_new_tokens=90, do_sample=False, lookup=lookup)
            texts.append(found)
        assert torch.equal(*texts)
        assert model.last_report.structure.complete
        assert model.last_report.lookup.accepted


def test_a_context_goes_on(checkpoints, eager):
    with _load(checkpoints("llama2"), dtype="float64", keep_prompts=True) as model:
        ids, answers = _repeating(1, 40, 5), []
        for lookup in (False, True):
            context = model.new_context()
            first = model.generate(ids, context=context, max_new_tokens=30, do_sample=False, lookup=lookup)
            more = torch.cat([first, ids[:, :7]], dim=1)
            answers.append(model.generate(more, context=context, max_new_tokens=30, do_sample=False, lookup=lookup))
            assert len(context.tokens) == context.cache.get_seq_length() == answers[-1].shape[1] - 1
        assert torch.equal(*answers)


# What is found, and how much of it.


@given(st.lists(st.integers(0, 2), max_size=40), st.integers(1, 12))
def test_what_is_found(ids: list[int], most: int):
    """By going through the text: the longest end of 4 to 2 tokens that was there before, the last time it was."""
    found = TextDrafts(ids).find(most)
    for size in (4, 3, 2):
        ends = [i for i in range(size, len(ids)) if ids[i - size : i] == ids[-size:]] if len(ids) >= size else []
        if ends:
            text = list(ids)
            while len(text) < ends[-1] + most:
                text.append(text[len(text) - (len(ids) - ends[-1])])
            assert found == text[ends[-1] : ends[-1] + most]
            return
    assert found == []


def _costs(second: Callable[[int], float], rows: tuple[int, ...] = (1, 1, 1, 1, 4, 8, 16)) -> StepCosts:
    costs = StepCosts()
    for one in rows:
        costs.observe(one, second(one), 0.0)
    return costs


def test_as_many_as_pay():
    assert StepCosts().best(MOST_DRAFTS, 1.0) == 0  # nothing is known yet
    assert _costs(lambda rows: 1.0, (1, 1, 1)).best(MOST_DRAFTS, 0.99) == MOST_DRAFTS  # assumed to cost little
    assert _costs(lambda rows: float(rows)).best(MOST_DRAFTS, 0.9) == 0
    assert _costs(lambda rows: 1.0).best(MOST_DRAFTS, 0.5) > 0
    some = _costs(lambda rows: 1 + 0.2 * (rows - 1)).best(MOST_DRAFTS, 0.7)
    rates = [expected_tokens(n, 0.7) / (1 + 0.2 * n) for n in range(MOST_DRAFTS + 1)]
    assert some == max(range(MOST_DRAFTS + 1), key=rates.__getitem__)


def test_a_bad_moment_is_forgotten():
    costs = _costs(lambda rows: 50.0 if rows > 1 else 1.0)
    assert costs.best(MOST_DRAFTS, 0.99) == 0
    for _ in range(600):
        costs.observe(1, 1.0, 0.0)
    assert costs.best(MOST_DRAFTS, 0.99) > 0


def test_what_comes_tells_of_what_was_not_tried():
    text = TextDrafts([1, 2, 3, 4, 1, 2])
    before = text.acceptance
    found = text.find(3)
    assert found == [3, 4, 1]
    text.expect(found)
    text.add(9)
    text.find(3)
    worse = TextDrafts([1, 2, 3, 4, 1, 2])
    worse.find(3)
    worse.judged(3, 0, ended=False)
    assert worse.acceptance < before
