"""Other kinds of files than ours, registered here: planned, streamed, decoded and converted like safetensors."""

import json
import math
import shutil
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import PretrainedConfig

from griffin_offload import GriffinModel
from griffin_offload.checkpoint.base import Checkpoint, StoredTensor
from griffin_offload.checkpoint.config_files import load_config
from griffin_offload.checkpoint.direct_io import Extent
from griffin_offload.checkpoint.files import FileState, states_of
from griffin_offload.checkpoint.registry import forget_kind, open_checkpoint, register_kind
from griffin_offload.config import LoadConfig
from griffin_offload.engine.convert import convert
from griffin_offload.engine.spec import examine, plan_for
from griffin_offload.errors import CheckpointChanged, CheckpointError

INDEX = "arrays.list"
OPTIONS = {"device": "cpu", "ctx_size": 64, "max_gpu_mem": "1GB"}
IDS = torch.arange(5, 45)[None]


@dataclass(frozen=True)
class Arrays(Checkpoint):
    """A directory of files with one tensor each, listed in one."""

    directory: Path
    config: PretrainedConfig
    dtype: torch.dtype
    listed: dict[str, StoredTensor]
    states: Mapping[str, FileState]

    @property
    def files(self) -> tuple[Path, ...]:  # type: ignore[override]
        return tuple(Path(path) for path in self.states)

    @property
    def weight_bytes(self) -> int:  # type: ignore[override]
        return sum(tensor.stored_bytes for tensor in self.listed.values())

    def tensors(self) -> Mapping[str, StoredTensor]:
        return self.listed


def open_arrays(path: Path) -> Checkpoint | None:
    if not (path / INDEX).is_file():
        return None
    listed = {}
    for name, entry in json.loads((path / INDEX).read_text()).items():
        file, shape = (path / entry["file"]).resolve(), tuple(entry["shape"])
        part = Extent(str(file), entry["offset"], entry["nbytes"])
        decode = inflate if entry["deflated"] else None
        listed[name] = StoredTensor(shape, torch.float32, (part,), decode=decode)
    states = states_of({part.path for tensor in listed.values() for part in tensor.parts})
    return Arrays(path, load_config(path / "config.json"), torch.float32, listed, states)


def inflate(parts: Sequence[Tensor], first: int, end: int, into: Tensor) -> None:
    """Of a matrix whose rows are compressed all together."""
    raw = zlib.decompress(parts[0].numpy().tobytes())
    row = math.prod(into.shape[1:])
    numbers = np.frombuffer(raw, dtype=np.float32)[first * row : end * row]
    into.copy_(torch.from_numpy(numbers.copy()).view(into.shape))


def write_arrays(source: Path, directory: Path, *, deflated: Callable[[str, Tensor], bool]) -> Path:
    """The tensors of `source` as .npy files, and as compressed ones."""
    shutil.copytree(source, directory, ignore=shutil.ignore_patterns("*.safetensors*"))
    index = {}
    for path in source.glob("*.safetensors"):
        for number, (name, tensor) in enumerate(load_file(path).items()):
            packed = deflated(name, tensor)
            file = directory / f"{path.stem}-{number}.{'z' if packed else 'npy'}"
            if packed:
                file.write_bytes(zlib.compress(tensor.numpy().tobytes(), 1))
            else:
                np.save(file, tensor.numpy())
            offset = 0 if packed else file.stat().st_size - tensor.nbytes
            nbytes = file.stat().st_size - offset
            entry = {"file": file.name, "shape": list(tensor.shape), "offset": offset, "nbytes": nbytes}
            index[name] = entry | {"deflated": packed}
    (directory / INDEX).write_text(json.dumps(index))
    return directory


KINDS: dict[str, Callable[[str, Tensor], bool]] = {
    "as they lie": lambda name, tensor: False,
    "translated": lambda name, tensor: tensor.dim() > 1,
    "feed-forward translated": lambda name, tensor: "mlp" in name and tensor.dim() > 1,
}


@pytest.fixture
def kind() -> Iterator[None]:
    register_kind(open_arrays)
    yield
    forget_kind(open_arrays)


@pytest.fixture(params=KINDS)
def pair(request: pytest.FixtureRequest, checkpoints, tmp_path: Path, kind: None) -> tuple[Path, Path]:
    """A safetensors checkpoint, and the same model in files of another kind."""
    plain = checkpoints("llama2")
    return plain, write_arrays(plain, tmp_path / "arrays", deflated=KINDS[request.param])


def answer(directory: Path, **options: object) -> list[int]:
    with GriffinModel.from_pretrained(directory, **{**OPTIONS, **options}) as model:
        tokens = model.generate(IDS, max_new_tokens=8, do_sample=False)
        assert model.last_report.peak_device_bytes <= model.plan.peak_bytes
        assert model.resident_bytes == model.plan.resident_bytes
        return tokens[0, IDS.shape[1] :].tolist()


WAYS = (
    {"density": 0.5, "quantize": "none"},
    {"density": 1.0, "quantize": "none"},
    {"density": 0.5, "quantize": "none", "offload": "ram"},
    {"density": 0.5, "quantize": "none", "dtype": "bfloat16"},
    {"density": 0.5, "quantize": "int8"},
    {"density": 0.5, "quantize": "int4"},
    {"density": 1.0, "quantize": "int4"},
    {"density": 0.5, "quantize": "none", "exact": True},
    {"density": 0.5, "quantize": "none", "selection": "magnitude"},
)


@pytest.mark.parametrize(
    ("pair", "options"),
    # In turns; what is translated has all of them.
    [
        (name, way)
        for at, way in enumerate(WAYS)
        for place, name in enumerate(KINDS)
        if name == "translated" or at % len(KINDS) == place
    ],
    indirect=["pair"],
    ids=lambda value: " ".join(map(str, value.values())) if isinstance(value, dict) else value,
)
def test_answers_are_those_of_the_same_model_in_safetensors(pair: tuple[Path, Path], options: dict[str, object]):
    plain, other = pair
    assert answer(other, **options) == answer(plain, **options)


def test_a_plan_tells_what_is_translated(pair: tuple[Path, Path]):
    plain, other = (
        plan_for(examine(path, LoadConfig(**OPTIONS, density=0.5, quantize="none", max_cpu_mem=None))) for path in pair
    )
    translated = any(tensor.decode and "mlp" in name for name, tensor in open_checkpoint(pair[1]).tensors().items())
    assert (other.prefill_parts["slots"] > plain.prefill_parts["slots"]) == translated
    assert other.full_bytes == plain.full_bytes


def test_only_stored_bytes_are_fetched(pair: tuple[Path, Path]):
    tensors = open_checkpoint(pair[1]).tensors()
    stored = sum(tensor.stored_bytes for name, tensor in tensors.items() if "mlp" in name)
    with GriffinModel.from_pretrained(pair[1], **OPTIONS, density=0.5, quantize="none") as model:
        model.generate(IDS, max_new_tokens=2, do_sample=False)
        assert model.last_prefill.streamed_bytes == stored
        assert model.engine.loaded.layers.source.unmapped_bytes == 0


def test_saved_prompts_go_on(pair: tuple[Path, Path], tmp_path: Path):
    """Their neurons are gathered anew from where the full weights rest."""
    answers = []
    for directory in pair:
        options = {**OPTIONS, "density": 0.5, "quantize": "none", "keep_prompts": True}
        with GriffinModel.from_pretrained(directory, **options) as model:
            context, more = model.new_context(), torch.cat([IDS, IDS[:, :5]], dim=1)
            model.generate(IDS, max_new_tokens=2, do_sample=False, context=context)
            model.save_context(context, tmp_path / f"{directory.name}.context")
        with GriffinModel.from_pretrained(directory, **options) as model:
            context, _ = model.load_context(tmp_path / f"{directory.name}.context")
            answers.append(model.generate(more, max_new_tokens=6, do_sample=False, context=context).tolist())
    assert answers[0] == answers[1]


@pytest.mark.parametrize(
    ("pair", "precision"), list(zip(KINDS, ("int8", "int4", "int8"), strict=True)), indirect=["pair"]
)
def test_converted_copies_are_the_same(pair: tuple[Path, Path], tmp_path: Path, precision: str):
    made = [convert(path, tmp_path / path.name / precision, precision, tables="int8").directory for path in pair]
    tensors = [{n: t for file in sorted(d.glob("*.safetensors")) for n, t in load_file(file).items()} for d in made]
    assert tensors[0].keys() == tensors[1].keys()
    assert all(torch.equal(tensor, tensors[1][name]) for name, tensor in tensors[0].items())
    assert (made[1] / "tokenizer.json").read_bytes() == (pair[0] / "tokenizer.json").read_bytes()
    assert answer(made[1], density=0.5) == answer(made[0], density=0.5)


def test_changed_files_are_told(pair: tuple[Path, Path]):
    with GriffinModel.from_pretrained(pair[1], **OPTIONS, density=0.5, quantize="none") as model:
        for path in open_checkpoint(pair[1]).files:
            with path.open("rb+") as file:
                file.write(b"x")
        with pytest.raises(CheckpointChanged):
            model.generate(IDS, max_new_tokens=2, do_sample=False)


def test_tensors_that_are_not_there_are_named(pair: tuple[Path, Path]):
    index = pair[1] / INDEX
    listed = json.loads(index.read_text())
    del listed["model.layers.1.mlp.up_proj.weight"]
    index.write_text(json.dumps(listed))
    with pytest.raises(CheckpointError, match=r"1 missing keys, first model.layers.1.mlp.up_proj.weight"):
        answer(pair[1])


def test_a_kind_is_asked_only_while_it_is_registered(checkpoints, tmp_path: Path, kind: None):
    arrays = write_arrays(checkpoints("llama2"), tmp_path / "arrays", deflated=KINDS["as they lie"])
    assert isinstance(open_checkpoint(arrays), Arrays)
    assert not isinstance(open_checkpoint(checkpoints("llama2")), Arrays)
    forget_kind(open_arrays)
    with pytest.raises(CheckpointError, match=r"has no model\.safetensors"):
        open_checkpoint(arrays)
    register_kind(open_arrays)
