"""A side that runs in this environment: ours, transformers on mapped weights, accelerate's disk offload."""

import argparse
import random
import sys
from typing import Any

import torch
from peers import protocol
from peers.streamed import generating
from transformers import AutoModelForCausalLM

from griffin_offload import GriffinModel  # with all that transformers imports late: no side's time
from griffin_offload.engine.speculative import ExactLoop


def simulate(acceptance: float) -> None:
    """From now on drafts are accepted with this probability; drafting, streaming and choosing anew stay real."""
    draws = random.Random(0)

    def verdict(self: ExactLoop, scores: torch.Tensor, draft: int, drafted_from: Any) -> int:
        return draft if draws.random() < acceptance else (draft + 1) % scores.shape[-1]

    ExactLoop._verdict = verdict  # type: ignore[method-assign]


def load_ours(args: argparse.Namespace) -> protocol.Loaded:
    sizes = {"ctx_size": args.prompt_tokens + args.new_tokens, "prompt_tokens": args.prompt_tokens}
    options = {"density": args.density, "quantize": args.quantize, "max_gpu_mem": args.budget}
    if args.exact:
        # Random weights accept nothing meaningful; all the rest of the mode is real.
        if args.acceptance is not None:
            simulate(args.acceptance)
        options |= {"exact": True, "draft_tokens": args.draft_tokens}
    model = GriffinModel.from_pretrained(args.dir, device="cpu", offload="disk", **sizes, **options)
    # Of the residents, without an embedding among them, of which a token needs one row.
    planned = f"{model.plan.precision}, density {model.plan.density:.2f}"
    return generating(model), {"token_bytes": model.plan.decoded_bytes, "planned": planned}


def load_mmap(args: argparse.Namespace) -> protocol.Loaded:
    """Plain transformers: mapped weights, the kernel decides what stays."""
    return generating(AutoModelForCausalLM.from_pretrained(args.dir, dtype="auto")), {}


def load_accelerate(args: argparse.Namespace) -> protocol.Loaded:
    """Disk offload of all beyond the RAM share; safetensors are read in place, without a second copy."""
    memory = {"device_map": "auto", "max_memory": {"cpu": args.ram_share}, "offload_folder": args.scratch}
    model = AutoModelForCausalLM.from_pretrained(args.dir, dtype="auto", **memory)
    if args.copy_share:  # kinder than its default: mapped pages of the share would be evicted again
        for parameter in model.parameters():
            if parameter.device.type == "cpu":
                parameter.data = parameter.data.clone()
    return generating(model), {}


LOADERS = {
    "ours": ("griffin-offload", load_ours),
    "mmap": ("transformers", load_mmap),
    "accelerate": ("accelerate", load_accelerate),
}


def main() -> int:
    parser = protocol.new_parser(description=__doc__.splitlines()[0])
    parser.add_argument("side", choices=LOADERS)
    parser.add_argument("--budget", type=int, help="bytes")
    parser.add_argument("--density", type=lambda said: said if said == "auto" else float(said))
    parser.add_argument("--quantize")
    parser.add_argument("--exact", action="store_true")
    parser.add_argument("--acceptance", type=float, help="simulated; the full model decides when not given")
    parser.add_argument("--draft-tokens", type=int)
    parser.add_argument("--copy-share", action="store_true", help="of accelerate: what --ram-share holds is copied")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    return protocol.run(*LOADERS[args.side], args)


if __name__ == "__main__":
    sys.exit(main())
