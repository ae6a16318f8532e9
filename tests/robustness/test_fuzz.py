"""Hostile files for every parser (`fuzz/`): a sample, `GRIFFIN_ROBUSTNESS=50` times it on demand; faults are seen."""

import os
import random
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from marks import mostly_slow
from robustness.fuzz import worker
from robustness.fuzz.files import FOREIGN
from robustness.fuzz.kinds import Kind, make_kinds
from robustness.fuzz.lanes import Lane, run_lanes
from robustness.fuzz.place import Place
from robustness.fuzz.worker import BAD

from griffin_offload.checkpoint import tokenizer
from griffin_offload.errors import UsageError

TIMES, SEED = int(os.environ.get("GRIFFIN_ROBUSTNESS", "1")), int(os.environ.get("GRIFFIN_ROBUSTNESS_SEED", "1"))
COUNTS = {
    "size": 200,
    "header": 100,
    "index": 80,
    "converted": 30,
    "config": 60,
    "config to plan": 6,
    "tokenizer": 6,
    "saved context": 60,
    "gguf": 200,
    **{f"quantised by others: {name}": 40 for name in FOREIGN},
    "command line": 8,
}


@pytest.fixture(scope="module")
def kinds(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Kind]:
    return {kind.name: kind for kind in make_kinds(tmp_path_factory.mktemp("valid"))}


def test_every_kind_is_sampled(kinds: dict[str, Kind]):
    assert set(COUNTS) == set(kinds)


@pytest.mark.parametrize("name", mostly_slow(COUNTS, 6))
def test_sample(kinds: dict[str, Kind], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str):
    monkeypatch.setattr(tokenizer, "LIMIT_S", 1.0)
    kind, count = kinds[name], COUNTS[name] * TIMES
    verdicts = run_lanes([Lane(kind.case, range(count), f"{SEED}/{name}", tmp_path, kind.files)])
    assert [verdict.index for verdict in verdicts] == list(range(count))
    assert [verdict for verdict in verdicts if verdict.outcome in BAD] == []
    assert {verdict.outcome for verdict in verdicts} == {"accepted", "refused"} or len(verdicts) < 20


def _allocate(generator: random.Random, place: Place) -> None:
    bytearray(700 * 2**20)


def _allocate_too_much(generator: random.Random, place: Place) -> None:
    try:
        bytearray(2**40)
    except MemoryError as error:
        raise UsageError("named, but only after the machine had to refuse") from error


def _sleep(generator: random.Random, place: Place) -> None:
    try:
        time.sleep(60)
    except Exception as error:
        raise UsageError("hidden") from error


def _panic(generator: random.Random, place: Place) -> None:
    raise type("PanicException", (BaseException,), {})("native code panicked")


def _leave(generator: random.Random, place: Place) -> None:
    os.mkfifo(place.root / "left")  # no audit event tells of it


def _read_outside(generator: random.Random, place: Place) -> None:
    (place.directory / "../outside/a").read_bytes()


FAULTS: dict[str, tuple[Callable[[random.Random, Place], object], str]] = {
    "an unnamed exception": (lambda g, p: {}["key"], "unnamed"),
    "a panic": (_panic, "unnamed"),
    "memory": (_allocate, "memory"),
    "too much memory": (_allocate_too_much, "memory"),
    "time": (_sleep, "time"),
    "native time": (lambda g, p: _stopped(), "time"),
    "death": (lambda g, p: os.abort(), "died"),
    "a file written": (lambda g, p: (p.root / "x").write_text("x"), "watch"),
    "a checkpoint changed": (lambda g, p: (p.directory / "a").write_text("x"), "watch"),
    "a file removed": (lambda g, p: (p.outside / "a").unlink(), "watch"),
    "a file left": (_leave, "watch"),
    "a file read outside": (_read_outside, "watch"),
    "a process": (lambda g, p: subprocess.run(["true"]), "watch"),
    "a command": (lambda g, p: os.system("true"), "watch"),
    "code run": (lambda g, p: exec(compile("pass", str(p.directory / "planted.py"), "exec")), "watch"),
    "nothing": (lambda g, p: p.write("a", b"x").read_bytes(), "accepted"),
    "an output": (lambda g, p: (p.out.mkdir(), (p.out / "x").write_text("x")), "accepted"),
}


def _stopped() -> None:
    """As native code that no alarm reaches."""
    import signal

    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGALRM})
    time.sleep(60)


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS)
def test_faults_are_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str):
    """Also in the second of three cases, with the others judged by themselves."""
    case, outcome = FAULTS[fault]
    monkeypatch.setattr(worker, "LIMIT_S", 2.0 if "time" in fault else 20.0)
    monkeypatch.setattr(worker, "GRACE_S", 2.0)

    def second(generator: random.Random, place: Place) -> None:
        if generator.random() == random.Random("seed/1").random():
            case(generator, place)

    verdicts = run_lanes([Lane(second, range(3), "seed", tmp_path, {"a": b"whole"})])
    assert [verdict.outcome for verdict in verdicts] == ["accepted", outcome, "accepted"], verdicts


@pytest.mark.slow
def test_a_process_that_hangs_has_told_of_the_cases_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """However late one listens: their lines come at once."""
    monkeypatch.setattr(worker, "LIMIT_S", 2.0)
    monkeypatch.setattr(worker, "GRACE_S", 2.0)

    def third(generator: random.Random, place: Place) -> None:
        if generator.random() == random.Random("seed/2").random():
            _stopped()

    lane = Lane(third, range(4), "seed", tmp_path, {"a": b"whole"})
    time.sleep(1.0)
    verdicts = run_lanes([lane])
    assert [verdict.outcome for verdict in verdicts] == ["accepted", "accepted", "time", "accepted"], verdicts
