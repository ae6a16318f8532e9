"""A batch over a cluster: what an actor needs and says, and, where Ray is installed, the whole way with a death."""

import json
import pickle
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
from fork_server import ForkServer

from griffin_offload.checkpoint.registry import open_checkpoint
from griffin_offload.config import ServeConfig
from griffin_offload.errors import UsageError
from griffin_offload.serving.batch import Work, prepare, read_lines
from griffin_offload.serving.cluster import Answerer, Resources, resources_for
from griffin_offload.serving.tokenization import Encoder

OPTIONS: dict[str, Any] = {"device": "cpu", "threads": None, "max_gpu_mem": "1GB"}
MACHINE = {"CPU": 8.0, "GPU": 2.0, "memory": 10e9}


def _written(path: Path, count: int) -> Path:
    bodies = [
        {"model": "tiny", "max_tokens": 4, "temperature": 0, "prompt": "the cat " * (i + 1)} for i in range(count)
    ]
    lines = [
        {"custom_id": f"r{i}", "method": "POST", "url": "/v1/completions", "body": b} for i, b in enumerate(bodies)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def _works(model: Path, file: Path) -> list[Work]:
    checkpoint = open_checkpoint(model)
    encoder = Encoder(checkpoint.tokenizer(), checkpoint.config.get_text_config().vocab_size)
    return prepare(read_lines(file), encoder, "tiny", ServeConfig())[0]


def test_what_an_actor_needs():
    assert resources_for(OPTIONS, 4, [MACHINE]) == Resources(1, 0, 10**9)
    assert resources_for(OPTIONS, 16, [MACHINE]) == Resources(0.5, 0, 10**9)
    assert resources_for(OPTIONS | {"threads": 3}, 4, [MACHINE]).cpus == 3
    assert resources_for(OPTIONS | {"device": "auto"}, 4, [MACHINE, MACHINE]) == Resources(1, 1, 0)
    assert resources_for(OPTIONS | {"device": "xpu"}, 9, [MACHINE]) == Resources(8 / 9, 1, 0)
    assert resources_for(OPTIONS | {"device": "auto"}, 5, [MACHINE, MACHINE]) == Resources(1, 0, 10**9)
    for share in ("auto", "80%"):
        with pytest.raises(UsageError, match=f"{share} is a share.*give each worker's budget"):
            resources_for(OPTIONS | {"max_gpu_mem": share}, 4, [MACHINE])


@pytest.mark.parametrize(
    ("needed", "room"),
    [((1, 0, 10**9), 8), ((0.5, 0, 3 * 10**9), 3), ((1, 1, 0), 2), ((16, 0, 1), 0), ((0.1, 0, 1), 80)],
)
def test_how_many_find_room(needed: tuple[float, int, int], room: int):
    assert Resources(*needed).on(MACHINE) == room
    assert Resources(1, 1, 0).on({"CPU": 8.0, "memory": 1e9}) == 0


def test_an_actor_answers_or_says_why_not(llama: Path, tmp_path: Path):
    works = _works(llama, _written(tmp_path / "in", 3))
    table = {"work": [pickle.dumps(work) for work in works]}
    answered = Answerer(str(llama), {"device": "cpu", "max_gpu_mem": "1GB", "density": 0.5}, "tiny")(table)
    assert sorted(answered["custom_id"]) == ["r0", "r1", "r2"]
    assert (answered["status"], answered["tokens"]) == ([200] * 3, [4] * 3)
    assert all(json.loads(body)["model"] == "tiny" for body in answered["body"])
    small = Answerer(str(llama), {"device": "cpu", "max_gpu_mem": 1000}, "tiny")(table)
    assert small["status"] == [-1]
    said = json.loads(small["body"][0])
    assert said["exit_code"] == 3
    assert "budget 1.00 kB" in said["error"]


def test_flags(cli, llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    file, out = _written(tmp_path / "in", 1), tmp_path / "out"
    for flags in (("--workers", 2), ("--workers", 0, "--ray", "auto")):
        cli.refuses(2, f"--workers {flags[1]}: a number from 1, beside --ray", "batch", file, out, "-m", llama, *flags)
    monkeypatch.setitem(sys.modules, "ray", None)
    flags = ("-q", "-m", llama, "--served-name", "tiny", "--ray", "auto")
    cli.refuses(2, "--ray needs ray: pip install 'griffin-offload", "batch", file, out, *flags)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # Ray's own
def test_a_cluster_without_room(cli, llama: Path, tmp_path: Path):
    pytest.importorskip("ray.data", reason="Ray is not installed")
    file, out = _written(tmp_path / "in", 3), tmp_path / "out"
    options = ("-q", "-m", llama, "--device", "cpu", "--served-name", "tiny", "--ray", "auto", "--workers")
    for workers, words in ((1, "1 worker needs 1 CPU and 9000.0 TB"), (2, "2 workers need 1 CPU and 9000.0 TB each")):
        room = r"the cluster \(1 machine\) has room for 0: give a smaller --max-gpu-mem"
        cli.refuses(2, f"{words}, and {room}", "batch", file, out, *options, workers, "--max-mem", "9000TB")
    cli.refuses(3, "a worker stopped: needs .* budget 1.00 kB", "batch", file, out, *options, 2, "--max-mem", "1kB")
    assert out.read_bytes() == b""


@pytest.mark.slow
@pytest.mark.parametrize("workers", [2, 4])
def test_a_cluster_answers_what_one_machine_does(cli, forks: ForkServer, llama: Path, tmp_path: Path, workers: int):
    """Also where one of its actors is killed in the middle."""
    pytest.importorskip("ray.data", reason="Ray is not installed")
    file, out = _written(tmp_path / "in", 60), tmp_path / "out"
    options = ("-q", "-m", llama, "--device", "cpu", "--max-mem", "300MB", "--served-name", "tiny")
    cli("batch", file, tmp_path / "whole", *options)
    cli.refuses(2, "cannot reach a Ray cluster at 127.0.0.1:9: ", "batch", file, out, *options, "--ray", "127.0.0.1:9")
    process = forks.start("-m", "griffin_offload", "batch", file, out, *options, "--ray", "auto", "--workers", workers)
    killed = False
    while process.wait(0.05) is None:
        if not killed and out.exists() and out.read_bytes().count(b"\n") > 1:
            for one in psutil.process_iter(["cmdline"]):
                if any("MapWorker" in part for part in one.info["cmdline"] or ()):
                    one.kill()
                    killed = True
                    break
            time.sleep(0.1)
    assert process.wait(0) == 0
    assert killed
    assert _texts(out) == _texts(tmp_path / "whole")


def _texts(path: Path) -> dict[str, str]:
    found = {line["custom_id"]: line for line in map(json.loads, path.read_text().splitlines())}
    assert len(found) == path.read_bytes().count(b"\n")
    return {name: line["response"]["body"]["choices"][0]["text"] for name, line in found.items()}
