"""Pictures of lines: Jaccard, sorted statistic, metrics against sparsity and lengths, the loss on one prompt (paper,
figures 2, 4, 5 and 7)."""

from collections.abc import Mapping
from typing import Any

from griffin_offload.figures.style import CATEGORIES, GREY, MARKERS, label_ends, new_figure, shades, spread

Numbers = Mapping[str, Any]
# More layers than this get no name each.
_NAMED = 12


def jaccard(numbers: Numbers) -> Any:
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


def statistic(numbers: Numbers) -> Any:
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


def sparsity(numbers: Numbers) -> Any:
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


def lengths(numbers: Numbers) -> Any:
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


def prompt_loss(numbers: Numbers) -> Any:
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
    axes.set(xlabel="neurons kept (%)", xlim=(0, 100), ylim=(0, 1.01))
    axes.set_ylabel("activation kept" + (", held out" if held_out else ""))
    planned = numbers["plan"]
    if planned is not None:
        axes.axvline(100 * planned["density"], color=CATEGORIES[1], linestyle="--", linewidth=1.4)
        at = 100 * planned["density"]
        side = {"ha": "right", "x": at - 1.5} if at > 50 else {"ha": "left", "x": at + 1.5}
        text = f"planned: {planned['density']:.2f} {planned['precision']}\nin {planned['budget']}"
        axes.text(y=0.04, s=text, color=CATEGORIES[1], fontsize=8.5, **side)
    _layers_key(figure, axes, len(layers))
    return figure


def _whole_ticks(axes: Any, count: int) -> None:
    axes.set_xticks(spread(count, _NAMED))


def _layers_key(figure: Any, axes: Any, count: int) -> None:
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
