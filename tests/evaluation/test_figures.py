"""Pictures: they exist, are what their names say, and are the same every time."""

import io
import struct
from pathlib import Path
from xml.etree import ElementTree

import pytest
from marks import mostly_slow
from rich.cells import cell_len

from griffin_offload.errors import GriffinError, UsageError
from griffin_offload.evaluation import plots
from griffin_offload.evaluation.plots import check_matplotlib, draw, make_directory, spread
from griffin_offload.evaluation.terminal_plots import show_prompt_loss

SVG = "{http://www.w3.org/2000/svg}"


def _loss(layers: int = 3, planned: float | None = 0.4, held_out: bool = True) -> dict[str, object]:
    densities = [0.1, 0.25, 0.5, 0.75, 0.9]
    shares = [0.3, 0.6, 0.85, 0.96, 0.995]
    lower = [share - 0.05 for share in shares] if held_out else None
    own = {"kept": shares, "held_out": lower, "planned_kept": 0.8, "planned_held_out": 0.75 if held_out else None}
    words = {
        "in_words": "tiers (int4 40%, int3 60%)",
        "levels": ["int4", "int3"],
        "quantised": True,
        "expected_error": 0.03,
    }
    counts = [[24, 40], [24, 40], [0, 64]][:layers] + [[24, 40]] * (layers - 3)
    plan = {"density": planned, "budget": "12 GB", "counts": counts, **words} if planned is not None else None
    rows = [{"layer": layer, "neurons": 64, **own} for layer in range(layers)]
    sizes = {
        "unit": "neurons",
        "measured_in": "bfloat16",
        "prompt_tokens": 40,
        "held_out_tokens": 10 if held_out else 0,
        "densities": densities,
    }
    return {"model": "demo", **sizes, **own, "planned_error": 0.02, "bits_gained": 0.39, "layers": rows, "plan": plan}


def _row(selection: str, density: float, prompt: int, generate: int) -> dict[str, object]:
    return {
        "selection": selection,
        "density": density,
        "prompt_tokens": prompt,
        "generate_tokens": generate,
        "increase": 1 / prompt,
    }


def _points(*metrics: str) -> dict[str, object]:
    rows = [
        {"metric": metric, "selection": selection, "density": 1 - sparsity, "sparsity": sparsity, "relative": 0.9}
        for metric in metrics
        for selection in ("topk", "random")
        for sparsity in (0.5, 0.25)
    ]
    return {"note": "a file", "rows": rows}


def _jaccard(layers: int) -> dict[str, object]:
    rows = [
        {"layer": layer, "density": density, "jaccard": density, "by_chance": density / 2}
        for layer in range(layers)
        for density in (0.1, 0.11, 0.5)
    ]
    return {"windows": 4, "tokens": 32, "rows": rows}


def _statistic(layers: int) -> dict[str, object]:
    return {"tokens": 32, "layers": [{"layer": layer, "s": [1.0, 0.5, 0.2, 0.0]} for layer in range(layers)]}


MATRIX = [[0.0, 0.2, 0.9], [0.1, 0.0, 0.4]]
FLOCKING = {"tokens": 2, "features": 3, "layers": [{"layer": i, "share_of_top_half": 0.9} for i in range(9)]}
INPUTS = {
    "tokens": 2,
    "windows": 1,
    "rows": [
        {"input": kind, "layer": layer, "share_of_top_half": 0.8, "jaccard": None if kind == "random" else 0.5}
        for kind in ("original", "permuted", "random")
        for layer in range(9)
    ],
}
PICTURES = {
    "jaccard": lambda: plots.jaccard(_jaccard(40)),
    "statistic": lambda: plots.statistic(_statistic(3)),
    "statistic of many layers": lambda: plots.statistic(_statistic(40)),
    "sparsity": lambda: plots.sparsity(_points("1 / perplexity")),
    "sparsity of many tasks": lambda: plots.sparsity(_points("piqa acc", "copa acc", "boolq acc", "coqa f1")),
    "lengths": lambda: plots.lengths(
        {"windows": 4, "rows": [_row(s, 0.5, p, g) for s in ("topk", "random") for p in (8, 16, 64) for g in (4, 8)]}
    ),
    "prompt": lambda: plots.prompt_loss(_loss()),
    "short prompt": lambda: plots.prompt_loss(_loss(40, None, held_out=False)),
    "flocking": lambda: plots.flocking(FLOCKING, {0: MATRIX}),
    "flocking of many layers": lambda: plots.flocking(FLOCKING, dict.fromkeys(range(0, 9, 2), MATRIX)),
    "dead neurons": lambda: plots.flocking(FLOCKING, {0: [[0.0, 0.0]]}),
    "inputs": lambda: plots.inputs(INPUTS, {kind: {8: MATRIX} for kind in ("original", "permuted", "random")}),
}


@pytest.mark.parametrize("name", mostly_slow(PICTURES, 2))
def test_pictures(tmp_path: Path, name: str):
    png, svg = draw(PICTURES[name], tmp_path, "picture")
    header = png.read_bytes()[:24]
    assert header[:8] == b"\x89PNG\r\n\x1a\n"
    width, height = struct.unpack(">II", header[16:24])
    assert 800 <= width <= 3000
    assert 500 <= height <= 3000
    root = ElementTree.fromstring(svg.read_text())
    assert root.tag == f"{SVG}svg"
    assert len(list(root.iter(f"{SVG}path"))) > 10
    assert sorted(path.name for path in tmp_path.iterdir()) == ["picture.png", "picture.svg"]


def test_the_same_numbers_give_the_same_files(tmp_path: Path):
    first, second = (
        [path.read_bytes() for path in draw(PICTURES["flocking"], tmp_path, f"picture{number}")] for number in range(2)
    )
    assert first == second
    assert b"<dc:date>" not in first[1]


def test_a_line_is_drawn_from_its_numbers():
    axes = plots.jaccard(_jaccard(3)).axes[0]
    drawn = [list(line.get_ydata()) for line in axes.lines if len(line.get_xdata()) == 3]
    assert drawn == [[0.1] * 3, [0.11] * 3, [0.5] * 3]
    axes = plots.sparsity(_points("m")).axes[0]
    assert [list(line.get_xdata()) for line in axes.lines[:2]] == [[0, 25, 50]] * 2


def test_spread():
    assert spread(6, 4) == [0, 2, 3, 5]
    assert spread(3, 4) == [0, 1, 2]
    assert spread(80, 3) == [0, 40, 79]
    assert spread(80, 1) == [0]


def test_a_directory_that_cannot_be_written(tmp_path: Path):
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match=r"cannot write to .*file"):
        make_directory(tmp_path / "file")
    with pytest.raises(UsageError, match="cannot write to"):
        make_directory(tmp_path / "file" / "below")
    make_directory(tmp_path / "a" / "b")
    assert list((tmp_path / "a" / "b").iterdir()) == []


def test_without_matplotlib(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    with pytest.raises(GriffinError, match=r'pip install "griffin-offload\[plot\]"'):
        check_matplotlib()


def _shown(numbers: dict[str, object], encoding: str = "utf-8") -> list[str]:
    raw = io.BytesIO()
    file = io.TextIOWrapper(raw, encoding=encoding)
    show_prompt_loss(numbers, file)
    file.flush()
    return raw.getvalue().decode(encoding).splitlines()


@pytest.mark.parametrize("layers", [3, 80])
@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
def test_the_terminal(layers: int, encoding: str):
    shown = _shown(_loss(layers), encoding)
    assert all(cell_len(line) <= 80 for line in shown)
    assert not any("\x1b" in line for line in shown)
    rows = {line.split()[0]: line for line in shown if line.strip()}
    assert rows["0.50"].split()[2:] == ["0.800", "0.850"]
    assert rows["0.40"].endswith("< fits 12 GB")
    mark = "#" if encoding == "ascii" else "█"
    bars = [line.count(mark) for line in shown if mark in line]
    assert bars == sorted(bars)
    assert len(bars) == 6
    assert len([line for line in shown if line.split()[:1] and line.split()[0].isdecimal()]) >= min(layers, 16)
    assert any("16 of 80 layers" in line for line in shown) == (layers == 80)
    together = " ".join(line.strip() for line in shown)
    assert "tiers (int4 40%, int3 60%)" in together
    assert "least in layer 0: 0.750" in together
    layout = [f"layers 0 to 1{', 3 to 79' * (layers > 3)}: 24 int4, 40 int3", "layer 2: 64 int3"]
    assert [line for line in shown if line.startswith("layer") and "int3" in line] == layout
    assert "error of its feed-forwards here 0.02, squared: KL about 0.2, expected 0.2" in shown
    assert shown[-2] == "0.95 takes density 1; 0.99 takes density 1"
    assert shown[-1] == "tiers save 0.39 bits a weight at the same error, where no neuron is left out"


def test_the_terminal_without_a_plan_and_with_a_short_prompt():
    shown = _shown(_loss(planned=None, held_out=False))
    assert "too few" in shown[1]
    assert not any("fits" in line or "planned" in line for line in shown)
    assert shown[-2] == "0.95 takes density 0.75; 0.99 takes density 0.90"
