"""Which neurons a KV cache goes on with: those that its own prompt chose, whoever was asked in between.

It is written on the cache itself, so that copies of one (a shared beginning, `copy.deepcopy`) know it, too.
"""

from dataclasses import dataclass
from typing import Any

from torch import Tensor

_NAME = "_griffin_offload_chosen"


@dataclass(frozen=True, eq=False)
class Chosen:
    """What a prompt has chosen. Compared by identity of `selected`: a new choice is a new dict."""

    engine: str
    """Key of the engine whose compact parameters are meant."""
    selected: dict[int, Tensor]
    """Sorted indices of the neurons of each streamed layer."""
    activation_kept: float
    """Share of s^2 / S that they held when they were chosen."""

    def __deepcopy__(self, _: Any) -> "Chosen":
        return self


def remember(cache: Any, chosen: Chosen) -> None:
    """`cache` was filled for these."""
    if cache is not None:
        setattr(cache, _NAME, chosen)


def chosen_for(cache: Any) -> Chosen | None:
    """What `cache` was filled for, if anything is known of it."""
    found = getattr(cache, _NAME, None)
    return found if isinstance(found, Chosen) else None
