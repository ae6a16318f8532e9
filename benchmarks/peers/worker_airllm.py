"""AirLLM on the CPU. It reads its own copy of the weights, one file for each layer, made by `airllm_split` beforehand.

It insists on a tokenizer, which a random checkpoint has not and token ids do not need: that call gives None here.
"""

import argparse
import sys

import torch
from airllm import AirLLMBaseModel
from peers.protocol import Loaded, run
from peers.streamed import generating


class WithoutTokenizer(AirLLMBaseModel):
    def get_tokenizer(self, hf_token: str | None = None) -> None:
        return None


def load(args: argparse.Namespace) -> Loaded:
    torch.set_num_threads(args.threads)
    model = WithoutTokenizer(
        args.dir,
        device="cpu",
        max_seq_len=args.prompt_tokens + args.new_tokens,
        layer_shards_saving_path=str(args.scratch),
    )
    return generating(model), {}


if __name__ == "__main__":
    sys.exit(run("airllm", load))
