"""`griffin-offload eval latency`: seconds of generation at fixed lengths, the full model beside every variant."""

import argparse
import json
import sys
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

from griffin_offload.cli.eval import (
    add_measuring_options,
    add_variant_options,
    columns,
    full_once,
    variant_name,
    variants_of,
)
from griffin_offload.cli.options import add_memory_options, add_model_option, model_of, quiet_libraries
from griffin_offload.config import FORMAT_NAMES
from griffin_offload.errors import DoesNotFit, UsageError
from griffin_offload.evaluation.config import LatencyConfig
from griffin_offload.units import format_bytes

if TYPE_CHECKING:
    from torch import Tensor

    from griffin_offload.checkpoint.base import Checkpoint
    from griffin_offload.evaluation.speed import Timing
    from griffin_offload.method.variants import Variant

    _Short = tuple[Variant, tuple[int, int], str]
    """What does not fit, at which size, and why."""

_DEFAULTS = LatencyConfig()
_MEMORY = ("max_gpu_mem", "max_cpu_mem", "device", "offload", "dtype", "threads", "offline", "seed")


def add_parser(kinds: Any) -> None:
    """Add this kind to the parser of `eval`."""
    parser = kinds.add_parser(
        "latency",
        help="seconds of generation at fixed lengths (the paper's table 3)",
        epilog="example: griffin-offload eval latency -m ./model --sizes 512+128",
    )
    add = parser.add_argument
    sizes = ",".join(f"{p}+{g}" for p, g in _DEFAULTS.sizes)
    add("--sizes", default=sizes, metavar="P+G[,P+G...]", help="tokens of the prompt and generated")
    add("-r", "--repeats", type=int, default=_DEFAULTS.repeats, metavar="N", help="after a warm-up")
    add("--text", type=Path, metavar="FILE", help="prompts are its start (default: random tokens)")
    add("--quantize", choices=FORMAT_NAMES, help="precision of the residents (default: the stored one)")
    add_variant_options(parser, _DEFAULTS.densities, _DEFAULTS.selections[0])
    add_measuring_options(parser)
    add_model_option(parser, json="print one JSON list instead of a table")
    add_memory_options(parser)
    parser.set_defaults(command=evaluate_latency, selection=",".join(_DEFAULTS.selections))


def evaluate_latency(arguments: argparse.Namespace) -> int:
    """A table on stdout, or a JSON list; what does not fit the budget is said, and the others are measured."""
    sizes = _sizes(arguments.sizes)
    if arguments.repeats < 1:
        raise UsageError("--repeats is 1 or more")
    variants = variants_of(arguments)
    quiet_libraries()
    from griffin_offload.checkpoint.registry import open_checkpoint
    from griffin_offload.method.variants import Variant

    checkpoint = open_checkpoint(model_of(arguments), offline=arguments.offline)
    tokens = _tokens(arguments, checkpoint, sizes)
    timings: list[Timing] = []
    short: list[_Short] = []
    try:
        for variant, size in product(full_once([Variant(1.0), *variants]), sizes):
            try:
                timings.append(_measure(arguments, checkpoint, variant, size, tokens))
            except DoesNotFit as error:
                short.append((variant, size, " ".join(str(error).split())))
    finally:  # what was measured is said, whatever stopped the rest
        _print(timings, short, as_json=arguments.json)
    return 0 if timings else DoesNotFit.exit_code


def _print(timings: "list[Timing]", short: "list[_Short]", *, as_json: bool) -> None:
    if as_json and (timings or short):
        refused = [
            {"selection": v.selection, "density": v.density, "prompt_tokens": p, "generate_tokens": g}
            | {"does_not_fit": w}
            for v, (p, g), w in short
        ]
        print(json.dumps([*(timing.to_json() for timing in timings), *refused]))
    elif timings or short:
        notes = [f"{variant_name(v.selection, v.density)} {p}+{g} does not fit: {why}" for v, (p, g), why in short]
        print("\n".join([*_lines(timings), *notes]))


def _sizes(text: str) -> list[tuple[int, int]]:
    try:
        sizes = [(int(p), int(g)) for p, g in (part.split("+") for part in text.split(","))]
    except ValueError:
        raise UsageError(f"cannot read the sizes {text!r}: 2048+128, or several: 2048+128,2048+2048") from None
    if any(p < 1 or g < 2 for p, g in sizes):
        raise UsageError("--sizes: a prompt has at least 1 token, and at least 2 are generated: the first is its own")
    return sizes


def _tokens(arguments: argparse.Namespace, checkpoint: "Checkpoint", sizes: list[tuple[int, int]]) -> "Tensor":
    """As many as the longest prompt has."""
    import torch

    from griffin_offload.evaluation.samples import read_documents, take_windows, tokenize

    config = checkpoint.config.get_text_config()
    positions = getattr(config, "max_position_embeddings", None) or 2**31
    largest = max(sizes, key=sum)
    if sum(largest) > positions:
        raise UsageError(f"{largest[0]}+{largest[1]} tokens are more than the model's context, {positions}")
    longest = max(p for p, _ in sizes)
    if arguments.text is None:
        drawn = torch.Generator().manual_seed(arguments.seed)
        return torch.randint(config.vocab_size, (longest,), generator=drawn, dtype=torch.long, device="cpu")
    documents = tokenize(read_documents(arguments.text), checkpoint.tokenizer())
    return take_windows(documents, longest, 1, "even")[0]


def _measure(
    arguments: argparse.Namespace,
    checkpoint: "Checkpoint",
    variant: "Variant",
    size: tuple[int, int],
    tokens: "Tensor",
) -> "Timing":
    """Loaded for this size alone: a longer one may not fit."""
    from tqdm import tqdm

    from griffin_offload.engine.model import GriffinModel
    from griffin_offload.evaluation.speed import time_generation

    options = {name: getattr(arguments, name) for name in _MEMORY}
    options |= {"quantize": arguments.quantize or checkpoint.precision.option}
    options |= {"density": variant.density, "selection": variant.selection}
    options |= {"ctx_size": sum(size), "prompt_tokens": size[0]}
    title = f"{variant_name(variant.selection, variant.density)} {size[0]}+{size[1]}"
    with (
        GriffinModel.from_pretrained(checkpoint.path, **options) as model,
        tqdm(
            total=arguments.repeats,
            desc=title,
            leave=False,
            disable=arguments.quiet or None,
            file=sys.stderr,
        ) as bar,
    ):
        prompt = tokens[: size[0]]
        return time_generation(model, prompt, size[1], variant, arguments.repeats, lambda: bar.update() and None)


def _lines(timings: "list[Timing]") -> list[str]:
    from griffin_offload.evaluation.speed import full_total_s

    sizes, rates = ("prompt", "generate"), ("tokens/s", "against full", "streamed", "peak")
    heads = ("neurons", "precision", *sizes, "prefill s", "decode s", "total s", "(least-most)", *rates)
    cells = []
    for timing in timings:
        full = full_total_s(timings, timing)
        cells.append(
            (
                variant_name(timing.selection, timing.density),
                timing.precision,
                str(timing.prompt_tokens),
                str(timing.generate_tokens),
                f"{timing.prefill_s:.3f}",
                f"{timing.decode_s:.3f}",
                f"{timing.total_s:.3f}",
                f"({timing.least_s:.3f}-{timing.most_s:.3f})",
                f"{timing.tokens_per_s:.1f}",
                "-" if full is None else f"{full / timing.total_s:.2f}x",
                format_bytes(timing.streamed_bytes),
                format_bytes(timing.peak_bytes),
            )
        )
    return columns(heads, cells) if cells else []
