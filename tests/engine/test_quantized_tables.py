"""Embeddings and head in int8: the model is that of tables rounded beforehand, tied or not, scaled or not; and the head
alone among matrices of fewer bits is what its formula says, while embeddings stay as they are stored."""

import inspect
from pathlib import Path

import pytest
import quantised_reference as ref
import torch
import transformers
from tiny_models import VOCAB, write_checkpoint, write_tokenizer
from torch import Tensor
from transformers import AutoModelForCausalLM

from griffin_offload import GriffinModel
from griffin_offload.engine.convert import convert
from griffin_offload.errors import UsageError
from griffin_offload.formats.linear import reads_head_itself


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


@pytest.mark.parametrize("precision", ["int4", "tiers"])
@pytest.mark.parametrize("name", ["llama2", "llama3", "gemma3", "opt_350m", "gptj"])
def test_the_head_rests_in_int8_among_matrices_of_fewer_bits(name: str, precision: str, tmp_path: Path):
    write_checkpoint(name, tmp_path)
    stock = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    model = GriffinModel.from_pretrained(
        tmp_path, device="cpu", max_gpu_mem="100MB", quantize=precision, dtype="float32", ctx_size=64
    )
    products, rows = [], []
    head, embedding = model.model.get_output_embeddings(), model.model.get_input_embeddings()
    head.register_forward_hook(lambda _, given, out: products.append((given[0], out)))
    embedding.register_forward_hook(lambda _, given, out: rows.append((given[0], out)))
    model.generate(torch.randint(3, VOCAB, (1, 20)), max_new_tokens=3, do_sample=False)

    rounded = ref.head_values(stock.get_output_embeddings().weight.detach())
    bias = getattr(stock.get_output_embeddings(), "bias", None)
    for x, logits in products:
        expected = torch.nn.functional.linear(x, rounded, bias)
        assert (logits - expected).norm() < 2e-4 * expected.norm()
    for ids, found in rows:
        assert torch.equal(found, stock.get_input_embeddings()(ids))
    assert model.plan.embeddings == "host" or not stock.config.tie_word_embeddings
    assert model.resident_bytes == model.plan.resident_bytes
    assert model.last_report.peak_device_bytes <= model.plan.peak_bytes


def test_where_the_head_stays_as_it_is_stored(tmp_path: Path):
    """In exact mode, and among int8."""
    write_checkpoint("llama2", tmp_path / "stored")
    floats = torch.float32
    for precision, exact, kind in (("int4", False, torch.int8), ("int4", True, floats), ("int8", False, floats)):
        copy = tmp_path / f"{precision} {exact}"
        convert(tmp_path / "stored", copy, precision)
        model = GriffinModel.from_pretrained(
            copy, device="cpu", max_gpu_mem="100MB", density=0.5, ctx_size=64, exact=exact
        )
        assert model.model.get_output_embeddings().weight.dtype == kind


def test_heads_that_a_stock_forward_reads_itself():
    """It would take their type for that of floats."""
    readers = {"Mamba", "FalconMamba", "Mamba2", "HYV4"}
    names = readers | {"Llama", "Gemma3", "GPTJ", "Bloom", "Qwen3Next"}
    classes = {name: getattr(transformers, f"{name}ForCausalLM", None) for name in names}
    found = {name for name, kind in classes.items() if kind is not None and reads_head_itself(kind)}
    assert found == {name for name in readers if classes[name] is not None}
    assert {"Mamba", "Mamba2"} <= found


def test_a_copy_of_such_a_model_keeps_its_tables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    write_checkpoint("llama2", tmp_path / "stored")
    stock = transformers.LlamaForCausalLM.forward

    def forward(self, *args, **kwargs):
        assert self.lm_head.weight.is_floating_point()
        return stock(self, *args, **kwargs)

    forward.__signature__ = inspect.signature(stock)
    monkeypatch.setattr(transformers.LlamaForCausalLM, "forward", forward)
    with pytest.raises(UsageError, match="--embeddings"):
        convert(tmp_path / "stored", tmp_path / "refused", "int8", tables="int8")
    model = GriffinModel.from_pretrained(
        tmp_path / "stored", device="cpu", max_gpu_mem="100MB", quantize="int4", ctx_size=64
    )
    model.generate(torch.randint(3, VOCAB, (1, 9)), max_new_tokens=2, do_sample=False)
    assert model.model.get_output_embeddings().weight.is_floating_point()
