"""Parameters of which some run always, and all with `--run-slow`."""

import itertools
from collections.abc import Collection, Iterable, Mapping
from typing import Any

import pytest
from tiny_models import QUICK


def mostly_slow(values: Iterable[Any], quick: int) -> list[Any]:
    """`values` as parameters, those behind the first `quick` marked as slow; tuples are several parameters."""
    found = [value if isinstance(value, tuple) else (value,) for value in values]
    return [pytest.param(*value, marks=() if at < quick else pytest.mark.slow) for at, value in enumerate(found)]


def by_turns(
    names: Iterable[str], *choices: Collection[Any], each: int = 1, whole: Collection[str] = ("llama3", "gpt2")
) -> list[Any]:
    """(name, choice, ...): `each` combinations of `choices` for every name, other ones for the next name.

    The names of `whole` have all combinations; quick are the turns of theirs and of QUICK's. For what names and choices
    do each for itself: a product of both would say the same many times.
    """
    found = list(itertools.product(*choices))
    parameters = []
    for at, name in enumerate(names):
        turn = {(at + step * (len(found) // each)) % len(found) for step in range(each)}
        for place in range(len(found)) if name in whole else sorted(turn):
            quick = place in turn and (name in whole or name in QUICK)
            parameters.append(pytest.param(name, *found[place], marks=() if quick else pytest.mark.slow))
    return parameters


def every_pair(*choices: Mapping[str, Any], odd: bool = False, quick: int | None = None) -> list[Any]:
    """Half of the product of three and more parameters, each value with its id: the combinations whose places add up to
    an even number (`odd`: an odd one). In them each value meets each of every other parameter. Those behind the first
    `quick` are slow."""
    found = []
    for places in itertools.product(*(range(len(values)) for values in choices)):
        if sum(places) % 2 == odd:
            chosen = [list(values.items())[place] for values, place in zip(choices, places, strict=True)]
            marks = () if quick is None or len(found) < quick else pytest.mark.slow
            label = "-".join(name for name, _ in chosen)
            found.append(pytest.param(*(value for _, value in chosen), id=label, marks=marks))
    return found
