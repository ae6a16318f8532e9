"""A smaller ordinary checkpoint for one domain: the neurons that its prompts use, chosen once and written.

Every prompt of a set passes through the full model, streamed; the statistics of all, each by its length, choose as
those of a batch would (arXiv 2404.01365, section 4.2). What is written has the architecture of the original with fewer
neurons, and needs none of our code.
"""

import contextlib
import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import PretrainedConfig

from griffin_offload.blocks.base import Block
from griffin_offload.blocks.experts import Experts
from griffin_offload.blocks.layouts import build_on_meta, find_feed_forwards
from griffin_offload.checkpoint.base import Checkpoint
from griffin_offload.checkpoint.files import write_text
from griffin_offload.checkpoint.registry import open_checkpoint
from griffin_offload.config import WEIGHT_NORMS, SelectionMethod
from griffin_offload.engine.build import build
from griffin_offload.engine.model import GriffinModel
from griffin_offload.engine.shards import CopyDirectory, Reader, check_place, shard_names
from griffin_offload.errors import CheckpointError, UnsupportedModel, UsageError, one_line
from griffin_offload.formats import FLOATS
from griffin_offload.method.selection import layer_generator, neurons_kept, select_neurons
from griffin_offload.method.statistic import share_kept
from griffin_offload.transformers_api import StockModel

MULTIPLE = 64
"""Neurons of a layer are a multiple of it where there are so many: quantisers and kernels of others want that."""
HELD_OUT = 4
"""Every so-manieth prompt measures the choice of the others."""
_MEASURED_PROMPTS, _MEASURED_TOKENS = 8, 64
_METADATA = {"format": "pt"}
Statistic = dict[int, Tensor]
"""s^2 / S [F] of each layer, summed over prompts."""


@dataclass(frozen=True)
class Choice:
    """What a set of prompts says about a model's neurons."""

    chosen_on: Statistic
    held_out: Statistic
    """Of the prompts that measure; empty where there are too few."""
    prompts: int


@dataclass(frozen=True)
class Export:
    """What was written, and what it costs on held-out prompts of the set; None where there were too few."""

    directory: Path
    neurons: int
    """Of each layer."""
    of_neurons: int
    prompts: int
    read_bytes: int
    written_bytes: int
    activation_kept: float
    activation_kept_heldout: float | None
    kl: float | None = None
    """KL(original || export) in nats, over the last tokens of held-out prompts."""
    same_first_choice: float | None = None
    perplexity: float | None = None
    """Of the export, on those tokens."""
    perplexity_before: float | None = None


def choose(model: GriffinModel, prompts: Sequence[Tensor], progress: Callable[[], None] = lambda: None) -> Choice:
    """The statistics of `prompts` [T] on `model`, of which every layer is streamed; `progress` after each."""
    chosen_on: Statistic = {}
    held_out: Statistic = {}
    for number, ids in enumerate(prompts, start=1):
        context = model.new_context()
        model.generate(ids[None], context=context, max_new_tokens=1, do_sample=False)
        total = held_out if number % HELD_OUT == 0 else chosen_on
        for index, squared in context.squared.items():
            share = squared[0] / squared.sum().clamp(min=torch.finfo(squared.dtype).tiny)
            total[index] = total[index] + share if index in total else share
        progress()
    return Choice(chosen_on, held_out, len(prompts))


def check(model: str | Path, out: str | Path, density: float, *, offline: bool = False) -> None:
    """What can be known before any prompt passes: UsageError, ModelError; UnsupportedModel for what no ordinary
    checkpoint can say."""
    checkpoint = open_checkpoint(model, offline=offline)
    if not checkpoint.precision.is_plain:
        raise UsageError(f"{checkpoint.directory} is converted to {checkpoint.precision}: give the original")
    smaller_config(checkpoint, _counts(checkpoint, density)[1])
    check_place(Path(out).expanduser())


@torch.no_grad()
def export(
    model: str | Path,
    out: str | Path,
    choice: Choice,
    density: float,
    *,
    selection: SelectionMethod = "topk",
    offline: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> Export:
    """Write `model` with the share `density` of every layer's neurons, those of `choice`, in its own precision.

    The directory `out` must not exist yet, or hold the same export unfinished. Raises what `check` raises, DoesNotFit
    (the disk) or GriffinError (writing)."""
    check(model, out, density, offline=offline)
    checkpoint = open_checkpoint(model, offline=offline)
    neurons, kept = _counts(checkpoint, density)
    config = smaller_config(checkpoint, kept)
    digest = hashlib.sha256(b"".join(t.cpu().numpy().tobytes() for t in choice.chosen_on.values())).hexdigest()
    note = {"source": checkpoint.fingerprint(), "neurons": kept, "selection": selection, "statistic": digest}
    directory = CopyDirectory(out, "export", note, _METADATA, _check_shard)
    meta = build_on_meta(config, checkpoint.dtype)
    shares: list[tuple[float, float | None]] = []
    with directory.writing(), contextlib.closing(checkpoint.watched()) as files:
        files.check()
        directory.begin(sum(parameter.nbytes for parameter in meta.parameters()))
        chooser = _Chooser(choice, kept, selection, shares)
        names = _write_shards(checkpoint, directory, chooser, progress)
        files.check()
        directory.finish(checkpoint, config_json(config, checkpoint.dtype), names)
    held_out = [share for _, share in shares if share is not None]
    return Export(
        directory=directory.path,
        neurons=kept,
        of_neurons=neurons,
        prompts=choice.prompts,
        read_bytes=checkpoint.weight_bytes,
        written_bytes=sum((directory.path / name).stat().st_size for name in names),
        activation_kept=sum(share for share, _ in shares) / len(shares),
        activation_kept_heldout=sum(held_out) / len(held_out) if held_out else None,
    )


def _check_shard(path: Path) -> None:
    try:
        with safe_open(path, framework="np") as file:
            file.keys()
    except (SafetensorError, OSError) as error:
        raise CheckpointError(one_line(error)) from error


def _counts(checkpoint: Checkpoint, density: float) -> tuple[int, int]:
    """Neurons of each layer, and how many of them stay; UnsupportedModel where they differ."""
    layers = checkpoint.config.get_text_config().num_hidden_layers
    blocks = find_feed_forwards(build_on_meta(checkpoint.config, checkpoint.dtype), layers)[1]
    if any(isinstance(block, Experts) for block in blocks):
        raise UnsupportedModel("a mixture of experts is not exported yet: its layers hold experts, not neurons")
    sizes = {block.neurons for block in blocks}
    if len(sizes) > 1:
        raise UnsupportedModel(f"the layers have {min(sizes)} to {max(sizes)} neurons: a config has one number for all")
    neurons = sizes.pop()
    kept = neurons_kept(neurons, density)
    kept = kept // MULTIPLE * MULTIPLE if kept >= MULTIPLE else kept
    if not 0 < kept < neurons:
        raise UsageError(f"a density of {density} keeps {kept} of {neurons} neurons: give a share between 0 and 1")
    return neurons, kept


def smaller_config(checkpoint: Checkpoint, neurons: int) -> PretrainedConfig:
    """The config of the language model with so many neurons a layer: its one number that makes all layers so, and
    changes nothing else. UnsupportedModel where there is none."""
    text = checkpoint.config.get_text_config()
    layers = text.num_hidden_layers
    wanted = _with_neurons(build_on_meta(text, checkpoint.dtype), layers, neurons)
    for name, value in text.to_dict().items():
        if not (value is None or type(value) is int) or name not in _SIZES:
            continue
        smaller = type(text).from_dict(text.to_dict() | {name: neurons})
        with contextlib.suppress(CheckpointError):
            if _shapes(build_on_meta(smaller, checkpoint.dtype)) == wanted:
                return smaller
    raise UnsupportedModel(f"{text.model_type}: its config has no number for the neurons of a layer")


# What configs call it; the others have to stay as they are, whatever their value.
_SIZES = ("intermediate_size", "ffn_dim", "n_inner", "ffn_hidden_size", "ffn_intermediate_size", "d_ff")


def _shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in model.named_parameters()}


def _with_neurons(model: StockModel, layers: int, neurons: int) -> dict[str, tuple[int, ...]]:
    """Shapes of the parameters of `model` if its blocks had so many."""
    _, blocks = find_feed_forwards(model, layers)
    found = _shapes(model)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    for block in blocks:
        specs = block.compact_specs((neurons,), (FLOATS,))
        for tensor, (shape, _) in zip(block.full(), specs, strict=True):
            found[names[id(tensor)]] = tuple(shape)
    return found


def config_json(config: PretrainedConfig, dtype: torch.dtype) -> dict[str, Any]:
    """What config.json says of the export."""
    named = {"architectures": [type(build_on_meta(config, dtype)).__name__], "dtype": str(dtype).removeprefix("torch.")}
    found: dict[str, Any] = json.loads(config.to_json_string(use_diff=True))
    return found | named


@dataclass
class _Chooser:
    """Chooses each layer's neurons when it is there, and notes what they hold of the activation."""

    choice: Choice
    kept: int
    selection: SelectionMethod
    shares: list[tuple[float, float | None]]

    def choose(self, index: int, block: Block, full: Sequence[Tensor]) -> Tensor:
        """Sorted indices [K]; `full` are the layer's tensors."""
        squared = self.choice.chosen_on[index].cpu()
        norms = block.weight_norms(self.selection, full) if self.selection in WEIGHT_NORMS else None
        chosen = select_neurons(squared, self.kept, self.selection, layer_generator(0, index), norms)
        held_out = self.choice.held_out.get(index)
        measured = None if held_out is None else float(share_kept(held_out.cpu(), chosen))
        self.shares.append((float(share_kept(squared, chosen)), measured))
        return chosen


def _write_shards(
    checkpoint: Checkpoint,
    directory: CopyDirectory,
    chooser: _Chooser,
    progress: Callable[[int, int], None] | None,
) -> list[str]:
    """Every shard that is not there yet; the names of all."""
    model = build(checkpoint)
    decoder, blocks = find_feed_forwards(model, checkpoint.config.get_text_config().num_hidden_layers)
    prefix = next(name for name, module in model.named_modules() if module is decoder)
    names = shard_names(len(blocks) + 1)
    parameters = dict(model.named_parameters())
    with contextlib.closing(Reader(model, checkpoint, progress)) as reader:
        for index, block in enumerate(blocks):
            own = {name: tensor for name, tensor in parameters.items() if name.startswith(f"{prefix}.{index}.")}
            with contextlib.ExitStack() as read:
                full = [read.enter_context(reader.reading(tensor)) for tensor in block.full()]
                chosen = chooser.choose(index, block, full)
                if not (directory.path / names[index]).is_file():
                    smaller = _gathered(block, full, chosen)
                    directory.write_shard(names[index], _layer(own, block.full(), smaller, reader))
        if not (directory.path / names[-1]).is_file():
            directory.write_shard(names[-1], _outside(model, prefix, reader))
    return names


def _gathered(block: Block, full: Sequence[Tensor], chosen: Tensor) -> list[Tensor]:
    specs = block.compact_specs((chosen.numel(),), (FLOATS,))
    out = [torch.empty(shape, dtype=full[0].dtype, device="cpu") for shape, _ in specs]
    block.gather(full, [chosen], out)
    return out


def _layer(
    parameters: Mapping[str, Tensor], full: Sequence[Tensor], smaller: Sequence[Tensor], reader: Reader
) -> dict[str, Tensor]:
    """All `parameters` of a layer, its `full` FF tensors replaced by `smaller` ones."""
    replaced = {id(old): new for old, new in zip(full, smaller, strict=True)}
    return {name: replaced[id(t)] if id(t) in replaced else reader.copy(t) for name, t in parameters.items()}


def _outside(model: StockModel, prefix: str, reader: Reader) -> dict[str, Tensor]:
    """Embeddings, head, last norm, and the buffers that a checkpoint holds."""
    parameters = dict(model.named_parameters())
    tied = {name for name, _ in model.named_parameters(remove_duplicate=False)} - set(parameters)
    found = {name: t for name, t in model.state_dict().items() if name not in parameters and name not in tied}
    found |= {name: t for name, t in parameters.items() if not name.startswith(f"{prefix}.")}
    return {name: reader.copy(tensor) for name, tensor in found.items()}


# What it costs, measured on held-out prompts by loading both.


Probabilities = list[Tensor]
"""Logarithms float32 [T, V] of each prompt's last predictions, in host memory."""


@torch.no_grad()
def predictions(model: GriffinModel, prompts: Sequence[Tensor]) -> Probabilities:
    """Of the last tokens of the first few held-out `prompts`."""
    found = []
    for ids in held_out_of(prompts)[:_MEASURED_PROMPTS]:
        logits = model.model(ids[None].to(model.device)).logits[0, -_MEASURED_TOKENS - 1 : -1]
        found.append(logits.float().log_softmax(-1).cpu())
    return found


def held_out_of(prompts: Sequence[Tensor]) -> list[Tensor]:
    """Those that do not choose."""
    return [ids for number, ids in enumerate(prompts, start=1) if number % HELD_OUT == 0 and ids.numel() > 1]


def measured(found: Export, before: Probabilities, after: Probabilities, prompts: Sequence[Tensor]) -> Export:
    """`found` with what pruning costs; as it is without held-out prompts."""
    if not before:
        return found
    targets = [ids[-len(p) :] for p, ids in zip(before, held_out_of(prompts), strict=False)]
    old, new, ids = torch.cat(before), torch.cat(after), torch.cat(targets)[:, None]
    return replace(
        found,
        kl=float((old.exp() * (old - new)).sum(-1).mean()),
        same_first_choice=float((old.argmax(-1) == new.argmax(-1)).float().mean()),
        perplexity=math.exp(-float(new.gather(1, ids).mean())),
        perplexity_before=math.exp(-float(old.gather(1, ids).mean())),
    )


def write_card(found: Export, source: str, selection: str, fingerprint: str) -> None:
    """README.md of the export: what it is, and the figures."""
    figures = {
        "bytes before": f"{found.read_bytes:,}",
        "bytes": f"{found.written_bytes:,}",
        "share of the activation that is kept": _number(found.activation_kept),
        "the same, held out": _number(found.activation_kept_heldout),
        "KL to the original, held out": _number(found.kl),
        "same first choice, held out": _number(found.same_first_choice),
        "perplexity of the original, held out": _number(found.perplexity_before),
        "perplexity, held out": _number(found.perplexity),
    }
    rows = "\n".join(f"| {name} | {value} |" for name, value in figures.items())
    text = f"""# {found.directory.name}

{source} with {found.neurons} of {found.of_neurons} feed-forward neurons in each layer: those that {found.prompts}
prompts use most ({selection}, GRIFFIN, arXiv 2404.01365). About other things than these prompts it is worse than the
figures say. Every {HELD_OUT}th prompt did not choose: these are held out.

| | |
|---|---|
{rows}

Fingerprint of the source: {fingerprint}. Written by griffin-offload; ordinary software loads it.
"""
    write_text(found.directory / "README.md", text)


def _number(value: float | None) -> str:
    return "too few prompts" if value is None else f"{value:.4g}"
