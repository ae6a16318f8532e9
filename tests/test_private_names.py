"""Tests use what the package offers: a name with an underscore is its file's own, and may go at any time."""

import ast
from collections.abc import Iterator
from pathlib import Path

import griffin_offload

TESTS = Path(__file__).parent
PACKAGE = Path(griffin_offload.__file__).parent
OTHERS = ("self", "cls", "super()", "os")  # whose own names they are
NAMED_TUPLES = {"_replace", "_asdict", "_fields"}


def _is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


def _defined(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and ast.unparse(node.value) == "self":
            yield node.attr


def _reached_for(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Names of others: attributes, imports, and what monkeypatch replaces."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and ast.unparse(node.value) not in OTHERS:
            yield node.lineno, node.attr
        elif isinstance(node, ast.ImportFrom):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.Call) and getattr(node.func, "attr", "") in ("setattr", "object") and node.args:
            named = [a.value for a in node.args[1:2] if isinstance(a, ast.Constant) and isinstance(a.value, str)]
            yield from ((node.lineno, name) for name in named)


def test_tests_reach_for_no_private_name():
    private = {
        name for path in PACKAGE.rglob("*.py") for name in _defined(ast.parse(path.read_text())) if _is_private(name)
    }
    found = [
        f"{path.relative_to(TESTS)}:{line}: {name}"
        for path in TESTS.rglob("*.py")
        for line, name in _reached_for(ast.parse(path.read_text()))
        if name in private - NAMED_TUPLES
    ]
    assert found == []
