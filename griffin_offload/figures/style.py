"""What all pictures share: one style, colours that everybody can tell apart, files that are the same every time."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from griffin_offload.errors import GriffinError, UsageError
from griffin_offload.weights.files import renamed

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
        raise UsageError(f"cannot write to {directory}: {error.strerror}") from error


@contextlib.contextmanager
def styled() -> Iterator[None]:
    """Inside, matplotlib draws in this package's style."""
    import matplotlib

    with matplotlib.rc_context(_STYLE):
        yield


def new_figure(width: float, height: float, title: str, subtitle: str = "") -> Any:
    """An empty figure, sizes in inches, that no window manager knows of."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    figure.suptitle(title, x=0.01, ha="left")
    if subtitle:
        figure.supxlabel(subtitle, x=0.01, ha="left", fontsize=8, color=GREY)
    return figure


def draw(make: Callable[[], Any], directory: Path, name: str) -> list[Path]:
    """Write `make()`'s figure as PNG and SVG; their paths."""
    paths = []
    with styled():
        figure = make()
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


def label_ends(axes: Any, ends: Sequence[tuple[float, float, str, Any]]) -> None:
    """Names at the right end of lines, (x, y, name, colour), in place of a legend; close ones are moved apart."""
    low, high = axes.get_ylim()
    gap, last = (high - low) * 0.045, -float("inf")
    for x, y, name, colour in sorted(ends, key=lambda end: end[1]):
        last = max(y, last + gap)
        axes.text(x, last, f"  {name}", color=colour, va="center", fontsize=8.5, clip_on=False)
