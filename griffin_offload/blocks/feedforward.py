"""What a feed-forward (FF) block is made of: projections whose neurons are installed, priced and gathered.

A block maps H to F neurons by one or two input projections and back by the down projection. Row j of the input
projections and column j of the down projection belong to neuron j; the bias of the down projection to none.
"""

import inspect
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from griffin_offload.blocks.base import ActivationCallback, Activations, Block, padded
from griffin_offload.blocks.hooks import ChunkedForward, PassHook, unhook
from griffin_offload.devices.torch_state import put
from griffin_offload.formats.base import Format, Layout, Spec, Tensors, take
from griffin_offload.formats.floats import FLOATS
from griffin_offload.formats.linear import QuantizedLinear, column_norms, row_norms


class Projection:
    """One linear layer of a block: stock, or a QuantizedLinear whose tensors come in two layouts."""

    def __init__(self, owner: nn.Module, neurons: int, *, is_down: bool) -> None:
        self.owner, self.neurons, self.is_down = owner, neurons, is_down
        outputs, inputs = features(owner)
        self.hidden = outputs if is_down else inputs
        self.stacked = 1 if is_down else outputs // neurons
        """2 where gate and up are stacked in one matrix: neuron j then also sits at F + j."""
        self.swapped = isinstance(owner, Conv1D)

    def specs(self, layout: Layout, kept: int) -> dict[str, Spec]:
        """Tensors with `kept` neurons: all but the bias of a down projection, which belongs to none of them."""
        outputs, inputs = self.stacked * kept, self.hidden
        if self.is_down:
            outputs, inputs = inputs, kept
        found = layout.specs(outputs, inputs, is_down=self.is_down)
        if self.swapped and layout.format.is_plain:
            found["weight"] = ((inputs, outputs), None)
        if not self.is_down and getattr(self.owner, "bias", None) is not None:
            found["bias"] = ((outputs,), None)
        return found

    @property
    def full(self) -> Layout:
        """As it is stored."""
        return self.owner.full if isinstance(self.owner, QuantizedLinear) else FLOATS.stored(is_down=self.is_down)

    @property
    def resident(self) -> Layout:
        """As decoding multiplies it."""
        return self.owner.resident if isinstance(self.owner, QuantizedLinear) else FLOATS.resident(is_down=self.is_down)

    def install(self, tensors: Tensors, layout: Layout) -> None:
        for name, tensor in tensors.items():
            put(self.owner, name, tensor)
        if isinstance(self.owner, QuantizedLinear):
            self.owner.take_layout(layout)
            self.owner.declare_features()
        else:
            _declare_features(self.owner, tensors["weight"])

    def rows(self, chosen: Tensor) -> Tensor | None:
        """Rows of the full matrix that the `chosen` neurons lie in; None where they are columns."""
        if self.is_down:
            return chosen if self.swapped or self.full.neurons_first else None
        return None if self.swapped else torch.cat([chosen + part * self.neurons for part in range(self.stacked)])

    def gather(self, full: Tensors, chosen: Tensor, out: Tensors) -> None:
        if isinstance(self.owner, QuantizedLinear):
            gather, importance = self.resident.format.gather, self.owner.importance
            gather(full, self.full, chosen, out, is_down=self.is_down, parts=self.stacked, importance=importance)
            return
        if chosen.numel() == 0:
            for target in out.values():
                target.zero_()
            return
        index = torch.cat([chosen + part * self.neurons for part in range(self.stacked)])
        axis = int(self.is_down != self.swapped)  # Linear holds [out, in] and Conv1D [in, out]
        take(full["weight"], axis, index, out["weight"])
        if "bias" in out:
            take(full["bias"], 0, index, out["bias"])


class FeedForward(Block):
    """A dense block: its projections, installing and gathering them."""

    def __init__(self, module: nn.Module, inputs: Sequence[str], down: str, *, inline: bool) -> None:
        self.module = module
        self.inline = inline
        self.down: nn.Module = module.get_submodule(down)
        self.hidden, self.neurons = features(self.down)
        self.width = self.neurons
        first = [Projection(module.get_submodule(name), self.neurons, is_down=False) for name in inputs]
        self.projections = (*first, Projection(self.down, self.neurons, is_down=True))
        self.linears = tuple(projection.owner for projection in self.projections)

    @property
    def gated(self) -> bool:
        return sum(projection.stacked for projection in self.projections[:-1]) > 1

    @property
    def precision(self) -> Format:
        return self.projections[-1].resident.format

    @property
    def rounds_again(self) -> bool:
        return any(
            not own.full.format.is_plain and own.full.format is not own.resident.format for own in self.projections
        )

    @property
    def read_numbers(self) -> int:
        return sum(projection.stacked for projection in self.projections) * self.neurons * self.hidden

    def is_down(self, linear: nn.Module) -> bool:
        return linear is self.down

    def full(self) -> list[Tensor]:
        return [
            getattr(projection.owner, name)
            for projection in self.projections
            for name in projection.specs(projection.full, self.neurons)
        ]

    def full_specs(self, precision: Format | None = None) -> list[Spec]:
        return [
            spec
            for projection in self.projections
            for spec in projection.specs(_stored(projection, precision), self.neurons).values()
        ]

    def compact_specs(self, kept: int, precision: Format | None = None) -> list[Spec]:
        """Tensors that hold `kept` neurons: quantised ones are filled up to whole blocks, at least one.

        Conv1D reshapes by its input's size and cannot have none: a block of them keeps one, which `gather` zeroes.
        """
        precision = self.precision if precision is None else precision
        room = padded(kept, self.multiple(precision))
        if isinstance(self.down, Conv1D) and precision.is_plain:
            room = max(room, 1)
        return [
            spec
            for projection in self.projections
            for spec in projection.specs(precision.resident(is_down=projection.is_down), room).values()
        ]

    def multiple(self, precision: Format) -> int:
        return precision.rests_as().neuron_multiple

    def install_full(self, tensors: Sequence[Tensor]) -> None:
        for projection, named in zip(self.projections, self._by_projection(tensors, compact=False), strict=True):
            projection.install(named, projection.full)

    def install_compact(self, tensors: Sequence[Tensor]) -> None:
        for projection, named in zip(self.projections, self._by_projection(tensors, compact=True), strict=True):
            projection.install(named, projection.resident)

    @torch.no_grad()
    def gather(self, full: Sequence[Tensor], chosen: Tensor, out: Sequence[Tensor]) -> None:
        sources = self._by_projection([tensor.detach() for tensor in full], compact=False)
        targets = self._by_projection([tensor.detach() for tensor in out], compact=True)
        for projection, source, target in zip(self.projections, sources, targets, strict=True):
            projection.gather(source, chosen, target)

    def rows_needed(self, chosen: Tensor) -> list[Tensor | None]:
        needed: list[Tensor | None] = []
        for projection in self.projections:
            rows = projection.rows(chosen)
            specs = projection.specs(projection.full, self.neurons).values()
            needed += [rows if len(shape) > 1 else None for shape, _ in specs]
        return needed

    def neuron_norms(self, full: Sequence[Tensor]) -> Tensor:
        product = torch.ones(self.neurons, dtype=torch.float32, device=full[0].device)
        for projection, named in zip(self.projections[:-1], self._by_projection(full, compact=False), strict=False):
            norms = row_norms(named, projection.full, swapped=projection.swapped)
            for part in norms.split(self.neurons):
                product = product * part
        return product

    def output_norms(self, full: Sequence[Tensor]) -> Tensor:
        last = self.projections[-1]
        return column_norms(self._by_projection(full, compact=False)[-1], last.full, swapped=last.swapped)

    def observe(self, callback: ActivationCallback) -> None:
        def see(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            # The FF's own forward knows which tokens it has; an inline one has all of them.
            forward = self.module.__dict__.get("forward")
            start = forward.start if isinstance(forward, ChunkedForward) else 0
            callback(Activations(args[0].detach(), start))

        self.down.register_forward_pre_hook(PassHook(see))

    def chunked(self, limit: int) -> None:
        if not self.inline:
            self.module.forward = ChunkedForward(self.module.forward, limit)

    def unhook(self) -> None:
        unhook(self.down)
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

    def _by_projection(self, tensors: Sequence[Tensor], *, compact: bool) -> list[Tensors]:
        names = [
            (i, name)
            for i, projection in enumerate(self.projections)
            for name in projection.specs(projection.resident if compact else projection.full, 1)
        ]
        found: list[Tensors] = [{} for _ in self.projections]
        for (i, name), tensor in zip(names, tensors, strict=True):
            found[i][name] = tensor
        return found


def features(linear: nn.Module) -> tuple[int, int]:
    """(outputs, inputs) of a linear layer of any kind."""
    if isinstance(linear, QuantizedLinear):
        return linear.out_features, linear.in_features
    weight = linear.weight
    assert isinstance(weight, Tensor)
    outputs, inputs = weight.shape
    return (inputs, outputs) if isinstance(linear, Conv1D) else (outputs, inputs)


def _stored(projection: Projection, precision: Format | None) -> Layout:
    return projection.full if precision is None else precision.stored(is_down=projection.is_down)


def _declare_features(projection: nn.Module, weight: Tensor) -> None:
    # Conv1D reads its output size from `nf` in forward; Linear's are for people who print the model.
    if isinstance(projection, Conv1D):
        projection.nx, projection.nf = weight.shape
    elif isinstance(projection, nn.Linear):
        projection.out_features, projection.in_features = weight.shape
