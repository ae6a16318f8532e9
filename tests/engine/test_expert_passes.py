"""Mixtures of experts where residents compute alone for a while: drafts, corrections, beams, and prompts from files."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from marks import by_turns, mostly_slow
from tiny_models import LAYERS, MIXTURE_KINDS, VOCAB
from torch import Tensor

from griffin_offload import GriffinModel
from griffin_offload.errors import GriffinError, SavedContextError, UsageError

STATELESS = [name for name in MIXTURE_KINDS if name not in ("qwen3_next", "nemotron_3")]


def _ids(batch: int = 1, tokens: int = 20, seed: int = 1) -> Tensor:
    return torch.randint(5, VOCAB - 8, (batch, tokens), generator=torch.Generator().manual_seed(seed))


def _load(directory: Path, **options: Any) -> GriffinModel:
    sizes = {"max_gpu_mem": "40MB", "ctx_size": 96, "density": 0.5}
    return GriffinModel.from_pretrained(directory, device="cpu", **{**sizes, **options})


def _answer(model: Any, ids: Tensor, new: int = 7, **settings: Any) -> Tensor:
    mask = torch.ones_like(ids)
    answer: Tensor = model.generate(ids, attention_mask=mask, max_new_tokens=new, do_sample=False, **settings)
    return answer


def _dense(directory: Path) -> hf.PreTrainedModel:
    return hf.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()


@pytest.mark.parametrize("name", mostly_slow(STATELESS[::2], 1))  # every router by itself: test_experts.py
def test_exact_mode_is_the_full_model(checkpoints, name: str):
    """Drafts are routed among residents, whatever is done with missing experts else."""
    ids = _ids()
    expected = _answer(_dense(checkpoints(name)), ids)
    for options in ({"density": 0.25, "draft_tokens": 4}, {"missing_experts": "route"}):
        with _load(checkpoints(name), exact=True, **options) as model:
            assert torch.equal(_answer(model, ids), expected)
            report = model.last_report
            assert report.peak_device_bytes <= model.plan.peak_bytes
            assert report.drafting.passes > 1
            assert report.drafting.accepted <= report.drafting.drafted
            assert (report.experts.hits > 0, report.experts.misses) == (True, 0)  # drafts read nothing
            assert 0 < report.experts.redirected < report.experts.choices


@pytest.mark.parametrize("missing", ["fetch", "route"])
def test_exact_mode_of_one_call_alone(checkpoints, missing: str):
    """Before it and behind it, missing experts are what they were."""
    ids = _ids()
    dense = _dense(checkpoints("qwen3_moe"))
    with _load(checkpoints("qwen3_moe"), keep_prompts=True, missing_experts=missing) as model:
        plain = _answer(model, ids)
        exact = _answer(model, ids, exact=True, draft_tokens=3, context=model.new_context())
        assert torch.equal(exact, _answer(dense, ids))
        assert torch.equal(_answer(model, ids), plain)
        assert bool(model.last_report.experts.choices) == (missing == "route")
        assert bool(model.last_report.decode_streamed_bytes) == (missing == "fetch")


def test_exact_mode_samples(checkpoints):
    with _load(checkpoints("mixtral"), exact=True, draft_tokens=4) as model:
        found = [model.generate(_ids(), max_new_tokens=12, do_sample=True, eos_token_id=None) for _ in range(2)]
        assert found[0].shape == (1, 32)
        assert model.last_report.drafting.passes > 1


def test_drafts_of_experts_are_in_the_stored_precision(checkpoints):
    with pytest.raises(UsageError, match="exact mode of a mixture of experts drafts in the stored precision: leave"):
        _load(checkpoints("mixtral"), exact=True, quantize="int4")


def test_drafts_need_a_router_that_can_be_restricted(checkpoints):
    with (
        _load(checkpoints("phimoe"), exact=True) as model,
        pytest.raises(GriffinError, match=r"router cannot be kept to residents.*without exact mode"),
    ):
        _answer(model, _ids())


def test_refresh_corrects_what_residents_have_computed(checkpoints):
    ids, streamed = _ids(), []
    for refresh in ("turn", 4):
        with _load(checkpoints("qwen3_moe"), missing_experts="route", refresh=refresh) as model:
            _answer(model, ids, 16, eos_token_id=None)
            report = model.last_report
            assert report.peak_device_bytes <= model.plan.peak_bytes
            streamed.append(report.decode_streamed_bytes)
    assert report.drafting.passes == 3
    assert streamed[0] == 0 < streamed[1]
    with _load(checkpoints("qwen3_moe"), missing_experts="route", refresh=1) as model:  # every token is corrected
        assert torch.equal(_answer(model, ids), _answer(_dense(checkpoints("qwen3_moe")), ids))


@pytest.mark.parametrize("where", ["loading", "generating"])
def test_fetched_experts_leave_nothing_to_correct(checkpoints, where: str):
    words = r"refresh=4 .* every token is the full model's own: .*missing_experts='route'"
    if where == "loading":
        with pytest.raises(UsageError, match=words):
            _load(checkpoints("mixtral"), refresh=4)
        return
    with _load(checkpoints("mixtral"), keep_prompts=True) as model, pytest.raises(UsageError, match=words):
        _answer(model, _ids(), refresh=4, context=model.new_context())


@pytest.mark.parametrize(("name", "missing"), by_turns(STATELESS, ("fetch", "route"), whole=STATELESS[:1]))
def test_a_saved_prompt_goes_on(checkpoints, tmp_path: Path, name: str, missing: str):
    """In another process's model, which has read no expert yet."""
    ids, options = _ids(), {"keep_prompts": True, "missing_experts": missing}
    longer = torch.cat([ids, _ids(tokens=5, seed=2)], 1)
    with _load(checkpoints(name), **options) as model:
        context = model.new_context()
        expected = [_answer(model, ids, context=context, prompt_done=lambda c: model.save_context(c, tmp_path / "p"))]
        expected.append(_answer(model, longer, context=model.load_context(tmp_path / "p")[0]))
    with _load(checkpoints(name), **options) as model:
        context, _ = model.load_context(tmp_path / "p")
        assert torch.equal(_answer(model, ids, context=context), expected[0])
        assert model.last_report.prefill_streamed_bytes == (0 if missing == "fetch" else _residents_bytes(model))
        context, _ = model.load_context(tmp_path / "p", context)
        assert torch.equal(_answer(model, longer, context=context), expected[1])
    if missing == "fetch":
        dense = _dense(checkpoints(name))
        assert torch.equal(expected[0], _answer(dense, ids))
        assert torch.equal(expected[1], _answer(dense, longer))


def _residents_bytes(model: GriffinModel) -> int:
    store = model.engine.loaded.layers.expert_store
    return sum(len(model.selected[i]) * store.expert_bytes(i) for i in model.selected)


def test_a_prompt_that_was_routed_is_not_one_that_was_fetched(checkpoints, tmp_path: Path):
    with _load(checkpoints("mixtral"), keep_prompts=True) as model:
        context = model.new_context()
        _answer(model, _ids(), context=context)
        model.save_context(context, tmp_path / "p")
    with (
        _load(checkpoints("mixtral"), keep_prompts=True, missing_experts="route") as model,
        pytest.raises(SavedContextError, match="missing_experts"),
    ):
        model.load_context(tmp_path / "p")


@pytest.mark.parametrize("name", mostly_slow(["gpt_oss", "deepseek_v3", "lfm2_moe"], 1))
def test_beams_and_several_sequences(checkpoints, name: str):
    ids, dense = _ids(2), _dense(checkpoints(name))
    with _load(checkpoints(name), batch_size=6) as model:
        for settings in ({"num_beams": 3}, {"num_return_sequences": 1, "repetition_penalty": 1.2}):
            assert torch.equal(_answer(model, ids, **settings), _answer(dense, ids, **settings))
            assert model.last_report.peak_device_bytes <= model.plan.peak_bytes
    with _load(checkpoints(name), batch_size=2, missing_experts="route") as model:
        both = _answer(model, ids)
        assert both.shape[0] == 2
        assert model.last_report.decode_streamed_bytes == 0


def test_a_conversation_turns_to_exact(checkpoints):
    """Turns take turns: read, drafted, read; each is the full model's."""
    dense, ids = _dense(checkpoints("qwen3_moe")), _ids(tokens=12)
    with _load(checkpoints("qwen3_moe"), exact=True, draft_tokens=3, keep_prompts=True) as model:
        context = model.new_context()
        for exact in (False, True, False):
            expected = _answer(dense, ids, 8)
            assert torch.equal(_answer(model, ids, 8, context=context, exact=exact), expected)
            ids = torch.cat([expected, _ids(tokens=4, seed=3)], 1)


def test_layers_beside_experts(checkpoints):
    """A dense first layer stays whole, and has no part in drafts."""
    with _load(checkpoints("deepseek_v3"), exact=True, draft_tokens=2) as model:
        _answer(model, _ids(), 8)
        assert sorted(model.selected) == list(range(1, LAYERS))
