"""The house of the package: rooms in one order, imports that only go down it, and no circle of files."""

import ast
import functools
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import walks
from fork_server import ForkServer

import griffin_offload

PACKAGE = Path(griffin_offload.__file__).parent
# From the ground up. A room imports from those before it and from itself.
ROOMS = (
    *("errors", "units", "config", "transformers_api", "method", "kernels", "formats", "devices", "blocks"),
    *("checkpoint", "offload", "kv_cache", "planner", "engine", "evaluation", "serving", "demo", "cli"),
    *("__init__", "__main__"),
)
MOST_LINES, LONGEST_FUNCTION, LONGEST_CHAIN = 400, 60, 20
# Files that a reader opens: for a command from its arguments to its text, for a layer of the streamed pass, for the
# forward of a token (two of its files are a guard of the stock model and the thread that samples memory).
MOST_FILES, RUN_FILES, LAYER_FILES, TOKEN_FILES = 189, 80, 25, 12  # a layer: 23 where torch multiplies by bfloat16


@functools.cache
def _tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


@functools.cache
def _files() -> dict[str, Path]:
    """Module, without the package's name, and its file."""
    found = {}
    for path in PACKAGE.rglob("*.py"):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        found[".".join(parts[:-1] if len(parts) > 1 and parts[-1] == "__init__" else parts)] = path
    return found


def _imported(path: Path) -> Iterator[str]:
    """Every module of the package that the file imports: lazily, and for types alone, too."""
    for node in ast.walk(_tree(path)):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "griffin_offload":
            module = node.module.removeprefix("griffin_offload").removeprefix(".")
            for alias in node.names:
                yield f"{module}.{alias.name}".removeprefix(".")
                yield module or "__init__"


@functools.cache
def _imports() -> dict[str, set[str]]:
    files = _files()
    return {name: {other for other in _imported(path) if other in files} - {name} for name, path in files.items()}


def _room(module: str) -> str:
    return module.split(".")[0]


def _longest_chain(imports: dict[str, set[str]]) -> list[str]:
    """Of imports from some file down; AssertionError for a circle."""
    found: dict[str, list[str]] = {}

    def below(module: str, above: tuple[str, ...]) -> list[str]:
        assert module not in above, f"a circle: {' -> '.join([*above, module])}"
        if module not in found:
            found[module] = [
                module,
                *max((below(other, (*above, module)) for other in imports[module]), key=len, default=[]),
            ]
        return found[module]

    return max((below(module, ()) for module in imports), key=len)


def test_every_room_has_a_floor():
    assert {_room(module) for module in _files()} <= set(ROOMS)


def test_imports_go_down():
    floor = {room: index for index, room in enumerate(ROOMS)}
    wrong = [
        f"{module} imports {other}"
        for module, others in _imports().items()
        for other in others
        if floor[_room(other)] > floor[_room(module)] and other != "__init__"
    ]
    assert not wrong


def test_no_circles_and_no_long_chains():
    """Lazy imports and those for types count."""
    assert len(_longest_chain(_imports())) <= LONGEST_CHAIN


def test_files_are_short():
    assert {
        name: lines for name, path in _files().items() if (lines := len(path.read_text().split("\n"))) > MOST_LINES
    } == {}


def _names_imported(path: Path) -> Iterator[tuple[str, str]]:
    """(room, name) of everything that a file imports from the package."""
    for node in ast.walk(_tree(path)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("griffin_offload."):
            for alias in node.names:
                yield _room((node.module or "").removeprefix("griffin_offload.")), alias.name


def test_one_kind_of_block_is_not_known_by_name():
    """Rooms other than its own ask the contract (blocks/base.py)."""
    others = [path for path in PACKAGE.rglob("*.py") if path.parent.name != "blocks"]
    assert not [path for path in others if ("blocks", "FeedForward") in _names_imported(path)]
    assert not [path for path in others if ".projections" in path.read_text() or "block.down" in path.read_text()]


def test_the_planner_has_no_numbers_of_the_workers():
    """Whoever allocates memory prices it. What users may set is in `config`."""
    numbers = [
        f"{path.stem}: {name}"
        for path in (PACKAGE / "planner").glob("*.py")
        for room, name in _names_imported(path)
        if name.isupper() and room not in ("config", "planner")
    ]
    assert not numbers


def test_the_workers_have_no_numbers_of_the_planner():
    for path in PACKAGE.rglob("*.py"):
        if path.parent.name != "planner":
            numbers = [name for room, name in _names_imported(path) if room == "planner" and name.isupper()]
            assert set(numbers) <= {"RESIDENT_PARTS"}, path  # names of parts


def test_the_planner_knows_no_device():
    text = "".join(path.read_text() for path in (PACKAGE / "planner").glob("*.py"))
    assert "cuda" not in text.replace("CUDA", "")
    assert "import torch" not in text


def test_functions_are_short():
    found = {
        f"{name}.{node.name}": node.end_lineno - node.lineno + 1
        for name, path in _files().items()
        for node in ast.walk(_tree(path))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.end_lineno is not None
    }
    assert {name: lines for name, lines in found.items() if lines > LONGEST_FUNCTION} == {}


def test_files_are_few():
    assert len(_files()) <= MOST_FILES


@pytest.mark.slow
def test_walks_are_short(forks: ForkServer):
    command = ("run", "-n", "3", "-q", "--quantize", "none", "--density", "0.62")
    events = json.loads(forks.run("-m", "walks", *command).out.splitlines()[-1])
    assert len(walks.files(events)) <= RUN_FILES
    assert len(walks.files(events, "+DecoderLayer", "+DecoderLayer", nth=1)) <= LAYER_FILES
    assert len(walks.files(events, "+ForCausalLM", "-ForCausalLM", nth=2)) <= TOKEN_FILES
