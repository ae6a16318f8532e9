"""A smaller ordinary checkpoint for one domain: the neurons or experts that its prompts use, chosen once and written.

Every prompt of a set passes through the full model, streamed; the statistics of all, each by its length, choose as
those of a batch would (arXiv 2404.01365, section 4.2). What is written has the architecture of the original with fewer
neurons, and needs none of our code. Of a mixture of experts whole experts are chosen, and the router loses its rows of
the others; layers without experts stay as they are.
"""

import contextlib
import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from griffin_offload.blocks.base import Block
from griffin_offload.blocks.experts import Experts
from griffin_offload.blocks.layouts import find_feed_forwards
from griffin_offload.checkpoint.files import write_text
from griffin_offload.checkpoint.registry import open_checkpoint
from griffin_offload.config import WEIGHT_NORMS, ExportForm, SelectionMethod
from griffin_offload.engine.build import build
from griffin_offload.engine.calibration import refitted, visit_moments
from griffin_offload.engine.export_files import ExportFiles, KeptCounts, Smaller, files_of
from griffin_offload.engine.model import GriffinModel
from griffin_offload.engine.shards import UNMEASURED, CopyDirectory, Reader, check_place
from griffin_offload.errors import CheckpointError, UsageError, one_line
from griffin_offload.formats import FLOATS
from griffin_offload.method.selection import layer_generator, neurons_kept, select_neurons, share_kept
from griffin_offload.transformers_api import StockModel

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
    tokens: int
    """Of the prompts that choose."""


@dataclass(frozen=True)
class Export:
    """What was written, and what it costs on held-out prompts of the set; None where there were too few."""

    directory: Path
    form: ExportForm
    unit: str
    """What was chosen: neurons, or experts."""
    neurons: int
    """Or experts, of each layer."""
    of_neurons: int
    asked_neurons: int
    """What the density says, of which the form may not take all."""
    prompts: int
    tokens: int
    """Of the prompts that chose."""
    read_bytes: int
    written_bytes: int
    activation_kept: float
    activation_kept_heldout: float | None
    refit: bool = False
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
    return Choice(chosen_on, held_out, len(prompts), sum(ids.numel() for ids in choosing(prompts)))


def check(
    model: str | Path,
    out: str | Path,
    density: float,
    form: ExportForm = "unquantized",
    *,
    refit: bool = False,
    offline: bool = False,
) -> int:
    """What can be known before any prompt passes: how many neurons or experts a layer will have. UsageError,
    ModelError; UnsupportedModel for what no ordinary checkpoint can say."""
    checkpoint = open_checkpoint(model, offline=offline)
    if not checkpoint.precision.is_plain:
        raise UsageError(f"{checkpoint.directory} is converted to {checkpoint.precision}: give the original")
    counts = KeptCounts.of(checkpoint, density, form)
    if refit and not counts.matrices:
        raise UsageError(f"a refit is of neurons, not of {counts.unit}: leave --refit out")
    directory = CopyDirectory(out, "export", {}, _METADATA, _check_shard)
    directory.check(files_of(Smaller.of(checkpoint, counts.kept), form)(directory).nbytes)
    return counts.kept


@torch.no_grad()
def export(
    model: str | Path,
    out: str | Path,
    choice: Choice,
    density: float,
    *,
    form: ExportForm = "unquantized",
    selection: SelectionMethod = "topk",
    refit: Sequence[Tensor] = (),
    offline: bool = False,
    progress: Callable[[int, int], None] | None = None,
    card: bool = False,
) -> Export:
    """Write `model` with the share `density` of every layer's neurons, those of `choice`, as `form` says. With prompts
    to `refit` on, those of `choice`, the neurons that stay make up for the others (`refitted` in calibration.py).

    The directory `out` must not exist yet, or hold the same export unfinished; with a `card` to come, it is unfinished
    until `write_card`. Raises what `check` raises, DoesNotFit
    (the disk) or GriffinError (writing)."""
    check_place(Path(out).expanduser())
    checkpoint = open_checkpoint(model, offline=offline)
    counts = KeptCounts.of(checkpoint, density, form)
    smaller = Smaller.of(checkpoint, counts.kept)
    made = files_of(smaller, form)
    digest = hashlib.sha256(b"".join(t.cpu().numpy().tobytes() for t in choice.chosen_on.values())).hexdigest()
    note = {
        "kind": "export",
        "source": checkpoint.fingerprint(),
        "neurons": counts.kept,
        "selection": selection,
        "statistic": digest,
    }
    note |= {"refit": True} if refit else {}
    directory = CopyDirectory(out, "export", note | {"form": form}, _METADATA, _check_shard, measured=card)
    shares: list[tuple[float, float | None]] = []
    with directory.writing(), contextlib.closing(checkpoint.watched()) as watched:
        watched.check()
        files = made(directory)
        directory.begin(files.nbytes)
        _write_parts(smaller, files, _Chooser(choice, counts, selection, shares), choosing(refit), progress)
        watched.check()
        written = files.finish()
    held_out = [share for _, share in shares if share is not None]
    return Export(
        directory=directory.path,
        form=form,
        unit=counts.unit,
        neurons=counts.kept,
        of_neurons=counts.neurons,
        asked_neurons=neurons_kept(counts.neurons, density),
        prompts=choice.prompts,
        tokens=choice.tokens,
        read_bytes=checkpoint.weight_bytes,
        written_bytes=written,
        activation_kept=sum(share for share, _ in shares) / len(shares),
        activation_kept_heldout=sum(held_out) / len(held_out) if held_out else None,
        refit=bool(refit),
    )


def _check_shard(path: Path) -> None:
    try:
        with safe_open(path, framework="np") as file:
            file.keys()
    except (SafetensorError, OSError) as error:
        raise CheckpointError(one_line(error)) from error


@dataclass
class _Chooser:
    """Chooses each layer's neurons when it is there, and notes what they hold of the activation."""

    choice: Choice
    counts: KeptCounts
    selection: SelectionMethod
    shares: list[tuple[float, float | None]]

    def choose(self, index: int, block: Block, full: Sequence[Tensor]) -> Tensor:
        """Sorted indices [K]; `full` are the layer's tensors."""
        squared, groups = self.choice.chosen_on[index].cpu(), self.counts.groups
        norms = block.weight_norms(self.selection, full) if self.selection in WEIGHT_NORMS else None
        generator, each = layer_generator(0, index), self.counts.neurons // groups
        parts = [
            first
            + select_neurons(
                squared[first : first + each],
                self.counts.kept // groups,
                self.selection,
                generator,
                None if norms is None else norms[first : first + each],
            )
            for first in range(0, self.counts.neurons, each)
        ]
        chosen = torch.cat(parts)
        held_out = self.choice.held_out.get(index)
        measured = None if held_out is None else float(share_kept(held_out.cpu(), chosen))
        self.shares.append((float(share_kept(squared, chosen)), measured))
        return chosen


def _write_parts(
    smaller: Smaller,
    files: ExportFiles,
    chooser: _Chooser,
    refit: Sequence[Tensor],
    progress: Callable[[int, int], None] | None,
) -> None:
    """Every part that is not there yet."""
    checkpoint = smaller.checkpoint
    model = build(checkpoint)
    decoder, blocks = find_feed_forwards(model, checkpoint.config.get_text_config().num_hidden_layers)
    prefix = next(name for name, module in model.named_modules() if module is decoder)
    # As they are mapped: during a forward other numbers may be in their places.
    state, mapped = model.state_dict(keep_vars=True), [block.full() for block in blocks]
    with contextlib.closing(Reader(model, checkpoint, progress)) as reader:

        def write(index: int, moments: Tensor | None = None) -> None:
            block, there = blocks[index], mapped[index]
            own = {name: tensor for name, tensor in state.items() if name.startswith(f"{prefix}.{index}.")}
            if not block.neurons:
                if not files.has(index):
                    files.write(index, _layer(own, (), (), reader))
                return
            if chooser.counts.unit == "experts":
                chosen = chooser.choose(index, block, there) if isinstance(block, Experts) else None
                if not files.has(index):
                    files.write(index, _with_experts(own, block, chosen, smaller.axes, reader))
                return
            with contextlib.ExitStack() as read:
                full = [read.enter_context(reader.reading(tensor)) for tensor in there]
                chosen = chooser.choose(index, block, full)
                if not files.has(index):
                    files.write(index, _layer(own, there, _gathered(block, full, chosen, moments), reader))

        if refit and not all(files.has(index) for index in range(len(blocks))):
            visit_moments(checkpoint, model, decoder, blocks, refit, write)
        else:
            for index in range(len(blocks)):
                write(index)
        if not files.has(len(blocks)):
            files.write(len(blocks), _outside(model, prefix, reader))


def _gathered(block: Block, full: Sequence[Tensor], chosen: Tensor, moments: Tensor | None) -> list[Tensor]:
    specs = block.compact_specs((chosen.numel(),), (FLOATS,))
    out = [torch.empty(shape, dtype=full[0].dtype, device="cpu") for shape, _ in specs]
    block.gather(full, [chosen], out)
    if moments is not None:
        assert block.neuron_axis is not None, "`check` refuses others"
        down = refitted(full[-1].movedim(block.neuron_axis, 1), moments, chosen)
        out[-1] = down.movedim(1, block.neuron_axis).contiguous()
    return out


def _layer(
    own: Mapping[str, Tensor], full: Sequence[Tensor], smaller: Sequence[Tensor], reader: Reader
) -> dict[str, Tensor]:
    """All that is the layer's `own`, its `full` FF tensors replaced by `smaller` ones."""
    replaced = {id(old): new for old, new in zip(full, smaller, strict=True)}
    return {name: replaced[id(t)] if id(t) in replaced else reader.copy(t) for name, t in own.items()}


def _with_experts(
    own: Mapping[str, Tensor], block: Block, chosen: Tensor | None, axes: Mapping[str, int], reader: Reader
) -> dict[str, Tensor]:
    """The same with the experts `chosen`, read one by one, and of the router what belongs to them."""
    if chosen is None or not isinstance(block, Experts):
        return _layer(own, (), (), reader)
    full = block.full()
    kept = [torch.empty((chosen.numel(), *t.shape[1:]), dtype=t.dtype, device="cpu") for t in full]
    for place, expert in enumerate(chosen.tolist()):
        with reader.reading_expert(full, expert):
            block.form.fill(full, expert, [tensor[place] for tensor in kept])
    experts = {id(tensor) for tensor in full}
    found = _layer(own, full, block.as_stock(kept), reader)
    cut = {name: axes[name] for name in found if name in axes and id(own[name]) not in experts}
    return found | {name: found[name].index_select(axis, chosen) for name, axis in cut.items()}


def _outside(model: StockModel, prefix: str, reader: Reader) -> dict[str, Tensor]:
    """Embeddings, head, last norm, and the buffers that a checkpoint holds."""
    parameters = dict(model.named_parameters())
    tied = {name for name, _ in model.named_parameters(remove_duplicate=False)} - set(parameters)
    state = model.state_dict(keep_vars=True)
    found = {name: t for name, t in state.items() if name not in tied and not name.startswith(f"{prefix}.")}
    return {name: reader.copy(tensor) for name, tensor in found.items()}


# What it costs, measured on held-out prompts by loading both.


Probabilities = list[Tensor]
"""Logarithms float32 [T, V] of each prompt's last predictions, in host memory."""


@torch.no_grad()
def predictions(model: GriffinModel, prompts: Sequence[Tensor]) -> Probabilities:
    """Of the last tokens of the first few held-out `prompts`."""
    found = []
    for ids in held_out_of(prompts)[:_MEASURED_PROMPTS]:
        last = model.model(ids[None].to(model.device), logits_to_keep=_MEASURED_TOKENS + 1, use_cache=False)
        found.append(last.logits[0, :-1].float().log_softmax(-1).cpu())
    return found


def choosing(prompts: Sequence[Tensor]) -> list[Tensor]:
    """Those of `prompts` that choose."""
    return [ids for number, ids in enumerate(prompts, start=1) if number % HELD_OUT]


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


def write_card(found: Export, source: str, selection: str, command: str, fingerprint: str) -> None:
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
    what = {"neurons": "feed-forward neurons"}.get(found.unit, found.unit)
    again = "\nTheir outputs make up for the other neurons' on these prompts (least squares)." if found.refit else ""
    text = f"""# {found.directory.name}

{source} with {found.neurons} of {found.of_neurons} {what} in each layer: those that {found.prompts}
prompts use most ({selection}, GRIFFIN, arXiv 2404.01365). About other things than these prompts it is worse than the
figures say. Every {HELD_OUT}th prompt did not choose: these are held out.{again}

| | |
|---|---|
{rows}

Fingerprint of the source: {fingerprint}. Ordinary software loads it. Written by

    {command}
"""
    write_text(found.directory / "README.md", text)
    (found.directory / UNMEASURED).unlink(missing_ok=True)


def _number(value: float | None) -> str:
    return "too few prompts" if value is None else f"{value:.4g}"
