"""Neurons in several formats: for every number of bytes how many a layer has of each.

Either whole layers are of one format, so that nothing has to be chosen for a prompt, or the prompt says which neurons
of a layer have how many bits. The second loses less in the same bits, from int4 on down, but a prompt has to pass
through slots, for which the first has bits instead.

Nothing is known of a model before a weight is read, so that energies are taken as typical: every layer of a width has
the same counts. Measured ones gave no better answers (benchmarks/NOTES.md).
"""

import functools
import math
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from typing import Any, Literal

from griffin_offload.blocks.sizes import ModelSizes
from griffin_offload.config import MIN_AUTO_DENSITY, NEURON_MULTIPLE
from griffin_offload.errors import UsageError
from griffin_offload.method.allocation import Allocation, Counts, Level, distortion_of, typical_energies

_KL_OF_ERROR = 8.0
"""KL per token of small trained models to their 16 bit, by expected error: seven to nine times it
(docs/benchmarks.md)."""
_KL_OF_OTHERS = 0.0018
"""What attention, embeddings and head add in int8 or less: of the two models whole in int8, .0030 to .0043 and .0034 in
the mean (benchmarks/results/real_models-*.md), what eight times the error of the FFs leaves. In int4 and less it is
within what that factor was measured with."""

_SECOND_ROUNDING = 0.0003
"""Squared error of numbers that are taken over with the grids of their file (benchmarks/NOTES.md)."""


def expected_kl(error: float, *, quantised: bool) -> float:
    """What the KL divergence of answers to those in 16 bit is about, in nats per token: one digit, as no more is
    known. `error` is of FFs; `quantised` says whether the rest is in fewer than 16 bits, too. Larger models than those
    of a few hundred million parameters lose less."""
    return float(f"{_KL_OF_ERROR * error + _KL_OF_OTHERS * quantised:.1g}")


def is_quantised(shape: ModelSizes) -> bool:
    """Whether what is no neuron rests in fewer bits than it is stored in, as neurons do."""
    return not all(format.is_plain for format in shape.levels)


class TierChoices(Sequence[tuple[Counts, ...]]):
    """Counts of all layers, ascending in bytes, down to the smallest share of neurons that a plan may keep."""

    def __init__(self, shape: ModelSizes) -> None:
        self._shape, layers = shape, [shape.layers[index] for index in shape.with_neurons]
        levels = [
            [
                Level(size.neuron_bytes, format.distortion)
                for size, format in zip(layer.levels, shape.levels, strict=True)
            ]
            for layer in layers
        ]
        block = max(NEURON_MULTIPLE, *(size.multiple for layer in layers for size in layer.levels))
        self.allocation = Allocation([typical_energies(layer.neurons) for layer in layers], levels, block)
        least = math.ceil(sum(layer.neurons for layer in layers) * MIN_AUTO_DENSITY)
        self.first = bisect_left(range(len(self.allocation)), least, key=lambda i: sum(map(sum, self.allocation[i])))

    def __len__(self) -> int:
        return len(self.allocation) - self.first

    def __getitem__(self, index: Any) -> Any:
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        return _in_all_layers(self._shape, self.allocation[self.first + index % len(self)])


def _in_all_layers(shape: ModelSizes, counts: Sequence[Counts]) -> tuple[Counts, ...]:
    """`counts` of the layers with neurons, and none of the others'."""
    own = dict(zip(shape.with_neurons, counts, strict=True))
    return tuple(own.get(index, (0,) * len(shape.levels)) for index in range(len(shape.layers)))


class LayerChoices(Sequence[tuple[Counts, ...]]):
    """The same of whole layers, all but those that are in the next lower format in one: the last layer is raised first,
    whose errors no other makes less of, then from the first one on."""

    def __init__(self, shape: ModelSizes) -> None:
        self._shape, self._levels = shape, len(shape.levels)
        self._neurons = [shape.layers[index].neurons for index in shape.with_neurons]

    def __len__(self) -> int:
        return len(self._neurons) * (self._levels - 1)

    def __getitem__(self, index: Any) -> Any:
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        last = len(self._neurons) - 1
        raised, others = divmod(index % len(self), last + 1)
        lower = self._levels - 1 - raised
        on_level = [lower - (layer in (last, *range(others))) for layer in range(last + 1)]
        counts = [
            tuple(count * (level == own) for level in range(self._levels))
            for count, own in zip(self._neurons, on_level, strict=True)
        ]
        return _in_all_layers(self._shape, counts)


@functools.lru_cache(maxsize=8)
def tiered_choices(shape: ModelSizes) -> Sequence[tuple[Counts, ...]]:
    """All that a plan considers."""
    return LayerChoices(shape) if shape.by_layer else TierChoices(shape)


def bits_of(shape: ModelSizes, counts: Sequence[Counts]) -> float:
    """Resident bits per number of all FFs, those that are left out included: scales and room for whole blocks count.
    There have to be some."""
    taken = sum(layer.resident_ff_bytes(own) for layer, own in zip(shape.layers, counts, strict=True))
    plain = sum(layer.neurons * layer.plain_neuron_bytes for layer in shape.layers)
    return taken * 8 * shape.item_bytes / plain


def tiers_within(shape: ModelSizes, bits: float | Literal["auto"]) -> tuple[Counts, ...]:
    """The most in so many bits per number; "auto": all neurons in the most bits. UsageError where none is so small."""
    choices = tiered_choices(shape)
    if isinstance(bits, str):
        return choices[-1]
    index = bisect_right(range(len(choices)), bits, key=lambda i: bits_of(shape, choices[i])) - 1
    if index < 0:
        least = f"{least_bits(shape):.2f} bits a weight"
        raise UsageError(f"bits is {bits:g}: {shape.precision_name} of this model take {least}, and more")
    return choices[index]


def least_bits(shape: ModelSizes) -> float:
    """As `bits_of`, of the fewest bytes that a plan considers."""
    return bits_of(shape, tiered_choices(shape)[0])


def options_again(shape: ModelSizes, counts: Sequence[Counts]) -> dict[str, Any]:
    """Fields of `LoadConfig` with which a model has these residents again."""
    if len(shape.levels) > 1:
        return {"quantize": shape.option, "bits": bits_of(shape, counts), "density": "auto"}
    if shape.precision not in shape.levels:  # they draft: of what is asked, the same comes again
        return {"quantize": "auto", "density": "auto"}
    densities = [layer.density(sum(own)) for own, layer in zip(counts, shape.layers, strict=True)]
    return {"quantize": shape.option, "density": densities}


def expected_error(shape: ModelSizes, counts: Sequence[Counts]) -> float | None:
    """Squared, of what the layers' FFs give, relative to that, with typical neurons: the mean over layers. None for
    mixtures of experts, whose experts are no neurons, and where there are none."""
    if shape.has_experts or not shape.with_neurons:
        return None
    total = 0.0
    for layer, own in zip(shape.layers, counts, strict=True):
        errors = [format.distortion for format in shape.levels]
        total += distortion_of(typical_energies(layer.neurons), own, errors)
    error = total / len(shape.with_neurons)
    kept = 0.0 if shape.choosing(counts) else shape.taken_over
    return error * (1 - kept) + _SECOND_ROUNDING * kept
