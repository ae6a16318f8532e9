"""Where the feed-forward block of a layer is found, in every architecture, and the language model of a
checkpoint that sees as well: tables of names, and the check at load that they mean what the tables say."""

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PretrainedConfig
from transformers.pytorch_utils import Conv1D

from griffin_offload.blocks.base import Activations, Block, Finder, NoFeedForward
from griffin_offload.blocks.experts import find_experts
from griffin_offload.blocks.feedforward import FeedForward, SubNorm, features
from griffin_offload.blocks.states import check_decodable, takes_cache
from griffin_offload.devices.threads import building
from griffin_offload.errors import CheckpointError, UnsupportedModel, UsageError, one_line
from griffin_offload.formats.base import is_plain
from griffin_offload.formats.linear import QuantizedLinear
from griffin_offload.formats.translated import in_memory
from griffin_offload.transformers_api import StockModel, adapted


@dataclass(frozen=True)
class FeedForwardLayout:
    """Names of a block's projections, as attributes of one module (the FF module, or the decoder layer itself), or of
    parts of it, with dots between."""

    inputs: tuple[str, ...]
    down: str
    norm: str = ""
    """Of the neurons, in front of the down projection."""

    @property
    def names(self) -> tuple[str, ...]:
        return (*self.inputs, self.down, self.norm) if self.norm else (*self.inputs, self.down)


# Whether an input projection holds gate and up together is decided by its shape, never by its name.
LAYOUTS = [
    FeedForwardLayout(("gate_proj", "up_proj"), "down_proj", "ffn_sub_norm"),  # BitNet
    FeedForwardLayout(("gate_proj", "up_proj"), "down_proj"),  # Llama, Mistral, Gemma, Qwen, OLMo 2, Cohere 2, StableLM
    FeedForwardLayout(("gate_up_proj",), "down_proj"),  # Phi-3, GLM 4
    FeedForwardLayout(("up_proj",), "down_proj"),  # Nemotron
    FeedForwardLayout(("w1", "w3"), "w2"),  # Llama as Meta names it
    FeedForwardLayout(("fc1",), "fc2"),  # OPT (inline in the layer), Phi
    FeedForwardLayout(("c_fc",), "c_proj"),  # GPT-2 (Conv1D: axes swapped), StarCoder2
    FeedForwardLayout(("dense_h_to_4h",), "dense_4h_to_h"),  # GPT-NeoX, Falcon, BLOOM
    FeedForwardLayout(("fc_in",), "fc_out"),  # GPT-J, CodeGen
    FeedForwardLayout(("input_linear",), "output_linear"),  # Granite 4 without experts
    FeedForwardLayout(("Wi",), "Wo"),  # ModernBERT's decoder
    FeedForwardLayout(("w_in.w_0", "w_in.w_1"), "w_out"),  # CPM-Ant
    FeedForwardLayout(("ffn.0",), "ffn.2"),  # CTRL
    FeedForwardLayout(("intermediate.dense",), "output.dense"),  # BERT and its kin, as decoders
]
REGISTER_HINT = "register others with griffin_offload.register_layout(FeedForwardLayout(inputs=..., down=...))"


def register_layout(layout: FeedForwardLayout) -> None:
    """Make blocks with the names of `layout` known, ahead of the built-in ones."""
    LAYOUTS.insert(0, layout)


FINDERS: list[Finder] = [find_experts]


def register_block(finder: Finder) -> None:
    """Let `finder` look at decoder layers before the layouts, and before those registered earlier."""
    FINDERS.insert(0, finder)


def find_feed_forwards(model: nn.Module, layers: int) -> tuple[nn.ModuleList, list[Block]]:
    """The decoder layers of `model` and the FF block of each, which has no neurons where a layer is attention or a
    recurrence alone; UnsupportedModel names what was found instead."""
    if layers < 1:
        raise UnsupportedModel(f"{type(model).__name__} has {layers} decoder layers")
    # A tower of another kind may have as many layers.
    decoder_of: Callable[[], Any] | None = getattr(model, "get_decoder", None)
    own = decoder_of() if decoder_of is not None else None
    places = [place for place in (own, model) if isinstance(place, nn.Module)]
    found = (_lists(place, getattr(model, "config", None), layers) for place in places)
    candidates = next((lists for lists in found if lists), [])
    if not candidates:
        raise UnsupportedModel(
            f"{type(model).__name__} has no list of {layers} decoder layers: some may run several times a token, or "
            "two be one; a pass here brings each layer once"
        )
    name = type(model).__name__

    def has_some(candidate: nn.ModuleList) -> bool:
        return any(_matches(layer) or _found(layer, f"{name} layer {i}") for i, layer in enumerate(candidate))

    decoder = next(filter(has_some, candidates), candidates[0])
    return decoder, [_block_of(layer, f"{name} layer {i}") for i, layer in enumerate(decoder)]


def _lists(place: nn.Module, config: Any, layers: int) -> list[nn.ModuleList]:
    """Lists of so many modules, those of parts last that have a config of their own."""
    known = (None, config, config.get_text_config() if isinstance(config, PretrainedConfig) else None)
    owners = [(place, place), *((part, child) for part in place.modules() for child in part.children())]
    found = [(part, child) for part, child in owners if isinstance(child, nn.ModuleList) and len(child) == layers]
    found.sort(key=lambda pair: all(getattr(pair[0], "config", None) is not other for other in known))
    return [child for _, child in found]


def _matches(layer: nn.Module) -> list[tuple[nn.Module, FeedForwardLayout]]:
    found: list[tuple[nn.Module, FeedForwardLayout]] = []
    for module in layer.modules():
        if not module._modules:
            continue
        layout = next((lay for lay in LAYOUTS if all(_has(module, name) for name in lay.names)), None)
        if layout is not None:
            found.append((module, layout))
    return found


def _has(module: nn.Module, path: str) -> bool:
    first, _, rest = path.partition(".")
    child = module._modules.get(first)
    return child is not None and (not rest or _has(child, rest))


def _found(layer: nn.Module, where: str) -> Block | None:
    """By the first finder that knows it."""
    return next((block for finder in FINDERS if (block := finder(layer, where)) is not None), None)


def _block_of(layer: nn.Module, where: str) -> Block:
    other = _found(layer, where)
    if other is not None:
        return other
    experts, found = _experts(layer), _matches(layer)
    if experts is not None:
        raise UnsupportedModel(
            f"{where} holds mixture-of-experts parameters ({experts}) that are not of an experts module of "
            "transformers': not supported"
        )
    if not found and _is_mixer_alone(layer):
        return NoFeedForward(layer)
    if len(found) != 1:
        names = ", ".join(dict.fromkeys(name.rsplit(".", 1)[0] for name, _ in layer.named_parameters()))
        raise UnsupportedModel(f"{where} has {len(found)} FF blocks of a known layout among {names}; {REGISTER_HINT}")
    module, layout = found[0]
    _check_projections(module, layout, where)
    norm = _norm_of(module, layout.norm, where) if layout.norm else None
    block = FeedForward(module, layout.inputs, layout.down, norm, inline=module is layer)
    _check_shapes(block, layer, where)
    return block


def _is_mixer_alone(layer: nn.Module) -> bool:
    """Whether all matrices of `layer` are of one part of it, to which the KV cache is given: attention or a recurrence,
    beside which there is no feed-forward of another layout."""
    holding = [part for part in layer.children() if any(p.dim() > 1 for p in part.parameters())]
    own = any(parameter.dim() > 1 for parameter in layer.parameters(recurse=False))
    return not own and len(holding) == 1 and takes_cache(holding[0])


def _norm_of(module: nn.Module, name: str, where: str) -> SubNorm:
    """In the place of the norm there, one that neurons may be left out of."""
    norm = module.get_submodule(name)
    if not isinstance(norm, SubNorm):
        if type(norm).__name__ != "BitNetRMSNorm":
            raise UnsupportedModel(f"{where}: {name} is a {type(norm).__name__}, which is not known to be an RMS norm")
        norm = SubNorm(norm)
        module.set_submodule(name, norm)
    return norm


def _experts(layer: nn.Module) -> str | None:
    """A parameter of experts, of which every token uses some: matrices in a stack, or modules in a list. Axes alone do
    not tell: convolutions and gates of recurrences have three, too."""
    for path, module in layer.named_modules():
        for own, parameter in module.named_parameters(recurse=False):
            described = f"{path}.{type(module).__name__}.{own}".casefold()
            if "expert" in described.replace("shared_expert", "") and parameter.dim() > 1:
                return f"{path}.{own}".removeprefix(".")
    return None


def _check_projections(module: nn.Module, layout: FeedForwardLayout, where: str) -> None:
    for name in (*layout.inputs, layout.down):
        projection = module.get_submodule(name)
        if not isinstance(projection, nn.Linear | Conv1D | QuantizedLinear):
            raise UnsupportedModel(f"{where}: {name} is a {type(projection).__name__}, not a plain linear layer")
        if 0 in features(projection):
            raise UnsupportedModel(f"{where}: {name} is empty")


def _check_shapes(block: FeedForward, layer: nn.Module, where: str) -> None:
    for projection in block.projections[:-1]:
        size = features(projection.owner)[0]
        if size not in (block.neurons, 2 * block.neurons):
            raise UnsupportedModel(
                f"{where}: an input projection has {size} rows for {block.neurons} neurons: expected F or 2F"
            )
    known = {id(tensor) for part in block.parts for tensor in part.owner.parameters(recurse=False)}
    inside = layer.named_parameters(recurse=False) if block.inline else block.module.named_parameters()
    for name, tensor in inside:
        if id(tensor) not in known and block.neurons in tensor.shape:
            raise UnsupportedModel(
                f"{where}: parameter {name} of size {block.neurons} belongs to the neurons too, which no "
                "layout describes: write a Block and register its finder with griffin_offload.register_block"
            )


# The language model of a checkpoint that sees or hears as well: all else is left out, for text alone is run.


class LeftOut(nn.Module):
    """In the place of a tower or a projector: holds nothing, and says so when it is used."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self._name = name

    def forward(self, *_: Any, **__: Any) -> NoReturn:
        raise UsageError(f"{self._name} is left out: text alone is run here, give no images, videos or sound")


def leave_out_towers(model: StockModel) -> list[str]:
    """Replace every module of `model` that its language model does not consist of, all parameters gone; their names,
    none where the model knows text alone."""
    if model.config.get_text_config() is model.config:
        return []
    names = {id(module): name for name, module in model.named_modules()}
    kept = [names[id(part)] for part in (model.get_decoder(), model.get_output_embeddings()) if id(part) in names]
    if "" in kept:
        return []
    found = [name for name, module in model.named_modules() if name and _is_outside(name, kept, module)]
    for name in found:
        model.set_submodule(name, LeftOut(name))
    return found


def left_out_parts(model: StockModel) -> set[str]:
    """What the names of tensors have in them, between dots, that belong to a module left out of `model`."""
    return {name.rpartition(".")[2] for name, module in model.named_modules() if isinstance(module, LeftOut)}


def _is_outside(name: str, kept: list[str], module: nn.Module) -> bool:
    """Neither kept, nor around what is kept, nor inside of something that is outside itself."""
    around = [part for part in kept if part.startswith(f"{name}.")]
    inside = [part for part in kept if name == part or name.startswith(f"{part}.")]
    parent = name.rpartition(".")[0]
    beside = not parent or any(part.startswith(f"{parent}.") for part in kept)
    return not around and not inside and beside and next(module.parameters(), None) is not None


def build_on_meta(config: PretrainedConfig, dtype: torch.dtype) -> StockModel:
    """The language model of `config` with no storage: every name and shape of it, in well under a second for 70B."""
    with building(dtype), torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # advice about initialisation and attention, which never happens here
        try:
            made = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=False)
            model: StockModel = adapted(made)
        except Exception as error:  # each architecture fails in its own way
            reason = one_line(error).partition(" Model type should be one of")[0]  # a page of names
            raise CheckpointError(f"the config does not describe a causal language model: {reason}") from error
    leave_out_towers(model)
    check_decodable(model)  # before anything is said of feed-forwards, which such models may not have
    return model


# Differences are summation order alone; a wrong neuron shows as an error of order one.
_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}
# Of formats whose neurons rest in another one: they are rounded once more.
_TOLERANCE_ROUNDED = 0.3


@torch.no_grad()
def self_check(block: Block) -> None:
    """Run the block on two random tokens, once with half its neurons masked and once gathered.

    The block is left as it was. Raises UnsupportedModel when the results differ or when the input of the down
    projection is never seen. A block that is written inline in its layer (OPT) is checked by its projections.
    """
    stored = block.full()
    full = [in_memory(tensor) for tensor in stored]
    generator = torch.Generator().manual_seed(0)
    chosen = (
        torch.randperm(block.neurons, generator=generator, dtype=torch.long, device="cpu")[: block.neurons // 2]
        .sort()
        .values
    )
    dtype = next(tensor.dtype for tensor in full if is_plain(tensor))
    # Unit rows, scaled so that activations neither vanish nor saturate.
    x = torch.randn(1, 2, block.hidden, generator=generator, dtype=torch.float32, device="cpu").to(dtype)
    try:
        block.install_full(full)
        masked = _masked(block, chosen, x)
        compact = block.allocate((chosen.numel(),), dtype, full[0].device)
        block.gather(full, [chosen], compact)
        block.install_compact(compact)
        gathered = block.run(x)
    finally:
        block.install_full(stored)
    scale = masked.abs().max().clamp_min(torch.finfo(torch.float32).tiny)
    error = ((gathered - masked).abs().max() / scale).item()
    if not error <= max(_TOLERANCE[dtype], _TOLERANCE_ROUNDED * block.rounds_again):
        raise UnsupportedModel(
            f"self-check failed: the gathered FF of {type(block.module).__name__} differs from the masked one by "
            f"{error:.1e} of its output, so its neurons are not laid out as assumed; {REGISTER_HINT}"
        )


def _masked(block: Block, chosen: Tensor, x: Tensor) -> Tensor:
    seen = []
    kept = torch.zeros(block.neurons, dtype=torch.bool, device=chosen.device).index_fill_(0, chosen, True)

    def mask(found: Activations) -> None:
        seen.append(found.z.shape[-1])
        if seen == [block.width]:
            found.by_sample(x.shape[0]).leave_out(kept)

    block.observe(mask)
    try:
        output = block.run(x)
    finally:
        block.unhook()
    if seen != [block.width]:
        raise UnsupportedModel(
            f"self-check failed: the down projection of {type(block.module).__name__} is not called once with all "
            f"{block.width} activations (seen: {seen})"
        )
    return output
