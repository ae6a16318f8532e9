"""The paper's order on real text: the demo model on a children's book (public domain) that it was not trained on."""

from pathlib import Path

import pytest

from griffin_offload import GriffinModel
from griffin_offload.demo import demo_directory
from griffin_offload.evaluation.inspection import Look, look
from griffin_offload.evaluation.perplexity import measure, measure_lengths
from griffin_offload.evaluation.samples import read_documents, take_windows, tokenize
from griffin_offload.method.variants import Variant

TEXT = Path(__file__).parents[1] / "data" / "books_kids.txt"


@pytest.fixture(scope="module")
def model():
    with GriffinModel.from_pretrained(
        demo_directory(), device="cpu", max_gpu_mem="200MB", density=0.0, quantize="none", ctx_size=320, threads=1
    ) as model:
        yield model


def _windows(model: GriffinModel, tokens: int, count: int):
    return take_windows(tokenize(read_documents(TEXT), model.tokenizer), tokens, count, "even")


def test_the_statistic_beats_norms_and_chance(model):
    methods = ("topk", "output_aware", "magnitude", "random")
    variants = [Variant(density, method) for density in (0.75, 0.5) for method in methods]
    rows = measure(model, _windows(model, 192, 4), 128, variants)
    loss = {(row.selection, row.density): row.increase for row in rows}
    for density in (0.75, 0.5):
        assert 0 < loss["topk", density] < min(loss["magnitude", density], loss["random", density])
    assert loss["topk", 0.75] < loss["topk", 0.5]
    assert loss["topk", 0.5] < 0.6 * loss["random", 0.5]
    assert loss["topk", 0.5] < 0.5 * loss["magnitude", 0.5]
    assert loss["output_aware", 0.5] < loss["topk", 0.5]


@pytest.mark.slow
def test_longer_prompts_lose_less_and_longer_generations_more(model):
    rows = measure_lengths(model, _windows(model, 320, 24), [16, 64, 192], [32, 128], [Variant(0.5)])
    loss = {(row.prompt_tokens, row.generate_tokens): row.increase for row in rows}
    for tokens in (32, 128):
        assert loss[16, tokens] > 1.2 * loss[64, tokens]
        assert loss[64, tokens] > 1.2 * loss[192, tokens]
    assert loss[64, 128] > loss[64, 32]


def test_text_flocks_also_without_its_order(model):
    """Far above chance within a window, held out, and between windows; below 1, so that a choice matters."""
    seen = look(model, _windows(model, 256, 6), Look(("inputs",), (), 1, (0.5,), 0, 0))
    for row in seen.numbers["inputs"]["rows"]:
        assert row["held_out_share_of_top_half"] > 0.7
        assert 0.5 < row["jaccard"] < 0.95
