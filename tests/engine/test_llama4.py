"""Llama 4 as it is published: one expert to a token, whose weight is multiplied into what the expert is given; dense
layers between, attention in chunks, temperatures, and a checkpoint that sees."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from safetensors.torch import load_file
from tiny_models import VOCAB, randomised
from torch import Tensor, nn

from griffin_offload import GriffinModel
from griffin_offload.blocks.layouts import find_feed_forwards
from griffin_offload.blocks.states import looks_at_length
from griffin_offload.engine.convert import convert
from griffin_offload.transformers_api import CACHE, adapted

CHUNK, EXPERTS, LAYERS, PROMPT, NEW = 16, 8, 4, 40, 32
_TEXT: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 96,
    "intermediate_size_mlp": 64,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "num_local_experts": EXPERTS,
    "interleave_moe_layer_step": 2,
    "attention_chunk_size": CHUNK,
    "floor_scale": 8,  # each so many tokens another temperature
    "attn_scale": 0.5,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}
_VISION: dict[str, Any] = {
    **dict.fromkeys(("hidden_size", "vision_output_dim", "projector_input_dim", "projector_output_dim"), 32),
    **{"intermediate_size": 64, "num_hidden_layers": LAYERS, "num_attention_heads": 2},
    **{"image_size": 28, "patch_size": 14},
}
_GREEDY = {"do_sample": False, "max_new_tokens": NEW, "output_logits": True, "return_dict_in_generate": True}


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With names, and a tower, as Llama-4-Scout has them."""
    config = hf.Llama4Config(text_config=_TEXT, vision_config=_VISION)
    model = hf.Llama4ForConditionalGeneration(config)
    model.language_model.load_state_dict(randomised(hf.Llama4TextConfig(**_TEXT), 0).state_dict())
    directory = tmp_path_factory.mktemp("llama4")
    model.save_pretrained(directory)
    names = load_file(directory / "model.safetensors")
    inside = "language_model.model.layers.1.feed_forward"
    assert {f"{inside}.router.weight", f"{inside}.shared_expert.up_proj.weight", "vision_model.class_embedding"} < {
        *names
    }
    assert names[f"{inside}.experts.gate_up_proj"].shape == (EXPERTS, 32, 2 * 96)
    assert names[f"{inside}.experts.down_proj"].shape == (EXPERTS, 96, 32)
    return directory


def _load(directory: Path, **options: Any) -> GriffinModel:
    sizes = {"max_gpu_mem": "40MB", "ctx_size": 96, "device": "cpu", "quantize": "none"}
    return GriffinModel.from_pretrained(directory, **{**sizes, **options})


def _dense(directory: Path) -> hf.PreTrainedModel:
    model = hf.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    assert type(model.model.layers[1].feed_forward).__name__ == "Llama4TextMoe"
    return model


def _asked(batch: int) -> dict[str, Tensor]:
    """Prompts of more than two chunks; several are padded on the left, by less and by more than one."""
    ids = torch.randint(5, VOCAB - 8, (batch, PROMPT), generator=torch.Generator().manual_seed(3))
    mask = torch.ones_like(ids)
    for row, padding in enumerate((0, 7, CHUNK + 3)[:batch]):
        mask[row, :padding] = 0
    return {"inputs": ids.masked_fill(mask == 0, 0), "attention_mask": mask}


def _close(found: Any, expected: Any) -> None:
    ours, theirs = torch.stack(found.logits), torch.stack(expected.logits)
    assert torch.equal(found.sequences, expected.sequences)
    assert (ours - theirs).abs().max() < 1e-5 * theirs.abs().max()


@pytest.mark.parametrize("batch", [1, 3])
def test_fetch_is_the_full_model(published: Path, batch: int):
    asked = _asked(batch)
    expected = _dense(published).generate(**asked, **_GREEDY)
    found, expert = [], 3 * 96 * 32 * 4
    for options in ({"density": 0.125}, {"density": 0.5, "ff_chunk_tokens": 16}, {"density": 1.0}):
        with _load(published, batch_size=batch, **options) as model:
            found.append(model.generate(**asked, **_GREEDY))
            _close(found[-1], expected)
            report = model.last_report
            assert model.plan.kept == (64, round(options["density"] * EXPERTS)) * 2
            assert model.resident_bytes == model.plan.resident_bytes
            assert report.peak_device_bytes <= model.plan.peak_bytes
            assert not [name for name, _ in model.model.named_modules() if "vision" in name]
        if options["density"] < 1:
            needed = report.decode_streamed_bytes - report.experts.wrong_bytes
            assert needed == report.experts.misses * expert > 0
            assert report.experts.guessed > 0  # the router answers when it is asked early
    assert torch.equal(torch.stack(found[0].logits), torch.stack(found[2].logits))


@torch.no_grad()
def test_route_is_the_best_resident_by_its_own_sigmoid(published: Path):
    """The highest logit among residents chooses; the weight is the sigmoid of that logit, a share of nothing."""
    asked = _asked(1)
    with _load(published, density=0.5, missing_experts="route") as model:
        found = model.generate(**asked, **_GREEDY)
        residents = {i: cache.residents for i, cache in model.engine.loaded.layers.experts.items()}
        report = model.last_report
    assert {i: len(kept) for i, kept in residents.items()} == {1: 4, 3: 4}
    assert report.decode_streamed_bytes == 0 < report.experts.redirected < report.experts.choices
    dense, on = _dense(published), [False]
    for index, kept in residents.items():
        router = dense.model.layers[index].feed_forward.router

        def forward(hidden: Tensor, router: Any = router, kept: list[int] = kept, own: Any = router.forward) -> Any:
            if not on[0]:
                return own(hidden)
            scores = torch.zeros(len(hidden), EXPERTS)
            for token, state in enumerate(hidden):
                logit, best = max((float(router.weight[expert] @ state), expert) for expert in kept)
                scores[token, best] = 1 / (1 + torch.tensor(-logit).exp())
            return scores, None

        router.forward = forward
    output = dense(asked["inputs"], use_cache=True, logits_to_keep=1)
    on[0] = True
    for token, logits in zip(found.sequences[0, PROMPT:], found.logits, strict=True):
        torch.testing.assert_close(output.logits[:, -1], logits, rtol=1e-4, atol=1e-4)
        output = dense(token[None, None], use_cache=True, **{CACHE: output[CACHE]})


@pytest.mark.parametrize("active", [1, 3])
@torch.no_grad()
def test_a_mixture_is_what_transformers_makes_of_it(active: int):
    """In float64, also where several experts are added; nothing in the one place of the other would be seen."""
    config = hf.Llama4TextConfig(**_TEXT, num_experts_per_tok=active)
    model = randomised(config, 1).double()
    x = torch.randn(2, 9, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    expected = [model.model.layers[i].feed_forward(x) for i in (1, 3)]
    adapted(model)
    find_feed_forwards(model, LAYERS)
    for i, (output, logits) in zip((1, 3), expected, strict=True):
        found = model.model.layers[i].feed_forward(x)
        torch.testing.assert_close(found[0], output, rtol=1e-12, atol=1e-12)
        assert torch.equal(found[1], logits)
        weights, _, chosen = model.model.layers[i].feed_forward.router(x.flatten(0, 1))
        assert weights.shape == chosen.shape == (18, active)
        assert isinstance(model.model.layers[i].feed_forward.router, nn.Linear)


def test_drafts_across_chunks(published: Path):
    """Several tokens at once, of which some are taken back, on both sides of a border."""
    asked = _asked(1)
    expected = _dense(published).generate(**asked, **_GREEDY)
    with _load(published, density=0.5, exact=True, draft_tokens=5) as model:
        assert torch.equal(model.generate(**asked, **_GREEDY).sequences, expected.sequences)
        assert 0 < model.last_report.drafting.accepted < model.last_report.drafting.drafted
    with _load(published, density=0.5) as model:
        repeating = {name: tensor.repeat(1, 2)[:, : PROMPT + 9] for name, tensor in asked.items()}
        dense = _dense(published).generate(**repeating, do_sample=False, max_new_tokens=NEW)
        found = model.generate(**repeating, do_sample=False, max_new_tokens=NEW, prompt_lookup_num_tokens=4)
        assert torch.equal(found, dense)


@pytest.mark.parametrize("precision", ["none", "int8", "int4"])
def test_copies_answer_as_the_original(published: Path, tmp_path: Path, precision: str):
    convert(published, tmp_path / "copy", precision)
    with _load(published, quantize=precision, density=0.5) as model:
        expected = model.generate(**_asked(1), **_GREEDY)
    with _load(tmp_path / "copy", quantize=precision, density=0.25) as model:
        found, report = model.generate(**_asked(1), **_GREEDY), model.last_report
        assert report.peak_device_bytes <= model.plan.peak_bytes
        assert model.resident_bytes == model.plan.resident_bytes
    if precision == "int4":  # its attention was rounded to make up for errors
        assert torch.stack(found.logits).isfinite().all()
    else:
        _close(found, expected)


_CHUNKS = "attention in chunks begins anew at positions counted on the host"
_TEMPERATURES = "attention has a temperature by positions counted on the host"


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({}, _CHUNKS),
        ({"attn_temperature_tuning": False}, _CHUNKS),
        ({"layer_types": ["full_attention"] * LAYERS}, _TEMPERATURES),
        ({"layer_types": ["full_attention"] * LAYERS, "attn_temperature_tuning": False}, None),
    ],
)
def test_what_depends_on_the_length_is_said(settings: dict[str, Any], reason: str | None):
    assert looks_at_length(hf.Llama4TextConfig(**_TEXT | settings)) == reason
    assert looks_at_length(hf.Llama4Config(text_config=_TEXT | settings, vision_config=_VISION)) == reason


def test_sequences_of_different_lengths_are_answered_alone(published: Path):
    with _load(published, density=1.0) as model:
        assert model.why_alone == _CHUNKS
        rows = [_asked(1)["inputs"][:, :tokens] for tokens in (PROMPT, 13, 27)]
        expected = [model.generate(ids, do_sample=False, max_new_tokens=9)[0, ids.shape[1] :] for ids in rows]
        asked = [(ids, {"do_sample": False, "max_new_tokens": 9}) for ids in rows]
        found = {answer.index: answer.tokens for answer in model.generate_many(asked)}
        assert all(torch.equal(found[index], tokens) for index, tokens in enumerate(expected))
