"""Checkpoints that several tests share, written once."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import settings
from tiny_models import write_checkpoint, write_tokenizer

torch.set_num_threads(1)
# A busy machine is no failure: nothing here is judged by time.
settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")

Checkpoints = Callable[..., Path]


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Checkpoints:
    """`checkpoints(name, dtype, shards)` is the directory of a tiny checkpoint with a tokenizer."""
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
