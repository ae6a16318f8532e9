"""`griffin-offload inspect --prompt`: what pruning would lose on one prompt."""

import argparse
import json
import sys
from typing import TYPE_CHECKING, Any

from griffin_offload.cli.measuring import Bar, load_streamed
from griffin_offload.cli.options import model_of, parse_density, quiet_libraries
from griffin_offload.cli.prompt_text import prompt_text, tokenize
from griffin_offload.config import InspectConfig, LoadConfig, RunConfig
from griffin_offload.errors import DoesNotFit, UsageError
from griffin_offload.figures.style import check_matplotlib, draw, make_directory
from griffin_offload.units import format_bytes
from griffin_offload.weights.files import write_text

if TYPE_CHECKING:
    from griffin_offload.weights.checkpoint import Checkpoint

_MEMORY = ("max_gpu_mem", "max_cpu_mem", "device", "offload", "dtype", "seed", "threads", "offline")


def inspect_prompt(arguments: argparse.Namespace) -> int:
    """A table in the terminal or a JSON object, and with `--output` a picture, too."""
    text = prompt_text(arguments)
    room = RunConfig.max_new_tokens if arguments.max_new_tokens is None else arguments.max_new_tokens
    if room < 1:
        raise UsageError(f"--max-new-tokens is {room}: at least 1")
    density = "auto" if arguments.density is None else parse_density(arguments.density)
    options = {name: getattr(arguments, name) for name in _MEMORY} | {"density": density}
    options["quantize"] = arguments.quantize or LoadConfig.quantize
    LoadConfig(**options)  # a bad flag is reported before any file is looked at
    if arguments.output is not None:
        check_matplotlib()
        make_directory(arguments.output)
    quiet_libraries()
    from griffin_offload.evaluation.inspection import prompt_loss
    from griffin_offload.runtime.prompts import tokenizer_of
    from griffin_offload.weights.checkpoint import open_checkpoint

    checkpoint = open_checkpoint(model_of(arguments), offline=arguments.offline)
    ids = tokenize(tokenizer_of(checkpoint.directory), text, arguments)[0]
    plan, shortfall = _planned(options | {"ctx_size": ids.numel() + room, "prompt_tokens": ids.numel()}, checkpoint)
    planned = plan["densities"] if plan is not None else None
    with (
        load_streamed(arguments, checkpoint, max(ids.numel(), 2)) as model,
        Bar("prompt", quiet=arguments.quiet or arguments.json) as bar,
    ):
        numbers = prompt_loss(model, ids, InspectConfig.prompt_densities, planned, bar.step)
    if shortfall is not None:
        print(f"note: no density is marked, {shortfall}", file=sys.stderr)
    numbers = {"model": arguments.model or "demo", **numbers, "plan": plan}
    _show(numbers, arguments)
    return 0


def _planned(options: dict[str, Any], checkpoint: "Checkpoint") -> tuple[dict[str, Any] | None, DoesNotFit | None]:
    """What the budget allows, or what it lacks."""
    from griffin_offload.runtime.prospect import examine_checkpoint, plan_for

    prospect = examine_checkpoint(checkpoint, LoadConfig(**options))
    try:
        plan = plan_for(prospect)
    except DoesNotFit as error:
        return None, error
    neurons = [layer.neurons for layer in prospect.shape.layers]
    planned = {
        "density": plan.density,
        "densities": [kept / count for kept, count in zip(plan.kept, neurons, strict=True)],
        "precision": plan.precision,
        "budget_bytes": plan.budget_bytes,
        "budget": format_bytes(plan.budget_bytes),
    }
    return planned, None


def _show(numbers: dict[str, Any], arguments: argparse.Namespace) -> None:
    if arguments.output is not None:
        from griffin_offload.figures.lines import prompt_loss as picture

        files = draw(lambda: picture(numbers), arguments.output, "prompt")
        write_text(arguments.output / "prompt.json", json.dumps(numbers, indent=1))
        if not arguments.quiet:
            print(f"wrote {', '.join(map(str, [*files, arguments.output / 'prompt.json']))}", file=sys.stderr)
    if arguments.json:
        print(json.dumps(numbers))
        return
    from griffin_offload.figures.terminal import show_prompt_loss

    show_prompt_loss(numbers, sys.stdout)
