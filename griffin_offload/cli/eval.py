"""`griffin-offload eval`: what pruning costs. And what all commands that measure share: loading a model that streams
everything, variants, tables, a bar.
"""

import argparse
from collections.abc import Sequence
from importlib import import_module
from itertools import product
from typing import TYPE_CHECKING, Any, get_args

from griffin_offload.config import LoadConfig, SelectionMethod, check_density
from griffin_offload.errors import UsageError

if TYPE_CHECKING:
    from griffin_offload.checkpoint.base import Checkpoint
    from griffin_offload.engine.model import GriffinModel
    from griffin_offload.evaluation.distributed import Processes
    from griffin_offload.method.variants import Variant


KINDS = ("ppl", "tasks", "summaries", "latency")
"""Each is a module beside this one, `eval_` and its name."""


def add_parser(commands: Any) -> None:
    """Add the command and its kinds to the main parser."""
    parser = commands.add_parser("eval", help="measure what pruning costs")
    kinds = parser.add_subparsers(title="kinds", metavar="KIND", required=True)
    for kind in KINDS:
        import_module(f"griffin_offload.cli.eval_{kind}").add_parser(kinds)


def add_variant_options(
    parser: argparse.ArgumentParser, densities: Sequence[float], selection: SelectionMethod
) -> None:
    """Lists of densities and selections, and what a measurement has besides."""
    parser.add_argument("--density", default=",".join(map(str, densities)), metavar="D[,D...]", help="neurons kept")
    methods = ", ".join(get_args(SelectionMethod))
    parser.add_argument("--selection", default=selection, metavar="S[,S...]", help=f"of {methods}")


def add_measuring_options(parser: argparse.ArgumentParser) -> None:
    """Seed, threads, quiet."""
    parser.add_argument("--seed", type=int, default=LoadConfig.seed, help="of selections that draw")
    parser.add_argument("--threads", type=int, metavar="N", help="threads that compute on the CPU")
    parser.add_argument("-q", "--quiet", action="store_true", help="no progress bar")


def load_streamed(
    arguments: argparse.Namespace, checkpoint: "Checkpoint", ctx_tokens: int, processes: "Processes | None" = None
) -> "GriffinModel":
    """Every layer passes in full, so no neuron need stay: the budget is for layers on their way and activations."""
    from griffin_offload.engine.model import GriffinModel

    options = loading_options(arguments)
    options |= {"quantize": checkpoint.precision.option, "density": 0.0, "always_stream": True}
    options = options if processes is None else processes.share(options)
    return GriffinModel.from_pretrained(checkpoint.path, **options, ctx_size=ctx_tokens, prompt_tokens=ctx_tokens)


def loading_options(arguments: argparse.Namespace) -> dict[str, Any]:
    """Fields of `LoadConfig` that every command that measures has."""
    names = ("max_gpu_mem", "max_cpu_mem", "device", "offload", "dtype", "seed", "threads", "offline")
    return {name: getattr(arguments, name) for name in names}


def variants_of(arguments: argparse.Namespace) -> "list[Variant]":
    """Every selection at every density; UsageError for what is neither."""
    methods, densities = selections(arguments.selection), fractions(arguments.density)
    from griffin_offload.method.variants import Variant

    return [Variant(density, method) for method, density in product(methods, densities)]


def full_model() -> "list[Variant]":
    """The variant of models that have no neurons to leave out."""
    from griffin_offload.method.variants import Variant

    return [Variant(1.0)]


def full_once(variants: "Sequence[Variant]") -> "list[Variant]":
    """Without repetition; at density 1 all selections are one, the full model."""
    from griffin_offload.method.variants import Variant

    return list(dict.fromkeys(Variant(1.0) if variant.density == 1 else variant for variant in variants))


def selections(text: str) -> list[SelectionMethod]:
    """Names of selections, of an option; UsageError for one that is none."""
    methods = text.split(",")
    unknown = [method for method in methods if method not in get_args(SelectionMethod)]
    if unknown:
        raise UsageError(f"no selection {unknown[0]!r}: choose of {', '.join(get_args(SelectionMethod))}")
    return methods  # type: ignore[return-value]


def fractions(text: str) -> list[float]:
    """Densities, of an option; UsageError for what is no number from 0 to 1."""
    try:
        densities = [float(part) for part in text.split(",")]
    except ValueError:
        raise UsageError(f"cannot read the densities {text!r}: numbers from 0 to 1, 0.75,0.5") from None
    check_density(densities)
    return densities


def numbers(text: str) -> list[int]:
    """A list of whole numbers, of an option."""
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no list of whole numbers: write for example 64,128") from None


def variant_name(selection: str, density: float) -> str:
    """As tables call it."""
    return "full" if density == 1 else f"{selection} {density:g}"


def columns(heads: Sequence[str], cells: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a table: the first column to the left, the others to the right."""
    widths = [max(len(line[i]) for line in (heads, *cells)) for i in range(len(heads))]
    return [
        "  ".join([line[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(line[1:], widths[1:], strict=True))])
        for line in (heads, *cells)
    ]
