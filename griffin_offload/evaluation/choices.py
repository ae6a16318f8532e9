"""What each row of a simulated pass keeps: rows are samples times variants, the full model first."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from griffin_offload.config import WEIGHT_NORMS
from griffin_offload.errors import UsageError
from griffin_offload.evaluation.simulated_pass import Choice
from griffin_offload.method.selection import layer_generator, neurons_kept
from griffin_offload.method.statistic import share_kept
from griffin_offload.method.variant import Variant, choose
from griffin_offload.runtime.prefill import StreamedLayers

Prior = Sequence[Tensor]
"""g^2 [F] of each layer: the mean over texts of s^2 / S."""
Counts = Mapping[float, Sequence[Sequence[int]]]
"""By density: neurons that each layer keeps, for each sample of a pass."""


class Choices:
    """Chooses for the rows of passes of one model. Norms of weights are computed when a layer passes for the first
    time; draws are those of a run with the same seed."""

    def __init__(self, layers: StreamedLayers, variants: Sequence[Variant], prior: Prior | None) -> None:
        if prior is None and any(variant.prior for variant in variants):
            raise UsageError("a variant fuses with a prior: measure one on other text with prompt_prior()")
        neurons = [block.neurons for block in layers.blocks]
        if prior is not None and [layer.numel() for layer in prior] != neurons:
            raise UsageError("the prior is another model's: its layers have other numbers of neurons")
        self._layers, self._variants = layers, variants
        device = layers.stream.device
        self._prior = None if prior is None else [layer.to(device) for layer in prior]
        self._norms: dict[tuple[str, int], Tensor] = {}
        self._counts: Counts = {}

    @property
    def rows_per_sample(self) -> int:
        return len(self._variants) + 1

    @property
    def tables(self) -> int:
        """Tables of one float per neuron that outlive a pass."""
        kinds = {variant.selection for variant in self._variants} & set(WEIGHT_NORMS)
        return len(kinds) + (self._prior is not None)

    @property
    def global_densities(self) -> set[float]:
        """Those of which a layer's number depends on all layers' statistics."""
        return {variant.density for variant in self._variants if variant.allocation == "global"}

    @property
    def means(self) -> bool:
        return any(variant.compensate for variant in self._variants)

    def start(self, counts: Counts) -> None:
        """Begin a pass; `counts` for `global_densities`."""
        self._counts = counts

    def __call__(self, layer: int, row: int, squared: Tensor, full: list[Tensor]) -> Choice | None:
        sample, place = divmod(row, self.rows_per_sample)
        if place == 0:
            return None
        variant = self._variants[place - 1]
        if variant.allocation == "global":
            kept = self._counts[variant.density][sample][layer]
        else:
            kept = neurons_kept(squared.numel(), variant.density)
        chosen = choose(
            variant,
            squared,
            kept,
            layer_generator(self._layers.config.seed, layer),
            norms=self._norms_of(variant, layer, full),
            prior=None if self._prior is None else self._prior[layer],
        )
        mask = torch.zeros_like(squared, dtype=torch.bool).index_fill_(0, chosen, True)
        return Choice(mask, share_kept(squared, chosen), variant.compensate)

    def _norms_of(self, variant: Variant, layer: int, full: list[Tensor]) -> Tensor | None:
        if variant.selection not in WEIGHT_NORMS:
            return None
        key = variant.selection, layer
        if key not in self._norms:
            block = self._layers.blocks[layer]
            of_weights = block.neuron_norms if variant.selection == "magnitude" else block.output_norms
            self._norms[key] = of_weights(full)
        return self._norms[key]
