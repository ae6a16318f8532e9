"""`griffin-offload eval`: what pruning costs."""

from typing import Any

from griffin_offload.cli import eval_latency, eval_ppl, eval_summaries, eval_tasks


def add_parser(commands: Any) -> None:
    """Add the command and its kinds to the main parser."""
    parser = commands.add_parser("eval", help="measure what pruning costs")
    kinds = parser.add_subparsers(title="kinds", metavar="KIND", required=True)
    for kind in (eval_ppl, eval_tasks, eval_summaries, eval_latency):
        kind.add_parser(kinds)
