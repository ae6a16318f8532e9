"""What is seen in a figure, in one line."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from griffin_offload.evaluation.perplexity import Row


def summary(name: str, numbers: dict[str, Any]) -> str:
    """Of a figure of activations."""
    if name == "jaccard":
        return ", ".join(_means(numbers["rows"], "density", "jaccard", "top {:g}: {:.2f}"))
    if name == "inputs":
        return "half of the neurons hold " + ", ".join(
            _means(numbers["rows"], "input", "held_out_share_of_top_half", "{} {:.1%}")
        )
    if name == "flocking":
        shares = [layer["share_of_top_half"] for layer in numbers["layers"]]
        return f"half of the neurons hold {min(shares):.1%} to {max(shares):.1%} of s^2"
    return f"{len(numbers['layers'])} layers"


def _means(rows: Sequence[dict[str, Any]], group: str, value: str, text: str) -> list[str]:
    """Means over layers of each group."""
    found: dict[Any, list[float]] = {}
    for row in rows:
        found.setdefault(row[group], []).append(row[value])
    return [text.format(name, sum(values) / len(values)) for name, values in found.items()]


def summary_of_rows(rows: "Sequence[Row]") -> str:
    """Every selection at the density nearest to a half."""
    nearest = min((row.density for row in rows), key=lambda density: abs(density - 0.5))
    found = ", ".join(f"{row.selection} {row.increase:+.1%}" for row in rows if row.density == nearest)
    return f"perplexity at density {nearest:g}: {found}"
