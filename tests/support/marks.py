"""Parameters of which the first run always, and all with `--run-slow`."""

from collections.abc import Iterable
from typing import Any

import pytest


def mostly_slow(values: Iterable[Any], quick: int) -> list[Any]:
    """`values` as parameters, those behind the first `quick` marked as slow; tuples are several parameters."""
    found = [value if isinstance(value, tuple) else (value,) for value in values]
    return [pytest.param(*value, marks=() if at < quick else pytest.mark.slow) for at, value in enumerate(found)]
