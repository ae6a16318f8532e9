"""Pictures of abs(Zbar): tokens down, neurons across (paper, figures 1, 6 and 8 to 11)."""

from collections.abc import Mapping, Sequence
from typing import Any

from griffin_offload.figures.style import new_figure

Matrix = Any
"""An array [tokens, features]."""
_COLOURS = "magma"
# Brighter than all but this share of the pixels is white: single peaks would leave the rest black.
_CLIPPED = 0.03
_COLUMNS = 4
_ACROSS, _DOWN = 3.1, 3.3


def flocking(numbers: Mapping[str, Any], heatmaps: Mapping[int, Matrix]) -> Any:
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
        share = numbers["layers"][layer]["share_of_top_half"]
        axis.set_title(f"layer {layer}\ntop half: {share:.0%}", fontsize=9.5)
        axis.set_xlabel("feature")
        if place % columns == 0:
            axis.set_ylabel("token")
    _colour_bar(figure, image, axes)
    return figure


def inputs(numbers: Mapping[str, Any], heatmaps: Mapping[str, Mapping[int, Matrix]]) -> Any:
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


def _row_of(numbers: Mapping[str, Any], kind: str, layer: int) -> Mapping[str, Any]:
    found: Mapping[str, Any] = next(row for row in numbers["rows"] if (row["input"], row["layer"]) == (kind, layer))
    return found


def _size(numbers: Mapping[str, Any]) -> str:
    text = f"{numbers['tokens']} tokens, first features of each layer. Top half: share of $s^2$ of the largest 50 %"
    if "windows" in numbers:
        text += f", mean of {numbers['windows']} windows;\nJaccard: of the windows' top halves (0.33 by chance)"
    return text


def _white_point(matrices: Sequence[Matrix]) -> float:
    import numpy

    values = numpy.concatenate([numpy.asarray(matrix).ravel() for matrix in matrices])
    return float(numpy.quantile(values, 1 - _CLIPPED)) or 1.0


def _show(axis: Any, matrix: Matrix, top: float) -> Any:
    axis.grid(visible=False)
    for side in axis.spines.values():
        side.set_visible(False)
    return axis.imshow(matrix, cmap=_COLOURS, vmin=0, vmax=top, aspect="auto", interpolation="auto")


def _colour_bar(figure: Any, image: Any, axes: Any) -> None:
    bar = figure.colorbar(image, ax=axes, extend="max", shrink=0.7 / len(axes), aspect=20, pad=0.02)
    bar.set_label("|z| / ‖z‖ of the token")
    bar.outline.set_visible(False)
