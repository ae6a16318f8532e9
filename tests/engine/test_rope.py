"""Positions whose angles depend on the length of a sequence, on both sides of the border and across it."""

from pathlib import Path
from typing import Any

import pytest
import torch
from marks import mostly_slow
from tiny_models import VOCAB
from transformers import AutoModelForCausalLM, LlamaConfig, Phi3Config, PreTrainedModel

from griffin_offload import GriffinModel, UsageError
from griffin_offload.blocks.states import positions_reached, rope_border
from griffin_offload.kv_cache.kv_cache import KVCache

BORDER = 40
NEW = 12
_SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
    "eos_token_id": None,
}
_LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0] * 4,
    "long_factor": [2.0, 3.0, 4.0, 5.0],
    "original_max_position_embeddings": BORDER,
    "factor": 4.0,
}
_STRETCHED = {"rope_theta": 10000.0, "factor": 4.0}
_CONFIGS: dict[str, Any] = {
    "phi3": lambda: Phi3Config(
        **_SIZES, max_position_embeddings=160, original_max_position_embeddings=BORDER, rope_parameters=_LONGROPE
    ),
    "longrope": lambda: LlamaConfig(**_SIZES, max_position_embeddings=160, rope_parameters=_LONGROPE),
    "dynamic": lambda: _llama("dynamic"),
    "yarn": lambda: _llama("yarn", original_max_position_embeddings=BORDER),
    "linear": lambda: _llama("linear"),
}


def _llama(kind: str, **more: Any) -> LlamaConfig:
    rope = {"rope_type": kind, **_STRETCHED, **more}
    return LlamaConfig(**_SIZES, max_position_embeddings=BORDER, rope_parameters=rope)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory):
    """`models(name)` is (directory, dense model), the same again for the same name."""
    made: dict[str, tuple[Path, PreTrainedModel]] = {}

    def model(name: str) -> tuple[Path, PreTrainedModel]:
        if name not in made:
            torch.manual_seed(0)
            dense = AutoModelForCausalLM.from_config(_CONFIGS[name]()).eval()
            with torch.no_grad():
                for parameter in dense.parameters():
                    if parameter.dim() > 1:
                        parameter.normal_(0, 0.3)
            directory = tmp_path_factory.mktemp(name)
            dense.save_pretrained(directory)
            made[name] = directory, dense
        return made[name]

    return model


def _load(path: Path, **options: object) -> GriffinModel:
    defaults = {"device": "cpu", "max_gpu_mem": "100MB", "ctx_size": 100, "density": 0.5, "quantize": "none"}
    return GriffinModel.from_pretrained(path, **defaults | options)


def _ids(tokens: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(3, VOCAB, (1, tokens), generator=torch.Generator().manual_seed(seed))


_answers: dict[tuple[PreTrainedModel, bytes, int], torch.Tensor] = {}


def _dense(dense: PreTrainedModel, ids: torch.Tensor, new: int = NEW) -> torch.Tensor:
    """Of a model that nothing has passed before."""
    key = (dense, ids.numpy().tobytes(), new)
    if key not in _answers:
        fresh = AutoModelForCausalLM.from_config(dense.config).eval()
        fresh.load_state_dict(dense.state_dict())
        _answers[key] = fresh.generate(ids, max_new_tokens=new, do_sample=False)
    return _answers[key]


def _greedy(model: GriffinModel, ids: torch.Tensor, new: int = NEW, **kwargs: object) -> torch.Tensor:
    return model.generate(ids, max_new_tokens=new, do_sample=False, **kwargs)


def _around(*apart: int) -> list[int]:
    return [BORDER + tokens for tokens in apart]


@pytest.mark.parametrize(
    ("name", "tokens"),
    mostly_slow([("phi3", tokens) for tokens in _around(-1, 0, 1, -20, -5, 20)] + [("longrope", BORDER - 1)], 3),
)
def test_exact_mode_is_dense_on_both_sides_and_across(name: str, tokens: int, models):
    path, dense = models(name)
    for drafts in (None, 3):
        model = _load(path, exact=True, draft_tokens=drafts)
        assert torch.equal(_greedy(model, _ids(tokens)), _dense(dense, _ids(tokens)))
        assert model.last_report.peak_device_bytes <= model.plan.peak_bytes


@pytest.mark.parametrize("name", ["phi3", "longrope", "dynamic", "yarn"])
def test_plain_answers_at_density_one_are_dense_whatever_passed_before(name: str, models):
    path, dense = models(name)
    model = _load(path, density=1.0, always_stream=True)
    for tokens in _around(30, -5, 20, 1, -20):
        assert torch.equal(_greedy(model, _ids(tokens)), _dense(dense, _ids(tokens)))


@pytest.mark.parametrize("batch", [1, 2])
def test_an_answer_across_the_border_goes_on_as_if_all_of_it_were_the_prompt(batch: int, models):
    """Phi-3 computes everything anew there: that has to be the full model's work, and streamed."""
    model = _load(models("phi3")[0], batch_size=batch)
    ids = torch.cat([_ids(BORDER - 4, seed) for seed in range(batch)])
    answer = _greedy(model, ids)
    report = model.last_report
    assert report.decode_streamed_bytes == report.prefill_streamed_bytes == model.plan.streamed_bytes
    assert report.peak_device_bytes <= model.plan.peak_bytes
    again = _greedy(model, answer[:, : BORDER + 1], answer.shape[1] - BORDER - 1)
    assert torch.equal(answer, again)


def test_our_kv_cache_is_used_on_both_sides(models):
    for bits in (16, 8):
        model = _load(models("phi3")[0], kv_bits=bits)
        for tokens in _around(-5, 5):
            options = {"return_dict_in_generate": True}
            assert type(_greedy(model, _ids(tokens), **options).past_key_values) is KVCache


@pytest.mark.parametrize("name", ["phi3", "longrope", "dynamic"])
@pytest.mark.parametrize("exact", [False, True])
def test_a_context_that_crosses_is_read_anew(name: str, exact: bool, models):
    """As far as a fresh model's answer goes: conversations, prompts that were cut back, and the way back."""
    path, dense = models(name)
    if exact and name == "dynamic":
        pytest.skip("refused, see below")
    model = _load(path, density=1.0, always_stream=True)
    context, text = model.new_context(), _ids(90, 5)
    for tokens in (20, 35, BORDER, BORDER + 1, 60, 70, 50, 30, 35):
        answer = _greedy(model, text[:, :tokens], 4, context=context, exact=exact)
        assert torch.equal(answer, _dense(dense, text[:, :tokens], 4)), tokens
        if tokens == 35 or (tokens == 70 and name != "dynamic"):  # no border between this one and the one before
            assert model.last_report.cached_prompt_tokens > 0


@pytest.mark.parametrize("name", ["phi3", "longrope"])
def test_a_saved_prompt_is_gone_on_from_on_its_own_side(name: str, models, tmp_path: Path):
    path, dense = models(name)
    model = _load(path, density=1.0, always_stream=True)
    for saved, asked in ((20, 30), (20, 60), (50, 60)):
        context, text = model.new_context(), _ids(90, 7)
        _greedy(model, text[:, :saved], 1, context=context)
        model.save_context(context, tmp_path / "saved.ctx")
        loaded, _ = model.load_context(tmp_path / "saved.ctx")
        assert torch.equal(_greedy(model, text[:, :asked], 4, context=loaded), _dense(dense, text[:, :asked], 4))
        assert (model.last_report.cached_prompt_tokens > 0) == (asked != saved + 40)


def test_refresh_across_the_border(models):
    path, dense = models("phi3")
    model = _load(path, density=1.0, always_stream=True, refresh=4)
    assert torch.equal(_greedy(model, _ids(BORDER - 3), 20), _dense(dense, _ids(BORDER - 3), 20))


def test_passes_beyond_a_border_that_moves_are_refused(models):
    path, dense = models("dynamic")
    model = _load(path, exact=True)
    fitting = _ids(BORDER - NEW)
    assert torch.equal(_greedy(model, fitting), _dense(dense, fitting))
    for option in ({}, {"exact": False, "refresh": 3}):
        with pytest.raises(UsageError, match=r"end at 40 tokens here, prompt and answer are 41: .* rope kind dynamic"):
            _greedy(model, fitting, NEW + 1, **option)


@pytest.mark.parametrize("name", ["yarn", "linear", "dynamic"])
def test_contexts_reach_as_far_as_rope_stretches(name: str, models):
    """The trained length, as such checkpoints say it in max_position_embeddings, times the factor."""
    path, dense = models(name)
    model = _load(path, ctx_size=4 * BORDER, density=1.0)
    ids = _ids(4 * BORDER - NEW)
    assert torch.equal(_greedy(model, ids), _dense(dense, ids))
    with pytest.raises(UsageError, match=f"more than the model's {4 * BORDER}"):
        _load(path, ctx_size=4 * BORDER + 1)


def test_what_a_config_says_of_its_positions():
    assert positions_reached(_CONFIGS["phi3"]()) == 160  # said for the whole, not to be stretched
    assert positions_reached(LlamaConfig(max_position_embeddings=99)) == 99
    border = rope_border(_CONFIGS["phi3"](), None)
    assert (border.tokens, border.moving, border.rereads) == (BORDER, False, False)
    assert rope_border(_CONFIGS["dynamic"](), None).moving
    assert rope_border(_CONFIGS["yarn"](), None) is None


@pytest.mark.parametrize("name", ["phi3", "longrope", "dynamic", "yarn"])
def test_prompts_together_are_turned_each_by_its_own_length(name: str, models):
    """All of them are longer than the border, none is; where positions move they pass alone."""
    path, dense = models(name)
    model, prompts = _load(path, density=1.0, always_stream=True), [_ids(tokens, tokens) for tokens in (30, 20, 25)]
    answers = model.generate_many(prompts, max_new_tokens=4, do_sample=False)
    found = {one.index: one.tokens for one in answers}
    for index, prompt in enumerate(prompts):
        assert torch.equal(found[index], _dense(dense, prompt, 4)[0, prompt.shape[1] :])
    assert (model.engine.joint.why_prompts_alone is not None) == (name == "dynamic")
