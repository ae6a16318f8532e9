"""Checkpoints that see as well: their language model alone is planned, loaded, converted and run."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from safetensors.torch import load_file, save_file
from tiny_models import VOCAB

from griffin_offload import GriffinModel, UsageError
from griffin_offload.blocks.layouts import LeftOut
from griffin_offload.checkpoint.registry import read_config
from griffin_offload.config import LoadConfig
from griffin_offload.engine.convert import convert
from griffin_offload.engine.spec import examine, examine_checkpoint, plan_for

_TEXT: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}
# As many layers as the text has, of a kind that has feed-forward blocks of a known layout, too.
_SIGLIP = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
_SAM = {"hidden_size": 32, "output_channels": 16, "mlp_dim": 64, "window_size": 2, "global_attn_indexes": [1]}
_LAYERS = {"sliding_window": 16, "layer_types": ["sliding_attention", "full_attention"]}
OPTIONS = {"device": "cpu", "ctx_size": 64, "density": 1.0}
PROMPT = torch.arange(5, 45)[None]


def _gemma3() -> hf.PreTrainedConfig:
    text = _TEXT | _LAYERS | {"head_dim": 16}
    return hf.Gemma3Config(
        text_config=text, vision_config=_SIGLIP | {"image_size": 28, "patch_size": 14}, mm_tokens_per_image=4
    )


def _got_ocr2() -> hf.PreTrainedConfig:
    vision = _SAM | {"num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 64, "patch_size": 16}
    return hf.AutoConfig.for_model("got_ocr2", text_config=_TEXT, vision_config=vision)


def _fuyu() -> hf.PreTrainedConfig:
    text = _TEXT | {"model_type": "persimmon"}
    return hf.AutoConfig.for_model("fuyu", text_config=text, hidden_size=32, patch_size=4, vocab_size=VOCAB)


def _llama4() -> hf.PreTrainedConfig:
    experts = {"num_local_experts": 4, "intermediate_size_mlp": 48, "interleave_moe_layer_step": 2}
    text = _TEXT | experts | {"head_dim": 16, "attention_chunk_size": 16, "no_rope_layers": [1, 0]}
    vision = _SIGLIP | {"image_size": 28, "patch_size": 14, "vision_output_dim": 32}
    vision |= {"projector_input_dim": 32, "projector_output_dim": 32}
    return hf.Llama4Config(text_config=text, vision_config=vision)


def _qwen3_5() -> hf.PreTrainedConfig:
    sizes = {"num_key_heads": 2, "num_value_heads": 4, "key_head_dim": 16, "value_head_dim": 16}
    states = {f"linear_{name}": size for name, size in sizes.items()}
    text = _TEXT | states | {"head_dim": 16, "layer_types": ["linear_attention", "full_attention"]}
    vision = {"depth": 2, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2, "out_hidden_size": 32}
    return hf.Qwen3_5Config(text_config=text, vision_config=vision | {"patch_size": 14})


CONFIGS = {"gemma3": _gemma3, "got_ocr2": _got_ocr2, "fuyu": _fuyu, "llama4": _llama4, "qwen3_5": _qwen3_5}
OF_TEXT_ALONE = ("llama4", "qwen3_5")
"""What transformers makes as a causal language model has no place for a tower; checkpoints have."""


@pytest.fixture(params=list(CONFIGS))
def seeing(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, Any]:
    """A checkpoint, and the stock model that was saved."""
    torch.manual_seed(0)
    kind = hf.AutoModelForImageTextToText if request.param in OF_TEXT_ALONE else hf.AutoModelForCausalLM
    model = kind.from_config(CONFIGS[request.param](), dtype=torch.float32).eval()
    model.generation_config.eos_token_id = None
    model.save_pretrained(tmp_path / "seeing")
    return tmp_path / "seeing", model


def of_tower(name: str) -> bool:
    return any(word in name for word in ("vision", "visual", "projector"))


def language_bytes(model: Any) -> int:
    text = {id(p): p for part in (model.get_decoder(), model.get_output_embeddings()) for p in part.parameters()}
    return sum(p.nbytes for p in text.values())


def answers(directory: Path, **options: Any) -> list[int]:
    with GriffinModel.from_pretrained(directory, max_gpu_mem="1GB", **OPTIONS, **options) as model:
        return model.generate(PROMPT, max_new_tokens=6, do_sample=False)[0].tolist()


def test_the_language_model_alone_is_resident_and_answers(seeing):
    directory, stock = seeing
    everything = sum(p.nbytes for p in stock.parameters())
    with GriffinModel.from_pretrained(directory, max_gpu_mem="1GB", **OPTIONS, quantize="none") as model:
        dense = hf.AutoModelForCausalLM.from_pretrained(directory)
        expected = dense.generate(PROMPT, max_new_tokens=6, do_sample=False)
        assert torch.equal(model.generate(PROMPT, max_new_tokens=6, do_sample=False), expected)
        assert model.resident_bytes == model.plan.resident_bytes
        assert sum(p.nbytes for p in model.model.parameters()) == language_bytes(stock) < everything
        buffers = sum(b.nbytes for b in model.model.buffers())
        assert model.plan.full_bytes == language_bytes(stock) + buffers
    planned = plan_for(examine_checkpoint(read_config(directory / "config.json"), LoadConfig("1GB", **OPTIONS)))
    assert planned.full_bytes < everything


def test_images_are_refused_by_name(seeing):
    directory, stock = seeing
    with GriffinModel.from_pretrained(directory, max_gpu_mem="1GB", **OPTIONS, quantize="none") as model:
        for name in ("pixel_values", "image_patches", "input_features"):
            with pytest.raises(UsageError, match=f"{name} cannot be used here: text alone is run"):
                model.generate(PROMPT, **{name: torch.zeros(1, 3, 28, 28)})
        towers = [module for module in model.model.modules() if isinstance(module, LeftOut)]
        assert bool(towers) == (type(model.model).__name__ == type(stock).__name__)
        for tower in towers:
            with pytest.raises(UsageError, match="is left out: text alone is run here"):
                tower(torch.zeros(1, 3, 28, 28))


def test_converted_copies_hold_the_language_model(seeing, tmp_path: Path):
    directory, _ = seeing
    convert(directory, tmp_path / "int8", "int8")
    assert answers(tmp_path / "int8") == answers(directory, quantize="int8")
    names = [name for path in (tmp_path / "int8").glob("*.safetensors") for name in load_file(path)]
    assert names
    assert not [name for name in names if of_tower(name)]


def test_files_without_the_tower_are_enough(seeing):
    directory, _ = seeing
    expected = answers(directory, quantize="none")
    file = directory / "model.safetensors"
    text = {n: t for n, t in load_file(file).items() if not of_tower(n)}
    save_file(text, file, metadata={"format": "pt"})
    assert answers(directory, quantize="none") == expected


def test_towers_of_another_precision_cost_nothing(seeing):
    directory, _ = seeing
    uniform = plan_for(examine(directory, LoadConfig("1GB", **OPTIONS)))
    file = directory / "model.safetensors"
    other = {n: t.half() if of_tower(n) else t for n, t in load_file(file).items()}
    save_file(other, file, metadata={"format": "pt"})
    assert plan_for(examine(directory, LoadConfig("1GB", **OPTIONS))).parts == uniform.parts


def test_a_model_of_text_is_left_as_it_is(checkpoints):
    with GriffinModel.from_pretrained(checkpoints("gemma3"), max_gpu_mem="1GB", **OPTIONS) as model:
        assert not any(isinstance(module, LeftOut) for module in model.model.modules())
