"""Floats as they are computed with: 16 bits or more, no scales."""

import torch
from torch import Tensor, nn

from griffin_offload.errors import UnsupportedModel
from griffin_offload.formats.base import PLAIN_TYPES, Format, Layout, Spec, Tensors, every, neuron_scale, take
from griffin_offload.formats.compensation import Compensation
from griffin_offload.kernels import by_blocks, table
from griffin_offload.kernels.by_blocks import Scratch
from griffin_offload.kernels.library import HALVES


class Floats(Format):
    """The format that is not quantised. "none" is its name in options and checkpoints."""

    name, bits, is_plain, version = "none", 16, True, 0

    def __init__(self) -> None:
        self._layout = Layout("float", self, _specs, _multiply, torchs="linear")

    def stored(self, *, is_down: bool) -> Layout:
        return self._layout

    def quantize(
        self, weight: Tensor, dtype: torch.dtype, *, is_down: bool, compensation: Compensation | None = None
    ) -> Tensors:
        return {"weight": weight.to(dtype)}

    def gather_rows(
        self, full: Tensors, index: Tensor, start: int, out: Tensors, importance: Tensor | None, *, plain: bool
    ) -> None:
        take(full["weight"], 0, index, out["weight"][start : start + index.numel()])

    def gather_columns(self, full: Tensors, chosen: Tensor, out: Tensors, known: Tensor | None, *, plain: bool) -> None:
        take(full["weight"], 1, chosen, out["weight"][:, : chosen.numel()])

    def row_norms(self, full: Tensors) -> Tensor:
        wide = torch.promote_types(full["weight"].dtype, torch.float32)
        norms: Tensor = torch.linalg.vector_norm(full["weight"], dim=1, dtype=wide)
        return norms.float()

    def column_norms(self, full: Tensors) -> Tensor:
        return neuron_scale(full["weight"], torch.float32)

    def gather_bytes(self, outputs: int, neurons: int, item_bytes: int) -> int:
        return 0  # straight to where they stay


def _specs(outputs: int, inputs: int, is_down: bool) -> dict[str, Spec]:
    return {"weight": ((outputs, inputs), None)}


def _multiply(x: Tensor, tensors: table.Tensors, outputs: int, scratch: Scratch) -> Tensor:
    weight = tensors["weight"]
    assert weight is not None
    return nn.functional.linear(x, weight, tensors["bias"])


def _by_blocks(x: Tensor, tensors: table.Tensors, outputs: int, scratch: by_blocks.Scratch) -> Tensor:
    weight = tensors["weight"]
    assert weight is not None
    rows = x.reshape(-1, x.shape[-1])
    return by_blocks.multiply(rows, weight, scratch, None, tensors["bias"]).view(*x.shape[:-1], -1)


# Processors without instructions for 16 bits emulate a product at a third of float32's rate: there, the scratch is of
# float32.
table.add(
    table.Kernel(
        *("gemm", "float", "by blocks in float32", _by_blocks, "cpu"),
        takes=table.alike,
        numbers=HALVES,
        computes=torch.float32,
        ours=False,
    ),
    last=True,
)

FLOATS = Floats()


def planned_as(name: str) -> Format:
    """The format that a plan calls `name`: floats by the precision of the computation. UnsupportedModel for one that
    is not there."""
    if name in {str(dtype).removeprefix("torch.") for dtype in PLAIN_TYPES}:
        return FLOATS
    found = [format for format in every() if format.name == name]
    if not found:
        known = ", ".join(format.name for format in every())
        raise UnsupportedModel(f"{name} is no weight format here, there are {known}: register it first")
    return found[0]
