"""`griffin-offload plan`: what would be resident, before any weight is read."""

import argparse
import json
import operator
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from griffin_offload.cli.options import (
    LEFT_OVER,
    MODEL_VARIABLE,
    NOT_NEEDED,
    Commands,
    add_model_options,
    heavy_imports,
    load_options,
    model_of,
    quiet_libraries,
)
from griffin_offload.config import LoadConfig
from griffin_offload.errors import DoesNotFit, UsageError
from griffin_offload.units import format_bytes

if TYPE_CHECKING:
    from griffin_offload.engine.spec import ModelSpec
    from griffin_offload.planner.experts import ExpertForecast
    from griffin_offload.planner.plan import Plan

# Nothing is loaded, so that more can be left out: accelerate places weights.
_NOT_PLANNED = (*NOT_NEEDED, "accelerate")
_MODELS = "transformers.modeling_utils"
"""The part of transformers that asks for processes and the compiler."""


def add_parser(commands: Commands) -> None:
    """Add the command to the main parser."""
    parser = commands.add_parser(
        "plan",
        help="show what would fit, before any weight is read",
        epilog="example: griffin-offload plan -m ./model --max-gpu-mem 12GB -v",
    )
    add_model_options(parser, context=f"{LEFT_OVER}; run plans for prompt and answer: name their tokens here")
    parser.add_argument("--config", type=Path, metavar="FILE", help="plan from a config.json alone")
    parser.add_argument("--prompt-tokens", type=int, metavar="TOKENS", help="longest prompt (default: the context)")
    parser.add_argument("--batch-size", type=int, default=LoadConfig.batch_size, metavar="N", help="sequences at once")
    parser.add_argument(
        "--parallel",
        type=_parallel,
        dest="sequences",
        default=LoadConfig.sequences,
        metavar="N",
        help="requests at once, as of serve: each has memory for the whole context",
    )
    loudness = parser.add_mutually_exclusive_group()
    loudness.add_argument(
        "-v", "--verbose", action="store_true", help="all that fits, with tokens/s expected of this machine"
    )
    loudness.add_argument("-q", "--quiet", action="store_true", help="the exit code alone")
    parser.set_defaults(command=plan)


def _parallel(text: str) -> int:
    if text.isascii() and text.isdigit() and int(text):
        return int(text)
    raise argparse.ArgumentTypeError(f"{text!r} is no number of requests: 1 or more")


def plan(arguments: argparse.Namespace) -> int:
    """Print the plan as a table or one JSON object; exit code 3 when nothing fits."""
    # Most of transformers is imported when it is first asked, by `_examined`.
    with heavy_imports(_NOT_PLANNED), _no_processes(), _no_compiler() if arguments.alone else nullcontext():
        from griffin_offload.planner.plan import describe_shortfall
        from griffin_offload.planner.solve import solve

        quiet_libraries()
        model_spec = _examined(arguments)
        # Here, as measuring other precisions builds a model, too.
        found, remedy = solve(model_spec.shapes, model_spec.request, model_spec.others)
    if arguments.json:
        others = {"alternatives": _alternatives(model_spec, found)} if arguments.verbose else {}
        device = {"device": model_spec.hardware.name, "assumed": model_spec.assumed}
        small = {"small_matrices": model_spec.small_of(found)}
        expected = _forecast(model_spec, found)
        experts = {"expert_forecast": None if expected is None else expected.to_json()}
        print(json.dumps(found.to_json(remedy) | device | small | experts | others))
        return 0 if remedy is None else DoesNotFit.exit_code
    if not arguments.quiet:
        lines = [*plan_lines(found), *_forecast_lines(_forecast(model_spec, found))]
        if remedy is None:  # else it is no plan to be followed
            lines += [*_rounded_again(model_spec, found), *_instead_of(model_spec, found, arguments.prefer)]
        print("\n".join([*lines, *([] if model_spec.assumed is None else [model_spec.assumed])]))
    if arguments.verbose:
        beside = [f"{', '.join(names)} in {form}" for form, names in model_spec.small_of(found).items()]
        print("\n".join([*beside, "", *_alternative_lines(_alternatives(model_spec, found))]))
    if remedy is not None:
        raise DoesNotFit(describe_shortfall(found, remedy))
    return 0


@contextmanager
def _no_processes() -> Iterator[None]:
    """Torch is as where it was built without processes that share tensors, and transformers leaves these out."""
    from torch import distributed

    asked = distributed.is_available
    if _MODELS not in sys.modules:
        vars(distributed)["is_available"] = lambda: False
    try:
        yield
    finally:
        vars(distributed)["is_available"] = asked


def _same(condition: object, *_: Any, **__: Any) -> Any:
    return condition


def _undecorated(function: object = None, *_: Any, **__: Any) -> Any:
    """`function` as it is, or a decorator that leaves functions as they are."""
    return function or _undecorated


# What torch asks of its compiler where nothing is compiled, and of sizes where all are numbers.
_DECORATORS = ("disable", "allow_in_graph", "assume_constant_result")
_GUARDS = ("guard_or_true", "guard_or_false", "guard_size_oblivious", "guarding_hint_or_throw")
_STAND_INS: dict[str, dict[str, Any]] = {
    "torch._dynamo": {**dict.fromkeys(_DECORATORS, _undecorated), "mark_static_address": lambda *_, **__: None},
    "torch.fx.experimental.symbolic_shapes": {
        **dict.fromkeys((*_GUARDS, "expect_true", "statically_known_true"), _same),
        "sym_eq": operator.eq,
        "sym_and": lambda *conditions: all(conditions),
        "sym_or": lambda *conditions: any(conditions),
        "has_guarding_hint": lambda size: True,
        "is_nested_int": lambda size: False,
    },
    "sympy": {"Basic": type("Basic", (), {})},
}


@contextmanager
def _no_compiler() -> Iterator[None]:
    """transformers and torch's meta tensors run without torch's compiler and its symbols. What is decorated for the
    compiler meanwhile is not decorated afterwards, so this is for a process in which nobody else uses it."""
    import torch  # noqa: F401  # it imports some of their neighbours

    if _MODELS in sys.modules:
        yield
        return
    stand_ins = [_StandIn(name, known) for name, known in _STAND_INS.items() if name not in sys.modules]
    try:
        yield
    finally:
        for stand_in in stand_ins:
            stand_in.leave()


class _StandIn(ModuleType):
    """A module that has not been imported, with some of its names; who asks for others gets the real one."""

    def __init__(self, name: str, known: dict[str, object]) -> None:
        super().__init__(name)
        vars(self).update(known)
        package, _, own = name.rpartition(".")
        self.__owner = vars(sys.modules[package]) if package else {}
        self.__path__ = [os.path.join(path, own) for path in self.__owner.get("__path__", ())]
        sys.modules[name] = self.__owner[own] = self

    def leave(self) -> None:
        """Let the real one be imported from now on."""
        if sys.modules.get(self.__name__) is self:
            del sys.modules[self.__name__], self.__owner[self.__name__.rpartition(".")[2]]

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        self.leave()
        return getattr(import_module(self.__name__), name)


def _rounded_again(model_spec: "ModelSpec", plan: "Plan") -> list[str]:
    from griffin_offload.formats.base import of_copies

    stored = model_spec.checkpoint.precision
    used = [name for name, count in plan.tiers.items() if count]
    held = next((copy.name for copy in of_copies() if {*used} <= {format.name for format in copy.holds}), None)
    if stored.is_plain and len(used) > 1 and model_spec.shape_of(plan).by_layer:
        once = f"convert --quantize {held} does it once" if held else "layers of a copy are of one format"
        return [f"rounded whenever it is loaded: {once}"]
    if stored.is_plain or model_spec.request.verifies or not model_spec.quantises(plan):
        return []
    if len(used) > 1 and held is None:
        return [f"{', '.join(used[1:])}: rounded a second time, from {stored}; the original is nearer to it"]
    better = used[0] if len(used) == 1 else held
    return [f"rounded a second time, from {stored}: convert --quantize {better} of the original is nearer to it"]


def _instead_of(model_spec: "ModelSpec", chosen: "Plan", preferred: str) -> list[str]:
    """What a preference for speed costs, against the best that fits."""
    from griffin_offload.planner.solve import solve
    from griffin_offload.planner.tiers import expected_error, expected_kl, is_quantised

    if preferred != "speed" or not chosen.fits:
        return []
    better, _ = solve((*model_spec.others, *model_spec.shapes), model_spec.request)
    if better.in_words == chosen.in_words:
        return ["for speed: no more bits would fit"]
    costs = []
    for plan in (chosen, better):
        shape = model_spec.shape_of(plan)
        error = expected_error(shape, plan.counts)
        costs.append("?" if error is None else f"{expected_kl(error, quantised=is_quantised(shape)):g}")
    return [
        f"for speed: {chosen.decoded_bytes / better.decoded_bytes:.2f} of the bytes a token that {better.in_words} "
        f"reads, which fits; expected KL about {costs[0]} instead of {costs[1]}"
    ]


def _forecast(model_spec: "ModelSpec", plan: "Plan") -> "ExpertForecast | None":
    """None where there are no experts."""
    from griffin_offload.planner.experts import forecast

    if plan.experts is None:
        return None
    return forecast(model_spec.shape_of(plan), plan, model_spec.stored_expert_share)


def _forecast_lines(expected: "ExpertForecast | None") -> list[str]:
    if expected is None:
        return []
    numbers = (expected.parameters, expected.active_parameters, expected.resident_parameters)
    total, active, resident = (f"{number / 1e9:.3g}" for number in numbers)
    lines = [f"{total} billion parameters, {active} for a token, {resident} resident"]
    if expected.expected_hit_rate < 1:
        fetched = f"{format_bytes(round(expected.fetched_bytes_per_token))} fetched"
        if expected.host_bytes_per_token:
            fetched = f"{format_bytes(round(expected.host_bytes_per_token))} multiplied by the CPU"
        lines.append(
            f"expected: {expected.expected_hit_rate:.0%} of what tokens are sent to is resident, {fetched} for "
            f"each token (assumed: routing by Zipf's law, exponent {expected.assumed_skew}, the most used resident)"
        )
    return lines


def _examined(arguments: argparse.Namespace) -> "ModelSpec":
    from griffin_offload.checkpoint.registry import read_config
    from griffin_offload.engine.spec import examine, examine_checkpoint

    config = LoadConfig(**load_options(arguments))
    if arguments.config is None:
        return examine(model_of(arguments), config, anywhere=True)
    if arguments.model not in (None, os.environ.get(MODEL_VARIABLE)):
        raise UsageError("--config plans without a model: give one of --config and --model")
    if arguments.adapter is not None:
        raise UsageError("--adapter is merged into weights, and --config has none: give --model")
    return examine_checkpoint(read_config(arguments.config), config, anywhere=True)


def plan_lines(plan: "Plan") -> list[str]:
    """The table of bytes for people."""
    quantised = {name for name, size in plan.plain_parts.items() if plan.decode_parts[name] != size}
    rows = [
        (name.replace("_", " "), plan.prefill_parts[name], plan.decode_parts[name], plan.plain_parts.get(name, 0))
        for name in plan.prefill_parts
        if plan.prefill_parts[name] or plan.decode_parts[name]
    ]
    rows.append(("peak", plan.peak_prefill_bytes, plan.peak_decode_bytes, 0))
    lines = [f"{'':<14}{'prefill':>12}{'decode':>12}" + (f"{'in 16 bit':>12}" if quantised else "")]
    lines += [
        f"{name:<14}{format_bytes(a):>12}{format_bytes(b):>12}"
        + (f"{format_bytes(c):>12}" if name.replace(" ", "_") in quantised else "")
        for name, a, b, c in rows
    ]
    lines.append(f"{'budget':<14}{format_bytes(plan.budget_bytes):>12}{format_bytes(plan.budget_bytes):>12}")
    kept = f"density {plan.density:.2f}" if plan.streamed else "all neurons resident, nothing streamed"
    if plan.streamed and plan.experts:
        kept = f"{plan.experts[0]} of {plan.experts[1]} experts a layer"
    lines.append(
        f"{kept}, {plan.in_words}, context {plan.context_tokens} tokens (prompt {plan.prompt_tokens}, "
        f"{plan.kv_bits}-bit KV cache), embeddings on the {plan.embeddings}"
    )
    if plan.streamed:
        streamed = f"{format_bytes(plan.streamed_bytes)} of {format_bytes(plan.full_bytes)} once per prompt"
        through = f"through {plan.slots} slot{'s' if plan.slots != 1 else ''}"
        lines.append(f"streams at most {streamed}" if plan.experts else f"streams {streamed} {through}")
    if plan.host_bytes:
        lines.append(f"the CPU computes missing experts, in at most {format_bytes(plan.host_bytes)} beside the files")
    return lines


def _alternatives(model_spec: "ModelSpec", chosen: "Plan") -> list[dict[str, Any]]:
    """The chosen plan, and every precision, dense and with the largest density, that fits at the same context."""
    from griffin_offload.evaluation.ceilings import decode_bytes_per_s
    from griffin_offload.planner.solve import alternatives
    from griffin_offload.planner.tiers import bits_of, expected_error, expected_kl, is_quantised

    shapes = [*model_spec.shapes, *model_spec.others]
    hidden, neurons = shapes[0].hidden_size, shapes[0].width or shapes[0].hidden_size
    plans = alternatives(shapes, model_spec.request, chosen.context_tokens)
    key = operator.attrgetter("precision", "as_held", "counts")
    if chosen.fits and key(chosen) not in map(key, plans):
        plans = [chosen, *plans]  # a density that was asked for
    rows = []
    for plan in plans:
        precision = model_spec.precision_of(plan)
        rate = None  # of a device that is not here
        if model_spec.assumed is None:
            rate = decode_bytes_per_s(precision, hidden, neurons, model_spec.dtype, model_spec.hardware)
        expected = _forecast(model_spec, plan)
        weights = plan.decoded_bytes if expected is None else expected.read_bytes_per_token
        if expected is not None and expected.expected_hit_rate < 1:
            rate = None  # the disk decides, which nobody has asked
        read_bytes = weights + plan.decode_parts["kv_cache"]
        # In exact mode the answer is the full model's, whatever drafts.
        verifies, shape = model_spec.request.verifies, model_spec.shape_of(plan)
        error, quantised = expected_error(shape, plan.counts), is_quantised(shape)
        if verifies:
            error, quantised = 0.0, False
        rows.append(
            {
                "precision": plan.precision,
                "as_held": plan.as_held,
                "density": plan.density,
                "tiers": plan.tiers,
                "bits": bits_of(shape, plan.counts) if plan.tiers else None,
                "expected_error": error,
                "expected_kl": None if error is None else expected_kl(error, quantised=quantised),
                "resident_bytes": plan.resident_bytes,
                "peak_bytes": plan.peak_bytes,
                "expected_tokens_per_s": None if rate is None else rate / read_bytes,
                "chosen": key(plan) == key(chosen),
            }
        )
    return rows


def _formats(row: dict[str, Any]) -> str:
    """Those that neurons rest in."""
    whole = f"{row['precision']} and more" if row["as_held"] else str(row["precision"])
    return "+".join(name for name, count in row["tiers"].items() if count) or whole


def _alternative_lines(rows: list[dict[str, Any]]) -> list[str]:
    if not rows:
        return ["nothing fits in any precision"]
    known = any(row["expected_tokens_per_s"] is not None for row in rows)
    rates = " (tokens/s: the GEMV rate, best of trials just now, over the bytes one token reads, context full)"
    lines = [
        f"what fits{rates if known else ''}",
        "(error: of FFs, squared, relative; KL: about what that and attention and head in as few bits make of small "
        "models' answers; large ones lose less)",
        f"{'':<2}{'precision':<16}{'density':>8}{'error':>8}{'KL':>7}{'resident':>12}{'peak':>12}{'tokens/s':>10}",
    ]
    for row in rows:
        rate, error, kl = row["expected_tokens_per_s"], row["expected_error"], row["expected_kl"]
        lines.append(
            f"{'*' if row['chosen'] else '':<2}{_formats(row):<16}{row['density']:>8.2f}"
            f"{'?' if error is None else f'{error:.4f}':>8}{'?' if kl is None else f'{kl:.1g}':>7}"
            f"{format_bytes(row['resident_bytes']):>12}{format_bytes(row['peak_bytes']):>12}"
            f"{'?' if rate is None else f'{rate:.3g}':>10}"
        )
    return lines
