"""The house of the package: a file imports only from floors below its own, and from its own room."""

import ast
from pathlib import Path

import griffin_offload

PACKAGE = Path(griffin_offload.__file__).parent
FLOORS = {
    "errors": -1,  # of the ground floor, the stone everybody stands on
    "units": 0,
    "config": 0,
    "kernels": 0,
    "weights": 1,
    "method": 2,
    "pricing": 3,
    "plan": 4,
    "runtime": 5,
    "evaluation": 6,
    "serving": 6,
    "figures": 6,
    "demo": 6,
    "cli": 7,
    "__init__": 7,
    "__main__": 8,
}


def _room(path: Path) -> str:
    relative = path.relative_to(PACKAGE)
    return relative.parts[0] if len(relative.parts) > 1 else relative.stem


def _imported_rooms(path: Path) -> set[str]:
    rooms = set()
    for node in ast.walk(ast.parse(path.read_text())):
        names = []
        if isinstance(node, ast.ImportFrom) and node.module:
            names = (
                [node.module] if node.module != "griffin_offload" else [f"griffin_offload.{a.name}" for a in node.names]
            )
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        rooms |= {name.split(".")[1] for name in names if name.startswith("griffin_offload.")}
    return rooms - {"__version__"}


def test_every_room_has_a_floor():
    assert {_room(path) for path in PACKAGE.rglob("*.py")} <= set(FLOORS)


def test_imports_go_down():
    wrong = [
        f"{path.relative_to(PACKAGE)} imports {room}"
        for path in PACKAGE.rglob("*.py")
        for room in _imported_rooms(path)
        if room != _room(path) and FLOORS[room] >= FLOORS[_room(path)]
    ]
    assert not wrong


def test_the_planner_knows_no_device():
    text = (PACKAGE / "plan.py").read_text()
    assert "cuda" not in text.replace("CUDA", "")
    assert "torch" not in {
        alias.name for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Import) for alias in node.names
    }
