"""Checkpoints that several files here load."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from loaded_model import load
from tiny_models import write_checkpoint

from griffin_offload import GriffinModel


@pytest.fixture(scope="module", autouse=True)
def _one_child(one_child: None) -> None:
    """Most questions to tokenizers are answered without a fork."""


@pytest.fixture(scope="module")
def mixtures(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Directories of checkpoints, each written once."""
    written: dict[str, Path] = {}

    def directory_of(name: str) -> Path:
        if name not in written:
            written[name] = write_checkpoint(name, tmp_path_factory.mktemp(name), shards=1)
        return written[name]

    return directory_of


@pytest.fixture(scope="module")
def model_of(checkpoints) -> Iterator[Callable[..., GriffinModel]]:
    """`model_of(name, **options)`: the same one for the same words; whole unless they say another density."""
    loaded: dict[str, GriffinModel] = {}

    def model(name: str, **options: Any) -> GriffinModel:
        key = f"{name} {options}"
        if key not in loaded:
            loaded[key] = load(checkpoints(name), **{"density": 1.0, **options})
        return loaded[key]

    yield model
    for one in loaded.values():
        one.close()
