"""`griffin-offload inspect`: what neurons do on a text, in the paper's figures, or what one prompt would lose."""

import argparse
from pathlib import Path
from typing import Any, get_args

from griffin_offload.cli import inspect_prompt, inspect_text
from griffin_offload.cli.measuring import add_measuring_options, numbers
from griffin_offload.cli.options import add_memory_options, add_model_option
from griffin_offload.config import InspectConfig, LoadConfig, Quantize, RunConfig
from griffin_offload.errors import UsageError

_DEFAULTS = InspectConfig()


def add_parser(commands: Any) -> None:
    """Add the command to the main parser."""
    parser = commands.add_parser(
        "inspect",
        help="pictures of a model's neurons, and what a prompt would lose",
        description="Without --text: how much of its activation a prompt keeps, by layer and density, with the density "
        "that the budget allows marked. With --text: the paper's figures as PNG, SVG and JSON.",
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
    add("--quantize", choices=get_args(Quantize), help=f"of the plan (default: {LoadConfig.quantize})")
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


_OF_PROMPT = ("prompt", "prompt_file", "system", "raw", "quantize", "max_new_tokens")
_OF_TEXT = ("figure", "layers", "windows", "tokens", "prompt_tokens", "generate_tokens", "selection")


def inspect(arguments: argparse.Namespace) -> int:
    """A prompt's loss in the terminal, or pictures of a text."""
    of_text = arguments.text is not None or arguments.rows is not None
    _refuse(arguments, _OF_PROMPT if of_text else _OF_TEXT, "a prompt" if of_text else "--text")
    return inspect_text.inspect_text(arguments) if of_text else inspect_prompt.inspect_prompt(arguments)


def _refuse(arguments: argparse.Namespace, names: tuple[str, ...], what: str) -> None:
    given = [name for name in names if getattr(arguments, name) is not None]
    if given:
        raise UsageError(f"--{given[0].replace('_', '-')} belongs to {what}: inspect looks at one of both at a time")
