"""`convert` of mixtures of experts: an expert is one read, and a copy answers as the original does in its precision."""

import json
import shutil
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from loaded_model import ids
from marks import by_turns
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_models import LAYERS, MIXTURES, VOCAB, write_checkpoint, write_tokenizer
from torch import Tensor

from griffin_offload import GriffinModel
from griffin_offload.engine.convert import convert
from griffin_offload.errors import CheckpointError, UnsupportedModel
from griffin_offload.formats.expert_form import ExpertForm

GREEDY = {"do_sample": False, "output_logits": True, "return_dict_in_generate": True, "max_new_tokens": 6}
NAMES = [name for name in MIXTURES if name != "phimoe"]
PRECISIONS = ["none", "int8", "int4"]


@pytest.fixture(scope="module")
def copies(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], tuple[Path, Path]]:
    """A checkpoint in bfloat16 and its copy, made once."""
    made: dict[tuple[str, str], tuple[Path, Path]] = {}

    def of(name: str, precision: str) -> tuple[Path, Path]:
        if (name, precision) not in made:
            place = tmp_path_factory.mktemp(name)
            source = write_checkpoint(name, place / "source", torch.bfloat16, shards=1)
            convert(source, place / "copy", precision)
            made[name, precision] = source, place / "copy"
        return made[name, precision]

    return of


def files_of(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def _answer(directory: Path, **options: Any) -> tuple[Tensor, Tensor, Any]:
    prompt = ids(tokens=20) % (VOCAB - 8)
    sizes = {"max_gpu_mem": "40MB", "ctx_size": 64}
    with GriffinModel.from_pretrained(directory, device="cpu", **sizes, **options) as model:
        found = model.generate(prompt, attention_mask=torch.ones_like(prompt), **GREEDY)
        assert model.last_report.peak_device_bytes <= model.plan.peak_bytes
        assert model.resident_bytes == model.plan.resident_bytes
        return found.sequences, torch.stack(found.logits), model.last_report


@pytest.mark.parametrize(("name", "precision"), by_turns(NAMES, PRECISIONS, whole=("mixtral", "gpt_oss")))
def test_a_copy_answers_as_the_original(copies, name: str, precision: str):
    source, copy = copies(name, precision)
    expected = _answer(source, quantize=precision, density=0.5)
    found = _answer(copy, quantize=precision, density=0.25)
    if precision == "int4":  # its attention was rounded to make up for errors
        assert found[1].isfinite().all()
    elif (name, precision) == ("gpt_oss", "none"):  # its matrices lie the other way: another product, in 16 bits
        assert (found[1][0] - expected[1][0]).abs().max() < 0.05 * expected[1][0].abs().max()
    else:
        assert torch.equal(found[0], expected[0])
        assert torch.equal(found[1], expected[1])


def test_without_a_text_int4_is_what_it_is_on_the_way(copies):
    """No tokenizer, no text: then nothing makes up for errors, in the copy as on the way."""
    source, copy = copies("gpt_oss", "int4")
    assert torch.equal(_answer(source, quantize="int4", density=0.5)[1], _answer(copy, density=0.5)[1])


def test_a_copy_in_16_bit_is_quantised_on_the_way(copies):
    source, copy = copies("qwen3_moe", "none")
    for precision in ("int8", "int4"):
        expected = _answer(source, quantize=precision, density=0.5)
        assert torch.equal(_answer(copy, quantize=precision, density=0.25)[1], expected[1])


@pytest.mark.parametrize("precision", PRECISIONS)
def test_one_expert_is_one_piece_of_a_file(copies, precision: str):
    """Its bytes, of every matrix, lie between those of its neighbours, at a multiple of 64."""
    _, copy = copies("mixtral", precision)
    sizes = {"max_gpu_mem": "40MB", "ctx_size": 64, "density": 0.5}
    with GriffinModel.from_pretrained(copy, device="cpu", quantize=precision, **sizes) as model:
        store = model.engine.loaded.layers.expert_store
        assert store.unmapped_bytes == 0
        for layer in range(LAYERS):
            rows = [[tensor[expert] for tensor in store.tensors(layer)] for expert in range(8)]
            starts = [min(row.data_ptr() for row in tensors) for tensors in rows]
            steps = {second - first for first, second in pairwise(starts)}
            assert len(steps) == 1
            size = steps.pop()
            assert size % 64 == 0
            for start, tensors in zip(starts, rows, strict=True):
                assert all(start <= row.data_ptr() and row.data_ptr() + row.nbytes <= start + size for row in tensors)
                assert sum(row.nbytes for row in tensors) > size - 64 * len(tensors)
    path = next(copy.glob("model-00001*"))
    assert (8 + int.from_bytes(path.read_bytes()[:8], "little")) % 4096 == 0
    with safe_open(path, framework="pt") as file:  # the library finds nothing to object to
        names = [name for name in file.keys() if name.endswith(".records")]  # noqa: SIM118
        assert file.get_slice(names[0]).get_shape()[0] == 8


def test_a_text_counts(copies, tmp_path: Path):
    source = write_checkpoint("mixtral", tmp_path / "source", torch.bfloat16, shards=1)
    write_tokenizer(source)
    convert(source, tmp_path / "copy", "int4")
    with_text, without = (
        load_file(next(place.glob("model-00001*"))) for place in (tmp_path / "copy", copies("mixtral", "int4")[1])
    )
    name = next(name for name in with_text if name.endswith(".records"))
    assert with_text[name].shape == without[name].shape
    assert not torch.equal(with_text[name], without[name])
    assert _answer(tmp_path / "copy", density=0.5)[1].isfinite().all()


@pytest.mark.parametrize("expert", [0, 5])
def test_interrupted_and_run_again(copies, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, expert: int):
    """In the middle of a layer's experts: what was finished is kept, and the rest is the same, byte for byte."""
    source, copy = copies("mixtral", "int8")
    record, seen = ExpertForm.record, []

    def stop(form: ExpertForm, full: Any, number: int) -> Tensor:
        seen.append(number)
        if len(seen) == 9 + expert:
            raise KeyboardInterrupt
        return record(form, full, number)

    with monkeypatch.context() as patch:
        patch.setattr(ExpertForm, "record", stop)
        with pytest.raises(KeyboardInterrupt):
            convert(source, tmp_path / "out", "int8")
    assert len(list((tmp_path / "out").glob("*.safetensors"))) == 1
    assert not list((tmp_path / "out").glob(".*.safetensors*"))
    with pytest.raises(CheckpointError, match="unfinished conversion"):
        _answer(tmp_path / "out")
    assert convert(source, tmp_path / "out", "int8").resumed_shards == 1
    assert files_of(tmp_path / "out") == files_of(copy)


def test_bytes_are_the_plans(copies):
    """What is fetched is what lies in the files: the record of an expert less what fills it up."""
    _, copy = copies("mixtral", "int8")
    _, _, report = _answer(copy, density=0.25)
    matrices = 3 * 96 * 32
    scales = 2 * (2 * 96 + 32 + 96)
    needed = report.decode_streamed_bytes - report.experts.wrong_bytes
    assert needed == report.experts.misses * (matrices + scales) > 0


def test_what_is_refused(cli, checkpoints, copies, tmp_path: Path):
    _, copy = copies("mixtral", "int8")
    cli.refuses(2, "has no experts", "convert", tmp_path / "a", "-m", checkpoints("llama2"), "--quantize", "none")
    cli.refuses(2, "is converted to int8 already", "convert", tmp_path / "a", "-m", copy, "--quantize", "int4")
    later = tmp_path / "later"
    shutil.copytree(copy, later)
    config = json.loads((later / "config.json").read_text())
    config["quantization_config"]["records"] = 3
    (later / "config.json").write_text(json.dumps(config))
    with pytest.raises(UnsupportedModel, match="records of version 3, this version reads 2: convert again"):
        _answer(later)
    damaged = tmp_path / "damaged"
    shutil.copytree(copy, damaged)
    shard = next(damaged.glob("model-00002*"))
    with safe_open(shard, framework="pt") as file:
        metadata = file.metadata()
    tensors = load_file(shard)
    name = next(name for name in tensors if name.endswith(".records"))
    save_file(tensors | {name: tensors[name][:7].contiguous()}, shard, metadata)
    with pytest.raises(CheckpointError, match=r"records is uint8 \[7, \d+\], the model needs uint8 \[8, \d+\]"):
        _answer(damaged)
