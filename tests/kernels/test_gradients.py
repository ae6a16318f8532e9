"""What is differentiated goes through torch: a kernel of ours would cut the gradient off."""

import torch
from torch import nn
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from griffin_offload.engine.build import use_own_linears, use_own_norms
from griffin_offload.kernels import table
from griffin_offload.kernels.by_blocks import Scratch


def test_gradients_are_torchs():
    stack = nn.Sequential(LlamaRMSNorm(64), nn.Linear(64, 64)).bfloat16().requires_grad_(False)
    gradients = []
    for own in (False, True):
        if own:
            use_own_norms(stack)
            use_own_linears(stack, Scratch(64, torch.float32, torch.device("cpu")), translated=True)
        x = torch.randn(1, 64, generator=torch.Generator().manual_seed(0)).bfloat16().requires_grad_()
        stack(x).pow(2).sum().backward()
        gradients.append(x.grad)
    assert gradients[0].any()
    assert torch.equal(*gradients)


def _is_ours(query: torch.Tensor, key: torch.Tensor) -> bool:
    return table.choose("attention", "one_token", None, query, key, key, None, like=query).ours


def test_attention_is():
    query = torch.ones(1, 2, 1, 16).bfloat16()
    for requires_grad in (True, False):
        assert not _is_ours(query.clone().requires_grad_(), query)
        with torch.no_grad():
            assert _is_ours(query, query) == _is_ours(query.clone().requires_grad_(requires_grad), query)
