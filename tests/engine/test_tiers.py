"""Neurons of a layer in several formats: against dense transformers whose neurons are each rounded as their tier is."""

import contextlib
import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import quantised_reference as ref
import torch
from marks import by_turns
from reference import collect_z, dense_generate, shared_statistic_float64
from tiny_models import ARCHITECTURES, KINDS, VOCAB, write_checkpoint
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from griffin_offload import DoesNotFit, GriffinModel, UsageError
from griffin_offload.config import MIXED, LoadConfig
from griffin_offload.engine.convert import convert
from griffin_offload.engine.spec import examine
from griffin_offload.formats import every, get
from griffin_offload.planner.tiers import bits_of, tiered_choices

PROMPT, NEW = 24, 6
ROUNDING = 4e-3
# All in the most bits, some layers in fewer, neurons in fewer, one with neurons left out, the fewest.
BITS = ("auto", 8.0, 6.0, 5.0, 3.0)
Levels = dict[int, dict[str, list[int]]]
"""Of some layers, neurons by format."""


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """`plain(name)` is a checkpoint without a tokenizer: all inputs of matrices count alike."""

    @functools.cache
    def checkpoint(name: str) -> Path:
        return write_checkpoint(name, tmp_path_factory.mktemp(name))

    return checkpoint


def _ids(batch: int = 1) -> Tensor:
    return torch.randint(3, VOCAB, (batch, PROMPT), generator=torch.Generator().manual_seed(7))


def _load(path: Path, bits: object = "auto", **options: object) -> GriffinModel:
    options = {"max_gpu_mem": "100MB", "ctx_size": PROMPT + NEW, "quantize": "tiers"} | options
    return GriffinModel.from_pretrained(path, device="cpu", bits=bits, **options)


def _levels(model: GriffinModel, layer: int) -> dict[str, list[int]]:
    """Neurons of a layer by format."""
    plan = model.plan
    if layer not in model.selected:
        (level,) = [i for i, count in enumerate(plan.counts[layer]) if count]
        return {plan.levels[level]: list(range(plan.counts[layer][level]))}
    parts = model.selected[layer].split([count for count in plan.counts[layer] if count])
    names = [name for name, count in zip(plan.levels, plan.counts[layer], strict=True) if count]
    return {name: part.tolist() for name, part in zip(names, parts, strict=True)}


@torch.no_grad()
def _round(model: PreTrainedModel, name: str, levels: Levels) -> None:
    """Every neuron's rows and column become what they are in its format; of one left out the column is zero."""
    architecture = ARCHITECTURES[name]
    downs = architecture.down_names()
    for path, matrix in ref.layer_matrices(model).items():
        is_down = path in downs
        if not ref.in_feed_forward(matrix, architecture.neurons, is_down=is_down):
            continue
        layer = int(next(part for part in path.split(".") if part.isdigit()))
        if layer not in levels:
            continue
        made = torch.zeros_like(matrix)
        for format, neurons in levels[layer].items():
            values = ref.stored_values(matrix, format, matrix.dtype, is_down=is_down).to(matrix.dtype)
            if is_down:
                made[:, neurons] = values[:, neurons]
                continue
            for start in range(0, matrix.shape[0], architecture.neurons):
                rows = [start + neuron for neuron in neurons]
                made[rows] = values[rows]
        matrix.copy_(made)


@contextlib.contextmanager
def _rounded_after_prefill(
    model: PreTrainedModel, name: str, levels: dict[int, dict[str, list[int]]]
) -> Iterator[None]:
    def hook(*_: Any) -> None:
        handle.remove()
        _round(model, name, levels)

    handle = model.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def _check(model: GriffinModel, path: Path, name: str, batch: int = 1) -> None:
    ids = _ids(batch)
    wanted: dict[str, Any] = {"do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    output = model.generate(ids, max_new_tokens=NEW, **wanted)
    dense = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    levels = [_levels(model, layer) for layer in range(len(model.plan.kept))]
    ref.round_layers(
        dense, ARCHITECTURES[name].down, ARCHITECTURES[name].neurons, model.plan.levels[0], feed_forward=False
    )
    ref.round_head(dense)
    streamed = {layer: levels[layer] for layer in model.plan.streamed}
    _round(dense, name, {layer: own for layer, own in enumerate(levels) if layer not in streamed})
    _check_ranks(dense, name, ids, streamed)
    with _rounded_after_prefill(dense, name, streamed):
        tokens, expected = dense_generate(dense, ids, None, NEW)
    logits = torch.stack(output.logits)
    errors = (logits - expected).flatten(1).norm(dim=1) / expected.flatten(1).norm(dim=1)
    assert errors.max() < ROUNDING, errors
    assert torch.equal(output.sequences[:, :-1], tokens[:, :-1])
    report = model.last_report
    assert report.decode_streamed_bytes == 0
    assert report.resident_bytes == model.resident_bytes == model.plan.resident_bytes
    assert report.peak_device_bytes <= model.plan.peak_bytes <= model.plan.budget_bytes
    assert report.tiers == model.plan.tiers


def _check_ranks(dense: PreTrainedModel, name: str, ids: Tensor, levels: Levels) -> None:
    """The largest of the prompt's statistic, by the formula, have the most bits."""
    activations = collect_z(dense, ARCHITECTURES[name].down, ids)
    for layer, own in levels.items():
        score = shared_statistic_float64(activations[layer])
        tiers = [score[neurons] for neurons in own.values()]
        kept = {neuron for neurons in own.values() for neuron in neurons}
        left_out = score[[neuron for neuron in range(len(score)) if neuron not in kept]]
        for more, fewer in zip(tiers, [*tiers[1:], left_out], strict=True):
            assert fewer.numel() == 0 or more.min() >= fewer.max() - 1e-4


@pytest.mark.parametrize(("name", "bits"), by_turns(KINDS, (BITS[1], BITS[2], BITS[4]), whole=("gpt2",)))
def test_logits_are_those_of_neurons_rounded_by_tiers(name: str, bits: float, plain):
    path = plain(name)
    model = _load(path, bits)
    assert 0 < bits_of(model.engine.shape, model.plan.counts) <= bits
    assert model.plan.precision in MIXED  # of so few neurons layers may be better
    _check(model, path, name)
    if name == "gpt2":
        _check(model, path, name)  # a second prompt's choice goes to the same places


@pytest.mark.parametrize("bits", BITS)
def test_any_bits_and_batches(bits: object, plain):
    path = plain("llama2")
    _check(_load(path, bits, batch_size=2, dtype="float32"), path, "llama2", batch=2)


def test_counts_stay_and_prompts_sort(checkpoints):
    """Addresses and counts never change; another prompt has other neurons in the most bits."""
    model = _load(checkpoints("llama2"), 6.0)
    addresses = {name: parameter.data_ptr() for name, parameter in model.model.named_parameters()}
    found = []
    for seed in range(2):
        ids = torch.randint(3, VOCAB, (1, PROMPT), generator=torch.Generator().manual_seed(seed))
        model.generate(ids, max_new_tokens=2, do_sample=False)
        found.append(model.selected[0].clone())
    assert not torch.equal(*found)
    assert {name: parameter.data_ptr() for name, parameter in model.model.named_parameters()} == addresses


@pytest.mark.parametrize(
    ("name", "index", "source"), [("llama2", 0, "none"), ("gpt2", 1, "int8"), ("phi3", 3, "int8"), ("gpt2", 2, "tiers")]
)
def test_layers_of_fewer_bits_are_rounded_once_and_not_streamed(
    name: str, index: int, source: str, plain, tmp_path: Path
):
    path = dense = plain(name)
    if source != "none":
        convert(path, tmp_path / "copy", source)
        path = tmp_path / "copy"
    if source == "int8":
        rounded, architecture = AutoModelForCausalLM.from_pretrained(dense, dtype=torch.float32), ARCHITECTURES[name]
        for feed_forward in (False, True):
            ref.round_layers(rounded, architecture.down, architecture.neurons, source, feed_forward=feed_forward)
        dense = tmp_path / "dense"
        rounded.save_pretrained(dense)
    shape = examine(path, LoadConfig(device="cpu", quantize="layers")).shapes[-1]
    counts = tiered_choices(shape)[index]
    model = _load(path, bits_of(shape, counts), quantize="layers")
    assert (model.plan.precision, model.plan.counts, model.plan.streamed) == ("layers", counts, ())
    assert model.engine.model_spec.quantises(model.plan) == (source != "tiers")
    _check(model, dense, name)
    assert model.last_report.prefill_streamed_bytes == 0


def test_what_does_not_go_together(checkpoints):
    path = checkpoints("llama2")
    for options, reason in (
        ({"density": 0.5}, "give bits .* in place of a density"),
        ({"exact": True}, "exact mode drafts in one format"),
        ({"bits": 0.0}, "bits per weight"),
        ({"bits": "3"}, "bits per weight"),
        ({"quantize": "int4", "bits": 3.0}, "is for tiers"),
    ):
        with pytest.raises(UsageError, match=reason):
            LoadConfig(**{"quantize": "tiers"} | options)
    with pytest.raises(UsageError, match=r"tiers of this model take .* bits a weight"):
        _load(path, 0.1)
    with pytest.raises(DoesNotFit, match=r"--max-gpu-mem"):
        _load(path, max_gpu_mem=30_000)


def test_a_saved_prompt_goes_on(checkpoints, tmp_path: Path):
    path = checkpoints("llama2")
    model, again = (_load(path, 6.0, keep_prompts=True) for _ in range(2))
    context = model.new_context()
    ids = _ids()
    whole = model.generate(ids, max_new_tokens=NEW, do_sample=False, context=context)
    model.save_context(context, tmp_path / "saved")
    found, _ = again.load_context(tmp_path / "saved")
    assert torch.equal(again.generate(ids, max_new_tokens=NEW, do_sample=False, context=found), whole)
    assert again.last_report.cached_prompt_tokens > 0
    assert torch.equal(again.selected[0], model.selected[0])


def test_tiers_are_formats_of_fewer_bits():
    tiers = [format for format in every() if format.is_tier]
    assert tiers[0] is get("int4")
    assert [format.distortion for format in tiers] == sorted(format.distortion for format in tiers)


def test_an_int8_copy_is_what_tiers_are_made_of(plain, tmp_path: Path):
    """Its bytes are streamed, and its numbers are what is rounded once more, a layer's neurons at a time."""
    convert(plain("llama2"), tmp_path / "copy", "int8")
    dense = AutoModelForCausalLM.from_pretrained(plain("llama2"), dtype=torch.float32)
    for feed_forward in (False, True):
        architecture = ARCHITECTURES["llama2"]
        ref.round_layers(dense, architecture.down, architecture.neurons, "int8", feed_forward=feed_forward)
    dense.save_pretrained(tmp_path / "dense")
    model = _load(tmp_path / "copy", 6.0)
    _check(model, tmp_path / "dense", "llama2")
    source = model.engine.loaded.layers.source
    stored = sum(tensor.nbytes for layer in model.plan.streamed for tensor in source.tensors(layer))
    assert (
        model.last_report.prefill_streamed_bytes == stored < model.engine.shape.layers[0].plain_neuron_bytes * 128 * 3
    )
    assert model.engine.model_spec.quantises(model.plan)


def test_an_int4_copy_keeps_its_int4(checkpoints, tmp_path: Path):
    """Neurons in int4 are taken along as they are stored; of the others codes are rounded once more."""
    convert(checkpoints("llama2"), tmp_path / "copy", "int4")
    whole = GriffinModel.from_pretrained(tmp_path / "copy", device="cpu", max_gpu_mem="100MB", ctx_size=PROMPT + NEW)
    model = _load(tmp_path / "copy", 6.0)
    for one in (model, whole):
        one.generate(_ids(), max_new_tokens=2, do_sample=False)
    (kept, *_), down = model.plan.counts[0], "model.layers.0.mlp.down_proj"
    chosen = model.selected[0][:kept]
    tier, full = model.model.get_submodule(down).tiers[0], whole.model.get_submodule(down)
    assert kept == tier.weight.shape[1] == 64
    assert torch.equal(tier.weight, full.weight[:, chosen])
    assert torch.equal(tier.groups, full.groups[:, chosen])


@pytest.mark.parametrize("name", ["llama2", "gpt2", "phi3"])
def test_a_copy_for_tiers_has_all_of_them(name: str, checkpoints, tmp_path: Path):
    """Each neuron's tensors are those that are stored in its format: nothing is rounded for a prompt."""
    path, architecture = tmp_path / "copy", ARCHITECTURES[name]
    convert(checkpoints(name), path, "tiers")
    model = _load(path, 6.0, exact=False)
    assert not model.engine.model_spec.quantises(model.plan)
    model.generate(_ids(), max_new_tokens=3, do_sample=False)
    levels, layer = _levels(model, 0), architecture.down_names()[0]
    found = model.model.get_submodule(layer)
    stored = model.engine.loaded.layers.source.tensors(0)
    names = list(get("tiers").stored(is_down=True).specs(64, 64, is_down=True))
    full = dict(zip(names, stored[-len(names) :], strict=True))
    assert len(levels) == len(found.tiers) > 1
    for tier, (format, neurons) in zip(found.tiers, levels.items(), strict=True):
        own = (
            {"weight": "weight", "groups": "groups"}
            if format == "int4"
            else {n: f"{n}_{format}" for n in ("weight", "groups")}
        )
        rows = full[own["weight"]][neurons], full[own["groups"]][neurons]
        strips = torch.zeros_like(tier.weight), torch.zeros_like(tier.groups)
        get(format).write_neurons(rows, strips, 0)
        assert torch.equal(tier.weight[:, : len(neurons)], strips[0][:, : len(neurons)])
        assert torch.equal(tier.groups[:, : len(neurons)], strips[1][:, : len(neurons)])


def test_a_copy_for_tiers_is_an_int4_copy_too(checkpoints, tmp_path: Path):
    """Where int4 fits whole it is taken, with the same numbers; what goes beyond it is refused by name."""
    for precision in ("tiers", "int4"):
        convert(checkpoints("llama2"), tmp_path / precision, precision)
    answers = []
    for precision in ("tiers", "int4"):
        model = _load(tmp_path / precision, quantize="auto")
        assert model.plan.precision == "int4"
        answers.append(model.generate(_ids(), max_new_tokens=NEW, do_sample=False))
    assert torch.equal(*answers)
    with pytest.raises(UsageError, match="exact mode verifies in one stored precision"):
        _load(tmp_path / "tiers", quantize="auto", exact=True)
    with pytest.raises(UsageError, match="needs the original"):
        _load(tmp_path / "tiers", quantize="int8")
    pruned = _load(tmp_path / "tiers", quantize="int4", density=0.5)
    pruned.generate(_ids(), max_new_tokens=2, do_sample=False)
    assert (pruned.plan.precision, pruned.plan.density) == ("int4", 0.5)


@pytest.mark.parametrize("source", ["none", "int8", "int4", "tiers"])
def test_auto_tries_tiers_last(source: str, checkpoints, tmp_path: Path):
    """Of every source; with a density, or in exact mode, the paper's method is what is planned."""
    path = checkpoints("llama2")
    if source != "none":
        convert(path, tmp_path / "copy", source)
        path = tmp_path / "copy"

    def names(**options: Any) -> list[str]:
        return [shape.precision_name for shape in examine(path, LoadConfig(device="cpu", **options)).shapes]

    assert names()[-1] == "tiers"
    assert len(names()) > 1
    # Layers of int8 and int4 need more bits than an int4 copy has.
    layers = ["layers"] * (2 if source in ("none", "int8") else 1)
    assert names(quantize="layers") == layers
    assert names(quantize="tiers") == [*layers, "tiers"]
    assert "tiers" not in names(density=0.5)
    if source != "tiers":
        assert "tiers" not in names(exact=True)


def test_what_tiers_cannot_be_made_of(checkpoints, tmp_path: Path):
    convert(checkpoints("llama2"), tmp_path / "copy", "int2")
    with pytest.raises(UsageError, match="needs the original"):
        _load(tmp_path / "copy")
