"""Checkpoints that other libraries quantised: what they stand for by those libraries, or by the published layout in
float64, is what is loaded, streamed, kept and converted here."""

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from foreign_formats import FORMATS, awq, compressed, fp8_blocks, gptq, write_foreign
from safetensors.torch import load_file, save_file

from griffin_offload import GriffinModel
from griffin_offload.checkpoint.mapped import FileMaps
from griffin_offload.checkpoint.packed import Module
from griffin_offload.checkpoint.quantisation_config import method_of
from griffin_offload.checkpoint.registry import open_checkpoint, read_config
from griffin_offload.checkpoint.safetensors import stored_tensors
from griffin_offload.config import LoadConfig
from griffin_offload.engine.build import build
from griffin_offload.engine.convert import convert
from griffin_offload.engine.spec import examine, examine_checkpoint, plan_for
from griffin_offload.formats.int4 import INT4
from griffin_offload.formats.translated import TranslatedTensor, in_memory

OPTIONS = {"device": "cpu", "ctx_size": 64, "max_gpu_mem": "1GB"}
IDS = torch.arange(5, 45)[None]


@pytest.fixture(params=FORMATS)
def pair(request: pytest.FixtureRequest, checkpoints, tmp_path: Path) -> tuple[Path, Path]:
    """A packed checkpoint, and the same model in floats as the format's own library unpacks it."""
    packed = tmp_path / "packed"
    return packed, write_foreign(checkpoints("llama2", torch.float32, 1), packed, FORMATS[request.param])


@pytest.fixture(autouse=True)
def _told(request: pytest.FixtureRequest) -> None:
    """That activations stay in floats is a warning, and has its own test."""
    warnings.filterwarnings("ignore", message=".* weights only: ")


def test_every_matrix_is_what_its_library_makes_of_it(pair: tuple[Path, Path]):
    packed, plain = pair
    model, wanted = build(open_checkpoint(packed)), load_file(plain / "model.safetensors")
    found = dict(model.named_parameters())
    assert found.keys() == wanted.keys()
    decoded = [name for name, tensor in found.items() if isinstance(tensor.detach(), TranslatedTensor)]
    assert len(decoded) == 20
    for name, tensor in found.items():
        torch.testing.assert_close(in_memory(tensor.detach()), wanted[name], rtol=1e-5, atol=1e-6)


def answer(directory: Path, **options: object) -> list[int]:
    with GriffinModel.from_pretrained(directory, **{**OPTIONS, **options}) as model:
        tokens = model.generate(IDS, max_new_tokens=8, do_sample=False)
        assert model.last_report.peak_device_bytes <= model.plan.peak_bytes
        return tokens[0, IDS.shape[1] :].tolist()


def test_streamed_answers_are_those_of_the_floats(pair: tuple[Path, Path]):
    packed, plain = pair
    options = {"density": 0.5, "quantize": "none"}
    assert answer(packed, **options) == answer(plain, **options)


def _args(group: int, symmetric: bool) -> dict[str, Any]:
    four = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": group, "symmetric": symmetric}
    return {"kind": "pack-quantized"} | four


def _packed(group: int, symmetric: bool) -> dict[str, Any]:
    weights = {name: value for name, value in _args(group, symmetric).items() if name != "kind"}
    groups = {"group_0": {"targets": ["Linear"], "weights": weights, "input_activations": None}}
    return {"format": "pack-quantized", "config_groups": groups}


@pytest.mark.parametrize(
    ("method", "said", "pack", "there"),
    [
        ("gptq", {"bits": 4}, lambda weight: gptq(weight, 4, 32, symmetric=False, shuffled=False), True),
        ("gptq", {"bits": 4}, lambda weight: gptq(weight, 4, 64, symmetric=True, shuffled=False), True),
        ("gptq", {"bits": 4, "desc_act": True}, lambda w: gptq(w, 4, 32, symmetric=True, shuffled=True), False),
        ("gptq", {"bits": 8}, lambda weight: gptq(weight, 8, 32, symmetric=True, shuffled=False), False),
        ("gptq", {"bits": 4}, lambda weight: gptq(weight, 4, 16, symmetric=True, shuffled=False), False),
        ("awq", {"bits": 4, "version": "gemm", "zero_point": True}, lambda weight: awq(weight, 128), True),
        ("compressed-tensors", _packed(32, True), lambda weight: compressed(weight, **_args(32, True)), True),
        ("compressed-tensors", _packed(128, False), lambda weight: compressed(weight, **_args(128, False)), True),
        ("compressed-tensors", _packed(16, True), lambda weight: compressed(weight, **_args(16, True)), False),
    ],
)
def test_int4_takes_over_codes_of_other_libraries(method: str, said: dict, pack: Any, there: bool, tmp_path: Path):
    """Where a group is whole 32 inputs in their order: the same codes; rounding anew misses less nowhere."""
    weight = torch.randn(64, 256, generator=torch.Generator().manual_seed(0))
    tensors, exact = pack(weight)
    size = {"group_size": 256 // tensors["scales"].shape[0]} if "scales" in tensors else {}
    save_file({f"x.{name}": one.contiguous() for name, one in tensors.items()}, tmp_path / "one.safetensors")
    stored = {name[2:]: one for name, one in stored_tensors(tmp_path / "one.safetensors").items()}
    known, maps = method_of({"quant_method": method} | said | size, tmp_path), FileMaps()
    reader = known.reader_of(stored)
    assert reader is not None
    found = reader(Module("x", stored, maps), known.packing, torch.float32).tensor(maps)
    stored = found.codes()
    assert (stored is not None) == there
    if stored is None:
        return
    codes = (exact.float().view(64, -1, 32) - stored.lowest[..., None]) / stored.steps[..., None]
    assert (codes - codes.round()).abs().max() < 1e-3
    taken, anew = (
        INT4.taken_over(stored, torch.bfloat16),
        INT4.quantize(in_memory(found), torch.bfloat16, is_down=False),
    )
    codes = codes.round().to(torch.uint8)
    assert torch.equal(taken["weight"].view(64, -1, 16), codes[..., :16] | (codes[..., 16:] << 4))
    missed = [
        float((INT4.unpack(one["weight"], one["groups"], torch.empty(64, 256)) * one["scale"][:, None] - exact).norm())
        for one in (taken, anew)
    ]
    assert missed[0] < 0.02 * exact.norm()
    assert missed[0] <= missed[1]


@pytest.fixture(params=["fp8 blocks", "gptq asymmetric, in order of activation", "nf4 nested"])
def some(request: pytest.FixtureRequest, checkpoints, tmp_path: Path) -> tuple[Path, Path]:
    """The same of three formats that have little in common."""
    packed = tmp_path / "packed"
    return packed, write_foreign(checkpoints("llama2", torch.float32, 1), packed, FORMATS[request.param])


@pytest.mark.parametrize(
    "options",
    [
        {"density": 1.0, "quantize": "none"},
        {"density": 0.5, "quantize": "none", "offload": "ram"},
        {"density": 0.5, "quantize": "int8"},
        {"density": 0.5, "quantize": "none", "dtype": "bfloat16"},
    ],
    ids=lambda options: " ".join(map(str, options.values())),
)
def test_so_are_others(some: tuple[Path, Path], options: dict[str, object]):
    packed, plain = some
    assert answer(packed, **options) == answer(plain, **options)


def test_only_stored_bytes_are_fetched(some: tuple[Path, Path]):
    stored = {
        name: tensor.nbytes
        for name, tensor in load_file(some[0] / "model.safetensors").items()
        if ".mlp." in name and not name.endswith("weight_format")
    }
    with GriffinModel.from_pretrained(some[0], **OPTIONS, density=0.5, quantize="none") as model:
        model.generate(IDS, max_new_tokens=2, do_sample=False)
        unread = sum(size for name, size in stored.items() if "quant_state" in name)
        assert model.last_prefill.streamed_bytes == sum(stored.values()) - unread


@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_converted_copies_are_those_of_the_floats(some: tuple[Path, Path], tmp_path: Path, precision: str):
    made = [convert(path, tmp_path / path.name / precision, precision).directory for path in some]
    tensors = [{n: t for file in sorted(d.glob("*.safetensors")) for n, t in load_file(file).items()} for d in made]
    assert tensors[0].keys() == tensors[1].keys()
    for name, tensor in tensors[0].items():
        torch.testing.assert_close(tensor.float(), tensors[1][name].float(), rtol=1e-5, atol=1.01)  # a code may tip
    assert "griffin-offload" in (made[0] / "config.json").read_text()
    assert answer(made[0], density=0.5) == answer(made[1], density=0.5)


SHAPES = [(448, 96), (576, 130), (128, 128), (1, 20), (130, 7)]


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "x".join(map(str, shape)))
def test_last_blocks_are_smaller(shape: tuple[int, int], tmp_path: Path):
    """448 and 576 rows in blocks of 128: dividing shapes would take blocks of 112, and none at all."""
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(shape[0]))
    tensors, full = fp8_blocks(weight, 128, 128)
    found = read_alone(tensors, {"quant_method": "fp8", "weight_block_size": [128, 128]}, tmp_path)
    torch.testing.assert_close(found.translated(), full, rtol=1e-6, atol=0)
    for first, end in ((0, 1), (shape[0] // 2, shape[0]), (shape[0] - 1, shape[0])):
        rows = torch.empty(end - first, shape[1])
        found.rows(first, end, rows)
        torch.testing.assert_close(rows, full[first:end], rtol=1e-6, atol=0)


@pytest.mark.parametrize("name", [name for name in FORMATS if "bitsandbytes" not in name and "nf4" not in name])
def test_any_rows_can_be_asked_for(name: str, tmp_path: Path):
    """Also those that share a word with others: outputs from 3 to 21."""
    weight = torch.randn(40, 64, generator=torch.Generator().manual_seed(3))
    if "blocks" in name:
        weight = weight[:, :50].contiguous()
    tensors, full = FORMATS[name].pack(weight)
    found = read_alone(tensors, FORMATS[name].said, tmp_path)
    rows = torch.empty(18, weight.shape[1], dtype=torch.bfloat16)
    found.rows(3, 21, rows)
    torch.testing.assert_close(rows, full[3:21].bfloat16(), rtol=1e-2, atol=1e-5)
    torch.testing.assert_close(found.translated(), full, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("columns", [64, 33, 7, 100])
def test_blocks_of_bitsandbytes_go_over_rows(columns: int, tmp_path: Path):
    """By the layout, in a loop: the library's own CPU kernel (0.50) is wrong where a row is no multiple of a block."""
    generator = torch.Generator().manual_seed(columns)
    count = 6 * columns
    codes = torch.randint(0, 16, (count + count % 2,), generator=generator)
    table, largest = torch.randn(16, generator=generator), torch.rand(-(-count // 64), generator=generator)
    full = torch.tensor([float(table[codes[i]].double() * largest[i // 64].double()) for i in range(count)])
    state = {"quant_type": "nf4", "blocksize": 64, "dtype": "float32", "shape": [6, columns]}
    tensors = {
        "weight": (codes[0::2] << 4 | codes[1::2]).to(torch.uint8)[:, None],
        "weight.absmax": largest,
        "weight.quant_map": table,
        "weight.quant_state.bitsandbytes__nf4": torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8),
    }
    found = read_alone(tensors, {"quant_method": "bitsandbytes", "load_in_4bit": True}, tmp_path)
    torch.testing.assert_close(found.translated(), full.view(6, columns), rtol=1e-6, atol=0)
    rows = torch.empty(3, columns)
    found.rows(1, 4, rows)
    torch.testing.assert_close(rows, full.view(6, columns)[1:4], rtol=1e-6, atol=0)


def read_alone(tensors: dict[str, torch.Tensor], said: dict[str, object], directory: Path) -> TranslatedTensor:
    """One matrix, without a model."""
    file, maps = directory / "one.safetensors", FileMaps()
    save_file({f"x.{suffix}": tensor for suffix, tensor in tensors.items()}, file)
    stored = {name.removeprefix("x."): tensor for name, tensor in stored_tensors(file).items()}
    method = method_of({"quant_method": None, **said}, directory)
    reader = method.reader_of(stored)
    assert reader is not None
    found = reader(Module("x", stored, maps), method.packing, torch.float32).tensor(maps)
    assert isinstance(found, TranslatedTensor)
    return found


# What is not taken along.


def test_activations_and_caches_that_stay_in_floats_are_told(checkpoints, tmp_path: Path):
    packed, source = tmp_path / "packed", checkpoints("llama2", torch.float32, 1)
    write_foreign(source, packed, FORMATS["fp8 of modelopt"])
    with pytest.warns(UserWarning, match=r"packed is read as FP8 of modelopt, weights only: activations, quantised"):
        listed = open_checkpoint(packed).tensors()
    assert listed.keys() == load_file(source / "model.safetensors").keys()
    tensors = load_file(packed / "model.safetensors")
    tensors["model.layers.0.self_attn.k_proj.k_scale"] = torch.ones(())
    save_file(tensors, packed / "model.safetensors")
    with pytest.warns(UserWarning, match="weights only: activations and the KV cache, quantised"):
        assert open_checkpoint(packed).tensors().keys() == listed.keys()


def test_a_config_alone_plans_like_the_files(some: tuple[Path, Path]):
    options = LoadConfig(**OPTIONS, density=0.5, quantize="none", max_cpu_mem=None)
    plans = [
        plan_for(examine(some[0], options)),
        plan_for(examine_checkpoint(read_config(some[0] / "config.json"), options)),
    ]
    assert plans[1].full_bytes == plans[0].full_bytes
    slots = [plan.prefill_parts["slots"] for plan in plans]
    assert slots[1] == pytest.approx(slots[0], rel=0.15)  # tables and indices of a large model take a smaller share
    assert slots[1] > plan_for(examine(some[1], options)).prefill_parts["slots"]


def test_a_packed_head_is_no_tied_one(checkpoints, tmp_path: Path):
    packed = tmp_path / "packed"
    write_foreign(checkpoints("llama3", torch.float32, 1), packed, FORMATS["fp8"])
    tensors = load_file(packed / "model.safetensors")
    head, full = FORMATS["fp8"].pack(torch.randn(320, 32, generator=torch.Generator().manual_seed(9)))
    tensors |= {f"lm_head.{suffix}": tensor for suffix, tensor in head.items()}
    save_file(tensors, packed / "model.safetensors")
    model = build(open_checkpoint(packed))
    torch.testing.assert_close(in_memory(model.lm_head.weight.detach()), full)
