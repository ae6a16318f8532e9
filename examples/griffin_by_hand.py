"""GRIFFIN (arXiv 2404.01365) by hand: the whole method in plain torch, on a stock transformers model.

python examples/griffin_by_hand.py [DENSITY]

Read this first. The package computes the same tokens; what it adds is that the full weights are never on the device at
once, that any architecture works, and a plan of every byte. B = 1 sequence, T tokens, F neurons, K kept ones.
"""

import sys

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

from griffin_offload.demo import PROMPT, demo_directory


@torch.no_grad()
def generate(model, ids: Tensor, density: float, new_tokens: int) -> tuple[Tensor, list[Tensor]]:
    """Greedy tokens [1, T + new_tokens] behind the prompt `ids` [1, T], and s^2 [F] of each layer. `model` stays
    pruned."""
    blocks = [layer.mlp for layer in model.model.layers]
    squared = [torch.zeros(block.down_proj.in_features) for block in blocks]

    def listen(total: Tensor):
        def add(_, args: tuple[Tensor]) -> None:
            z = args[0][0].float()  # [T, F]: silu(gate(x)) * up(x), what goes into the down projection
            total.add_((z**2 / (z**2).sum(-1, keepdim=True)).sum(0))  # every token weighs the same

        return add

    # 1. The full model reads the prompt. How much does each neuron say, over all of its tokens?
    pairs = list(zip(blocks, squared, strict=True))
    hooks = [block.down_proj.register_forward_pre_hook(listen(total)) for block, total in pairs]
    cache = DynamicCache(config=model.config)
    logits = model(ids, None, None, cache).logits
    for hook in hooks:
        hook.remove()

    # 2. The K largest stay: their rows of gate and up, their columns of down. Attention stays whole.
    for block, total in pairs:
        kept = total.topk(int(density * len(total))).indices.sort().values
        for projection in (block.gate_proj, block.up_proj):
            projection.weight = torch.nn.Parameter(projection.weight[kept])
        block.down_proj.weight = torch.nn.Parameter(block.down_proj.weight[:, kept])

    # 3. The smaller model writes. The first token is still the full one's.
    for step in range(new_tokens):
        ids = torch.cat([ids, logits[:, -1:].argmax(-1)], dim=1)
        if step + 1 < new_tokens:
            logits = model(ids[:, -1:], None, None, cache).logits
    return ids, squared


def main() -> None:
    density = float(sys.argv[1]) if len(sys.argv) > 1 else 0.5
    model = AutoModelForCausalLM.from_pretrained(demo_directory(), dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(demo_directory())
    before = sum(parameter.numel() for parameter in model.parameters())
    ids, _ = generate(model, tokenizer(PROMPT, return_tensors="pt").input_ids, density, new_tokens=48)
    after = sum(parameter.numel() for parameter in model.parameters())
    print(tokenizer.decode(ids[0], skip_special_tokens=True))
    print(f"\n{after} of {before} weights wrote this", file=sys.stderr)


if __name__ == "__main__":
    main()
