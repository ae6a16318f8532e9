"""Contexts in files: what is written comes back, and what cannot be ours is refused by name, changing nothing."""

import json
import os
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from marks import by_turns
from safetensors.torch import load_file, save_file
from tiny_models import VOCAB

from griffin_offload import GriffinModel
from griffin_offload.errors import SavedContextError
from griffin_offload.kv_cache import sequence_file as saved_module

CTX = 96


def _load(path: Path, **options: object) -> GriffinModel:
    defaults = {"device": "cpu", "max_gpu_mem": "1GB", "density": 0.5, "ctx_size": CTX, "always_stream": True}
    return GriffinModel.from_pretrained(path, **{**defaults, **options})


def _ids(seed: int, tokens: int) -> torch.Tensor:
    return torch.randint(3, VOCAB, (1, tokens), generator=torch.Generator().manual_seed(seed))


def _greedy(model: GriffinModel, ids: torch.Tensor, context: Any, new_tokens: int = 8) -> torch.Tensor:
    return model.generate(ids, max_new_tokens=new_tokens, do_sample=False, context=context)


@pytest.mark.parametrize(
    ("name", "options"),
    by_turns(
        ("gemma2", "llama2", "mistral", "gpt2"),
        ({}, {"kv_bits": 8}, {"kv_bits": 4}, {"quantize": "int8"}),
        whole=("gemma2",),
    ),
    ids=str,
)
def test_a_saved_context_goes_on_as_the_one_that_was_saved(checkpoints, tmp_path: Path, name: str, options: Any):
    """In a model of its own, behind windows, after an answer, and again for the same prompt."""
    path = checkpoints(name)
    model, other = _load(path, **options), _load(path, **options)
    context = model.new_context()
    sequence = _greedy(model, _ids(0, 40), context)
    model.save_context(context, tmp_path / "a.ctx", {"told": ["something", 1]})
    again, notes = other.load_context(tmp_path / "a.ctx")
    assert notes == {"told": ["something", 1]}
    assert again.tokens == context.tokens
    longer = torch.cat([sequence, _ids(1, 7)], dim=1)
    assert torch.equal(_greedy(other, longer, again), _greedy(model, longer, context))
    assert all(torch.equal(again.squared[i], context.squared[i]) for i in context.squared)


def test_the_same_prompt_reads_only_the_rows_it_selected(checkpoints, tmp_path: Path):
    path = checkpoints("llama2")
    model, other = _load(path, offload="ram"), _load(path, offload="ram")
    context = model.new_context()
    expected = _greedy(model, _ids(0, 40), context, 1)
    model.save_context(context, tmp_path / "a.ctx")
    again, _ = other.load_context(tmp_path / "a.ctx")
    before = other.engine.loaded.layers.fetched_bytes
    assert torch.equal(_greedy(other, _ids(0, 40), again, 1), expected)
    full = other.plan.streamed_bytes
    fetched = other.engine.loaded.layers.fetched_bytes - before
    assert fetched == full // 3 + full // 3 * 2 // 2  # down, half of gate and up
    assert other.last_report.cached_prompt_tokens == 40


@pytest.fixture(scope="module")
def written(checkpoints, tmp_path_factory: pytest.TempPathFactory) -> tuple[GriffinModel, Path]:
    model = _load(checkpoints("llama2"))
    context = model.new_context()
    _greedy(model, _ids(0, 40), context)
    path = tmp_path_factory.mktemp("saved") / "a.ctx"
    model.save_context(context, path, {"messages": [{"role": "user", "content": "hello"}]})
    return model, path


def _refused(model: GriffinModel, path: Path, words: str) -> None:
    """The file is refused in one line, and a context that it was to replace is as it was."""
    context = model.new_context()
    expected = _greedy(model, _ids(3, 20), context)
    tokens = list(context.tokens)
    with pytest.raises(SavedContextError, match=words) as refused:
        model.load_context(path, context)
    assert "\n" not in str(refused.value)
    assert context.tokens == tokens
    assert torch.equal(_greedy(model, _ids(3, 20), context), expected)


@pytest.mark.parametrize(
    ("options", "word"),
    [({"density": 0.75}, "density"), ({"quantize": "int8"}, "precision"), ({"kv_bits": 8}, "kv_bits")],
    ids=str,
)
def test_another_setting_is_named(written, checkpoints, options: Any, word: str):
    _refused(_load(checkpoints("llama2"), **options), written[1], f"saved with another {word}")


def test_other_models_and_shorter_contexts_are_named(written, checkpoints, tmp_path: Path):
    _refused(_load(checkpoints("reglu")), written[1], "saved with another model")
    _refused(_load(checkpoints("llama2"), ctx_size=40), written[1], "holds 47 tokens, the context is 40: raise")
    _refused(written[0], tmp_path / "absent", "no file")
    _refused(written[0], tmp_path, "damaged|directory")


def _changed(path: Path, target: Path, metadata: dict[str, str] | None = None, **tensors: torch.Tensor) -> Path:
    """A copy with other metadata or tensors, by somebody who knows the digest; a dot in a tensor's name is written as
    two underscores."""
    found = load_file(path)
    header = json.loads(path.read_bytes()[8 : 8 + struct.unpack("<Q", path.read_bytes()[:8])[0]])
    found |= {name.replace("__", "."): tensor for name, tensor in tensors.items()}
    said = {**header["__metadata__"], **(metadata or {})}
    parts = [(name, saved_module.DTYPE_NAMES[tensor.dtype], tuple(tensor.shape)) for name, tensor in found.items()]
    save_file(found, target, said | {"digest": saved_module.header_digest(said, parts)})
    return target


@pytest.mark.parametrize(
    ("metadata", "words"),
    [
        ({"version": "2"}, "has version 2, this program reads up to 1: update"),
        ({"version": "x"}, "damaged"),
        ({"format": "pt"}, "no saved prompt"),
        ({"covered": "0"}, "contradict"),
        ({"covered": "48"}, "contradict"),
        ({"identity": "{"}, "damaged"),
        ({"identity": "[]"}, "damaged"),
        ({"notes": "[]"}, "damaged"),
        ({"notes": "["}, "damaged"),
        ({"notes": "[" * 100_000}, "damaged"),
        ({"exact_tokens": "41"}, "contradict"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_metadata_that_cannot_be_ours(written, tmp_path: Path, metadata: dict[str, str], words: str):
    _refused(written[0], _changed(written[1], tmp_path / "b.ctx", metadata), words)


def test_parts_that_cannot_be_ours(written, tmp_path: Path):
    model, path = written
    selected = load_file(path)["layers.0.selected"]
    for number, wrong in enumerate(
        [
            {"layers__0__selected": selected + 128},
            {"layers__0__selected": selected.flip(0)},
            {"layers__0__selected": selected[:-1]},
            {"layers__0__selected": selected.float()},
            {"layers__1__squared": torch.zeros(1, 127)},
            {"layers__1__kv__0": torch.zeros(1, 4, 40, 8)},
            {"layers__1__kv__1": torch.zeros(1, 8, 47, 8)},
            {"layers__1__kv__1": torch.zeros(1, 4, 47, 8, dtype=torch.int32)},
            {"tokens": torch.arange(30)},
            {"tokens": torch.arange(47).reshape(1, 47)},
            {"tokens": torch.arange(47, dtype=torch.float64)},
            {"tokens": torch.arange(47) - 1},
            {"tokens": torch.arange(47) + VOCAB},
            {"logits": torch.zeros(1, 7)},
            {"logits": torch.zeros(1, VOCAB, dtype=torch.int32)},
        ]
    ):
        _refused(model, _changed(path, tmp_path / f"{number}.ctx", None, **wrong), "damaged")
    save_file({"tokens": torch.arange(3)}, tmp_path / "plain.safetensors")
    _refused(model, tmp_path / "plain.safetensors", "no saved prompt")


def _state(context: Any, notes: Any) -> dict[str, Any]:
    """All that a file gives, by name."""
    mark = context.marks[-1]
    found = {"tokens": context.tokens, "covered": context.covered, "exact": context.exact_tokens, "notes": notes}
    tensors = {f"kv {i}": part for i, layer in enumerate(context.cache.layers) for part in layer.saved()}
    tensors |= {f"{name} {i}": table for name in ("squared", "selected") for i, table in getattr(context, name).items()}
    return found | {name: tensor.tolist() for name, tensor in {**tensors, "logits": mark.logits}.items()}


def _check_damaged(model: GriffinModel, target: Path, expected: dict[str, Any]) -> None:
    """A named error that changes nothing, or the same numbers."""
    context = model.new_context()
    try:
        _, notes = model.load_context(target, context)
    except SavedContextError:
        assert context.tokens == []
    else:
        assert _state(context, notes) == expected


@pytest.mark.slow
def test_a_changed_byte_of_the_header_is_named_or_does_not_matter(written, tmp_path: Path):
    """Every byte, once: also one that makes float32 int32, keys values, or 40 tokens 41."""
    model, path = written
    whole, expected = path.read_bytes(), _state(*model.load_context(path))
    header_end = 8 + struct.unpack("<Q", whole[:8])[0]
    target = tmp_path / "damaged.ctx"
    for place in range(header_end):
        damaged = bytearray(whole)
        damaged[place] = {ord("F"): ord("I"), ord("0"): ord("2")}.get(whole[place], whole[place] ^ 1)
        target.write_bytes(damaged)
        _check_damaged(model, target, expected)


@settings(max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_damage_is_named(written, tmp_path: Path, data: st.DataObject):
    """Cut anywhere, or any byte of the header made any other."""
    model, path = written
    whole = path.read_bytes()
    damaged = bytearray(whole)
    if data.draw(st.booleans()):
        del damaged[data.draw(st.integers(0, len(whole) - 1)) :]
    else:
        header_end = 8 + struct.unpack("<Q", whole[:8])[0]
        damaged[data.draw(st.integers(0, header_end - 1))] = data.draw(st.integers(0, 255))
    target = tmp_path / "damaged.ctx"
    target.write_bytes(damaged)
    _check_damaged(model, target, _state(*model.load_context(path)))


def test_a_loaded_context_has_nothing_to_do_with_its_file(written, tmp_path: Path):
    """safetensors gives views of the mapped file: to read one behind the end of a file that was cut is death."""
    model, path = written
    target = tmp_path / "a.ctx"
    target.write_bytes(path.read_bytes())
    context, notes = model.load_context(target)
    assert str(target) not in Path("/proc/self/maps").read_text()
    os.truncate(target, 0)
    assert _state(context, notes) == _state(*model.load_context(path))


def test_what_cannot_be_written_leaves_the_old_file(written, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    model, path = written
    context, _ = model.load_context(path)
    target = tmp_path / "kept.ctx"
    target.write_text("old")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(saved_module, "write_tensors", full)
        with pytest.raises(SavedContextError, match="No space left"):
            model.save_context(context, target)
    assert target.read_text() == "old"
    with pytest.raises(SavedContextError, match="cannot be written"):
        model.save_context(context, tmp_path / "absent" / "a.ctx")
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    for place in (tmp_path, "/", "", "a\0b", pipe, "x" * 300):
        with pytest.raises(SavedContextError, match="cannot be written"):
            model.save_context(context, place)
    assert pipe.is_fifo()
    pipe.unlink()
    assert [file.name for file in tmp_path.iterdir()] == ["kept.ctx"]


def test_a_killed_writer_leaves_the_old_file(written, tmp_path: Path):
    """SIGKILL after the first tensors: the name still belongs to the old file."""
    model, path = written
    context, _ = model.load_context(path)
    target = tmp_path / "kept.ctx"
    target.write_text("old")
    pid = os.fork()
    if pid == 0:
        os.environ["PYTHONWARNINGS"] = "ignore"
        original, count = torch.Tensor.contiguous, 0

        def dying(tensor: torch.Tensor) -> torch.Tensor:
            nonlocal count
            count += 1
            if count == 3:
                os.kill(os.getpid(), 9)
            return original(tensor)

        torch.Tensor.contiguous = dying
        model.save_context(context, target)
        os._exit(0)
    assert os.waitpid(pid, 0)[1] == 9
    assert target.read_text() == "old"
    model.save_context(context, target)  # what the dead one left is no obstacle
    assert model.load_context(target)[0].tokens == context.tokens


def test_writing_makes_no_second_copy_of_the_kv_cache(checkpoints, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """One tensor at a time becomes contiguous."""
    model = _load(checkpoints("llama2"))
    context = model.new_context()
    _greedy(model, _ids(0, 40), context)
    copied: list[int] = []
    original = torch.Tensor.contiguous
    monkeypatch.setattr(torch.Tensor, "contiguous", lambda self: copied.append(self.nbytes) or original(self))
    alive: list[int] = []
    write = saved_module.write_tensors
    monkeypatch.setattr(saved_module, "write_tensors", lambda *a: (alive.append(len(copied)), write(*a))[1])
    model.save_context(context, tmp_path / "a.ctx")
    assert alive == [0]  # nothing before the file is open
    assert max(copied) <= context.cache.nbytes // len(context.cache.layers)
