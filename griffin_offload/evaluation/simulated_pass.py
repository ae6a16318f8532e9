"""The simulated pass: one forward of the stock layers in which prompts choose neurons and what follows them goes on
with the chosen ones alone, layer by layer, while each full layer visits the device once.

Prompt positions never see later ones, so this equals generation. What is chosen differs from row to row: instead of
gathering, the input of the down projection is set to zero for neurons that a row left out. Experts are chosen before
they compute, so rows pass such a layer again when their prompts have chosen, routed among those. Shapes: R rows, M rows
inside a layer at once, T columns, F neurons, or experts.
"""

import bisect
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from griffin_offload.blocks.base import Activations, Block, PassForward
from griffin_offload.blocks.routing import kept_inside
from griffin_offload.blocks.sizes import ModelSizes
from griffin_offload.engine.layer_pass import DecoderLayers, LayerPass, Progress, StreamFeed, Visitor
from griffin_offload.errors import DoesNotFit, UnsupportedModel
from griffin_offload.kv_cache.workload import Workload
from griffin_offload.planner.plan import Plan, as_loaded
from griffin_offload.planner.request import PlanRequest
from griffin_offload.planner.workspace import workspace_bytes
from griffin_offload.units import format_bytes

# How many samples go through the model in one streamed pass, and how many rows through a layer at once.
#
# A simulated pass holds the hidden states of all its rows (one row is one sample under one variant), so that a layer's
# weights are fetched once for all of them; what is large inside a layer exists for a few rows at a time. There is no KV
# cache. Pure arithmetic, with the parts of the plan the model was loaded by.

# More tokens at once in a layer, or positions in the head, make nothing faster.
TOKENS_AT_ONCE = 2048
POSITIONS_AT_ONCE = 64
_FLOAT_BYTES = 4
_INDEX_BYTES = 8
# Of a plan's prefill: what a simulated pass has in another form, or not at all.
_REPLACED = ("kv_cache", "workspace", "logits", "statistic")


@dataclass(frozen=True)
class PassSize:
    """One streamed pass."""

    samples: int
    rows_at_once: int
    """Rows that are inside a layer at the same time."""
    positions_at_once: int
    """Positions whose logits exist at the same time."""
    parts: dict[str, int]
    """Bytes beside the residents."""


@dataclass(frozen=True)
class Sizer:
    """The bytes of passes of one loaded model, each sample under `variants` of them, the full model included."""

    shape: ModelSizes
    request: PlanRequest
    plan: Plan
    variants: int
    norm_tables: int
    """Tables of one float per neuron that outlive a pass: norms of weights, a prior."""
    sample_tables: int
    """The same per sample."""
    kept_bytes: int = 0
    """What an observer keeps, beside those tables, from all passes together."""

    @property
    def _fixed_bytes(self) -> int:
        """Residents, slots, and what the device's runtime takes."""
        return sum(size for name, size in self.plan.prefill_parts.items() if name not in _REPLACED)

    def largest(self, samples: int, columns: int, *, padded: bool) -> PassSize | None:
        """The largest pass of at most `samples` of `columns` tokens; None when not even one fits."""
        if not self._fits(self._parts(1, 1, 1, columns, padded)):
            return None

        def most(limit: int, parts: Callable[[int], dict[str, int]]) -> int:
            """The largest number up to `limit` whose parts fit, by bisection; 1 is known to."""
            return bisect.bisect_right(range(2, limit + 1), False, key=lambda n: not self._fits(parts(n))) + 1

        # Every further pass fetches all weights again: samples come before what only makes a layer or the head faster.
        count = most(samples, lambda n: self._parts(n, 1, 1, columns, padded))
        limit = min(max(TOKENS_AT_ONCE // columns, 1), count * self.variants)
        rows = most(limit, lambda n: self._parts(count, n, 1, columns, padded))
        positions = most(POSITIONS_AT_ONCE, lambda n: self._parts(count, rows, n, columns, padded))
        return PassSize(count, rows, positions, self._parts(count, rows, positions, columns, padded))

    def refuse(self, columns: int) -> DoesNotFit:
        """The error for a sample that does not fit by itself, with its numbers."""
        parts = self._parts(1, 1, 1, columns, padded=False)
        listed = ", ".join(f"{name} {format_bytes(size)}" for name, size in parts.items() if size)
        return DoesNotFit(
            f"one sample of {columns} tokens under {self.variants} variants, the full model included, needs "
            f"{format_bytes(self._fixed_bytes + sum(parts.values()))}, budget {format_bytes(self.plan.budget_bytes)} "
            f"(residents and slots {format_bytes(self._fixed_bytes)}, {listed}): try a larger --max-gpu-mem, fewer "
            "variants or shorter samples"
        )

    def _fits(self, parts: dict[str, int]) -> bool:
        return self._fixed_bytes + sum(parts.values()) <= self.plan.budget_bytes

    def _parts(self, samples: int, rows: int, positions: int, columns: int, padded: bool) -> dict[str, int]:
        shape, request = self.shape, as_loaded(self.request, self.plan)
        neurons = sum(layer.neurons for layer in shape.layers)
        use = Workload(rows, columns, columns)
        # Sums, means and masks of the rows inside a layer; keys and values are repeated where there is a mask.
        state = rows * shape.width * (1 + 2 * _FLOAT_BYTES) + shape.width * (_INDEX_BYTES + 4 * _FLOAT_BYTES)
        repeated = rows * columns * 2 * shape.attention_width * shape.item_bytes
        workspace = workspace_bytes(shape, request, use, columns, columns, self.plan.counts) + state + repeated
        return {
            "rows": samples * self.variants * self._row_bytes(columns, padded),
            "workspace": workspace + self._routing_bytes(rows * columns),
            "logits": positions * shape.vocab_size * (2 * shape.item_bytes + 6 * _FLOAT_BYTES),
            "statistic": (self.norm_tables + self.sample_tables * samples) * neurons * _FLOAT_BYTES + self.kept_bytes,
        }

    def _routing_bytes(self, tokens: int) -> int:
        """Which experts each token may be sent to, and its scores with and without the others; where norms are asked
        for, an expert in float32."""
        layers = [layer for layer in self.shape.layers if layer.experts]
        numbers = max((layer.neuron_bytes for layer in layers), default=0) // self.shape.item_bytes
        masks = tokens * max((layer.neurons for layer in layers), default=0) * (1 + 2 * _FLOAT_BYTES)
        return masks + 2 * numbers * _FLOAT_BYTES * (self.norm_tables > 0)

    def _row_bytes(self, columns: int, padded: bool) -> int:
        """What exists of every row during the whole pass: hidden states, the last norm's copies, positions, masks."""
        shape = self.shape
        kinds = len({layer.window for layer in shape.layers})
        hidden = columns * shape.hidden_size * (3 * shape.item_bytes + 2 * _FLOAT_BYTES)
        angles = kinds * 2 * columns * (shape.attention_width // shape.heads) * _FLOAT_BYTES
        mask = 0
        if shape.materialises_scores:
            mask = columns**2 * (shape.heads * shape.item_bytes + _FLOAT_BYTES)
        elif padded or kinds > 1 or shape.layers[0].window is not None:
            mask = 2 * columns**2
        return hidden + angles + 3 * columns * _INDEX_BYTES + kinds * mask


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
    """Shows an observer every z, before anything is left out, and tells it each layer's norms if it wants any."""

    def __init__(self, observer: Observer, norms: dict[int, Tensor] | None) -> None:
        self._observer, self._norms = observer, norms

    def see(self, index: int, found: Activations) -> None:
        own = self.by_row(found)
        for row, z in enumerate(own.values(), start=self.rows.start):
            self._observer(index, row, own.start, z)

    def end(self, index: int, block: Block, full: list[Tensor]) -> None:
        if self._norms is not None and index not in self._norms and block.neurons and not block.active:
            self._norms[index] = block.output_norms(full).float().cpu()


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
        if not block.neurons:  # nothing will be seen
            self._prompts_end()

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
        self._routed = False
        self._full: list[Tensor] = []

    def start(self, index: int, block: Block, full: list[Tensor]) -> None:
        self._full = full

    def end(self, index: int, block: Block, full: list[Tensor]) -> None:
        self._full = []

    def rows_start(self, block: Block, rows: slice) -> None:
        super().rows_start(block, rows)
        self._choices, self._routed = [], block.active > 0

    def see(self, index: int, found: Activations) -> None:
        own, prompt = self.by_row(found), self._statistic.prompt
        if own.start < prompt <= own.start + own.tokens:
            self._prompts_end(index)
        if own.start + own.tokens > prompt and not self._routed:
            for row, choice in enumerate(self._choices):
                behind = own.part(slice(row, row + 1), slice(max(prompt - own.start, 0), own.tokens))
                if choice is not None:
                    behind.leave_out(choice.kept, self._statistic.means[row] if choice.compensate else None)

    def _prompts_end(self, index: int) -> None:
        for row, squared in enumerate(self._statistic.squared, start=self.rows.start):
            choice = self._choose(index, row, squared, self._full) if self._choose is not None else None
            self._choices.append(choice)
            self.shares[row].append(squared.new_ones(()) if choice is None else choice.share)

    def allowed(self, columns: int) -> Tensor | None:
        """Which experts each of the `columns` of the rows may be sent to, booleans [M * T, E]: behind their prompts the
        chosen ones. None where the rows have left out nothing, or did so already."""
        chosen = [choice.kept for choice in self._choices if choice is not None]
        if not self._routed or not chosen or columns <= self._statistic.prompt:
            return None
        shape = len(self._choices), columns, chosen[0].numel()
        found = torch.ones(shape, dtype=torch.bool, device=chosen[0].device)
        for row, choice in enumerate(self._choices):
            if choice is not None:
                found[row, self._statistic.prompt :] = choice.kept
        return found.flatten(0, 1)


class SimulatedPass(LayerPass):
    """A context manager: inside it, one forward of the stack of layers over [R, T] is a simulated pass.

    `mask` is [R, T] on the device, 0 for padding; the first `prompt_columns` columns are prompts. Without `choose` all
    rows are the full model. `means` says that some row compensates. With `keep`, s^2 of every layer is kept in `sums`,
    in host memory. `observe` is shown every z before anything is left out; `norms` gets those of output columns.
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
        norms: dict[int, Tensor] | None = None,
        progress: Progress | None = None,
    ) -> None:
        self._statistic = _PromptStatistic(mask[:, None, :prompt_columns].float(), means=means, keep=keep)
        self._left_out = _LeaveOut(self._statistic, mask.shape[0], choose)
        watch = [] if observe is None else [_Watch(observe, norms)]
        self._of_rows: list[_RowVisitor] = [*watch, self._statistic, self._left_out]
        self._stream, self._rows_at_once, self._again = StreamFeed(layers), rows_at_once, False
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
        """Of each row, the mean share of s^2 / S that chosen neurons hold (1 where no layer has any); waits for it."""
        whole = [torch.ones((), dtype=torch.float32, device="cpu")]
        return [float(torch.stack(shares or whole).mean()) for shares in self._left_out.shares]

    def _hook_layer(self, index: int, layer: nn.Module, block: Block) -> None:
        layer.forward = _RowByRow(layer.forward, self._rows_at_once, partial(self._pass_rows, index, layer, block))
        super()._hook_layer(index, layer, block)

    def _pass_rows(
        self, index: int, layer: nn.Module, block: Block, rows: slice, columns: int, forward: Callable[[], Any]
    ) -> Any:
        """What the layer answers to some rows: `forward`, or once more where they have chosen experts in it."""
        for visitor in self._of_rows:
            visitor.rows_start(block, rows)
        found, allowed = forward(), self._left_out.allowed(columns)
        if allowed is None:
            return found
        found, counted = None, []
        self._again = True
        with kept_inside(layer, block, allowed, lambda own, _: counted.append(own.numel())):
            found = forward()
        self._again = False
        if not counted:
            raise UnsupportedModel(f"layer {index}: this model's router cannot be kept to some of its experts")
        return found

    def _see(self, index: int, found: Activations) -> None:
        if not self._again:
            super()._see(index, found)


class _RowByRow(PassForward):
    """The forward of a decoder layer during a pass: the stock one, over some of the rows at a time."""

    def __init__(
        self, forward: Callable[..., Any], limit: int, pass_rows: Callable[[slice, int, Callable[[], Any]], Any]
    ) -> None:
        super().__init__(forward)
        self._limit, self._pass_rows = limit, pass_rows

    def __call__(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
        rows = hidden.shape[0]
        output = torch.empty_like(hidden)
        rest: tuple[Any, ...] | None = None
        for first in range(0, rows, self._limit):
            part = slice(first, min(first + self._limit, rows))
            mine = [hidden[part], *(_of_rows(value, rows, part) for value in args)]
            named = {name: _of_rows(value, rows, part) for name, value in kwargs.items()}
            found = self._pass_rows(part, hidden.shape[1], partial(self._forward, *mine, **named))
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
