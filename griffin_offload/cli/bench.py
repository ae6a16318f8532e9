"""`griffin-offload bench`: tokens per second of prefill and decode, each beside its ceiling."""

import argparse
import json
import platform
import sys
from itertools import product
from typing import TYPE_CHECKING, Any

from griffin_offload.cli.eval import columns, numbers
from griffin_offload.cli.options import (
    Commands,
    add_bits_option,
    add_memory_options,
    add_missing_experts_option,
    add_model_option,
    model_of,
    quiet_libraries,
)
from griffin_offload.config import FORMAT_NAMES, MIXED, BenchConfig, LoadConfig
from griffin_offload.errors import DoesNotFit, UsageError
from griffin_offload.units import format_bytes

if TYPE_CHECKING:
    from griffin_offload.engine.spec import ModelSpec
    from griffin_offload.evaluation.ceilings import Ceilings
    from griffin_offload.evaluation.speed import Speed
    from griffin_offload.formats import Format
    from griffin_offload.planner.plan import Plan

_DEFAULTS = BenchConfig()
_Density = float | str
"""A number, or auto."""
_MEMORY = ("max_gpu_mem", "max_cpu_mem", "device", "offload", "dtype", "quantize", "bits", "offline", "missing_experts")


def add_parser(commands: Commands) -> None:
    """Add the command to the main parser."""
    parser = commands.add_parser(
        "bench",
        help="measure prefill and decode against the machine's ceilings",
        epilog="example: griffin-offload bench -m ./model --max-gpu-mem 12GB -p 512 -n 128",
    )
    add = parser.add_argument
    add(
        "-p",
        "--prompt-tokens",
        type=numbers,
        default=[_DEFAULTS.prompt_tokens],
        metavar="P[,P...]",
        help="of the prompt",
    )
    add(
        "-n",
        "--generate-tokens",
        type=numbers,
        default=[_DEFAULTS.generate_tokens],
        metavar="N[,N...]",
        help="generated",
    )
    add("-r", "--repeats", type=int, default=_DEFAULTS.repeats, metavar="N", help="after a warm-up")
    add("-d", "--density", default=LoadConfig.density, metavar="D[,D...]", help="auto, or several to compare")
    add("-o", "--output", choices=("md", "json"), default="md", help="a table and a line of JSON, or that alone")
    add("--cold", action="store_true", help="drop the checkpoint from the page cache before every prompt")
    precisions = ("auto", *FORMAT_NAMES, *MIXED)
    add("--quantize", choices=precisions, default=LoadConfig.quantize, help="precision of the residents")
    add_bits_option(add)
    add_missing_experts_option(add)
    add("--threads", type=int, metavar="N", help="threads that compute on the CPU")
    add("-q", "--quiet", action="store_true", help="no progress bar")
    add("--kernels", action="store_true", help="which function does what on this machine, and why others do not")
    add_model_option(parser)
    add_memory_options(parser)
    parser.set_defaults(command=bench)


def bench(arguments: argparse.Namespace) -> int:
    """Ceilings first, then a row for every density and pair of lengths; the last line is JSON."""
    if arguments.kernels:
        return _print_kernels(as_json=arguments.output == "json" or arguments.json)
    densities = _densities(arguments.density)
    if min(*arguments.prompt_tokens, arguments.repeats) < 1 or min(arguments.generate_tokens) < 2:
        raise UsageError("-p and -r are 1 or more, -n at least 2: the first token is the prompt's")
    quiet_libraries()
    from griffin_offload.engine.spec import examine, plan_for
    from griffin_offload.evaluation.ceilings import measure_ceilings

    model_specs = [_examine(arguments, density) for density in densities]
    model_spec = model_specs[0]
    _check_length(arguments, model_spec)
    plan = next((plan for plan in map(_plan_or_none, model_specs) if plan), None) or plan_for(model_spec)
    precision = model_spec.precision_of(plan)
    ceilings = measure_ceilings(model_spec, precision, sorted(set(arguments.prompt_tokens)), arguments.threads)
    table = arguments.output == "md" and not arguments.json
    if table:
        print("\n".join(_ceiling_lines(ceilings, precision)), end="\n\n", flush=True)
    speeds: list[Speed] = []
    refused = []
    for density in densities:
        try:
            speeds += _measure(arguments, density, ceilings, examine)
        except DoesNotFit as error:
            refused.append({"density": density, "does_not_fit": " ".join(str(error).split())})
    if table:
        print("\n".join([*_rows(speeds), *(f"density {r['density']}: {r['does_not_fit']}" for r in refused)]))
    print(json.dumps(_record(model_spec, ceilings, speeds) | {"refused": refused}))
    return 0 if speeds else DoesNotFit.exit_code


def _densities(text: str) -> list[_Density]:
    try:
        return [part if part == "auto" else float(part) for part in text.split(",")]
    except ValueError:
        raise UsageError(f"cannot read the densities {text!r}: auto, or numbers from 0 to 1, 1,0.5") from None


def _options(arguments: argparse.Namespace, density: _Density) -> dict[str, Any]:
    options = {name: getattr(arguments, name) for name in _MEMORY} | {"density": density, "threads": arguments.threads}
    longest = max(arguments.prompt_tokens)
    return options | {"prompt_tokens": longest, "ctx_size": longest + max(arguments.generate_tokens)}


def _examine(arguments: argparse.Namespace, density: _Density) -> "ModelSpec":
    from griffin_offload.engine.spec import examine

    return examine(model_of(arguments), LoadConfig(**_options(arguments, density)))


def _plan_or_none(model_spec: "ModelSpec") -> "Plan | None":
    from griffin_offload.engine.spec import plan_for

    try:
        return plan_for(model_spec)
    except DoesNotFit:
        return None


def _check_length(arguments: argparse.Namespace, model_spec: "ModelSpec") -> None:
    tokens, most = max(arguments.prompt_tokens) + max(arguments.generate_tokens), model_spec.shape.max_positions
    if tokens > most:
        raise UsageError(f"{tokens} tokens of prompt and answer are more than the model's context, {most}")


def _measure(arguments: argparse.Namespace, density: _Density, ceilings: "Ceilings", examine: object) -> "list[Speed]":
    import torch
    from tqdm import tqdm

    from griffin_offload.engine.model import GriffinModel
    from griffin_offload.evaluation.speed import measure_speed

    options = _options(arguments, density) | {"threads": ceilings.threads or arguments.threads}
    lengths = list(product(arguments.prompt_tokens, arguments.generate_tokens))
    with (
        GriffinModel.from_pretrained(model_of(arguments), **options) as model,
        tqdm(
            total=len(lengths) * arguments.repeats,
            desc=f"density {density}",
            leave=False,
            disable=arguments.quiet or None,
            file=sys.stderr,
        ) as bar,
    ):
        vocabulary, generator = model.engine.shape.vocab_size, torch.Generator().manual_seed(0)
        prompt = torch.randint(
            vocabulary, (max(arguments.prompt_tokens),), generator=generator, dtype=torch.long, device="cpu"
        )
        checkpoint, cold = model.engine.model_spec.checkpoint, arguments.cold
        return [
            measure_speed(
                model, prompt[:p], n, arguments.repeats, ceilings, checkpoint, cold=cold, done=lambda: bar.update()
            )
            for p, n in lengths
        ]


def _ceiling_lines(ceilings: "Ceilings", precision: "Format") -> list[str]:
    def rate(value: float | None) -> str:
        return "not measured" if value is None else f"{format_bytes(value)}/s"

    gemm = ", ".join(
        f"{tokens} tokens {rate_ / 1e9:.0f} Gflop/s" for tokens, rate_ in ceilings.gemm_flops_per_s.items()
    )
    lines = [f"disk, past the page cache   {rate(ceilings.read_bytes_per_s)}"]
    if ceilings.copy_pinned_bytes_per_s is not None:
        pageable = rate(ceilings.copy_pageable_bytes_per_s)
        lines.append(
            f"host to device              {rate(ceilings.copy_pinned_bytes_per_s)} pinned, {pageable} pageable"
        )
    kind = "16 bit" if precision.is_plain else precision.name
    threads = f", {ceilings.threads} threads" if ceilings.threads else ""
    lines.append(f"one row times matrices      {rate(ceilings.gemv_bytes_per_s)} of {kind}{threads}")
    return [*lines, f"many rows                   {gemm}"]


def _rows(speeds: "list[Speed]") -> list[str]:
    heads = ("density", "precision", "cache", "test", "tokens/s", "seconds (least-most)", "of ceiling", "where it went")
    cells = []
    for speed in speeds:
        shared = (f"{speed.density:.2f}", speed.precision, speed.cache)
        parts = ", ".join(f"{name.replace('_', ' ')} {value:.3f}" for name, value in speed.prefill_parts.items())
        for test, spread, tokens, share, where in (
            (f"pp{speed.prompt_tokens}", speed.prefill, speed.prompt_tokens, speed.prefill_share, parts),
            (
                f"tg{speed.generate_tokens}",
                speed.decode,
                1,
                speed.decode_share,
                ", ".join(f"{name} {value * 1e3:.2f} ms" for name, value in speed.decode_parts.items()),
            ),
        ):
            seconds = f"{spread.median:.4f} ({spread.least:.4f}-{spread.most:.4f})"
            percent = "-" if share is None else f"{share:.0%}"
            cells.append((*shared, test, f"{tokens / spread.median:.1f}", seconds, percent, where))
    return columns(heads, cells)


def _record(model_spec: "ModelSpec", ceilings: "Ceilings", speeds: "list[Speed]") -> dict[str, Any]:
    from dataclasses import asdict

    import torch
    import transformers

    from griffin_offload import __version__

    return {
        "versions": {
            "griffin_offload": __version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        "machine": {"processor": platform.processor() or platform.machine(), "device": model_spec.hardware.name},
        "model": {"type": model_spec.checkpoint.config.model_type, "weight_bytes": model_spec.checkpoint.weight_bytes},
        "ceilings": asdict(ceilings),
        "rows": [speed.to_json() for speed in speeds],
    }


def _rows_in_words(least: int, most: int, many: int) -> str:
    """Of x, that a row of the table is best for."""
    if most >= many:
        return "all" if least <= 1 else f"{least} or more"
    return f"up to {most}" if least <= 1 else f"{least} to {most}"


def _print_kernels(*, as_json: bool) -> int:
    """The table of kernels; of each operation and layout, the first row that applies does the work."""
    quiet_libraries()
    rows = _kernel_rows()
    if as_json:
        print(json.dumps(rows))
        return 0
    heads = ("operation", "layout", "rows", "device", "multiplies", "function")
    lines = [(*heads, "here"), *((*(row[head] for head in heads), row["why_not"] or "yes") for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())
    return 0


def _kernel_rows() -> list[dict[str, Any]]:
    # They add rows of torch's, and of the package gguf.
    from griffin_offload import formats  # noqa: F401
    from griffin_offload.checkpoint import gguf_blocks  # noqa: F401
    from griffin_offload.devices.registry import devices_here
    from griffin_offload.engine import build  # noqa: F401
    from griffin_offload.kernels import table

    devices, order = devices_here(), list(dict.fromkeys(kernel.operation for kernel in table.rows()))
    rows = sorted(table.rows(), key=lambda kernel: (order.index(kernel.operation), kernel.layout))
    return [
        {
            "operation": kernel.operation,
            "layout": kernel.layout,
            "rows": _rows_in_words(*kernel.rows, table.MANY),
            "device": kernel.device or "any",
            "multiplies": str(kernel.computes or "any").removeprefix("torch."),
            "function": f"{kernel.name}{'' if kernel.ours or kernel.operation == 'dequantize' else ', torch'}",
            "why_not": table.why_not(kernel, devices),
        }
        for kernel in rows
    ]
