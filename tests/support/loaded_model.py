"""A pruned tiny model, a prompt for it, and its greedy tokens: what tests of a loaded model's life begin with."""

from pathlib import Path
from typing import Any

import torch
from tiny_models import VOCAB

from griffin_offload import GriffinModel


def load(path: Path, **options: Any) -> GriffinModel:
    """Half of the neurons, in a budget that has room for more; `options` are `from_pretrained`'s."""
    settings = {"device": "cpu", "max_gpu_mem": "100MB", "density": 0.5, "ctx_size": 96, "quantize": "none"}
    return GriffinModel.from_pretrained(path, **(settings | options))


def ids(seed: int = 0, tokens: int = 24) -> torch.Tensor:
    """A prompt [1, T] without special tokens."""
    return torch.randint(3, VOCAB, (1, tokens), generator=torch.Generator().manual_seed(seed))


def greedy(model: Any, prompt: torch.Tensor, **options: Any) -> torch.Tensor:
    """The prompt and six tokens of any model's `generate`."""
    return model.generate(prompt, **({"max_new_tokens": 6, "do_sample": False} | options))


def answer(model: Any, prompt: torch.Tensor, new_tokens: int = 8, **options: Any) -> torch.Tensor:
    """The prompt and so many tokens, in `context` for example."""
    return greedy(model, prompt, max_new_tokens=new_tokens, **options)
