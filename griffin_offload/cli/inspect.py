"""`griffin-offload inspect`: what neurons do on a text, in the paper's figures, or what one prompt would lose."""

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from griffin_offload.checkpoint.files import write_text
from griffin_offload.cli import inspect_text
from griffin_offload.cli.eval import add_measuring_options, load_streamed, loading_options, numbers
from griffin_offload.cli.options import (
    add_bits_option,
    add_memory_options,
    add_model_option,
    model_of,
    parse_density,
    quiet_libraries,
)
from griffin_offload.cli.terminal import Bar, prompt_text, tokenize
from griffin_offload.config import FORMAT_NAMES, MIXED, LoadConfig, RunConfig
from griffin_offload.errors import DoesNotFit, UsageError
from griffin_offload.evaluation.config import InspectConfig
from griffin_offload.evaluation.plots import check_matplotlib, draw, make_directory
from griffin_offload.units import format_bytes

if TYPE_CHECKING:
    from griffin_offload.checkpoint.base import Checkpoint


# `griffin-offload inspect --prompt`: what pruning would lose on one prompt.


def inspect_prompt(arguments: argparse.Namespace) -> int:
    """A table in the terminal or a JSON object, and with `--output` a picture, too."""
    text = prompt_text(arguments)
    room = RunConfig.max_new_tokens if arguments.max_new_tokens is None else arguments.max_new_tokens
    if room < 1:
        raise UsageError(f"--max-new-tokens is {room}: at least 1")
    density = "auto" if arguments.density is None else parse_density(arguments.density)
    options = loading_options(arguments) | {"density": density, "bits": arguments.bits or LoadConfig.bits}
    options["quantize"] = arguments.quantize or LoadConfig.quantize
    LoadConfig(**options)  # a bad flag is reported before any file is looked at
    if arguments.output is not None:
        check_matplotlib()
        make_directory(arguments.output)
    quiet_libraries()
    from griffin_offload.checkpoint.registry import open_checkpoint
    from griffin_offload.evaluation.inspection import prompt_loss

    checkpoint = open_checkpoint(model_of(arguments), offline=arguments.offline)
    ids = tokenize(checkpoint.tokenizer(), text, arguments)[0]
    plan, shortfall = _planned(options | {"ctx_size": ids.numel() + room, "prompt_tokens": ids.numel()}, checkpoint)
    planned = plan["densities"] if plan is not None else None
    levels = (plan["counts"], plan["distortions"]) if plan is not None else None
    with (
        load_streamed(arguments, checkpoint, max(ids.numel(), 2)) as model,
        Bar("prompt", quiet=arguments.quiet or arguments.json) as bar,
    ):
        numbers = prompt_loss(model, ids, InspectConfig.prompt_densities, planned, bar.step, levels)
    if shortfall is not None:
        print(f"note: no density is marked, {shortfall}", file=sys.stderr)
    numbers = {"model": arguments.model or "demo", **numbers, "plan": plan}
    _show(numbers, arguments)
    return 0


def _planned(options: dict[str, Any], checkpoint: "Checkpoint") -> tuple[dict[str, Any] | None, DoesNotFit | None]:
    """What the budget allows, or what it lacks."""
    from griffin_offload.engine.spec import examine_checkpoint, plan_for
    from griffin_offload.planner.tiers import bits_of, expected_error, is_quantised

    model_spec = examine_checkpoint(checkpoint, LoadConfig(**options))
    if not model_spec.shape.with_neurons:
        raise inspect_text.nothing_to_inspect(checkpoint)
    try:
        plan = plan_for(model_spec)
    except DoesNotFit as error:
        return None, error
    shape = model_spec.shape_of(plan)
    planned = {
        "density": plan.density,
        "densities": [layer.density(kept) for kept, layer in zip(plan.kept, shape.layers, strict=True)],
        "precision": plan.precision,
        "in_words": plan.in_words,
        "ff_bits": bits_of(shape, plan.counts),
        "levels": plan.levels,
        "counts": plan.counts,
        "distortions": [format.distortion for format in shape.levels],
        "expected_error": expected_error(shape, plan.counts),
        "quantised": is_quantised(shape),
        "small_matrices": model_spec.small_of(plan),
        "budget_bytes": plan.budget_bytes,
        "budget": format_bytes(plan.budget_bytes),
    }
    return planned, None


def _show(numbers: dict[str, Any], arguments: argparse.Namespace) -> None:
    if arguments.output is not None:
        from griffin_offload.evaluation.plots import experts
        from griffin_offload.evaluation.plots import prompt_loss as picture

        files = draw(lambda: picture(numbers), arguments.output, "prompt")
        if numbers["unit"] == "experts":
            files += draw(lambda: experts(numbers), arguments.output, "experts")
        write_text(arguments.output / "prompt.json", json.dumps(numbers, indent=1))
        if not arguments.quiet:
            print(f"wrote {', '.join(map(str, [*files, arguments.output / 'prompt.json']))}", file=sys.stderr)
    if arguments.json:
        print(json.dumps(numbers))
        return
    from griffin_offload.evaluation.terminal_plots import show_prompt_loss

    show_prompt_loss(numbers, sys.stdout)


_DEFAULTS = InspectConfig()


def add_parser(commands: Any) -> None:
    """Add the command to the main parser."""
    parser = commands.add_parser(
        "inspect",
        help="pictures of a model's neurons, and what a prompt would lose",
        description="Without --text: how much of its activation a prompt keeps, by layer and density, with the density "
        "that the budget allows marked. With --text: the paper's figures as PNG, SVG and JSON.",
        epilog="example: griffin-offload inspect -m ./model --max-gpu-mem 12GB --prompt-file report.txt",
    )
    parser.add_argument("--output", type=Path, metavar="DIR", help="where pictures and numbers go")
    parser.add_argument("--density", metavar="D[,D...]", help="densities to measure; of a prompt, the one to mark")
    _add_prompt_options(parser.add_argument_group("a prompt").add_argument)
    _add_text_options(parser.add_argument_group("a text").add_argument)
    add_measuring_options(parser)
    add_model_option(parser)
    add_memory_options(parser)
    parser.set_defaults(command=inspect)


def _add_prompt_options(add: Any) -> None:
    add("--prompt", metavar="TEXT", help="the prompt, or - for standard input (the demo has its own)")
    add("--prompt-file", type=Path, metavar="FILE", help="read the prompt from a file")
    add("--system", metavar="TEXT", help="system message, for models with a chat template")
    add("--raw", action="store_true", default=None, help="do not apply the model's chat template")
    add("--quantize", choices=("auto", *FORMAT_NAMES, *MIXED), help=f"of the plan (default: {LoadConfig.quantize})")
    add_bits_option(add, default=None)
    add(
        "-n",
        "--max-new-tokens",
        type=int,
        metavar="N",
        help=f"room in the plan for the answer (default: {RunConfig.max_new_tokens})",
    )


def _add_text_options(add: Any) -> None:
    add("--text", type=Path, metavar="FILE", help="UTF-8, documents between <|endoftext|>")
    add("--figure", metavar="NAME[,NAME...]", help=f"of {', '.join(_DEFAULTS.figures)} (default: all)")
    add("--layers", metavar="L[,L...]|all", help=f"heatmaps of these (default: {_DEFAULTS.layers}, evenly)")
    add("--windows", type=int, metavar="N", help=f"spread over the text (default: {_DEFAULTS.windows})")
    add("--tokens", type=int, metavar="S", help=f"of a window, but for perplexities (default: {_DEFAULTS.tokens})")
    add(
        "--prompt-tokens",
        type=numbers,
        metavar="P[,P...]",
        help=f"of lengths; sparsity takes the largest (default: {_listed('prompt_tokens')})",
    )
    add("--generate-tokens", type=numbers, metavar="G[,G...]", help=f"(default: {_listed('generate_tokens')})")
    add("--selection", metavar="S[,S...]", help="of sparsity and lengths (default: with baselines, and topk)")
    add("--rows", type=Path, action="append", metavar="FILE", help="draw sparsity from eval ppl --json, eval tasks")


def _listed(name: str) -> str:
    return ",".join(map(str, getattr(_DEFAULTS, name)))


_OF_PROMPT = ("prompt", "prompt_file", "system", "raw", "quantize", "bits", "max_new_tokens")
_OF_TEXT = ("figure", "layers", "windows", "tokens", "prompt_tokens", "generate_tokens", "selection")


def inspect(arguments: argparse.Namespace) -> int:
    """A prompt's loss in the terminal, or pictures of a text."""
    of_text = arguments.text is not None or arguments.rows is not None
    _refuse(arguments, _OF_PROMPT if of_text else _OF_TEXT, "a prompt" if of_text else "--text")
    return inspect_text.inspect_text(arguments) if of_text else inspect_prompt(arguments)


def _refuse(arguments: argparse.Namespace, names: tuple[str, ...], what: str) -> None:
    given = [name for name in names if getattr(arguments, name) is not None]
    if given:
        raise UsageError(f"--{given[0].replace('_', '-')} belongs to {what}: inspect looks at one of both at a time")
