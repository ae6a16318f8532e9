"""Metrics relative to the full model's, from what the measuring commands wrote (paper, figure 4)."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from griffin_offload.errors import UsageError
from griffin_offload.evaluation.perplexity import Row

# Metrics of lm-eval, in the order of preference where a task has several; the paper's come first.
_METRICS = ("acc", "f1", "f1_abstractive", "rouge1", "rouge2", "rougeL", "em", "exact_match", "acc_norm")


@dataclass(frozen=True)
class Point:
    """One metric under one variant."""

    metric: str
    selection: str
    density: float
    value: float
    full: float
    lower_is_better: bool = False

    @property
    def relative(self) -> float:
        """1 is the full model; less is worse."""
        return self.full / self.value if self.lower_is_better else self.value / self.full

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {"sparsity": round(1 - self.density, 6), "relative": self.relative}


def points_of_rows(rows: Sequence[Row]) -> list[Point]:
    """Perplexities: relative is the full model's over the variant's."""
    return [Point("1 / perplexity", row.selection, row.density, row.ppl, row.ppl_full, True) for row in rows]


def read_points(path: Path) -> list[Point]:
    """Points of a file that `eval ppl --json` or `eval tasks --output` wrote; UsageError for any other."""
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:  # ValueError: neither UTF-8 nor JSON
        raise UsageError(f"cannot read the rows {path}: {error}") from error
    try:
        points = list(_of_tasks(rows) if "results" in rows[0] else _of_perplexity(rows))
    except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
        raise UsageError(f"{path} is not what eval ppl --json or eval tasks --output write: {error!r}") from error
    if not points:
        raise UsageError(f"{path} has no row with a density")
    return points


def _of_perplexity(rows: list[dict[str, Any]]) -> Iterator[Point]:
    sizes = {(row["prompt_tokens"], row["generate_tokens"]) for row in rows}
    for row in rows:
        size = f", {row['prompt_tokens']} + {row['generate_tokens']}" if len(sizes) > 1 else ""
        values = float(row["density"]), float(row["ppl"]), float(row["ppl_full"])
        yield Point(f"1 / perplexity{size}", str(row["selection"]), *values, lower_is_better=True)


def _of_tasks(runs: list[dict[str, Any]]) -> Iterator[Point]:
    """The full model's run comes first. A task at which it scores 0 has nothing to lose."""
    full, *variants = runs
    for task, found in full["results"].items():
        key = _metric_of(found)
        if key is None or not found[key]:
            continue
        for run in variants:
            made = run["config"]["model_args"]
            value = float(run["results"][task][key])
            name = f"{task} {key.partition(',')[0]}"
            yield Point(name, str(made["selection"]), float(made["density"]), value, float(found[key]))


def _metric_of(found: dict[str, Any]) -> str | None:
    """The key of a task's metric, `metric,filter` in lm-eval."""
    keys = [key for key in found if "," in key and "_stderr," not in key and isinstance(found[key], int | float)]
    for metric in _METRICS:
        for key in keys:
            if key.startswith(f"{metric},"):
                return key
    return None
