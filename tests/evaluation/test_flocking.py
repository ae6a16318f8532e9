"""Flocking's numbers against dense transformers with hooks, and sets of Python."""

from itertools import combinations

import pytest
import torch
from reference import collect_z, statistic_float64
from tiny_models import ARCHITECTURES, VOCAB
from torch import Tensor
from transformers import AutoModelForCausalLM

from griffin_offload import GriffinModel
from griffin_offload.errors import DoesNotFit, UsageError
from griffin_offload.evaluation.inspection import (
    Corner,
    Look,
    jaccard_by_chance,
    look,
    mean_jaccard,
    observe_sequences,
    permuted,
    prompt_loss,
    share_of_chosen,
    share_of_largest,
    sorted_statistic,
    uniform,
)
from griffin_offload.evaluation.perplexity import Row, measure, measure_lengths
from griffin_offload.evaluation.simulation import observe
from griffin_offload.method.variants import Variant

LAYERS = range(3)


def _windows(count: int, tokens: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(5)
    return [torch.randint(3, VOCAB, (tokens,), generator=generator) for _ in range(count)]


def _model(checkpoints, name: str, **options: object) -> GriffinModel:
    options = {"max_gpu_mem": "200MB", "density": 0.0, "ctx_size": 64} | options
    return GriffinModel.from_pretrained(checkpoints(name), device="cpu", quantize="none", **options)


def _z(checkpoints, name: str, windows: list[Tensor]) -> list[Tensor]:
    """[N, S, F] of each layer."""
    dense = AutoModelForCausalLM.from_pretrained(checkpoints(name), dtype=torch.float32)
    return collect_z(dense, ARCHITECTURES[name].down, torch.stack(windows))


@pytest.mark.parametrize("name", ["llama2", "gemma2", "opt", "reglu"])
def test_observed_sequences(checkpoints, name: str):
    """Heatmaps and both parts of s^2, also where z is flattened (OPT), rows are zero (ReLU) and the FF is chunked."""
    windows = _windows(3, 21)
    corner = Corner((0, 2), (0, 2), 17, 50)
    options = {} if name == "opt" else {"ff_chunk_tokens": 5}
    with _model(checkpoints, name, **options) as model:
        found = observe_sequences(model, windows, corner)
    for layer, z in zip(LAYERS, _z(checkpoints, name, windows), strict=True):
        for own, sequence in zip(found, z, strict=True):
            expected = [statistic_float64(part) ** 2 for part in (sequence[:16], sequence[16:])]
            torch.testing.assert_close(own.parts[layer].double(), torch.stack(expected), atol=1e-5, rtol=1e-5)
            torch.testing.assert_close(own.squared(layer).double(), sum(expected), atol=1e-5, rtol=1e-5)
        for place in (0, 2):
            heatmaps = found[place].heatmaps
            assert sorted(heatmaps) == [0, 2]
            if layer in heatmaps:
                rows = [row / (row.norm() or 1) for row in z[place].double()]
                expected = torch.stack(rows).abs()[:17, :50]
                torch.testing.assert_close(heatmaps[layer].double(), expected, atol=1e-6, rtol=1e-4)
    assert found[1].heatmaps == {}


def test_a_budget_is_kept_by_more_passes(checkpoints):
    """Fewer sequences at once, the same numbers; one that never fits is refused with its numbers."""
    windows = _windows(8, 40)
    passes = []
    with _model(checkpoints, "llama2") as model:
        free = observe_sequences(model, windows, Corner((1,), (0,), 40, 128))
        fixed = model.plan.peak_bytes
    with _model(checkpoints, "llama2", max_gpu_mem=fixed + 200_000, always_stream=True) as tight:
        found = observe_sequences(tight, windows, Corner((1,), (0,), 40, 128), lambda *done: passes.append(done))
        with pytest.raises(DoesNotFit, match="one sample of 40 tokens"):
            observe(tight, windows, lambda *_: None, tables=10**6)
    assert passes[-1][0] == passes[-1][1] > len(LAYERS)
    for one, other in zip(free, found, strict=True):
        for layer in LAYERS:
            torch.testing.assert_close(one.parts[layer], other.parts[layer])


def test_prompts_to_observe_have_one_length(checkpoints):
    with _model(checkpoints, "llama2") as model, pytest.raises(UsageError, match="one length"):
        observe(model, [torch.arange(5), torch.arange(6)], lambda *_: None)


def test_jaccard_by_counting():
    squared = torch.rand(5, 40, generator=torch.Generator().manual_seed(0))
    for density in (0.1, 0.5, 0.9, 1.0):
        sets = [set(sorted(range(40), key=lambda j: -float(row[j]))[: int(40 * density)]) for row in squared]
        pairs = [len(a & b) / len(a | b) for a, b in combinations(sets, 2)]
        assert mean_jaccard(squared, density) == pytest.approx(sum(pairs) / len(pairs))
    assert mean_jaccard(squared, 0.0) == 1
    assert mean_jaccard(squared[:1], 0.5) is None


def test_jaccard_of_chance():
    """Of two random halves of many neurons, a third is common to both."""
    squared = torch.rand(20, 20000, generator=torch.Generator().manual_seed(0))
    for density in (0.25, 0.5):
        assert mean_jaccard(squared, density) == pytest.approx(jaccard_by_chance(density), abs=0.005)


def test_shares_by_summing():
    generator = torch.Generator().manual_seed(1)
    chooses, measured = torch.rand(30, generator=generator), torch.rand(30, generator=generator)
    order = sorted(range(30), key=lambda j: -float(chooses[j]))
    for density in (0.0, 0.3, 1.0):
        expected = sum(float(measured[j]) for j in order[: int(30 * density)]) / float(measured.sum())
        assert share_of_chosen(chooses, measured, [density]) == [pytest.approx(expected)]
    assert share_of_largest(torch.tensor([1.0, 6.0, 3.0, 0.0]), [0.25, 0.5]) == [pytest.approx(0.6), pytest.approx(0.9)]
    assert share_of_largest(torch.zeros(4), [0.5]) == [1.0]


def test_sorted_statistic():
    assert sorted_statistic(torch.tensor([4.0, 0.0, 16.0, 1.0]), 10) == [1.0, 0.5, 0.25, 0.0]
    assert len(sorted_statistic(torch.rand(1000), 10)) == 10
    assert sorted_statistic(torch.zeros(3), 10) == [0.0, 0.0, 0.0]


def test_other_inputs():
    ids, generator = torch.arange(100, 164), torch.Generator().manual_seed(0)
    shuffled = permuted(ids, 1, generator)
    assert shuffled[0] == 100
    assert sorted(shuffled.tolist()) == ids.tolist() != shuffled.tolist()
    drawn = uniform(torch.zeros(20001, dtype=torch.long), 1, 8, generator)
    assert drawn[0] == 0
    assert torch.bincount(drawn[1:], minlength=8).float() / 20000 == pytest.approx(torch.full((8,), 1 / 8), abs=0.01)


def test_figures_of_a_pass(checkpoints):
    """Every input is its own sequences', in the order in which they are observed."""
    windows = _windows(3, 20)
    what = Look(("flocking", "jaccard", "inputs", "statistic"), (1,), 128, (0.5,), 1, 0)
    with _model(checkpoints, "llama2") as model:
        seen = look(model, windows, what)
    generator = torch.Generator().manual_seed(0)
    others = {"permuted": [permuted(ids, 1, generator) for ids in windows]}
    others["random"] = [uniform(ids, 1, VOCAB, generator) for ids in windows]
    for kind, sequences in ({"original": windows} | others).items():
        z = _z(checkpoints, "llama2", sequences)
        rows = [row for row in seen.numbers["inputs"]["rows"] if row["input"] == kind]
        for layer, row in zip(LAYERS, rows, strict=True):
            squared = statistic_float64(z[layer]) ** 2
            shares = [float(own.sort().values[64:].sum() / 20) for own in squared]
            assert row["share_of_top_half"] == pytest.approx(sum(shares) / 3, abs=1e-5)
            assert row["jaccard"] == pytest.approx(mean_jaccard(squared.float(), 0.5))
        expected = (z[1][0] / z[1][0].norm(dim=-1, keepdim=True)).abs()
        torch.testing.assert_close(seen.heatmaps["inputs"][kind][1], expected, atol=1e-6, rtol=1e-4)
    assert [row["jaccard"] for row in seen.numbers["jaccard"]["rows"]] == [
        row["jaccard"] for row in seen.numbers["inputs"]["rows"][:3]
    ]
    s = statistic_float64(_z(checkpoints, "llama2", windows)[2][0]).sort(descending=True).values
    assert seen.numbers["statistic"]["layers"][2]["s"] == pytest.approx((s / s[0]).tolist(), abs=1e-5)


def test_the_loss_on_a_prompt_is_what_a_run_reports(checkpoints):
    ids = _windows(1, 40)[0]
    with _model(checkpoints, "llama2", density=0.5, always_stream=True) as model:
        numbers = prompt_loss(model, ids, [0.25, 0.5], [0.5, 0.25, 1.0])
        model.generate(ids[None], attention_mask=torch.ones(1, 40), max_new_tokens=1)
        report = model.last_prefill
    assert numbers["kept"][1] == pytest.approx(report.activation_kept, abs=1e-5)
    assert numbers["held_out"][1] == pytest.approx(report.activation_kept_heldout, abs=1e-5)
    first, second, third = numbers["layers"]
    assert first["planned_held_out"] == first["held_out"][1]
    assert second["planned_kept"] == second["kept"][0]
    assert third["planned_kept"] == pytest.approx(1)


def _values(row: Row) -> dict[str, float]:
    return {name: value for name, value in row.to_json().items() if name != "selection"}


def test_lengths_are_those_of_single_measurements(checkpoints):
    """One simulation of all prompt lengths gives what one per size does, on the tokens around the boundary."""
    windows, variants = _windows(4, 24 + 9), [Variant(0.5), Variant(0.25, "magnitude")]
    with _model(checkpoints, "llama2") as model:
        rows = measure_lengths(model, windows, [5, 24], [3, 9], variants)
        expected = [
            row
            for prompt in (5, 24)
            for tokens in (3, 9)
            for row in measure(model, [ids[24 - prompt : 24 + tokens] for ids in windows], prompt, variants)
        ]
    assert [row.selection for row in rows] == ["topk", "magnitude"] * 4
    for own, other in zip(rows, expected, strict=True):
        assert _values(own) == pytest.approx(_values(other), rel=1e-4)


def test_lengths_begin_with_what_a_model_needs(checkpoints):
    windows = _windows(2, 20)
    with _model(checkpoints, "gemma") as model:
        (row,) = measure_lengths(model, windows, [6], [14], [Variant(0.5)], first=[1])
        begun = [torch.cat([torch.tensor([1]), ids[1:]]) for ids in windows]
        (expected,) = measure(model, begun, 6, [Variant(0.5)])
    assert _values(row) == pytest.approx(_values(expected), rel=1e-4)
