"""Sets of prompts for exports, what they choose, and what they should."""

from __future__ import annotations

import functools
from pathlib import Path

import torch
from reference import collect_z, statistic_float64
from tiny_models import VOCAB
from transformers import AutoModelForCausalLM

from griffin_offload import GriffinModel
from griffin_offload.engine import export as runtime

OPTIONS = {"device": "cpu", "max_gpu_mem": "1GB", "always_stream": True, "density": 0.5, "keep_prompts": True}


def prompts(count: int = 6) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(3, VOCAB, (9 + 3 * i,), generator=generator) for i in range(count)]


@functools.cache
def chosen_on(path: Path) -> runtime.Choice:
    with GriffinModel.from_pretrained(path, **OPTIONS, ctx_size=40) as model:
        return runtime.choose(model, prompts())


@functools.cache
def sets_of(path: Path, down: str, kept: int) -> list[torch.Tensor]:
    """By the formula, in float64: every fourth prompt does not choose."""
    dense = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float64)
    total: list[torch.Tensor] = []
    for number, ids in enumerate(prompts(), start=1):
        if number % 4:
            shares = [statistic_float64(z[0]) ** 2 for z in collect_z(dense, down, ids[None])]
            shares = [share / share.sum() for share in shares]
            total = [a + b for a, b in zip(total, shares, strict=True)] if total else shares
    return [share.topk(kept).indices.sort().values for share in total]
