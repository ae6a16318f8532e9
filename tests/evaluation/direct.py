"""Simulated generation written again, plainly: a dense transformers model, one sample, hooks on the down projections.

Independent of the package: names of projections are written here by hand.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from reference import dense_forward, magnitude_float64, select_direct, statistic_float64
from torch import Tensor
from transformers import PreTrainedModel

Weights = Callable[[int], tuple[Tensor, Tensor | None, Tensor]]
"""(up [F, H], gate [F, H] or None, down [H, F]) of a layer."""


def gated(model: PreTrainedModel) -> Weights:
    """Of Llama and Gemma."""

    def weights(layer: int) -> tuple[Tensor, Tensor | None, Tensor]:
        mlp = model.get_submodule(f"model.layers.{layer}.mlp")
        return mlp.up_proj.weight, mlp.gate_proj.weight, mlp.down_proj.weight

    return weights


def plain(model: PreTrainedModel) -> Weights:
    """Of OPT."""

    def weights(layer: int) -> tuple[Tensor, Tensor | None, Tensor]:
        block = model.get_submodule(f"model.decoder.layers.{layer}")
        return block.fc1.weight, None, block.fc2.weight

    return weights


def kept_by(selection: str, density: float, weights: Weights) -> Callable[[int, Tensor], Tensor]:
    """A function from (layer, z of the prompt [P, F]) to the kept indices."""

    def kept(layer: int, z: Tensor) -> Tensor:
        up, gate, down = weights(layer)
        s = statistic_float64(z)
        if selection == "magnitude":
            scores = magnitude_float64(up, gate)
        elif selection == "output_aware":
            scores = s * down.double().norm(dim=0)
        else:
            scores = s
        return select_direct("topk", int(len(scores) * density), scores)

    return kept


@torch.no_grad()
def simulated_directly(
    model: PreTrainedModel,
    down_pattern: str,
    ids: Tensor,
    prompt_tokens: int,
    kept: Callable[[int, Tensor], Tensor],
    *,
    compensate: bool = False,
) -> Tensor:
    """Log-probabilities [T, V] of one forward over `ids` [T] in which positions behind the prompt lack the neurons that
    its z does not keep, or have them at their mean over the prompt."""

    def masking(layer: int) -> Callable[..., tuple[Tensor, ...]]:
        def hook(_: torch.nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            z = args[0].reshape(ids.numel(), -1).clone()
            prompt, chosen = z[:prompt_tokens], set(kept(layer, z[:prompt_tokens]).tolist())
            for neuron in set(range(z.shape[1])) - chosen:
                z[prompt_tokens:, neuron] = prompt[:, neuron].mean() if compensate else 0
            return (z.reshape(args[0].shape), *args[1:])

        return hook

    named = dict(model.named_modules())
    modules = [(i, named.get(down_pattern.format(i=i))) for i in range(model.config.num_hidden_layers)]
    handles = [module.register_forward_pre_hook(masking(i)) for i, module in modules if module is not None]
    assert handles, down_pattern
    try:
        return dense_forward(model, ids[None])[0].float().log_softmax(-1)
    finally:
        for handle in handles:
            handle.remove()
