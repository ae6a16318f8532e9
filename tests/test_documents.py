"""What the pages link to, and every file that they name, is there."""

import re
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "griffin_offload"
PAGES = [ROOT / "README.md", *(ROOT / "docs").glob("*.md"), *(ROOT / "benchmarks").rglob("*.md")]
LINK = re.compile(r"\]\((?!https?:)([^)#\s]+)")
FILE = re.compile(r"\b(?:benchmarks|docs|examples|tests)/[\w./-]+\.\w+")


ROOMS = [path.name for path in PACKAGE.iterdir() if (path / "__init__.py").exists()]
MODULE = re.compile(rf"\b(?:{'|'.join(ROOMS)})/\w+\.py\b")
IMAGINED = {"devices/xpu.py"}
"""How another device would be added."""


@pytest.mark.parametrize("page", sorted(PAGES), ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path):
    text = page.read_text(encoding="utf-8")
    missing = [link for link in LINK.findall(text) if not (page.parent / link).exists()]
    if page.name != "NOTES.md" and "results" not in page.parts:  # those tell of their time
        missing += [name for name in FILE.findall(text) if not (ROOT / name).exists()]
        text = FILE.sub("", text)
        missing += [
            n for n in MODULE.findall(text) if n not in IMAGINED and not (ROOT / "griffin_offload" / n).exists()
        ]
    assert missing == []


ROOM = re.compile(r"  (\w+)/ .*\n((?: {8,}[\w ]+\n)*)")


def test_the_tree_names_every_file():
    """The tree of contributing.md: each room, and under it the modules that it has; commands name themselves."""
    tree = (ROOT / "docs" / "contributing.md").read_text(encoding="utf-8").split("## The tree")[1].split("```")[1]
    named = {room: set(names.split()) for room, names in ROOM.findall(tree)}
    there = {room: {path.stem for path in (PACKAGE / room).glob("*.py")} - {"__init__"} for room in ROOMS}
    assert named == there | {"cli": set()}


def test_all_names_every_extra():
    tomllib = pytest.importorskip("tomllib")  # of Python 3.11
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    (everything,) = map(Requirement, extras["all"])
    assert (everything.name, everything.extras) == ("griffin-offload", set(extras) - {"all", "test"})


def test_images_are_made_of_what_is_there():
    """Files that the Dockerfiles copy are there, and reach the builder; the compose file names one of them."""
    reached = [line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")]
    for file in (ROOT / "examples").glob("Dockerfile*"):
        copied = [
            name for line in re.findall(r"^COPY (.*) \S+$", file.read_text(), re.MULTILINE) for name in line.split()
        ]
        assert set(copied) == set(reached)
        assert all((ROOT / name).exists() for name in copied)
    (named,) = re.findall(r"dockerfile: (\S+)", (ROOT / "examples" / "compose.yaml").read_text())
    assert (ROOT / named).is_file()
