"""`QuantizedLinear`: the one module that replaces stock ones, swapped in once at load, for every linear in a layer.

Its tensors come in two layouts. The full one is what is stored: floats where a checkpoint is quantised while it runs, a
format's own where it was converted. The resident one is what decoding multiplies. The table of kernels says by what.
"""

from torch import Tensor, nn

from griffin_offload.formats.base import Layout
from griffin_offload.kernels.by_blocks import Scratch
from griffin_offload.kernels.table import products


class QuantizedLinear(nn.Module):
    """A linear layer [outputs, inputs]: a weight, and what the layouts `full` and `resident` have beside it."""

    weight: nn.Parameter
    bias: nn.Parameter | None

    def __init__(
        self, outputs: int, inputs: int, *, is_down: bool, full: Layout, resident: Layout, scratch: Scratch
    ) -> None:
        super().__init__()
        self.out_features, self.in_features, self.is_down = outputs, inputs, is_down
        self.full, self.resident = full, resident
        self.layout = full
        """Of the tensors that are installed."""
        self.scratch = scratch
        self.importance: Tensor | None = None
        """[I] of the inputs, for formats that want it when they quantise floats."""
        stored, resting = (layout.specs(outputs, inputs, is_down=is_down) for layout in (full, resident))
        for name in dict.fromkeys(("weight", *stored, *resting, "bias", "input_scale")):
            self.register_parameter(name, None)
        self._only_stored = stored.keys() - resting.keys()

    def take_layout(self, layout: Layout) -> None:
        """Say that the tensors of `layout` were installed. What only the full matrix has goes; what only the resident
        one has stays where it is while a full one passes."""
        self.layout = layout
        if layout is self.resident:
            for name in self._only_stored:
                self._parameters[name] = None

    def declare_features(self) -> None:
        """Take the sizes from the tensors that were installed."""
        if self.is_down:
            self.in_features = self.layout.inputs(self.weight)
        else:
            self.out_features = self.weight.shape[0]

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, layout={self.layout.name}"

    def forward(self, x: Tensor) -> Tensor:
        """[..., inputs] to [..., outputs], in the type of x."""
        flat, tensors, layout = x.reshape(-1, x.shape[-1]), self._parameters, self.layout
        for kernel in products(layout.name, flat.shape[0], flat, self.scratch.dtype, layout is self.resident):
            if kernel.takes is None or kernel.takes(flat, tensors):
                product: Tensor = kernel.function(flat, tensors, self.out_features, self.scratch)
                return product.view(*x.shape[:-1], -1)
        raise AssertionError(f"nothing multiplies {layout.name}")


def row_norms(full: dict[str, Tensor], layout: Layout, *, swapped: bool) -> Tensor:
    """Norms float32 [O] of the rows of a full matrix that is no down projection; `swapped`: it is turned around."""
    return layout.format.row_norms(full | {"weight": full["weight"].t()} if swapped else full)


def column_norms(full: dict[str, Tensor], layout: Layout, *, swapped: bool) -> Tensor:
    """Norms float32 [I] of the columns of a full down projection, up to a factor common to all."""
    return layout.format.row_norms(full) if swapped else layout.format.column_norms(full)
