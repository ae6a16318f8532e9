"""Exports of one set of prompts in every form, each run by this package and by the software that it is written for.

    python benchmarks/exported.py -m MODEL --prompts prompts.jsonl --text held_out.txt --llama-cpp PYTHON

`--llama-cpp` is the interpreter of an environment with `xllamacpp`: GGUF files are compared with llama.cpp by the first
choice after each of `--tokens` tokens of the text, which both are given: all, and those that are farther than each of
`--margin` nats before the second. llama.cpp runs every file a second time with the same weights as float32: what agrees
then, and not before, is its arithmetic with blocks. transformers (with compressed-tensors) is compared by the logits,
in float32, and so is the original with its other neurons set to zero (a Llama). Ends in JSON.
"""

import argparse
import itertools
import json
import math
import subprocess
import tempfile
from pathlib import Path
from typing import Any, get_args

import gguf
import numpy as np
import torch
from transformers import AutoModelForCausalLM

from griffin_offload import GriffinModel
from griffin_offload.checkpoint.registry import open_checkpoint
from griffin_offload.checkpoint.tokenizer import encode
from griffin_offload.config import ExportForm
from griffin_offload.engine import export as runtime

# Runs in the other environment: reads token ids, prints the first choice after each prefix from `first` on.
_LLAMA_CPP = """
import json, sys, xllamacpp
path, first, ids = sys.argv[1], int(sys.argv[2]), json.load(sys.stdin)
p = xllamacpp.CommonParams()
p.model.path, p.n_ctx, p.n_parallel, p.warmup = path, len(ids) + 8, 1, False
p.cpuparams.n_threads = p.cpuparams_batch.n_threads = int(sys.argv[3])
server = xllamacpp.Server(p)
found = []
for end in range(first, len(ids)):
    asked = {"prompt": ids[:end], "n_predict": 1, "temperature": 0, "cache_prompt": True, "samplers": [], "logprobs": 1}
    said = server.handle_completions(asked)["choices"][0]["logprobs"]  # none where it is a part of a letter
    found.append(said["content"][0]["top_logprobs"][0]["id"] if said else -1)
print(json.dumps(found))
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-m", "--model", type=Path, required=True)
    parser.add_argument("--prompts", type=Path, required=True, help='jsonl, {"prompt": ...}')
    parser.add_argument("--text", type=Path, required=True, help="held out")
    parser.add_argument("--density", type=float, default=0.75)
    parser.add_argument("--forms", nargs="+", choices=get_args(ExportForm), default=list(get_args(ExportForm)))
    parser.add_argument("--most-prompts", type=int, default=48)
    parser.add_argument("--before", type=int, default=256, help="tokens that only precede")
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--margin", type=float, nargs="+", default=[0.05, 0.1, 0.2, 0.3])
    parser.add_argument("--llama-cpp", type=Path, metavar="PYTHON")
    args = parser.parse_args()
    tokenizer = open_checkpoint(args.model).tokenizer()
    rows = [json.loads(line)["prompt"] for line in args.prompts.read_text().splitlines()][: args.most_prompts]
    prompts = [torch.tensor(encode(tokenizer, text)) for text in rows]
    ids = torch.tensor(encode(tokenizer, args.text.read_text()[: 12 * (args.before + args.tokens)]))
    ids = ids[: args.before + args.tokens + 1]
    options: dict[str, Any] = {"device": "cpu", "max_gpu_mem": "4GB", "quantize": "none"}
    longest = max(len(prompt) for prompt in prompts) + 1
    chooses = {"density": args.density, "always_stream": True, "keep_prompts": True, "ctx_size": longest}
    with GriffinModel.from_pretrained(args.model, **options, **chooses) as model:
        choice = runtime.choose(model, prompts)
    full = logits_of(args.model, ids, args.before, options)
    found = {"original": figures(full, full, ids[args.before :])}
    print(json.dumps(found), flush=True)
    for form in args.forms:
        with tempfile.TemporaryDirectory() as place:
            made = runtime.export(args.model, Path(place) / "out", choice, args.density, form=form)
            ours = logits_of(made.directory, ids, args.before, options)
            found[form] = {"neurons": made.neurons, "MB": made.written_bytes / 1e6}
            found[form] |= figures(ours, full, ids[args.before :]) | compared(made, ours, ids, args, choice)
        print(json.dumps({form: found[form]}), flush=True)
    print(json.dumps(found, indent=2))


def logits_of(directory: Path, ids: torch.Tensor, before: int, options: dict[str, Any]) -> torch.Tensor:
    """float32 [T, V] by this package, in float32, after each of `ids` from `before` - 1 on."""
    settings = {"density": 1.0, "dtype": "float32", "ctx_size": len(ids)}
    with torch.no_grad(), GriffinModel.from_pretrained(directory, **options, **settings) as model:
        found: torch.Tensor = model.model(ids[None]).logits[0, before - 1 : -1].float()
        return found.clone()


@torch.no_grad()
def transformers_logits(
    directory: Path,
    ids: torch.Tensor,
    before: int,
    dtype: torch.dtype,
    choice: runtime.Choice | None = None,
    kept: int = 0,
) -> torch.Tensor:
    """The same by transformers alone; with a `choice`, its neurons but the `kept` strongest being zero."""
    model = AutoModelForCausalLM.from_pretrained(directory)
    model(ids[None, :1])  # makes weights of the model's precision of what is packed
    for tensor in itertools.chain(model.parameters(), model.buffers()):
        tensor.data = tensor.to(dtype) if tensor.is_floating_point() else tensor
    for index, squared in (choice.chosen_on if choice is not None else {}).items():
        mask = torch.zeros_like(squared, dtype=dtype).index_fill_(0, squared.topk(kept).indices, 1.0)
        down = model.model.layers[index].mlp.down_proj
        down.register_forward_pre_hook(lambda _, given, mask=mask: (given[0] * mask,))
    found: torch.Tensor = model(ids[None]).logits[0, before - 1 : -1]
    return found


def figures(ours: torch.Tensor, full: torch.Tensor, targets: torch.Tensor) -> dict[str, float]:
    new, old = ours.log_softmax(-1), full.log_softmax(-1)
    return {
        "perplexity": math.exp(-float(new.gather(1, targets[:, None]).mean())),
        "kl": float((old.exp() * (old - new)).sum(-1).mean()),
    }


def compared(
    made: runtime.Export, ours: torch.Tensor, ids: torch.Tensor, args: argparse.Namespace, choice: runtime.Choice
) -> dict[str, Any]:
    """What the others make of it."""
    directory = made.directory
    if not made.form.startswith("gguf"):
        theirs = transformers_logits(directory, ids, args.before, torch.float32)
        found: dict[str, Any] = {"farthest_logit_from_transformers": float((ours - theirs).abs().max())}
        if made.form == "unquantized":
            for dtype in (torch.float32, torch.float64):
                theirs = transformers_logits(directory, ids, args.before, dtype)
                masked = transformers_logits(args.model, ids, args.before, dtype, choice, made.neurons)
                found[f"farthest_logit_from_masked_{dtype}"] = float((theirs - masked).abs().max())
            found["largest_logit"] = float(masked.abs().max())
        return found
    if args.llama_cpp is None:
        return {}
    file, plain = directory / "model.gguf", directory / "float32.gguf"
    write_float32(file, plain)
    best = ours.log_softmax(-1).topk(2).values
    of_blocks, of_floats = (first_choices(path, ids, args) for path in (file, plain))
    known = of_blocks >= 0  # an answer that is no whole letter comes without its token
    agrees, before_second = of_blocks == ours.argmax(-1), best[:, 0] - best[:, 1]
    clear = {margin: known & (before_second > margin) for margin in args.margin}
    return {
        "compared": int(known.sum()),
        "same_first_choice": float(agrees[known].float().mean()),
        "same_where_clear": {margin: [int(agrees[c].sum()), int(c.sum())] for margin, c in clear.items()},
        "its_choices_behind_our_first_nats": behind(ours[known], of_blocks[known]),
        "same_first_choice_of_floats": float((of_floats == ours.argmax(-1))[of_floats >= 0].float().mean()),
        "those_behind_our_first_nats": behind(ours[of_floats >= 0], of_floats[of_floats >= 0]),
    }


def first_choices(path: Path, ids: torch.Tensor, args: argparse.Namespace) -> torch.Tensor:
    """Of llama.cpp."""
    command = [args.llama_cpp, "-c", _LLAMA_CPP, path, str(args.before), "1"]
    said = subprocess.run(command, input=json.dumps(ids.tolist()), stdout=subprocess.PIPE, text=True, check=True)
    return torch.tensor(json.loads(said.stdout.splitlines()[-1]))


def behind(ours: torch.Tensor, choices: torch.Tensor) -> float:
    """How far the farthest of the `choices` lies behind our first."""
    logs = ours.log_softmax(-1)
    return float((logs.max(-1).values - logs.gather(1, choices[:, None])[:, 0]).max())


def write_float32(file: Path, out: Path) -> None:
    """The numbers of a GGUF file as float32, by the package gguf alone."""
    read = gguf.GGUFReader(file)
    writer = gguf.GGUFWriter(out, read.fields["general.architecture"].contents())
    for key, field in read.fields.items():
        if not key.startswith("GGUF.") and key not in ("general.architecture", "general.file_type"):
            writer.add_key_value(key, field.contents(), field.types[0], field.types[-1] if field.types[1:] else None)
    for tensor in read.tensors:
        numbers = gguf.quants.dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        writer.add_tensor(tensor.name, numbers.reshape(tensor.shape.tolist()[::-1]))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


if __name__ == "__main__":
    main()
