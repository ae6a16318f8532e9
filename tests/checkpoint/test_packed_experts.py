"""Experts that others packed: read as they lie, and what transformers makes of the same files."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from foreign_formats import FORMATS, Foreign, fp8_blocks, write_foreign
from loaded_model import ids
from marks import mostly_slow
from packed_experts import write_mxfp4
from safetensors.torch import load_file, save_file
from tiny_models import VOCAB, write_checkpoint
from torch import Tensor

from griffin_offload import GriffinModel
from griffin_offload.checkpoint.registry import read_config
from griffin_offload.config import LoadConfig
from griffin_offload.engine.convert import convert
from griffin_offload.engine.spec import examine, examine_checkpoint, plan_for
from griffin_offload.errors import CheckpointError

GREEDY = {"do_sample": False, "output_logits": True, "return_dict_in_generate": True, "max_new_tokens": 8}
EXPERTS, HIDDEN, INNER = 8, 32, 96


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_mxfp4(tmp_path_factory.mktemp("mxfp4") / "model")


@pytest.fixture(scope="module")
def unpacked(packed: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What transformers makes of it, in a directory of its own."""
    directory = tmp_path_factory.mktemp("bf16") / "model"
    config = hf.Mxfp4Config(dequantize=True)
    model = hf.AutoModelForCausalLM.from_pretrained(packed, quantization_config=config, dtype=torch.bfloat16)
    tensors = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    directory.mkdir()
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})
    said = json.loads((packed / "config.json").read_text())
    del said["quantization_config"]
    (directory / "config.json").write_text(json.dumps(said))
    return directory


def _answer(directory: Path, **options: Any) -> tuple[Tensor, Tensor, Any]:
    prompt = ids(tokens=20) % (VOCAB - 8)
    sizes = {"max_gpu_mem": "40MB", "ctx_size": 64}
    with GriffinModel.from_pretrained(directory, device="cpu", **sizes, **options) as model:
        found = model.generate(prompt, attention_mask=torch.ones_like(prompt), **GREEDY)
        report = model.last_report
        assert report.peak_device_bytes <= model.plan.peak_bytes
        assert model.resident_bytes == model.plan.resident_bytes
        return found.sequences, torch.stack(found.logits), report


def test_mxfp4_is_what_transformers_makes_of_it(packed: Path, unpacked: Path):
    """Numbers of four bits times powers of two have all of their bits in bfloat16."""
    dense = hf.AutoModelForCausalLM.from_pretrained(unpacked, dtype=torch.float32).eval()
    prompt = ids(tokens=20) % (VOCAB - 8)
    expected = dense.generate(prompt, attention_mask=torch.ones_like(prompt), **GREEDY)
    for density in (0.25, 0.5, 1.0):
        sequences, logits, report = _answer(packed, quantize="none", density=density, dtype="float32")
        assert torch.equal(sequences, expected.sequences)
        theirs = torch.stack(expected.logits)
        assert (logits - theirs).abs().max() < 1e-5 * theirs.abs().max()
        numbers, biases = 3 * INNER * HIDDEN, 2 * INNER + HIDDEN
        stored = numbers // 2 + numbers // 32 + 2 * biases
        misses = report.experts.misses if density < 1 else 0
        assert report.decode_streamed_bytes == misses * stored + (report.experts.wrong_bytes if density < 1 else 0)
        assert (misses > 0) == (density < 1)


@pytest.mark.parametrize("precision", ["none", "int8", "int4"])
def test_packed_or_not_is_the_same(packed: Path, unpacked: Path, tmp_path: Path, precision: str):
    """Quantised on the way, converted, fetched or resident."""
    expected = _answer(unpacked, quantize=precision, density=1.0)[1]
    found, resident = (_answer(packed, quantize=precision, density=density)[1] for density in (0.25, 1.0))
    assert _near(found, expected, precision)
    assert torch.equal(found, resident)
    convert(packed, tmp_path / "copy", precision)
    assert torch.equal(_answer(tmp_path / "copy", quantize=precision, density=0.5)[1], found)
    config = json.loads((tmp_path / "copy" / "config.json").read_text())
    assert config["quantization_config"]["method"] == "griffin-offload"


def _near(found: Tensor, expected: Tensor, precision: str) -> bool:
    """Matrices that lie the other way are multiplied by another product, in bfloat16; quantised ones are the same."""
    if precision == "none":
        return bool((found[0] - expected[0]).abs().max() < 0.05 * expected[0].abs().max())
    return torch.equal(found, expected)


def test_loading_unpacks_nothing(packed: Path):
    sizes = {"max_gpu_mem": "40MB", "ctx_size": 64, "density": 0.5, "quantize": "none"}
    with GriffinModel.from_pretrained(packed, device="cpu", **sizes) as model:
        store = model.engine.loaded.layers.expert_store
        assert store.unmapped_bytes == 0
        kinds = [type(tensor).__name__ for tensor in store.tensors(0)]
        assert kinds == ["StackedTensor", "Tensor", "StackedTensor", "Tensor"]
        assert model.plan.kept == (4, 4, 4)


_HARM: dict[str, tuple[Callable[[dict[str, Tensor], str], Any], str]] = {
    "no scales": (lambda t, name: t.pop(f"{name}_scales"), r"lacks its down_proj_scales: download"),
    "no blocks": (lambda t, name: t.pop(f"{name}_blocks"), r"missing keys, first .*experts\.down_proj"),
    "another group": (
        lambda t, name: t.update({f"{name}_blocks": t[f"{name}_blocks"][..., :8].contiguous()}),
        r"down_proj_blocks is uint8 \[8, 32, 3, 8\], it has to be uint8 \?x\?x\?x16",
    ),
    "fewer scales": (
        lambda t, name: t.update({f"{name}_scales": t[f"{name}_scales"][:, :31].contiguous()}),
        r"down_proj_scales is uint8 \[8, 31, 3\], it has to be uint8 or float8_e8m0fnu 8x32x3",
    ),
    "fewer experts": (
        lambda t, name: t.update({f"{name}_{k}": t[f"{name}_{k}"][:7].contiguous() for k in ("blocks", "scales")}),
        r"1 mismatched keys, first .*experts\.down_proj",
    ),
}


@pytest.mark.parametrize("harm", _HARM)
def test_damaged_files(packed: Path, tmp_path: Path, harm: str):
    change, words = _HARM[harm]
    shutil.copytree(packed, tmp_path / "model")
    tensors = load_file(packed / "model.safetensors")
    change(tensors, "model.layers.1.mlp.experts.down_proj")
    save_file(tensors, tmp_path / "model" / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=words):
        _answer(tmp_path / "model", density=0.5)


@pytest.mark.parametrize(
    ("name", "precisions"), mostly_slow([("deepseek_v3", ("none", "int8", "int4")), ("qwen3_moe", ("int8",))], 1)
)
def test_fp8_in_blocks(name: str, precisions: tuple[str, ...], tmp_path: Path):
    """DeepSeek's and Qwen3's kind: of each matrix of each expert codes and a grid of scales."""
    source = write_checkpoint(name, tmp_path / "source", torch.bfloat16, shards=1)
    tensors = {key: tensor for file in source.glob("*.safetensors") for key, tensor in load_file(file).items()}
    plain = dict(tensors)
    for key in [key for key in tensors if "experts." in key and key.endswith("_proj.weight")]:
        packed, plain[key] = fp8_blocks(tensors.pop(key).float(), 20, 24)
        tensors |= {f"{key.removesuffix('weight')}{suffix}": tensor for suffix, tensor in packed.items()}
        plain[key] = plain[key].bfloat16()
    config = json.loads((source / "config.json").read_text())
    method = {"quant_method": "fp8", "weight_block_size": [20, 24], "modules_to_not_convert": ["lm_head"]}
    for kind, found, more in (("packed", tensors, {"quantization_config": method}), ("plain", plain, {})):
        (tmp_path / kind).mkdir()
        save_file(found, tmp_path / kind / "model.safetensors", {"format": "pt"})
        (tmp_path / kind / "config.json").write_text(json.dumps(config | more))
    for precision in precisions:
        expected = _answer(tmp_path / "plain", quantize=precision, density=1.0)[1]
        _, logits, report = _answer(tmp_path / "packed", quantize=precision, density=0.25)
        assert torch.equal(logits, expected)
        assert report.experts.misses > 0
        convert(tmp_path / "packed", tmp_path / precision, precision)
        assert torch.equal(_answer(tmp_path / precision, quantize=precision, density=0.5)[1], expected)


_LEFT_OUT = ["lm_head", "self_attn", "shared_expert", "router", "feed_forward.gate_proj"]
_FP8 = {"quant_method": "fbgemm_fp8", "modules_to_not_convert": _LEFT_OUT}


def _llama4(directory: Path, *, turned: bool) -> tuple[Path, Path]:
    """Llama 4's experts in FP8 with a scale for each output, and the same numbers in bfloat16."""
    source = write_checkpoint("llama4", directory / "source", torch.bfloat16, shards=1)
    tensors = {key: tensor for file in source.glob("*.safetensors") for key, tensor in load_file(file).items()}
    plain = dict(tensors)
    for key in [key for key in tensors if key.endswith(("experts.gate_up_proj", "experts.down_proj"))]:
        scale = tensors[key].float().abs().amax(1, keepdim=True) / 448
        tensors[key] = (tensors[key].float() / scale).to(torch.float8_e4m3fn)
        tensors[f"{key}_scale"] = scale.transpose(1, 2).contiguous() if turned and "down" in key else scale
        plain[key] = (tensors[key].float() * scale).bfloat16()
    config = json.loads((source / "config.json").read_text())
    for kind, found, more in (("packed", tensors, {"quantization_config": _FP8}), ("plain", plain, {})):
        (directory / kind).mkdir()
        save_file(found, directory / kind / "model.safetensors", {"format": "pt"})
        (directory / kind / "config.json").write_text(json.dumps(config | more))
    return directory / "packed", directory / "plain"


@pytest.mark.parametrize(
    ("turned", "precisions"), mostly_slow([(True, ("none", "int8", "int4")), (False, ("int4",))], 1)
)
def test_fp8_with_the_experts_of_a_layer_in_one_tensor(tmp_path: Path, turned: bool, precisions: tuple[str, ...]):
    """As transformers lays them out for fbgemm, whose scales of down projections lie the other way."""
    packed, plain = _llama4(tmp_path, turned=turned)
    for precision in precisions:
        expected = _answer(plain, quantize=precision, density=1.0)[1]
        for density in (0.25, 1.0):
            assert torch.equal(_answer(packed, quantize=precision, density=density)[1], expected)
    dense = hf.AutoModelForCausalLM.from_pretrained(plain, dtype=torch.float32).eval()
    prompt = ids(tokens=20) % (VOCAB - 8)
    theirs = dense.generate(prompt, attention_mask=torch.ones_like(prompt), **GREEDY)
    convert(packed, tmp_path / "copy", "int8")
    assert torch.equal(_answer(tmp_path / "copy", density=0.5)[1], _answer(packed, quantize="int8", density=1.0)[1])
    with GriffinModel.from_pretrained(packed, device="cpu", max_gpu_mem="40MB", ctx_size=64, density=0.5) as model:
        first = model.generate(prompt, attention_mask=torch.ones_like(prompt), **GREEDY).logits[0]
    assert (first - theirs.logits[0]).abs().max() < 0.05 * theirs.logits[0].abs().max()


def _one_by_one(directory: Path, foreign: Foreign) -> tuple[Path, Path]:
    """Llama 4's experts, each matrix of each packed by itself, in rows of outputs; and the same numbers in bfloat16."""
    source = write_checkpoint("llama4", directory / "source", torch.bfloat16, shards=1)
    tensors = {key: tensor for file in source.glob("*.safetensors") for key, tensor in load_file(file).items()}
    plain = dict(tensors)
    for key in [key for key in tensors if key.endswith(("experts.gate_up_proj", "experts.down_proj"))]:
        names = ("gate_proj", "up_proj") if "gate_up" in key else ("down_proj",)
        stem, numbers = key.rpartition(".")[0], []
        for expert, matrix in enumerate(tensors.pop(key)):
            parts = [foreign.pack(part.float().contiguous()) for part in matrix.t().chunk(len(names))]
            for name, (packed, _) in zip(names, parts, strict=True):
                tensors |= {f"{stem}.{expert}.{name}.{suffix}": tensor.clone() for suffix, tensor in packed.items()}
            numbers.append(torch.cat([exact for _, exact in parts]).t())
        plain[key] = torch.stack(numbers).bfloat16().contiguous()
    config = json.loads((source / "config.json").read_text())
    for kind, found, more in (("packed", tensors, {"quantization_config": foreign.said}), ("plain", plain, {})):
        (directory / kind).mkdir()
        save_file(found, directory / kind / "model.safetensors", {"format": "pt"})
        (directory / kind / "config.json").write_text(json.dumps(config | more))
    return directory / "packed", directory / "plain"


@pytest.mark.parametrize(
    ("method", "precisions"),
    mostly_slow([("compressed fp8 rows", ("none", "int8", "int4")), ("compressed 4 bit", ("none", "int8"))], 1),
)
def test_llama_4_one_expert_after_the_other(method: str, precisions: tuple[str, ...], tmp_path: Path):
    """As llm-compressor saves it, which quantises matrices of linear layers: transformers knows no such files."""
    packed, plain = _one_by_one(tmp_path, FORMATS[method])
    for precision in precisions:
        expected = _answer(plain, quantize=precision, density=1.0)[1]
        for density in (0.25, 1.0):
            assert torch.equal(_answer(packed, quantize=precision, density=density)[1], expected)
        convert(packed, tmp_path / precision, precision)
        assert torch.equal(_answer(tmp_path / precision, quantize=precision, density=0.5)[1], expected)


def test_a_config_alone_plans_with_packed_experts(tmp_path: Path):
    """Buffers for what is stored are beside those of what is made of it."""
    source = write_checkpoint("qwen3_moe", tmp_path / "source", torch.bfloat16, shards=1)
    write_foreign(source, tmp_path / "packed", FORMATS["compressed fp8 rows"], left_out="none")
    sizes = {"device": "cpu", "ctx_size": 64, "max_gpu_mem": "1GB", "max_cpu_mem": None}
    options = LoadConfig(**sizes, density=0.5, quantize="none")
    files = plan_for(examine(tmp_path / "packed", options))
    config = plan_for(examine_checkpoint(read_config(tmp_path / "packed" / "config.json"), options))
    plain = plan_for(examine_checkpoint(read_config(source / "config.json"), options))
    assert config.full_bytes == files.full_bytes
    assert config.prefill_parts["slots"] == pytest.approx(files.prefill_parts["slots"], rel=0.05)
    assert config.prefill_parts["slots"] > 1.2 * plain.prefill_parts["slots"]


def test_fp8_scales_of_another_shape(tmp_path: Path):
    packed, _ = _llama4(tmp_path, turned=True)
    tensors = load_file(packed / "model.safetensors")
    name = "model.layers.1.feed_forward.experts.gate_up_proj_scale"
    tensors[name] = tensors[name][:, :, :-1].contiguous()
    save_file(tensors, packed / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"gate_up_proj_scale is float32 \[8, 1, 191\], it has to be .* 8x1x192"):
        _answer(packed)
