"""Every linear layer inside the decoder layers, swapped for a `QuantizedLinear` once, at load."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from griffin_offload.blocks.base import Block
from griffin_offload.blocks.experts import EXPERTS_INPUT, Experts, expert_count, is_experts
from griffin_offload.blocks.feedforward import features
from griffin_offload.devices.torch_state import put
from griffin_offload.formats.base import Format
from griffin_offload.formats.linear import QuantizedLinear
from griffin_offload.kernels.by_blocks import Scratch


def linear_names(layer: nn.Module) -> list[str]:
    """Names, inside the layer, of what is quantised. Routers stay as they are: few numbers, on which much depends."""
    found = [name for name, module in layer.named_modules() if isinstance(module, nn.Linear | Conv1D)]
    experts = next((expert_count(module) for module in layer.modules() if is_experts(module)), None)
    return [name for name in found if experts is None or features(layer.get_submodule(name))[0] not in (1, experts)]


def check_layer(layer: nn.Module, block: Block, precision: Format) -> None:
    """UnsupportedModel when a matrix of the layer cannot be in `precision`."""
    for name in linear_names(layer):
        module = layer.get_submodule(name)
        precision.check(*features(module), name, is_down=block.is_down(module))
    block.check(precision)


def swap_experts(
    blocks: Sequence[Block],
    precision: Format,
    stored: Format,
    records: torch.dtype | None,
    scratch: Scratch,
    importance: Mapping[str, Tensor] | None = None,
) -> None:
    """Have experts be computed in `precision`; a checkpoint holds them as `stored`, with `records` as such, floats of
    that type."""
    for index, block in enumerate(blocks):
        if isinstance(block, Experts):
            known = (importance or {}).get(f"{index}.{EXPERTS_INPUT}")
            block.take_form(precision, stored, records, scratch, known)


def swap_linears(
    decoder: nn.ModuleList,
    blocks: Sequence[Block],
    precision: Format,
    stored: Format,
    scratch: Scratch,
    importance: Mapping[str, Tensor] | None = None,
) -> None:
    """Replace each by a module with the same parameters; those of a converted checkpoint are on meta, to be assigned.
    `importance` [I], by "layer.name", is of the inputs of matrices that are quantised while the model runs.

    Conv1D's matrix is turned around: every QuantizedLinear is [outputs, inputs].
    """
    for index, (layer, block) in enumerate(zip(decoder, blocks, strict=True)):
        for name in linear_names(layer):
            module = layer.get_submodule(name)
            parent, _, attribute = name.rpartition(".")
            new = _quantized(module, precision, stored, scratch, is_down=block.is_down(module))
            new.importance = (importance or {}).get(f"{index}.{name}")
            setattr(layer.get_submodule(parent), attribute, new)


def turn_experts(blocks: Sequence[Block]) -> None:
    """Have all matrices of experts as [outputs, inputs], on meta, to be assigned."""
    for block in blocks:
        if isinstance(block, Experts):
            block.take_rows()


def _quantized(
    module: nn.Module, precision: Format, stored: Format, scratch: Scratch, *, is_down: bool
) -> QuantizedLinear:
    outputs, inputs = features(module)
    full, resident = stored.stored(is_down=is_down), precision.resident(is_down=is_down)
    new = QuantizedLinear(outputs, inputs, is_down=is_down, full=full, resident=resident, scratch=scratch)
    weight, bias = module.weight, module.bias
    assert isinstance(weight, Tensor)
    if isinstance(bias, Tensor):
        put(new, "bias", bias.detach())
    if stored.is_plain:
        matrix = weight.detach().t() if isinstance(module, Conv1D) else weight.detach()
        put(new, "weight", matrix)
        return new
    for name, (shape, own) in full.specs(outputs, inputs, is_down=is_down).items():
        tensor = weight.new_empty(shape, dtype=own or weight.dtype)
        put(new, name, tensor)
    return new
