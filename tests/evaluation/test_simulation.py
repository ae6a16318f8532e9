"""The simulation: equal to real generation, to masked references written independently, and to the dense model."""

from pathlib import Path

import pytest
import torch
from reference import (
    collect_z,
    dense_forward,
    magnitude_float64,
    masked_after_prefill,
    select_direct,
    statistic_float64,
)
from tiny_models import ARCHITECTURES, VOCAB
from transformers import AutoModelForCausalLM

from griffin_offload import DoesNotFit, GriffinModel, UsageError
from griffin_offload.demo import demo_directory
from griffin_offload.evaluation.simulation import Sample, Score, Variant, simulate

FAMILIES = ["llama2", "gemma2", "opt", "gpt2", "falcon_alibi", "bloom", "phi3"]
HALF = Variant("topk", 0.5)


def _load(path: Path, **options: object) -> GriffinModel:
    defaults = {"device": "cpu", "max_gpu_mem": "1GB", "density": 0.0, "ctx_size": 96, "always_stream": True}
    return GriffinModel.from_pretrained(path, **{**defaults, "quantize": "none", **options})


def _ids(seed: int, tokens: int) -> torch.Tensor:
    return torch.randint(3, VOCAB, (tokens,), generator=torch.Generator().manual_seed(seed))


def _scores(model: GriffinModel, samples: list[Sample], *variants: Variant) -> dict[tuple[int, Variant | None], Score]:
    return {(score.sample, score.variant): score for score in simulate(model, samples, variants)}


@pytest.mark.parametrize("chunk", [None, 16])
@pytest.mark.parametrize("name", FAMILIES)
def test_it_equals_generation(checkpoints, name: str, chunk: int | None):
    """What the runtime generated is scored as it was when it was generated; four prompts of different lengths at once
    as each alone; past the windows of 16."""
    path = checkpoints(name)
    real = _load(path, density=0.5)
    samples, expected = [], []
    for number, tokens in enumerate((1, 20, 33, 40)):
        prompt = _ids(number, tokens)[None]
        output = real.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=12,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
        )
        samples.append(Sample(output.sequences[0], tokens))
        log_probs = torch.stack(output.logits)[:, 0].log_softmax(-1)
        expected.append(log_probs.gather(1, output.sequences[0, tokens:, None])[:, 0])
    model = _load(path, ff_chunk_tokens=chunk)
    together = _scores(model, samples, HALF)
    for number, sample in enumerate(samples):
        alone = _scores(model, [sample], HALF)[0, HALF]
        for score in (alone, together[number, HALF]):
            assert torch.allclose(score.log_probs, expected[number], atol=1e-5)
        assert together[number, HALF].activation_kept == pytest.approx(alone.activation_kept, abs=1e-5)


@pytest.mark.parametrize("name", ["llama2", "gemma", "opt", "demo"])
@pytest.mark.parametrize("method", ["topk", "magnitude", "random"])
def test_it_equals_a_masked_reference(checkpoints, name: str, method: str):
    """Statistic, magnitude and selection from the paper's formulas, on random and on trained weights; with a scored
    part of two tokens this is the class mode, in which only the last input position goes through the experts."""
    path = demo_directory() if name == "demo" else checkpoints(name)
    down = ARCHITECTURES["llama2" if name == "demo" else name].down
    dense = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    ids = _ids(7, 30)
    prompt = ids[None, :28]
    layers = dense.config.num_hidden_layers
    sets = []
    for layer, z in enumerate(collect_z(dense, down, prompt)):
        neurons = z.shape[-1]
        if method == "magnitude":
            block = dense.get_submodule(down.format(i=layer).rsplit(".", 1)[0])
            up = block.fc1.weight if name == "opt" else block.up_proj.weight
            scores = magnitude_float64(up, None if name == "opt" else block.gate_proj.weight)
        else:
            scores = statistic_float64(z[0])
        generator = torch.Generator().manual_seed(layer)
        sets.append(select_direct(scores, neurons // 2, method, generator))
    assert len(sets) == layers
    with masked_after_prefill(dense, down, sets), torch.no_grad():
        first = dense(prompt, use_cache=True)
        second = dense(ids[None, 28:29], past_key_values=first.past_key_values)
    expected = torch.stack([first.logits[0, -1], second.logits[0, -1]]).log_softmax(-1)
    variant = Variant(method, 0.5)
    model = _load(path, dtype="float32")
    score = _scores(model, [Sample(ids, 28)], variant)[0, variant]
    assert torch.allclose(score.log_probs, expected.gather(1, ids[28:, None])[:, 0], atol=2e-5)


@pytest.mark.parametrize("name", FAMILIES)
def test_density_one_and_the_full_row_are_the_dense_model(checkpoints, name: str):
    path = checkpoints(name)
    dense = AutoModelForCausalLM.from_pretrained(path)
    ids, all_of_it = _ids(1, 40), Variant("topk", 1.0)
    expected = dense_forward(dense, ids[None])[0, 24:-1].log_softmax(-1).gather(1, ids[25:, None])[:, 0]
    scores = _scores(_load(path), [Sample(ids, 25)], all_of_it, HALF)
    assert torch.allclose(scores[0, None].log_probs, expected, atol=1e-5)
    assert torch.equal(scores[0, all_of_it].log_probs, scores[0, None].log_probs)
    assert float(scores[0, all_of_it].kl.max()) < 1e-6
    assert float(scores[0, all_of_it].agrees.min()) == 1
    assert float(scores[0, HALF].kl.mean()) > 1e-3


def test_a_pass_serves_all_variants_and_leaves_nothing_behind(checkpoints):
    model = _load(checkpoints("llama2"))
    variants = [Variant(method, density) for method in ("topk", "output_aware", "sample") for density in (0.25, 0.75)]
    fetched = model._loaded.layers.fetched_bytes
    scores = _scores(model, [Sample(_ids(i, 40), 30) for i in range(3)], *variants)
    assert len(scores) == 3 * 7
    assert model._loaded.layers.fetched_bytes - fetched == model.plan.streamed_bytes
    for number in range(3):
        kept = [scores[number, Variant("topk", density)].activation_kept for density in (0.25, 0.75)]
        assert kept[0] < kept[1] < 1
    modules = list(model.model.modules())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in modules)


def test_an_interrupt_leaves_nothing_behind(checkpoints):
    model = _load(checkpoints("llama2"))
    sample = Sample(_ids(0, 40), 30)
    expected = _scores(model, [sample], HALF)[0, HALF].log_probs
    model.progress = lambda done, _: (_ for _ in ()).throw(KeyboardInterrupt) if done == 2 else None
    with pytest.raises(KeyboardInterrupt):
        list(simulate(model, [sample], [HALF]))
    model.progress = None
    assert not any(module._forward_pre_hooks for module in model.model.modules())
    assert torch.equal(_scores(model, [sample], HALF)[0, HALF].log_probs, expected)


def test_a_small_budget_takes_more_passes_and_too_small_a_one_refuses(checkpoints):
    path = checkpoints("llama2")
    samples = [Sample(_ids(i, 60), 40) for i in range(6)]
    wide = _load(path)
    expected = _scores(wide, samples, HALF)
    tight = _load(path, max_gpu_mem="1.3MB")
    fetched = tight._loaded.layers.fetched_bytes
    found = _scores(tight, samples, HALF)
    assert (tight._loaded.layers.fetched_bytes - fetched) // tight.plan.streamed_bytes in (2, 3, 6)
    assert all(torch.allclose(found[key].log_probs, expected[key].log_probs, atol=1e-5) for key in expected)
    with pytest.raises(DoesNotFit, match="needs"):
        _scores(_load(path, max_gpu_mem="500kB"), [Sample(_ids(0, 96), 40)], *[HALF] * 20)


def test_what_cannot_be_simulated(checkpoints):
    with pytest.raises(UsageError, match="prompt of 40"):
        Sample(_ids(0, 40), 40)
    with pytest.raises(UsageError, match="density"):
        Variant("topk", 1.5)
    model = GriffinModel.from_pretrained(checkpoints("llama2"), device="cpu", max_gpu_mem="1GB")
    with pytest.raises(UsageError, match="always_stream"):
        list(simulate(model, [Sample(_ids(0, 40), 30)], [HALF]))
