"""Generation simulated: known continuations are scored as pruned models would, many at once in one streamed pass.

A prompt never sees what follows it. So in one teacher-forced forward prompt positions can pass the full FF and choose
neurons, and the positions behind them pass the same FF with all other neurons set to zero: each row of a batch with
neurons of its own, and each layer visited once for all of them. That equals generation with these experts, works for
models larger than the budget, and compares densities and selections side by side (METHOD: evaluation modes).
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from griffin_offload.config import WEIGHT_NORMS, SelectionMethod, check_density
from griffin_offload.errors import DoesNotFit, UsageError
from griffin_offload.method.selection import neurons_kept, select_neurons
from griffin_offload.method.statistic import share_kept
from griffin_offload.pricing import Usage
from griffin_offload.runtime.model import GriffinModel
from griffin_offload.runtime.prefill import StreamedPass
from griffin_offload.runtime.threads import limited_threads
from griffin_offload.weights.feedforward import FeedForward


@dataclass(frozen=True)
class Variant:
    """What the model is compared with: itself with a share of its neurons."""

    selection: SelectionMethod
    density: float

    def __post_init__(self) -> None:
        check_density(self.density)


@dataclass(frozen=True)
class Sample:
    """Ids [T]; the first `prompt_tokens` choose neurons, the rest is scored."""

    ids: Tensor
    prompt_tokens: int

    def __post_init__(self) -> None:
        if not 0 < self.prompt_tokens < self.ids.numel():
            raise UsageError(f"a sample of {self.ids.numel()} tokens cannot have a prompt of {self.prompt_tokens}")

    @property
    def scored_tokens(self) -> int:
        return self.ids.numel() - self.prompt_tokens


@dataclass(frozen=True)
class Score:
    """One sample under one variant (None: the full model); float32 [G] each. The first of the G predictions is the
    prompt's own, and therefore the full model's."""

    sample: int
    variant: Variant | None
    log_probs: Tensor
    """Of the tokens that really follow."""
    kl: Tensor
    """KL(full || variant) in nats."""
    agrees: Tensor
    """1 where both have the same first choice."""
    activation_kept: float
    """Share of s^2 / S of the prompt that the chosen neurons hold, mean over layers."""


def simulate(model: GriffinModel, samples: Sequence[Sample], variants: Sequence[Variant]) -> Iterator[Score]:
    """Scores of every sample under the full model and every variant, as they are ready.

    `model` has to stream all its layers (`always_stream=True`). Samples that score as many tokens go through together,
    as many as the budget allows; DoesNotFit if not even one does.
    """
    if len(model.plan.streamed) != len(model.plan.kept):
        raise UsageError("the simulation visits every layer in full: load the model with always_stream=True")
    by_length: dict[int, list[int]] = {}
    for number, sample in enumerate(samples):
        by_length.setdefault(sample.scored_tokens, []).append(number)
    for numbers in by_length.values():
        while numbers:
            batch = numbers[: _batch_size(model, [samples[n] for n in numbers], len(variants) + 1)]
            numbers = numbers[len(batch) :]
            yield from _simulate_batch(model, {n: samples[n] for n in batch}, variants)


def _batch_size(model: GriffinModel, samples: Sequence[Sample], rows_each: int) -> int:
    """Samples, the first of these, that fit the budget together."""
    count = len(samples)
    while True:
        longest = max(sample.ids.numel() for sample in samples[:count])
        scored = samples[0].scored_tokens
        # float32 log-probabilities of all rows are kept beside the logits.
        use = Usage(count * rows_each, longest, longest, "dynamic", logit_positions=scored, kept_scores=2 * scored)
        try:
            model._engine.require(use)
        except DoesNotFit:
            if count == 1:
                raise
            count //= 2
        else:
            return count


def _simulate_batch(model: GriffinModel, samples: dict[int, Sample], variants: Sequence[Variant]) -> Iterator[Score]:
    """One streamed pass; the rows are each sample's full model, then its variants."""
    scored, each = next(iter(samples.values())).scored_tokens, len(variants) + 1
    ids, mask = _padded(list(samples.values()), each, model.device)
    simulated = SimulatedPass(model, mask, scored, [None, *variants] * len(samples))
    log_probs = _forward(model, simulated, ids, mask, scored)
    kept = simulated.activation_kept
    for position, (number, sample) in enumerate(samples.items()):
        full = log_probs[position * each]
        targets = sample.ids[sample.prompt_tokens :].to(full.device)[:, None]
        for row in range(position * each, (position + 1) * each):
            own = log_probs[row]
            yield Score(
                sample=number,
                variant=simulated.variants[row],
                log_probs=own.gather(1, targets)[:, 0].cpu(),
                kl=(full.exp() * (full - own)).sum(-1).clamp(min=0).cpu(),
                agrees=(own.argmax(-1) == full.argmax(-1)).float().cpu(),
                activation_kept=kept[row],
            )


def _padded(samples: list[Sample], each: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Ids and mask [B, T], every sample `each` times, padded on the left."""
    length = max(sample.ids.numel() for sample in samples)
    ids = torch.zeros(len(samples), length, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, sample in enumerate(samples):
        ids[row, length - sample.ids.numel() :] = sample.ids
        mask[row, length - sample.ids.numel() :] = 1
    return ids.repeat_interleave(each, 0).to(device), mask.repeat_interleave(each, 0).to(device)


@torch.no_grad()
def _forward(model: GriffinModel, simulated: "SimulatedPass", ids: Tensor, mask: Tensor, scored: int) -> Tensor:
    """float32 log-probabilities [B, G, V] of the scored tokens: the positions before them predict them."""
    engine = model._engine
    inputs: dict[str, Any] = {"input_ids": ids, "use_cache": False}
    if not bool(mask.all()):
        inputs["attention_mask"] = mask
        if engine.takes("position_ids"):  # counted from the first token of a sample, as generate does
            inputs["position_ids"] = (mask.cumsum(-1) - 1).clamp(min=0)
    if engine.takes("logits_to_keep"):
        inputs["logits_to_keep"] = scored + 1
    with engine.alone(), limited_threads(model._loaded.threads), simulated:
        logits: Tensor = engine.stock_forward(**inputs, return_dict=True).logits
    return logits[:, -scored - 1 : -1].float().log_softmax(-1)


class SimulatedPass(StreamedPass):
    """A streamed pass whose last `scored` positions go through the neurons that a row's prompt chose.

    `mask` is [B, T], 0 for padding; `variants` has an entry per row, None for the full model.
    """

    def __init__(self, model: GriffinModel, mask: Tensor, scored: int, variants: Sequence[Variant | None]) -> None:
        prompt = mask.clone()
        prompt[:, -scored:] = 0
        super().__init__(model._loaded.layers, prompt[:, None].float(), choose=False, progress=model.progress)
        self.variants = list(variants)
        self._scored_from = mask.shape[1] - scored
        self._shares: list[list[float]] = [[] for _ in variants]
        self._masks: Tensor | None = None

    @property
    def activation_kept(self) -> list[float]:
        """Of each row, mean over layers."""
        return [math.fsum(shares) / len(shares) for shares in self._shares]

    def _layer_starts(self, index: int, *arguments: Any) -> None:
        super()._layer_starts(index, *arguments)
        self._index, self._masks = index, None

    def _add(self, block: FeedForward, module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
        """Sum the statistic of a chunk's prompt positions; mask what lies behind the prompt."""
        start = self._position
        super()._add(block, module, args)
        behind = max(self._scored_from - start, 0)
        if self._position <= self._scored_from:
            return None
        if self._masks is None:
            self._masks = self._row_masks(block)
        z = args[0].reshape(self._groups.shape[0], -1, block.neurons).clone()
        z[:, behind:] *= self._masks[:, None]
        return (z.reshape(args[0].shape), *args[1:])

    def _row_masks(self, block: FeedForward) -> Tensor:
        """[B, F] of 0 and 1: what each row keeps."""
        squared = self._squared[:, 0]
        masks = torch.ones(squared.shape, dtype=self._layers.stream.dtype, device=squared.device)
        for row, variant in enumerate(self.variants):
            if variant is None:
                self._shares[row].append(1.0)
                continue
            chosen = self._chosen(block, squared[row], variant)
            masks[row] = 0
            masks[row, chosen] = 1
            self._shares[row].append(float(share_kept(squared[row], chosen)))
        return masks

    def _chosen(self, block: FeedForward, squared: Tensor, variant: Variant) -> Tensor:
        generator = torch.Generator().manual_seed((self._layers.config.seed * 100_003 + self._index) % 2**63)
        norms = None
        if variant.selection in WEIGHT_NORMS:
            norms = (block.neuron_norms if variant.selection == "magnitude" else block.output_norms)(self._full)
        kept = neurons_kept(block.neurons, variant.density)
        return select_neurons(squared, kept, variant.selection, generator, norms)
