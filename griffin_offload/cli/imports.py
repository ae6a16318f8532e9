"""The imports that a command waits for: torch, transformers and what of ours stands on them."""

import gc
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

_MODEL = "griffin_offload.runtime.model"
# Packages that transformers imports where they are installed, for the losses of vision models: a tenth of its imports.
_NOT_NEEDED = ("scipy",)


@contextmanager
def heavy_imports() -> Iterator[None]:
    """Imports inside this are made without the collector of cycles, which never looks at what they leave.

    They make half a million objects that stay until the end. Going through them again and again was a sixth of the time
    to the first word; later, each full collection would pause an answer for them, and the one at exit the shell.
    """
    if _MODEL in sys.modules or not gc.isenabled():
        # A process that knows the model may hold some, and those have to be collected when they are given up.
        yield
        return
    gc.disable()
    try:
        with _hidden(_NOT_NEEDED):
            yield
    finally:
        gc.freeze()
        gc.enable()


@contextmanager
def _hidden(names: Sequence[str]) -> Iterator[None]:
    """Packages that nobody has imported yet are as if they were not installed; afterwards they can be imported."""
    hidden = {name: None for name in names if name not in sys.modules}
    sys.modules.update(hidden)  # type: ignore[arg-type]  # None is Python's own sign for it
    try:
        yield
    finally:
        for name in hidden:
            del sys.modules[name]
