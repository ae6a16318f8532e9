"""The command line as a fixture, and checkpoints to damage."""

import io
import json
import logging
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_models import CHAT_TEMPLATE, write_tokenizer

from griffin_offload import GriffinModel
from griffin_offload.blocks.model_shape import ModelParts
from griffin_offload.blocks.sizes import ModelSizes
from griffin_offload.cli import inspect_text
from griffin_offload.cli.main import main
from griffin_offload.engine import precisions, spec
from griffin_offload.engine.convert import convert as convert_checkpoint


@dataclass(frozen=True)
class Outcome:
    """What one command did."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> dict[str, Any]:
        """stdout is one line of strict JSON."""
        assert self.out.count("\n") == 1
        return json.loads(self.out, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))


class CommandLine:
    """`cli(...)` runs `griffin-offload ...` in this process; everything it writes is seen, loggers included."""

    def __init__(self, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
        self._capsys, self._monkeypatch = capsys, monkeypatch

    def __call__(self, *arguments: object, stdin: str | bytes | None = None) -> Outcome:
        if stdin is not None:
            raw = stdin if isinstance(stdin, bytes) else stdin.encode()
            self._monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(raw), encoding="utf-8"))
        # As in a process of its own: no earlier command has made it quiet, and it writes to this stderr.
        logger = logging.getLogger("transformers")
        logger.setLevel(logging.WARNING)
        self._monkeypatch.setattr(logger, "handlers", [logging.StreamHandler(sys.stderr)])
        self._capsys.readouterr()
        try:
            code = main([str(argument) for argument in arguments])
        except SystemExit as leaving:  # argparse
            code = leaving.code
        return Outcome(code, *self._capsys.readouterr())

    def refuses(self, code: int, words: str, *arguments: object, stdin: str | bytes | None = None) -> str:
        """The command fails with `code`, nothing on stdout and one line on stderr, which matches `words`."""
        outcome = self(*arguments, stdin=stdin)
        assert (outcome.code, outcome.out) == (code, ""), outcome
        assert re.fullmatch(r"griffin-offload: error: [^\n]+\n", outcome.err), outcome.err
        assert re.search(words, outcome.err, re.IGNORECASE), outcome.err
        return outcome.err

    def refuses_usage(self, words: str, *arguments: object) -> None:
        """argparse refuses: usage lines and an error, exit code 2."""
        outcome = self(*arguments)
        assert (outcome.code, outcome.out) == (2, ""), outcome
        assert outcome.err.startswith("usage: griffin-offload")
        assert re.search(words, outcome.err.splitlines()[-1]), outcome.err
        assert ": error: " in outcome.err.splitlines()[-1]


@pytest.fixture(scope="module", autouse=True)
def _one_child(one_child: None) -> None:
    """Most questions to tokenizers are answered without a fork."""


@pytest.fixture(autouse=True)
def _offline(monkeypatch: pytest.MonkeyPatch):
    import huggingface_hub.constants

    monkeypatch.delenv("GRIFFIN_OFFLOAD_MODEL", raising=False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)


@pytest.fixture(autouse=True)
def _loggers() -> Iterator[None]:
    """What a command does to the loggers of this process ends with its test."""
    names = ("griffin_offload", "transformers", "uvicorn", "uvicorn.error", "asyncio")
    before = [(logger, logger.level, logger.handlers, logger.propagate) for logger in map(logging.getLogger, names)]
    yield
    for logger, level, handlers, propagate in before:
        logger.setLevel(level)
        logger.handlers, logger.propagate = handlers, propagate


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> CommandLine:
    return CommandLine(capsys, monkeypatch)


@pytest.fixture
def lengths(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """Tokens of the prompt and the answer, of everything that is generated."""
    seen = []
    generate = GriffinModel.generate

    def counted(self: GriffinModel, prompt: torch.Tensor, **options: Any) -> Any:
        output = generate(self, prompt, **options)
        seen.append((prompt.shape[1], output.shape[1] - prompt.shape[1]))
        return output

    monkeypatch.setattr(GriffinModel, "generate", counted)
    return seen


@pytest.fixture(scope="session")
def llama(checkpoints: Callable[..., Path]) -> Path:
    """A Llama of three layers in several shards, with a tokenizer without chat template."""
    return checkpoints("llama2")


@pytest.fixture(scope="session")
def chat(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same model with a chat template."""
    directory = tmp_path_factory.mktemp("chat") / "model"
    shutil.copytree(llama, directory)
    write_tokenizer(directory, CHAT_TEMPLATE)
    return directory


@pytest.fixture
def copy(llama: Path, tmp_path: Path) -> Path:
    """A copy of `llama` that a test may damage."""
    return Path(shutil.copytree(llama, tmp_path / "copy"))


@pytest.fixture
def edit() -> Callable[..., None]:
    """`edit(file, key=value)` changes a JSON file."""

    def edit(file: Path, **changes: object) -> None:
        file.write_text(json.dumps(json.loads(file.read_text()) | changes))

    return edit


@pytest.fixture
def process(tmp_path: Path) -> Callable[..., Outcome]:
    """`process(...)` runs the interpreter in a process of its own, offline and with an empty hub cache."""

    def run(*arguments: object, **variables: str) -> Outcome:
        environment = os.environ | {"HF_HOME": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
        command = [sys.executable, *(str(argument) for argument in arguments)]
        done = subprocess.run(command, env=environment | variables, capture_output=True, text=True, timeout=300)
        return Outcome(done.returncode, done.stdout, done.stderr)

    return run


@pytest.fixture(scope="module")
def measured_once() -> Iterator[None]:
    """Plans of one config in one module are solved from sizes that are measured once, of a model that is built once."""
    sizes: dict[tuple[object, ...], ModelSizes] = {}
    built: dict[tuple[object, ...], Any] = {}
    measure, build = precisions.model_shape, spec.build_on_meta

    def built_once(config: Any, dtype: torch.dtype) -> Any:
        key = (config.to_json_string(), dtype)
        if key not in built:
            built[key] = build(config, dtype)
        return built[key]

    def known(meta: Any, *formats: Any, **more: Any) -> ModelSizes:
        # The parts are the model's own; `held` is a table of sets, and not every argument can be a key.
        asked = (repr(one) for one in (*formats, *more.items()) if not isinstance(one, ModelParts))
        key = (meta.config.to_json_string(), meta.dtype, *asked)
        if key not in sizes:
            sizes[key] = measure(meta, *formats, **more)
        return sizes[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(precisions, "model_shape", known)
        patch.setattr(spec, "build_on_meta", built_once)
        yield


@pytest.fixture(scope="session")
def converted(checkpoints: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`converted(name, precision, dtype)` is the directory of a converted tiny checkpoint, which no test may change."""
    written: dict[tuple[object, ...], Path] = {}

    def convert(name: str, precision: str, dtype: torch.dtype = torch.float32) -> Path:
        key = (name, precision, dtype)
        if key not in written:
            written[key] = tmp_path_factory.mktemp(f"{name}-{precision}") / "model"
            convert_checkpoint(checkpoints(name, dtype), written[key], precision)
        return written[key]

    return convert


@pytest.fixture
def made(converted: Callable[..., Path], tmp_path: Path) -> Path:
    """A converted Llama that a test may damage."""
    return Path(shutil.copytree(converted("llama2", "int8"), tmp_path / "made"))


@pytest.fixture
def change_tensor() -> Callable[..., None]:
    """`change_tensor(directory, key, harm)` changes or removes one tensor, in its shard and the index."""

    def change(directory: Path, key: str, harm: Callable[[torch.Tensor], torch.Tensor | None]) -> None:
        index_file = directory / "model.safetensors.index.json"
        index = json.loads(index_file.read_text())
        path = directory / index["weight_map"][key]
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata()
        tensors = load_file(path)
        changed = harm(tensors.pop(key))
        if changed is None:
            del index["weight_map"][key]
        else:
            tensors[key] = changed
        save_file(tensors, path, metadata)
        index_file.write_text(json.dumps(index))

    return change


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of figures that are made and not drawn, for tests of numbers: drawing takes longer than a tiny model."""
    from matplotlib.figure import Figure

    made = list[str]()

    def make_only(make: Callable[[], Any], directory: Path, name: str) -> list[Path]:
        assert isinstance(make(), Figure)
        made.append(name)
        return []

    monkeypatch.setattr(inspect_text, "draw", make_only)
    return made
