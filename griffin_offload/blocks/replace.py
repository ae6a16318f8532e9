"""Every linear layer inside the decoder layers, swapped for a `QuantizedLinear` once, at load."""

import math
from collections.abc import Container, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from griffin_offload.blocks.base import Block
from griffin_offload.blocks.experts import EXPERTS_INPUT, Experts, expert_count, is_experts
from griffin_offload.blocks.feedforward import features
from griffin_offload.devices.threads import put
from griffin_offload.formats.base import Format, Layout
from griffin_offload.formats.linear import QuantizedLinear, TieredLinear
from griffin_offload.formats.translated import TranslatedTensor
from griffin_offload.kernels.by_blocks import Scratch

_SMALL_SHARE = 1 / 16
"""Of the numbers that a token reads of a layer: about a twentieth of int4's bytes. With grouped queries they are
keys' and values' matrices, whose errors cost the most for each of their bytes (benchmarks/NOTES.md)."""
_WEIGHTS_READ = ("dt_proj", "weights_proj")
"""Whose weights transformers reads itself, to multiply by time steps of Mamba 1, or for their type: of the heads that
choose keys in sparse attention (DeepSeek V3.2)."""
Tiers = Sequence[tuple[Format, int]]
"""Formats of a layer's resident neurons, and how many each has."""


def linear_names(layer: nn.Module) -> list[str]:
    """Names, inside the layer, of what is quantised. Routers stay as they are: few numbers, on which much depends; and
    so does what transformers' own classes read the weights of."""
    kinds = nn.Linear | Conv1D | QuantizedLinear
    found = [name for name, module in layer.named_modules() if isinstance(module, kinds)]
    found = [name for name in found if name.rpartition(".")[2] not in _WEIGHTS_READ]
    experts = next((expert_count(module) for module in layer.modules() if is_experts(module)), None)
    return [name for name in found if experts is None or features(layer.get_submodule(name))[0] not in (1, experts)]


def outside_names(layer: nn.Module, block: Block) -> list[str]:
    """Of `linear_names`, those outside the FF."""
    return [name for name in linear_names(layer) if layer.get_submodule(name) not in block.linears]


def small_names(layer: nn.Module, block: Block) -> frozenset[str]:
    """Of `outside_names`, those that have the fewest numbers, all of a size or none: as many as together are no more
    than a share of what a token reads of the layer."""
    sizes = {name: math.prod(features(layer.get_submodule(name))) for name in outside_names(layer, block)}
    most, size = (block.read_numbers + sum(sizes.values())) * _SMALL_SHARE, 0
    for larger in sorted(set(sizes.values())):
        if sum(own for own in sizes.values() if own <= larger) > most:
            break
        size = larger
    return frozenset(name for name, own in sizes.items() if own <= size)


def finer_names(layer: nn.Module, block: Block, held: Container[str] = ()) -> frozenset[str]:
    """Of `linear_names`, those that rest in more bits than the others: small ones, and those that their file holds in
    more (`held`), the FF's, too."""
    inside = [*linear_names(layer), *expert_names(layer, block)]
    return small_names(layer, block) | {name for name in inside if name in held}


def expert_names(layer: nn.Module, block: Block) -> dict[str, str]:
    """Names, inside the layer, of tensors that hold a matrix of all experts, with those that their form has."""
    if not isinstance(block, Experts):
        return {}
    path = next(name for name, module in layer.named_modules() if module is block.module)
    return {f"{path}.{matrix.name}": matrix.name for matrix in block.form.matrices}


def check_layer(layer: nn.Module, block: Block, precision: Format) -> None:
    """UnsupportedModel when a matrix of the layer cannot be in `precision`."""
    for name in linear_names(layer):
        module = layer.get_submodule(name)
        precision.check(*features(module), name, is_down=block.is_down(module))
    block.check(precision)


def swap_experts(
    decoder: nn.ModuleList,
    blocks: Sequence[Block],
    precision: Format,
    stored: Format,
    records: torch.dtype | None,
    scratch: Scratch,
    importance: Mapping[str, Tensor] | None = None,
    finer: Format | None = None,
    finer_ones: Sequence[Container[str]] = (),
) -> None:
    """Have experts be computed in `precision`, the `finer_ones` of each layer in `finer`; a checkpoint holds them as
    `stored`, with `records` as such, floats of that type."""
    for index, (layer, block) in enumerate(zip(decoder, blocks, strict=True)):
        if isinstance(block, Experts):
            known = (importance or {}).get(f"{index}.{EXPERTS_INPUT}")
            wanted = finer_ones[index] if finer_ones else ()
            names = [own for name, own in expert_names(layer, block).items() if name in wanted]
            block.take_form(precision, stored, records, scratch, known, finer, names)


def swap_linears(
    decoder: nn.ModuleList,
    blocks: Sequence[Block],
    precision: Format,
    stored: Format,
    scratch: Scratch,
    importance: Mapping[str, Tensor] | None = None,
    tiers: Sequence[Tiers] = (),
    finer: Format | None = None,
    finer_ones: Sequence[Container[str]] = (),
    resting_in_rows: Container[int] = (),
    in_rows: Sequence[Container[str]] = (),
) -> None:
    """Replace each by a module with the same parameters; those of a converted checkpoint are on meta, to be assigned.
    `importance` [3, I], by "layer.name", is of the inputs of matrices that are quantised while the model runs; `tiers`
    are of the FF of each layer, if it is not of `precision` alone; `finer` is what the `finer_ones` of each layer rest
    in, and are stored in unless the others have as many bits or a copy has them as they are; `in_rows` are names of
    each layer's matrices that are stored in rows of outputs, down projections, too; `resting_in_rows` layers whose down
    projections rest so, too.

    Conv1D's matrix is turned around: every QuantizedLinear is [outputs, inputs].
    """
    for index, (layer, block) in enumerate(zip(decoder, blocks, strict=True)):
        for name in linear_names(layer):
            module = layer.get_submodule(name)
            parent, _, attribute = name.rpartition(".")
            own: Tiers = ((precision, block.neurons),)
            source = stored if module in block.linears else stored.outside()
            if module in block.linears:
                own = tiers[index] if tiers else own
            if finer is not None and name in finer_ones[index]:
                own = ((finer, sum(kept for _, kept in own)),)
                source = max(finer, source, key=lambda format: format.bits)
            is_down = block.is_down(module)
            full = source.stored(is_down=is_down and not (in_rows and name in in_rows[index]))
            if isinstance(module, QuantizedLinear):  # of a copy: as it lies there
                full = module.full
            is_down = is_down and index not in resting_in_rows
            new = _replaced(module, own, block, full, scratch, is_down=is_down)
            new.importance = (importance or {}).get(f"{index}.{name}")
            setattr(layer.get_submodule(parent), attribute, new)


def turn_experts(blocks: Sequence[Block]) -> None:
    """Have all matrices of experts as [outputs, inputs], on meta, to be assigned."""
    for block in blocks:
        if isinstance(block, Experts):
            block.take_rows()


def fits_rows(format: Format, outputs: int, inputs: int) -> bool:
    """Whether `format` takes over a down projection in rows: in no more bytes than neurons take, and without room for
    more of them."""
    return format.takes_over and inputs >= outputs and inputs % format.rests_as().neuron_multiple == 0


def _replaced(
    module: nn.Module, tiers: Tiers, block: Block, full: Layout, scratch: Scratch, *, is_down: bool
) -> QuantizedLinear:
    """One of a single format, or of several."""
    outputs, inputs = features(module)
    if len(tiers) == 1:
        resident = tiers[0][0].resident(is_down=is_down)
        new = QuantizedLinear(outputs, inputs, is_down=is_down, full=full, resident=resident, scratch=scratch)
    else:
        stacked = 1 if is_down else outputs // block.neurons
        parts = []
        for format, kept in tiers:
            sizes = (outputs, kept) if is_down else (stacked * kept, inputs)
            resident = format.resident(is_down=is_down)
            parts.append(QuantizedLinear(*sizes, is_down=is_down, full=resident, resident=resident, scratch=scratch))
        shape: dict[str, Any] = {"is_down": is_down, "full": full, "scratch": scratch}
        new = TieredLinear(outputs, inputs, tiers=parts, stacked=stacked, **shape)
    _take_tensors(new, module)
    return new


def _take_tensors(new: QuantizedLinear, module: nn.Module) -> None:
    """Those of the full matrix."""
    if isinstance(module, QuantizedLinear):
        for name, parameter in module.named_parameters(recurse=False):
            put(new, name, parameter.detach())
        return
    weight, bias = module.weight, module.bias
    assert isinstance(weight, Tensor)
    if isinstance(bias, Tensor):
        put(new, "bias", bias.detach())
    if new.full.format.is_plain:
        origin = weight.detach()
        if isinstance(module, nn.Linear) and isinstance(origin, TranslatedTensor):
            new.codes = origin.codes
        matrix = weight.detach().t() if isinstance(module, Conv1D) else weight.detach()
        put(new, "weight", matrix)
        return
    for name, (shape, own) in new.full.specs(new.out_features, new.in_features, is_down=new.is_down).items():
        tensor = weight.new_empty(shape, dtype=own or weight.dtype)
        put(new, name, tensor)
