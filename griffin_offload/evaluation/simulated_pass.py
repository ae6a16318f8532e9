"""The simulated pass: one forward of the stock layers in which prompts choose neurons and what follows them goes on
with the chosen ones alone, layer by layer, while each full layer visits the device once.

Prompt positions never see later ones, so this equals generation. What is chosen differs from row to row: instead of
gathering, the input of the down projection is set to zero for neurons that a row left out. Shapes: R rows, M rows
inside a layer at once, T columns, F neurons.
"""

from collections.abc import Callable
from functools import partial
from types import TracebackType
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from griffin_offload.blocks.feedforward import FeedForward
from griffin_offload.engine.prefill import ChunkedForward, DecoderLayers, PassHook, Progress
from griffin_offload.method.statistic import squared_statistic, weighted_sum
from griffin_offload.offload.layer_stream import LayerStream


class NeuronChoice(NamedTuple):
    """What one row goes on with in one layer."""

    kept: Tensor
    """[F], True for chosen neurons."""
    share: Tensor
    """Of s^2 / S, that they hold: a scalar."""
    compensate: bool
    """Whether the others give their mean over the prompt instead of nothing."""


class Chooser(Protocol):
    """Chooses by a prompt's statistic s^2 [F]; `full` are the layer's tensors. None: the full model."""

    def __call__(self, layer: int, row: int, squared: Tensor, full: list[Tensor]) -> NeuronChoice | None: ...


class Observer(Protocol):
    """Looks at z [t, F] of some columns of one row, from column `start` on; what it keeps, it copies."""

    def __call__(self, layer: int, row: int, start: int, z: Tensor) -> None: ...


class SimulatedPass:
    """A context manager: inside it, one forward of the stack of layers over [R, T] is a simulated pass.

    `mask` is [R, T] on the device, 0 for padding; the first `prompt_columns` columns are prompts. Without `choose` all
    rows are the full model. `means` says that some row compensates. With `keep`, s^2 of every layer is kept in `sums`,
    in host memory. `observe` is shown every z before anything is left out.
    """

    def __init__(
        self,
        layers: DecoderLayers,
        mask: Tensor,
        prompt_columns: int,
        rows_at_once: int,
        choose: Chooser | None,
        *,
        means: bool = False,
        keep: bool = False,
        observe: Observer | None = None,
        progress: Progress | None = None,
    ) -> None:
        self._layers, self._choose, self._progress = layers, choose, progress
        self._observe = observe
        self._weights = mask[:, None, :prompt_columns].float()  # [R, 1, P]
        self._prompt, self._rows_at_once = prompt_columns, rows_at_once
        self._with_means = means
        self.sums: list[Tensor] | None = [] if keep else None
        """s^2 [R, F] of each layer."""
        self._shares: list[list[Tensor]] = [[] for _ in range(mask.shape[0])]
        self._stream = LayerStream(layers.source, list(layers.compact), layers.stream) if layers.source else None
        self._full: list[Tensor] = []
        self._rows = slice(0, 0)
        self._position = 0
        self._squared = self._means = torch.empty(0, dtype=torch.float32, device="cpu")
        self._choices: list[NeuronChoice | None] = []
        self._layer_sums: list[Tensor] = []

    @property
    def peak_in_flight_bytes(self) -> int:
        return self._stream.peak_in_flight_bytes if self._stream else 0

    def activation_kept(self) -> list[float]:
        """Of each row, the share of s^2 / S that the chosen neurons hold, mean over layers; waits for the device."""
        found: list[float] = torch.stack([torch.stack(shares).mean() for shares in self._shares]).tolist()
        return found

    def __enter__(self) -> "SimulatedPass":
        try:
            self._begin()
        except BaseException as error:  # Ctrl-C, too: no hook may stay behind
            self.__exit__(type(error), error, None)
            raise
        return self

    def _begin(self) -> None:
        self._end_hooks()  # of a pass whose end was interrupted
        if self._stream is not None:
            self._stream.__enter__()
        for index, (layer, block) in enumerate(zip(self._layers.decoder, self._layers.blocks, strict=True)):
            if not block.inline:
                block.module.forward = ChunkedForward(block.module.forward, self._layers.ff_chunk_tokens)
            layer.forward = _RowByRow(layer.forward, self._rows_at_once, partial(self._rows_start, index))
            layer.register_forward_pre_hook(PassHook(partial(self._layer_starts, index)))
            block.down.register_forward_pre_hook(PassHook(partial(self._at_down, index, block)))
            layer.register_forward_hook(PassHook(partial(self._layer_ends, index)))

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self._end(kind, error, trace)
        except KeyboardInterrupt:  # a second Ctrl-C must not leave half of it
            self._end(kind, error, trace)
            raise

    def _end(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._end_hooks()
        self._layers.install_compact()
        if self._stream is not None:
            self._stream.__exit__(kind, error, trace)

    def _end_hooks(self) -> None:
        for layer in self._layers.decoder:
            if isinstance(layer.__dict__.get("forward"), _RowByRow):
                del layer.forward
        self._layers.remove_hooks()

    def _layer_starts(self, index: int, *_: Any) -> None:
        block = self._layers.blocks[index]
        if index in self._layers.compact:
            assert self._stream is not None
            self._full = self._stream.acquire(index)
            block.install_full(self._full)
        else:
            self._full = block.full() if block.precision == "none" else []
        self._layer_sums = []

    def _rows_start(self, index: int, rows: slice) -> None:
        neurons, device = self._layers.blocks[index].neurons, self._weights.device
        self._rows, self._position, self._choices = rows, 0, []
        self._squared = torch.zeros(rows.stop - rows.start, neurons, dtype=torch.float32, device=device)
        self._means = torch.zeros_like(self._squared) if self._with_means else self._squared

    def _at_down(self, index: int, block: FeedForward, _: nn.Module, args: tuple[Tensor, ...]) -> None:
        """One chunk of z, [M, T, F] or, where the model flattens (OPT), [M * T, F]: in place, it is nobody else's."""
        z = args[0].view(self._squared.shape[0], -1, block.neurons)
        begin, end = self._position, self._position + z.shape[1]
        if self._observe is not None:
            for row, own in enumerate(z, start=self._rows.start):
                self._observe(index, row, begin, own)
        inside = min(max(self._prompt - begin, 0), z.shape[1])
        if inside:
            weights = self._weights[self._rows, :, begin : begin + inside]
            self._squared += squared_statistic(z[:, :inside], weights)[:, 0]
            if self._with_means:
                self._means += weighted_sum(z[:, :inside], weights)[:, 0]
        if begin < self._prompt <= end:
            self._prompts_end(index)
        if inside < z.shape[1]:
            self._leave_out(z[:, inside:])
        self._position = end

    def _prompts_end(self, index: int) -> None:
        if self._with_means:
            self._means /= self._weights[self._rows].sum(-1)
        for row, squared in enumerate(self._squared, start=self._rows.start):
            choice = self._choose(index, row, squared, self._full) if self._choose is not None else None
            self._choices.append(choice)
            self._shares[row].append(squared.new_ones(()) if choice is None else choice.share)
        if self.sums is not None:
            self._layer_sums.append(self._squared.cpu())

    def _leave_out(self, z: Tensor) -> None:
        for row, (choice, own) in enumerate(zip(self._choices, z, strict=True)):
            if choice is None:
                continue
            if choice.compensate:
                own.copy_(torch.where(choice.kept, own, self._means[row].to(own.dtype)))
            else:
                own.mul_(choice.kept)

    def _layer_ends(self, index: int, *_: Any) -> None:
        if index in self._layers.compact:
            assert self._stream is not None
            self._layers.blocks[index].install_compact(self._layers.compact[index])
            self._stream.release()
        self._full = []
        if self.sums is not None:
            self.sums.append(torch.cat(self._layer_sums))
        if self._progress is not None:
            self._progress(index + 1, len(self._layers.decoder))


class _RowByRow:
    """The forward of a decoder layer during a pass: the stock one, over some of the rows at a time."""

    def __init__(self, forward: Callable[..., Any], limit: int, start: Callable[[slice], None]) -> None:
        self._forward, self._limit, self._start = forward, limit, start

    def __call__(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
        rows = hidden.shape[0]
        output = torch.empty_like(hidden)
        rest: tuple[Any, ...] | None = None
        for first in range(0, rows, self._limit):
            part = slice(first, min(first + self._limit, rows))
            self._start(part)
            mine = {name: _of_rows(value, rows, part) for name, value in kwargs.items()}
            found = self._forward(hidden[part], *(_of_rows(value, rows, part) for value in args), **mine)
            if isinstance(found, tuple):  # beside the hidden states are a cache and attentions, which nobody asked for
                rest, found = found[1:], found[0]
            output[part] = found
        return output if rest is None else (output, *rest)


def _of_rows(value: Any, rows: int, part: slice) -> Any:
    """What of a layer's argument belongs to some of the rows. Tensors have one entry per row, or several (a bias per
    row and head, ALiBi), on their first axis, or are the same for all rows."""
    if isinstance(value, tuple):
        return tuple(_of_rows(item, rows, part) for item in value)
    if not isinstance(value, Tensor) or value.dim() < 2 or value.shape[0] % rows:
        return value
    each = value.shape[0] // rows
    return value[part.start * each : part.stop * each]
