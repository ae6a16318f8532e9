"""Experts that are there are multiplied by one call for each of their matrices: the same as one after the other."""

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from marks import by_turns
from torch import Tensor

from griffin_offload import GriffinModel
from griffin_offload.blocks.expert_products import FEW
from griffin_offload.kernels import table
from griffin_offload.kernels.library import Library, library

pytestmark = pytest.mark.skipif(library() is None, reason="another processor, or no compiler")
ACTIVE, EXPERTS = 2, 8


@contextlib.contextmanager
def _one_after_the_other() -> Iterator[None]:
    """Inside, kernels know one matrix at a time."""
    rows = [dataclasses.replace(kernel, several=None) for kernel in table.rows() if kernel.several is not None]
    table.add(*rows)
    try:
        yield
    finally:
        table.remove(lambda kernel: kernel in rows)


def _given(block: Any, tokens: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(tokens, block.hidden, generator=generator).bfloat16()
    index = torch.stack([torch.randperm(EXPERTS, generator=generator)[:ACTIVE] for _ in range(tokens)])
    return hidden, index, torch.rand(tokens, ACTIVE, generator=generator).bfloat16()


@pytest.mark.parametrize(
    ("name", "quantize", "density"),
    by_turns(
        ("mixtral", "gpt_oss", "llama4", "nemotron_3"),
        ("none", "int8", "int4", "int3"),
        (1.0, 0.5),
        each=2,
        whole=("mixtral", "gpt_oss"),
    ),
)
def test_is_the_same_to_the_last_bit(checkpoints: Any, monkeypatch: Any, name: str, quantize: str, density: float):
    """Of one token and of several, resident or not; and by how many calls."""
    called: list[str] = []
    call = Library.call
    monkeypatch.setattr(Library, "call", lambda own, function, job: (called.append(function), call(own, function, job)))
    options: dict[str, Any] = {"max_gpu_mem": "40MB", "ctx_size": 64, "dtype": "bfloat16"}
    folder = checkpoints(name, torch.bfloat16)
    with GriffinModel.from_pretrained(folder, device="cpu", quantize=quantize, density=density, **options) as model:
        model.generate(torch.arange(5, 25)[None], max_new_tokens=2, do_sample=False)
        block = next(block for block in model.engine.loaded.layers.blocks if block.neurons == EXPERTS)
        for tokens in (1, 2, 3, FEW):
            given = _given(block, tokens, tokens)
            called.clear()
            found = block.compute(*given)
            calls = called.count("multiply_several")
            with _one_after_the_other():
                assert torch.equal(block.compute(*given), found)
            lie_turned = quantize == "none" and name in (
                "gpt_oss",
                "llama4",
            )  # inputs by outputs, which torch multiplies
            if density == 1.0 and not lie_turned:
                assert calls == 2


def test_what_was_told_of_weights_goes_with_them(checkpoints: Any):
    """Others in their place are looked at anew."""
    folder = checkpoints("mixtral", torch.bfloat16)
    with GriffinModel.from_pretrained(folder, device="cpu", quantize="none", density=1.0, dtype="bfloat16") as model:
        block: Any = model.engine.loaded.layers.blocks[0]
        given = _given(block, 1, 0)
        for parameter in block.module.parameters(recurse=False):  # no prompt has filled them yet
            parameter.data.normal_()
        before = block.compute(*given)
        for name, parameter in list(block.module.named_parameters(recurse=False)):
            setattr(block.module, name, torch.nn.Parameter(2 * parameter.detach(), requires_grad=False))
        assert not torch.allclose(block.compute(*given), before)
        with _one_after_the_other():
            after = block.compute(*given)
        assert torch.equal(block.compute(*given), after)
        for parameter in block.module.parameters(recurse=False):
            parameter.data = torch.zeros_like(parameter)
        assert not block.compute(*given).any()
