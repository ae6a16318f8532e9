"""`griffin-offload eval latency`: seconds of generation at fixed lengths, the full model beside every variant."""

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from griffin_offload.cli.measuring import add_measuring_options, add_variant_options, columns, variant_name, variants_of
from griffin_offload.cli.options import add_memory_options, add_model_option, model_of, quiet_libraries
from griffin_offload.config import LatencyConfig, Quantize
from griffin_offload.errors import DoesNotFit, UsageError
from griffin_offload.units import format_bytes

if TYPE_CHECKING:
    from torch import Tensor

    from griffin_offload.evaluation.latency import Timing
    from griffin_offload.method.variant import Variant
    from griffin_offload.weights.checkpoint import Checkpoint

_DEFAULTS = LatencyConfig()
_MEMORY = ("max_gpu_mem", "max_cpu_mem", "device", "offload", "dtype", "threads", "offline", "seed")


def add_parser(kinds: Any) -> None:
    """Add this kind to the parser of `eval`."""
    parser = kinds.add_parser("latency", help="seconds of generation at fixed lengths (the paper's table 3)")
    add = parser.add_argument
    sizes = ",".join(f"{p}+{g}" for p, g in _DEFAULTS.sizes)
    add("--sizes", default=sizes, metavar="P+G[,P+G...]", help="tokens of the prompt and generated")
    add("-r", "--repeats", type=int, default=_DEFAULTS.repeats, metavar="N", help="after a warm-up")
    add("--text", type=Path, metavar="FILE", help="prompts are its start (default: random tokens)")
    add("--quantize", choices=get_args(Quantize)[1:], help="precision of the residents (default: the stored one)")
    add_variant_options(parser, _DEFAULTS.densities, _DEFAULTS.selections[0])
    add_measuring_options(parser)
    add_model_option(parser)
    add_memory_options(parser)
    parser.set_defaults(command=evaluate_latency, selection=",".join(_DEFAULTS.selections))


def evaluate_latency(arguments: argparse.Namespace) -> int:
    """A table on stdout, or a JSON list; what does not fit the budget is said, and the others are measured."""
    sizes = _sizes(arguments.sizes)
    if arguments.repeats < 1:
        raise UsageError("--repeats is 1 or more")
    variants = variants_of(arguments)
    quiet_libraries()
    from griffin_offload.method.variant import Variant
    from griffin_offload.weights.checkpoint import open_checkpoint

    checkpoint = open_checkpoint(model_of(arguments), offline=arguments.offline)
    tokens = _tokens(arguments, checkpoint, sizes)
    timings: list[Timing] = []
    short: list[tuple[Variant, str]] = []
    for variant in [Variant(1.0, "topk"), *(variant for variant in variants if variant.density < 1)]:
        try:
            timings += _measure(arguments, checkpoint, variant, sizes, tokens)
        except DoesNotFit as error:
            short.append((variant, " ".join(str(error).split())))
    if arguments.json:
        refused = [{"selection": v.selection, "density": v.density, "does_not_fit": why} for v, why in short]
        print(json.dumps([*(timing.to_json() for timing in timings), *refused]))
    else:
        print("\n".join([*_lines(timings), *(f"{variant_name(v.selection, v.density)}: {why}" for v, why in short)]))
    return 0 if timings else DoesNotFit.exit_code


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

    from griffin_offload.evaluation.windows import read_documents, take_windows, tokenize
    from griffin_offload.weights.checkpoint import load_tokenizer

    config = checkpoint.config.get_text_config()
    positions = getattr(config, "max_position_embeddings", None) or 2**31
    largest = max(sizes, key=sum)
    if sum(largest) > positions:
        raise UsageError(f"{largest[0]}+{largest[1]} tokens are more than the model's context, {positions}")
    longest = max(p for p, _ in sizes)
    if arguments.text is None:
        return torch.randint(config.vocab_size, (longest,), generator=torch.Generator().manual_seed(arguments.seed))
    documents = tokenize(read_documents(arguments.text), load_tokenizer(checkpoint.directory))
    return take_windows(documents, longest, 1, "even")[0]


def _measure(
    arguments: argparse.Namespace,
    checkpoint: "Checkpoint",
    variant: "Variant",
    sizes: list[tuple[int, int]],
    tokens: "Tensor",
) -> "list[Timing]":
    from tqdm import tqdm

    from griffin_offload.evaluation.latency import time_generation
    from griffin_offload.runtime.model import GriffinModel

    options = {name: getattr(arguments, name) for name in _MEMORY}
    options |= {"quantize": arguments.quantize or checkpoint.precision}
    options |= {"density": variant.density, "selection": variant.selection}
    options |= {"ctx_size": max(map(sum, sizes)), "prompt_tokens": tokens.numel()}
    title = variant_name(variant.selection, variant.density)
    with (
        GriffinModel.from_pretrained(checkpoint.directory, **options) as model,
        tqdm(
            total=len(sizes) * arguments.repeats,
            desc=title,
            leave=False,
            disable=arguments.quiet or None,
            file=sys.stderr,
        ) as bar,
    ):
        return [
            time_generation(model, tokens[:p], g, variant, arguments.repeats, lambda: bar.update() and None)
            for p, g in sizes
        ]


def _lines(timings: "list[Timing]") -> list[str]:
    from griffin_offload.evaluation.latency import full_total_s

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
