"""`griffin-offload serve`: an OpenAI-compatible server."""

import argparse
import json
import logging
import os
import signal
import stat
import sys
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING

from griffin_offload.cli.options import (
    AddOption,
    Commands,
    add_model_options,
    add_run_options,
    heavy_imports,
    load_options,
    model_of,
    prepare_serving,
)
from griffin_offload.cli.plan import plan_lines
from griffin_offload.config import MOST_TOGETHER, LoadConfig, ServeConfig
from griffin_offload.demo import SERVED_NAME
from griffin_offload.errors import UsageError, why_unusable
from griffin_offload.units import format_bytes, parse_seconds, parse_size

if TYPE_CHECKING:
    from griffin_offload.planner.plan import Plan
    from griffin_offload.serving.server import Server

_DEFAULTS = ServeConfig()
_LONGEST_KEY_FILE = 10_000


def add_parser(commands: Commands) -> None:
    """Add the command to the main parser."""
    parser = commands.add_parser(
        "serve",
        help="answer OpenAI's API over HTTP",
        description="Answers /v1/chat/completions, /v1/completions, /v1/responses, /v1/messages, /v1/models, "
        "/tokenize, /health and /metrics, several requests at once; at / is a page to chat with. A request that "
        "continues an earlier conversation streams only its new tokens. Nobody but this machine is answered unless "
        "--host and a key say so.",
        epilog="example: griffin-offload serve -m ./model --max-gpu-mem 12GB --parallel 4",
    )
    _add_address(parser.add_argument_group("address").add_argument)
    _add_limits(parser.add_argument_group("limits").add_argument)
    add_model_options(parser, json="print address, model and plan as one JSON object when it is ready")
    add_run_options(parser, verbose="the plan, paths and tracebacks, too", quiet="nothing but errors")
    parser.set_defaults(command=serve)


def _add_address(add: AddOption) -> None:
    add("--host", default=_DEFAULTS.host, help=f"default: {_DEFAULTS.host}; others need an API key")
    add("--port", type=int, default=_DEFAULTS.port, help=f"0 is any free one (default: {_DEFAULTS.port})")
    add("--served-name", metavar="NAME", help="the model's name in requests (default: the last part of --model)")
    add(
        "--api-key-file",
        type=Path,
        metavar="FILE",
        help="the key that clients have to give (default: $GRIFFIN_OFFLOAD_API_KEY)",
    )
    add("--allow-host", action="append", metavar="NAME", help="answer requests to this host name, too; repeatable")
    add(
        "--cors-origin",
        action="append",
        metavar="ORIGIN",
        help="web pages of this origin may ask (https://example.org, or * for any); repeatable",
    )
    add(
        "--no-page", action="store_false", dest="page", help="leave out the page for people at / (default: it is there)"
    )


def _add_limits(add: AddOption) -> None:
    add(
        "--parallel",
        type=_parallel,
        default=_DEFAULTS.parallel,
        metavar="N",
        help="requests that are answered at once, each with memory for the whole context. auto, the default: up to "
        f"{MOST_TOGETHER}, as far as the budget has room, but one where they would have to share a choice of neurons",
    )
    add("--queue-size", type=int, default=_DEFAULTS.queue_size, metavar="N", help="requests that may wait")
    add(
        "--idle-unload",
        type=_seconds,
        dest="idle_unload_s",
        metavar="TIME",
        help="give the model's memory back after so long without a request (10m); the next one loads it again "
        "(default: never)",
    )
    add(
        "--session-mem",
        metavar="SIZE",
        help="part of the budget for conversations beside the current one (default: what the plan leaves over)",
    )
    add("--max-sessions", type=int, default=_DEFAULTS.max_sessions, metavar="N", help="how many of them at most")
    add("--max-body", default=_DEFAULTS.max_body, metavar="SIZE", help=f"default: {_DEFAULTS.max_body}")
    add("--max-prompt-tokens", type=int, metavar="N", help="default: the context")
    add("--max-output-tokens", type=int, metavar="N", help="of one answer (default: the context)")
    add("--max-choices", type=int, default=_DEFAULTS.max_choices, metavar="N", help="answers to one request")
    for flag, name, default in (
        ("--request-timeout", "request_timeout_s", _DEFAULTS.request_timeout_s),
        ("--shutdown-grace", "shutdown_grace_s", _DEFAULTS.shutdown_grace_s),
    ):
        add(flag, type=_seconds, dest=name, default=default, metavar="TIME", help=f"default: {default:g}s")
    add("--max-connections", type=int, default=_DEFAULTS.max_connections, metavar="N", help="at once")


def _parallel(text: str) -> int | str:
    if text == "auto" or (text.isascii() and text.isdigit()):
        return text if text == "auto" else int(text)
    raise argparse.ArgumentTypeError(f"{text!r} is no number of requests: 1 or more, or auto")


def _seconds(text: str) -> float:
    try:
        return parse_seconds(text)
    except UsageError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def serve(arguments: argparse.Namespace) -> int:
    """Load the model and answer until SIGTERM (exit code 0) or Ctrl-C (130)."""
    options, config = load_options(arguments), serve_config(arguments)
    LoadConfig(**options)  # a bad flag is reported before any file is looked at
    parse_size(config.max_body)
    prepare_serving("serve")
    _log_to_stderr(arguments)
    with heavy_imports():
        from griffin_offload.serving.server import Server

    server = Server(model_of(arguments), options, config)
    code: int | None = signal.SIGINT
    try:
        plan = server.load()
        code = server.run(lambda: _say_ready(server, plan, arguments))
        if code == signal.SIGINT:  # it ends already: another Ctrl-C would only leave a traceback
            signal.signal(signal.SIGINT, signal.SIG_IGN)
        if not arguments.quiet:
            print("griffin-offload: stopped", file=sys.stderr, flush=True)
    finally:
        if not server.close():
            _leave(code)
    return _exit_code(code)


def serve_config(arguments: argparse.Namespace) -> ServeConfig:
    """The `ServeConfig` that flags, environment and key file make; UsageError for values that cannot be used."""
    given = {f.name: getattr(arguments, f.name) for f in fields(ServeConfig) if hasattr(arguments, f.name)}
    given |= {name: tuple(given[name] or ()) for name in ("allow_host", "cors_origin")}
    if given["served_name"] is None and arguments.model is None:
        given["served_name"] = SERVED_NAME
    return ServeConfig(**given, api_key=_api_key(arguments.api_key_file))


def _api_key(file: Path | None) -> str | None:
    from griffin_offload.serving.auth import KEY_VARIABLE, check_key

    if file is not None:
        try:
            with file.open("rb") as opened:
                key = check_key(opened.read(_LONGEST_KEY_FILE).decode("utf-8-sig"), "--api-key-file")
                _warn_of_readers(os.fstat(opened.fileno()).st_mode)
            return key
        except (OSError, ValueError) as error:
            reason = "it is not UTF-8" if isinstance(error, UnicodeError) else why_unusable(file, error)  # and no key
            raise UsageError(f"cannot read --api-key-file {file}: {reason}") from error
    found = os.environ.get(KEY_VARIABLE)
    return check_key(found, KEY_VARIABLE) if found is not None else None


def _warn_of_readers(mode: int) -> None:
    """A line if the key file's `mode` lets everybody read it."""
    if os.name == "posix" and stat.S_ISREG(mode) and mode & stat.S_IROTH:
        what = f"others can read --api-key-file (mode {stat.S_IMODE(mode):o}): chmod o= it"
        print(f"griffin-offload: {what}", file=sys.stderr)


def _log_to_stderr(arguments: argparse.Namespace) -> None:
    """Our own loggers alone: a line for each request, with -v paths and tracebacks, with -q only what went wrong."""
    logger = logging.getLogger("griffin_offload")
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("griffin-offload: %(message)s"))
    logger.handlers, logger.propagate = [handler], False
    level = logging.DEBUG if arguments.verbose else logging.ERROR if arguments.quiet else logging.INFO
    logger.setLevel(level)
    for name in ("uvicorn", "uvicorn.error", "asyncio"):
        logging.getLogger(name).setLevel(logging.WARNING if arguments.verbose else logging.CRITICAL + 1)


def _say_ready(server: "Server", plan: "Plan", arguments: argparse.Namespace) -> None:
    if arguments.json:
        facts = {"url": server.url, "model": server.name, "pid": os.getpid(), "plan": plan.to_json()}
        print(json.dumps(facts), flush=True)
    if arguments.verbose:
        print("\n".join(plan_lines(plan)), file=sys.stderr)
    if not arguments.quiet:
        print(
            f"griffin-offload: {server.name} on {server.url}/v1: {plan.in_words}, density {plan.density:.2f}, context "
            f"{plan.context_tokens} tokens, budget {format_bytes(plan.budget_bytes)}",
            file=sys.stderr,
            flush=True,
        )


def _exit_code(signal_number: int | None) -> int:
    return 128 + signal.SIGINT if signal_number == signal.SIGINT else 0


def _leave(signal_number: int | None) -> None:
    """The worker's thread is inside a layer that takes long; nothing is lost with it."""
    sys.stdout.flush()
    os._exit(_exit_code(signal_number))
