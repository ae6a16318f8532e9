"""The numbers behind the figures of `griffin-offload inspect`: one dictionary of JSON values per figure."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from griffin_offload.engine.layer_pass import Progress
from griffin_offload.engine.model import GriffinModel
from griffin_offload.engine.prefill import SHORT_PROMPT_TOKENS
from griffin_offload.evaluation.simulation import observe
from griffin_offload.method.allocation import Counts, bits_gained, distortion_of
from griffin_offload.method.selection import ROWS_AT_ONCE, neurons_kept, split_tokens, squared_statistic

# Flocking: how alike the tokens of a sequence are in the neurons they use, and sequences among each other (paper,
# section 4.1 and figures 1, 2, 6 to 11).


@dataclass
class Observed:
    """One sequence of S tokens."""

    tokens: int
    parts: list[Tensor]
    """s^2 [2, F] of each layer: of the first three quarters of the tokens, and of the last."""
    used: list[Tensor]
    """Of each layer, how many tokens each of its neurons [F] has answered to: of experts, those sent to it."""
    heatmaps: dict[int, Tensor] = field(default_factory=dict)
    """abs(Zbar) [tokens, features] by layer: z of a token over its L2 norm."""
    norms: dict[int, Tensor] = field(default_factory=dict)
    """Of the output columns [F] of each layer's neurons, where they were asked for."""

    @property
    def layers(self) -> list[int]:
        """Those that have a feed-forward."""
        return [layer for layer, parts in enumerate(self.parts) if parts.numel()]

    def squared(self, layer: int) -> Tensor:
        """s^2 [F] of all tokens."""
        return self.parts[layer].sum(0)

    def energies(self, layer: int) -> Tensor:
        """s^2 ||W2||^2 [F]: what neurons add to the output."""
        return self.squared(layer) * self.norms[layer].square()


@dataclass(frozen=True)
class Corner:
    """What a heatmap shows: the first tokens and features of some layers, for some of the sequences."""

    layers: tuple[int, ...] = ()
    sequences: tuple[int, ...] = ()
    tokens: int = 512
    features: int = 512

    @property
    def bytes(self) -> int:
        """Of all heatmaps, and of one that is made longer."""
        return (len(self.layers) * len(self.sequences) + 1) * self.tokens * self.features * 4 if self.layers else 0

    def holds(self, layer: int, sequence: int, start: int) -> bool:
        return layer in self.layers and sequence in self.sequences and start < self.tokens


def observe_sequences(
    model: GriffinModel,
    sequences: Sequence[Tensor],
    corner: Corner | None = None,
    progress: Progress | None = None,
    norms: dict[int, Tensor] | None = None,
) -> list[Observed]:
    """Run the full model over `sequences`, ids [S] of one length; `norms`, if given, are filled. Raises as `simulate`
    does."""
    corner = corner or Corner()
    neurons = [block.neurons for block in model.engine.loaded.layers.blocks]
    tokens = sequences[0].numel()
    found = [
        Observed(
            tokens,
            [torch.zeros(2, count, dtype=torch.float32, device="cpu") for count in neurons],
            [torch.zeros(count, dtype=torch.float32, device="cpu") for count in neurons],
        )
        for _ in sequences
    ]
    weights = split_tokens(torch.ones(1, tokens, dtype=torch.float32, device="cpu"))

    def look(layer: int, row: int, start: int, z: Tensor) -> None:
        part = weights[:, :, start : start + z.shape[0]].to(z.device)
        found[row].parts[layer] += squared_statistic(z[None], part)[0].cpu()
        found[row].used[layer] += (z != 0).sum(0).cpu()
        if corner.holds(layer, row, start):
            shown = _directions(z[: corner.tokens - start], corner.features)
            rows = [found[row].heatmaps[layer], shown] if layer in found[row].heatmaps else [shown]
            found[row].heatmaps[layer] = torch.cat(rows)

    kept_bytes = corner.bytes if model.hardware.shares_host_memory else 0
    tables = 3 + (norms is not None)
    observe(model, sequences, look, tables=tables, kept_bytes=kept_bytes, norms=norms, progress=progress)
    for one in found:
        one.norms = norms or {}
    return found


def _directions(z: Tensor, features: int) -> Tensor:
    """abs(Zbar) [t, features] in host memory, for z [t, F]; a row that is all zero stays so."""
    chunks = []
    for chunk in z.split(ROWS_AT_ONCE):
        norms = chunk.float().norm(dim=-1, keepdim=True)
        chunks.append((chunk[:, :features].float().abs() / torch.where(norms > 0, norms, 1)).cpu())
    return torch.cat(chunks)


def share_of_largest(squared: Tensor, densities: Sequence[float]) -> list[float]:
    """The share of s^2 / S that the top-k neurons hold, for each density; 1 where nothing fired. `squared` is [F]."""
    return share_of_chosen(squared, squared, densities)


def share_of_chosen(chooses: Tensor, measured: Tensor, densities: Sequence[float]) -> list[float]:
    """The share of one statistic, s^2 [F], that the top-k neurons of another hold, for each density."""
    running = torch.nn.functional.pad(measured[chooses.argsort(descending=True)].double().cumsum(0), (1, 0))
    if running[-1] == 0:
        return [1.0] * len(densities)
    kept = [neurons_kept(measured.numel(), density) for density in densities]
    shares: list[float] = (running[kept] / running[-1]).tolist()
    return shares


def mean_jaccard(squared: Tensor, density: float) -> float | None:
    """Mean over all pairs of N sequences of |A and B| / |A or B| of their top-k sets; `squared` is s^2 [N, F]. None
    where there is no pair; 1 for empty sets."""
    count, kept = len(squared), neurons_kept(squared.shape[1], density)
    if count < 2:
        return None
    if kept == 0:
        return 1.0
    chosen = torch.zeros_like(squared).scatter_(1, squared.topk(kept, dim=1).indices, 1.0)
    pairs = torch.triu_indices(count, count, offset=1, dtype=torch.long, device=chosen.device)
    common = (chosen @ chosen.T)[pairs.unbind()].double()
    return float((common / (2 * kept - common)).mean())


def jaccard_by_chance(density: float) -> float:
    """What two independent sets of the same size have in expectation, for many neurons."""
    return density / (2 - density) if density else 1.0


def sorted_statistic(squared: Tensor, points: int) -> list[float]:
    """s from large to small, scaled to [0, 1] by its largest, at `points` evenly spaced ranks; `squared` is [F]."""
    s = squared.sqrt().sort(descending=True).values
    count = s.numel()
    ranks = torch.linspace(0, count - 1, min(points, count), dtype=torch.float32, device=s.device).round().long()
    largest = s[0] if s[0] > 0 else s.new_ones(())
    values: list[float] = (s[ranks] / largest).tolist()
    return values


def permuted(ids: Tensor, fixed: int, generator: torch.Generator) -> Tensor:
    """The same tokens in another order; the first `fixed` stay (BOS)."""
    order = torch.randperm(ids.numel() - fixed, generator=generator, dtype=torch.long, device="cpu") + fixed
    return torch.cat([ids[:fixed], ids[order]])


def uniform(ids: Tensor, fixed: int, vocabulary: int, generator: torch.Generator) -> Tensor:
    """As many tokens, each drawn uniformly from the vocabulary; the first `fixed` stay."""
    drawn = torch.randint(vocabulary, (ids.numel() - fixed,), generator=generator, dtype=torch.long, device="cpu")
    return torch.cat([ids[:fixed], drawn])


Numbers = dict[str, Any]
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


def enough_for_a_token(model: GriffinModel, densities: Sequence[float]) -> list[float]:
    """Those of `densities` that keep as many experts as a token is sent to; of neurons, all."""
    least = max((block.active / block.neurons for block in model.engine.blocks if block.neurons), default=0.0)
    return [density for density in densities if density >= least]


def prompt_loss(
    model: GriffinModel,
    ids: Tensor,
    densities: Sequence[float],
    planned: Sequence[float] | None = None,
    progress: Progress | None = None,
    levels: tuple[Sequence[Counts], Sequence[float]] | None = None,
) -> Numbers:
    """What pruning would cost on one prompt, ids [T]: by layer and density the activation kept, of the whole prompt and
    held out (chosen on its first three quarters, measured on its last; None below SHORT_PROMPT_TOKENS). `planned` is
    one more density for each layer, `levels` its counts and the distortions of their formats, of which `planned_error`
    is made. `bits_gained` is what tiers save at equal error. Of mixtures of experts, their layers alone, and how often
    each expert is used. `measured_in` is the precision of the full model that was asked, whatever a plan rests in."""
    active = [block.active for block in model.engine.blocks]
    routed = [layer for layer, count in enumerate(active) if count]
    densities = enough_for_a_token(model, densities)
    seen = observe_sequences(model, [ids], progress=progress, norms=None if routed else {})[0]
    tokens = (
        0
        if ids.numel() < SHORT_PROMPT_TOKENS
        else int(split_tokens(torch.ones(1, ids.numel(), dtype=torch.float32, device="cpu"))[0, 1].sum())
    )
    layers = []
    for layer in routed or seen.layers:
        parts = seen.parts[layer]
        points = [*densities, *(planned[layer : layer + 1] if planned else ())]
        shares = {"kept": share_of_largest(seen.squared(layer), points)}
        if tokens:
            shares["held_out"] = share_of_chosen(parts[0], parts[1], points)
        own: Numbers = {"layer": layer, "neurons": parts.shape[1], "held_out": None, "planned_held_out": None}
        for name, values in shares.items():
            own |= {name: values[: len(densities)], f"planned_{name}": values[-1] if planned else None}
        if routed:
            own |= _use_of_experts(seen, layer, active[layer], planned[layer] if planned else None)
        layers.append(own)
    means = {name: _mean([layer[name] for layer in layers]) for name in ("planned_kept", "planned_held_out")}
    columns = {name: [layer[name] for layer in layers] for name in ("kept", "held_out")}
    return {
        "unit": "experts" if routed else "neurons",
        "measured_in": model.plan.precision,
        "prompt_tokens": ids.numel(),
        "held_out_tokens": tokens,
        "densities": list(densities),
        **{
            name: [_mean(column) for column in zip(*rows, strict=True)] if rows[0] else None
            for name, rows in columns.items()
        },
        **means,
        "planned_error": None if routed or levels is None else _mean([_error(seen, i, *levels) for i in seen.layers]),
        "bits_gained": None if routed else _mean([bits_gained(seen.energies(i)) for i in seen.layers]),
        "layers": layers,
    }


def _error(seen: Observed, layer: int, counts: Sequence[Counts], distortions: Sequence[float]) -> float:
    """Squared, of what a layer's FF gives, relative to that, where s says which neurons are on which level."""
    return distortion_of(seen.energies(layer), counts[layer], distortions, seen.squared(layer))


def _use_of_experts(seen: Observed, layer: int, active: int, planned: float | None) -> Numbers:
    """To how many experts a token is sent, the share of tokens that is sent to each, and which ones would stay."""
    squared = seen.squared(layer)
    stay = None if planned is None else squared.topk(neurons_kept(squared.numel(), planned)).indices.sort().values
    used = (seen.used[layer] / seen.tokens).tolist()
    return {"active": active, "used": used, "stay": None if stay is None else stay.tolist()}


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
    layers = [{"layer": layer, **_shares(first, layer)} for layer in first[0].layers]
    return {"tokens": first[0].tokens, "features": what.features, "shown": list(what.layers), "layers": layers}


def _jaccard(by_input: dict[str, list[Observed]], what: Look) -> Numbers:
    observed = by_input["original"]
    rows = []
    for layer in observed[0].layers:
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
        for layer in observed[0].layers
    ]
    observed = by_input["original"]
    sizes = {"windows": len(observed), "tokens": observed[0].tokens, "features": what.features}
    return sizes | {"density": _HALF, "shown": list(what.layers), "rows": rows}


def _statistic(by_input: dict[str, list[Observed]], what: Look) -> Numbers:
    first = by_input["original"][0]
    layers = [
        {"layer": layer, "neurons": squared.numel(), "s": sorted_statistic(squared, _POINTS)}
        for layer in first.layers
        for squared in [first.squared(layer)]
    ]
    return {"tokens": first.tokens, "layers": layers}
