"""A conversion that is killed or run twice at once: what is there afterwards is whole, and equal byte for byte."""

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from fork_server import ForkServer, Started
from marks import mostly_slow
from transformers import LlamaConfig, LlamaForCausalLM

from griffin_offload.engine import shards as runtime

NOTE = ".converting.json"
# Kills the process at a given step of a given file: its name when it is whole, and when.
KILLER = """
import os, signal, sys
from pathlib import Path
from griffin_offload.cli.main import main
from griffin_offload.engine import shards as convert
name, when = sys.argv[1:3]
replace, save, unlink = Path.replace, convert.save_file, Path.unlink
die = lambda: os.kill(os.getpid(), signal.SIGKILL)
def killing_replace(self, target):
    if target.name == name and when == "before the rename":
        die()
    replace(self, target)
    if target.name == name and when == "after the rename":
        die()
def killing_save(tensors, path, metadata):
    save(tensors, path, metadata)
    if path.name == f".{name}.tmp" and when.endswith("half written"):
        half = path.read_bytes()[: path.stat().st_size // 2]
        path.unlink()
        if when.startswith("by safetensors"):
            path = path.with_name(".tmpAb12Cd")
        path.write_bytes(half)
        die()
def killing_unlink(self, missing_ok=False):
    if self.name == name and when == "before the note goes":
        die()
    unlink(self, missing_ok)
Path.replace, convert.save_file, Path.unlink = killing_replace, killing_save, killing_unlink
sys.exit(main(sys.argv[3:]))
"""
SECOND = "model-00002-of-00004.safetensors"
DEATHS = [
    (NOTE, "before the rename", 0),
    (NOTE, "after the rename", 0),
    ("model-00001-of-00004.safetensors", "half written", 0),
    (SECOND, "half written", 1),
    (SECOND, "by safetensors half written", 1),
    (SECOND, "before the rename", 1),
    (SECOND, "after the rename", 2),
    ("model-00004-of-00004.safetensors", "half written", 3),
    ("tokenizer.json", "before the rename", 4),
    ("config.json", "after the rename", 4),
    ("model.safetensors.index.json", "before the rename", 4),
    ("model.safetensors.index.json", "after the rename", 4),
    (NOTE, "before the note goes", 4),
]


def files_of(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def written_at(directory: Path) -> dict[str, tuple[int, int]]:
    stats = {path.name: path.stat() for path in directory.glob("*.safetensors")}
    return {name: (found.st_ino, found.st_mtime_ns) for name, found in stats.items()}


@pytest.mark.parametrize(("name", "when", "finished"), mostly_slow(DEATHS, 3), ids=lambda value: str(value))
def test_killed_and_run_again(cli, forks, converted, llama: Path, tmp_path: Path, name, when, finished):
    out = tmp_path / "out"
    command = ("convert", "-m", llama, out, "--quantize", "int8")
    killed = forks.run("-c", KILLER, name, when, *command)
    assert killed.returncode == -signal.SIGKILL, killed.err
    before = written_at(out)
    assert len(before) == finished
    if (out / NOTE).is_file():
        for other in (("plan",), ("run", "the cat"), ("convert", tmp_path / "other", "--quantize", "int8")):
            cli.refuses(4, "unfinished conversion: run the same convert command again", *other, "-m", out)
    else:
        cli.refuses(4, "no config.json", "plan", "-m", out)
    resumed = cli(*command, "--json")
    assert (resumed.code, resumed.json["resumed_shards"]) == (0, finished), resumed
    assert files_of(out) == files_of(converted("llama2", "int8"))
    assert {name: written_at(out)[name] for name in before} == before


@pytest.fixture(scope="module")
def many_layers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint that takes a while: a hundred layers."""
    directory: Path = tmp_path_factory.mktemp("many") / "model"
    sizes = {"hidden_size": 64, "intermediate_size": 256, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = LlamaConfig(**sizes, num_hidden_layers=100, vocab_size=512, max_position_embeddings=64)
    LlamaForCausalLM(config).bfloat16().save_pretrained(directory)
    return directory


def start(forks: ForkServer, model: Path, out: Path, *flags: str) -> Started:
    return forks.start("-m", "griffin_offload", "convert", "-m", model, out, "--quantize", "int8", *flags)


def wait_for_shards(running: Started, out: Path, count: int) -> None:
    deadline = time.monotonic() + 200
    while len(list(out.glob("*.safetensors"))) < count and running.poll() is None and time.monotonic() < deadline:
        time.sleep(0.002)


@pytest.mark.slow
def test_a_real_process_killed_anywhere(cli, forks, many_layers: Path, tmp_path: Path):
    """Wherever it happens to be, twice in a row; and what stands in the file system meanwhile is never half a shard."""
    whole, out = tmp_path / "whole", tmp_path / "out"
    assert cli("convert", whole, "-m", many_layers, "--quantize", "int8", "-q").code == 0
    for count in (5, 60):
        running = start(forks, many_layers, out)
        wait_for_shards(running, out, count)
        running.send_signal(signal.SIGKILL)
        assert running.wait() == -signal.SIGKILL
        shards = {path.name: path.read_bytes() for path in out.glob("*.safetensors")}
        assert count <= len(shards) < 101
        assert shards == {name: (whole / name).read_bytes() for name in shards}
        cli.refuses(4, "unfinished conversion", "plan", "-m", out)
    before = written_at(out)
    outcome = cli("convert", out, "-m", many_layers, "--quantize", "int8")
    assert outcome.code == 0
    assert f"in 101 shards, {len(before)} of them from before" in outcome.err
    assert files_of(out) == files_of(whole)
    assert {name: written_at(out)[name] for name in before} == before


@pytest.mark.slow
def test_two_at_once(cli, forks, many_layers: Path, tmp_path: Path):
    """The second one is told, and harms nothing."""
    whole, out = tmp_path / "whole", tmp_path / "out"
    assert cli("convert", whole, "-m", many_layers, "--quantize", "int8", "-q").code == 0
    running = start(forks, many_layers, out)
    wait_for_shards(running, out, 1)
    os.kill(running.pid, signal.SIGSTOP)
    try:
        half = out / ".model-00099-of-00101.safetensors.tmp"
        half.write_bytes(b"being written")
        for precision in ("int8", "int4"):
            cli.refuses(2, "another conversion is writing", "convert", out, "-m", many_layers, "--quantize", precision)
        assert half.read_bytes() == b"being written"
    finally:
        os.kill(running.pid, signal.SIGCONT)
    assert running.wait() == 0, running.err
    assert files_of(out) == files_of(whole)


def test_many_at_once(forks, converted, llama: Path, tmp_path: Path):
    """Started at the same moment: one of them writes, the others are refused, before or after."""
    running = [start(forks, llama, tmp_path / "out", "-q") for _ in range(3)]
    assert sorted(process.wait() for process in running) == [0, 2, 2]
    assert files_of(tmp_path / "out") == files_of(converted("llama2", "int8"))


def test_ctrl_c(cli, converted, llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    command = ("convert", tmp_path / "out", "-m", llama, "--quantize", "int8")
    with monkeypatch.context() as patch:
        patch.setattr(runtime, "save_file", stop_at(3, KeyboardInterrupt))
        stopped = cli(*command)
    assert (stopped.code, stopped.out) == (130, "")
    assert stopped.err.splitlines()[-1] == "griffin-offload: interrupted"
    assert {path.name for path in (tmp_path / "out").iterdir()} == {NOTE, "model-00001-of-00004.safetensors", SECOND}
    assert cli(*command).code == 0
    assert files_of(tmp_path / "out") == files_of(converted("llama2", "int8"))


def stop_at(call: int, error: type[BaseException]) -> Callable[..., None]:
    """save_file that writes half of the call-th file and fails."""
    save, calls = runtime.save_file, []

    def stopping(tensors: object, path: Path, metadata: object) -> None:
        calls.append(path)
        save(tensors, path, metadata)
        if len(calls) == call:
            path.write_bytes(path.read_bytes()[:100])
            raise error

    return stopping
