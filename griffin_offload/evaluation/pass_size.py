"""How many samples go through the model in one streamed pass, and how many rows through a layer at once.

A simulated pass holds the hidden states of all its rows (one row is one sample under one variant), so that a layer's
weights are fetched once for all of them; what is large inside a layer exists for a few rows at a time. There is no KV
cache. Pure arithmetic, with the parts of the plan the model was loaded by.
"""

import bisect
from collections.abc import Callable
from dataclasses import dataclass

from griffin_offload.blocks.sizes import ModelSizes
from griffin_offload.errors import DoesNotFit
from griffin_offload.kv_cache.sizes import Workload
from griffin_offload.planner.plan import Plan
from griffin_offload.planner.request import PlanRequest
from griffin_offload.planner.solve import as_loaded
from griffin_offload.planner.workspace import workspace_bytes
from griffin_offload.units import format_bytes

# More tokens at once in a layer, or positions in the head, make nothing faster.
_TOKENS_AT_ONCE = 2048
_POSITIONS_AT_ONCE = 64
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
        limit = min(max(_TOKENS_AT_ONCE // columns, 1), count * self.variants)
        rows = most(limit, lambda n: self._parts(count, n, 1, columns, padded))
        positions = most(_POSITIONS_AT_ONCE, lambda n: self._parts(count, rows, n, columns, padded))
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
        widest = shape.width
        use = Workload(rows, columns, columns)
        # Sums, means and masks of the rows inside a layer; keys and values are repeated where there is a mask.
        state = rows * widest * (1 + 2 * _FLOAT_BYTES) + widest * (_INDEX_BYTES + 4 * _FLOAT_BYTES)
        repeated = rows * columns * 2 * shape.attention_width * shape.item_bytes
        return {
            "rows": samples * self.variants * self._row_bytes(columns, padded),
            "workspace": workspace_bytes(shape, request, use, columns, columns, self.plan.kept) + state + repeated,
            "logits": positions * shape.vocab_size * (2 * shape.item_bytes + 6 * _FLOAT_BYTES),
            "statistic": (self.norm_tables + self.sample_tables * samples) * neurons * _FLOAT_BYTES + self.kept_bytes,
        }

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
