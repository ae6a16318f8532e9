"""`griffin-offload inspect --text`: the paper's figures of a model on a text, as PNG, SVG and JSON."""

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

from griffin_offload.checkpoint.files import write_text
from griffin_offload.cli.eval import fractions, load_streamed, selections
from griffin_offload.cli.options import model_of, quiet_libraries
from griffin_offload.cli.terminal import Bar
from griffin_offload.errors import UsageError
from griffin_offload.evaluation.config import EvalConfig, InspectConfig
from griffin_offload.evaluation.plots import check_matplotlib, draw, make_directory

if TYPE_CHECKING:
    from torch import Tensor

    from griffin_offload.checkpoint.base import Checkpoint
    from griffin_offload.engine.model import GriffinModel
    from griffin_offload.evaluation.perplexity import Row
    from griffin_offload.method.variants import Variant


# What is seen in a figure, in one line.


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


_DEFAULTS = InspectConfig()
_EVAL = EvalConfig()
_OBSERVED = ("flocking", "jaccard", "inputs", "statistic")


def inspect_text(arguments: argparse.Namespace) -> int:
    """Write every figure that was asked for; a line about each on stdout, or all numbers as one JSON object."""
    figures = _figures(arguments)
    densities = None if arguments.density is None else fractions(arguments.density)
    methods = None if arguments.selection is None else selections(arguments.selection)
    if arguments.output is None:
        raise UsageError("figures are files: name a directory with --output DIR")
    check_matplotlib()
    make_directory(arguments.output)
    files = _Files(
        arguments.output, {"model": arguments.model or "demo", "text": arguments.text and arguments.text.name}
    )
    if arguments.rows:
        _draw_rows(arguments.rows, files)
        figures = [name for name in figures if name != "sparsity"]
    if figures:
        _Inspection(arguments, figures, densities, methods, files).run()
    print(json.dumps(files.numbers) if arguments.json else "\n".join(files.lines))
    return 0


def _figures(arguments: argparse.Namespace) -> list[str]:
    asked = arguments.figure
    if asked is None:
        return ["sparsity"] if arguments.text is None else list(_DEFAULTS.figures)
    figures: list[str] = list(dict.fromkeys(asked.split(",")))
    unknown = [name for name in figures if name not in _DEFAULTS.figures]
    if unknown:
        raise UsageError(f"no figure {unknown[0]!r}: choose of {', '.join(_DEFAULTS.figures)}")
    if arguments.rows and "sparsity" not in figures:
        raise UsageError(f"--rows is for sparsity: it does nothing for {asked}")
    if arguments.text is None and figures != ["sparsity"]:
        raise UsageError(f"{next(name for name in figures if name != 'sparsity')} needs --text FILE")
    return figures


@dataclass
class _Files:
    """What is written to a directory."""

    directory: Path
    about: dict[str, Any]

    def __post_init__(self) -> None:
        self.numbers: dict[str, Any] = {}
        self.lines: list[str] = []

    def add(self, name: str, numbers: dict[str, Any], picture: Any, line: str) -> None:
        """A picture, drawn from these very numbers, and what is seen in it in one line."""
        numbers = self.about | numbers
        self.numbers[name] = numbers
        draw(partial(picture, numbers), self.directory, name)
        write_text(self.directory / f"{name}.json", json.dumps(numbers, indent=1))
        self.lines.append(f"{self.directory / name}.{{png,svg,json}}  {line}")

    def add_matrices(self, name: str, by_input: "dict[str, dict[int, Tensor]]") -> None:
        """The pixels of a picture."""
        units = {
            kind: {layer: matrix.mul(1e4).round().int().tolist() for layer, matrix in by_layer.items()}
            for kind, by_layer in by_input.items()
        }
        write_text(self.directory / f"{name}-heatmaps.json", json.dumps({"unit": 1e-4, "tokens_by_features": units}))


def _draw_rows(paths: Sequence[Path], files: _Files) -> None:
    from griffin_offload.evaluation.perplexity import read_points
    from griffin_offload.evaluation.plots import sparsity

    points = [point.to_json() for path in paths for point in read_points(path)]
    note = f"from {', '.join(path.name for path in paths)}"
    files.add("sparsity", {"note": note, "rows": points}, sparsity, f"{len(points)} points")


class _Inspection:
    """Figures that need a model and a text."""

    def __init__(
        self,
        arguments: argparse.Namespace,
        figures: Sequence[str],
        densities: Sequence[float] | None,
        methods: Sequence[Any] | None,
        files: _Files,
    ) -> None:
        self._arguments, self._figures, self._files = arguments, figures, files
        self._densities, self._methods = densities, methods
        self._count = _given(arguments.windows, _DEFAULTS.windows)
        self._tokens = _given(arguments.tokens, _DEFAULTS.tokens)
        self._prompts = sorted(set(_given(arguments.prompt_tokens, _DEFAULTS.prompt_tokens)))
        self._generates = sorted(set(_given(arguments.generate_tokens, _DEFAULTS.generate_tokens)))
        self._sparsity_prompt = max(_given(arguments.prompt_tokens, [_EVAL.prompt_tokens]))
        self._sparsity_generate = max(_given(arguments.generate_tokens, [_EVAL.generate_tokens]))
        if min(self._count, self._tokens, *self._prompts, *self._generates) < 1:
            raise UsageError("--windows, --tokens, --prompt-tokens and --generate-tokens are 1 or more")
        if "jaccard" in figures and self._count < 2:
            raise UsageError("jaccard compares windows: --windows is 2 or more")

    def run(self) -> None:
        """Everything is cut out of the text before the model is loaded, which may take long."""
        quiet_libraries()
        from griffin_offload.checkpoint.registry import open_checkpoint
        from griffin_offload.evaluation.samples import first_tokens, read_documents, tokenize

        arguments = self._arguments
        checkpoint = open_checkpoint(model_of(arguments), offline=arguments.offline)
        self._layers = _layers(arguments.layers, checkpoint)
        texts = read_documents(arguments.text)
        tokenizer = checkpoint.tokenizer()
        self._documents = tokenize(texts, tokenizer)
        self._first = first_tokens(checkpoint.config, tokenizer)
        windows = {name: self._windows(size) for name, size in self._sizes().items()}
        with load_streamed(arguments, checkpoint, max(self._sizes().values())) as model:
            self._files.about["measured_in"] = model.plan.precision
            if "observed" in windows:
                self._draw_observed(model, windows["observed"])
            if "sparsity" in windows:
                self._draw_sparsity(model, windows["sparsity"])
            if "lengths" in windows:
                self._draw_lengths(model, windows["lengths"])

    def _sizes(self) -> dict[str, int]:
        """Tokens of a window."""
        sizes = {"observed": self._tokens} if set(self._figures) & set(_OBSERVED) else {}
        if "sparsity" in self._figures:
            sizes["sparsity"] = self._sparsity_prompt + self._sparsity_generate
        if "lengths" in self._figures:
            sizes["lengths"] = max(self._prompts) + max(self._generates)
        return sizes

    def _windows(self, tokens: int) -> "list[Tensor]":
        from griffin_offload.evaluation.samples import take_windows

        return take_windows(self._documents, tokens, self._count, "even", self._first)

    def _variants(self, densities: Sequence[float], methods: Sequence[Any]) -> "list[Variant]":
        from griffin_offload.method.variants import Variant

        return [
            Variant(density, method)
            for method, density in product(self._methods or methods, self._densities or densities)
        ]

    def _draw_observed(self, model: "GriffinModel", windows: "list[Tensor]") -> None:
        from griffin_offload.evaluation import plots
        from griffin_offload.evaluation.inspection import Look, look

        figures = tuple(name for name in self._figures if name in _OBSERVED)
        if not {"jaccard", "inputs"} & set(figures):
            windows = windows[:1]
        densities = tuple(self._densities or _DEFAULTS.jaccard_densities)
        what = Look(figures, self._layers, _DEFAULTS.features, densities, len(self._first), self._arguments.seed)
        with Bar("activations", quiet=self._arguments.quiet) as bar:
            seen = look(model, windows, what, bar.step)
        drawn = {"jaccard": plots.jaccard, "statistic": plots.statistic}
        for name in figures:
            picture: Any = drawn.get(name)
            if name == "flocking":
                picture = partial(plots.flocking, heatmaps=_arrays(seen.heatmaps[name])["original"])
            elif name == "inputs":
                picture = partial(plots.inputs, heatmaps=_arrays(seen.heatmaps[name]))
            self._files.add(name, seen.numbers[name], picture, summary(name, seen.numbers[name]))
            if name in seen.heatmaps:
                self._files.add_matrices(name, seen.heatmaps[name])

    def _draw_sparsity(self, model: "GriffinModel", windows: "list[Tensor]") -> None:
        from griffin_offload.evaluation.inspection import enough_for_a_token
        from griffin_offload.evaluation.perplexity import measure, points_of_rows
        from griffin_offload.evaluation.plots import sparsity

        densities = enough_for_a_token(model, _DEFAULTS.sparsity_densities)
        variants = self._variants(densities, _DEFAULTS.sparsity_selections)
        with Bar("sparsity", quiet=self._arguments.quiet) as bar:
            rows = measure(model, windows, self._sparsity_prompt, variants, bar.step)
        note = f"{len(windows)} windows of {self._sparsity_prompt} + {self._sparsity_generate} tokens"
        points = [point.to_json() for point in points_of_rows(rows)]
        self._files.add("sparsity", {"note": note, "rows": points}, sparsity, summary_of_rows(rows))

    def _draw_lengths(self, model: "GriffinModel", windows: "list[Tensor]") -> None:
        from griffin_offload.evaluation.perplexity import measure_lengths
        from griffin_offload.evaluation.plots import lengths

        variants = self._variants(_DEFAULTS.lengths_densities, _DEFAULTS.lengths_selections)
        with Bar("lengths", quiet=self._arguments.quiet) as bar:
            rows = measure_lengths(
                model, windows, self._prompts, self._generates, variants, first=self._first, progress=bar.step
            )
        numbers = {"windows": len(windows), "rows": [row.to_json() | {"increase": row.increase} for row in rows]}
        short, long = rows[0], rows[-len(variants)]
        line = (
            f"{short.increase:+.1%} behind {short.prompt_tokens} tokens, {long.increase:+.1%} behind "
            f"{long.prompt_tokens}"
        )
        self._files.add("lengths", numbers, lengths, line)


def _arrays(by_input: "dict[str, dict[int, Tensor]]") -> dict[str, dict[int, Any]]:
    return {kind: {layer: one.numpy() for layer, one in by_layer.items()} for kind, by_layer in by_input.items()}


def _given(value: Any, default: Any) -> Any:
    return default if value is None else value


def nothing_to_inspect(checkpoint: "Checkpoint") -> UsageError:
    """Of a model without a feed-forward."""
    return UsageError(
        f"{checkpoint.config.model_type} has no feed-forward: there are no neurons to inspect; plan -v shows the "
        "bytes of its parts, eval ppl --quantize what a precision costs"
    )


def _layers(text: str | None, checkpoint: "Checkpoint") -> tuple[int, ...]:
    """Layers of heatmaps; UsageError for one that the model does not have, or that has no feed-forward."""
    from griffin_offload.blocks.layouts import build_on_meta, find_feed_forwards
    from griffin_offload.evaluation.plots import spread

    count = checkpoint.config.num_hidden_layers
    _, blocks = find_feed_forwards(build_on_meta(checkpoint.config, checkpoint.dtype), count)
    known = [index for index, block in enumerate(blocks) if block.neurons]
    if not known:
        raise nothing_to_inspect(checkpoint)
    if text is None:
        return tuple(known[place] for place in spread(len(known), _DEFAULTS.layers))
    if text == "all":
        return tuple(known)
    try:
        layers = sorted({int(part) for part in text.split(",")})
    except ValueError:
        raise UsageError(f"cannot read the layers {text!r}: numbers from 0 to {count - 1}, 0,5, or all") from None
    wrong = [layer for layer in layers if not 0 <= layer < count]
    if wrong:
        raise UsageError(f"no layer {wrong[0]}: the model has {count}, from 0 to {count - 1}")
    without = [layer for layer in layers if layer not in known]
    if without:
        raise UsageError(f"layer {without[0]} has no feed-forward: choose of {', '.join(map(str, known))}")
    return tuple(layers)
