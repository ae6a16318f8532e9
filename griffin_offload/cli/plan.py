"""`griffin-offload plan`: what would be resident, before any weight is read."""

import argparse
import json
from typing import TYPE_CHECKING, Any

from griffin_offload.cli.options import add_model_options, load_options, model_of, quiet_libraries
from griffin_offload.config import LoadConfig
from griffin_offload.errors import DoesNotFit
from griffin_offload.units import format_bytes

if TYPE_CHECKING:
    from griffin_offload.pricing import Plan


def add_parser(commands: Any) -> None:
    """Add the command to the main parser."""
    parser = commands.add_parser("plan", help="show what would fit, before any weight is read")
    add_model_options(parser)
    parser.add_argument("--prompt-tokens", type=int, metavar="TOKENS", help="longest prompt (default: the context)")
    parser.add_argument("--batch-size", type=int, default=LoadConfig.batch_size, metavar="N", help="sequences at once")
    parser.add_argument("-q", "--quiet", action="store_true", help="the exit code alone")
    parser.set_defaults(command=plan)


def plan(arguments: argparse.Namespace) -> int:
    """Print the plan as a table or one JSON object; exit code 3 when nothing fits."""
    from griffin_offload.plan import describe_shortfall, solve
    from griffin_offload.runtime.prospect import examine

    quiet_libraries()
    prospect = examine(model_of(arguments), LoadConfig(**load_options(arguments)))
    found, remedy = solve(prospect.shapes, prospect.request, prospect.others)
    if arguments.json:
        print(json.dumps(found.to_json(remedy)))
        return 0 if remedy is None else DoesNotFit.exit_code
    if not arguments.quiet:
        print("\n".join(plan_lines(found)))
    if remedy is not None:
        raise DoesNotFit(describe_shortfall(found, remedy))
    return 0


def plan_lines(plan: "Plan") -> list[str]:
    """The table of bytes for people."""
    rows = [
        (name.replace("_", " "), plan.prefill_parts[name], plan.decode_parts[name])
        for name in plan.prefill_parts
        if plan.prefill_parts[name] or plan.decode_parts[name]
    ]
    rows.append(("peak", plan.peak_prefill_bytes, plan.peak_decode_bytes))
    lines = [f"{'':<14}{'prefill':>12}{'decode':>12}"]
    lines += [f"{name:<14}{format_bytes(a):>12}{format_bytes(b):>12}" for name, a, b in rows]
    lines.append(f"{'budget':<14}{format_bytes(plan.budget_bytes):>12}{format_bytes(plan.budget_bytes):>12}")
    kept = f"density {plan.density:.2f}" if plan.streamed else "all neurons resident, nothing streamed"
    lines.append(
        f"{kept}, {plan.precision}, context {plan.context_tokens} tokens (prompt {plan.prompt_tokens}), "
        f"embeddings on the {plan.embeddings}"
    )
    if plan.streamed:
        lines.append(
            f"streams {format_bytes(plan.streamed_bytes)} of {format_bytes(plan.full_bytes)} once per prompt through "
            f"{plan.slots} slot{'s' if plan.slots != 1 else ''}"
        )
    return lines
