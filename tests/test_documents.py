"""What the pages link to, and every file that they name, is there."""

import re
import shlex
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from griffin_offload.cli.main import build_parser

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "griffin_offload"
PAGES = [ROOT / "README.md", *(ROOT / "docs").glob("*.md"), *(ROOT / "benchmarks").rglob("*.md")]
_OWN = [page for page in PAGES if "benchmarks" not in page.parts]
LINK = re.compile(r"\]\((?!https?:)([^)#\s]+)")
FILE = re.compile(r"\b(?:benchmarks|docs|examples|tests)/[\w./-]+\.\w+")


ROOMS = [path.name for path in PACKAGE.iterdir() if (path / "__init__.py").exists()]
MODULE = re.compile(rf"\b(?:{'|'.join(ROOMS)})/\w+\.py\b")


@pytest.mark.parametrize("page", sorted(PAGES), ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path):
    text = page.read_text(encoding="utf-8")
    missing = [link for link in LINK.findall(text) if not (page.parent / link).exists()]
    if page.name != "NOTES.md" and "results" not in page.parts:  # those tell of their time
        missing += [name for name in FILE.findall(text) if not (ROOT / name).exists()]
        text = FILE.sub("", text)
        missing += [name for name in MODULE.findall(text) if not (ROOT / "griffin_offload" / name).exists()]
    assert missing == []


ROOM = re.compile(r"  (\w+)/ .*\n((?: {8,}[\w ]+\n)*)")


def test_the_tree_names_every_file():
    """The tree of contributing.md: each room, and under it the modules that it has; commands name themselves."""
    tree = (ROOT / "docs" / "contributing.md").read_text(encoding="utf-8").split("## The tree")[1].split("```")[1]
    named = {room: set(names.split()) for room, names in ROOM.findall(tree)}
    there = {room: {path.stem for path in (PACKAGE / room).glob("*.py")} - {"__init__"} for room in ROOMS}
    assert named == there | {"cli": set()}


def _extras() -> dict[str, list[str]]:
    tomllib = pytest.importorskip("tomllib")  # of Python 3.11
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    return dict(project["optional-dependencies"])


def test_all_names_every_extra():
    (everything,) = map(Requirement, _extras()["all"])
    assert (everything.name, everything.extras) == ("griffin-offload", set(_extras()) - {"all", "test"})


EXTRA = re.compile(r"(?:griffin-offload|\.)\[([a-z,]+)\]")


@pytest.mark.parametrize("page", _OWN, ids=lambda path: path.name)
def test_what_a_page_installs_is_the_checkout(page: Path):
    """No index has this package; an installed one asks for its own extras, which pip finds without an index."""
    lines = re.findall(r"pip install [^`\n]*", page.read_text(encoding="utf-8"))
    assert not [line for line in lines if "griffin-offload[" in line]
    assert {name for line in lines for names in EXTRA.findall(line) for name in names.split(",")} <= set(_extras())


def test_extras_that_errors_name_are_there():
    named = {names for path in PACKAGE.rglob("*.py") for names in EXTRA.findall(path.read_text())}
    assert named
    assert {name for names in named for name in names.split(",")} <= set(_extras())


@pytest.mark.parametrize("page", _OWN, ids=lambda path: path.name)
def test_commands_that_a_page_shows_are_understood(page: Path):
    text = page.read_text(encoding="utf-8")
    shown = re.findall(r"^griffin-offload .*", text, re.MULTILINE) + re.findall(
        r"`(griffin-offload [^`]* -[^`]*)`", text
    )
    for line in shown:
        build_parser().parse_args(shlex.split(line, comments=True)[1:])


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
