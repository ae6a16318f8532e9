"""What people try first that cannot be loaded: each is named, and what to do instead."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from griffin_offload.checkpoint.registry import open_checkpoint, read_config
from griffin_offload.errors import CheckpointError, ModelNotFound, UnsupportedModel

_METHODS: dict[str, tuple[dict[str, Any], str]] = {
    "hqq": ({"quant_method": "hqq"}, "hqq, which is not read here"),
    "no name": ({"scheme": "mine"}, "a method that its config.json does not name, which is not read here"),
    "gptq of 3 bits": ({"quant_method": "gptq", "bits": 3, "group_size": 128}, r"gptq \(3 bit\): 2, 4 and 8 bits are"),
    "gptq of a kernel": (
        {"quant_method": "gptq", "bits": 4, "checkpoint_format": "marlin"},
        r"gptq \(4 bit\): it is laid out for one kernel",
    ),
    "gptq of several bits": (
        {"quant_method": "gptq", "bits": 4, "dynamic": {"+:.*down_proj": {"bits": 8}}},
        r"gptq \(4 bit\): its modules have different bits",
    ),
    "awq of a kernel": (
        {"quant_method": "awq", "bits": 4, "version": "GEMV"},
        r"awq \(4 bit\): the layout gemm is read",
    ),
    "sparse": (
        {"quant_method": "compressed-tensors", "format": "dense", "sparsity_config": {"format": "sparse-24-bitmask"}},
        r"compressed-tensors \(dense\): its matrices are sparse",
    ),
    "turned": (
        {"quant_method": "compressed-tensors", "format": "pack-quantized", "transform_config": {"R1": {}}},
        r"compressed-tensors \(pack-quantized\): its activations are turned",
    ),
    "of the future": (
        {"quant_method": "compressed-tensors", "format": "mxfp6-pack-quantized"},
        r"compressed-tensors \(mxfp6-pack-quantized\): this format is not read",
    ),
    "modelopt's AWQ": ({"quant_method": "modelopt", "quant_algo": "W4A8_AWQ"}, r"modelopt \(W4A8_AWQ\): this format"),
}


@pytest.fixture
def copy(checkpoints, tmp_path: Path) -> Path:
    """A checkpoint of one file that may be changed."""
    source, target = checkpoints("llama2", torch.bfloat16, 1), tmp_path / "copy"
    target.mkdir()
    for file in ("config.json", "model.safetensors"):
        (target / file).write_bytes((source / file).read_bytes())
    return target


def _say(directory: Path, **entries: Any) -> None:
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | entries))


@pytest.mark.parametrize("name", list(_METHODS))
def test_others_quantisation_is_named_by_its_method(name: str, copy: Path):
    said, words = _METHODS[name]
    _say(copy, quantization_config=said)
    message = f"is quantised by {words}.*; take the checkpoint it was made from, and --quantize int8 or int4"
    with pytest.raises(UnsupportedModel, match=message):
        open_checkpoint(copy)
    with pytest.raises(UnsupportedModel, match=message):
        read_config(copy / "config.json")


_PLAIN: dict[str, tuple[dict[str, Any], str]] = {
    "awq": ({"quant_method": "awq", "bits": 4}, r"awq \(4 bit\)"),
    "gptq": ({"quant_method": "gptq", "bits": 4, "group_size": 128}, r"gptq \(4 bit\)"),
    "bitsandbytes": ({"load_in_4bit": True}, r"bitsandbytes \(4 bit\)"),
    "fp8": ({"quant_method": "fp8", "weight_block_size": [128, 128]}, "fp8"),
    "compressed": (
        {"config_groups": {"0": {"weights": {"num_bits": 8, "type": "float"}}}, "format": "float-quantized"},
        r"compressed-tensors \(float-quantized\)",
    ),
    "modelopt": ({"quant_method": "modelopt", "quant_algo": "FP8"}, r"modelopt \(FP8\)"),
    "mxfp4": ({"quant_method": "mxfp4"}, "mxfp4"),
}


@pytest.mark.filterwarnings("ignore:.* weights only: ")
@pytest.mark.parametrize("name", list(_PLAIN))
def test_plain_weights_under_a_config_that_says_otherwise(name: str, copy: Path):
    """As a merge or a fine-tune of a quantised model leaves it: neither packed nor refused without the reason."""
    said, words = _PLAIN[name]
    open_checkpoint(copy)
    _say(copy, quantization_config=said)
    message = rf"quantised by {words}, and holds plain bfloat16: 0 of its \d+ tensors are packed.*quantization_config"
    with pytest.raises(UnsupportedModel, match=message):
        open_checkpoint(copy)
    tensors = load_file(copy / "model.safetensors")
    rounded = next(name for name in tensors if name.endswith("down_proj.weight"))
    save_file(tensors | {f"{rounded}_scale": torch.ones(1)}, copy / "model.safetensors")
    assert open_checkpoint(copy).tensors().keys() == tensors.keys()


@pytest.mark.parametrize(
    ("dtype", "words"),
    [(torch.float8_e4m3fn, "FP8, F8_E4M3"), (torch.int8, "8-bit integers, I8"), (torch.uint8, "packed bytes, U8")],
)
def test_numbers_that_are_no_floats_are_named(dtype: torch.dtype, words: str, copy: Path):
    tensors = {name: tensor.to(dtype) for name, tensor in load_file(copy / "model.safetensors").items()}
    save_file(tensors, copy / "model.safetensors")
    with pytest.raises(UnsupportedModel, match=rf"is quantised \({words}\)"):
        open_checkpoint(copy)


def test_other_files_than_gguf_are_no_checkpoints(copy: Path):
    open_checkpoint(copy)
    (copy / "tiny.gguf").write_bytes(b"GGUF" + bytes(64))
    open_checkpoint(copy)  # beside a checkpoint it is nobody's business
    other = copy / "adapter.bin"
    other.write_bytes(b"PK")
    with pytest.raises(ModelNotFound, match="is a file, and no GGUF file: give the checkpoint's directory"):
        open_checkpoint(other)


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("qwen2_5_vl", r"vision-language model \(qwen2_5_vl\), whose language model is qwen2_5_vl_text: only text"),
        ("llava", "vision-language model"),
        ("t5", r"encoder-decoder model \(t5\): only models that are a decoder alone"),
        ("bart", r"encoder-decoder model \(bart\)"),
        ("vit", "of a vit model, which transformers knows no causal language model of"),
    ],
)
def test_other_kinds_of_models_are_named(kind: str, words: str, copy: Path):
    transformers.AutoConfig.for_model(kind).save_pretrained(copy)
    with pytest.raises(UnsupportedModel, match=words):
        open_checkpoint(copy)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("adapter_config.json", r"holds an adapter \(PEFT\).*give its base model, and this directory as --adapter"),
        ("params.json", "their maker's own layout.*version for transformers"),
        ("model/config.json", "model has one: give that directory"),
        ("snapshots/0123abc/config.json", "snapshots/0123abc has one: give that directory"),
        ("model.onnx", "has no config.json"),
    ],
)
def test_directories_of_other_kinds(tmp_path: Path, name: str, words: str):
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / name).write_text("{}")
    with pytest.raises((UnsupportedModel, CheckpointError), match=words):
        open_checkpoint(tmp_path)
