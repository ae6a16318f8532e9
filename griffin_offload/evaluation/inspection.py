"""The numbers behind the figures of `griffin-offload inspect`: one dictionary of JSON values per figure."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from griffin_offload.evaluation.flocking import (
    Corner,
    Observed,
    jaccard_by_chance,
    mean_jaccard,
    observe_sequences,
    permuted,
    share_of_chosen,
    share_of_largest,
    sorted_statistic,
    uniform,
)
from griffin_offload.method.selection import neurons_kept
from griffin_offload.method.statistic import split_tokens
from griffin_offload.runtime.model import GriffinModel
from griffin_offload.runtime.prefill import SHORT_PROMPT_TOKENS, Progress

Numbers = dict[str, Any]
OBSERVED = ("flocking", "jaccard", "inputs", "statistic")
"""Figures that come from one observed pass."""
INPUTS = ("original", "permuted", "random")
# Ranks of the sorted statistic that are kept.
_POINTS = 256
# At which density the figures of an input are taken: the paper's.
_HALF = 0.5


@dataclass(frozen=True)
class Look:
    """What an observed pass looks at."""

    figures: tuple[str, ...]
    layers: tuple[int, ...]
    """Of heatmaps."""
    features: int
    densities: tuple[float, ...]
    """Of Jaccard."""
    fixed: int
    """Tokens at the start of a window that every input has (BOS)."""
    seed: int


@dataclass(frozen=True)
class Seen:
    """By figure: numbers, and matrices abs(Zbar) [tokens, features] by input and layer."""

    numbers: dict[str, Numbers]
    heatmaps: dict[str, dict[str, dict[int, Tensor]]]


def look(model: GriffinModel, windows: Sequence[Tensor], what: Look, progress: Progress | None = None) -> Seen:
    """One observed pass over `windows`, ids [S] of one length, for all figures of `what`."""
    kinds = {"original": list(windows)}
    if "inputs" in what.figures:
        kinds |= _other_inputs(windows, what, model.model.config.vocab_size)
    sequences = [ids for kind in kinds.values() for ids in kind]
    firsts = tuple(range(0, len(sequences), len(windows)))
    shown = what.layers if {"flocking", "inputs"} & set(what.figures) else ()
    corner = Corner(shown, firsts, windows[0].numel(), what.features)
    found = observe_sequences(model, sequences, corner, progress)
    by_input = {kind: found[start : start + len(windows)] for kind, start in zip(kinds, firsts, strict=True)}
    makers = {"flocking": _flocking, "jaccard": _jaccard, "inputs": _inputs, "statistic": _statistic}
    numbers = {name: makers[name](by_input, what) for name in what.figures if name in makers}
    heatmaps = {"flocking": {"original": found[0].heatmaps}}
    heatmaps["inputs"] = {kind: observed[0].heatmaps for kind, observed in by_input.items()}
    return Seen(numbers, {name: heatmaps[name] for name in heatmaps if name in what.figures})


def prompt_loss(
    model: GriffinModel,
    ids: Tensor,
    densities: Sequence[float],
    planned: Sequence[float] | None = None,
    progress: Progress | None = None,
) -> Numbers:
    """What pruning would cost on one prompt, ids [T]: by layer and density the activation kept, of the whole prompt and
    held out (chosen on its first three quarters, measured on its last; None below SHORT_PROMPT_TOKENS). `planned` is
    one more density for each layer."""
    seen = observe_sequences(model, [ids], progress=progress)[0]
    tokens = (
        0
        if ids.numel() < SHORT_PROMPT_TOKENS
        else int(split_tokens(torch.ones(1, ids.numel(), dtype=torch.float32, device="cpu"))[0, 1].sum())
    )
    layers = []
    for layer, parts in enumerate(seen.parts):
        points = [*densities, *(planned[layer : layer + 1] if planned else ())]
        shares = {"kept": share_of_largest(seen.squared(layer), points)}
        if tokens:
            shares["held_out"] = share_of_chosen(parts[0], parts[1], points)
        own: Numbers = {"layer": layer, "neurons": parts.shape[1], "held_out": None, "planned_held_out": None}
        for name, values in shares.items():
            own |= {name: values[: len(densities)], f"planned_{name}": values[-1] if planned else None}
        layers.append(own)
    means = {name: _mean([layer[name] for layer in layers]) for name in ("planned_kept", "planned_held_out")}
    columns = {name: [layer[name] for layer in layers] for name in ("kept", "held_out")}
    return {
        "prompt_tokens": ids.numel(),
        "held_out_tokens": tokens,
        "densities": list(densities),
        **{
            name: [_mean(column) for column in zip(*rows, strict=True)] if rows[0] else None
            for name, rows in columns.items()
        },
        **means,
        "layers": layers,
    }


def _mean(values: Sequence[float | None]) -> float | None:
    """None where one of them is."""
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if len(known) == len(values) else None


def _other_inputs(windows: Sequence[Tensor], what: Look, vocabulary: int) -> dict[str, list[Tensor]]:
    generator = torch.Generator().manual_seed(what.seed)
    return {
        "permuted": [permuted(ids, what.fixed, generator) for ids in windows],
        "random": [uniform(ids, what.fixed, vocabulary, generator) for ids in windows],
    }


def _shares(observed: Sequence[Observed], layer: int) -> Numbers:
    """Means over sequences, at half of the neurons."""
    whole = [share_of_largest(sequence.squared(layer), [_HALF])[0] for sequence in observed]
    rest = [share_of_chosen(sequence.parts[layer][0], sequence.parts[layer][1], [_HALF])[0] for sequence in observed]
    return {"share_of_top_half": sum(whole) / len(whole), "held_out_share_of_top_half": sum(rest) / len(rest)}


def _stacked(observed: Sequence[Observed], layer: int) -> Tensor:
    return torch.stack([sequence.squared(layer) for sequence in observed])


def _flocking(by_input: dict[str, list[Observed]], what: Look) -> Numbers:
    first = by_input["original"][:1]
    layers = [{"layer": layer, **_shares(first, layer)} for layer in range(len(first[0].parts))]
    return {"tokens": first[0].tokens, "features": what.features, "shown": list(what.layers), "layers": layers}


def _jaccard(by_input: dict[str, list[Observed]], what: Look) -> Numbers:
    observed = by_input["original"]
    rows = []
    for layer in range(len(observed[0].parts)):
        squared = _stacked(observed, layer)
        for density in what.densities:
            rows.append(
                {
                    "layer": layer,
                    "density": density,
                    "kept": neurons_kept(squared.shape[1], density),
                    "jaccard": mean_jaccard(squared, density),
                    "by_chance": jaccard_by_chance(density),
                }
            )
    return {"windows": len(observed), "tokens": observed[0].tokens, "rows": rows}


def _inputs(by_input: dict[str, list[Observed]], what: Look) -> Numbers:
    rows = [
        {
            "input": kind,
            "layer": layer,
            **_shares(observed, layer),
            "jaccard": mean_jaccard(_stacked(observed, layer), _HALF),
        }
        for kind, observed in by_input.items()
        for layer in range(len(observed[0].parts))
    ]
    observed = by_input["original"]
    sizes = {"windows": len(observed), "tokens": observed[0].tokens, "features": what.features}
    return sizes | {"density": _HALF, "shown": list(what.layers), "rows": rows}


def _statistic(by_input: dict[str, list[Observed]], what: Look) -> Numbers:
    first = by_input["original"][0]
    layers = [
        {"layer": layer, "neurons": parts.shape[1], "s": sorted_statistic(first.squared(layer), _POINTS)}
        for layer, parts in enumerate(first.parts)
    ]
    return {"tokens": first.tokens, "layers": layers}
