"""AirLLM's own copy of the weights, one file for each layer, so that making it falls into no timed run.

ENV/bin/python -m peers.airllm_split CHECKPOINT OUT
"""

import sys

from airllm.utils import find_or_create_local_splitted_path

LLAMA_NAMES = {
    "embed": "model.embed_tokens",
    "layer_prefix": "model.layers",
    "norm": "model.norm",
    "lm_head": "lm_head",
}

if __name__ == "__main__":
    find_or_create_local_splitted_path(sys.argv[1], sys.argv[2], layer_names=LLAMA_NAMES)
