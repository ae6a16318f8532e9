"""The method written again, plainly and independently of the package, to compare it with.

Shapes: B batch, T tokens, F feed-forward neurons, K kept neurons, V vocabulary, H hidden. Source:
arXiv 2404.01365 section 4.2. The statistic is computed in float64, generation by masking a dense model.
"""

from __future__ import annotations

import contextlib
import inspect
import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel


def statistic_float64(z: Tensor, mask: Tensor | None = None) -> Tensor:
    """s of the paper: [T, F] -> [F], or per sample [B, T, F] -> [B, F].

    Every row of Z is divided by its L2 norm, s_j is the L2 norm of column j. Rows that are all zero and
    tokens where `mask` ([T] or [B, T]) is 0 contribute nothing.
    """
    if z.dim() == 3:
        masks = [None] * len(z) if mask is None else list(mask)
        return torch.stack([statistic_float64(sample, m) for sample, m in zip(z, masks, strict=True)])
    squares = torch.zeros(z.shape[1], dtype=torch.float64)
    for t, row in enumerate(z.double()):
        norm = math.sqrt(float((row * row).sum()))
        if norm == 0 or (mask is not None and not bool(mask[t])):
            continue
        squares += (row / norm) ** 2
    return squares.sqrt()


def shared_statistic_float64(z: Tensor, mask: Tensor | None = None, by_length: bool = False) -> Tensor:
    """One s [F] for [B, T, F]: root of sum_i s_i^2, or of the mean of s_i^2 / S_i if `by_length`."""
    squares = statistic_float64(z, mask) ** 2
    if not by_length:
        return squares.sum(0).sqrt()
    lengths = torch.full((len(z),), z.shape[1]) if mask is None else mask.sum(1)
    return (squares / lengths[:, None].double()).mean(0).sqrt()


def magnitude_float64(up: Tensor, gate: Tensor | None = None) -> Tensor:
    """The static score of each neuron, [F]: ||W1_j|| times ||Wg_j|| when gated; weights are [F, H]."""
    scores = []
    for j in range(len(up)):
        score = float(up[j].double().norm())
        if gate is not None:
            score *= float(gate[j].double().norm())
        scores.append(score)
    return torch.tensor(scores, dtype=torch.float64)


def select_direct(method: str, k: int, scores: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """The sorted indices [k] that `method` keeps of `scores` [F]; equal scores keep the lower index.

    `scores` is s, or `magnitude_float64` for magnitude; random reads only its length.
    Draws follow the dtype of `scores`: give float32 to compare draw by draw with a float32 implementation.
    """
    if method in ("topk", "magnitude"):
        chosen = _largest(scores, k)
    elif method == "sample":
        chosen = _draw(scores, k, generator)
    elif method == "topk_sample":
        chosen = _largest(scores, k // 2)
        rest = scores.clone()
        rest[chosen] = 0
        chosen = chosen + _draw(rest, k - k // 2, generator)
    elif method == "random":
        chosen = torch.randperm(len(scores), generator=generator)[:k].tolist()
    else:
        raise ValueError(f"no such selection method: {method}")
    return torch.tensor(sorted(chosen), dtype=torch.long)


def _largest(scores: Tensor, k: int) -> list[int]:
    values = scores.tolist()
    return sorted(range(len(values)), key=lambda j: (-values[j], j))[:k]


def _draw(weights: Tensor, k: int, generator: torch.Generator | None) -> list[int]:
    return torch.multinomial(weights, k, replacement=False, generator=generator).tolist() if k else []


def _down_projections(model: PreTrainedModel, down_pattern: str) -> list[torch.nn.Module]:
    """Of the layers that have one: a layer may be attention alone."""
    named = dict(model.named_modules())
    found = [named.get(down_pattern.format(i=i)) for i in range(model.config.num_hidden_layers)]
    assert any(found), down_pattern
    return [module for module in found if module is not None]


def collect_z(
    model: PreTrainedModel, down_pattern: str, input_ids: Tensor, attention_mask: Tensor | None = None
) -> list[Tensor]:
    """Z of every layer from one dense forward, [B, T, F] each (also where the model flattens)."""
    seen: list[Tensor] = []

    def keep(_module: torch.nn.Module, args: tuple[Tensor, ...]) -> None:
        seen.append(args[0].detach().reshape(*input_ids.shape, -1).clone())

    handles = [m.register_forward_pre_hook(keep) for m in _down_projections(model, down_pattern)]
    try:
        dense_forward(model, input_ids, attention_mask)
    finally:
        for handle in handles:
            handle.remove()
    return seen


@torch.no_grad()
def dense_forward(model: PreTrainedModel, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
    """The dense logits [B, T, V] of one forward; positions count from the first real token."""
    mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
    inputs = {"input_ids": input_ids, "attention_mask": mask, "use_cache": True}  # Gemma 4 shares it
    if "position_ids" in inspect.signature(model.forward).parameters:  # BLOOM counts from the mask itself
        inputs["position_ids"] = (mask.long().cumsum(-1) - 1).clamp(min=0)
    logits: Tensor = model(**inputs).logits
    return logits


def dense_generate(
    model: PreTrainedModel, input_ids: Tensor, attention_mask: Tensor | None, new_tokens: int, **options: Any
) -> tuple[Tensor, Tensor]:
    """Greedy generation (or by beams, in `options`) by the dense model: tokens [B, T + steps] and raw logits
    [steps, B, V]."""
    mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
    out = model.generate(
        input_ids,
        attention_mask=mask,
        max_new_tokens=new_tokens,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
        **options,
    )
    return out.sequences, torch.stack(out.logits)


def masked_generate(
    model: PreTrainedModel,
    down_pattern: str,
    input_ids: Tensor,
    attention_mask: Tensor | None,
    sets: Sequence[Tensor],
    new_tokens: int,
) -> tuple[Tensor, Tensor]:
    """GRIFFIN generation without pruning anything: the prompt runs dense, then other neurons are set to zero.

    `sets[layer]` holds the kept indices, [K] for the whole batch or [B, K] per sample. Returns what
    `dense_generate` does; the first step's logits come from the dense prefill.
    """
    with masked_after_prefill(model, down_pattern, sets):
        return dense_generate(model, input_ids, attention_mask, new_tokens)


@contextlib.contextmanager
def masked_after_prefill(model: PreTrainedModel, down_pattern: str, sets: Sequence[Tensor]) -> Iterator[None]:
    """Multiply every down projection's input by its 0/1 mask in all forwards but the first."""
    forwards = 0

    def count(*_: Any) -> None:
        nonlocal forwards
        forwards += 1

    def masking(kept: Tensor) -> Any:
        def hook(module: torch.nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
            return (_zero_others(args[0], kept), *args[1:]) if forwards else None

        return hook

    modules = _down_projections(model, down_pattern)
    handles = [m.register_forward_pre_hook(masking(s)) for m, s in zip(modules, sets, strict=True)]
    handles.append(model.register_forward_hook(count))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _zero_others(z: Tensor, kept: Tensor) -> Tensor:
    """z [B, T, F] or [B*T, F] with all neurons but `kept` ([K] or [B, K]) set to zero."""
    rows = kept if kept.dim() == 2 else kept[None]
    ones = torch.zeros(len(rows), z.shape[-1], dtype=z.dtype, device=z.device)
    ones.scatter_(1, rows.to(z.device), 1)
    samples = len(rows) if len(rows) > 1 else 1
    return (z.reshape(samples, -1, z.shape[-1]) * ones[:, None, :]).reshape(z.shape)
