"""Quantised models of every architecture against dense transformers whose matrices are rounded as they are stored.

The checkpoints here have no number halfway between two levels of int8, which float32 and float64 would round apart.
"""

from collections.abc import Callable
from pathlib import Path

import pytest
import quantised_reference as ref
import torch
from marks import by_turns, every_pair
from tiny_models import ARCHITECTURES, KINDS, VOCAB, write_checkpoint
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from griffin_offload import GriffinModel

NEW_TOKENS = 5
PROMPT_TOKENS = 24  # past the window of 16
# A few rows of float32 are multiplied by int4 as 15 bits beside the largest of a group.
ROUNDING = {"int8": 1e-5, "int4": 2e-3, "int3": 2e-3, "int2": 2e-3}
NEAR_TIE = 3e-5  # of a level: more than float32 is wrong by, at up to 127 levels
PRECISIONS = ("int8", "int4", "int3", "int2")
OTHER_DENSITIES: tuple[object, ...] = (0.0, 0.3, [0.0, 0.4, 1.0])


@torch.no_grad()
def _avoid_ties(model: PreTrainedModel, name: str) -> None:
    """Shrink numbers that are nearly halfway between two levels until there are none."""
    generator = torch.Generator().manual_seed(0)
    downs = ARCHITECTURES[name].down_names()
    for path, matrix in ref.layer_matrices(model).items():
        for _ in range(100):
            ties = ref.quantised(matrix, torch.float32, is_down=path in downs).nearest_tie < NEAR_TIE
            if not ties.any():
                break
            factors = 0.7 + 0.3 * torch.rand(matrix.shape, generator=generator)
            matrix.copy_(torch.where(ties, matrix * factors, matrix))
        else:
            raise AssertionError(f"{name}: {path} still has ties")


@pytest.fixture(scope="session")
def untied(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`untied(name, dtype)` is the directory of a checkpoint without ties."""
    written: dict[tuple[str, torch.dtype], Path] = {}

    def checkpoint(name: str, dtype: torch.dtype = torch.float32) -> Path:
        if (name, dtype) not in written:
            directory = tmp_path_factory.mktemp(name)
            write_checkpoint(name, directory, dtype)
            model = AutoModelForCausalLM.from_pretrained(directory)
            _avoid_ties(model, name)
            model.save_pretrained(directory / "untied", max_shard_size="150kB")
            written[name, dtype] = directory / "untied"
        return written[name, dtype]

    return checkpoint


def _prompt(batch: int) -> tuple[Tensor, Tensor]:
    """Token ids and mask [B, T]; with a batch, samples are padded on the left."""
    ids = torch.randint(3, VOCAB, (batch, PROMPT_TOKENS), generator=torch.Generator().manual_seed(100 + batch))
    mask = torch.ones_like(ids)
    for i in range(batch):
        mask[i, : 3 * i] = 0
    return ids * mask, mask


def _load(path: Path, **options: object) -> GriffinModel:
    context = {"ctx_size": PROMPT_TOKENS + NEW_TOKENS, "prompt_tokens": PROMPT_TOKENS}
    return GriffinModel.from_pretrained(path, device="cpu", max_gpu_mem="100MB", **context, **options)


def _check(model: GriffinModel, path: Path, name: str, batch: int = 1, **options: object) -> None:
    """Generate, and compare with the reference: logits, tokens, bytes."""
    ids, mask = _prompt(batch)
    output = model.generate(
        ids,
        attention_mask=mask,
        max_new_tokens=NEW_TOKENS,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
        **options,
    )
    sets = list(model.selected.values()) or None
    dense = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    down, neurons = ARCHITECTURES[name].down, ARCHITECTURES[name].neurons
    # Tied to embeddings that are turned into another type, and so are in memory, it is left to them.
    head = not model.model.get_output_embeddings().weight.is_floating_point()
    tokens, expected = ref.quantised_generate(
        dense, down, neurons, model.plan.precision, (ids, mask), sets, NEW_TOKENS, head=head, **options
    )
    logits = torch.stack(output.logits)
    errors = (logits - expected).flatten(1).norm(dim=1) / expected.flatten(1).norm(dim=1)
    assert errors.max() < ROUNDING[model.plan.precision]
    # The last token changes no logits, so where two are nearly as likely nothing above tells them apart.
    compared = slice(None) if model.plan.precision == "int8" else slice(-1)
    assert torch.equal(output.sequences[:, compared], tokens[:, compared])
    report = model.last_report
    assert report.decode_streamed_bytes == 0
    # What is stored in 16 bit is read in 16 bit, whatever it is computed in.
    stored = model.engine.loaded.layers.source
    assert report.prefill_streamed_bytes == (
        sum(t.nbytes for i in model.plan.streamed for t in stored.tensors(i)) if stored else 0
    )
    assert report.resident_bytes == model.resident_bytes == model.plan.resident_bytes
    assert report.peak_device_bytes <= model.plan.peak_bytes <= model.plan.budget_bytes


@pytest.mark.parametrize(
    ("architecture", "precision", "density"),
    by_turns(KINDS, PRECISIONS, (0.5, 1.0), each=2, whole=("gpt2",)),
)
def test_streamed(architecture: str, precision: str, density: float, untied):
    """The prompt passes quantised attention and the FF as it is stored, every further token quantised neurons."""
    path = untied(architecture)
    model = _load(path, quantize=precision, density=density, always_stream=True)
    _check(model, path, architecture)
    assert [len(chosen) for chosen in model.selected.values()] == [
        int(ARCHITECTURES[architecture].neurons * density)
    ] * 3
    assert model.plan.precision == precision


@pytest.mark.parametrize(("architecture", "precision"), by_turns(KINDS, PRECISIONS))
def test_dense(architecture: str, precision: str, untied):
    """Nothing is streamed: the prompt, too, passes quantised matrices."""
    path = untied(architecture)
    model = _load(path, quantize=precision, density=1.0)
    assert model.plan.streamed == model.plan.streamed_bytes == () or model.plan.streamed_bytes == 0
    _check(model, path, architecture)


@pytest.mark.parametrize(("architecture", "precision"), by_turns(KINDS, PRECISIONS))
def test_bytes_are_those_of_the_plan(architecture: str, precision: str, untied):
    """The other densities in turns: what is allocated is what was promised."""
    turn = KINDS.index(architecture) + PRECISIONS.index(precision)
    model = _load(untied(architecture), quantize=precision, density=OTHER_DENSITIES[turn % len(OTHER_DENSITIES)])
    assert model.resident_bytes == model.plan.resident_bytes
    model.generate(_prompt(1)[0], max_new_tokens=2, do_sample=False)
    report = model.last_report
    assert report.peak_device_bytes <= model.plan.peak_bytes
    assert report.decode_streamed_bytes == 0
    assert torch.isfinite(model.model.get_input_embeddings().weight).all()


BY_ID = {precision: precision for precision in PRECISIONS}
BATCHED = {name: name for name in ("phi3", "opt", "gpt2")}


@pytest.mark.parametrize(
    ("options", "name", "precision"), every_pair({"greedy": {}, "beams": {"num_beams": 2}}, BATCHED, BY_ID, quick=8)
)
def test_batches_and_beams(name: str, precision: str, options: dict[str, int], untied):
    """Three padded prompts go through the kernels, six beams by blocks."""
    path, batch = untied(name), 3 * options.get("num_beams", 1)
    _check(_load(path, quantize=precision, density=0.5, batch_size=batch), path, name, 3, **options)


OF_BFLOAT16 = {name: name for name in ("phi3", "gpt2")}


@pytest.mark.parametrize(("density", "name", "precision"), every_pair({"0.5": 0.5, "1.0": 1.0}, OF_BFLOAT16, BY_ID))
def test_float32_of_a_bfloat16_checkpoint(name: str, precision: str, density: float, checkpoints, untied):
    path = untied(name, torch.bfloat16)
    _check(_load(path, quantize=precision, density=density, dtype="float32"), path, name)


@pytest.mark.parametrize(("name", "precision"), by_turns(("phi3", "opt", "gpt2"), PRECISIONS))
def test_from_ram(name: str, precision: str, untied):
    path = untied(name)
    model = _load(path, quantize=precision, density=0.5, offload="ram")
    assert model.offload == "ram"
    assert model.plan.parts["offloaded"] > 0
    _check(model, path, name)
