"""What the pages link to, and every file that they name, is there."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *(ROOT / "docs").glob("*.md"), *(ROOT / "benchmarks").rglob("*.md")]
LINK = re.compile(r"\]\((?!https?:)([^)#\s]+)")
FILE = re.compile(r"\b(?:benchmarks|docs|examples|tests)/[\w./-]+\.\w+")


@pytest.mark.parametrize("page", sorted(PAGES), ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path):
    text = page.read_text(encoding="utf-8")
    missing = [link for link in LINK.findall(text) if not (page.parent / link).exists()]
    if page.name != "NOTES.md" and "results" not in page.parts:  # those tell of their time
        missing += [name for name in FILE.findall(text) if not (ROOT / name).exists()]
    assert missing == []


ROOM = re.compile(r"  (\w+)/ .*\n((?: {8,}[\w ]+\n)*)")


def test_the_tree_names_every_file():
    """The tree of contributing.md: each room, and under it the modules that it has; commands name themselves."""
    tree = (ROOT / "docs" / "contributing.md").read_text(encoding="utf-8").split("## The tree")[1].split("```")[1]
    named = {room: set(names.split()) for room, names in ROOM.findall(tree)}
    rooms = [path for path in (ROOT / "griffin_offload").iterdir() if (path / "__init__.py").exists()]
    there = {room.name: {path.stem for path in room.glob("*.py")} - {"__init__"} for room in rooms}
    assert named == there | {"cli": set()}
