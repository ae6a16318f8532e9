"""One pass over the decoder layers: each is brought in full, used, checked, and dropped before its slot is used again.

The stock model runs over its tokens once, driven by hooks that live for one pass; or, without a forward, layers are
brought one after another (`walk`). A `Feed` knows where full tensors come from; visitors, a few lines each, know what
the pass is for: they sum, choose, gather, leave out, watch.
"""

import contextlib
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from functools import partial
from types import TracebackType
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn

from griffin_offload.blocks.base import Activations, Block, PassHook, unhook
from griffin_offload.blocks.experts import is_experts
from griffin_offload.blocks.routing import RestrictedForward
from griffin_offload.checkpoint.mapped import FilePages
from griffin_offload.config import LoadConfig
from griffin_offload.engine.report import ExpertReport
from griffin_offload.formats.translated import in_memory
from griffin_offload.method.allocation import Counts
from griffin_offload.offload.expert_buffers import ExpertBuffers
from griffin_offload.offload.expert_cache import ExpertCache
from griffin_offload.offload.expert_store import ExpertStore
from griffin_offload.offload.layer_stream import BackgroundLoader, LayerStream, StreamConfig
from griffin_offload.offload.weight_store import Source, stream_dtype

Progress = Callable[[int, int], None]
"""Called with (layers done, layers in all) after each layer."""


@dataclass
class DecoderLayers:
    """The layers of a loaded model: fixed for its life, but for what each prompt selects."""

    decoder: nn.ModuleList
    blocks: list[Block]
    compact: dict[int, list[nn.Parameter]]
    """Compact parameters of the streamed layers, allocated once and refilled for every prompt."""
    counts: tuple[Counts, ...]
    """Resident neurons of each layer by format."""
    source: Source | None
    """None when no layer is streamed."""
    stream: StreamConfig
    ff_chunk_tokens: int
    config: LoadConfig
    selected: dict[int, Tensor] = field(default_factory=dict)
    """Indices of the neurons in the compact parameters, sorted in each format, per streamed layer: a new dict for every
    choice."""
    arrival: BackgroundLoader | None = None
    """Residents of layers that are still on their way; None where nobody fills any."""
    experts: dict[int, ExpertCache] = field(default_factory=dict)
    """Of the streamed layers that are mixtures of experts: what of them is on the device."""
    expert_store: ExpertStore | None = None
    """Where their experts rest; None where there are none."""
    routers: dict[int, RestrictedForward] = field(default_factory=dict)
    """Of the same layers: what can keep routing to residents."""
    expert_buffers: ExpertBuffers = field(default_factory=ExpertBuffers)
    norms: dict[int, Tensor] = field(default_factory=dict)
    """Of the weights, for selections that ask for them: computed when a layer passes for the first time."""
    whole: set[int] = field(default_factory=set)
    """Streamed layers of which all neurons were gathered in one format: nothing else will ever be there."""

    def gather(self, index: int, full: list[Tensor], chosen: Tensor) -> None:
        """Fill a layer's compact parameters with the neurons `chosen`, those of its first format first."""
        if index in self.whole:
            return
        counts, block = self.counts[index], self.blocks[index]
        block.gather(full, chosen.split(counts), self.compact[index])
        if counts == (block.neurons,):
            self.whole.add(index)

    @property
    def fetched_bytes(self) -> int:
        """Weight bytes fetched from where the full weights rest, since loading."""
        self.expert_buffers.collect()
        return sum(store.fetched_bytes for store in (self.source, self.expert_store) if store is not None)

    @property
    def expert_report(self) -> ExpertReport:
        """Counts since loading, and what the last prompt has chosen."""
        self.expert_buffers.collect()
        caches = self.experts.values()
        kept = [cache.routing_kept for cache in caches if cache.routing_kept is not None]
        return ExpertReport(
            resident=sum(len(cache.residents) for cache in caches),
            hits=sum(cache.hits for cache in caches),
            misses=sum(cache.misses for cache in caches),
            routing_kept=sum(kept) / len(kept) if kept else 1.0,
            choices=sum(router.choices for router in self.routers.values()),
            redirected=sum(router.redirected for router in self.routers.values()),
            guessed=sum(cache.guessed for cache in caches),
            wrong_bytes=self.expert_store.wrong_bytes if self.expert_store else 0,
            by_host=sum(cache.computed_by_host for cache in caches),
            host_bytes=self.expert_store.host_bytes if self.expert_store else 0,
        )

    def restrict(self, *, drafting: bool = False) -> None:
        """Have missing experts read, for whoever computes them, or not, as the model was loaded; while it is
        `drafting`, not."""
        for cache in self.experts.values():
            cache.restrict(drafting or self.config.missing_experts == "route")

    @property
    def arrival_wait_s(self) -> float:
        """Seconds that forwards have waited for residents, since loading."""
        return self.arrival.wait_s if self.arrival else 0.0

    def give_back(self) -> None:
        """Let go of weights in host memory and of compact ones; nothing can be streamed from then on."""
        self.source = self.expert_store = None
        self.experts.clear()
        self.routers.clear()
        self.compact.clear()
        self.norms.clear()

    @property
    def feed_forwards(self) -> int:
        """Layers that have one."""
        return sum(block.neurons > 0 for block in self.blocks)

    def install_compact(self) -> None:
        """Make every streamed layer's compact parameters its parameters."""
        for index, parameters in self.compact.items():
            self.blocks[index].install_compact(parameters)


class Feed(Protocol):
    """Brings the full tensors of layers, each once, in order, and takes them away again; a context manager."""

    @property
    def layers(self) -> Collection[int]:
        """Those that are brought."""

    def bring(self, index: int) -> list[Tensor]:
        """The layer's full tensors, valid until `drop`."""

    def drop(self, index: int) -> None:
        """The layer is used up. CheckpointChanged if its file was written to meanwhile."""

    def __enter__(self) -> Any: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


class StreamFeed:
    """Full FFs through the device's slots, read one layer ahead, and installed while they are there."""

    def __init__(self, layers: DecoderLayers) -> None:
        self._layers, self.layers = layers, layers.compact.keys()
        self._waited_before = layers.expert_store.wait_s if layers.expert_store else 0.0
        dense = [index for index in layers.compact if index not in layers.experts]
        self.stream = LayerStream(layers.source, dense, layers.stream) if layers.source else None

    @property
    def peak_in_flight_bytes(self) -> int:
        dense = self.stream.peak_in_flight_bytes if self.stream else 0
        return dense + self._layers.expert_buffers.peak_bytes

    @property
    def wait_s(self) -> float:
        store, dense = self._layers.expert_store, self.stream.wait_s if self.stream else 0.0
        return dense + (store.wait_s - self._waited_before if store else 0.0)

    def __enter__(self) -> "StreamFeed":
        if self._layers.expert_store is not None:
            self._layers.expert_store.check_files()
            self._layers.expert_buffers.begin()
        if self.stream is not None:
            self.stream.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._layers.install_compact()
        for cache in self._layers.experts.values():
            cache.end_pass()
        self._layers.expert_buffers.shrink()
        if self.stream is not None:
            self.stream.__exit__(kind, error, trace)

    def bring(self, index: int) -> list[Tensor]:
        if index in self._layers.experts:
            return self._layers.experts[index].start_pass()  # which of them are needed, the router will say
        assert self.stream is not None, "streamed layers have a source"
        full = self.stream.acquire(index)
        self._layers.blocks[index].install_full(full)
        return full

    def drop(self, index: int) -> None:
        if index in self._layers.experts:
            self._layers.experts[index].end_pass()
            return
        assert self.stream is not None, "streamed layers have a source"
        self._layers.blocks[index].install_compact(self._layers.compact[index])
        self.stream.release()


class RowFeed:
    """Rows of full FFs alone, from where they rest: those that the neurons `selected` need, and matrices that hold
    neurons as columns."""

    def __init__(self, layers: DecoderLayers, selected: dict[int, Tensor], dtype: torch.dtype) -> None:
        self._layers, self._selected, self._dtype = layers, selected, dtype
        self.layers = selected.keys()

    def __enter__(self) -> "RowFeed":
        if self._layers.source is not None:
            self._layers.source.check_files()
        return self

    def __exit__(self, *_: object) -> None:
        """Nothing is held."""

    def bring(self, index: int) -> list[Tensor]:
        assert self._layers.source is not None, "streamed layers have a source"
        needed = self._layers.blocks[index].rows_needed(self._selected[index].cpu().sort().values)
        full = self._layers.source.fetch_rows(index, needed)
        return [in_memory(tensor).to(stream_dtype(tensor, self._dtype)) for tensor in full]

    def drop(self, index: int) -> None:
        assert self._layers.source is not None, "streamed layers have a source"
        self._layers.source.check(index)
        self._layers.source.drop(index)


def own_parameters(module: nn.Module) -> list[nn.Parameter]:
    """Those that no other module inside of it has."""
    return [parameter for parameter in module._parameters.values() if parameter is not None]


class PageFeed:
    """All parameters of each layer of a mapped model, in place: their pages are read, and dropped behind it. Not those
    of experts, which have a source of their own."""

    def __init__(self, pages: FilePages, decoder: nn.ModuleList) -> None:
        self._pages, self.layers = pages, range(len(decoder))
        self._parameters = [
            [parameter for module in layer.modules() if not is_experts(module) for parameter in own_parameters(module)]
            for layer in decoder
        ]
        self._held = contextlib.ExitStack()

    def __enter__(self) -> "PageFeed":
        return self

    def __exit__(self, *_: object) -> None:
        """Pages of a layer that failed go with the mapping."""

    def bring(self, index: int) -> list[Tensor]:
        return self._held.enter_context(self._pages.reading(self._parameters[index]))

    def drop(self, index: int) -> None:
        self._held.close()


class Visitor:
    """What a pass is for: called for each layer that it visits, in order. Does nothing by itself."""

    def begin(self) -> None:
        """The pass begins."""

    def start(self, index: int, block: Block, full: list[Tensor]) -> None:
        """The layer is there, its full tensors are installed; none where they are neither brought nor plain."""

    def see(self, index: int, found: Activations) -> None:
        """Some of its tokens pass, not yet by sample; what is changed goes on."""

    def end(self, index: int, block: Block, full: list[Tensor]) -> None:
        """All its tokens have passed; then it is dropped."""

    def done(self, hidden: Tensor) -> None:
        """A layer of the model, visited or not, has given these hidden states."""


PassT = TypeVar("PassT", bound="LayerPass")


class LayerPass:
    """A context manager: inside it, one forward of the stock model (or of its stack of layers) is a pass.

    Layers that `feed` brings are visited; with `every_layer` the others too. `chunk_tokens` pass an FF at once.
    """

    def __init__(
        self,
        decoder: nn.ModuleList,
        blocks: Sequence[Block],
        feed: Feed,
        visitors: Sequence[Visitor] = (),
        *,
        every_layer: bool = False,
        chunk_tokens: int | None = None,
        progress: Progress | None = None,
    ) -> None:
        self._decoder, self._blocks, self.feed, self._visitors = decoder, blocks, feed, visitors
        self._every_layer, self._chunk_tokens, self._progress = every_layer, chunk_tokens, progress
        self._full: list[Tensor] = []
        self.visited = 0
        """Layers so far."""
        self.seconds = self.see_s = self.end_s = 0.0
        """Of the whole pass; of visitors while tokens pass; of visitors, and of dropping, behind layers."""

    def __enter__(self: PassT) -> PassT:
        self._entered = time.perf_counter()
        try:
            self.begin()
        except BaseException as error:  # Ctrl-C, too: no hook may stay behind
            self.__exit__(type(error), error, None)
            raise
        return self

    def begin(self) -> None:
        self._remove_hooks()  # of a pass whose end was interrupted
        for visitor in self._visitors:
            visitor.begin()
        self.feed.__enter__()
        for index, (layer, block) in enumerate(zip(self._decoder, self._blocks, strict=True)):
            if self._chunk_tokens is not None:
                block.chunked(self._chunk_tokens)
            if self._every_layer or index in self.feed.layers:
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
        self.seconds = time.perf_counter() - self._entered

    def _end(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._remove_hooks()
        self.feed.__exit__(kind, error, trace)

    def _remove_hooks(self) -> None:
        for layer, block in zip(self._decoder, self._blocks, strict=True):
            block.unhook()
            unhook(layer)

    def walk(self) -> None:
        """Visit the layers that the feed brings without a forward."""
        with self.feed:
            for index in self.feed.layers:
                self._layer_starts(index)
                self._layer_ends(index)

    def _hook_layer(self, index: int, layer: nn.Module, block: Block) -> None:
        layer.register_forward_pre_hook(PassHook(partial(self._layer_starts, index)))
        if self._visitors:
            block.observe(partial(self._see, index))
        layer.register_forward_hook(PassHook(partial(self._layer_ends, index)))

    def _layer_starts(self, index: int, *_: Any) -> None:
        block = self._blocks[index]
        if index in self.feed.layers:
            self._full = self.feed.bring(index)
        else:
            self._full = block.full() if block.is_plain else []
        for visitor in self._visitors:
            visitor.start(index, block, self._full)

    def _see(self, index: int, found: Activations) -> None:
        start = time.perf_counter()
        for visitor in self._visitors:
            visitor.see(index, found)
        self.see_s += time.perf_counter() - start

    @torch.no_grad()
    def _layer_ends(self, index: int, *_: Any) -> None:
        start = time.perf_counter()
        for visitor in self._visitors:
            visitor.end(index, self._blocks[index], self._full)
        self.visited += 1
        self._full = []
        if index in self.feed.layers:
            self.feed.drop(index)
        self.end_s += time.perf_counter() - start

    def _layer_done(self, index: int, _: nn.Module, __: Any, output: Any) -> None:
        hidden = output if isinstance(output, Tensor) else output[0]
        for visitor in self._visitors:
            visitor.done(hidden)
        if self._progress is not None:
            self._progress(index + 1, len(self._decoder))
