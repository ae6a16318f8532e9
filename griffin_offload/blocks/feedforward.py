"""What a feed-forward (FF) block is made of: projections whose neurons are installed, priced and gathered.

A block maps H to F neurons by one or two input projections and back by the down projection. Row j of the input
projections and column j of the down projection belong to neuron j; the bias of the down projection to none.
"""

import inspect
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from griffin_offload.blocks.base import ActivationCallback, Activations, Block, ChunkedForward, PassHook, padded, unhook
from griffin_offload.devices.threads import put
from griffin_offload.formats.base import Format, Layout, Spec, Tensors, take
from griffin_offload.formats.floats import FLOATS
from griffin_offload.formats.linear import QuantizedLinear, TieredLinear, column_norms, row_norms
from griffin_offload.method.allocation import Counts


class Projection:
    """One linear layer of a block: stock, or a QuantizedLinear whose tensors come in two layouts."""

    def __init__(self, owner: nn.Module, neurons: int, *, is_down: bool) -> None:
        self.owner, self.neurons, self.is_down = owner, neurons, is_down
        outputs, inputs = features(owner)
        self.hidden = outputs if is_down else inputs
        self.stacked = 1 if is_down else outputs // neurons
        """2 where gate and up are stacked in one matrix: neuron j then also sits at F + j."""
        self.swapped = isinstance(owner, Conv1D)
        self.has_bias = not is_down and getattr(owner, "bias", None) is not None
        """Whether one belongs to neurons: that of a down projection belongs to none of them."""

    def specs(self, layout: Layout, kept: int) -> dict[str, Spec]:
        """Tensors with `kept` neurons."""
        outputs, inputs = self.stacked * kept, self.hidden
        if self.is_down:
            outputs, inputs = inputs, kept
        found = layout.specs(outputs, inputs, is_down=self.is_down)
        if self.swapped and layout.format.is_plain:
            found["weight"] = ((inputs, outputs), None)
        if self.has_bias:
            found["bias"] = ((outputs,), None)
        return found

    @property
    def full(self) -> Layout:
        """As it is stored."""
        return self.owner.full if isinstance(self.owner, QuantizedLinear) else FLOATS.stored(is_down=self.is_down)

    @property
    def tiers(self) -> list[tuple[nn.Module, Layout]]:
        """What the resident neurons are tensors of, and how these lie as decoding multiplies them: one for every format
        that neurons rest in."""
        owner = self.owner
        if isinstance(owner, TieredLinear):
            return [(tier, tier.resident) for tier in owner.tiers]
        resident = owner.resident if isinstance(owner, QuantizedLinear) else FLOATS.resident(is_down=self.is_down)
        return [(owner, resident)]

    def install_full(self, tensors: Tensors) -> None:
        _install(self.owner, tensors, self.full)

    def install_compact(self, tensors: Sequence[Tensors]) -> None:
        """Those of every tier."""
        for (module, layout), own in zip(self.tiers, tensors, strict=True):
            _install(module, own, layout)
        if isinstance(self.owner, TieredLinear):
            self.owner.take_tiers()
            self.owner.declare_features()

    def rows(self, chosen: Tensor) -> Tensor | None:
        """Rows of the full matrix that the `chosen` neurons lie in; None where they are columns."""
        if self.is_down:
            return chosen if self.swapped or self.full.neurons_first else None
        return None if self.swapped else torch.cat([chosen + part * self.neurons for part in range(self.stacked)])

    @property
    def in_rows(self) -> bool:
        """Whether a down projection rests in rows of outputs, of all neurons."""
        return self.is_down and isinstance(self.owner, QuantizedLinear) and not self.owner.is_down

    def gather(self, full: Tensors, chosen: Sequence[Tensor], out: Sequence[Tensors]) -> None:
        """Of every tier the `chosen` neurons [K]."""
        for (_, layout), own, target in zip(self.tiers, chosen, out, strict=True):
            if self.in_rows:
                own = torch.arange(self.hidden, dtype=own.dtype, device=own.device)
            if isinstance(self.owner, QuantizedLinear):
                self.owner.gather(layout, full, own, target, parts=self.stacked)
            else:
                self._gather_floats(full, own, target)

    def _gather_floats(self, full: Tensors, chosen: Tensor, out: Tensors) -> None:
        if chosen.numel() == 0:
            for target in out.values():
                target.zero_()
            return
        index = torch.cat([chosen + part * self.neurons for part in range(self.stacked)])
        axis = int(self.is_down != self.swapped)  # Linear holds [out, in] and Conv1D [in, out]
        take(full["weight"], axis, index, out["weight"])
        if "bias" in out:
            take(full["bias"], 0, index, out["bias"])


class SubNorm(nn.Module):
    """An RMS norm over the F neurons of a block, computed as the `norm` in whose place it is: neurons that are left out
    count as zeros."""

    def __init__(self, norm: Any) -> None:
        super().__init__()
        self.weight: nn.Parameter = norm.weight
        self._epsilon, self._neurons = norm.variance_epsilon, norm.weight.numel()
        self._further: Sequence[Tensor] = ()

    def hold(self, weights: Sequence[Tensor]) -> None:
        """Of the neurons that are there, one tier's after the other's."""
        put(self, "weight", weights[0])
        self._further = weights[1:]

    def forward(self, z: Tensor) -> Tensor:
        exact, weight = z.float(), torch.cat([self.weight, *self._further]) if self._further else self.weight
        squares = exact.pow(2)
        whole = z.shape[-1] == self._neurons
        variance = squares.mean(-1, keepdim=True) if whole else squares.sum(-1, keepdim=True) / self._neurons
        return weight * (exact * torch.rsqrt(variance + self._epsilon)).to(z.dtype)


class NeuronNorm:
    """Its weight, as a part of a block that is installed and gathered like projections: a number a neuron."""

    is_down = False

    def __init__(self, owner: SubNorm, down: Projection) -> None:
        self.owner, self._down = owner, down
        self.full: Layout = FLOATS.stored(is_down=False)

    def specs(self, layout: Layout, kept: int) -> dict[str, Spec]:
        """As a projection's."""
        return {"weight": ((kept,), None)}

    @property
    def tiers(self) -> list[tuple[nn.Module, Layout]]:
        """As many as of the projections."""
        return [(self.owner, self.full) for _ in self._down.tiers]

    def install_full(self, tensors: Tensors) -> None:
        self.owner.hold([tensors["weight"]])

    def install_compact(self, tensors: Sequence[Tensors]) -> None:
        """Those of every tier."""
        self.owner.hold([own["weight"] for own in tensors])

    def rows(self, chosen: Tensor) -> None:
        """All of it is read."""

    def gather(self, full: Tensors, chosen: Sequence[Tensor], out: Sequence[Tensors]) -> None:
        """Of every tier the `chosen` neurons [K]."""
        for own, target in zip(chosen, out, strict=True):
            take(full["weight"], 0, own, target["weight"][: own.numel()])


class FeedForward(Block):
    """A dense block: its projections, installing and gathering them, and a norm of its neurons where there is one."""

    def __init__(
        self, module: nn.Module, inputs: Sequence[str], down: str, norm: SubNorm | None = None, *, inline: bool
    ) -> None:
        self.module = module
        self.inline = inline
        self.down: nn.Module = module.get_submodule(down)
        self.hidden, self.neurons = features(self.down)
        self.width = self.neurons
        first = [Projection(module.get_submodule(name), self.neurons, is_down=False) for name in inputs]
        self.projections = (*first, Projection(self.down, self.neurons, is_down=True))
        self.linears = tuple(projection.owner for projection in self.projections)
        last = self.projections[-1]
        between = [] if norm is None else [NeuronNorm(norm, last)]
        self.parts: tuple[Projection | NeuronNorm, ...] = (*first, *between, last)
        """All that has tensors of neurons."""
        self.watched: nn.Module = self.down if norm is None else norm
        """Whose input the neurons' activations are."""

    @property
    def gated(self) -> bool:
        return sum(projection.stacked for projection in self.projections[:-1]) > 1

    @property
    def formats(self) -> tuple[Format, ...]:
        return tuple(layout.format for _, layout in self.projections[0].tiers)

    @property
    def rounds_again(self) -> bool:
        pairs = [(own.full.format, layout.format) for own in self.projections for _, layout in own.tiers]
        return self.in_rows or any(not full.is_plain and full is not resident for full, resident in pairs)

    @property
    def in_rows(self) -> bool:
        full = self.projections[-1].full
        return full.format.takes_over and not full.neurons_first

    @property
    def read_numbers(self) -> int:
        return sum(projection.stacked for projection in self.projections) * self.neurons * self.hidden

    def is_down(self, linear: nn.Module) -> bool:
        return linear is self.down

    def full(self) -> list[Tensor]:
        return [
            getattr(projection.owner, name)
            for projection in self.parts
            for name in projection.specs(projection.full, self.neurons)
        ]

    @property
    def neuron_axis(self) -> int:
        return 0 if self.projections[-1].swapped else 1

    def full_specs(self, precision: Format | None = None) -> list[Spec]:
        return [
            spec
            for projection in self.parts
            for spec in projection.specs(_stored(projection, precision), self.neurons).values()
        ]

    def compact_specs(self, counts: Counts, formats: Sequence[Format] | None = None) -> list[Spec]:
        """Conv1D reshapes by its input's size and cannot have none: it keeps one, which `gather` zeroes."""
        found: list[Spec] = []
        for projection in self.parts:
            layouts = [layout for _, layout in projection.tiers]
            if formats is not None:
                layouts = [format.resident(is_down=projection.is_down) for format in formats]
            for kept, format, layout in zip(counts, formats or self.formats, layouts, strict=True):
                found += projection.specs(layout, self._room(kept, format)).values()
        return found

    def _room(self, kept: int, format: Format) -> int:
        room = padded(kept, self.multiple(format))
        return max(room, 1) if isinstance(self.down, Conv1D) and format.is_plain else room

    def multiple(self, precision: Format) -> int:
        return precision.rests_as().neuron_multiple

    def install_full(self, tensors: Sequence[Tensor]) -> None:
        for projection, named in zip(self.parts, self._full(tensors), strict=True):
            projection.install_full(named)

    def install_compact(self, tensors: Sequence[Tensor]) -> None:
        for projection, named in zip(self.parts, self._compact(tensors), strict=True):
            projection.install_compact(named)

    @torch.no_grad()
    def gather(self, full: Sequence[Tensor], chosen: Sequence[Tensor], out: Sequence[Tensor]) -> None:
        sources = self._full([tensor.detach() for tensor in full])
        targets = self._compact([tensor.detach() for tensor in out])
        for projection, source, target in zip(self.parts, sources, targets, strict=True):
            projection.gather(source, chosen, target)

    def rows_needed(self, chosen: Tensor) -> list[Tensor | None]:
        needed: list[Tensor | None] = []
        for projection in self.parts:
            rows = projection.rows(chosen)
            specs = projection.specs(projection.full, self.neurons).values()
            needed += [rows if len(shape) > 1 else None for shape, _ in specs]
        return needed

    def neuron_norms(self, full: Sequence[Tensor]) -> Tensor:
        product = torch.ones(self.neurons, dtype=torch.float32, device=full[0].device)
        for projection, named in zip(self.projections[:-1], self._full(full), strict=False):
            norms = row_norms(named, projection.full, swapped=projection.swapped)
            for part in norms.split(self.neurons):
                product = product * part
        return product

    def output_norms(self, full: Sequence[Tensor]) -> Tensor:
        last = self.projections[-1]
        return column_norms(self._full(full)[-1], last.full, swapped=last.swapped)

    def observe(self, callback: ActivationCallback) -> None:
        def see(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            # The FF's own forward knows which tokens it has; an inline one has all of them.
            forward = self.module.__dict__.get("forward")
            start = forward.start if isinstance(forward, ChunkedForward) else 0
            callback(Activations(args[0].detach(), start))

        self.watched.register_forward_pre_hook(PassHook(see))

    def chunked(self, limit: int) -> None:
        if not self.inline:
            self.module.forward = ChunkedForward(self.module.forward, limit)

    def unhook(self) -> None:
        unhook(self.watched)
        if not self.inline:
            unhook(self.module)

    def run(self, x: Tensor) -> Tensor:
        if self.inline:
            first = self.projections[0].owner
            found: Tensor = self.down(torch.relu(first(x)))
            return found
        parameters = inspect.signature(self.module.forward).parameters.values()
        needed = sum(p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD for p in parameters)
        output: Tensor = self.module(*(x,) * needed)  # BLOOM's FF takes the residual, too, and adds it
        return output

    def _full(self, tensors: Sequence[Tensor]) -> list[Tensors]:
        """Those of each projection by name."""
        rest = iter(tensors)
        return [_named(own, own.full, rest) for own in self.parts]

    def _compact(self, tensors: Sequence[Tensor]) -> list[list[Tensors]]:
        """The same of each of its tiers."""
        rest = iter(tensors)
        return [[_named(own, layout, rest) for _, layout in own.tiers] for own in self.parts]


def _named(projection: Projection | NeuronNorm, layout: Layout, tensors: Iterator[Tensor]) -> Tensors:
    """The next ones by the names of `layout`."""
    return {name: next(tensors) for name in projection.specs(layout, 1)}


def _install(module: nn.Module, tensors: Tensors, layout: Layout) -> None:
    for name, tensor in tensors.items():
        put(module, name, tensor)
    if isinstance(module, QuantizedLinear):
        module.take_layout(layout)
        module.declare_features()
    else:
        _declare_features(module, tensors["weight"])


def features(linear: nn.Module) -> tuple[int, int]:
    """(outputs, inputs) of a linear layer of any kind."""
    if isinstance(linear, QuantizedLinear):
        return linear.out_features, linear.in_features
    weight = linear.weight
    assert isinstance(weight, Tensor)
    outputs, inputs = weight.shape
    return (inputs, outputs) if isinstance(linear, Conv1D) else (outputs, inputs)


def _stored(projection: Projection | NeuronNorm, precision: Format | None) -> Layout:
    return projection.full if precision is None else precision.stored(is_down=projection.is_down)


def _declare_features(projection: nn.Module, weight: Tensor) -> None:
    # Conv1D reads its output size from `nf` in forward; Linear's are for people who print the model.
    if isinstance(projection, Conv1D):
        projection.nx, projection.nf = weight.shape
    elif isinstance(projection, nn.Linear):
        projection.out_features, projection.in_features = weight.shape
