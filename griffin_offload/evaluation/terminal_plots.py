"""The loss on one prompt, drawn in a terminal; plain text where the output is none."""

import math
from collections.abc import Mapping, Sequence
from typing import IO, Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from griffin_offload.evaluation.plots import spread
from griffin_offload.planner.tiers import expected_kl

Numbers = Mapping[str, Any]
# More layers than this are shown by some of them: the table is to be seen at once.
_MOST_LAYERS = 16
_MOST_EXPERTS = 48
_BAR = 34
_PLANNED = "bold #D55E00"
# From little kept to all of it: Okabe-Ito's vermilion, orange, sky blue, bluish green.
_LEVELS = ((0.8, "#D55E00"), (0.9, "#E69F00"), (0.97, "#56B4E9"), (2.0, "#009E73"))


def show_prompt_loss(numbers: Numbers, file: IO[str]) -> None:
    """Print what `prompt_loss` found and the plan, at most 80 columns wide."""
    console = Console(file=file, highlight=False, soft_wrap=False)
    console.width = min(console.width, 80)
    held_out = numbers["held_out"] is not None
    console.print(Text.assemble(("What this prompt would lose", "bold"), f"   {numbers['model']}"))
    unit, chosen = numbers["unit"], numbers["prompt_tokens"] - numbers["held_out_tokens"]
    console.print(
        f"{numbers['prompt_tokens']} tokens: {unit} chosen on the first {chosen}, activation measured on the rest"
        if held_out
        else f"{numbers['prompt_tokens']} tokens: too few to hold some out, so the figures flatter"
    )
    console.print(f"measured on all {unit} in {numbers['measured_in']}, whatever a plan keeps them in")
    console.print()
    console.print(_densities(numbers, "held_out" if held_out else "kept", ascii_only=_ascii(console)))
    console.print()
    console.print(_layers(numbers, "held_out" if held_out else "kept"))
    if numbers["unit"] == "experts":
        console.print()
        console.print(_experts(numbers, ascii_only=_ascii(console)))
    if len(numbers["layers"]) > _MOST_LAYERS:
        console.print(f"{_MOST_LAYERS} of {len(numbers['layers'])} layers: --json has all", style="dim")
    console.print()
    for line in _conclusions(numbers, "held_out" if held_out else "kept"):
        console.print(line)


def _ascii(console: Console) -> bool:
    return not console.encoding.lower().startswith("utf")


def _rows(numbers: Numbers, key: str) -> list[tuple[float, float, float, bool]]:
    """(density, activation kept, of the whole prompt, planned), by density, the planned one among them."""
    rows = {density: (density, numbers[key][i], numbers["kept"][i], False) for i, density in _enumerated(numbers)}
    if numbers["plan"] is not None:
        density = numbers["plan"]["density"]
        rows[density] = (density, numbers[f"planned_{key}"], numbers["planned_kept"], True)
    return [rows[density] for density in sorted(rows)]


def _enumerated(numbers: Numbers) -> list[tuple[int, float]]:
    return list(enumerate(numbers["densities"]))


def _densities(numbers: Numbers, key: str, *, ascii_only: bool) -> Table:
    """A bar for each density: mean over layers."""
    table = Table(box=None, pad_edge=False, padding=(0, 1), header_style="dim")
    table.add_column("density", justify="right")
    table.add_column("activation kept, mean of layers", min_width=_BAR)
    table.add_column("held out" if key == "held_out" else "", justify="right")
    table.add_column("in sample" if key == "held_out" else "", justify="right", style="dim")
    table.add_column("")
    for density, share, whole, planned in _rows(numbers, key):
        table.add_row(
            Text(f"{density:.2f}", style=_PLANNED if planned else ""),
            Text(_bar(share, ascii_only), style=_colour(share)),
            f"{share:.3f}",
            f"{whole:.3f}" if key == "held_out" else "",
            Text(_plan_text(numbers), style=_PLANNED) if planned else "",
        )
    return table


def _plan_text(numbers: Numbers) -> str:
    return f"< fits {numbers['plan']['budget']}"


def _bar(share: float, ascii_only: bool) -> str:
    """`share` of the bar's width, to an eighth of a column where the terminal has such letters."""
    if ascii_only:
        return "#" * round(share * _BAR)
    whole, eighths = divmod(round(share * _BAR * 8), 8)
    return "█" * whole + " ▏▎▍▌▋▊▉"[eighths].strip()


def _layers(numbers: Numbers, key: str) -> Table:
    """Layers down, densities across, in hundredths."""
    shown = spread(len(numbers["layers"]), _MOST_LAYERS)
    columns = [i for i, density in _enumerated(numbers) if round(density * 20) % 2 == 0 or density in (0.25, 0.75)]
    table = Table(box=None, pad_edge=False, padding=(0, 1), header_style="dim")
    table.add_column("layer", justify="right")
    for i in columns:
        table.add_column(f"{numbers['densities'][i]:.2f}".removeprefix("0"), justify="right")
    if numbers["plan"] is not None:
        table.add_column("planned", justify="right", header_style=_PLANNED)
    for place in shown:
        layer = numbers["layers"][place]
        cells = [_cell(layer[key][i]) for i in columns]
        if numbers["plan"] is not None:
            cells.append(_cell(layer[f"planned_{key}"]))
        table.add_row(str(layer["layer"]), *cells)
    return table


def _experts(numbers: Numbers, *, ascii_only: bool) -> Table:
    """A sign for each expert of a layer, the higher the more tokens are sent to it; those that stay stand out. Where
    they are many, those that are used most, from left to right."""
    table = Table(box=None, pad_edge=False, padding=(0, 1), header_style="dim")
    table.add_column("layer", justify="right")
    table.add_column("share of tokens, by expert" + ("" if numbers["plan"] is None else "; kept ones coloured"))
    table.add_column("used", justify="right")
    if numbers["plan"] is not None:
        table.add_column("kept", justify="right", header_style=_PLANNED)
    for place in spread(len(numbers["layers"]), _MOST_LAYERS):
        layer = numbers["layers"][place]
        used, stay = layer["used"], set(layer["stay"] or ())
        order = range(len(used)) if len(used) <= _MOST_EXPERTS else sorted(range(len(used)), key=lambda e: -used[e])
        signs = Text()
        for expert in order[:_MOST_EXPERTS]:
            signs.append(_level(used[expert] / max(*used, 1e-9), ascii_only), _PLANNED if expert in stay else "dim")
        found = f"{sum(share > 0 for share in used)} of {len(used)}"
        kept = [] if layer["stay"] is None else [str(len(stay))]
        table.add_row(str(layer["layer"]), signs, found, *kept)
    return table


def _level(share: float, ascii_only: bool) -> str:
    """0 to 1 as one of nine signs; nothing at all has its own."""
    signs = " .:-=+*#@" if ascii_only else "·▁▂▃▄▅▆▇█"
    return signs[math.ceil(share * 8)]


def _cell(share: float) -> Text:
    return Text("1.0" if share >= 0.995 else f"{share:.2f}".removeprefix("0"), style=_colour(share))


def _colour(share: float) -> str:
    return next(colour for limit, colour in _LEVELS if share < limit)


def _level_lines(levels: Sequence[str], counts: Sequence[Sequence[int]]) -> list[str]:
    """Neurons of a layer by format, a line for every group of layers that are alike; none where all are of one."""
    alike: dict[tuple[int, ...], list[int]] = {}
    for layer, own in enumerate(counts):
        if any(own):
            alike.setdefault(tuple(own), []).append(layer)
    if len({level for own in alike for level, count in enumerate(own) if count}) < 2:
        return []
    return [
        f"{_ranges(layers)}: {', '.join(f'{count} {name}' for name, count in zip(levels, own, strict=True) if count)}"
        for own, layers in alike.items()
    ]


def _ranges(layers: Sequence[int]) -> str:
    """layers 0 to 3, 7"""
    ends = [layer for layer in layers if layer + 1 not in layers]
    starts = [layer for layer in layers if layer - 1 not in layers]
    parts = [str(a) if a == b else f"{a} to {b}" for a, b in zip(starts, ends, strict=True)]
    return f"layer{'s' if len(layers) > 1 else ''} {', '.join(parts)}"


def _conclusions(numbers: Numbers, key: str) -> list[Text]:
    """What to make of it, in a few lines."""
    lines, plan = [], numbers["plan"]
    if plan is not None:
        worst = min(numbers["layers"], key=lambda layer: float(layer[f"planned_{key}"]))
        budget = f"{plan['budget']}: density {plan['density']:.2f}, {plan['in_words']}, keeps "
        least = f", least in layer {worst['layer']}: {worst[f'planned_{key}']:.3f}"
        lines.append(Text.assemble(budget, (f"{numbers[f'planned_{key}']:.3f}", _PLANNED), least))
        lines += map(Text, _level_lines(plan["levels"], plan["counts"]))
        error, expected = numbers["planned_error"], plan["expected_error"]
        if error is not None:
            here, typical = (expected_kl(one, quantised=plan["quantised"]) for one in (error, expected))
            kl = f"KL about {here:g}, expected {typical:g}"
            lines.append(Text(f"error of its feed-forwards here {error:.2g}, squared: {kl}"))
    needs = []
    for goal in (0.95, 0.99):
        enough = [density for density, share, _, _ in _rows(numbers, key) if share >= goal]
        needs.append(f"{goal:.2f} takes density " + (f"{min(enough):.2f}" if enough else "1"))
    lines.append(Text("; ".join(needs)))
    gained = numbers["bits_gained"]
    if gained is not None:
        lines.append(Text(f"tiers save {gained:.2f} bits a weight at the same error, where no neuron is left out"))
    return lines
