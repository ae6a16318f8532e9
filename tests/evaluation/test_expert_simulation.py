"""The simulation of mixtures of experts: what routing among residents generates, scored again."""

from pathlib import Path
from typing import Any

import pytest
import torch
from marks import by_turns
from tiny_models import MIXTURE_KINDS, VOCAB
from torch import Tensor
from transformers import AutoModelForCausalLM

from griffin_offload import GriffinModel
from griffin_offload.blocks.base import hooks_on
from griffin_offload.errors import UnsupportedModel, UsageError
from griffin_offload.evaluation import simulated_pass
from griffin_offload.evaluation.inspection import observe_sequences
from griffin_offload.evaluation.samples import Sample
from griffin_offload.evaluation.simulation import prompt_prior, simulate
from griffin_offload.method.variants import Variant

LENGTHS = (40, 1, 23)
HALF = Variant(0.5)
CLOSE = {"atol": 1e-5, "rtol": 1e-5}
# Their states are summed by chunks in a pass over a text, and token by token in an answer.
HYBRIDS_CLOSE = {"atol": 1e-5, "rtol": 1e-4}


def _load(path: Path, **options: Any) -> GriffinModel:
    sizes = {"device": "cpu", "max_gpu_mem": "100MB", "density": 0.5, "ctx_size": 64}
    return GriffinModel.from_pretrained(path, **{**sizes, **options})


def _generated(model: GriffinModel, prompt: Tensor) -> tuple[Sample, Tensor]:
    output = model.generate(
        prompt, max_new_tokens=6, do_sample=False, output_logits=True, return_dict_in_generate=True, eos_token_id=None
    )
    continuation = output.sequences[0, prompt.shape[1] :]
    log_probs = torch.stack(output.logits)[:, 0].log_softmax(-1)
    return Sample.generation(prompt[0], continuation), log_probs.gather(-1, continuation[:, None])[:, 0]


def _prompts(lengths: tuple[int, ...] = LENGTHS) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(5, VOCAB - 8, (1, length), generator=generator) for length in lengths]


@pytest.mark.parametrize(
    ("name", "rows"), by_turns((*MIXTURE_KINDS, "jetmoe"), ("all at once", "few"), whole=("mixtral",))
)
def test_equals_generation_by_residents(checkpoints, monkeypatch: pytest.MonkeyPatch, name: str, rows: str):
    """Prompts of several lengths alone, and together, padded; hybrids, whose states padding would change, alone."""
    if rows == "few":
        monkeypatch.setattr(simulated_pass, "TOKENS_AT_ONCE", 120)
    with _load(checkpoints(name), missing_experts="route") as model:
        samples, expected = zip(*(_generated(model, prompt) for prompt in _prompts()), strict=True)
        residents = {i: cache.residents for i, cache in model.engine.loaded.layers.experts.items()}
        hooks = [hooks_on(layer) for layer in model.engine.loaded.layers.decoder]  # of guesses, for good
        padded = name not in ("lfm2_moe", "qwen3_next", "nemotron_3")
        close = CLOSE if padded else HYBRIDS_CLOSE
        found = simulate(model, samples, [HALF]) if padded else []
        for place, (sample, log_probs) in enumerate(zip(samples, expected, strict=True)):
            alone = simulate(model, [sample], [HALF])[0]
            for scores in (alone, *found[place : place + 1]):
                torch.testing.assert_close(scores.variants[0].log_probs, log_probs, **close)
                assert (scores.variants[0].log_probs - scores.full.log_probs).abs().max() > 1e-3
        assert residents == {i: cache.residents for i, cache in model.engine.loaded.layers.experts.items()}
        for layer in model.engine.loaded.layers.decoder:
            assert "forward" not in vars(layer) or name == "gemma4"
            assert hooks_on(layer) == hooks.pop(0)


def test_the_full_model_is_dense(checkpoints):
    dense = AutoModelForCausalLM.from_pretrained(checkpoints("qwen3_moe"), dtype=torch.float32).eval()
    ids = _prompts((30,))[0]
    with torch.no_grad():
        log_probs = dense(ids).logits[0, 19:-1].log_softmax(-1).gather(-1, ids[0, 20:, None])[:, 0]
    with _load(checkpoints("qwen3_moe"), density=0.0, always_stream=True) as model:
        assert model.plan.experts == (2, 8)  # what a token needs at least
        variants = [HALF, Variant(0.5, "random"), Variant(0.5, "magnitude"), Variant(1.0)]
        scores = simulate(model, [Sample.generation(ids[0, :20], ids[0, 20:])], variants)[0]
    torch.testing.assert_close(scores.full.log_probs, log_probs, **CLOSE)
    torch.testing.assert_close(scores.variants[3].log_probs, scores.full.log_probs, **CLOSE)
    assert len({float(found.log_probs.sum()) for found in scores.variants}) == 4
    kept = [found.activation_kept for found in scores.variants]
    assert kept[0] == max(kept[:3]) < kept[3] == 1


def test_dense_layers_beside_experts_stay_whole(checkpoints):
    with _load(checkpoints("deepseek_v3"), density=0.0, always_stream=True) as model:
        ids = _prompts((30,))[0][0]
        found = simulate(model, [Sample.generation(ids[:20], ids[20:])], [Variant(0.25), HALF])[0]
        assert found.variants[0].activation_kept < found.variants[1].activation_kept < 1
        prior = prompt_prior(model, [Sample.generation(ids[:20], ids[20:])])
        assert [layer.numel() for layer in prior] == [block.neurons for block in model.engine.blocks]
        fused = simulate(model, [Sample.generation(ids[:20], ids[20:])], [Variant(0.5, prior="energy")], prior=prior)
        assert fused[0].variants[0].activation_kept == pytest.approx(found.variants[1].activation_kept)


def test_magnitude_is_the_product_of_norms(checkpoints):
    dense = AutoModelForCausalLM.from_pretrained(checkpoints("gpt_oss"), dtype=torch.float32)
    experts = dense.model.layers[1].mlp.experts
    expected = experts.gate_up_proj.flatten(1).norm(dim=1) * experts.down_proj.flatten(1).norm(dim=1)
    with _load(checkpoints("gpt_oss"), always_stream=True) as model:
        block = model.engine.blocks[1]
        found = block.neuron_norms(model.engine.loaded.layers.expert_store.tensors(1))
    torch.testing.assert_close(found, expected)


def test_what_is_observed_is_the_statistic(checkpoints):
    ids = _prompts((24,))[0]
    with _load(checkpoints("mixtral"), keep_prompts=True) as model:
        context = model.new_context()
        model.generate(ids, max_new_tokens=2, do_sample=False, context=context)
        seen = observe_sequences(model, [ids[0]])[0]
        for layer, squared in context.squared.items():
            torch.testing.assert_close(seen.squared(layer), squared[0])


def test_refusals(checkpoints):
    ids = _prompts((30,))[0][0]
    sample = Sample.generation(ids[:20], ids[20:])
    with _load(checkpoints("mixtral")) as model:
        with pytest.raises(UsageError, match=r"density 0\.2 keeps 1 of the 8 experts of layer 0, and .* sent to 2"):
            simulate(model, [sample], [Variant(0.2)])
        for variant in (Variant(0.5, compensate=True), Variant(0.5, allocation="global")):
            with pytest.raises(UnsupportedModel, match="experts have no means"):
                simulate(model, [sample], [variant])
        with pytest.raises(UnsupportedModel, match="in their statistic already"):
            simulate(model, [sample], [Variant(0.5, "output_aware")])
    with (
        _load(checkpoints("phimoe")) as model,
        pytest.raises(UnsupportedModel, match="layer 0: this model's router cannot be kept to some"),
    ):
        simulate(model, [sample], [HALF])
