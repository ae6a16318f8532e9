"""Checkpoints that several tests share, written once."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # of the processes that tests start, too: several tests run at once
os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # else threads without work take a core that a test waits for

import contextlib
import gc
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from fork_server import ForkServer
from hypothesis import settings

# torch and transformers are imported where they are used: the process that hands out tests (`-n 2`) loads this file
# before it starts those that run them, and has nobody else to import for.
if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig

    from griffin_offload.blocks.model_shape import ModelParts
    from griffin_offload.devices.base import Device
    from griffin_offload.transformers_api import StockModel

# A busy machine is no failure: nothing here is judged by time. One tree gives one verdict; whoever looks for new faults
# sets GRIFFIN_ROBUSTNESS, and each run draws others.
OTHER_DRAWS = "GRIFFIN_ROBUSTNESS" in os.environ
settings.register_profile("ours", deadline=None, derandomize=not OTHER_DRAWS, max_examples=100 if OTHER_DRAWS else 60)
settings.load_profile("ours")
# Whoever starts the tests in the background has SIGINT ignored, and their processes inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)

Checkpoints = Callable[..., Path]
CACHE_VARIABLE = "GRIFFIN_OFFLOAD_CACHE"
MOST_BUILT = 160


def pytest_collection_finish() -> None:
    """Half a million objects of libraries stay for ever: no later collection need look at them."""
    import torch

    torch.set_num_threads(1)
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def _own_cache() -> Iterator[None]:
    """Nothing is left in the cache of whoever runs the tests, nor found there, also by processes that tests start."""
    place, before = tempfile.mkdtemp(), os.environ.get(CACHE_VARIABLE)
    os.environ[CACHE_VARIABLE] = place
    yield
    os.environ.pop(CACHE_VARIABLE)
    if before is not None:
        os.environ[CACHE_VARIABLE] = before
    shutil.rmtree(place, ignore_errors=True)


@pytest.fixture(scope="session", autouse=True)
def _built_once() -> Iterator[None]:
    """A model on the meta device, of which plans measure sizes and which nobody changes, is built once for each config,
    and its parts are found once: a fourth of what loading a tiny model takes."""
    spec = sys.modules.get("griffin_offload.engine.spec")
    if spec is None:  # no test of those that were collected loads a model
        yield
        return
    from griffin_offload.blocks import layouts
    from griffin_offload.engine import precisions

    built: dict[tuple[object, ...], object] = {}
    parts: dict[tuple[object, ...], ModelParts] = {}
    build, part = spec.build_on_meta, precisions.parts_of

    def built_once(config: "PreTrainedConfig", dtype: "torch.dtype") -> object:
        key = (type(config), repr(config.to_dict() | {"_name_or_path": ""}), dtype)
        if key not in built:
            if len(built) == MOST_BUILT:
                built.clear()
                parts.clear()
            built[key] = build(config, dtype)
        return built[key]

    def parted_once(model: "StockModel") -> "ModelParts":
        key = (id(model), *layouts.FINDERS, *layouts.LAYOUTS)  # as tests register others for a while
        if key not in parts and any(model is own for own in built.values()):
            parts[key] = part(model)
        return parts.get(key) or part(model)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(spec, "build_on_meta", built_once)
        patch.setattr(precisions, "parts_of", parted_once)
        yield


@pytest.fixture(scope="module")
def one_child() -> Iterator[None]:
    """The first question to a tokenizer in a module is answered by a child, as all are outside of tests, and the others
    by this process: it has grown so large that a fork of it takes longer than a tiny model's answer. What children are
    for, questions that do not end or want all memory, tests/checkpoint/test_tokenizer.py and its neighbours ask."""
    from griffin_offload.checkpoint import tokenizer
    from griffin_offload.errors import CheckpointError, one_line

    bounded, asked = tokenizer.bounded, []

    def here(work: Callable[[], Sequence[int]], letters: int) -> list[int]:
        if not asked:
            asked.append(letters)
            return bounded(work, letters)
        try:
            return list(work())
        except Exception as error:
            raise CheckpointError(one_line(error)) from error

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokenizer, "bounded", here)
        yield


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Checkpoints:
    """`checkpoints(name, dtype, shards)` is the directory of a tiny checkpoint with a tokenizer."""
    import torch
    from tiny_models import write_checkpoint, write_tokenizer

    written: dict[tuple[str, torch.dtype, int], Path] = {}

    def checkpoint(name: str, dtype: torch.dtype = torch.float32, shards: int = 2) -> Path:
        key = (name, dtype, shards)
        if key not in written:
            directory = tmp_path_factory.mktemp(name)
            write_checkpoint(name, directory, dtype, shards)
            write_tokenizer(directory)
            written[key] = directory
        return written[key]

    return checkpoint


@pytest.fixture(scope="session")
def fork_server() -> Iterator[ForkServer]:
    with contextlib.closing(ForkServer()) as server:
        yield server


@pytest.fixture
def forks(fork_server: ForkServer) -> Iterator[ForkServer]:
    """Processes without the seconds that imports take; those that a test leaves are killed."""
    if not sys.platform.startswith("linux"):
        pytest.skip("processes with threads are forked on Linux alone")
    yield fork_server
    fork_server.end_all()


@pytest.fixture
def register_device() -> Iterator[Callable[[type["Device"]], None]]:
    """`register_device(kind)` is the registry's, until the test ends."""
    from griffin_offload.devices import registry

    kinds: list[type[Device]] = []

    def register(kind: type["Device"]) -> None:
        registry.register_device(kind)
        kinds.append(kind)

    yield register
    for kind in kinds:
        registry.unregister_device(kind)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """`small_disk("200k")` is a file system of that size, mounted or made larger; only root may do that."""
    place = tmp_path / "disk"
    place.mkdir()

    def resize(size: str) -> Path:
        options = f"remount,size={size}" if os.path.ismount(place) else f"size={size}"
        try:
            command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(place)]
            subprocess.run(command, check=True, capture_output=True, text=True)
        except (OSError, subprocess.CalledProcessError) as error:
            pytest.skip(f"no small file system can be mounted here: {getattr(error, 'stderr', '') or error}")
        return place

    yield resize
    if os.path.ismount(place):
        subprocess.run(["umount", str(place)], check=True)
