"""Teacher-forced simulation: what generation with chosen neurons would predict, for many samples and several variants
of the method, in as few streamed passes as the budget allows."""

import contextlib
import inspect
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from griffin_offload.blocks.states import looks_at_length, shares_entries
from griffin_offload.config import WEIGHT_NORMS
from griffin_offload.devices.threads import limited_threads
from griffin_offload.engine.layer_pass import DecoderLayers, Progress
from griffin_offload.engine.model import GriffinModel
from griffin_offload.errors import BudgetExceeded, UnsupportedModel, UsageError
from griffin_offload.evaluation.samples import Batch, Sample, Scores, columns_of, score_rows, stack_of, stock_head
from griffin_offload.evaluation.simulated_pass import NeuronChoice, Observer, PassSize, SimulatedPass, Sizer
from griffin_offload.method.selection import layer_generator, neurons_kept, share_kept
from griffin_offload.method.variants import Variant, choose, distribution, global_counts

# What each row of a simulated pass keeps: rows are samples times variants, the full model first.

Prior = Sequence[Tensor]
"""g^2 [F] of each layer: the mean over texts of s^2 / S."""
Counts = Mapping[float, Sequence[Sequence[int]]]
"""By density: neurons that each layer keeps, for each sample of a pass."""
FullSeen = Callable[[int, int, Tensor], object]
"""Called with the place of a sample, the first of some scored tokens, and the full model's log-probabilities [N, V]."""


class Choices:
    """Chooses for the rows of passes of one model. Norms of weights are computed when a layer passes for the first
    time; draws are those of a run with the same seed."""

    def __init__(self, layers: DecoderLayers, variants: Sequence[Variant], prior: Prior | None) -> None:
        if prior is None and any(variant.prior for variant in variants):
            raise UsageError("a variant fuses with a prior: measure one on other text with prompt_prior()")
        neurons = [block.neurons for block in layers.blocks]
        if not any(neurons) and any(variant.density < 1 for variant in variants):
            raise UsageError("the model has no feed-forward and no neurons to leave out: density 1 measures it")
        if prior is not None and [layer.numel() for layer in prior] != neurons:
            raise UsageError("the prior is another model's: its layers have other numbers of neurons")
        self._layers, self._variants, self._routed = layers, variants, any(block.active for block in layers.blocks)
        if self._routed and any(variant.compensate or variant.allocation == "global" for variant in variants):
            raise UnsupportedModel("experts have no means, and no threshold for all layers: leave out these variants")
        device = layers.stream.device.torch_device
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

    def __call__(self, layer: int, row: int, squared: Tensor, full: list[Tensor]) -> NeuronChoice | None:
        sample, place = divmod(row, self.rows_per_sample)
        if place == 0:
            return None
        variant, block = self._variants[place - 1], self._layers.blocks[layer]
        if self._routed and not block.active:
            return None  # beside experts, dense layers stay whole
        if variant.allocation == "global":
            kept = self._counts[variant.density][sample][layer]
        else:
            kept = neurons_kept(squared.numel(), variant.density)
        if kept < block.active:
            raise UsageError(
                f"density {variant.density:g} keeps {kept} of the {block.neurons} experts of layer {layer}, and a "
                f"token is sent to {block.active}"
            )
        chosen = choose(
            variant,
            squared,
            kept,
            layer_generator(self._layers.config.seed, layer),
            norms=self._norms_of(variant, layer, full),
            prior=None if self._prior is None else self._prior[layer],
        )
        mask = torch.zeros_like(squared, dtype=torch.bool).index_fill_(0, chosen, True)
        return NeuronChoice(mask, share_kept(squared, chosen), variant.compensate)

    def _norms_of(self, variant: Variant, layer: int, full: list[Tensor]) -> Tensor | None:
        if variant.selection not in WEIGHT_NORMS:
            return None
        key = variant.selection, layer
        if key not in self._norms:
            self._norms[key] = self._layers.blocks[layer].weight_norms(variant.selection, full)
        return self._norms[key]


@dataclass(frozen=True)
class Simulated:
    """One sample: the full model, and each variant in the order they were given."""

    full: Scores
    variants: tuple[Scores, ...]


def simulate(
    model: GriffinModel,
    samples: Sequence[Sample],
    variants: Sequence[Variant],
    *,
    prior: Prior | None = None,
    seen: FullSeen | None = None,
    progress: Progress | None = None,
) -> list[Simulated]:
    """Score every sample by the full model and by every variant, each sample with neurons of its own.

    Full layers are streamed in the precision they are stored in; attention, norms and head are the residents, in
    theirs. Which neurons are resident does not matter, and stays as it was. `prior` is for variants that fuse with one;
    `seen` is shown what the full model predicts.
    `progress` is called with (layers done, layers in all), over all passes. Raises UsageError for samples or variants
    that cannot be used, DoesNotFit when one sample alone needs more than the budget.
    """
    found: dict[int, Simulated] = {}
    with _running(model, variants, prior, progress) as simulation:
        for group in simulation.groups(samples):
            found |= zip(group.places, simulation.scores(group, seen), strict=True)
    return [found[place] for place in range(len(samples))]


def prompt_prior(model: GriffinModel, samples: Sequence[Sample], *, progress: Progress | None = None) -> list[Tensor]:
    """g^2 [F] of each layer, the mean of s^2 / S over the prompts of `samples`, for `simulate`."""
    totals: list[Tensor] = []
    with _running(model, (), None, progress) as simulation:
        for group in simulation.groups([_prompt_of(sample) for sample in samples]):
            sums = [distribution(layer).sum(0) for layer in simulation.statistics(group)]
            totals = [a + b for a, b in zip(totals, sums, strict=True)] if totals else sums
    return [layer / len(samples) for layer in totals]


def observe(
    model: GriffinModel,
    prompts: Sequence[Tensor],
    observer: Observer,
    *,
    tables: int = 0,
    kept_bytes: int = 0,
    norms: dict[int, Tensor] | None = None,
    progress: Progress | None = None,
) -> None:
    """Show `observer` the input z of every down projection, or of experts the norms of what each adds, while the full
    model runs over `prompts`, ids [T] of one length: it is called with (layer, place of the prompt, first token,
    z [t, F]). `tables` of F floats is what it keeps of each prompt in each layer, `kept_bytes` what it keeps besides.
    `norms` gets the norms [F] of the output columns of each layer's neurons. Raises as `simulate` does."""
    if len({ids.numel() for ids in prompts}) > 1:
        raise UsageError("prompts to observe have one length")
    samples = [Sample.prompt_alone(ids) for ids in prompts]
    with _running(model, (), None, progress, tables, kept_bytes) as simulation:
        for group in simulation.groups(samples):
            simulation.observe(group, observer, norms)


@dataclass(frozen=True)
class _Group:
    """Samples of one pass, and their places among all."""

    places: list[int]
    samples: list[Sample]
    size: PassSize


@contextlib.contextmanager
def _running(
    model: GriffinModel,
    variants: Sequence[Variant],
    prior: Prior | None,
    progress: Progress | None,
    observed_tables: int = 0,
    kept_bytes: int = 0,
) -> Iterator["_Simulation"]:
    """A simulation that is alone on the model; what was computed inside is checked against the budget afterwards."""
    loaded = model.engine.loaded
    simulation = _Simulation(model, variants, prior, progress, observed_tables, kept_bytes)
    with (
        model.engine.alone(),
        model.engine.guarded(),
        loaded.ledger.measuring(),
        limited_threads(loaded.threads),
        torch.no_grad(),
    ):
        yield simulation
    if loaded.ledger.peak_bytes > model.plan.budget_bytes:
        promise = f"the simulation reached {loaded.ledger.peak_bytes} bytes, {model.plan.budget_bytes} were allowed"
        warnings.warn(promise, BudgetExceeded, stacklevel=4)


class _Simulation:
    """Passes of one loaded model."""

    def __init__(
        self,
        model: GriffinModel,
        variants: Sequence[Variant],
        prior: Prior | None,
        progress: Progress | None,
        observed_tables: int,
        kept_bytes: int,
    ) -> None:
        engine = model.engine
        self._model, self._device, self._plan = model.model, model.device, model.plan
        self._layers, self._ledger = engine.loaded.layers, engine.loaded.ledger
        self._shape, self._progress, self._border = engine.shape, progress, engine.border
        self._choices = Choices(self._layers, variants, prior)
        self._check_stored(variants)
        self._stack = stack_of(self._model, self._layers.decoder)
        self._sizer = Sizer(
            engine.shape,
            engine.model_spec.request,
            model.plan,
            variants=self._choices.rows_per_sample,
            norm_tables=self._choices.tables,
            sample_tables=observed_tables + bool(self._choices.global_densities or not variants),
            kept_bytes=kept_bytes,
        )
        self._layers_done = self._layers_in_all = 0

    def _check_stored(self, variants: Sequence[Variant]) -> None:
        dense = self._layers.feed_forwards > len(self._layers.compact)
        if dense and not self._shape.precision.is_plain and any(v.selection in WEIGHT_NORMS for v in variants):
            raise UsageError(
                f"selection by norms needs the stored weights, and {self._plan.precision} ones are resident: load with "
                "a density below 1 or always_stream=True"
            )

    def groups(self, samples: Sequence[Sample]) -> list[_Group]:
        """The samples of each pass: as many as fit, of similar lengths."""
        if not samples:
            raise UsageError("there are no samples to simulate")
        longest = max(sample.input_tokens for sample in samples)
        if longest > self._shape.max_positions:
            raise UsageError(
                f"a sample of {longest} tokens is more than the model's context, {self._shape.max_positions}"
            )
        self._check_architecture(samples)
        order = sorted(range(len(samples)), key=lambda i: (samples[i].prompt_tokens, samples[i].input_tokens))
        groups = []
        while order:
            size = self._largest([samples[place] for place in reversed(order)])
            places = [order.pop() for _ in range(size.samples)]
            groups.append(_Group(places, [samples[place] for place in places], size))
        passes = 2 if self._choices.global_densities else 1
        self._layers_in_all = len(groups) * passes * len(self._layers.decoder)
        return groups

    def _check_architecture(self, samples: Sequence[Sample]) -> None:
        """UsageError where one forward over a prompt and what follows is not what generation computes."""
        config, border = self._model.config, self._border
        if shares_entries(config):
            raise UsageError(
                f"{config.model_type} has layers that read other layers' KV entries: they cannot be simulated a few "
                "rows at a time; run the model instead"
            )
        for sample in samples if border is not None else ():
            assert border is not None
            if not border.goes_on(sample.prompt_tokens, sample.prompt_tokens, sample.input_tokens):
                raise UsageError(
                    f"a sample of {sample.prompt_tokens} and {sample.input_tokens} tokens crosses {border.tokens}, "
                    f"where rope kind {border.kind} turns positions by other angles: keep to one side"
                )

    def _largest(self, samples: list[Sample]) -> PassSize:
        samples = Batch.unpadded(samples) if looks_at_length(self._model.config) else samples
        padded = samples[0].prompt_tokens != samples[-1].prompt_tokens
        size = self._sizer.largest(len(samples), columns_of(samples), padded=padded)
        if size is None:  # the longest prompt and the longest continuation may be two samples'
            size = self._sizer.largest(1, columns_of(samples[:1]), padded=False)
        if size is None:
            raise self._sizer.refuse(columns_of(samples[:1]))
        return size

    def scores(self, group: _Group, seen: FullSeen | None) -> list[Simulated]:
        """Scores of every sample of a pass, in its order."""
        self._choices.start(self._global_counts(group))
        batch, variants = Batch.of(group.samples), self._choices.rows_per_sample
        with self._holding(group.size):
            hidden, kept = self._forward(batch, group.size)
            found = []
            with stock_head(self._model, self._stack) as head:
                for row, sample in enumerate(batch.samples):
                    rows = slice(row * variants, (row + 1) * variants)
                    targets = sample.ids[sample.scored_from :].to(self._device)
                    own = hidden[rows, batch.scored_columns(row)]
                    shown = None if seen is None else partial(seen, group.places[row])
                    full, *others = score_rows(head, own, targets, kept[rows], group.size.positions_at_once, shown)
                    found.append(Simulated(full, tuple(others)))
        return found

    def statistics(self, group: _Group) -> list[Tensor]:
        """s^2 [samples, F] of each layer, of the prompts alone; by the full model, in host memory."""
        batch = Batch.of([_prompt_of(sample) for sample in group.samples])
        with self._holding(group.size), self._pass(batch, group.size, None) as simulated:
            self._run_stack(batch, 1)
        return simulated.sums

    def observe(self, group: _Group, observer: Observer, norms: dict[int, Tensor] | None) -> None:
        """Show `observer` every z, by the places of the samples, and fill `norms`."""

        def shown(layer: int, row: int, start: int, z: Tensor) -> None:
            observer(layer, group.places[row], start, z)

        batch = Batch.of(group.samples)
        with self._holding(group.size), self._pass(batch, group.size, None, shown, norms) as simulated:
            self._run_stack(batch, 1)
        self._ledger.hold(slots=simulated.peak_in_flight_bytes)
        self._ledger.hold(slots=0)

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

    def _pass(
        self,
        batch: Batch,
        size: PassSize,
        choices: Choices | None,
        observer: Observer | None = None,
        norms: dict[int, Tensor] | None = None,
    ) -> SimulatedPass:
        copies = 1 if choices is None else choices.rows_per_sample
        return SimulatedPass(
            self._layers,
            batch.mask.repeat_interleave(copies, 0).to(self._device),
            batch.prompt_columns,
            size.rows_at_once,
            choices,
            means=choices is not None and choices.means,
            keep=choices is None and observer is None,
            observe=observer,
            norms=norms,
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
        if self._progress is not None:
            self._progress(self._layers_done, self._layers_in_all)


def _prompt_of(sample: Sample) -> Sample:
    return Sample(sample.ids[: sample.prompt_tokens + 1], sample.prompt_tokens, 1)
