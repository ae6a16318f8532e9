"""The imports that a command waits for: torch, transformers and what of ours stands on them."""

import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager

_MODEL = "griffin_offload.runtime.model"


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
        yield
    finally:
        gc.freeze()
        gc.enable()
