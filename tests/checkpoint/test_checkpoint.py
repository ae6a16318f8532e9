"""Where a model is found: directories, files, the hub's cache."""

from pathlib import Path

import pytest
import torch

from griffin_offload import GriffinModel
from griffin_offload.checkpoint.registry import open_checkpoint
from griffin_offload.errors import ModelNotFound


@pytest.fixture
def hub_cache(checkpoints, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A hub cache that holds org/tiny as huggingface_hub lays it out: links to files named by hash."""
    repository = tmp_path / "models--org--tiny"
    snapshot = repository / "snapshots" / "c0ffee"
    for folder in ("blobs", "refs", "snapshots/c0ffee"):
        (repository / folder).mkdir(parents=True)
    (repository / "refs" / "main").write_text("c0ffee")
    for number, file in enumerate(sorted(checkpoints("llama2").iterdir())):
        blob = repository / "blobs" / f"{number:040x}"
        blob.write_bytes(file.read_bytes())
        (snapshot / file.name).symlink_to(f"../../blobs/{blob.name}")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub._snapshot_download.HF_HUB_CACHE", str(tmp_path), raising=False)
    return tmp_path


def test_a_hub_id_is_found_offline_and_streams_from_the_cache(hub_cache: Path):
    model = GriffinModel.from_pretrained(
        "org/tiny", offline=True, device="cpu", max_gpu_mem="100MB", density=0.5, ctx_size=32
    )
    assert model.directory.is_relative_to(hub_cache)
    source = model.engine.loaded.layers.source
    assert source.unmapped_bytes == 0
    model.generate(torch.arange(3, 23)[None], max_new_tokens=4, do_sample=False)
    assert model.last_report.decode_streamed_bytes == 0


def test_an_unknown_hub_id_is_not_found(hub_cache: Path):
    with pytest.raises(ModelNotFound, match="org/other was not found in the local hub cache"):
        open_checkpoint("org/other", offline=True)


@pytest.mark.parametrize("shards", [1, 2])
def test_stored_precision_and_files(checkpoints, shards: int):
    checkpoint = open_checkpoint(checkpoints("llama2", torch.bfloat16, shards))
    assert checkpoint.dtype == torch.bfloat16
    assert (len(checkpoint.files) == 1) == (shards == 1)
    assert checkpoint.weight_bytes == sum(file.stat().st_size for file in checkpoint.files) - _headers(checkpoint.files)


def _headers(files: tuple[Path, ...]) -> int:
    return sum(8 + int.from_bytes(file.read_bytes()[:8], "little") for file in files)
