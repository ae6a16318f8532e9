"""Files that a command reads or writes, in places where it cannot: one line with path, reason and remedy."""

import ctypes
import json
import os
import resource
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

OPTIONS = ("--density", "1", "--max-gpu-mem", "1GB", "--device", "cpu", "--threads", "1")
NEW = ("-n", "2", "--temperature", "0")
READS: dict[str, tuple[int, Callable[[Path, Path], tuple[object, ...]]]] = {
    "prompt": (2, lambda place, llama: ("run", "-m", llama, "--prompt-file", place)),
    "schema": (2, lambda place, llama: ("run", "the cat", "-m", llama, "--json-schema", place)),
    "cache": (4, lambda place, llama: ("run", "the cat", "-m", llama, "--prompt-cache", place)),
    "saved": (4, lambda place, llama: ("chat", "-m", llama, "--load", place)),
    "adapter": (4, lambda place, llama: ("run", "the cat", "-m", llama, "--adapter", place)),
    "model": (4, lambda place, llama: ("run", "the cat", "-m", place)),
    "models": (4, lambda place, llama: ("models", place)),
    "config": (4, lambda place, llama: ("plan", "--config", place)),
    "key": (2, lambda place, llama: ("serve", "-m", llama, "--port", "0", "--api-key-file", place)),
    "requests": (2, lambda place, llama: ("batch", place, llama.parent / "absent" / "out", "-m", llama)),
    "text": (2, lambda place, llama: ("eval", "ppl", "-m", llama, "--text", place)),
    "rows": (2, lambda place, llama: ("inspect", "-m", llama, "--rows", place, "--output", llama.parent / "absent")),
    "prompts": (2, lambda place, llama: ("export", llama.parent / "absent", "-m", llama, "--prompts", place)),
}
WRITES: dict[str, tuple[int, Callable[[Path, Path, Path], tuple[object, ...]]]] = {
    "answers": (2, lambda place, llama, ask: ("batch", ask, place, "-m", llama, "--served-name", "tiny")),
    "copy": (1, lambda place, llama, ask: ("convert", place, "-m", llama, "--quantize", "int8")),
    "export": (2, lambda place, llama, ask: ("export", place, "-m", llama, "--prompts", ask, "--density", ".5")),
    "pictures": (2, lambda place, llama, ask: ("inspect", "-m", llama, "--output", place, "--prompt", "the cat")),
}
_KEEPS_ROOT_FROM_NOTHING = 0b110  # CAP_DAC_OVERRIDE and CAP_DAC_READ_SEARCH


@pytest.fixture
def closed(tmp_path: Path) -> Iterator[Path]:
    """A directory that this process may not enter."""
    place = tmp_path / "closed"
    place.mkdir(mode=0)
    with_rights = _give_up_rights()
    yield place
    with_rights()
    place.chmod(0o700)


def _give_up_rights() -> Callable[[], object]:
    """Of root, for this thread, until what this gives is called."""
    if not sys.platform.startswith("linux") or os.geteuid() != 0:
        return lambda: None
    system = ctypes.CDLL(None, use_errno=True)
    header, before = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
    assert system.capget(header, before) == 0
    less = (ctypes.c_uint32 * 6)(*before)
    less[0] &= ~_KEEPS_ROOT_FROM_NOTHING
    assert system.capset(header, less) == 0
    return lambda: system.capset(header, before)


@pytest.fixture
def ask(tmp_path: Path) -> Path:
    """A file of requests that is one of prompts, too."""
    body = {"model": "tiny", "prompt": "the cat", "max_tokens": 5}
    both = {"custom_id": "one", "method": "POST", "url": "/v1/completions", "body": body, "prompt": "the cat"}
    path = tmp_path / "ask.jsonl"
    path.write_text(json.dumps(both) + "\n")
    return path


@pytest.mark.parametrize("kind", READS)
def test_places_that_nothing_can_be_read_from(cli, llama: Path, closed: Path, kind: str):
    code, command = READS[kind]
    words = rf": Permission denied in {closed} \(mode 0\): let this user enter it \(chmod"
    cli.refuses(code, words, *command(closed / "a", llama))
    cli.refuses(code, "File name too long: give a shorter one", *command(closed.parent / ("a" * 300), llama))


@pytest.mark.parametrize("kind", WRITES)
def test_places_that_nothing_can_be_written_to(cli, llama: Path, closed: Path, ask: Path, kind: str):
    code, command = WRITES[kind]
    said = rf"write.*{closed}/a|{closed}/a cannot be written"
    words = rf"({said}).*Permission denied in {closed} \(mode 0\): let this user enter it"
    cli.refuses(code, words, *command(closed / "a", llama, ask))
    cli.refuses(code, "File name too long: give a shorter one", *command(closed.parent / ("a" * 300), llama, ask))
    cli.refuses(code, "Not a directory: check the name", *command(ask / "a", llama, ask))


@pytest.mark.skipif(not Path("/dev/zero").exists(), reason="no such device")
def test_devices_without_end_are_no_prompts(cli, llama: Path):
    for kind in ("prompt", "schema"):
        code, command = READS[kind]
        cli.refuses(code, "it is no file, and gives more than", *command(Path("/dev/zero"), llama))
    cli.refuses(4, "/dev/zero is no file", "chat", "-m", llama, "--load", "/dev/zero")


@pytest.fixture
def small_files() -> Iterator[Callable[[int], None]]:
    """Lets no file become larger than so many bytes, as a full disk would."""
    before, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.getsignal(signal.SIGXFSZ)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    yield lambda nbytes: resource.setrlimit(resource.RLIMIT_FSIZE, (nbytes, before[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
    signal.signal(signal.SIGXFSZ, handler)


def test_a_disk_that_is_full(cli, llama: Path, ask: Path, tmp_path: Path, small_files):
    out = tmp_path / "answers"
    numbers = ("inspect", "-m", llama, *OPTIONS, "-n", "4", "--prompt", "the cat", "--output", tmp_path / "pictures")
    assert cli(*numbers).code == 0  # what matplotlib writes for itself is there
    small_files(100)
    full, room = "File too large: make room there", ", or name another place"
    batch = ("batch", "-q", ask, out, "-m", llama, "--served-name", "tiny", *OPTIONS)
    cli.refuses(1, f"{out} cannot be written: {full}{room}; what is there is kept, run the same", *batch)
    cli.refuses(1, rf"pictures/prompt\.\w+ cannot be used: {full}", *numbers[:-1], tmp_path / "pictures", "-q")
    outcome = cli("run", "the cat", "-m", llama, *NEW, *OPTIONS, "--prompt-cache", tmp_path / "a.ctx")
    assert (outcome.code, f"a.ctx cannot be written: {full}" in outcome.err) == (4, True)
    small_files(2**30)
    assert cli(*batch).code == 0
    assert json.loads(out.read_text())["custom_id"] == "one"
