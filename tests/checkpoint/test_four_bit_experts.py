"""Experts of files in four bits: the codes that they rest in, and what their file holds in more."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from support.gguf_files import write_gguf

from griffin_offload import GriffinModel
from griffin_offload.checkpoint.registry import open_checkpoint
from griffin_offload.engine.build import build
from griffin_offload.engine.convert import convert
from griffin_offload.errors import CheckpointError
from griffin_offload.formats.translated import in_memory

IDS = torch.arange(5, 45)[None]
OPTIONS = {"device": "cpu", "ctx_size": 64, "max_gpu_mem": "1GB", "dtype": "bfloat16"}


def mixture(neurons: int = 64) -> Any:
    sizes = {"hidden_size": 64, "moe_intermediate_size": neurons, "num_hidden_layers": 2, "num_attention_heads": 2}
    sizes |= {"num_experts": 4, "num_experts_per_tok": 2, "num_key_value_heads": 1, "head_dim": 32, "vocab_size": 320}
    torch.manual_seed(0)
    return transformers.Qwen3MoeForCausalLM(transformers.Qwen3MoeConfig(max_position_embeddings=512, **sizes)).eval()


@torch.no_grad()
def errors_of(model: GriffinModel, file: Path) -> list[list[float]]:
    """By layer, of what matrices of an expert multiply by, against the numbers of the file."""
    exact = dict(build(open_checkpoint(file).in_precision(torch.float32)).named_parameters())
    errors: list[list[float]] = []
    for index, block in enumerate(model.engine.loaded.layers.blocks):
        found = block.form.by_matrix([tensor[3] for tensor in block.places(block.full())])
        errors.append([])
        for matrix in block.form.matrices:
            numbers = in_memory(exact[f"model.layers.{index}.mlp.experts.{matrix.name}"]).detach()[3]
            ones = torch.eye(numbers.shape[1], dtype=torch.float32)
            back = block.form.multiply(ones, matrix, found[matrix.name]).t()
            errors[-1].append(float((back - numbers).norm() / numbers.norm()))
    return errors


@pytest.mark.parametrize(
    "others",
    [{"blk.1.ffn_down_exps": "Q8_0"}, {"blk.0.ffn_down_exps": "Q8_0", "blk.0.attn_q": "Q8_0"}],
)
def test_copies_hold_what_their_file_holds_in_more(
    others: dict[str, str], tmp_path: Path, recwarn: pytest.WarningsRecorder
):
    """Of experts, too, in records of their own size, layer by layer: the copy answers as its file to the last bit,
    resident or fetched."""
    file = write_gguf(mixture(), tmp_path / "mixed.gguf", "Q4_1", others=others)
    convert(file, tmp_path / "copy", "int4")
    assert not [one for one in recwarn if "in more than four bits" in str(one.message)]
    answers, errors = [], []
    for model_path, asked in ((file, {}), (tmp_path / "copy", {}), (tmp_path / "copy", {"density": 0.5})):
        with GriffinModel.from_pretrained(model_path, **OPTIONS, **asked) as model:
            found = model.generate(
                IDS, max_new_tokens=6, do_sample=False, output_logits=True, return_dict_in_generate=True
            )
            answers.append(torch.stack(found.logits))
            assert model.resident_bytes == model.plan.resident_bytes
            assert model.last_report.peak_device_bytes <= model.plan.peak_bytes
            if "density" not in asked:
                errors.append(errors_of(model, file))
    assert torch.equal(answers[1], answers[0])
    assert torch.equal(answers[2], answers[0])
    assert errors[1] == errors[0]
    assert len({path.stat().st_size for path in sorted((tmp_path / "copy").glob("model-0000[12]*"))}) == 2


def test_copies_of_even_files_say_nothing_of_experts(tmp_path: Path):
    file = write_gguf(mixture(), tmp_path / "even.gguf", "Q4_1")
    convert(file, tmp_path / "copy", "int4")
    assert "finer_experts" not in json.loads((tmp_path / "copy" / "config.json").read_text())["quantization_config"]


@pytest.mark.parametrize("said", [[], {"one": ["mlp.experts.down_proj"]}, {"1": "down"}, {"1": [3]}, {"9" * 20: []}])
def test_a_damaged_list_of_finer_experts_is_named(said: Any, tmp_path: Path):
    file = write_gguf(mixture(), tmp_path / "mixed.gguf", "Q4_1", others={"blk.1.ffn_down_exps": "Q8_0"})
    convert(file, tmp_path / "copy", "int4")
    config = json.loads((tmp_path / "copy" / "config.json").read_text())
    assert config["quantization_config"]["finer_experts"] == {"1": ["mlp.experts.down_proj"]}
    config["quantization_config"]["finer_experts"] = said
    (tmp_path / "copy" / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"damaged quantization_config|another conversion|convert again"):
        open_checkpoint(tmp_path / "copy")


@pytest.mark.parametrize(("kind", "most"), [("Q4_0", 0.025), ("Q4_1", 0.025), ("Q8_0", 0.12)])
def test_experts_rest_in_the_codes_of_their_file(kind: str, most: float, tmp_path: Path):
    """In int4, resident or fetched, down projections too; what lies on no grid of 16 levels is rounded."""
    file = write_gguf(mixture(), tmp_path / "tiny.gguf", kind)
    options = OPTIONS | {"quantize": "int4"}
    with GriffinModel.from_pretrained(file, **options, density=0.5) as model:
        fetched = model.generate(IDS, max_new_tokens=4, do_sample=False)
        assert model.last_report.experts.misses > 0
    with GriffinModel.from_pretrained(file, **options, density=1.0) as model:
        assert torch.equal(model.generate(IDS, max_new_tokens=4, do_sample=False), fetched)
        assert model.resident_bytes == model.plan.resident_bytes
        errors = [error for layer in errors_of(model, file) for error in layer]
    assert len(errors) == 2 * 2
    assert max(errors) < most
    assert kind != "Q8_0" or min(errors) > 0.05


def test_experts_of_no_whole_blocks_of_neurons(tmp_path: Path):
    """Their down projections do not lie in rows, and are rounded."""
    file = write_gguf(mixture(96), tmp_path / "tiny.gguf", "Q4_0")
    with GriffinModel.from_pretrained(file, **OPTIONS, quantize="int4", density=1.0) as model:
        model.generate(IDS, max_new_tokens=2, do_sample=False)
        assert model.resident_bytes == model.plan.resident_bytes
        for gate_up, down in errors_of(model, file):
            assert gate_up < 0.025 < down < 0.12


def test_what_experts_hold_in_more_rests_in_int8(tmp_path: Path):
    """Unasked, and in the layers that have it: fetched or resident, the same numbers inside the planned bytes."""
    file = write_gguf(mixture(), tmp_path / "tiny.gguf", "Q4_1", others={"blk.1.ffn_down_exps": "Q8_0"})
    answers, errors = [], []
    for asked in ({"density": 1.0}, {"density": 0.5}, {"prefer": "speed"}):
        with GriffinModel.from_pretrained(file, **OPTIONS, **asked) as model:
            answers.append(model.generate(IDS, max_new_tokens=4, do_sample=False))
            assert (model.plan.precision, model.plan.as_held) == ("int4", "prefer" not in asked)
            assert model.resident_bytes == model.plan.resident_bytes
            assert model.last_report.peak_device_bytes <= model.plan.peak_bytes
            if model.plan.density == 1:
                errors.append(errors_of(model, file))
    assert torch.equal(answers[0], answers[1])
    finer, coarse = errors
    assert finer[0] == coarse[0]
    assert finer[1][0] == coarse[1][0]
    assert finer[1][1] < 0.012
    assert coarse[1][1] > 0.05
