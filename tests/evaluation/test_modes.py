"""Class mode, the baselines and compensation against an implementation of the formulas on dense models."""

import functools
from pathlib import Path

import pytest
import torch
from evaluation.direct import gated, kept_by, plain, simulated_directly
from marks import every_pair
from reference import dense_forward, select_direct, statistic_float64
from tiny_models import ARCHITECTURES, HYBRIDS, VOCAB
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from griffin_offload import GriffinModel
from griffin_offload.demo import PROMPT, demo_directory
from griffin_offload.evaluation.samples import Sample
from griffin_offload.evaluation.simulation import prompt_prior, simulate
from griffin_offload.method.variants import Variant

WEIGHTS = {"llama2": gated, "gemma": gated, "opt": plain}
SELECTIONS = ("topk", "magnitude", "output_aware")
CLOSE = {"atol": 2e-5, "rtol": 1e-5}


def _ids(tokens: int, seed: int = 0) -> Tensor:
    return torch.randint(3, VOCAB, (tokens,), generator=torch.Generator().manual_seed(seed))


@functools.lru_cache(maxsize=4)
def _both(path: Path, **options: object) -> tuple[GriffinModel, PreTrainedModel]:
    dense = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    return GriffinModel.from_pretrained(path, device="cpu", max_gpu_mem="200MB", density=0.0, **options), dense


@pytest.mark.parametrize("name", list(WEIGHTS))
@pytest.mark.parametrize("selection", SELECTIONS)
def test_class_mode(checkpoints, name: str, selection: str):
    """Contexts and answers of several lengths in one batch: only the last input token misses neurons. (No context is so
    short that neurons that never fired, ties, are chosen among.)"""
    model, dense = _both(checkpoints(name), ctx_size=64)
    pairs = [(_ids(20, 1), _ids(1, 2)), (_ids(7, 3), _ids(3, 4)), (_ids(6, 5), _ids(2, 6)), (_ids(30, 7), _ids(4, 8))]
    samples = [Sample.classification(context, answer) for context, answer in pairs]
    found = simulate(model, samples, [Variant(0.5, selection)])
    kept = kept_by(selection, 0.5, WEIGHTS[name](dense))
    for (context, answer), scores in zip(pairs, found, strict=True):
        ids = torch.cat([context, answer])[:-1]
        for own, expected in (
            (scores.full, dense_forward(dense, ids[None])[0].log_softmax(-1)),
            (scores.variants[0], simulated_directly(dense, ARCHITECTURES[name].down, ids, len(ids) - 1, kept)),
        ):
            log_probs = expected[len(context) - 1 :].gather(-1, answer[:, None])[:, 0]
            torch.testing.assert_close(own.log_probs, log_probs, **CLOSE)
        changed = scores.variants[0].log_probs != scores.full.log_probs
        assert changed[-1]
        assert not changed[:-1].any()


@pytest.mark.parametrize("name", list(WEIGHTS))
@pytest.mark.parametrize("selection", SELECTIONS)
def test_strict_mode(checkpoints, name: str, selection: str):
    """The last context token is the first that misses neurons, so every token of every answer is predicted without."""
    model, dense = _both(checkpoints(name), ctx_size=64)
    pairs = [(_ids(20, 1), _ids(1, 2)), (_ids(7, 3), _ids(3, 4)), (_ids(9, 5), _ids(2, 6)), (_ids(30, 7), _ids(4, 8))]
    found = simulate(model, [Sample.strict(*pair) for pair in pairs], [Variant(0.5, selection)])
    kept = kept_by(selection, 0.5, WEIGHTS[name](dense))
    for (context, answer), scores in zip(pairs, found, strict=True):
        ids = torch.cat([context, answer])[:-1]
        expected = simulated_directly(dense, ARCHITECTURES[name].down, ids, len(context) - 1, kept)
        log_probs = expected[len(context) - 1 :].gather(-1, answer[:, None])[:, 0]
        torch.testing.assert_close(scores.variants[0].log_probs, log_probs, **CLOSE)
        assert (scores.variants[0].log_probs != scores.full.log_probs).all()


def test_dense_samples_pass_the_full_model_alone(checkpoints):
    model, _ = _both(checkpoints("llama2"), ctx_size=64)
    samples = [Sample.dense(_ids(1, 1), _ids(1, 2)), Sample.dense(_ids(8, 3), _ids(4, 4))]
    for scores in simulate(model, samples, [Variant(0.25), Variant(0.25, "random")]):
        for variant in scores.variants:
            torch.testing.assert_close(variant.log_probs, scores.full.log_probs, **CLOSE)


@pytest.mark.parametrize(
    ("name", "compensate", "selection"),
    every_pair({name: name for name in WEIGHTS}, {"plain": False, "compensated": True}, {s: s for s in SELECTIONS}),
)
def test_generation(checkpoints, name: str, selection: str, compensate: bool):
    model, dense = _both(checkpoints(name), ctx_size=64)
    samples = [Sample.generation(_ids(tokens, tokens), _ids(9, 1)) for tokens in (21, 1, 13)]
    found = simulate(model, samples, [Variant(0.25, selection, compensate=compensate), Variant(0.25)])
    kept = kept_by(selection, 0.25, WEIGHTS[name](dense))
    for sample, scores in zip(samples, found, strict=True):
        ids, prompt = sample.ids[:-1], sample.prompt_tokens
        expected = simulated_directly(dense, ARCHITECTURES[name].down, ids, prompt, kept, compensate=compensate)
        log_probs = expected[prompt - 1 :].gather(-1, sample.ids[prompt:, None])[:, 0]
        torch.testing.assert_close(scores.variants[0].log_probs, log_probs, **CLOSE)


def test_layers_without_a_feed_forward_are_passed_as_they_are(checkpoints):
    """Mamba and attention alone, between layers that choose: the formulas on the others, and the share of a run."""
    path, down = checkpoints("nemotron_h"), HYBRIDS["nemotron_h"].down
    sample, variants = Sample.generation(_ids(21), _ids(9, 1)), [Variant(0.5), Variant(0.5, compensate=True)]
    model, dense = _both(path, ctx_size=64)
    found = simulate(model, [sample], variants)[0].variants
    for scores, variant in zip(found, variants, strict=True):
        expected = simulated_directly(
            dense,
            down,
            sample.ids[:-1],
            21,
            lambda _, z: select_direct("topk", 64, statistic_float64(z)),
            compensate=variant.compensate,
        )
        log_probs = expected[20:].gather(-1, sample.ids[21:, None])[:, 0]
        torch.testing.assert_close(scores.log_probs, log_probs, **CLOSE)
    model.generate(sample.ids[None, :21], max_new_tokens=2, do_sample=False)
    assert model.last_prefill.activation_kept == 0
    model, _ = _both(path, ctx_size=64, quantize="int8", always_stream=True)
    assert [layer.numel() for layer in prompt_prior(model, [sample])] == [0, 128, 0, 128]
    everywhere = simulate(model, [sample], [Variant(0.5, allocation="global"), Variant(0.5, "output_aware")])[0]
    assert all(0.5 < scores.activation_kept < 1 for scores in everywhere.variants)


@pytest.mark.parametrize("selection", SELECTIONS)
def test_trained_weights(selection: str):
    """The demo's, of which the norms differ; in class mode and in generation, computed in float32."""
    path = demo_directory()
    model, dense = _both(path, dtype="float32", ctx_size=128)
    ids = torch.tensor(AutoTokenizer.from_pretrained(path)(PROMPT).input_ids)
    samples = [Sample.generation(ids[:50], ids[50:]), Sample.classification(ids[:60], ids[60:63])]
    found = simulate(model, samples, [Variant(0.5, selection)])
    kept = kept_by(selection, 0.5, gated(dense))
    for sample, scores in zip(samples, found, strict=True):
        expected = simulated_directly(
            dense, "model.layers.{i}.mlp.down_proj", sample.ids[:-1], sample.prompt_tokens, kept
        )
        log_probs = expected[sample.scored_from - 1 :].gather(-1, sample.ids[sample.scored_from :, None])[:, 0]
        torch.testing.assert_close(scores.variants[0].log_probs, log_probs, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", list(WEIGHTS))
def test_prior_is_the_mean_distribution_of_the_prompts(checkpoints, name: str):
    from reference import collect_z

    model, dense = _both(checkpoints(name), ctx_size=64)
    samples = [Sample.generation(_ids(tokens, tokens), _ids(5, 1)) for tokens in (21, 4, 13)]
    expected = [torch.zeros(ARCHITECTURES[name].neurons, dtype=torch.float64) for _ in range(3)]
    for sample in samples:
        prompt = sample.ids[: sample.prompt_tokens]
        for layer, z in enumerate(collect_z(dense, ARCHITECTURES[name].down, prompt[None])):
            expected[layer] += statistic_float64(z[0]) ** 2 / len(prompt) / len(samples)
    for ours, theirs in zip(prompt_prior(model, samples), expected, strict=True):
        torch.testing.assert_close(ours.double(), theirs, atol=1e-6, rtol=1e-5)


def test_global_allocation_and_fusion_choose_as_direct_code_does(checkpoints):
    """Numbers per layer from one threshold over all layers, and scores fused with a prior, by sorting in float64."""
    name = "llama2"
    model, dense = _both(checkpoints(name), ctx_size=64)
    weights, layers, neurons = gated(dense), 3, ARCHITECTURES[name].neurons
    prior = [torch.rand(neurons, generator=torch.Generator().manual_seed(layer)) / neurons for layer in range(layers)]
    sample = Sample.generation(_ids(20), _ids(8, 1))
    variants = [
        Variant(0.5, allocation="global"),
        Variant(0.5, "output_aware", prior="rank", prior_share=0.3137),
        Variant(0.5, prior="energy"),
    ]
    found = simulate(model, [sample, sample], variants, prior=prior)[1]
    from reference import collect_z

    prompt = sample.ids[:20]
    shares = [statistic_float64(z[0]) ** 2 / 20 for z in collect_z(dense, ARCHITECTURES[name].down, prompt[None])]
    threshold = torch.cat(shares).sort(descending=True).values[int(0.5 * layers * neurons)]

    def by_threshold(layer: int, _: Tensor) -> Tensor:
        return (shares[layer] > threshold).nonzero()[:, 0]

    def ranks(values: Tensor) -> Tensor:
        return torch.tensor([float((values <= value).sum()) for value in values], dtype=torch.float64)

    def by_rank(layer: int, z: Tensor) -> Tensor:
        norms = weights(layer)[2].double().norm(dim=0)
        s, g = statistic_float64(z) * norms, prior[layer].double().sqrt() * norms
        return (0.6863 * ranks(s) + 0.3137 * ranks(g)).topk(neurons // 2).indices

    def by_energy(layer: int, z: Tensor) -> Tensor:
        return (statistic_float64(z) ** 2 / len(z) + prior[layer]).topk(neurons // 2).indices

    counts = [len(by_threshold(layer, prompt)) for layer in range(layers)]
    assert len(set(counts)) > 1
    assert all(0.2 <= count / neurons <= 0.9 for count in counts)
    for scores, kept in zip(found.variants, (by_threshold, by_rank, by_energy), strict=True):
        expected = simulated_directly(dense, ARCHITECTURES[name].down, sample.ids[:-1], 20, kept)
        log_probs = expected[19:].gather(-1, sample.ids[20:, None])[:, 0]
        torch.testing.assert_close(scores.log_probs, log_probs, **CLOSE)
