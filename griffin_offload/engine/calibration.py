"""Inputs of a model's matrices over pages of text: what int4 is fitted by, and an export's kept neurons.

One forward of the stock model over its mapped weights finds them, a layer's pages at a time. Where weights are
quantised for every prompt, their mean squares and their leading component count: the same for every run of a
checkpoint, so that they are kept in the user's cache. `convert` takes the inputs themselves, a layer at a time
(formats/compensation.py).
"""

import contextlib
import hashlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from griffin_offload.blocks.base import Activations, Block
from griffin_offload.blocks.experts import EXPERTS_INPUT, Experts, is_experts
from griffin_offload.blocks.feedforward import features
from griffin_offload.blocks.replace import linear_names
from griffin_offload.checkpoint.base import Checkpoint
from griffin_offload.checkpoint.files import renamed
from griffin_offload.checkpoint.mapped import FilePages
from griffin_offload.checkpoint.tokenizer import kept_tokenizer
from griffin_offload.devices.threads import put
from griffin_offload.engine.build import emulates_halves, use_own_linears
from griffin_offload.engine.calibration_text import CALIBRATION_TEXT
from griffin_offload.engine.layer_pass import LayerPass, PageFeed, Visitor
from griffin_offload.errors import CheckpointError
from griffin_offload.formats.compensation import known_of
from griffin_offload.formats.translated import TranslatedTensor, in_memory
from griffin_offload.kernels.by_blocks import Scratch
from griffin_offload.offload.expert_store import ExpertStore, PassingExperts
from griffin_offload.transformers_api import StockModel, Tokenizer

Importance = Mapping[str, Tensor]
"""What is known of the inputs of a linear layer, float32 [3, I] (formats/compensation.py), by "layer.name"; of experts
mean squares [H]."""
CACHE_VARIABLE = "GRIFFIN_OFFLOAD_CACHE"
Inputs = Mapping[str, Tensor]
"""Inputs [T, I] of a layer's linear modules by their names, in the type of the computation; the same tensor for modules
that have the same inputs. Of experts (EXPERTS_INPUT) the mean squares [H] of what they are given."""
_SEQUENCES, _TOKENS = 16, 128
# The first tokens' states are unlike all others', in every trained model: they are no measure of what counts for
# experts. What makes up for errors must know of these, too: a few weights make them.
_SKIPPED_TOKENS = 4
_SCRATCH_BYTES = 2**22
_TOKENIZER_FILES = ("tokenizer*", "*.model", "vocab*", "merges*")
_FORMAT = 4


@torch.no_grad()
def importance_of(
    checkpoint: Checkpoint, model: StockModel, decoder: nn.ModuleList, blocks: Sequence[Block], *, evict: bool
) -> Importance:
    """Of every linear layer in `decoder`, and of experts. `model` is mapped and as stored; `evict` frees its pages
    behind each layer. Empty where the checkpoint has no tokenizer that fits it: then all inputs count alike."""
    wanted: dict[str, tuple[nn.Module, tuple[int, ...]]] = {
        f"{index}.{name}": (module, (3, features(module)[1]))
        for index, layer in enumerate(decoder)
        for name in linear_names(layer)
        for module in (layer.get_submodule(name),)
    }
    wanted |= {
        f"{index}.{EXPERTS_INPUT}": (block.module, (block.hidden,))
        for index, block in enumerate(blocks)
        if isinstance(block, Experts)
    }
    path = cache_path(checkpoint)
    found = _read(path, {name: shape for name, (_, shape) in wanted.items()})
    if found is None:
        ids = _token_ids(checkpoint, model, lambda: checkpoint.own_tokenizer)
        if ids is None:
            return {}
        with _a_layer_at_a_time(model, decoder, blocks, checkpoint, evict):
            found = measure(model, {name: module for name, (module, _) in wanted.items()}, ids)
        with contextlib.suppress(OSError):  # measured again by the next run
            path.parent.mkdir(parents=True, exist_ok=True)
            with renamed(path) as temporary:
                save_file(found, temporary)
    return found


@torch.no_grad()
def visit_inputs(
    checkpoint: Checkpoint,
    model: StockModel,
    decoder: nn.ModuleList,
    blocks: Sequence[Block],
    visit: Callable[[int, Inputs], None],
) -> None:
    """Call `visit` with the index of every layer, in order, and the inputs of its linear modules, of those that its
    forward calls: of none where the checkpoint has no tokenizer that fits it. `model` is mapped and as stored."""
    ids = _token_ids(checkpoint, model, checkpoint.tokenizer)
    if ids is None:
        for index in range(len(decoder)):
            visit(index, {})
        return
    kept = _KeptInputs(decoder, blocks, ids, visit)
    with kept, _a_layer_at_a_time(model, decoder, blocks, checkpoint, True, kept):
        model.base_model(input_ids=ids, use_cache=False)  # logits are not asked for


@torch.no_grad()
def visit_layers(
    checkpoint: Checkpoint,
    model: StockModel,
    decoder: nn.ModuleList,
    blocks: Sequence[Block],
    ids: Tensor,
    visitor: Visitor,
    chunk_tokens: int,
) -> None:
    """Have `visitor` see every layer of `model`, which is mapped and as stored, in one forward of the sequences `ids`
    [S, T]; of each, `chunk_tokens` pass an FF at once."""
    with _a_layer_at_a_time(model, decoder, blocks, checkpoint, True, visitor, chunk_tokens=chunk_tokens):
        model.base_model(input_ids=ids, use_cache=False)  # logits are not asked for


class _KeptInputs(Visitor):
    """Keeps the inputs of a layer's linear modules until it is over, and calls `visit` with them; a context manager, in
    which it listens."""

    def __init__(
        self, decoder: nn.ModuleList, blocks: Sequence[Block], ids: Tensor, visit: Callable[[int, Inputs], None]
    ) -> None:
        self._decoder, self._blocks, self._visit = decoder, blocks, visit
        self._shape, self._tokens = ids.shape, ids.numel()
        self._seen: list[tuple[Tensor, Tensor]] = []
        """What modules were given, which stays until the layer is over, and its rows."""
        self._found: dict[str, Tensor] = {}
        self._hooks = contextlib.ExitStack()

    def __enter__(self) -> "_KeptInputs":
        for layer, block in zip(self._decoder, self._blocks, strict=True):
            if isinstance(block, Experts):
                self._hooks.callback(block.module.register_forward_pre_hook(self._keep_squares).remove)
            for name in linear_names(layer):
                module = layer.get_submodule(name)
                self._hooks.callback(module.register_forward_pre_hook(partial(self._keep, name)).remove)
        return self

    def __exit__(self, *_: object) -> None:
        self._hooks.close()

    def _keep(self, name: str, _: nn.Module, args: tuple[Tensor, ...]) -> None:
        rows = next((rows for given, rows in self._seen if given is args[0]), None)
        if rows is None:
            rows = args[0].reshape(self._tokens, -1).clone()
            self._seen.append((args[0], rows))
        self._found[name] = rows

    def _keep_squares(self, _: nn.Module, args: tuple[Tensor, ...]) -> None:
        self._found[EXPERTS_INPUT] = _mean_squares(args[0], self._shape)

    def end(self, index: int, block: Block, full: list[Tensor]) -> None:
        found, self._found = self._found, {}
        self._seen.clear()
        self._visit(index, found)


def cache_path(checkpoint: Checkpoint) -> Path:
    own = os.environ.get(CACHE_VARIABLE)
    root = Path(own) if own else Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "griffin-offload"
    found = hashlib.sha256(checkpoint.fingerprint().encode())
    for pattern in _TOKENIZER_FILES:  # the same weights without a tokenizer have no importance
        for path in sorted(checkpoint.directory.glob(pattern)):
            found.update(f"{path.name} {path.stat().st_size}".encode())
    return root / f"importance-{_FORMAT}-{found.hexdigest()[:32]}.safetensors"


def _read(path: Path, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor] | None:
    """What was kept, if it is of these names and shapes."""
    try:
        found = load_file(path)
    except (OSError, SafetensorError):
        return None
    kept = {name: tuple(tensor.shape) for name, tensor in found.items() if tensor.dtype == torch.float32}
    return found if kept == shapes else None


def _token_ids(checkpoint: Checkpoint, model: StockModel, read: Callable[[], Tokenizer]) -> Tensor | None:
    """The sequences, by a tokenizer that somebody has or that is `read`; None: of none that fits the model."""
    try:
        tokenizer = kept_tokenizer(checkpoint.path)
        if tokenizer is None:
            tokenizer = read()
    except CheckpointError:
        return None
    ids = tokenizer(CALIBRATION_TEXT, return_tensors="pt", verbose=False).input_ids[0]  # it is cut below
    if not ids.numel():
        return None
    # Where the tokenizer writes a beginning, every sequence has it: without one some models answer otherwise (Gemma).
    begin = ids[:1] if int(ids[0]) == tokenizer.bos_token_id else ids[:0]
    ids = ids[len(begin) :]
    longest = getattr(model.config.get_text_config(), "max_position_embeddings", None) or _TOKENS
    tokens = min(_TOKENS, longest, ids.numel()) - len(begin)
    sequences = min(_SEQUENCES, ids.numel() // tokens) if tokens > _SKIPPED_TOKENS else 0
    if not sequences or int(ids.max()) >= model.get_input_embeddings().weight.shape[0]:
        return None
    rows = ids[: sequences * tokens].view(sequences, tokens)
    return torch.cat([begin.expand(sequences, len(begin)), rows], dim=1)


def measure(model: StockModel, wanted: Mapping[str, nn.Module], ids: Tensor) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    last: list[Tensor] = []
    """What the last one was given, and what is known of it: several have the same inputs."""

    def add(name: str, x: Tensor) -> None:
        if name.endswith(f".{EXPERTS_INPUT}"):
            found[name] = _mean_squares(x, ids.shape)
            return
        if not last or last[0] is not x:
            last[:] = x, known_of(x.reshape(ids.numel(), -1))
        found[name] = last[1].clone()

    with contextlib.ExitStack() as hooks:
        hooks.callback(last.clear)
        for name, module in wanted.items():
            handle = module.register_forward_pre_hook(lambda _, args, name=name: add(name, args[0]))
            hooks.callback(handle.remove)
        model.base_model(input_ids=ids, use_cache=False)  # logits are not asked for
    return found


def _mean_squares(x: Tensor, shape: torch.Size) -> Tensor:
    """[I] of inputs of sequences [S, T]."""
    rows = x.reshape(*shape, -1)[:, _SKIPPED_TOKENS:].flatten(0, 1)
    return rows.float().square().mean(0)


@contextlib.contextmanager
def _a_layer_at_a_time(
    model: StockModel,
    decoder: nn.ModuleList,
    blocks: Sequence[Block],
    checkpoint: Checkpoint,
    evict: bool,
    *visitors: Visitor,
    chunk_tokens: int | None = None,
) -> Iterator[None]:
    """Inside it a forward reads each layer's pages when it comes to it, and drops them behind it."""
    pages = FilePages(list(model.parameters()), evict=evict, known=checkpoint.states)
    scratch = Scratch(_SCRATCH_BYTES, torch.float32, torch.device("cpu"))
    with contextlib.ExitStack() as stack:
        stack.callback(pages.close)
        if emulates_halves(torch.device("cpu"), checkpoint.dtype):
            use_own_linears(model, scratch, translated=True)
            stack.callback(_use_stock_linears, model)
        stack.enter_context(_experts_one_by_one(blocks, evict))
        feed = PageFeed(pages, decoder)
        stack.enter_context(LayerPass(decoder, blocks, feed, visitors, chunk_tokens=chunk_tokens))
        head = model.get_output_embeddings()
        for stage in [*decoder, *([] if head is None else [head])]:
            here, gone = partial(_put_numbers, _translated_in(stage)), partial(_put_back, _translated_in(stage))
            stack.callback(stage.register_forward_pre_hook(here).remove)
            stack.callback(stage.register_forward_hook(gone).remove)
            stack.callback(gone)
        yield


@contextlib.contextmanager
def _experts_one_by_one(blocks: Sequence[Block], evict: bool) -> Iterator[None]:
    """Inside it every expert is read when tokens were sent to it, and none stays."""
    found = {index: block for index, block in enumerate(blocks) if isinstance(block, Experts)}
    if not found:
        yield
        return
    store = ExpertStore({index: block.full() for index, block in found.items()}, evict=evict)
    with contextlib.closing(store):
        for index, block in found.items():
            block.source = PassingExperts(index, store)
        try:
            yield
        finally:
            for block in found.values():
                block.source = None


_Translated = list[tuple[nn.Module, str, Tensor]]


def _translated_in(stage: nn.Module) -> _Translated:
    """Module, name and parameter of all that kernels cannot take as it lies."""
    return [
        (module, name, parameter)
        for module in stage.modules()
        if not is_experts(module)
        for name, parameter in module._parameters.items()
        if parameter is not None and isinstance(parameter, TranslatedTensor)
    ]


def _put_numbers(translated: _Translated, *_: Any) -> None:
    for module, name, parameter in translated:
        put(module, name, in_memory(parameter))


def _put_back(translated: _Translated, *_: Any) -> None:
    for module, name, parameter in translated:
        put(module, name, parameter)


def _use_stock_linears(model: nn.Module) -> None:
    for module in model.modules():
        if type(module) is nn.Linear:
            module.__dict__.pop("forward", None)


# What kept neurons can say for those that an export leaves out: least squares over a set of prompts. With the full
# model's activations Z [T, F] on the set, the moments G = Z^T Z and the down projection W [H, F], the kept neurons S
# get the columns W_S + D, where D is the least of |Z_S D^T - Z_R W_R^T|^2 + a |D|^2 over those that go, R:
# D = W_R G_RS (G_SS + a)^-1. The moments are of one layer at a time, [F, F] in float32.


RIDGE = 0.1
"""a, in mean squares of a kept neuron over the set. benchmarks/NOTES.md has what others gave."""
_MOST_TOKENS, _LONGEST, _AT_ONCE = 2**14, 512, 2**11


def visit_moments(
    checkpoint: Checkpoint,
    model: StockModel,
    decoder: nn.ModuleList,
    blocks: Sequence[Block],
    prompts: Sequence[Tensor],
    visit: Callable[[int, Tensor | None], None],
) -> None:
    """Call `visit` with the index of every layer, in order, and the moments [F, F] of its activations on `prompts` [T],
    or on as much of them, from all over, as passes at once; None where there is no feed-forward. `model` is mapped and
    as stored."""
    ids, real = _sequences(prompts)
    chunk = max(_AT_ONCE // len(ids), 1)
    visit_layers(checkpoint, model, decoder, blocks, ids, _Moments(real, visit), chunk)


def _sequences(prompts: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Pieces of prompts, filled up behind, where nothing sees it; and which tokens are theirs. Both [S, T]."""
    pieces = [piece for ids in prompts for piece in ids.split(_LONGEST)]
    longest = max(len(piece) for piece in pieces)
    pieces = pieces[:: -(-len(pieces) * longest // _MOST_TOKENS)]
    ids = nn.utils.rnn.pad_sequence(pieces, batch_first=True)
    lengths = torch.tensor([len(piece) for piece in pieces], dtype=torch.int64, device="cpu")
    return ids, torch.arange(ids.shape[1], dtype=torch.int64, device="cpu") < lengths[:, None]


class _Moments(Visitor):
    def __init__(self, real: Tensor, visit: Callable[[int, Tensor | None], None]) -> None:
        self._real, self._visit = real, visit
        self._found: Tensor | None = None

    def see(self, index: int, found: Activations) -> None:
        own = found.by_sample(len(self._real))
        z = own.values()[self._real[:, own.start : own.start + own.tokens]].float()
        if self._found is None:
            self._found = torch.zeros(z.shape[1], z.shape[1], dtype=torch.float32, device="cpu")
        self._found.addmm_(z.t(), z)

    def end(self, index: int, block: Block, full: list[Tensor]) -> None:
        found, self._found = self._found, None
        assert found is not None or not block.neurons, "every feed-forward is passed"
        self._visit(index, found)


def refitted(down: Tensor, moments: Tensor, chosen: Tensor) -> Tensor:
    """The columns [H, K] of `down` [H, F] for the neurons `chosen` [K], in its type."""
    gone = torch.ones(down.shape[1], dtype=torch.bool, device="cpu").index_fill_(0, chosen, False).nonzero()[:, 0]
    across = moments[:, chosen]
    known = across[chosen].double()
    known.diagonal().add_(RIDGE * known.diagonal().mean().clamp(min=torch.finfo(torch.float32).tiny))
    wanted = (down[:, gone].float() @ across[gone]).double()
    change = torch.cholesky_solve(wanted.t(), torch.linalg.cholesky(known)).t()
    return (down[:, chosen].double() + change).to(down.dtype)
