"""A model whose files change: no prompt is answered from a mixture, and nothing of a failed pass stays."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from marks import mostly_slow
from tiny_models import VOCAB

from griffin_offload import GriffinModel
from griffin_offload.blocks.base import hooks_on
from griffin_offload.engine import load as loading
from griffin_offload.engine.model_interface import Guard
from griffin_offload.errors import CheckpointChanged
from griffin_offload.offload import weight_store

SHARDS = ("model-00001-of-00003.safetensors", "model-00002-of-00003.safetensors")


def in_place(_: pytest.MonkeyPatch) -> dict[str, Any]:
    return {}


def through_slots(_: pytest.MonkeyPatch) -> dict[str, Any]:
    return {"dtype": "bfloat16"}


def read_directly(patch: pytest.MonkeyPatch) -> dict[str, Any]:
    patch.setattr(weight_store, "MIN_DIRECT_BYTES", 0)
    patch.setattr(loading, "evicts", lambda model_spec: True)
    return {}


def in_ram(_: pytest.MonkeyPatch) -> dict[str, Any]:
    return {"offload": "ram"}


TIERS = (in_place, through_slots, read_directly)


@pytest.fixture
def directory(checkpoints, tmp_path: Path) -> Path:
    return Path(shutil.copytree(checkpoints("llama2"), tmp_path / "model"))


def make(directory: Path, **options: object) -> GriffinModel:
    defaults = {"device": "cpu", "max_gpu_mem": "10MB", "density": 0.5, "ctx_size": 64}
    return GriffinModel.from_pretrained(directory, **(defaults | options))


def answer(model: GriffinModel, seed: int = 1) -> torch.Tensor:
    ids = torch.randint(3, VOCAB, (1, 40), generator=torch.Generator().manual_seed(seed))
    return model.generate(ids, max_new_tokens=10, do_sample=False)


def hooks(model: GriffinModel) -> list[Any]:
    modules = list(model.model.modules())
    found = [hook for m in modules for hook in hooks_on(m)]
    return [hook for hook in found if not isinstance(hook, Guard)]


def cut(path: Path) -> None:
    os.truncate(path, 4096)


def overwrite(path: Path) -> None:
    with path.open("rb+") as file:
        file.seek(path.stat().st_size // 2)
        file.write(bytes(4096))
    os.utime(path, ns=(0, 1))  # as if a tick of the clock had passed


def delete(path: Path) -> None:
    path.unlink()


def replace(path: Path) -> None:
    beside = path.with_name("beside")
    beside.write_bytes(path.read_bytes())
    beside.replace(path)


@pytest.mark.parametrize("change", [cut, overwrite, delete, replace])
@pytest.mark.parametrize("tier", mostly_slow(TIERS, 1))
def test_between_two_prompts(directory: Path, monkeypatch: pytest.MonkeyPatch, tier, change):
    model = make(directory, **tier(monkeypatch))
    answer(model)
    change(directory / SHARDS[1])
    for _ in range(2):
        with pytest.raises(CheckpointChanged, match=f"{SHARDS[1]} has changed since it was loaded"):
            answer(model, 2)
        assert not hooks(model)
        assert model.last_prefill is None
    model.close()


@pytest.mark.parametrize(
    ("change", "told", "layer"), [(cut, True, 1), (overwrite, True, 2), (delete, False, 1), (replace, False, 2)]
)
@pytest.mark.parametrize("tier", mostly_slow(TIERS, 1))
def test_in_the_middle_of_a_pass(
    directory: Path, monkeypatch: pytest.MonkeyPatch, tier, change, told: bool, layer: int
):
    """What is mapped of a deleted file is still right: that pass ends well, and the next one says so."""
    model = make(directory, **tier(monkeypatch))
    expected = answer(model)

    def progress(done: int, _: int) -> None:
        if done == layer:
            change(directory / SHARDS[1])

    model.progress = progress
    if told:
        with pytest.raises(CheckpointChanged):
            answer(model)
    else:
        assert torch.equal(answer(model), expected)
    model.progress = None
    assert not hooks(model)
    with pytest.raises(CheckpointChanged):
        answer(model)
    model.close()


@pytest.mark.parametrize("change", [cut, overwrite, delete, replace])
def test_weights_in_ram_need_no_file(directory: Path, monkeypatch: pytest.MonkeyPatch, change):
    model = make(directory, **in_ram(monkeypatch))
    expected = answer(model)
    for shard in SHARDS:
        change(directory / shard)
    assert torch.equal(answer(model), expected)


@pytest.mark.parametrize(
    "moment", mostly_slow(("check_free_memory", "compact_blocks", "make_scratch", "resident_bytes"), 2)
)
@pytest.mark.parametrize("change", [cut, delete])  # what is mapped changes, or stays: test_between_two_prompts has all
def test_while_it_is_loaded(
    directory: Path, monkeypatch: pytest.MonkeyPatch, moment: str, change: Callable[[Path], None]
):
    """From before the first weight is mapped to after the last one was copied; loaded again, it is right."""
    kept = Path(shutil.copytree(directory, directory.with_name("kept")))
    expected = answer(make(kept))
    original = getattr(loading, moment)

    def changed(*arguments: Any) -> Any:
        change(directory / SHARDS[0])
        return original(*arguments)

    before = len(os.listdir("/proc/self/fd"))
    with monkeypatch.context() as patch:
        patch.setattr(loading, moment, changed)
        with pytest.raises(CheckpointChanged, match=SHARDS[0]):
            make(directory)
    assert len(os.listdir("/proc/self/fd")) == before
    shutil.copyfile(kept / SHARDS[0], directory / SHARDS[0])
    assert torch.equal(answer(make(directory)), expected)


def test_neurons_of_a_kept_prompt_are_gathered_anew(directory: Path):
    """Without a pass: the rows come from the files, too."""
    model = make(directory, keep_prompts=True)
    first, second = model.new_context(), model.new_context()
    ids = torch.randint(3, VOCAB, (1, 20), generator=torch.Generator().manual_seed(3))
    for context in (first, second):
        model.generate(ids.flip(1) if context is second else ids, max_new_tokens=2, do_sample=False, context=context)
    overwrite(directory / SHARDS[1])
    with pytest.raises(CheckpointChanged):
        model.generate(ids, max_new_tokens=2, do_sample=False, context=first)


def test_embeddings_on_the_host(directory: Path, monkeypatch: pytest.MonkeyPatch):
    """They are looked up in their file for every token."""
    from griffin_offload.engine.residents import HostEmbedding

    model = make(directory, offload="ram")
    embedding = HostEmbedding(
        loading.build(model.engine.model_spec.checkpoint).get_input_embeddings(), torch.device("cpu"), torch.float32
    )
    module = torch.nn.Embedding(4, 4)
    assert embedding.pages.files.descriptors
    overwrite(Path(next(iter(embedding.pages.files.descriptors))))
    with pytest.raises(CheckpointChanged):
        embedding.to_device(module, (), torch.ones(1))
    embedding.close()
