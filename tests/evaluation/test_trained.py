"""The paper's formulas on trained weights in the layouts of Llama, Gemma and OPT: what is chosen, and what follows.

The demo's feed-forward matrices, whose neurons differ in norm as those of random ones do not, are put into tiny models
of the other layouts (OPT: up and down alone, with ReLU). Everything else is written again in `direct.py`.
"""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers as hf
from evaluation.direct import gated, plain, simulated_directly
from marks import mostly_slow
from reference import collect_z, magnitude_float64, statistic_float64
from torch import Tensor

from griffin_offload import GriffinModel
from griffin_offload.demo import PROMPT, demo_directory
from griffin_offload.evaluation.samples import Sample
from griffin_offload.evaluation.simulation import simulate
from griffin_offload.method.variants import Variant

DENSITY, NEURONS = 0.5, 1024
DOWN = {
    "llama": "model.layers.{i}.mlp.down_proj",
    "gemma": "model.layers.{i}.mlp.down_proj",
    "opt": "model.decoder.layers.{i}.fc2",
}
WEIGHTS = {"llama": gated, "gemma": gated, "opt": plain}
_SIZES = {"vocab_size": 4096, "hidden_size": 128, "num_hidden_layers": 6, "num_attention_heads": 4}
_CONFIGS: dict[str, Callable[[], hf.PreTrainedConfig]] = {
    "gemma": lambda: hf.GemmaConfig(**_SIZES, intermediate_size=NEURONS, num_key_value_heads=2, head_dim=32),
    "opt": lambda: hf.OPTConfig(**_SIZES, ffn_dim=NEURONS, max_position_embeddings=256, word_embed_proj_dim=128),
}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """`trained(layout)` is the directory of a float32 model with the demo's feed-forward matrices."""
    demo = hf.AutoModelForCausalLM.from_pretrained(demo_directory(), dtype=torch.float32)
    written: dict[str, Path] = {}

    def directory(layout: str) -> Path:
        if layout not in written:
            written[layout] = tmp_path_factory.mktemp(layout) / "model"
            model = demo if layout == "llama" else _transplanted(layout, demo)
            model.save_pretrained(written[layout])
            for path in demo_directory().glob("tokenizer*"):
                shutil.copy(path, written[layout])
        return written[layout]

    return directory


@torch.no_grad()
def _transplanted(layout: str, demo: hf.PreTrainedModel) -> hf.PreTrainedModel:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = hf.AutoModelForCausalLM.from_config(_CONFIGS[layout](), dtype=torch.float32).eval()
    model.get_input_embeddings().weight.copy_(demo.get_input_embeddings().weight)
    for layer in range(6):
        theirs = gated(demo)(layer)
        for own, trained in zip(WEIGHTS[layout](model)(layer), theirs, strict=True):
            if own is not None:
                own.copy_(trained)
    return model


@torch.no_grad()
def _scores(selection: str, weights: Callable[[int], tuple[Tensor, ...]], layer: int, z: Tensor) -> Tensor:
    """The paper's, in float64: section 4.2, and ||W1_j|| * ||Wg_j|| or ||W1_j|| for the baseline."""
    up, gate, _ = weights(layer)
    return magnitude_float64(up, gate) if selection == "magnitude" else statistic_float64(z)


def _ids(directory: Path, tokens: int) -> Tensor:
    return torch.tensor(hf.AutoTokenizer.from_pretrained(directory)(PROMPT).input_ids[:tokens])


@pytest.mark.parametrize("layout", mostly_slow(DOWN, 1))
@pytest.mark.parametrize("selection", ["topk", "magnitude"])
def test_the_runtime_keeps_the_largest(trained, layout: str, selection: str):
    """No neuron that was left out scores more than one that was kept, by more than rounding."""
    path, ids = trained(layout), _ids(trained(layout), 60)
    dense = hf.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    options = {"density": DENSITY, "quantize": "none", "selection": selection, "ctx_size": 64}
    with GriffinModel.from_pretrained(path, device="cpu", max_gpu_mem="100MB", **options) as model:
        model.generate(ids[None], attention_mask=torch.ones(1, 60), max_new_tokens=1, do_sample=False)
        selected = model.selected
    assert sorted(selected) == list(range(6))
    for layer, z in enumerate(collect_z(dense, DOWN[layout], ids[None])):
        scores = _scores(selection, WEIGHTS[layout](dense), layer, z[0])
        kept = torch.zeros(NEURONS, dtype=torch.bool).index_fill(0, selected[layer], True)
        assert int(kept.sum()) == len(selected[layer]) == NEURONS // 2
        assert scores[kept].min() >= scores[~kept].max() * (1 - 1e-5)
        assert scores.max() > 1.2 * scores.min()  # there is something to choose


@pytest.mark.parametrize(("layout", "selection"), [("gemma", "topk"), ("opt", "magnitude")])
def test_generation_and_class_mode(trained, layout: str, selection: str):
    path, ids = trained(layout), _ids(trained(layout), 63)
    dense = hf.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)

    def kept(layer: int, z: Tensor) -> Tensor:
        return _scores(selection, WEIGHTS[layout](dense), layer, z).topk(NEURONS // 2).indices

    samples = [Sample.generation(ids[:50], ids[50:]), Sample.classification(ids[:60], ids[60:63])]
    with GriffinModel.from_pretrained(
        path, device="cpu", max_gpu_mem="100MB", density=0.0, quantize="none", ctx_size=64
    ) as model:
        found = simulate(model, samples, [Variant(DENSITY, selection)])
    for sample, scores in zip(samples, found, strict=True):
        expected = simulated_directly(dense, DOWN[layout], sample.ids[:-1], sample.prompt_tokens, kept)
        log_probs = expected[sample.scored_from - 1 :].gather(-1, sample.ids[sample.scored_from :, None])[:, 0]
        torch.testing.assert_close(scores.variants[0].log_probs, log_probs, atol=1e-4, rtol=1e-4)
        assert (scores.variants[0].log_probs != scores.full.log_probs).any()
