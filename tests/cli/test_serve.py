"""`griffin-offload serve` as a process: start, answers, signals, and what it refuses."""

import json
import signal
import socket
import weakref
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from fork_server import ForkServer

from griffin_offload.cli.main import build_parser
from griffin_offload.cli.serve import serve_config
from griffin_offload.config import ServeConfig

BODY = {"model": "model", "prompt": "the cat sat", "max_tokens": 5, "temperature": 0}
OPTIONS = ("--port", 0, "--device", "cpu", "--density", 0.5, "--max-mem", "1GB", "--ctx-size", 200)
KEY = "sk-a-secret"


class Process:
    """A server in a process of its own; `url` once it answers."""

    def __init__(self, forks: ForkServer, *arguments: object, **variables: str) -> None:
        self.process = forks.start("-m", "griffin_offload", "serve", "--json", *OPTIONS, *arguments, **variables)
        while "\n" not in self.process.out:
            assert self.process.wait(0.01) is None, self.process.err
        self.ready = json.loads(self.process.out)
        self.url = self.ready["url"]

    def post(self, **options: Any) -> httpx.Response:
        return httpx.post(f"{self.url}/v1/completions", **{"json": BODY, "timeout": 30, **options})

    def end(self, number: int) -> tuple[int, str]:
        """Exit code and stderr after a signal."""
        self.process.send_signal(number)
        code = self.process.wait(30)
        assert code is not None
        return code, self.process.err


@pytest.fixture
def start(forks: ForkServer) -> Callable[..., Process]:
    return partial(Process, forks)


def test_a_process_answers_the_openai_client_and_ends_by_sigterm(start, chat: Path):
    """And its log says nothing of what was said, nor where the model is."""
    server = start("-m", chat, GRIFFIN_OFFLOAD_API_KEY=KEY)
    assert (server.ready["model"], server.ready["plan"]["density"]) == ("model", 0.5)
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key=KEY, max_retries=0) as client:
        assert [model.id for model in client.models.list()] == ["model"]
        messages: Any = [{"role": "user", "content": "a private river"}]
        chunks = client.chat.completions.create(model="model", messages=messages, max_tokens=5, stream=True)
        assert [chunk.choices[0].finish_reason for chunk in chunks][-1] in ("length", "stop")
    assert server.post().status_code == 401
    httpx.get(f"{server.url}/private/path", headers={"authorization": f"Bearer {KEY}"})
    code, err = server.end(signal.SIGTERM)
    assert code == 0
    lines = err.splitlines()
    assert lines[0].startswith(f"griffin-offload: model on {server.url}/v1: float32, density 0.50, context 200 tokens")
    said = ["models 200 ok", "chat 200 ok", "completions 401 refused", "other 404 refused"]
    assert [line.split(" in ")[0] for line in lines[1:-1]] == [f"griffin-offload: {what}" for what in said]
    assert lines[-1] == "griffin-offload: stopped"
    assert not any(word in err for word in ("private", KEY, str(chat)))


def test_a_verbose_log_has_paths_but_no_words_and_ctrl_c_is_130(start, chat: Path):
    server = start("-m", chat, "-v")
    assert server.post(json=BODY | {"prompt": "a private river"}).status_code == 200
    httpx.get(f"{server.url}/some/path")
    code, err = server.end(signal.SIGINT)
    assert code == 130
    assert "GET /some/path" in err
    assert "feed forward" in err  # the plan
    assert "private" not in err
    assert "Traceback" not in err


def test_signals_in_the_middle_of_a_stream(start, chat: Path):
    """The client is told when the grace is over; a second Ctrl-C changes nothing."""
    server = start("-m", chat, "-q", "--shutdown-grace", "0.001")
    body = BODY | {"stream": True, "max_tokens": 190}
    with httpx.stream("POST", f"{server.url}/v1/completions", json=body, timeout=30) as answer:
        lines = answer.iter_lines()
        next(lines)
        server.process.send_signal(signal.SIGINT)
        rest = [line for line in lines if line.startswith("data: {")]
    assert '"code":"shutting_down"' in rest[-1]
    assert server.end(signal.SIGINT) == (130, "")


def test_the_command_does_not_hold_the_model_itself(cli, chat: Path, monkeypatch: pytest.MonkeyPatch):
    """Or an idle unload would free nothing, and the next request would load it a second time."""
    from griffin_offload.serving.server import Server

    def run(server: Server, ready: Callable[[], None]) -> int:
        ready()
        keeper = server.worker.manager
        assert keeper.held is not None
        loaded = weakref.ref(keeper.held.model)
        keeper.unload()
        assert loaded() is None
        return signal.SIGTERM

    monkeypatch.setattr(Server, "run", run)
    assert cli("serve", "-m", chat, *OPTIONS).code == 0


def test_what_is_refused_before_loading(cli, chat: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from griffin_offload.engine import load

    monkeypatch.setattr(load, "load", lambda *_: pytest.fail("loaded"))
    cli.refuses(2, "no API key: set GRIFFIN_OFFLOAD_API_KEY", "serve", "-m", chat, "--host", "0.0.0.0")
    empty = tmp_path / "key"
    empty.write_text("\n")
    cli.refuses(2, "no usable key", "serve", "-m", chat, "--api-key-file", empty)
    cli.refuses(2, "cannot read --api-key-file", "serve", "-m", chat, "--api-key-file", tmp_path / "none")
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        cli.refuses(2, f"cannot listen on 127.0.0.1 port {port}", "serve", "-m", chat, "--port", port)
    cli.refuses(2, "port is 70000", "serve", "-m", chat, "--port", 70000)
    cli.refuses(2, "queue_size is 0", "serve", "-m", chat, "--queue-size", 0)
    cli.refuses(2, "cannot read the size", "serve", "-m", chat, "--max-body", "much")
    cli.refuses(
        2, "cannot listen", "serve", "-m", chat, "--host", "no.such.host.invalid", "--api-key-file", _key(tmp_path)
    )
    cli.refuses(2, "--idle-unload: cannot read the time '10x'", "serve", "--idle-unload", "10x")


def _key(directory: Path) -> Path:
    file = directory / "good"
    file.write_text(f"{KEY}\n")
    file.chmod(0o600)
    return file


def test_a_key_file_that_everybody_can_read_is_named(cli, chat: Path, tmp_path: Path):
    """And nothing is read without end."""
    key = _key(tmp_path)
    for mode, said in (
        (0o600, ""),
        (0o440, ""),
        (0o644, "others can read --api-key-file (mode 644): chmod o= it"),
    ):
        key.chmod(mode)
        err = cli("serve", "--port", 0, "-m", tmp_path / "none", "--api-key-file", key).err
        assert (said in err) if said else ("--api-key-file" not in err)
        assert KEY not in err
    cli.refuses(2, "no usable key", "serve", "-m", chat, "--api-key-file", "/dev/zero")


def test_errors_of_loading_are_the_usual_ones(cli, chat: Path, tmp_path: Path):
    cli.refuses(4, "no directory", "serve", "--port", 0, "-m", tmp_path / "none")
    cli.refuses(3, "needs .* budget", "serve", "--port", 0, "-m", chat, "--device", "cpu", "--max-mem", "10kB")


def test_defaults_are_those_of_the_dataclass(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("GRIFFIN_OFFLOAD_API_KEY", raising=False)
    assert serve_config(build_parser().parse_args(["serve", "-m", "x"])) == ServeConfig()
    assert serve_config(build_parser().parse_args(["serve"])).served_name == "demo"


def test_flags_become_the_config(tmp_path: Path):
    flags = "--host ::1 --port 9 --served-name a --allow-host b --allow-host c --cors-origin * --queue-size 3"
    flags += " --idle-unload 10m --max-body 1kB --max-prompt-tokens 4 --max-output-tokens 5 --max-choices 6"
    flags += " --max-sessions 8 --request-timeout 2h --shutdown-grace 7 --max-connections 9"
    arguments = build_parser().parse_args(["serve", *flags.split(), "--api-key-file", str(_key(tmp_path))])
    assert serve_config(arguments) == ServeConfig(
        host="::1",
        port=9,
        served_name="a",
        api_key=KEY,
        allow_host=("b", "c"),
        cors_origin=("*",),
        queue_size=3,
        idle_unload_s=600.0,
        max_body="1kB",
        max_prompt_tokens=4,
        max_output_tokens=5,
        max_sessions=8,
        max_choices=6,
        request_timeout_s=7200.0,
        shutdown_grace_s=7.0,
        max_connections=9,
    )
