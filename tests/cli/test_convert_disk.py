"""A conversion on a disk that is too small, fills up, or cannot be written: the shards that are whole are kept."""

import shutil
import subprocess
from pathlib import Path

import pytest

NOTE = ".converting.json"


def files_of(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def written_at(directory: Path) -> dict[str, tuple[int, int]]:
    stats = {path.name: path.stat() for path in directory.glob("*.safetensors")}
    return {name: (found.st_ino, found.st_mtime_ns) for name, found in stats.items()}


def test_too_small_from_the_beginning(cli, converted, llama: Path, small_disk):
    out = small_disk("200k") / "out"
    words = r"the conversion needs 50\.\d MB on the disk of \S+, (200\.7|204\.8) kB are free"
    cli.refuses(3, words, "convert", out, "-m", llama, "--quantize", "int8")
    assert list(out.iterdir()) == []
    small_disk("60m")
    assert cli("convert", out, "-m", llama, "--quantize", "int4").code == 0  # the other precision may use the place
    assert files_of(out) == files_of(converted("llama2", "int4"))


def test_a_disk_that_fills_up(cli, converted, llama: Path, small_disk, monkeypatch: pytest.MonkeyPatch):
    out = small_disk("120k") / "out"
    command = ("convert", out, "-m", llama, "--quantize", "int8")
    with monkeypatch.context() as patch:
        usage = shutil.disk_usage(out.parent)
        patch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=10**9))
        words = "cannot be written .*No space left.* finished shards are kept, run the same command again"
        cli.refuses(1, words, *command)
        before = written_at(out)
        assert 1 <= len(before) < 4
        assert {path.name for path in out.iterdir()} == {NOTE, *before}
        cli.refuses(1, words, *command)
        cli.refuses(4, "unfinished conversion", "plan", "-m", out)
    small_disk("60m")
    assert cli(*command, "--json").json["resumed_shards"] == len(before)
    assert files_of(out) == files_of(converted("llama2", "int8"))
    assert {name: written_at(out)[name] for name in before} == before


def test_a_disk_that_cannot_be_written(cli, llama: Path, small_disk):
    place = small_disk("1m")
    subprocess.run(["mount", "-o", "remount,ro", str(place)], check=True)
    cli.refuses(1, "cannot be written .*Read-only", "convert", place / "out", "-m", llama, "--quantize", "int8")
