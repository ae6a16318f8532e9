"""`griffin-offload chat`: a conversation in the terminal, or one message per line of standard input."""

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from griffin_offload.cli.generation import add_generation_options, check_utf8, sampling_of, stops_of, thinking_flag
from griffin_offload.cli.imports import heavy_imports
from griffin_offload.cli.options import add_model_options, add_run_options, load_options, model_of, quiet_libraries
from griffin_offload.cli.plan import plan_lines
from griffin_offload.cli.prompt_cache import adopt_saved
from griffin_offload.config import ChatConfig, LoadConfig, Overflow
from griffin_offload.errors import UsageError
from griffin_offload.units import format_bytes

if TYPE_CHECKING:
    from griffin_offload.runtime.session import ChatSession


def add_parser(commands: Any) -> None:
    """Add the command to the main parser."""
    parser = commands.add_parser(
        "chat",
        help="hold a conversation",
        description="Every turn streams only its own tokens. Commands begin with a slash: /help lists them. When "
        "standard input is no terminal, each line is a message, and the first error ends the program with its exit "
        "code. With --json each turn is one JSON object.",
    )
    parser.add_argument("--system", metavar="TEXT", help="system message, for models with a chat template")
    parser.add_argument("--raw", action="store_true", help="no chat template: texts are put one after the other")
    parser.add_argument("--load", type=Path, metavar="FILE", help="go on with a conversation that /save wrote")
    parser.add_argument(
        "--on-overflow",
        choices=get_args(Overflow),
        default=ChatConfig.on_overflow,
        help="when the context is full: refuse the message, or drop the oldest turns until -n tokens, or a quarter of "
        f"the context, are free (default: {ChatConfig.on_overflow})",
    )
    add_generation_options(parser, ChatConfig.max_new_tokens)
    add_model_options(parser)
    add_run_options(parser)
    parser.set_defaults(command=chat)


def chat(arguments: argparse.Namespace) -> int:
    """Read messages and commands until the end; answers go to stdout as they come, all else to stderr."""
    sampling, options = sampling_of(arguments), load_options(arguments) | {"keep_prompts": True}
    stops = stops_of(arguments)
    _check_conversation(arguments)
    LoadConfig(**options)  # a bad flag is reported before any file is looked at
    with heavy_imports():
        from griffin_offload.cli.terminal import Terminal
        from griffin_offload.runtime.model import GriffinModel
        from griffin_offload.runtime.prompts import tokenizer_of
        from griffin_offload.runtime.saved import read_notes
        from griffin_offload.weights.checkpoint import open_checkpoint

    quiet_libraries()
    if arguments.load is not None:
        read_notes(arguments.load)  # a file that is none is told before the model is looked for
    checkpoint = open_checkpoint(model_of(arguments), offline=arguments.offline)
    if arguments.load is not None:
        adopt_saved(arguments.load, options, checkpoint)
    tokenizer = tokenizer_of(checkpoint.directory)
    _check_template(tokenizer, arguments)
    model = GriffinModel.from_pretrained(checkpoint.directory, **options)
    model.tokenizer = tokenizer
    session = model.chat_session(
        system=arguments.system,
        raw=arguments.raw,
        thinking=arguments.thinking,
        stop_strings=stops,
        overflow=arguments.on_overflow,
        seed=arguments.seed,
        max_new_tokens=arguments.max_new_tokens,
        **sampling,
    )
    if arguments.load is not None:
        session.load(arguments.load)
    if arguments.verbose:
        print("\n".join(plan_lines(model.plan)), file=sys.stderr)
    if not arguments.quiet:
        print(_introduction(session, arguments), file=sys.stderr, flush=True)
    return Terminal(session, stops=stops, quiet=arguments.quiet, as_json=arguments.json).run()


def _check_conversation(arguments: argparse.Namespace) -> None:
    """UsageError for flags that would do nothing, and without standard input, before anything is loaded."""
    if sys.stdin is None:
        raise UsageError("standard input is closed: messages come from there")
    for given, flag in ((arguments.system, "--system"), (arguments.thinking, thinking_flag(arguments.thinking))):
        if given is not None and arguments.raw:
            raise UsageError(f"{flag} needs a chat template, and --raw turns it off: leave one of them out")
    if arguments.system is not None:
        check_utf8(arguments.system, "the system message")
    if arguments.load is not None and (arguments.system is not None or arguments.raw):
        flag = "--raw" if arguments.raw else "--system"
        raise UsageError(f"a saved conversation has its own beginning: leave out {flag} or --load")


def _check_template(tokenizer: Any, arguments: argparse.Namespace) -> None:
    """UsageError for flags that the model's chat template has no use for."""
    from griffin_offload.runtime.prompts import thinking_switches

    if arguments.system is not None and tokenizer.chat_template is None:
        raise UsageError("--system needs a chat template, and this model has none: leave it out")
    if arguments.thinking is not None:
        thinking_switches(tokenizer)


def _introduction(session: "ChatSession", arguments: argparse.Namespace) -> str:
    from griffin_offload.runtime.cache import why_not_back

    plan = session.model.plan
    notes = "" if session.templated else "; no chat template: texts are put one after the other"
    if session.context is None:
        notes += f"; every turn reads the whole conversation: {why_not_back(session.model.model.config)}"
    return (
        f"{arguments.model or 'the embedded demo'}: {plan.precision}, density {plan.density:.2f}, context "
        f"{plan.context_tokens} tokens, budget {format_bytes(plan.budget_bytes)}{notes}"
    )
