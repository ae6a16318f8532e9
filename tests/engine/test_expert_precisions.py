"""Experts in int8 and int4: resident or fetched the same numbers, those of the formulas, inside the planned bytes."""

import contextlib
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers as hf
from hypothesis import given, settings
from hypothesis import strategies as st
from loaded_model import ids
from marks import by_turns, mostly_slow
from quantised_reference import round_head, stored_values
from tiny_models import LAYERS, MIXTURE_KINDS, MIXTURES, VOCAB, write_checkpoint, write_tokenizer
from torch import Tensor

from griffin_offload import GriffinModel
from griffin_offload.config import LoadConfig
from griffin_offload.engine.spec import examine, plan_for
from griffin_offload.errors import DoesNotFit, UnsupportedModel

EXPERTS, ACTIVE = 8, 2
GREEDY = {"do_sample": False, "output_logits": True, "return_dict_in_generate": True, "max_new_tokens": 5}


def _load(directory: Path, **options: Any) -> GriffinModel:
    sizes = {"max_gpu_mem": "40MB", "ctx_size": 64}
    return GriffinModel.from_pretrained(directory, device="cpu", **{**sizes, **options})


def _answer(model: GriffinModel) -> tuple[Tensor, Tensor]:
    prompt = ids(tokens=20) % (VOCAB - 8)
    found = model.generate(prompt, attention_mask=torch.ones_like(prompt), **GREEDY)
    assert model.last_report.peak_device_bytes <= model.plan.peak_bytes
    assert model.resident_bytes == model.plan.resident_bytes
    return found.sequences, torch.stack(found.logits)


@pytest.mark.parametrize(
    ("name", "precision"),
    by_turns((*MIXTURE_KINDS, "jetmoe"), ("int8", "int4"), whole=("mixtral", "gpt_oss", "jetmoe")),
)
def test_fetched_experts_are_resident_ones_bit_for_bit(mixtures, name: str, precision: str):
    with _load(mixtures(name), quantize=precision, density=1.0) as model:
        assert not model.plan.streamed
        sequences, logits = _answer(model)
    for options in ({"density": 0.25}, {"density": 0.625, "ff_chunk_tokens": 64}):
        with _load(mixtures(name), quantize=precision, **options) as model:
            found = _answer(model)
            assert torch.equal(found[0], sequences)
            assert torch.equal(found[1], logits)
            assert model.last_report.experts.misses > 0


@pytest.mark.parametrize("precision", ["int3", "int2"])
def test_few_bits(mixtures, precision: str):
    with _load(mixtures("mixtral"), quantize=precision, density=1.0) as model:
        expected = _answer(model)[1]
    with _load(mixtures("mixtral"), quantize=precision, density=0.25) as model:
        assert torch.equal(_answer(model)[1], expected)


def _linears(layer: torch.nn.Module) -> dict[str, torch.nn.Linear]:
    """All but routers."""
    found = {path: module for path, module in layer.named_modules() if isinstance(module, torch.nn.Linear)}
    return {path: module for path, module in found.items() if module.weight.shape[0] not in (1, EXPERTS)}


def _small(layer: torch.nn.Module) -> list[torch.nn.Module]:
    """The smallest that are no FF, as many as have a sixteenth of the numbers of a token's experts and all others."""
    linears, experts = _linears(layer), getattr(layer.mlp, "experts", None)
    if hasattr(layer.mlp, "input_linear"):  # JetMoE
        mlp = layer.mlp
        experts = SimpleNamespace(gate_up_proj=mlp.input_linear.weight, down_proj=mlp.output_linear.weight)
    read = sum(module.weight.numel() for module in linears.values())
    if experts is not None:
        read += ACTIVE * sum(getattr(experts, own)[0].numel() for own in ("gate_up_proj", "down_proj"))
    outside = [m for path, m in linears.items() if experts is not None or not re.fullmatch(r"mlp\.\w+_proj", path)]
    up_to = [[m for m in outside if m.weight.numel() <= most.weight.numel()] for most in outside]
    fitting = [found for found in up_to if 16 * sum(m.weight.numel() for m in found) <= read]
    return max(fitting, key=len, default=[])


@torch.no_grad()
def _rounded(directory: Path, name: str, precision: str) -> hf.PreTrainedModel:
    """The dense model with every matrix as it is on its grid; routers stay as they are."""
    model = hf.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    for layer in model.model.layers:
        small = _small(layer)
        for path, module in _linears(layer).items():
            own = "int8" if module in small else precision
            is_down = path == "mlp.down_proj"
            module.weight.copy_(stored_values(module.weight, own, torch.float32, is_down=is_down))
    for path in (MIXTURES[name].down.format(i=i) for i in range(LAYERS)):
        module = dict(model.named_modules()).get(path)
        if name == "jetmoe":
            parent = model.get_submodule(path.rpartition(".")[0])
            module = SimpleNamespace(gate_up_proj=parent.input_linear.weight, down_proj=parent.output_linear.weight)
        for own in ("gate_up_proj", "down_proj") if module is not None else ():
            for expert in getattr(module, own):
                matrix = expert.t() if name == "gpt_oss" else expert
                in_rows = precision == "int4" and matrix.shape[1] % 64 == 0  # as all others
                is_down = own == "down_proj" and not in_rows
                values = stored_values(matrix.contiguous(), precision, torch.float32, is_down=is_down)
                matrix.copy_(values)
    if precision != "int8":
        round_head(model)
    return model


@pytest.mark.parametrize("precision", ["int8", "int4"])
@pytest.mark.parametrize("name", ["mixtral", "gpt_oss", "qwen2_moe", "deepseek_v2", "jetmoe"])
def test_quantised_experts_are_the_formula(mixtures, name: str, precision: str):
    prompt = ids(tokens=20) % (VOCAB - 8)
    expected = _rounded(mixtures(name), name, precision)(prompt).logits[0, -1]
    with _load(mixtures(name), quantize=precision, density=0.5) as model:
        _, logits = _answer(model)
    # Activations are rounded, too, to 16 bits or two of them.
    assert (logits[0, 0] - expected).abs().max() < 1e-3 * expected.abs().max()


def test_importance_of_experts(mixtures, tmp_path: Path):
    """Of a text, where there is a tokenizer: kept, and the same for the next load."""
    directory = write_checkpoint("mixtral", tmp_path / "model", shards=1)
    with _load(directory, quantize="int4", density=0.5) as model:
        without = _answer(model)
    write_tokenizer(directory)
    found = []
    for _ in range(2):
        with _load(directory, quantize="int4", density=0.5) as model:
            assert model.engine.loaded.layers.blocks[0].form.importance.shape == (32,)
            found.append(_answer(model))
    assert torch.equal(found[0][1], found[1][1])
    assert not torch.equal(found[0][1], without[1])


_BITS = {"float32": 0, "int8": 1, "int4": 2}


@pytest.mark.slow
@settings(max_examples=6, deadline=None)
@given(budgets=st.lists(st.integers(700_000, 3_000_000), min_size=2, max_size=2))
@pytest.mark.parametrize("name", ["mixtral", "gpt_oss"])
def test_a_budget_is_kept_and_more_of_it_is_no_worse(mixtures, name: str, budgets: list[int]):
    worth = []
    for budget in sorted(budgets):
        config = LoadConfig(device="cpu", ctx_size=64, max_gpu_mem=budget)
        try:
            plan = plan_for(examine(mixtures(name), config))
        except DoesNotFit:
            worth.append((-9, 0))
            continue
        assert plan.peak_bytes <= budget
        assert ACTIVE <= plan.kept[0] <= EXPERTS
        assert plan.precision == "int4" or plan.kept[0] == EXPERTS  # bits go before experts
        worth.append((-_BITS[plan.precision], plan.kept[0]))
    assert worth == sorted(worth)


@pytest.mark.parametrize("budget", [950_000, 1_200_000, 1_500_000])
def test_what_auto_chooses_runs_inside_its_budget(mixtures, budget: int):
    with _load(mixtures("gpt_oss"), max_gpu_mem=budget) as model:
        _answer(model)
        assert model.plan.peak_bytes <= budget


def test_experts_that_do_not_come_in_groups(tmp_path: Path):
    config = hf.MixtralConfig(**{**MIXTURES["mixtral"].build().config.to_dict(), "hidden_size": 40, "head_dim": 8})
    hf.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    with pytest.raises(UnsupportedModel, match="int4 needs rows in groups of 32, this one has 40"):
        _load(tmp_path, quantize="int4")


@pytest.mark.parametrize(
    ("precision", "missing"),
    mostly_slow([("none", "fetch"), ("int8", "route"), ("none", "route"), ("int8", "fetch")], 2),
)
def test_a_layer_passes_in_parts(mixtures, precision: str, missing: str):
    """With less and less room beside the residents: the same answer, each expert read once as long as all have room."""
    options = {"quantize": precision, "density": 0.25, "missing_experts": missing}
    with _load(mixtures("mixtral"), **options) as model:
        whole, most = _answer(model), model.plan
        once = model.last_report.prefill_streamed_bytes
    assert most.expert_slots == EXPERTS - ACTIVE
    size, seen = most.prefill_parts["slots"] // most.expert_slots // 2, []
    for budget in range(most.peak_bytes, most.peak_bytes - 8 * size, -2 * size):
        with contextlib.suppress(DoesNotFit), _load(mixtures("mixtral"), max_gpu_mem=budget, **options) as model:
            assert ACTIVE <= model.plan.expert_slots <= most.expert_slots
            found = _answer(model)
            assert model.plan.peak_bytes <= budget
            if missing == "fetch":
                assert torch.equal(found[1], whole[1])
                assert model.last_report.prefill_streamed_bytes == once
            seen.append(model.plan.expert_slots)
    assert min(seen) < max(seen)
