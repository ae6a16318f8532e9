"""Files that hold other than config.json says: another head than the tied one, tensors of several precisions."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import quantised_reference as ref
import torch
import transformers as hf
from safetensors.torch import load_file, save_file
from tiny_models import LAYERS, VOCAB, write_tokenizer
from torch import Tensor

from griffin_offload import DoesNotFit, GriffinModel
from griffin_offload.blocks.model_shape import model_shape
from griffin_offload.blocks.sizes import ModelSizes
from griffin_offload.checkpoint import safetensors
from griffin_offload.checkpoint.registry import open_checkpoint
from griffin_offload.config import ExportForm, LoadConfig
from griffin_offload.engine import precisions
from griffin_offload.engine.convert import convert
from griffin_offload.engine.export import choose, export
from griffin_offload.engine.spec import examine, plan_for
from griffin_offload.errors import CheckpointError
from griffin_offload.formats import Format
from griffin_offload.planner.plan import Plan

Change = Callable[[dict[str, Tensor]], dict[str, Tensor]]
OPTIONS = {"device": "cpu", "ctx_size": 64}
NEW_TOKENS = 6


def rewritten(source: Path, directory: Path, change: Change) -> Path:
    """A copy of a checkpoint with other tensors, in one file; whatever is new in another one."""
    tensors = {name: t for path in source.glob("*.safetensors") for name, t in load_file(path).items()}
    changed = change(dict(tensors))
    parts = {"a.safetensors": {n: t for n, t in changed.items() if n in tensors}}
    parts["b.safetensors"] = {n: t for n, t in changed.items() if n not in tensors}
    for name, part in parts.items():
        save_file({n: t.contiguous() for n, t in part.items()}, directory / name, metadata={"format": "pt"})
    weight_map = {n: name for name, part in parts.items() for n in part}
    (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (directory / "config.json").write_bytes((source / "config.json").read_bytes())
    return directory


def answer(directory: Path, **options: object) -> tuple[list[int], Plan]:
    with GriffinModel.from_pretrained(directory, max_gpu_mem="1GB", **(OPTIONS | options)) as model:
        tokens = model.generate(torch.arange(5, 25)[None], max_new_tokens=NEW_TOKENS, do_sample=False)
        assert model.resident_bytes == model.plan.resident_bytes
        assert model.last_report.peak_device_bytes <= model.plan.peak_bytes
        return tokens[0, 20:].tolist(), model.plan


def with_head(change: Callable[[Tensor], Tensor]) -> Change:
    def changed(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        table = next(t for name, t in tensors.items() if name.endswith(("embed_tokens.weight", "wte.weight")))
        return tensors | {"lm_head.weight": change(table)}

    return changed


def turned(table: Tensor) -> Tensor:
    return table.flip(0) * 1.5


@pytest.mark.parametrize("name", ["llama3", "gemma", "gpt2"])
def test_another_head_than_the_tied_one(checkpoints, tmp_path: Path, name: str):
    """It is planned, it answers, and converted copies answer with it, head quantised or not."""
    tied = checkpoints(name)
    source = tmp_path / "untied"
    source.mkdir()
    rewritten(tied, source, with_head(turned))
    plan = plan_for(examine(source, LoadConfig(max_gpu_mem="1GB", density=1.0, quantize="none", **OPTIONS)))
    assert plan.parts["head"] == plan.parts["embeddings"] > 0
    reference = hf.AutoModelForCausalLM.from_pretrained(source).eval()
    expected = reference.generate(torch.arange(5, 25)[None], max_new_tokens=NEW_TOKENS, do_sample=False)
    assert answer(source, density=1.0, quantize="none")[0] == expected[0, 20:].tolist()
    quantised, _ = answer(source, density=1.0, quantize="int8")
    convert(source, tmp_path / "int8", "int8")
    assert answer(tmp_path / "int8", density=1.0)[0] == quantised
    assert json.loads((tmp_path / "int8" / "config.json").read_text())["tie_word_embeddings"] is False
    convert(source, tmp_path / "tables", "int8", tables="int8")
    assert answer(tmp_path / "tables", density=1.0)[1].parts["head"] > 0


def saved(source: Path, target: Path) -> Path:
    with GriffinModel.from_pretrained(source, max_gpu_mem="1GB", density=1.0, quantize="none", **OPTIONS) as model:
        model.save_pretrained(target)
    return target


def exported(form: ExportForm) -> Callable[[Path, Path], Path]:
    def write(source: Path, target: Path) -> Path:
        options = {"always_stream": True, "density": 0.5, "keep_prompts": True}
        with GriffinModel.from_pretrained(source, max_gpu_mem="1GB", **OPTIONS, **options) as model:
            choice = choose(model, [torch.arange(5 + i, 25 + i) for i in range(3)])
        return export(source, target, choice, 0.5, form=form).directory

    return write


COPIES: dict[str, Callable[[Path, Path], Path]] = {
    "int4": lambda source, target: convert(source, target, "int4").directory,
    "int2": lambda source, target: convert(source, target, "int2").directory,
    "saved": saved,
    "exported": exported("unquantized"),
    "packed": exported("w4a16"),
    "gguf": lambda source, target: exported("gguf")(source, target) / "model.gguf",
    "copy of a copy": lambda source, target: (
        convert(exported("unquantized")(source, target.with_name("first")), target, "int8").directory
    ),
}


@pytest.mark.parametrize("way", list(COPIES))
def test_every_way_to_write_a_copy_keeps_another_head(checkpoints, tmp_path: Path, way: str):
    source = tmp_path / "untied"
    source.mkdir()
    tied = checkpoints("llama3")
    rewritten(tied, source, with_head(turned))
    write_tokenizer(source)
    table = hf.AutoModelForCausalLM.from_pretrained(tied).get_input_embeddings().weight
    with GriffinModel.from_pretrained(COPIES[way](source, tmp_path / "copy"), max_gpu_mem="1GB", **OPTIONS) as model:
        torch.testing.assert_close(model.model.get_input_embeddings().weight[: len(table)], table)
        head, own = model.model.get_output_embeddings(), turned(table)
        if not head.weight.is_floating_point():  # it rests in int8, and is compared by what it does
            own = ref.head_values(own.detach())
        numbers = head(torch.eye(own.shape[1])).T[: len(own)]
        torch.testing.assert_close(numbers, own, rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("same", [lambda table: table.clone(), lambda table: table.double()], ids=["same", "wider"])
def test_the_same_head_again_stays_tied(checkpoints, tmp_path: Path, same: Callable[[Tensor], Tensor]):
    source = rewritten(checkpoints("llama3"), tmp_path, with_head(same))
    assert not open_checkpoint(source).untied
    tied = answer(checkpoints("llama3"), density=1.0, quantize="none")
    tokens, plan = answer(source, density=1.0, quantize="none")
    assert tokens == tied[0]
    assert plan.parts["head"] == 0


def test_files_without_a_second_table_need_no_model_to_be_opened(checkpoints, monkeypatch):
    """Building one is a third of what opening and planning takes."""

    def build(*_: object) -> None:
        raise AssertionError("a model was built")

    monkeypatch.setattr(safetensors, "build_on_meta", build)
    assert not open_checkpoint(checkpoints("llama3")).untied


def test_one_row_makes_another_head(checkpoints, tmp_path: Path):
    """As tokens that were added by fine-tuning do: the last one is compared, too."""

    def changed(table: Tensor) -> Tensor:
        head = table.clone()
        head[-1] += 1
        return head

    assert open_checkpoint(rewritten(checkpoints("llama3"), tmp_path, with_head(changed))).untied


@pytest.mark.parametrize("shape", [(VOCAB * 32,), (VOCAB - 1, 32), (0, 32), (VOCAB, 32, 1)], ids=str)
def test_a_head_of_another_shape_is_said(checkpoints, tmp_path: Path, shape: tuple[int, ...]):
    source = rewritten(checkpoints("llama3"), tmp_path, with_head(lambda _: torch.zeros(shape)))
    with pytest.raises(CheckpointError, match=r"does not match its config.json: 1 mismatched keys, first .*lm_head"):
        GriffinModel.from_pretrained(source, max_gpu_mem="1GB", **OPTIONS)


def test_a_head_without_a_tie_in_the_config_is_not_read(checkpoints, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("griffin_offload.checkpoint.safetensors._equal", None)
    assert not open_checkpoint(checkpoints("llama2")).untied


def wider(*parts: str) -> Change:
    """Tensors with one of `parts` in their names in double precision: loading makes float32 of them."""
    return lambda tensors: {n: t.double() if any(part in n for part in parts) else t for n, t in tensors.items()}


@pytest.mark.filterwarnings("ignore:.*converted while loading and rest in RAM")
def test_layers_of_another_precision_stay_in_memory(checkpoints, tmp_path: Path):
    uniform = checkpoints("llama2")
    mixed = rewritten(uniform, tmp_path, wider("layers.1.mlp"))
    _, plain = answer(uniform, density=0.5, quantize="none")
    _, plan = answer(mixed, density=0.5, quantize="none")
    layer = 3 * 128 * 32 * 4
    assert plan.parts["offloaded"] == plan.decode_parts["offloaded"] == layer
    assert plan.peak_decode_bytes - plain.peak_decode_bytes == layer
    with GriffinModel.from_pretrained(mixed, max_gpu_mem=plan.peak_bytes, **OPTIONS, density=0.5, quantize="none") as m:
        m.generate(torch.arange(5, 45)[None], max_new_tokens=4, do_sample=False)
        assert m.last_report.peak_device_bytes <= m.plan.budget_bytes
        assert m.engine.loaded.layers.source.unmapped_bytes == layer
    with pytest.raises(DoesNotFit, match="offloaded"):
        GriffinModel.from_pretrained(mixed, max_gpu_mem=plan.peak_bytes // 2, **OPTIONS, density=0.5, quantize="none")


def test_what_is_resident_is_twice_there_until_it_has_arrived(checkpoints, tmp_path: Path):
    mixed = rewritten(checkpoints("llama2"), tmp_path, wider("self_attn.q_proj", "layers.0.mlp.up_proj", "model.norm"))
    _, plan = answer(mixed, density=1.0, quantize="int8")
    assert plan.prefill_parts["converted"] == 4 * (LAYERS * 32 * 32 + 128 * 32 + 32)
    assert plan.decode_parts["converted"] == 0
    assert "offloaded" not in plan.parts or plan.parts["offloaded"] == 0


def test_embeddings_of_another_precision_are_on_the_device(checkpoints, tmp_path: Path):
    """On the CPU they would be a copy in memory that no ledger knows of."""
    options = {"density": 0.25, "quantize": "none"}
    mixed = rewritten(checkpoints("llama2"), tmp_path, wider("embed_tokens"))
    least = plan_for(examine(mixed, LoadConfig(max_gpu_mem="1GB", **OPTIONS, **options))).peak_bytes
    plan = plan_for(examine(mixed, LoadConfig(max_gpu_mem=least, **OPTIONS, **options)))
    assert plan.embeddings == "device"
    assert plan.prefill_parts["converted"] == VOCAB * 32 * 4


@pytest.mark.parametrize("name", ["llama2", "gpt2", "gemma3"])
def test_files_of_one_precision_have_no_such_parts(checkpoints, name: str):
    plan = plan_for(examine(checkpoints(name), LoadConfig(max_gpu_mem="1GB", **OPTIONS, density=0.5, quantize="none")))
    assert not {"converted", "offloaded"} & set(plan.parts)


def test_memory_of_the_host_is_not_the_devices(checkpoints, tmp_path: Path):
    mixed = rewritten(checkpoints("llama2"), tmp_path, wider("layers.1.mlp", "self_attn"))
    config = LoadConfig(max_gpu_mem="3GB", ctx_size=64, density=0.5, quantize="none", device="cuda")
    plan = plan_for(examine(mixed, config, anywhere=True))
    assert not {"converted", "offloaded"} & set(plan.parts)


def test_precisions_that_were_not_asked_for_are_measured_for_a_remedy_alone(checkpoints, monkeypatch):
    measured: list[str] = []

    def noted(meta: object, precision: Format, *more: object, **named: object) -> ModelSizes:
        measured.append(precision.name)
        return model_shape(meta, precision, *more, **named)

    monkeypatch.setattr(precisions, "model_shape", noted)
    config = LoadConfig(device="cpu", quantize="int8", density=1.0, max_gpu_mem="1GB")
    plan_for(examine(checkpoints("llama2"), config))
    assert measured == ["int8"]
    with pytest.raises(DoesNotFit):
        plan_for(examine(checkpoints("llama2"), replace(config, max_gpu_mem="100kB")))
    assert "int4" in measured
