"""The kernels under AddressSanitizer and ThreadSanitizer of gcc, on demand:

GRIFFIN_SANITIZERS=1 pytest tests/robustness
"""

import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from robustness import hammer

import griffin_offload
from griffin_offload.kernels.library import library

SOURCES, HERE = Path(griffin_offload.__file__).parent / "kernels" / "csrc", Path(__file__).parent
SECONDS = os.environ.get("GRIFFIN_SANITIZERS_SECONDS", "20")
RUNTIMES = {"address": "libasan.so", "thread": "libtsan.so"}
# Python and torch give back little at their end, and start with what is no business of ours.
OPTIONS = {
    "ASAN_OPTIONS": "detect_leaks=0:exitcode=66",
    "TSAN_OPTIONS": "exitcode=66:report_signal_unsafe=0",
    "UBSAN_OPTIONS": "print_stacktrace=1",
}
pytestmark = pytest.mark.skipif(library() is None, reason="another processor, or no compiler")


def _runtime(sanitizer: str) -> str:
    found = subprocess.run(
        ["gcc", f"-print-file-name={RUNTIMES[sanitizer]}"], check=True, capture_output=True, text=True
    ).stdout.strip()
    if not os.path.isabs(found):
        pytest.skip(f"gcc has no {RUNTIMES[sanitizer]}")
    return os.path.realpath(found)


def _build(sanitizer: str, target: Path) -> Path:
    checks = "address,bounds,shift-exponent,signed-integer-overflow" if sanitizer == "address" else sanitizer
    flags = ["-std=c11", "-O1", "-g", "-fno-omit-frame-pointer", "-fno-math-errno", "-fPIC", "-shared", "-pthread"]
    sources = [*map(str, sorted(SOURCES.glob("*.c"))), str(HERE / "threads.c")]
    subprocess.run(["gcc", *flags, f"-fsanitize={checks}", "-o", str(target), *sources], check=True)
    return target


@pytest.fixture(scope="module", params=RUNTIMES)
def sanitizer(request: pytest.FixtureRequest) -> str:
    if "GRIFFIN_SANITIZERS" not in os.environ:
        pytest.skip("takes minutes: set GRIFFIN_SANITIZERS=1")
    if shutil.which("gcc") is None:
        pytest.skip("gcc builds the kernels with sanitizers")
    name: str = request.param
    return name


@pytest.fixture(scope="module")
def built(sanitizer: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _build(sanitizer, tmp_path_factory.mktemp(sanitizer) / "kernels.so")


def _run(sanitizer: str, built: Path, what: str) -> tuple[int, str]:
    """Exit code, and all that was printed."""
    # ThreadSanitizer's memory map knows fewer random addresses than Linux hands out.
    fixed = ["setarch", "-R"] if sanitizer == "thread" and shutil.which("setarch") else []
    done = subprocess.run(
        [*fixed, sys.executable, str(HERE / "hammer.py"), str(built), what],
        env=os.environ | OPTIONS | {"LD_PRELOAD": _runtime(sanitizer), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    return done.returncode, f"{done.stdout}\n{done.stderr}"


@pytest.mark.parametrize("call", hammer.CALLS, ids=lambda call: call.__name__)
def test_what_is_called_on_demand_can_be_called(call: hammer.Call):
    """By the installed library, once: kernels change more often than sanitizers run."""
    torch.manual_seed(0)
    call(random.Random(0), library())


def test_kernels_called_from_several_threads(sanitizer: str, built: Path):
    code, told = _run(sanitizer, built, SECONDS)
    assert code == 0, told
    assert "hammered" in told
    assert "runtime error" not in told, told
    assert "Sanitizer" not in told, told


def test_what_is_wrong_is_seen(sanitizer: str, built: Path):
    what, seen = {"address": ("overflow", "heap-buffer-overflow"), "thread": ("race", "data race")}[sanitizer]
    code, told = _run(sanitizer, built, what)
    assert code != 0
    assert seen in told, told
