"""Checkpoints that several files here load."""

from pathlib import Path
from typing import Any

import pytest
from tiny_models import write_checkpoint


@pytest.fixture(scope="module")
def mixtures(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Directories of checkpoints, each written once."""
    written: dict[str, Path] = {}

    def directory_of(name: str) -> Path:
        if name not in written:
            written[name] = write_checkpoint(name, tmp_path_factory.mktemp(name), shards=1)
        return written[name]

    return directory_of
