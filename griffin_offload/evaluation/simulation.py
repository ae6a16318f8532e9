"""Teacher-forced simulation: what generation with chosen neurons would predict, for many samples and several variants
of the method, in as few streamed passes as the budget allows."""

import contextlib
import inspect
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from griffin_offload.errors import BudgetExceeded, DoesNotFit, UsageError, one_line
from griffin_offload.evaluation.choices import Choices, Counts, Prior
from griffin_offload.evaluation.samples import Batch, Sample, columns_of
from griffin_offload.evaluation.scoring import score_rows, stack_of, stock_head
from griffin_offload.evaluation.simulated_pass import SimulatedPass
from griffin_offload.evaluation.size import PassSize, Sizer
from griffin_offload.method.variant import Variant, distribution, global_counts
from griffin_offload.runtime.model import GriffinModel
from griffin_offload.runtime.threads import limited_threads


@dataclass(frozen=True)
class Score:
    """One sample under one variant (None: the full model); float32 [G] each, in host memory."""

    sample: int
    variant: Variant | None
    log_probs: Tensor
    """Of the tokens that really follow."""
    kl: Tensor
    """KL(full || variant) in nats."""
    agrees: Tensor
    """1 where both have the same first choice."""
    greedy: Tensor
    """1 where the first choice is the token that really follows."""
    activation_kept: float
    """Share of s^2 / S of the prompt that the chosen neurons hold, mean over layers."""


def simulate(
    model: GriffinModel, samples: Sequence[Sample], variants: Sequence[Variant], *, prior: Prior | None = None
) -> Iterator[Score]:
    """Scores of every sample under the full model and every variant, in this order, as passes are ready; samples come
    as passes take them.

    Each sample has neurons of its own. Full layers are streamed in the precision they are stored in; attention, norms
    and head are the residents, in theirs. Which neurons are resident does not matter, and stays as it was. `model` has
    to stream all its layers (`always_stream=True`, or a density below 1); its `progress` is called with (layers done,
    layers in all) over all passes. `prior` is for variants that fuse with one. Raises UsageError for samples or
    variants that cannot be used, DoesNotFit when one sample alone needs more than the budget.
    """
    simulation = _Simulation(model, variants, prior)
    for group in simulation.groups(samples):
        with _running(model):
            scores = simulation.scores(group)
        yield from scores


def prompt_prior(model: GriffinModel, samples: Sequence[Sample]) -> list[Tensor]:
    """g^2 [F] of each layer, the mean of s^2 / S over the prompts of `samples`, for `simulate`."""
    simulation, totals = _Simulation(model, (), None), list[Tensor]()
    for group in simulation.groups([_prompt_of(sample) for sample in samples]):
        with _running(model):
            sums = [distribution(layer).sum(0) for layer in simulation.statistics(group)]
        totals = [a + b for a, b in zip(totals, sums, strict=True)] if totals else sums
    return [layer / len(samples) for layer in totals]


@dataclass(frozen=True)
class _Group:
    """Samples of one pass, and their places among all."""

    places: list[int]
    samples: list[Sample]
    size: PassSize


@contextlib.contextmanager
def _running(model: GriffinModel) -> Iterator[None]:
    """Alone on the model; what was computed inside is checked against the budget afterwards."""
    loaded = model.engine.loaded
    try:
        with model.engine.alone(), loaded.ledger.measuring(), limited_threads(loaded.threads), torch.no_grad():
            yield
    except torch.OutOfMemoryError as error:
        raise DoesNotFit(f"the device ran out of memory: {one_line(error)}") from error
    if loaded.ledger.peak_bytes > model.plan.budget_bytes:
        promise = f"the simulation reached {loaded.ledger.peak_bytes} bytes, {model.plan.budget_bytes} were allowed"
        warnings.warn(promise, BudgetExceeded, stacklevel=4)


class _Simulation:
    """Passes of one loaded model."""

    def __init__(self, model: GriffinModel, variants: Sequence[Variant], prior: Prior | None) -> None:
        if len(model.plan.streamed) != len(model.plan.kept):
            raise UsageError("the simulation visits every layer in full: load the model with always_stream=True")
        engine = self._engine = model.engine
        self._model, self._device, self._shape = model.model, model.device, engine.shape
        self._layers, self._ledger = engine.loaded.layers, engine.loaded.ledger
        self._variants, self._choices = variants, Choices(self._layers, variants, prior)
        self._stack = stack_of(self._model, self._layers.decoder)
        self._sizer = Sizer(
            engine.shape,
            engine.prospect.request,
            model.plan,
            variants=self._choices.rows_per_sample,
            norm_tables=self._choices.tables,
            sample_tables=1 if self._choices.global_densities or not variants else 0,
        )
        self._layers_done = self._layers_in_all = 0

    def groups(self, samples: Sequence[Sample]) -> list[_Group]:
        """The samples of each pass: as many as fit, of similar lengths."""
        if not samples:
            raise UsageError("there are no samples to simulate")
        longest = max(sample.input_tokens for sample in samples)
        if longest > self._shape.max_positions:
            raise UsageError(
                f"a sample of {longest} tokens is more than the model's context, {self._shape.max_positions}"
            )
        order = sorted(range(len(samples)), key=lambda i: (samples[i].prompt_tokens, samples[i].input_tokens))
        groups = []
        while order:
            size = self._largest([samples[place] for place in reversed(order)])
            places = [order.pop() for _ in range(size.samples)]
            groups.append(_Group(places, [samples[place] for place in places], size))
        passes = 2 if self._choices.global_densities else 1
        self._layers_in_all = len(groups) * passes * len(self._layers.decoder)
        return groups

    def _largest(self, samples: list[Sample]) -> PassSize:
        padded = samples[0].prompt_tokens != samples[-1].prompt_tokens
        size = self._sizer.largest(len(samples), columns_of(samples), padded=padded)
        if size is None:  # the longest prompt and the longest continuation may be two samples'
            size = self._sizer.largest(1, columns_of(samples[:1]), padded=False)
        if size is None:
            raise self._sizer.refuse(columns_of(samples[:1]))
        return size

    def scores(self, group: _Group) -> list[Score]:
        """Scores of every sample of a pass."""
        self._choices.start(self._global_counts(group))
        batch, each, found = Batch.of(group.samples), self._choices.rows_per_sample, []
        with self._holding(group.size):
            hidden, kept = self._forward(batch, group.size)
            with stock_head(self._model, self._stack) as head:
                for position, (place, sample) in enumerate(zip(group.places, group.samples, strict=True)):
                    rows = slice(position * each, (position + 1) * each)
                    own, targets = hidden[rows, batch.scored_columns(position)], sample.targets.to(self._device)
                    figures = score_rows(head, own, targets, group.size.positions_at_once)
                    rowwise = zip((None, *self._variants), figures, kept[rows], strict=True)
                    found += [Score(place, variant, *row, activation_kept=share) for variant, row, share in rowwise]
        return found

    def statistics(self, group: _Group) -> list[Tensor]:
        """s^2 [samples, F] of each layer, of the prompts alone; by the full model, in host memory."""
        batch = Batch.of([_prompt_of(sample) for sample in group.samples])
        with self._holding(group.size), self._pass(batch, group.size, None) as simulated:
            self._run_stack(batch, 1)
        assert simulated.sums is not None
        return simulated.sums

    def _global_counts(self, group: _Group) -> Counts:
        if not self._choices.global_densities:
            return {}
        by_layer = self.statistics(group)
        return {
            density: [global_counts([layer[i] for layer in by_layer], density) for i in range(len(group.samples))]
            for density in self._choices.global_densities
        }

    def _forward(self, batch: Batch, size: PassSize) -> tuple[Tensor, list[float]]:
        """(hidden states [R, T, H] behind the last norm, activation kept of each row)."""
        with self._pass(batch, size, self._choices) as simulated:
            hidden = self._run_stack(batch, self._choices.rows_per_sample)
        self._ledger.hold(slots=simulated.peak_in_flight_bytes)
        self._ledger.hold(slots=0)
        return hidden, simulated.activation_kept()

    def _pass(self, batch: Batch, size: PassSize, choices: Choices | None) -> SimulatedPass:
        copies = 1 if choices is None else choices.rows_per_sample
        return SimulatedPass(
            self._layers,
            batch.mask.repeat_interleave(copies, 0).to(self._device),
            batch.prompt_columns,
            size.rows_at_once,
            choices,
            means=choices is not None and choices.means,
            keep=choices is None,
            progress=self._layer_done,
        )

    def _run_stack(self, batch: Batch, copies: int) -> Tensor:
        def rows(tensor: Tensor) -> Tensor:
            return tensor.repeat_interleave(copies, 0).to(self._device)

        arguments = {"input_ids": rows(batch.ids), "use_cache": False, "return_dict": True}
        if batch.padded:
            arguments["attention_mask"] = rows(batch.mask)
            if "position_ids" in inspect.signature(self._stack.forward).parameters:  # BLOOM counts from the mask
                arguments["position_ids"] = rows(batch.positions)
        hidden: Tensor = self._stack(**arguments).last_hidden_state
        return hidden

    @contextlib.contextmanager
    def _holding(self, size: PassSize) -> Iterator[None]:
        try:
            self._ledger.hold(**size.parts)
            yield
        finally:
            self._ledger.hold(**dict.fromkeys(size.parts, 0))

    def _layer_done(self, done: int, _: int) -> None:
        self._layers_done += 1
        if self._engine.progress is not None:
            self._engine.progress(self._layers_done, self._layers_in_all)


def _prompt_of(sample: Sample) -> Sample:
    return Sample(sample.ids[: sample.prompt_tokens + 1], sample.prompt_tokens, 1)
