"""Names as transformers takes them: every tensor of a built model is the one that transformers itself would load."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers as hf
from marks import by_turns
from safetensors.torch import load_file, save_file
from tiny_models import ARCHITECTURES
from torch import Tensor

from griffin_offload import GriffinModel
from griffin_offload.blocks.states import check_decodable
from griffin_offload.checkpoint.registry import open_checkpoint
from griffin_offload.engine.build import build
from griffin_offload.errors import CheckpointError, UnsupportedModel

Names = Callable[[str, str], str]
NAMES: dict[str, Names] = {
    "as saved": lambda name, prefix: name,
    "without the prefix": lambda name, prefix: name.removeprefix(f"{prefix}."),
    "with one more": lambda name, prefix: name if name.startswith(f"{prefix}.") else f"{prefix}.{name}",
}


def renamed(source: Path, directory: Path, names: Names, prefix: str) -> Path:
    directory.mkdir()
    tensors = {name: t for path in source.glob("*.safetensors") for name, t in load_file(path).items()}
    save_file({names(name, prefix): t for name, t in tensors.items()}, directory / "model.safetensors")
    for name in ("config.json", "generation_config.json"):
        (directory / name).write_bytes((source / name).read_bytes())
    return directory


@pytest.mark.parametrize(("name", "names"), by_turns(ARCHITECTURES, NAMES))
def test_every_tensor_is_the_one_transformers_loads(checkpoints, tmp_path: Path, name: str, names: str):
    prefix = build(open_checkpoint(checkpoints(name))).base_model_prefix
    directory = renamed(checkpoints(name), tmp_path / "renamed", NAMES[names], prefix)
    model, info = hf.AutoModelForCausalLM.from_pretrained(directory, output_loading_info=True)
    if info["missing_keys"]:  # GPT-NeoX's head is called otherwise in files, and never with a prefix
        with pytest.raises(CheckpointError, match=f"1 missing keys, first {min(info['missing_keys'])}"):
            build(open_checkpoint(directory))
        return
    theirs = model.state_dict()
    ours: dict[str, Tensor] = build(open_checkpoint(directory)).state_dict()
    assert {n for n, t in ours.items() if t.is_meta} == set()
    assert ours.keys() == theirs.keys()
    assert [n for n, t in ours.items() if t.dtype != theirs[n].dtype or not torch.equal(t, theirs[n])] == []


def test_what_was_renamed_is_saved_under_the_old_names_again(tmp_path: Path):
    """Experts are left to their own; here three convolutions became one."""
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4, "vocab_size": 64}
    config = hf.OlmoHybridConfig(**sizes, num_attention_heads=4, num_key_value_heads=4, pad_token_id=0)
    model = hf.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.save_pretrained(tmp_path / "a")
    built = build(open_checkpoint(tmp_path / "a"))
    assert built.state_dict().keys() == model.state_dict().keys()
    assert all(torch.equal(t, built.state_dict()[n]) for n, t in model.state_dict().items())
    built.save_pretrained(tmp_path / "b")
    saved = [load_file(tmp_path / place / "model.safetensors") for place in "ab"]
    assert saved[0].keys() == saved[1].keys() != model.state_dict().keys()
    assert all(torch.equal(tensor, saved[1][name]) for name, tensor in saved[0].items())


@pytest.mark.skipif(not hasattr(hf, "KimiLinearConfig"), reason="transformers before 5.23 does not have it")
def test_experts_by_patterns_that_are_expressions(tmp_path: Path):
    """Kimi Linear's rules are written with escaped dots: its experts were taken for such that have to be merged."""
    sizes = {"hidden_size": 64, "intermediate_size": 128, "moe_intermediate_size": 48, "num_hidden_layers": 4}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 320, "max_position_embeddings": 256}
    sizes |= {"linear_head_dim": 16, "linear_num_heads": 4, "kv_lora_rank": 16, "v_head_dim": 16, "pad_token_id": 0}
    sizes |= {"qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 2}
    sizes |= {"bos_token_id": 1, "eos_token_id": 2}
    kinds = ["linear_attention", "full_attention"] * 2
    torch.manual_seed(0)
    model = hf.AutoModelForCausalLM.from_config(hf.KimiLinearConfig(**sizes, layer_types=kinds)).eval()
    model.save_pretrained(tmp_path / "model")
    ids = torch.arange(5, 25)[None]
    expected = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=4, do_sample=False)
    with GriffinModel.from_pretrained(tmp_path / "model", device="cpu", max_gpu_mem="60MB", ctx_size=64) as found:
        assert torch.equal(found.generate(ids, max_new_tokens=4, do_sample=False), expected)


def test_types_whose_answers_differ_are_refused(checkpoints):
    model = build(open_checkpoint(checkpoints("llama2")))
    model.config.model_type = "deepseek_v4"
    with pytest.raises(UnsupportedModel, match="does not answer here as in transformers"):
        check_decodable(model)
