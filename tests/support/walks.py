"""How far a reader walks: the files of the package in which functions run, from one point of a program to another."""

import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import FrameType

import griffin_offload

_PACKAGE = f"{Path(griffin_offload.__file__).parent}/"
_OPTIMIZED = 1  # of code: functions, and no bodies of modules and classes


def walk(function: Callable[[], object]) -> list[str]:
    """Run it. Returns, in their order, the files whose functions were called, in any thread ("room/file.py"), and the
    names of the forwards of transformers' models; what imports run is left out."""
    events: list[str] = []

    def called(frame: FrameType, event: str, _: object) -> None:
        code = frame.f_code
        if event != "call" or not code.co_flags & _OPTIMIZED:
            return
        if code.co_filename.startswith(_PACKAGE):
            if (file := code.co_filename.removeprefix(_PACKAGE)) not in events[-1:] and not _is_import(frame):
                events.append(file)
        elif code.co_name == "forward" and "/transformers/models/" in code.co_filename:
            events.append(frame.f_locals["self"].__class__.__qualname__)

    threading.setprofile(called)
    sys.setprofile(called)
    try:
        function()
    finally:
        sys.setprofile(None)
        threading.setprofile(None)
    return events


def _is_import(frame: FrameType | None) -> bool:
    while frame is not None:
        if frame.f_code.co_name == "<module>" and frame.f_code.co_filename.startswith(_PACKAGE):
            return True
        frame = frame.f_back
    return False


def files(events: list[str]) -> set[str]:
    return {event for event in events if event.endswith(".py")}


def between(events: list[str], name: str, call: int) -> set[str]:
    """The files from the call of this number of a forward whose class's name ends in `name` to the next one."""
    calls = [index for index, event in enumerate(events) if event.endswith(name)]
    return files(events[slice(*(calls + calls[:0])[call : call + 2])])
