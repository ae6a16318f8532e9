"""The simulated pass: one forward of the stock layers in which prompts choose neurons and what follows them goes on
with the chosen ones alone, layer by layer, while each full layer visits the device once.

Prompt positions never see later ones, so this equals generation. What is chosen differs from row to row: instead of
gathering, the input of the down projection is set to zero for neurons that a row left out. Shapes: R rows, M rows
inside a layer at once, T columns, F neurons.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from griffin_offload.blocks.base import Activations, Block
from griffin_offload.blocks.hooks import PassForward
from griffin_offload.engine.layer_pass import DecoderLayers, LayerPass, Progress, StreamFeed, Visitor


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


class _RowVisitor(Visitor):
    """One that is told which of the pass's rows are inside a layer."""

    rows = slice(0, 0)

    def rows_start(self, block: Block, rows: slice) -> None:
        self.rows = rows

    def by_row(self, found: Activations) -> Activations:
        return found.by_sample(self.rows.stop - self.rows.start)


class _Watch(_RowVisitor):
    """Shows an observer every z, before anything is left out."""

    def __init__(self, observer: Observer) -> None:
        self._observer = observer

    def see(self, index: int, found: Activations) -> None:
        own = self.by_row(found)
        for row, z in enumerate(own.values(), start=self.rows.start):
            self._observer(index, row, own.start, z)


class _PromptStatistic(_RowVisitor):
    """Sums s^2 [M, F] of the rows' prompts, and with `means` their mean activations [M, W]; `keep` keeps s^2."""

    def __init__(self, weights: Tensor, *, means: bool, keep: bool) -> None:
        self._weights, self._with_means, self._keep = weights, means, keep
        self.prompt = weights.shape[-1]
        self.squared = self.means = torch.empty(0, dtype=torch.float32, device="cpu")
        self.sums: list[Tensor] = []
        self._layer_sums: list[Tensor] = []

    def rows_start(self, block: Block, rows: slice) -> None:
        super().rows_start(block, rows)
        count, device = rows.stop - rows.start, self._weights.device
        self.squared = torch.zeros(count, block.neurons, dtype=torch.float32, device=device)
        width = block.width if self._with_means else 0
        self.means = torch.zeros(count, width, dtype=torch.float32, device=device)

    def see(self, index: int, found: Activations) -> None:
        own = self.by_row(found)
        inside = min(max(self.prompt - own.start, 0), own.tokens)
        if inside:
            weights = self._weights[self.rows, :, own.start : own.start + inside]
            of_prompt = own.part(slice(None), slice(0, inside))
            self.squared += of_prompt.squared(weights)[:, 0]
            if self._with_means:
                self.means += of_prompt.summed(weights)[:, 0]
        if own.start < self.prompt <= own.start + own.tokens:
            self._prompts_end()

    def _prompts_end(self) -> None:
        if self._with_means:
            self.means /= self._weights[self.rows].sum(-1)
        if self._keep:
            self._layer_sums.append(self.squared.cpu())

    def end(self, index: int, block: Block, full: list[Tensor]) -> None:
        if self._keep:
            self.sums.append(torch.cat(self._layer_sums))
        self._layer_sums = []


class _LeaveOut(_RowVisitor):
    """Lets each row choose when its prompt ends, and leaves out the others of what follows."""

    def __init__(self, statistic: _PromptStatistic, rows: int, choose: Chooser | None) -> None:
        self._statistic, self._choose = statistic, choose
        self.shares: list[list[Tensor]] = [[] for _ in range(rows)]
        self._choices: list[NeuronChoice | None] = []
        self._full: list[Tensor] = []

    def start(self, index: int, block: Block, full: list[Tensor]) -> None:
        self._full = full

    def end(self, index: int, block: Block, full: list[Tensor]) -> None:
        self._full = []

    def rows_start(self, block: Block, rows: slice) -> None:
        super().rows_start(block, rows)
        self._choices = []

    def see(self, index: int, found: Activations) -> None:
        own, prompt = self.by_row(found), self._statistic.prompt
        if own.start < prompt <= own.start + own.tokens:
            self._prompts_end(index)
        if own.start + own.tokens > prompt:
            for row, choice in enumerate(self._choices):
                behind = own.part(slice(row, row + 1), slice(max(prompt - own.start, 0), own.tokens))
                if choice is not None:
                    behind.leave_out(choice.kept, self._statistic.means[row] if choice.compensate else None)

    def _prompts_end(self, index: int) -> None:
        for row, squared in enumerate(self._statistic.squared, start=self.rows.start):
            choice = self._choose(index, row, squared, self._full) if self._choose is not None else None
            self._choices.append(choice)
            self.shares[row].append(squared.new_ones(()) if choice is None else choice.share)


class SimulatedPass(LayerPass):
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
        weights = mask[:, None, :prompt_columns].float()  # [R, 1, P]
        self._statistic = _PromptStatistic(weights, means=means, keep=keep)
        self._left_out = _LeaveOut(self._statistic, mask.shape[0], choose)
        self._of_rows: list[_RowVisitor] = [self._statistic, self._left_out]
        if observe is not None:
            self._of_rows.insert(0, _Watch(observe))
        self._stream, self._rows_at_once = StreamFeed(layers), rows_at_once
        super().__init__(
            layers.decoder,
            layers.blocks,
            self._stream,
            self._of_rows,
            every_layer=True,
            chunk_tokens=layers.ff_chunk_tokens,
            progress=progress,
        )

    @property
    def sums(self) -> list[Tensor]:
        """s^2 [R, F] of each layer; none without `keep`."""
        return self._statistic.sums

    @property
    def peak_in_flight_bytes(self) -> int:
        return self._stream.peak_in_flight_bytes

    def activation_kept(self) -> list[float]:
        """Of each row, the share of s^2 / S that the chosen neurons hold, mean over layers; waits for the device."""
        found: list[float] = torch.stack([torch.stack(shares).mean() for shares in self._left_out.shares]).tolist()
        return found

    def _hook_layer(self, index: int, layer: nn.Module, block: Block) -> None:
        layer.forward = _RowByRow(layer.forward, self._rows_at_once, partial(self._rows_start, block))
        super()._hook_layer(index, layer, block)

    def _rows_start(self, block: Block, rows: slice) -> None:
        for visitor in self._of_rows:
            visitor.rows_start(block, rows)


class _RowByRow(PassForward):
    """The forward of a decoder layer during a pass: the stock one, over some of the rows at a time."""

    def __init__(self, forward: Callable[..., Any], limit: int, start: Callable[[slice], None]) -> None:
        super().__init__(forward)
        self._limit, self._start = limit, start

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
