"""Every tensor that the package makes says of which type it is and where it lies.

torch's defaults belong to the process, or to the thread: transformers changes the type while it builds a model, and
users set both. A kernel that writes float32 into memory of half the size destroys the heap.
"""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import griffin_offload

PACKAGE = Path(griffin_offload.__file__).parent
# fmt: off
MAKERS = frozenset((
    "arange", "as_tensor", "asarray", "bartlett_window", "blackman_window", "empty", "empty_permuted",
    "empty_strided", "eye", "full", "hamming_window", "hann_window", "kaiser_window", "linspace", "logspace",
    "normal", "ones", "rand", "randint", "randn", "randperm", "range", "scalar_tensor", "tensor",
    "tril_indices", "triu_indices", "zeros",
))
# fmt: on
"""What takes torch's default type or device where none is named; `new_*` and `*_like` take that of a tensor."""
OLD_MAKERS = frozenset(("Tensor", "FloatTensor", "DoubleTensor", "HalfTensor", "BFloat16Tensor", "IntTensor"))
"""Constructors that cannot be told."""


def _unnamed(source: str) -> Iterator[tuple[int, str]]:
    """(line, what is missing) of every call that leaves something to a default."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module == "torch":
            for alias in node.names:
                if alias.name in MAKERS:  # under a name of its own it would not be found below
                    yield node.lineno, f"from torch import {alias.name}"
        if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
            continue
        if not isinstance(node.func.value, ast.Name) or node.func.value.id != "torch":
            continue
        maker, named = node.func.attr, {keyword.arg for keyword in node.keywords}
        if maker in OLD_MAKERS:
            yield node.lineno, f"torch.{maker}"
        missing = [name for name in ("dtype", "device") if name not in named]
        if maker in MAKERS and missing:
            yield node.lineno, f"torch.{maker} without {' and '.join(missing)}"


def test_every_allocation_names_its_type_and_its_device():
    found = [
        f"{path.relative_to(PACKAGE)}:{line}: {what}"
        for path in sorted(PACKAGE.rglob("*.py"))
        for line, what in _unnamed(path.read_text(encoding="utf-8"))
    ]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    ("source", "what"),
    [
        ("torch.empty(3)", "torch.empty without dtype and device"),
        ("x = f(torch.zeros(3, device=d))", "torch.zeros without dtype"),
        ("torch.tensor([1], dtype=torch.long)", "torch.tensor without device"),
        ("torch.FloatTensor(3)", "torch.FloatTensor"),
        ("from torch import empty", "from torch import empty"),
    ],
)
def test_what_is_left_to_a_default_is_found(source: str, what: str):
    assert [found for _, found in _unnamed(source)] == [what]


def test_what_inherits_or_is_named_is_not():
    named = "torch.empty(3, dtype=torch.float32, device='cpu')"
    assert not list(_unnamed(f"{named}\nx.new_empty(3)\ntorch.empty_like(x)\ntorch.Generator()\nnumpy.empty(3)"))
