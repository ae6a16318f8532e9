"""Cases one after the other in this process, which is limited and watched."""

import random
import resource
import signal
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from robustness.fuzz.place import Place, Watch

from griffin_offload.errors import GriffinError, memory_refused

# Of one case; far above what a machine that is busy with other things needs for it.
LIMIT_S = 20.0
# Native code does not see the alarm: then the process is killed.
GRACE_S = 10.0
# A case may add this much to the peak; the address space allows more, so that the peak is seen to pass it.
MEMORY_BYTES = 512 * 2**20
_ADDRESS_BYTES = 2 * 2**30
OUTCOMES = ("accepted", "refused", "unnamed", "time", "memory", "watch", "died")
"""Read; a named error; any other exception or text; too long; too much; wrote, ran or connected; the process died."""
BAD = OUTCOMES[2:]
Case = Callable[[random.Random, "Place"], None]
"""Writes a damaged file and reads it; returns where the package accepts it."""


class Unnamed(Exception):
    """What a case found wrong by itself."""


class TooLong(BaseException):
    """The alarm; no `except Exception` stops it."""


@dataclass(frozen=True)
class Verdict:
    """How one case ended."""

    index: int
    outcome: str
    detail: str = ""
    seconds: float = 0.0


def run_cases(case: Case, indices: Sequence[int], seed: str, place: Place, report: Callable[[Verdict], None]) -> None:
    """In a process of its own: every case in turn. Case `index` is the same whatever ran before it."""
    _limit_memory()
    watch = Watch(place)
    sys.dont_write_bytecode = True
    signal.signal(signal.SIGALRM, _alarm)
    for index in indices:
        report(Verdict(index, "started"))
        place.restore()
        peak, begin = _peak_bytes(), time.perf_counter()
        watch.found.clear()
        outcome, detail = _outcome(case, random.Random(f"{seed}/{index}"), place)
        grown = _peak_bytes() - peak
        if watch.found:
            outcome, detail = "watch", "; ".join(watch.found)[:500]
        elif strays := place.strays():
            outcome, detail = "watch", f"left {strays[:5]}"
        elif grown > MEMORY_BYTES and outcome != "time":
            outcome, detail = "memory", f"{grown / 1e6:.0f} MB more ({detail})"
        report(Verdict(index, outcome, detail, time.perf_counter() - begin))
        if outcome in ("time", "memory", "watch"):
            return  # what it holds or left would be counted to the next one


def _outcome(case: Case, generator: random.Random, place: Place) -> tuple[str, str]:
    try:
        signal.setitimer(signal.ITIMER_REAL, LIMIT_S)
        place.watched = True
        case(generator, place)
    except GriffinError as error:
        if memory_refused(error):
            return "memory", str(error)[:300]
        return "refused", type(error).__name__
    except TooLong:
        return "time", _where()
    except BaseException as error:  # an unnamed one, panics of native libraries included, is what is looked for
        return "unnamed", f"{type(error).__name__}: {str(error)[:200]} {_where()}"
    else:
        return "accepted", ""
    finally:
        place.watched = False
        signal.setitimer(signal.ITIMER_REAL, 0)


def _where() -> str:
    frames = traceback.extract_tb(sys.exc_info()[2])
    frames = [frame for frame in frames if frame.filename != __file__]
    ours = [frame for frame in frames if "griffin_offload/" in frame.filename]
    return " < ".join(f"{Path(f.filename).name}:{f.lineno}" for f in [*ours[-1:], *frames[-1:]])


def _alarm(signum: int, frame: FrameType | None) -> None:
    raise TooLong


def _limit_memory() -> None:
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + _ADDRESS_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def _peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
