"""Flocking: how alike the tokens of a sequence are in the neurons they use, and sequences among each other (paper,
section 4.1 and figures 1, 2, 6 to 11).

Everything comes from one observed pass over sequences of one length. Of a layer only s^2 of two parts of a sequence is
kept, and of chosen layers a corner of the matrix that a picture shows. N sequences, S tokens, F neurons.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from griffin_offload.evaluation.simulation import observe
from griffin_offload.method.selection import neurons_kept
from griffin_offload.method.statistic import ROWS_AT_ONCE, split_tokens, squared_statistic
from griffin_offload.runtime.model import GriffinModel
from griffin_offload.runtime.prefill import Progress


@dataclass
class Observed:
    """One sequence of S tokens."""

    tokens: int
    parts: list[Tensor]
    """s^2 [2, F] of each layer: of the first three quarters of the tokens, and of the last."""
    heatmaps: dict[int, Tensor] = field(default_factory=dict)
    """abs(Zbar) [tokens, features] by layer: z of a token over its L2 norm."""

    def squared(self, layer: int) -> Tensor:
        """s^2 [F] of all tokens."""
        return self.parts[layer].sum(0)


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
    model: GriffinModel, sequences: Sequence[Tensor], corner: Corner | None = None, progress: Progress | None = None
) -> list[Observed]:
    """Run the full model over `sequences`, ids [S] of one length. Raises as `simulate` does."""
    corner = corner or Corner()
    neurons = [block.neurons for block in model.engine.loaded.layers.blocks]
    tokens = sequences[0].numel()
    found = [
        Observed(tokens, [torch.zeros(2, count, dtype=torch.float32, device="cpu") for count in neurons])
        for _ in sequences
    ]
    weights = split_tokens(torch.ones(1, tokens, dtype=torch.float32, device="cpu"))

    def look(layer: int, row: int, start: int, z: Tensor) -> None:
        part = weights[:, :, start : start + z.shape[0]].to(z.device)
        found[row].parts[layer] += squared_statistic(z[None], part)[0].cpu()
        if corner.holds(layer, row, start):
            shown = _directions(z[: corner.tokens - start], corner.features)
            rows = [found[row].heatmaps[layer], shown] if layer in found[row].heatmaps else [shown]
            found[row].heatmaps[layer] = torch.cat(rows)

    kept_bytes = corner.bytes if model.device.type == "cpu" else 0
    observe(model, sequences, look, tables=2, kept_bytes=kept_bytes, progress=progress)
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
