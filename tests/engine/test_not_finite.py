"""Logits that are no numbers: an error that says why and what to do, and never an answer."""

import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import write_checkpoint, write_tokenizer
from transformers import LogitsProcessor, LogitsProcessorList

from griffin_offload import GriffinModel
from griffin_offload.engine.generation import GenerationState
from griffin_offload.errors import NotFinite

IDS = torch.tensor([[5, 6, 7]])


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model in bfloat16 whose hidden states are beyond float16's largest number."""
    directory = write_checkpoint("llama2", tmp_path_factory.mktemp("large"), torch.bfloat16, shards=1)
    write_tokenizer(directory)
    tensors = load_file(directory / "model.safetensors")
    tensors["model.layers.1.mlp.down_proj.weight"] *= 3e4
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})
    return directory


def load(directory: Path, **options: object) -> GriffinModel:
    return GriffinModel.from_pretrained(directory, device="cpu", max_gpu_mem="50MB", ctx_size=32, **options)


@pytest.mark.parametrize("how", [{}, {"do_sample": True}, {"exact": True}], ids=["greedy", "sampled", "exact"])
def test_float16_that_overflows(large: Path, how: dict[str, bool]):
    with load(large, dtype="float16", quantize="none", density=0.5) as model:
        for _ in range(2):  # the model is as it was before
            with pytest.raises(NotFinite, match=r"NaN.*float16.*65504.*bfloat16 or float32"):
                model.generate(IDS, max_new_tokens=3, **how)
        kept = model.generate(IDS, max_new_tokens=3, do_sample=False, remove_invalid_values=True)
        assert kept.shape[1] == 6  # the caller has asked for whatever comes


@pytest.mark.parametrize("dtype", ["auto", "float32"])
def test_other_precisions_hold_it(large: Path, dtype: str):
    with load(large, dtype=dtype) as model:
        assert model.generate(IDS, max_new_tokens=3, do_sample=False).shape[1] == 6


def test_weights_that_are_no_numbers_are_told_from_it(tmp_path: Path):
    directory = write_checkpoint("llama2", tmp_path, torch.bfloat16, shards=1)
    tensors = load_file(directory / "model.safetensors")
    tensors["model.norm.weight"][3] = float("nan")
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})
    with load(directory, quantize="none") as model, pytest.raises(NotFinite, match=r"bfloat16: the weights hold"):
        model.generate(IDS, max_new_tokens=3, do_sample=False)


class _NothingIsPossible(LogitsProcessor):
    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        return torch.full_like(scores, -torch.inf)


def test_scores_that_rule_out_every_token(large: Path):
    processors = LogitsProcessorList([_NothingIsPossible()])
    with load(large) as model, pytest.raises(NotFinite, match="no token can be drawn"):
        model.generate(IDS, max_new_tokens=3, do_sample=True, logits_processor=processors)


def test_a_device_is_not_waited_for_between_tokens():
    """Only the first logits are looked at at once; the rest is told in the end."""

    def logits(value: float) -> torch.Tensor:
        return torch.tensor([[value, 0.0]])

    run = GenerationState(1, 1, None, None, None, None)
    run.check_numbers(logits(1), torch.float16, waits=True)
    run.check_numbers(logits(float("nan")), torch.float16, waits=True)
    run.check_numbers(logits(1), torch.float16, waits=True)
    with pytest.raises(NotFinite, match=re.escape("(NaN) in float16")):
        run.end_check(torch.float16)
