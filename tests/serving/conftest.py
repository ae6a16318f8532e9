"""Servers in threads of this process, with the real socket, and clients for them."""

import contextlib
import json
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import torch
from tiny_models import CHAT_TEMPLATE, VOCAB, write_checkpoint, write_tokenizer

from griffin_offload import DoesNotFit, GriffinModel
from griffin_offload.config import LoadConfig, ServeConfig
from griffin_offload.engine.spec import examine, plan_for
from griffin_offload.serving.queue import Job
from griffin_offload.serving.server import Server

NAME = "tiny"
END = VOCAB - 1  # which nothing but a script says
OPTIONS = {"device": "cpu", "max_gpu_mem": "1GB", "density": 0.5, "ctx_size": 200}
LONGEST_S = 300  # how busy the machine may be


class Running:
    """A server that answers, and ways to ask it."""

    def __init__(self, server: Server) -> None:
        self.server, self.url = server, server.url
        self.http = httpx.Client(base_url=server.url, timeout=LONGEST_S, verify=False)  # no certificates to read

    def client(self, key: str = "unused") -> openai.OpenAI:
        quick = openai.DefaultHttpxClient(verify=False)
        url = f"{self.url}/v1"
        return openai.OpenAI(base_url=url, api_key=key, max_retries=0, timeout=LONGEST_S, http_client=quick)

    def post(self, body: Any, path: str = "/v1/completions", **options: Any) -> httpx.Response:
        return self.http.post(path, json=body, **options)

    def metric(self, name: str, **labels: str) -> float:
        found = self.server.metrics.registry.get_sample_value(f"griffin_offload_{name}", labels or None)
        assert found is not None or labels, name
        return found or 0.0  # labels come to be when they are counted first


@contextlib.contextmanager
def running(directory: Path, options: dict[str, Any] | None = None, **config: Any) -> Iterator[Running]:
    """A server on a free port, and its clean end."""
    config = {"port": 0, "served_name": NAME, "shutdown_grace_s": 2.0, **config}
    server = Server(directory, OPTIONS | (options or {}), ServeConfig(**config))
    ready = threading.Event()
    try:
        server.load()
        thread = threading.Thread(target=server.run, args=(ready.set,), name="uvicorn")
        thread.start()
        assert ready.wait(LONGEST_S)
        started = Running(server)
        try:
            yield started
        finally:
            started.http.close()
            server.stop()
            thread.join(LONGEST_S)
            assert not thread.is_alive()
    finally:
        assert server.close()


@pytest.fixture(scope="module", autouse=True)
def _one_child(one_child: None) -> None:
    """Most questions to tokenizers are answered without a fork."""


@pytest.fixture(scope="session")
def chatty(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with an end of sequence and a chat template, which wants a question first."""
    directory = tmp_path_factory.mktemp("chatty")
    write_checkpoint("llama2", directory)
    settings = directory / "generation_config.json"
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"eos_token_id": END}))
    refusal = "{% if messages[0]['role'] == 'assistant' %}{{ raise_exception('an answer comes first') }}{% endif %}"
    write_tokenizer(directory, refusal + CHAT_TEMPLATE)
    return directory


@pytest.fixture(scope="session")
def tiny(chatty: Path) -> Iterator[Running]:
    """One server that many tests ask."""
    with running(chatty) as started:
        yield started


@pytest.fixture(scope="session")
def serve_one() -> Callable[..., "contextlib.AbstractContextManager[Running]"]:
    """`with serve_one(directory, options, **config)`: a server of one's own."""
    return running


@pytest.fixture(scope="session")
def serving() -> Callable[..., "contextlib.AbstractContextManager[Running]"]:
    """As `serve_one`, for servers of a whole file."""
    return running


@pytest.fixture(scope="session")
def client(tiny: Running) -> Iterator[openai.OpenAI]:
    with tiny.client() as found:
        yield found


@pytest.fixture(scope="session")
def model(chatty: Path) -> Iterator[GriffinModel]:
    """The same model without a server."""
    with GriffinModel.from_pretrained(chatty, **OPTIONS, keep_prompts=True) as loaded:
        yield loaded


@pytest.fixture(scope="session")
def smallest_budget(chatty: Path) -> int:
    """The fewest bytes that hold half of the neurons in the stored precision, beside a KV cache in 16 bits."""
    options = OPTIONS | {"keep_prompts": True, "quantize": "none", "kv_bits": 16}
    budget = 10**9
    with contextlib.suppress(DoesNotFit):
        while True:
            budget = plan_for(examine(chatty, LoadConfig(**options | {"max_gpu_mem": budget - 1}))).peak_bytes
    return budget


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Semaphore]:
    """Every token waits for a `release` of it; what is left goes on at the end."""
    permits, over = threading.Semaphore(0), threading.Event()
    count = Job.token

    def token(job: Job) -> None:
        count(job)
        while not over.is_set() and not job.cancelled and not permits.acquire(timeout=0.01):
            pass

    monkeypatch.setattr(Job, "token", token)
    yield permits
    over.set()


@pytest.fixture
def jobs(monkeypatch: pytest.MonkeyPatch, gate: threading.Semaphore) -> list[Job]:
    """The job of every token so far."""
    seen: list[Job] = []
    gated = Job.token

    def token(job: Job) -> None:
        seen.append(job)
        gated(job)

    monkeypatch.setattr(Job, "token", token)
    return seen


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch, model: GriffinModel) -> Callable[[list[int]], None]:
    """`script(tokens)`: whatever is asked, these are generated, by a model that does nothing else."""

    def say(tokens: list[int]) -> None:
        def generate(self: GriffinModel, ids: torch.Tensor, **options: Any) -> torch.Tensor:
            model_report = real(self, ids, **{**options, "stopping_criteria": None, "max_new_tokens": 1})
            sequence = ids
            for token in tokens[: options["max_new_tokens"]]:
                sequence = torch.cat([sequence, torch.tensor([[token]])], dim=1)
                if bool(options["stopping_criteria"](sequence, None).all()):
                    break
            return model_report

        monkeypatch.setattr(GriffinModel, "generate", generate)

    real = GriffinModel.generate
    return say
