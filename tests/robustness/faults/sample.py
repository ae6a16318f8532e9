"""Faults and SIGKILLs, each in a real process: does it end, in one line, and is nothing half or wrong?

Commands of the demo model are forked from this process, which has one thread and all imports. The ceiling is zero: a
hang, a traceback, an exit code that is not documented for the fault, an output that differs from the undisturbed one,
or a file that is neither whole nor absent is a problem.
"""

import random
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

from robustness.faults.cases import cases
from robustness.faults.kills import KILLS
from robustness.faults.world import Result, World, made_world


class Found(NamedTuple):
    """Of one case."""

    number: int
    kind: str
    outcome: str
    problem: str | None


def shares(weights: dict[str, int], total: int) -> list[str]:
    """Kinds in proportion to their weights, `total` in all, in turns."""
    turns = [(place / weight, kind) for kind, weight in weights.items() for place in range(1, weight + 1)]
    order = [kind for _, kind in sorted(turns)]
    return [order[i % len(order)] for i in range(total)]


def one(kind: str, case: Any, world: World, rng: random.Random) -> Result:
    with world.folder() as place:
        try:
            return Result(*case(world, rng, place))
        except Exception as error:  # a server that does not answer, for example: a finding, too
            return Result("no outcome", f"{type(error).__name__}: {error}")


def run_sample(faults: int, kills: int, seed: int, only: str = "") -> list[Found]:
    """So many faults and kills of the kinds whose names hold `only`, each told on stderr."""
    with tempfile.TemporaryDirectory(prefix="griffin-faults-") as folder:
        Path(folder).chmod(0o755)  # for the cases that run as nobody
        with made_world(Path(folder)) as world:
            all_faults = {kind: found for kind, found in cases(world).items() if only in kind}
            all_kills = {kind: case for kind, case in KILLS.items() if only in kind}
            plan = [(kind, all_faults[kind][1]) for kind in shares({k: w for k, (w, _) in all_faults.items()}, faults)]
            plan += [(kind, all_kills[kind]) for kind in shares(dict.fromkeys(all_kills, 1), kills)]
            return [_told(number, kind, case, world, seed) for number, (kind, case) in enumerate(plan)]


def _told(number: int, kind: str, case: Any, world: World, seed: int) -> Found:
    found = Found(number, kind, *one(kind, case, world, random.Random(f"{seed} {number} {kind}")))
    print(f"{number} {kind}: {found.problem or found.outcome}", file=sys.stderr, flush=True)
    return found
