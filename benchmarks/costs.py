"""How cost grows: prefill with the prompt, decoding with density, context and layers, each beside what theory says.

    python benchmarks/costs.py --out OUT

Random checkpoints are made for it. Theory: a prompt costs a + b T + c T^2, the square being attention alone; a token
costs a line in density, in the tokens before it and in layers. Each curve is fitted by that, and the largest deviation
from the fit is reported; rounds pass all points in turn, so that a busy moment falls on all of them. The last line is
JSON.
"""

import argparse
import json
import statistics
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from make_checkpoint import make_checkpoint
from report import markdown_table, origin_lines, provenance, write

from griffin_offload import GriffinModel
from griffin_offload.evaluation.speed import run_fixed

PROMPTS = (128, 256, 512, 1024, 2048, 4096, 8192)
DENSITIES = (0.1, 0.25, 0.4, 0.55, 0.7, 0.85, 1.0)
LAYERS = (2, 4, 8, 16)
DENSITY, BASE_LAYERS, BASE_PROMPT = 0.5, 8, 256
MAX_POSITIONS = 16384


@dataclass(frozen=True)
class Curve:
    """Medians over rounds, in seconds, and the fit of theory's polynomial."""

    what: str
    over: str
    x: list[float]
    seconds: list[float]
    coefficients: list[float]
    """Lowest power first."""

    @property
    def fitted(self) -> list[float]:
        return [float(value) for value in np.polynomial.polynomial.polyval(np.array(self.x), self.coefficients)]

    @property
    def largest_deviation(self) -> float:
        """Relative to the fit."""
        return max(abs(s / f - 1) for s, f in zip(self.seconds, self.fitted, strict=True))


def parse_arguments(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", default="costs")
    parser.add_argument("--prompts", type=int, nargs="+", default=PROMPTS)
    parser.add_argument("--densities", type=float, nargs="+", default=DENSITIES)
    parser.add_argument("--layers", type=int, nargs="+", default=LAYERS)
    parser.add_argument("--new-tokens", type=int, default=24)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, help="folder for the record and the picture")
    return parser.parse_args(arguments)


def checkpoint(folder: Path, shape: str, layers: int) -> Path:
    target = folder / f"{layers}-layers"
    if not target.exists():
        make_checkpoint(target, shape, layers)
        path = target / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"max_position_embeddings": MAX_POSITIONS}))
    return target


def fit(what: str, over: str, points: dict[float, list[float]], degree: int) -> Curve:
    """Least squares of relative errors: a short prompt counts as much as a long one."""
    x, y = list(points), [statistics.median(values) for values in points.values()]
    weights = 1 / np.array(y)
    found = np.polynomial.polynomial.polyfit(np.array(x), np.array(y), degree, w=weights)
    return Curve(what, over, x, y, [float(value) for value in found])


class Points:
    """Seconds of prefill and of one decoded token, by point."""

    def __init__(self, options: argparse.Namespace, folder: Path) -> None:
        self._options, self._folder = options, folder

    def measure(
        self, prompts: Sequence[int], densities: Sequence[float], layers: Sequence[int]
    ) -> tuple[dict[Any, list[float]], dict[Any, list[float]]]:
        """All points of the product, in turns, one model in memory at a time."""
        prefill: dict[Any, list[float]] = {}
        decode: dict[Any, list[float]] = {}
        for _ in range(self._options.rounds):
            for count in layers:
                for density in densities:
                    for point, (first_s, token_s) in self._one_model(count, density, prompts).items():
                        prefill.setdefault(point, []).append(first_s)
                        decode.setdefault(point, []).append(token_s)
        return prefill, decode

    def _one_model(self, layers: int, density: float, prompts: Sequence[int]) -> dict[Any, tuple[float, float]]:
        new = self._options.new_tokens
        folder = checkpoint(self._folder, self._options.shape, layers)
        options = {"prompt_tokens": max(prompts), "ctx_size": max(prompts) + new, "threads": self._options.threads}
        found = {}
        with GriffinModel.from_pretrained(
            folder, device="cpu", density=density, quantize="none", always_stream=True, **options
        ) as model:
            tokens = torch.randint(0, 500, (max(prompts),), generator=torch.Generator().manual_seed(0))
            run_fixed(model, tokens[: prompts[0]], 4)
            for prompt in prompts:
                report = run_fixed(model, tokens[:prompt], new)
                found[layers, density, prompt] = report.prefill_s, report.decode_s / (new - 1)
        return found


def measure(options: argparse.Namespace, folder: Path) -> list[Curve]:
    points = Points(options, folder)
    prefill, decode = points.measure(options.prompts, [DENSITY], [BASE_LAYERS])
    curves = [
        fit("prefill", "prompt tokens", {point[2]: values for point, values in prefill.items()}, 2),
        fit("one token", "tokens before it", {point[2]: values for point, values in decode.items()}, 1),
    ]
    _, decode = points.measure([BASE_PROMPT], options.densities, [BASE_LAYERS])
    curves.append(fit("one token", "density", {point[1]: values for point, values in decode.items()}, 1))
    prefill, decode = points.measure([BASE_PROMPT], [DENSITY], options.layers)
    curves.append(fit("prefill", "layers", {point[0]: values for point, values in prefill.items()}, 1))
    curves.append(fit("one token", "layers", {point[0]: values for point, values in decode.items()}, 1))
    return curves


def table(curves: Sequence[Curve]) -> str:
    rows = [["", "over", "measured", "fit, seconds", "largest deviation from it"]]
    for curve in curves:
        powers = ("", " x", " x^2")
        terms = [f"{value:.3g}{power}" for value, power in zip(curve.coefficients, powers, strict=False)]
        points = ", ".join(f"{x:g}: {s:.4g} s" for x, s in zip(curve.x, curve.seconds, strict=True))
        rows.append([curve.what, curve.over, points, " + ".join(terms), f"{curve.largest_deviation:.0%}"])
    return markdown_table(rows)


def draw(curves: Sequence[Curve], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(curves), figsize=(3.2 * len(curves), 3.2), layout="constrained")
    for axis, curve in zip(axes, curves, strict=True):
        fine = np.linspace(min(curve.x), max(curve.x), 100)
        axis.plot(
            fine, np.polynomial.polynomial.polyval(fine, curve.coefficients), color="#767676", label="theory, fitted"
        )
        axis.plot(curve.x, curve.seconds, "o", color="#0072B2", label="measured")
        axis.set(title=curve.what, xlabel=curve.over, ylabel="seconds", xlim=(0, None), ylim=(0, None))
    axes[0].legend()
    figure.savefig(path, dpi=120)


def main(arguments: Sequence[str]) -> int:
    options = parse_arguments(arguments)
    with tempfile.TemporaryDirectory() as folder:
        curves = measure(options, Path(folder))
    record = provenance("costs.py", arguments) | {
        "curves": [asdict(c) | {"fitted": c.fitted, "largest_deviation": c.largest_deviation} for c in curves]
    }
    print(table(curves))
    if options.out is not None:
        page = f"# How cost grows\n\n{origin_lines(record)}\n\n{table(curves)}\n\n![curves](costs.png)"
        write(options.out, "costs", page, record)
        draw(curves, options.out / "costs.png")
    print(json.dumps(record))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
