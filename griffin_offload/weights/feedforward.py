"""What a feed-forward (FF) block is, in every architecture: a table of names, and how neurons are gathered.

A block maps H to F neurons by one or two input projections and back by the down projection. Row j of the input
projections and column j of the down projection belong to neuron j; the bias of the down projection to none.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from griffin_offload.errors import UnsupportedModel


@dataclass(frozen=True)
class Layout:
    """Names of a block's projections, as attributes of one module (the FF module, or the decoder layer itself)."""

    inputs: tuple[str, ...]
    down: str


# Whether an input projection holds gate and up together is decided by its shape, never by its name.
_LAYOUTS = [
    Layout(("gate_proj", "up_proj"), "down_proj"),  # Llama, Mistral, Gemma, Qwen, OLMo 2, Cohere 2, StableLM
    Layout(("gate_up_proj",), "down_proj"),  # Phi-3, GLM 4
    Layout(("up_proj",), "down_proj"),  # Nemotron
    Layout(("w1", "w3"), "w2"),  # Llama as Meta names it
    Layout(("fc1",), "fc2"),  # OPT (inline in the layer), Phi
    Layout(("c_fc",), "c_proj"),  # GPT-2 (Conv1D: axes swapped), StarCoder2
    Layout(("dense_h_to_4h",), "dense_4h_to_h"),  # GPT-NeoX, Falcon, BLOOM
    Layout(("fc_in",), "fc_out"),  # GPT-J, CodeGen
]
REGISTER_HINT = "register others with griffin_offload.register_layout(Layout(inputs=..., down=...))"


def register_layout(layout: Layout) -> None:
    """Make blocks with the names of `layout` known, ahead of the built-in ones."""
    _LAYOUTS.insert(0, layout)


@dataclass(frozen=True)
class NeuronParameter:
    """One parameter of a block that has an axis of neurons."""

    owner: nn.Module
    attribute: str
    axis: int
    stacked: int
    """2 where gate and up are stacked along the axis: neuron j then also sits at F + j."""

    @property
    def current(self) -> Tensor:
        """The parameter that is installed now."""
        tensor = getattr(self.owner, self.attribute)
        assert isinstance(tensor, Tensor)
        return tensor


class FeedForward:
    """The FF block of one decoder layer: its neuron parameters, installing and gathering them."""

    def __init__(self, module: nn.Module, layout: Layout, *, inline: bool) -> None:
        self.module = module
        self.inline = inline
        """Whether `module` is the decoder layer itself, whose forward does more than the FF (OPT)."""
        self.down: nn.Module = getattr(module, layout.down)
        self.neurons = _weight(self.down).shape[_neuron_axis(self.down, is_down=True)]
        inputs = [getattr(module, name) for name in layout.inputs]
        self.parameters = (
            *(parameter for projection in inputs for parameter in _input_parameters(projection, self.neurons)),
            NeuronParameter(self.down, "weight", _neuron_axis(self.down, is_down=True), 1),
        )

    @property
    def gated(self) -> bool:
        """Whether two activations per neuron exist (gate and up), in one matrix or in two."""
        weights = [p for p in self.parameters[:-1] if p.attribute == "weight"]
        return sum(p.stacked for p in weights) > 1

    def current(self) -> list[Tensor]:
        """The installed parameters, in the order of `parameters`."""
        return [parameter.current for parameter in self.parameters]

    def install(self, tensors: Sequence[Tensor]) -> None:
        """Make `tensors` the block's parameters; nothing is copied."""
        for parameter, tensor in zip(self.parameters, tensors, strict=True):
            if not isinstance(tensor, nn.Parameter):
                tensor = nn.Parameter(tensor, requires_grad=False)
            setattr(parameter.owner, parameter.attribute, tensor)
            if parameter.attribute == "weight":
                _declare_features(parameter.owner, tensor)

    def compact_shapes(self, kept: int) -> list[list[int]]:
        """Shapes of the parameters when `kept` neurons are left.

        Conv1D reshapes by its input's size and cannot have none: a block of them keeps one, which `gather` zeroes.
        """
        if isinstance(self.down, Conv1D):
            kept = max(kept, 1)
        shapes = [list(tensor.shape) for tensor in self.current()]
        for parameter, shape in zip(self.parameters, shapes, strict=True):
            shape[parameter.axis] = kept * parameter.stacked
        return shapes

    @torch.no_grad()
    def gather(self, full: Sequence[Tensor], chosen: Tensor, out: Sequence[Tensor]) -> None:
        """Write the `chosen` neurons (sorted indices [K]) of `full` into `out`, the compact parameters."""
        for parameter, source, target in zip(self.parameters, full, out, strict=True):
            if chosen.numel() == 0:
                target.detach().zero_()
                continue
            index = chosen
            if parameter.stacked == 2:
                index = torch.cat([chosen, chosen + self.neurons])
            _take(source.detach(), parameter.axis, index, target.detach())

    def neuron_norms(self, full: Sequence[Tensor]) -> Tensor:
        """Static score of "magnitude" [F]: product of the norms of each neuron's input rows."""
        product = torch.ones(self.neurons, device=full[0].device)
        for parameter, tensor in zip(self.parameters[:-1], full, strict=False):
            if parameter.attribute == "weight":
                norms = torch.linalg.vector_norm(tensor, dim=1 - parameter.axis, dtype=torch.float32)
                for part in norms.split(self.neurons):
                    product = product * part
        return product


def _weight(projection: nn.Module) -> Tensor:
    weight = projection.weight
    assert isinstance(weight, Tensor)
    return weight


def _neuron_axis(projection: nn.Module, *, is_down: bool) -> int:
    # Linear holds [out, in] and Conv1D [in, out]; neurons are the inputs of the down projection.
    return int(is_down) if not isinstance(projection, Conv1D) else int(not is_down)


def _input_parameters(projection: nn.Module, neurons: int) -> list[NeuronParameter]:
    axis = _neuron_axis(projection, is_down=False)
    stacked = _weight(projection).shape[axis] // neurons
    parameters = [NeuronParameter(projection, "weight", axis, stacked)]
    if getattr(projection, "bias", None) is not None:
        parameters.append(NeuronParameter(projection, "bias", 0, stacked))
    return parameters


def _declare_features(projection: nn.Module, weight: Tensor) -> None:
    # Conv1D reads its output size from `nf` in forward; Linear's are for people who print the model.
    if isinstance(projection, Conv1D):
        projection.nx, projection.nf = weight.shape
    elif isinstance(projection, nn.Linear):
        projection.out_features, projection.in_features = weight.shape


def _take(source: Tensor, axis: int, index: Tensor, out: Tensor) -> None:
    if axis == 0 or source.device.type != "cpu":
        torch.index_select(source, axis, index, out=out)
        return
    # Columns on the CPU: numpy's take is 4x torch's index_select (benchmarks/NOTES.md). It knows no bfloat16,
    # so bits are moved as integers; mode "wrap" because "raise" would buffer the whole output.
    bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[source.element_size()]
    columns, target = source.view(bits).numpy(), out.view(bits).numpy()
    np.take(columns, index.numpy(), axis=1, out=target, mode="wrap")


def find_feed_forwards(model: nn.Module, layers: int) -> tuple[nn.ModuleList, list[FeedForward]]:
    """The decoder layers of `model` and the FF block of each; UnsupportedModel names what was found instead."""
    if layers < 1:
        raise UnsupportedModel(f"{type(model).__name__} has {layers} decoder layers")
    candidates = [m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == layers]
    if not candidates:
        raise UnsupportedModel(f"{type(model).__name__} has no list of {layers} decoder layers; {REGISTER_HINT}")
    decoder = next((c for c in candidates if _matches(c[0])), candidates[0])
    return decoder, [_block_of(layer, f"{type(model).__name__} layer {i}") for i, layer in enumerate(decoder)]


def _matches(layer: nn.Module) -> list[tuple[nn.Module, Layout]]:
    found: list[tuple[nn.Module, Layout]] = []
    for module in layer.modules():
        children = set(module._modules)
        layout = next((lay for lay in _LAYOUTS if {*lay.inputs, lay.down} <= children), None)
        if layout is not None:
            found.append((module, layout))
    return found


def _block_of(layer: nn.Module, where: str) -> FeedForward:
    experts = [name for name, p in layer.named_parameters() if p.dim() > 2]
    if experts:
        raise UnsupportedModel(f"{where} holds mixture-of-experts parameters ({experts[0]}): only dense FFs work")
    found = _matches(layer)
    if len(found) != 1:
        names = ", ".join(dict.fromkeys(name.rsplit(".", 1)[0] for name, _ in layer.named_parameters()))
        raise UnsupportedModel(f"{where} has {len(found)} FF blocks of a known layout among {names}; {REGISTER_HINT}")
    module, layout = found[0]
    _check_projections(module, layout, where)
    block = FeedForward(module, layout, inline=module is layer)
    _check_shapes(block, layer, where)
    return block


def _check_projections(module: nn.Module, layout: Layout, where: str) -> None:
    for name in (*layout.inputs, layout.down):
        projection = getattr(module, name)
        if not isinstance(projection, nn.Linear | Conv1D):
            raise UnsupportedModel(f"{where}: {name} is a {type(projection).__name__}, not a plain linear layer")
        if projection.weight.numel() == 0:
            raise UnsupportedModel(f"{where}: {name} is empty")


def _check_shapes(block: FeedForward, layer: nn.Module, where: str) -> None:
    for parameter in block.parameters[:-1]:
        size = parameter.current.shape[parameter.axis]
        if size not in (block.neurons, 2 * block.neurons):
            raise UnsupportedModel(
                f"{where}: an input projection has {size} rows for {block.neurons} neurons: expected F or 2F"
            )
    known = {id(parameter.current) for parameter in block.parameters}
    inside = layer.named_parameters(recurse=False) if block.inline else block.module.named_parameters()
    known.add(id(getattr(block.down, "bias", None)))
    for name, tensor in inside:
        if id(tensor) not in known and block.neurons in tensor.shape:
            raise UnsupportedModel(
                f"{where}: parameter {name} of size {block.neurons} belongs to the neurons too, in a way no "
                f"layout describes; {REGISTER_HINT}"
            )
