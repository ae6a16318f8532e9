"""`griffin-offload eval`: what pruning costs."""

from importlib import import_module
from typing import Any

KINDS = ("ppl", "tasks", "summaries", "latency")
"""Each is a module beside this one, `eval_` and its name."""


def add_parser(commands: Any) -> None:
    """Add the command and its kinds to the main parser."""
    parser = commands.add_parser("eval", help="measure what pruning costs")
    kinds = parser.add_subparsers(title="kinds", metavar="KIND", required=True)
    for kind in KINDS:
        import_module(f"griffin_offload.cli.eval_{kind}").add_parser(kinds)
