"""Embeddings and head in int8: the model is that of tables rounded beforehand, tied or not, scaled or not."""

from pathlib import Path

import pytest
import quantised_reference as ref
import torch
from tiny_models import VOCAB, write_checkpoint, write_tokenizer
from torch import Tensor
from transformers import AutoModelForCausalLM

from griffin_offload import GriffinModel
from griffin_offload.engine.convert import convert


def _with_rounded_tables(name: str, directory: Path) -> Path:
    """A checkpoint whose tables are on their int8 grids already, so that rounding them changes nothing."""
    write_checkpoint(name, directory / "first")
    model = AutoModelForCausalLM.from_pretrained(directory / "first")
    with torch.no_grad():
        for table in {id(t): t for t in (model.get_input_embeddings(), model.get_output_embeddings())}.values():
            weight = table.weight
            weight.copy_(ref.int8(weight, ref.int8_scale(weight).float()).values)
    model.save_pretrained(directory / "rounded")
    write_tokenizer(directory / "rounded")
    return directory / "rounded"


def _logits(path: Path) -> tuple[Tensor, GriffinModel]:
    model = GriffinModel.from_pretrained(path, device="cpu", max_gpu_mem="100MB", density=0.5, ctx_size=64)
    ids = torch.randint(3, VOCAB, (1, 40), generator=torch.Generator().manual_seed(0))
    output = model.generate(ids, max_new_tokens=6, do_sample=False, output_logits=True, return_dict_in_generate=True)
    return torch.stack(output.logits), model


# Untied; tied; tied and scaled inside the module; other width than the layers; head with a bias.
@pytest.mark.parametrize("name", ["llama2", "llama3", "gemma3", "opt_350m", "gptj"])
def test_tables(name: str, tmp_path: Path):
    checkpoint = _with_rounded_tables(name, tmp_path)
    for tables in ("none", "int8"):
        convert(checkpoint, tmp_path / tables, "int8", tables=tables)
    (plain, _), (quantised, model) = _logits(tmp_path / "none"), _logits(tmp_path / "int8")
    assert (quantised - plain).norm() / plain.norm() < 1e-5
    assert model.resident_bytes == model.plan.resident_bytes < sum(model.plan.plain_parts.values())
    assert model.last_report.peak_device_bytes <= model.plan.peak_bytes
    stored = {t: sum(f.stat().st_size for f in (tmp_path / t).glob("*.safetensors")) for t in ("none", "int8")}
    assert stored["int8"] < stored["none"]
    assert model.model.get_input_embeddings().weight.dtype == torch.int8
