"""oLLM on the CPU. It reads the checkpoint in place, layer by layer; `--ram-share` of its layers are kept in memory.

It insists on a tokenizer, which a random checkpoint has not and token ids do not need: it is told that it has one.
"""

import argparse
import sys

import torch
from ollm import AutoInference
from ollm.inference import Inference
from peers.protocol import Loaded, run
from peers.streamed import generating
from transformers import AutoConfig


def kept_layers(args: argparse.Namespace) -> int:
    """As many whole layers as the share holds beside embedding, head and the layer at work."""
    config = AutoConfig.from_pretrained(args.dir)
    total_bytes = sum(path.stat().st_size for path in args.dir.glob("*.safetensors"))
    outside_bytes = config.vocab_size * config.hidden_size * 2 * (1 if config.tie_word_embeddings else 2)
    layer_bytes = (total_bytes - outside_bytes) / config.num_hidden_layers
    return max(0, int((args.ram_share - outside_bytes) / layer_bytes) - 1)


def load(args: argparse.Namespace) -> Loaded:
    torch.set_num_threads(args.threads)
    Inference.tokenizer = None
    inference = AutoInference(str(args.dir), device="cpu", logging=False)
    inference.offload_layers_to_cpu(layers_num=kept_layers(args))
    return generating(inference.model), {}


if __name__ == "__main__":
    sys.exit(run("ollm", load))
