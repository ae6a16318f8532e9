"""`QuantizedLinear`: the one module that replaces stock ones, swapped in once at load, for every linear in a layer.

Its tensors come in two layouts. The full one is what is stored: floats where a checkpoint is quantised while it runs, a
format's own where it was converted. The resident one is what decoding multiplies. The table of kernels says by what.
"""

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from griffin_offload.formats.base import Format, Layout, RowCodes, Tensors
from griffin_offload.kernels.by_blocks import Scratch
from griffin_offload.kernels.gemv import Known
from griffin_offload.kernels.table import products
from griffin_offload.transformers_api import StockModel


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
        """What is known of the inputs, [3, I], for formats that want it when they quantise floats."""
        self._known = Known()
        self.codes: RowCodes | None = None
        """Of the rows of floats that lie on grids in their file, for formats that take these over."""
        stored, resting = (layout.specs(outputs, inputs, is_down=is_down) for layout in (full, resident))
        for name in dict.fromkeys(("weight", *stored, *resting, "bias", "input_scale")):
            self.register_parameter(name, None)
        self._only_stored, self._only_resting = stored.keys() - resting.keys(), resting.keys() - stored.keys()

    def gather(self, layout: Layout, full: Tensors, chosen: Tensor, out: Tensors, *, parts: int = 1) -> None:
        """Of its `full` matrix the `chosen` neurons, or outputs, into `out`, which lie in `layout`."""
        format = layout.format
        codes = None if self.is_down else self.codes
        if codes is None or not format.take_over(full, codes, chosen, out, parts=parts):
            kind: dict[str, Any] = {"is_down": self.is_down, "importance": self.importance}
            format.gather(full, self.full, chosen, out, parts=parts, **kind)

    def take_layout(self, layout: Layout) -> None:
        """Say that the tensors of `layout` were installed: what only the other one has goes."""
        self.layout = layout
        for name in self._only_stored if layout is self.resident else self._only_resting:
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
                if kernel.several is not None:
                    matrix = self._known(layout.name, tensors, self.out_features, flat.dtype)
                    return kernel.several(flat, (matrix,), ((0, flat.shape[0]),)).view(*x.shape[:-1], self.out_features)
                product: Tensor = kernel.function(flat, tensors, self.out_features, self.scratch)
                return product.view(*x.shape[:-1], -1)
        raise AssertionError(f"nothing multiplies {layout.name}")


class TieredLinear(QuantizedLinear):
    """A linear layer whose resident neurons rest in several formats: `tiers` of them, each a matrix by itself, of as
    many neurons as it will always hold. Outputs of the tiers stand behind each other, `stacked` matrices (gate and up)
    apart; a down projection adds them up."""

    def __init__(
        self,
        outputs: int,
        inputs: int,
        *,
        is_down: bool,
        full: Layout,
        tiers: Sequence[QuantizedLinear],
        stacked: int,
        scratch: Scratch,
    ) -> None:
        super().__init__(outputs, inputs, is_down=is_down, full=full, resident=full, scratch=scratch)
        self.tiers, self.stacked = tuple(tiers), stacked
        self._registered = nn.ModuleList(tiers)
        self.tiered = False
        """Whether the tiers are installed, and not the full matrix."""

    def take_layout(self, layout: Layout) -> None:
        super().take_layout(layout)
        self.tiered = False

    def take_tiers(self) -> None:
        """Say that the tensors of all tiers were installed: those of the full matrix go, but for a bias of outputs that
        are no neurons."""
        self.tiered = True
        for name in self._parameters:
            if name != "bias" or not self.is_down:
                self._parameters[name] = None

    def declare_features(self) -> None:
        if not self.tiered:
            super().declare_features()
        elif self.is_down:
            self.in_features = sum(tier.in_features for tier in self.tiers)
        else:
            self.out_features = sum(tier.out_features for tier in self.tiers)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}"

    def forward(self, x: Tensor) -> Tensor:
        """[..., inputs] to [..., outputs], in the type of x."""
        if not self.tiered:
            return super().forward(x)
        if not self.is_down:
            parts = [tier(x) for tier in self.tiers]
            if self.stacked == 1:
                return torch.cat(parts, dim=-1)
            return torch.cat([part.unflatten(-1, (self.stacked, -1)) for part in parts], dim=-1).flatten(-2)
        first, *others = x.split([tier.in_features for tier in self.tiers], dim=-1)
        total: Tensor = self.tiers[0](first.contiguous())
        for tier, rows in zip(self.tiers[1:], others, strict=True):
            total = total + tier(rows.contiguous())
        return total if self.bias is None else total + self.bias


def row_norms(full: dict[str, Tensor], layout: Layout, *, swapped: bool) -> Tensor:
    """Norms float32 [O] of the rows of a full matrix that is no down projection; `swapped`: it is turned around."""
    return layout.format.row_norms(full | {"weight": full["weight"].t()} if swapped else full)


def column_norms(full: dict[str, Tensor], layout: Layout, *, swapped: bool) -> Tensor:
    """Norms float32 [I] of the columns of a full down projection, up to a factor common to all."""
    return layout.format.row_norms(full) if swapped else layout.format.column_norms(full)


# Embeddings and head in 8 bits: rows of tokens with one scale each. Both in a converted checkpoint that has them so,
# the head alone where it rests among matrices in fewer bits.


class QuantizedEmbedding(nn.Module):
    """Token ids to rows, numbers [V, H] of `format` with a scale [V]; stands for the stock module it is made from."""

    weight: nn.Parameter
    scale: nn.Parameter

    def __init__(self, stock: nn.Module, format: Format) -> None:
        super().__init__()
        self.weight, self.scale = _parameters(stock, format)
        # Gemma 3 multiplies inside its embedding module.
        self.embed_scale: Tensor | None = getattr(stock, "embed_scale", None)

    def forward(self, ids: Tensor) -> Tensor:
        """Rows [..., H] in the precision of the scales."""
        scale = self.scale[ids]
        rows = self.weight[ids].to(scale.dtype) * scale[..., None]
        return rows if self.embed_scale is None else rows * self.embed_scale.to(rows)


def swap_tables(model: StockModel, format: Format, scratch: Scratch) -> None:
    """Put into `format` the embedding of token ids and the head; tied ones stay tied."""
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    tied = head is not None and head.weight is embedding.weight
    new = QuantizedEmbedding(embedding, format)
    model.set_input_embeddings(new)
    if head is None:
        return
    (outputs, inputs), layout = head.weight.shape, format.stored(is_down=False)
    linear = QuantizedLinear(outputs, inputs, is_down=False, full=layout, resident=layout, scratch=scratch)
    linear.bias = head.bias
    linear.weight, linear.scale = (new.weight, new.scale) if tied else _parameters(head, format)
    model.set_output_embeddings(linear)


def swap_head(model: StockModel, stored: Format, format: Format, scratch: Scratch) -> None:
    """Let the head, `stored` in floats, rest in `format`; embeddings that it is tied to stay as they are."""
    head = model.get_output_embeddings()
    (outputs, inputs), full, resident = head.weight.shape, stored.stored(is_down=False), format.resident(is_down=False)
    linear = QuantizedLinear(outputs, inputs, is_down=False, full=full, resident=resident, scratch=scratch)
    linear.weight, linear.bias = head.weight, head.bias
    model.set_output_embeddings(linear)


def reads_head_itself(kind: type[StockModel]) -> bool:
    """Whether the forward of stock models of this `kind` looks into the head's matrix, which then has to be one of
    floats: Mamba's turns what goes in to its type."""
    return "weight" in inspect.unwrap(kind.forward).__code__.co_names


def table_bytes(shape: torch.Size, format: Format, dtype: torch.dtype) -> int:
    """Of one table [V, H], scales in `dtype`."""
    return format.stored(is_down=False).nbytes(shape[0], shape[1], dtype, is_down=False)


def _parameters(stock: nn.Module, format: Format) -> tuple[nn.Parameter, nn.Parameter]:
    table = stock.get_parameter("weight")
    outputs, inputs = table.shape
    specs = format.stored(is_down=False).specs(outputs, inputs, is_down=False)
    weight, scale = (
        nn.Parameter(table.new_empty(shape, dtype=own or table.dtype), requires_grad=False)
        for shape, own in (specs["weight"], specs["scale"])
    )
    return weight, scale
