"""How far a reader walks: the files of the package in which functions run, from one point of a program to another.

`python -m walks COMMAND ...` walks a command of griffin-offload and prints the events as a line of JSON: a process of
its own, where no object that an earlier one left is cleared away in between.
"""

import json
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import FrameType

import griffin_offload

_PACKAGE = f"{Path(griffin_offload.__file__).parent}/"
_IN_FUNCTION = 1  # a flag of code: bodies of modules and classes lack it


def walk(function: Callable[[], object]) -> list[str]:
    """Run it. Returns, in their order and in all threads, the files of functions that were called ("room/file.py"),
    and of forwards in transformers' models the class, "+" before it for the call and "-" for the return."""
    events: list[str] = []

    def note(frame: FrameType, event: str, _: object) -> None:
        code = frame.f_code
        if code.co_filename.startswith(_PACKAGE):
            file = code.co_filename.removeprefix(_PACKAGE)
            if event == "call" and code.co_flags & _IN_FUNCTION and file not in events[-1:] and not _imports(frame):
                events.append(file)
        elif code.co_name == "forward" and "/transformers/models/" in code.co_filename and event in ("call", "return"):
            events.append(f"{'+' if event == 'call' else '-'}{type(frame.f_locals['self']).__qualname__}")

    threading.setprofile(note)
    sys.setprofile(note)
    try:
        function()
    finally:
        sys.setprofile(None)
        threading.setprofile(None)
    return events


def _imports(frame: FrameType | None) -> bool:
    """Whether it runs because a file of the package is imported."""
    while frame is not None:
        if frame.f_code.co_name == "<module>" and frame.f_code.co_filename.startswith(_PACKAGE):
            return True
        frame = frame.f_back
    return False


def files(events: list[str], start: str = "", end: str = "", nth: int = 0) -> set[str]:
    """All files, or those from the `nth` event `start` on to the next `end`: "+" or "-" and how the class is named."""

    def matches(event: str, wanted: str) -> bool:
        return event[0] == wanted[0] and event.endswith(wanted[1:])

    if start:
        first = [index for index, event in enumerate(events) if matches(event, start)][nth]
        rest = events[first + 1 :]
        events = rest[: next(index for index, event in enumerate(rest) if matches(event, end))]
    return {event for event in events if event.endswith(".py")}


if __name__ == "__main__":
    from griffin_offload.cli.main import main

    print(json.dumps(walk(lambda: main(sys.argv[1:]))))
