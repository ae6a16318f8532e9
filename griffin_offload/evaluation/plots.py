"""What all pictures share: one style, colours that everybody can tell apart, files that are the same every time."""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from griffin_offload.checkpoint.files import renamed
from griffin_offload.errors import GriffinError, UsageError, why_unusable

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.image import AxesImage

# Okabe and Ito's, in an order that also differs in lightness.
CATEGORIES = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
GREY = "#767676"
_STYLE = {
    "font.family": "DejaVu Sans",
    "font.size": 9.5,
    "axes.titlesize": 10.5,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#E3E3E3",
    "grid.linewidth": 0.7,
    "axes.axisbelow": True,
    "axes.edgecolor": "#444444",
    "lines.linewidth": 1.7,
    "lines.markersize": 4.5,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "figure.titlesize": 12.5,
    "figure.titleweight": "bold",
    "savefig.facecolor": "white",
    # The same numbers give the same file.
    "svg.hashsalt": "griffin-offload",
    "svg.fonttype": "path",
}
_DOTS_PER_INCH = 150


def check_matplotlib() -> None:
    """GriffinError, with the remedy, where matplotlib is not installed; looks without importing it."""
    if find_spec("matplotlib") is None:
        raise GriffinError('pictures need matplotlib: pip install "griffin-offload[plot]"')


def make_directory(directory: Path) -> None:
    """Make sure that files can be written there, before anything is computed; UsageError if not."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
        probe = directory / ".griffin-offload.tmp"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise UsageError(f"cannot write to {directory}: {why_unusable(directory, error, 'write to')}") from error


@contextlib.contextmanager
def styled() -> Iterator[None]:
    """Inside, matplotlib draws in this package's style."""
    import matplotlib

    with matplotlib.rc_context(_STYLE):
        yield


def new_figure(width: float, height: float, title: str, subtitle: str = "") -> "Figure":
    """An empty figure, sizes in inches, that no window manager knows of."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=_DOTS_PER_INCH, layout="constrained")
    figure.suptitle(title, x=0.01, ha="left")
    if subtitle:
        figure.supxlabel(subtitle, x=0.01, ha="left", fontsize=8, color=GREY)
    return figure


def draw(make: "Callable[[], Figure]", directory: Path, name: str) -> list[Path]:
    """Write `make()`'s figure as PNG and SVG; their paths."""
    paths = []
    with styled():
        figure = make()
        engine = figure.get_layout_engine()
        if engine is not None:
            engine.execute(figure)  # once for both files: it takes longer than drawing, and `savefig` would draw for it
            figure.set_layout_engine(None)
        for kind, metadata in (("png", {"Software": None}), ("svg", {"Date": None})):
            path = directory / f"{name}.{kind}"
            with renamed(path) as temporary:
                figure.savefig(temporary, format=kind, dpi=_DOTS_PER_INCH, metadata=metadata)
            paths.append(path)
    return paths


def shades(count: int) -> list[Any]:
    """`count` colours from dark to light, for things that have an order; the lightest is dark enough for a line."""
    from matplotlib import colormaps

    return [colormaps["viridis"](0.88 * place / max(count - 1, 1)) for place in range(count)]


def spread(count: int, most: int) -> list[int]:
    """At most `most` of 0 .. count - 1, evenly, the first and the last among them."""
    if count <= most:
        return list(range(count))
    return sorted({round(place * (count - 1) / max(most - 1, 1)) for place in range(most)})


def label_ends(axes: "Axes", ends: Sequence[tuple[float, float, str, Any]]) -> None:
    """Names at the right end of lines, (x, y, name, colour), in place of a legend; close ones are moved apart."""
    low, high = axes.get_ylim()
    gap, last = (high - low) * 0.045, -float("inf")
    for x, y, name, colour in sorted(ends, key=lambda end: end[1]):
        last = max(y, last + gap)
        axes.text(x, last, f"  {name}", color=colour, va="center", fontsize=8.5, clip_on=False)


# Pictures of lines: Jaccard, sorted statistic, metrics against sparsity and lengths, the loss on one prompt (paper,
# figures 2, 4, 5 and 7).


Numbers = Mapping[str, Any]
# More layers than this get no name each.
_NAMED = 12


def jaccard(numbers: Numbers) -> "Figure":
    """A line per density over the layers, and what chance gives."""
    rows = numbers["rows"]
    densities = sorted({row["density"] for row in rows})
    note = f"mean over all pairs of {numbers['windows']} windows of {numbers['tokens']} tokens; dotted: by chance"
    figure = new_figure(6.6, 4.2, "Do different sequences use the same neurons?", note)
    axes = figure.subplots()
    ends = []
    for density, colour, marker in zip(densities, shades(len(densities)), MARKERS * 9, strict=False):
        own = [row for row in rows if row["density"] == density]
        layers = [row["layer"] for row in own]
        axes.plot(layers, [row["jaccard"] for row in own], color=colour, marker=marker)
        axes.axhline(own[0]["by_chance"], color=colour, linestyle=":", linewidth=1.1)
        ends.append((layers[-1], own[-1]["jaccard"], f"top {density:.0%}", colour))
    axes.set(xlabel="layer", ylabel="Jaccard similarity of top-k sets", ylim=(0, 1.02))
    _whole_ticks(axes, len({row["layer"] for row in rows}))
    label_ends(axes, ends)
    return figure


def statistic(numbers: Numbers) -> "Figure":
    """One line per layer."""
    layers = numbers["layers"]
    note = f"{numbers['tokens']} tokens; each layer's s divided by its largest"
    figure = new_figure(6.4, 4.2, "The statistic s of each layer, sorted", note)
    axes = figure.subplots()
    for layer, colour in zip(layers, shades(len(layers)), strict=True):
        points = len(layer["s"])
        ranks = [place / max(points - 1, 1) * 100 for place in range(points)]
        axes.plot(ranks, layer["s"], color=colour, label=f"layer {layer['layer']}")
    axes.set(xlabel="neurons, from the largest s (%)", ylabel="s / largest s of the layer", xlim=(0, 100), ylim=(0, 1))
    _layers_key(figure, axes, len(layers))
    return figure


def sparsity(numbers: Numbers) -> "Figure":
    """A panel per metric, a line per selection."""
    rows = numbers["rows"]
    metrics = list(dict.fromkeys(row["metric"] for row in rows))
    columns = min(len(metrics), 3)
    down = -(-len(metrics) // columns)
    figure = new_figure(
        max(3.4 * columns, 6.4), 3.4 * down + 0.8, "What is left of the full model", numbers.get("note", "")
    )
    panels = figure.subplots(down, columns, squeeze=False, sharey=True)
    selections = list(dict.fromkeys(row["selection"] for row in rows))
    for place, axes in enumerate(panels.flat):
        if place >= len(metrics):
            axes.set_visible(False)
            continue
        for number, selection in enumerate(selections):
            own = [row for row in rows if (row["metric"], row["selection"]) == (metrics[place], selection)]
            own.sort(key=lambda row: row["sparsity"])
            x, y = [100 * row["sparsity"] for row in own], [row["relative"] for row in own]
            style = {"color": CATEGORIES[number % 7], "marker": MARKERS[number % 7]}
            axes.plot([0, *x], [1, *y], label=selection, markevery=slice(1, None), **style)
        axes.axhline(1, color=GREY, linewidth=0.9, linestyle="--")
        axes.set(title=metrics[place], xlabel="feed-forward neurons left out (%)", xlim=(0, 100), ylim=(0, None))
        axes.set_ylabel("relative to full" if place % columns == 0 else "")
    panels[0][0].legend(title="selection")
    return figure


def lengths(numbers: Numbers) -> "Figure":
    """A panel per selection and density, a line per generation length."""
    rows = numbers["rows"]
    panels = list(dict.fromkeys((row["selection"], row["density"]) for row in rows))
    generates = sorted({row["generate_tokens"] for row in rows})
    prompts = sorted({row["prompt_tokens"] for row in rows})
    note = f"{numbers['windows']} windows; behind every prompt length the same tokens are scored"
    figure = new_figure(max(4.4 * len(panels), 6.4), 4.2, "Loss against the lengths of prompt and generation", note)
    for place, (axes, panel) in enumerate(zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True)):
        for generate, colour, marker in zip(generates, shades(len(generates)), MARKERS * 9, strict=False):
            own = [row for row in rows if (row["selection"], row["density"]) == panel]
            own = sorted((r for r in own if r["generate_tokens"] == generate), key=lambda r: int(r["prompt_tokens"]))
            increases = [100 * row["increase"] for row in own]
            axes.plot(
                [row["prompt_tokens"] for row in own], increases, color=colour, marker=marker, label=str(generate)
            )
        axes.set_xscale("log", base=2)
        axes.set_xticks(prompts, [str(prompt) for prompt in prompts])
        axes.set(title=f"{panel[0]}, density {panel[1]:g}", xlabel="prompt (tokens)")
        axes.set_ylabel("increase of perplexity (%)" if place == 0 else "")
        axes.set_ylim(bottom=min(0, axes.get_ylim()[0]))
    axes.legend(title="generated tokens", ncols=2)
    return figure


def prompt_loss(numbers: Numbers) -> "Figure":
    """A line per layer over the densities, their mean, and the planned density."""
    held_out = numbers["held_out"] is not None
    key = "held_out" if held_out else "kept"
    note = f"prompt of {numbers['prompt_tokens']} tokens" + (
        f": chosen on the first {numbers['prompt_tokens'] - numbers['held_out_tokens']}, measured on the rest"
        if held_out
        else ", too short to hold tokens out"
    )
    figure = new_figure(6.6, 4.4, "What this prompt keeps of its activation", note)
    axes = figure.subplots()
    layers, x = numbers["layers"], [100 * density for density in numbers["densities"]]
    for layer, colour in zip(layers, shades(len(layers)), strict=True):
        axes.plot([0, *x, 100], [0, *layer[key], 1], color=colour, linewidth=1, label=f"layer {layer['layer']}")
    axes.plot([0, *x, 100], [0, *numbers[key], 1], color="black", linewidth=2.4, label="mean")
    axes.set(xlabel=f"{numbers['unit']} kept (%)", xlim=(0, 100), ylim=(0, 1.01))
    axes.set_ylabel("activation kept" + (", held out" if held_out else ""))
    planned = numbers["plan"]
    if planned is not None:
        axes.axvline(100 * planned["density"], color=CATEGORIES[1], linestyle="--", linewidth=1.4)
        at = 100 * planned["density"]
        side = {"ha": "right", "x": at - 1.5} if at > 50 else {"ha": "left", "x": at + 1.5}
        text = f"planned: {planned['density']:.2f} {planned['in_words']}\nin {planned['budget']}"
        axes.text(y=0.04, s=text, color=CATEGORIES[1], fontsize=8.5, **side)
    _layers_key(figure, axes, len(layers))
    return figure


def experts(numbers: Numbers) -> "Figure":
    """Layers down, experts across: how often each is used by one prompt, and which ones stay."""
    layers = numbers["layers"]
    widest = max(len(layer["used"]) for layer in layers)
    note = f"prompt of {numbers['prompt_tokens']} tokens; layers of fewer experts end earlier"
    if numbers["plan"] is not None:
        note = f"prompt of {numbers['prompt_tokens']} tokens; dots: what stays in {numbers['plan']['budget']}"
    title = "Which experts this prompt uses"
    figure = new_figure(min(max(0.3 * widest, 5), 14), 1.4 + 0.3 * len(layers), title, note)
    axes = figure.subplots()
    rows = [[*layer["used"], *[0.0] * (widest - len(layer["used"]))] for layer in layers]
    image = axes.imshow(rows, cmap="cividis", aspect="auto", interpolation="nearest", vmin=0)
    stay = [(expert, row) for row, layer in enumerate(layers) for expert in layer["stay"] or ()]
    axes.plot([x for x, _ in stay], [y for _, y in stay], "o", color=CATEGORIES[1], markersize=3)
    axes.grid(visible=False)
    axes.set(xlabel="expert", ylabel="layer")
    shown = spread(len(layers), 24)
    axes.set_yticks(shown, [str(layers[row]["layer"]) for row in shown])
    figure.colorbar(image, ax=axes, pad=0.02).set_label("share of tokens")
    return figure


def _whole_ticks(axes: "Axes", count: int) -> None:
    axes.set_xticks(spread(count, _NAMED))


def _layers_key(figure: "Figure", axes: "Axes", count: int) -> None:
    """Names of the layers, or their colours where they are many."""
    if count <= _NAMED:
        axes.legend(loc="center left", bbox_to_anchor=(1, 0.5))
        return
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import LinearSegmentedColormap, Normalize

    colours = LinearSegmentedColormap.from_list("layers", shades(64))
    bar = figure.colorbar(ScalarMappable(Normalize(0, count - 1), colours), ax=axes, pad=0.02)
    bar.set_label("layer")
    bar.outline.set_visible(False)


# Pictures of abs(Zbar): tokens down, neurons across (paper, figures 1, 6 and 8 to 11).


Matrix = Any
"""An array [tokens, features]."""
_COLOURS = "magma"
# Brighter than all but this share of the pixels is white: single peaks would leave the rest black.
_CLIPPED = 0.03
_COLUMNS = 4
_ACROSS, _DOWN = 3.1, 3.3


def flocking(numbers: Numbers, heatmaps: Mapping[int, Matrix]) -> "Figure":
    """One heatmap per layer."""
    layers = sorted(heatmaps)
    columns = min(len(layers), _COLUMNS)
    rows = -(-len(layers) // columns)
    title = "Flocking: which neurons the tokens of a sequence use"
    figure = new_figure(max(_ACROSS * columns, 6) + 0.9, _DOWN * rows + 0.9, title, _size(numbers))
    axes = figure.subplots(rows, columns, squeeze=False)
    top = _white_point(list(heatmaps.values()))
    image = None
    for place, axis in enumerate(axes.flat):
        if place >= len(layers):
            axis.set_visible(False)
            continue
        layer = layers[place]
        image = _show(axis, heatmaps[layer], top)
        share = next(own["share_of_top_half"] for own in numbers["layers"] if own["layer"] == layer)
        axis.set_title(f"layer {layer}\ntop half: {share:.0%}", fontsize=9.5)
        axis.set_xlabel("feature")
        if place % columns == 0:
            axis.set_ylabel("token")
    _colour_bar(figure, image, axes)
    return figure


def inputs(numbers: Numbers, heatmaps: Mapping[str, Mapping[int, Matrix]]) -> "Figure":
    """A row per layer, a column per input."""
    kinds, layers = list(heatmaps), sorted(heatmaps["original"])
    title = "Flocking with text, the same tokens permuted, and random tokens"
    figure = new_figure(_ACROSS * len(kinds) + 0.9, _DOWN * len(layers) + 0.9, title, _size(numbers))
    axes = figure.subplots(len(layers), len(kinds), squeeze=False)
    top = _white_point([heatmap for by_layer in heatmaps.values() for heatmap in by_layer.values()])
    image = None
    for row, layer in enumerate(layers):
        for column, kind in enumerate(kinds):
            axis, own = axes[row][column], _row_of(numbers, kind, layer)
            image = _show(axis, heatmaps[kind][layer], top)
            jaccard = "" if own["jaccard"] is None else f", Jaccard {own['jaccard']:.2f}"
            axis.set_title(f"{kind}, layer {layer}\ntop half: {own['share_of_top_half']:.0%}{jaccard}", fontsize=9.5)
            axis.set_xlabel("feature" if row == len(layers) - 1 else "")
            axis.set_ylabel("token" if column == 0 else "")
    _colour_bar(figure, image, axes)
    return figure


def _row_of(numbers: Numbers, kind: str, layer: int) -> Numbers:
    found: Numbers = next(row for row in numbers["rows"] if (row["input"], row["layer"]) == (kind, layer))
    return found


def _size(numbers: Numbers) -> str:
    text = f"{numbers['tokens']} tokens, first features of each layer. Top half: share of $s^2$ of the largest 50 %"
    if "windows" in numbers:
        text += f", mean of {numbers['windows']} windows;\nJaccard: of the windows' top halves (0.33 by chance)"
    return text


def _white_point(matrices: Sequence[Matrix]) -> float:
    import numpy

    values = numpy.concatenate([numpy.asarray(matrix).ravel() for matrix in matrices])
    return float(numpy.quantile(values, 1 - _CLIPPED)) or 1.0


def _show(axis: "Axes", matrix: Matrix, top: float) -> "AxesImage":
    axis.grid(visible=False)
    for side in axis.spines.values():
        side.set_visible(False)
    return axis.imshow(matrix, cmap=_COLOURS, vmin=0, vmax=top, aspect="auto", interpolation="auto")


def _colour_bar(figure: Any, image: Any, axes: Any) -> None:
    bar = figure.colorbar(image, ax=axes, extend="max", shrink=0.7 / len(axes), aspect=20, pad=0.02)
    bar.set_label("|z| / ‖z‖ of the token")
    bar.outline.set_visible(False)
