"""One side of a comparison, in a process of its own: load, generate, print one JSON line.

Both sides are timed by the same instrument, a streamer that notes the clock and the process's own disk reads
(/proc/self/io, threads included) at every token.
"""

import argparse
import json
import random
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any

import torch
from instrument import Mark, figures, mark
from torch import nn
from torch.utils.hooks import RemovableHandle
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.generation.streamers import BaseStreamer

from griffin_offload import GriffinModel  # with all that transformers imports late: no side's time
from griffin_offload.engine.speculative import ExactLoop
from griffin_offload.formats.linear import QuantizedLinear
from griffin_offload.units import parse_size

SEED = 0
BETWEEN = 4  # tokens


class Marks(BaseStreamer):
    """(seconds, bytes read so far) at every call; `generate` hands over the prompt first, then each token. `between` is
    called behind each with their number, and its seconds are no side's time."""

    def __init__(self, between: Callable[[int], None]) -> None:
        self.marks: list[Mark] = []
        self.pauses: list[float] = []
        self._between = between

    def put(self, value: torch.Tensor) -> None:
        self.marks.append(mark())
        start_s = time.perf_counter()
        self._between(len(self.marks))
        self.pauses.append(time.perf_counter() - start_s)

    def end(self) -> None:
        pass


class Products:
    """Between two tokens, now and then: one row times every matrix that a token reads. What the kernels reach alone, of
    the same matrices and in the same seconds, on a machine that changes its speed."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._calls: dict[nn.Module, torch.Tensor] = {}
        self._hooks: list[RemovableHandle] = []
        self.bytes_per_s: list[float] = []

    def between(self, handed_over: int) -> None:
        """The first token has come when two are handed over; the forward behind it tells what is multiplied."""
        if handed_over == 2:
            linears = [m for m in self._model.modules() if isinstance(m, (nn.Linear, QuantizedLinear))]
            self._hooks = [linear.register_forward_pre_hook(self._note) for linear in linears]
        while handed_over > 2 and self._hooks:
            self._hooks.pop().remove()
        if handed_over > 2 and handed_over % BETWEEN == 0:
            self.bytes_per_s.append(self._multiply())

    def _note(self, linear: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        self._calls[linear] = inputs[0].clone()

    def _multiply(self) -> float:
        start_s = time.perf_counter()
        for linear, row in self._calls.items():
            linear(row)
        seconds = time.perf_counter() - start_s
        return sum(parameter.nbytes for linear in self._calls for parameter in linear.parameters()) / seconds


def load_ours(args: argparse.Namespace) -> Any:
    return GriffinModel.from_pretrained(
        args.dir,
        max_gpu_mem=args.budget,
        device="cpu",
        density=args.density,
        quantize=args.quantize,
        offload="disk",
        ctx_size=args.prompt_tokens + args.new_tokens,
        prompt_tokens=args.prompt_tokens,
        **exact_options(args),
    )


def simulate(acceptance: float) -> None:
    """From now on drafts are accepted with this probability; drafting, streaming and choosing anew stay real."""
    draws = random.Random(0)

    def verdict(self: ExactLoop, scores: torch.Tensor, draft: int, drafted_from: Any) -> int:
        return draft if draws.random() < acceptance else (draft + 1) % scores.shape[-1]

    ExactLoop._verdict = verdict  # type: ignore[method-assign]


def exact_options(args: argparse.Namespace) -> dict[str, Any]:
    """Random weights accept nothing meaningful, so acceptance can be simulated; all the rest of the mode is real."""
    if not args.exact:
        return {}
    if args.acceptance is not None:
        simulate(args.acceptance)
    return {"exact": True, "draft_tokens": args.draft_tokens}


def decoding(model: Any) -> dict[str, Any] | None:
    """What a token of ours reads: the residents, without an embedding among them, of which it needs one row."""
    if not hasattr(model, "resident_bytes"):
        return None
    embedding, head = model.model.get_input_embeddings(), model.model.get_output_embeddings()
    looked_up = model.plan.embeddings == "device" and head.weight is not embedding.weight
    return {
        "precision": model.plan.precision,
        "density": model.plan.density,
        "embeddings": model.plan.embeddings,
        "token_bytes": model.resident_bytes - looked_up * embedding.weight.nbytes,
        "planned_bytes": model.plan.peak_bytes,
    }


def load_mmap(args: argparse.Namespace) -> Any:
    """Plain transformers: mapped weights, the kernel decides what stays."""
    return AutoModelForCausalLM.from_pretrained(args.dir, dtype="auto")


def load_accelerate(args: argparse.Namespace) -> Any:
    """Disk offload of all beyond the RAM share; safetensors are read in place, without a second copy."""
    model = AutoModelForCausalLM.from_pretrained(
        args.dir,
        dtype="auto",
        device_map="auto",
        max_memory={"cpu": parse_size(args.ram_share)},
        offload_folder=args.offload_folder,
    )
    if args.copy_share:  # kinder than its default: mapped pages of the share would be evicted again
        for parameter in model.parameters():
            if parameter.device.type == "cpu":
                parameter.data = parameter.data.clone()
    return model


LOADERS = {"ours": load_ours, "mmap": load_mmap, "accelerate": load_accelerate}


def prompt(args: argparse.Namespace) -> torch.Tensor:
    """[1, T] ids, the same for every side: those of a file, else random ones."""
    if args.prompt_ids:
        return torch.tensor([json.loads(args.prompt_ids.read_text())[: args.prompt_tokens]])
    vocabulary = AutoConfig.from_pretrained(args.dir).vocab_size
    generator = torch.Generator().manual_seed(SEED)
    return torch.randint(3, vocabulary, (1, args.prompt_tokens), generator=generator)


def measure(args: argparse.Namespace) -> dict[str, Any]:
    ids = prompt(args)
    before = mark()
    model = LOADERS[args.side](args)
    loaded = mark()
    # Exact mode hands over several tokens at a time, of a forward that may be the full model's.
    products = Products(model.model) if args.side == "ours" and not args.exact else None
    marks = Marks(products.between if products else lambda _: None)
    output = model.generate(
        input_ids=ids,
        max_new_tokens=args.new_tokens,
        min_new_tokens=args.new_tokens,
        do_sample=False,
        streamer=marks,
    )
    new_tokens = output[0, args.prompt_tokens :].tolist()
    if len(new_tokens) != args.new_tokens:
        raise RuntimeError(f"asked for {args.new_tokens} tokens, got {len(new_tokens)}")
    report = getattr(model, "last_report", None)
    tokens, pauses = marks.marks[-args.new_tokens :], marks.pauses[-args.new_tokens :]
    return figures(before, loaded, tokens, new_tokens, pauses) | {
        "decoding": decoding(model),
        "products_bytes_per_s": products.bytes_per_s if products else None,
        "offload_folder_bytes": folder_bytes(args.offload_folder),
        "report": asdict(report) if is_dataclass(report) and not isinstance(report, type) else None,
    }


def folder_bytes(folder: Path | None) -> int:
    """A second copy of the weights would show here."""
    if folder is None or not folder.is_dir():
        return 0
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("side", choices=LOADERS)
    parser.add_argument("--dir", type=Path, required=True)
    parser.add_argument("--budget", default="0")
    parser.add_argument("--density", type=float, default=1.0)
    parser.add_argument("--quantize", default="none")
    parser.add_argument("--ram-share", default="0")
    parser.add_argument("--copy-share", action="store_true")
    parser.add_argument("--offload-folder", type=Path)
    parser.add_argument("--exact", action="store_true")
    parser.add_argument("--acceptance", type=float, help="simulated; the full model decides when not given")
    parser.add_argument("--draft-tokens", type=int)
    parser.add_argument("--prompt-ids", type=Path, help="JSON list of token ids")
    parser.add_argument("--prompt-tokens", type=int, required=True)
    parser.add_argument("--new-tokens", type=int, required=True)
    parser.add_argument("--threads", type=int, required=True)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(SEED)
    json.dump(measure(args), sys.stdout, default=str)
    print()


if __name__ == "__main__":
    main()
