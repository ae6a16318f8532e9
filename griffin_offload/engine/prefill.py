"""The streamed pass: the stock model runs over all new tokens once while each layer visits the device in full.

While layer i is on the device with its full FF, three things happen before its slot is reused: its own forward
runs over all tokens, the GRIFFIN statistic of its activations is summed, and the chosen neurons are gathered into
the layer's compact parameters. All of it is done by hooks that live for one pass. The tokens are a prompt, a
conversation's next turn, or tokens that the residents drafted.
"""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from griffin_offload.blocks.feedforward import FeedForward
from griffin_offload.config import WEIGHT_NORMS, LoadConfig
from griffin_offload.devices.host_memory import give_back_freed
from griffin_offload.engine.report import PrefillReport
from griffin_offload.method.selection import layer_generator, select_neurons
from griffin_offload.method.statistic import share_kept, shared_score, squared_statistic
from griffin_offload.offload.background_loader import BackgroundLoader
from griffin_offload.offload.layer_stream import LayerStream, StreamConfig
from griffin_offload.offload.weight_store import Source
from griffin_offload.planner.workspace import CHUNK_MULTIPLE

Progress = Callable[[int, int], None]
"""Called with (layers done, layers in all) after each layer."""

# After so many bytes of hidden states, on the CPU, freed memory is given back: it costs a few ms then.
_GIVE_BACK_BYTES = 32 * 2**20
# Below this many tokens the last quarter is too little to measure on.
SHORT_PROMPT_TOKENS = 16


@dataclass
class DecoderLayers:
    """The layers of a loaded model: fixed for its life, but for what each prompt selects."""

    decoder: nn.ModuleList
    blocks: list[FeedForward]
    compact: dict[int, list[nn.Parameter]]
    """Compact parameters of the streamed layers, allocated once and refilled for every prompt."""
    kept: tuple[int, ...]
    source: Source | None
    """None when no layer is streamed."""
    stream: StreamConfig
    ff_chunk_tokens: int
    config: LoadConfig
    selected: dict[int, Tensor] = field(default_factory=dict)
    """Sorted indices of the neurons in the compact parameters, per streamed layer: a new dict for every choice."""
    arrival: BackgroundLoader | None = None
    """Residents of layers that are still on their way; None where nobody fills any."""
    norms: dict[int, Tensor] = field(default_factory=dict)
    """Of the weights, for selections that ask for them: computed when a layer passes for the first time."""

    @property
    def fetched_bytes(self) -> int:
        """Weight bytes fetched from where the full weights rest, since loading."""
        return self.source.fetched_bytes if self.source else 0

    @property
    def arrival_wait_s(self) -> float:
        """Seconds that forwards have waited for residents, since loading."""
        return self.arrival.wait_s if self.arrival else 0.0

    def remove_hooks(self) -> None:
        """Take every hook and chunked forward of a pass off the model."""
        modules = [*self.decoder, *(block.down for block in self.blocks)]
        for hooks in (hooks for module in modules for hooks in (module._forward_hooks, module._forward_pre_hooks)):
            for key in [key for key, hook in hooks.items() if isinstance(hook, PassHook)]:
                del hooks[key]
        for block in self.blocks:
            if isinstance(block.module.__dict__.get("forward"), ChunkedForward):
                del block.module.forward

    def give_back(self) -> None:
        """Let go of weights in host memory and of compact ones; nothing can be streamed from then on."""
        self.source = None
        self.compact.clear()
        self.norms.clear()

    def install_compact(self) -> None:
        """Make every streamed layer's compact parameters its parameters."""
        for index, parameters in self.compact.items():
            self.blocks[index].install_compact(parameters)


class StreamedPass:
    """A context manager: inside it, one forward of the stock model is a streamed pass.

    `groups` [B, G, T] on the device say which tokens choose, in G groups whose statistics are summed apart: the parts
    of a prompt, of which those behind the first `choosing_groups` measure the choice of these (0: nothing is measured);
    or each token for itself. `earlier` is the statistic of passes before, s^2 [B, F] of each streamed layer: it
    chooses, too. Without `choose` the compact parameters stay as they are. `keep` keeps the sums of each group in
    `sums`.
    """

    def __init__(
        self,
        layers: DecoderLayers,
        groups: Tensor,
        *,
        earlier: Mapping[int, Tensor] | None = None,
        choose: bool = True,
        choosing_groups: int = 0,
        keep: bool = False,
        progress: Progress | None = None,
    ) -> None:
        self._layers, self._groups, self._progress = layers, groups, progress
        self._earlier = earlier or {}
        self._choosing, self._first, self._keeping = choose, choosing_groups, keep
        self.sums: dict[int, Tensor] = {}
        """s^2 [B, G, F] of each streamed layer, of this pass alone."""
        self._visited = 0
        self._stream = LayerStream(layers.source, list(layers.compact), layers.stream) if layers.source else None
        self._fetched_before = layers.fetched_bytes
        self._waited_before = layers.arrival_wait_s
        self._squared = torch.empty(0, dtype=torch.float32, device="cpu")
        self._position = 0
        self._kept_shares: list[Tensor] = []
        self._held_out_shares: list[Tensor] = []
        self._select_s = self._statistic_s = 0.0
        self._since_given_back = 0
        self._seconds = 0.0

    def __enter__(self) -> "StreamedPass":
        self._start = time.perf_counter()
        try:
            self._begin()
        except BaseException as error:  # Ctrl-C, too: no hook may stay behind
            self.__exit__(type(error), error, None)
            raise
        return self

    def _begin(self) -> None:
        self._layers.remove_hooks()  # of a pass whose end was interrupted
        if self._choosing:
            self._layers.selected = {}
        if self._stream is not None:
            self._stream.__enter__()
        for index, (layer, block) in enumerate(zip(self._layers.decoder, self._layers.blocks, strict=True)):
            if not block.inline:  # an inline one is counted unchunked by the plan
                block.module.forward = ChunkedForward(block.module.forward, self._layers.ff_chunk_tokens)
            if index in self._layers.compact:
                self._hook_layer(index, layer, block)
            layer.register_forward_hook(PassHook(partial(self._layer_done, index)))

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self._end(kind, error, trace)
        except KeyboardInterrupt:  # a second Ctrl-C must not leave half of it
            self._end(kind, error, trace)
            raise
        self._seconds = time.perf_counter() - self._start

    def _end(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._layers.remove_hooks()
        self._layers.install_compact()
        if self._stream is not None:
            self._stream.__exit__(kind, error, trace)

    @property
    def unvisited(self) -> int:
        """Streamed layers that the forward did not run: their compact parameters hold nothing."""
        return len(self._layers.compact) - self._visited

    @property
    def peak_in_flight_bytes(self) -> int:
        return self._stream.peak_in_flight_bytes if self._stream else 0

    def report(self) -> PrefillReport:
        """Figures of a prompt's finished pass; waits for the device."""
        dense = len(self._layers.decoder) - len(self._layers.compact)
        tokens = self._groups.sum((1, 2))
        too_short = int(tokens.min()) < SHORT_PROMPT_TOKENS
        return PrefillReport(
            prompt_tokens=int(tokens.sum()),
            seconds=self._seconds,
            streamed_bytes=self._layers.fetched_bytes - self._fetched_before,
            wait_s=self._layers.arrival_wait_s - self._waited_before + (self._stream.wait_s if self._stream else 0.0),
            select_s=self._select_s,
            statistic_s=self._statistic_s,
            activation_kept=_mean(self._kept_shares, dense),
            activation_kept_heldout=None if too_short else _mean(self._held_out_shares, dense),
        )

    def _hook_layer(self, index: int, layer: nn.Module, block: FeedForward) -> None:
        layer.register_forward_pre_hook(PassHook(partial(self._layer_starts, index)))
        block.down.register_forward_pre_hook(PassHook(partial(self._add, block)))
        layer.register_forward_hook(PassHook(partial(self._layer_ends, index)))

    def _layer_starts(self, index: int, *_: Any) -> None:
        assert self._stream is not None
        block = self._layers.blocks[index]
        full = self._stream.acquire(index)
        block.install_full(full)
        self._full = full
        samples, groups = self._groups.shape[:2]
        self._squared = torch.zeros(samples, groups, block.neurons, dtype=torch.float32, device=self._groups.device)
        self._position = 0

    def _add(self, block: FeedForward, _: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
        """Sum the statistic of one chunk; z is [B, T, F], or [B * T, F] where the model flattens (OPT)."""
        start = time.perf_counter()
        z = args[0].detach().reshape(self._groups.shape[0], -1, block.neurons)
        end = self._position + z.shape[1]
        self._squared += squared_statistic(z, self._groups[:, :, self._position : end])
        self._position = end
        self._statistic_s += time.perf_counter() - start
        return None

    @torch.no_grad()
    def _layer_ends(self, index: int, *_: Any) -> None:
        assert self._stream is not None
        start = time.perf_counter()
        block, compact = self._layers.blocks[index], self._layers.compact[index]
        if self._choosing:
            chosen = self._select(index)
            block.gather(self._full, chosen, compact)
            self._layers.selected[index] = chosen
        if self._keeping:
            self.sums[index] = self._squared
        self._visited += 1
        block.install_compact(compact)
        self._full = []
        self._stream.release()
        self._select_s += time.perf_counter() - start

    def _select(self, index: int) -> Tensor:
        """Choose from all tokens; of a prompt, choose from its first part, too, to measure on the rest."""
        formula, earlier = self._layers.config.batch_statistic, self._earlier.get(index, 0)
        squared = shared_score(self._squared.sum(1) + earlier, formula)
        chosen = self._choose(index, squared)
        self._kept_shares.append(share_kept(squared, chosen))
        if self._first:
            first = shared_score(self._squared[:, : self._first].sum(1) + earlier, formula)
            last = shared_score(self._squared[:, self._first :].sum(1), formula)
            self._held_out_shares.append(share_kept(last, self._choose(index, first)))
        return chosen

    def _choose(self, index: int, squared: Tensor) -> Tensor:
        config = self._layers.config
        generator = layer_generator(config.seed, index)
        norms = None
        if config.selection in WEIGHT_NORMS:
            if index not in self._layers.norms:
                block = self._layers.blocks[index]
                of_weights = block.neuron_norms if config.selection == "magnitude" else block.output_norms
                self._layers.norms[index] = of_weights(self._full)
            norms = self._layers.norms[index]
        return select_neurons(squared, self._layers.kept[index], config.selection, generator, norms)

    def _layer_done(self, index: int, _: nn.Module, __: Any, output: Any) -> None:
        hidden = output if isinstance(output, Tensor) else output[0]
        self._since_given_back += hidden.nbytes if hidden.is_cpu else 0
        if self._since_given_back >= _GIVE_BACK_BYTES:
            self._since_given_back = 0
            give_back_freed()
        if self._progress is not None:
            self._progress(index + 1, len(self._layers.decoder))


class PassHook:
    """A hook of a pass: known by its type, so that none can stay behind, whenever an interrupt comes."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function

    def __call__(self, *args: Any) -> Any:
        return self._function(*args)


class ChunkedForward:
    """The forward of an FF module during a pass: the stock one, over a chunk of tokens at a time."""

    def __init__(self, forward: Callable[..., Tensor], limit: int) -> None:
        self._forward, self._limit = forward, limit

    def __call__(self, *args: Tensor) -> Tensor:
        return _in_chunks(self._forward, self._limit, args)


def _in_chunks(forward: Callable[..., Tensor], limit: int, args: tuple[Tensor, ...]) -> Tensor:
    """`forward` over at most `limit` tokens at a time; all arguments are [B, T, H] and so is the result."""
    tokens = args[0].shape[1]
    if tokens <= limit:
        return forward(*args)
    # Equal chunks: a short last one would take another path through the GEMM kernels and round differently.
    chunk = -(-tokens // -(-tokens // limit))
    if limit >= CHUNK_MULTIPLE:
        chunk = min(-(-chunk // CHUNK_MULTIPLE) * CHUNK_MULTIPLE, limit)
    output = torch.empty_like(args[0])
    for start in range(0, tokens, chunk):
        output[:, start : start + chunk] = forward(*(arg[:, start : start + chunk].contiguous() for arg in args))
    return output


def _mean(shares: list[Tensor], dense_layers: int) -> float:
    """Mean over layers; a layer with all its neurons keeps everything."""
    total = float(torch.stack(shares).sum()) if shares else 0.0
    return (total + dense_layers) / (len(shares) + dense_layers)
