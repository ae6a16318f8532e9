"""What run and chat share: how tokens are drawn, and the bar of a prompt's layers."""

import argparse
import math
import re
from typing import TYPE_CHECKING, Any

from griffin_offload.errors import UsageError

if TYPE_CHECKING:
    from griffin_offload.runtime.model import GriffinModel

_GIVEN = "(default: the checkpoint's generation config)"
_ESCAPES = {"n": "\n", "t": "\t", "\\": "\\"}
_ESCAPE = re.compile(r"\\([nt\\])")
_SAMPLING = ("top_p", "top_k", "min_p")


def add_generation_options(parser: argparse.ArgumentParser, max_new_tokens: int) -> None:
    """How long an answer may be, how it ends, and how its tokens are drawn."""
    add = parser.add_argument_group("generation").add_argument
    add(
        "-n",
        "--max-new-tokens",
        type=int,
        default=max_new_tokens,
        metavar="N",
        help=f"most tokens of an answer (default: {max_new_tokens})",
    )
    add(
        "--stop",
        action="append",
        metavar="TEXT",
        help="the answer ends in front of this text (\\n is a line's end, \\t a tab); repeatable",
    )
    add("--temperature", type=float, metavar="T", help=f"0 is greedy {_GIVEN}")
    add("--top-p", type=float, metavar="P", help=f"of the likeliest tokens that hold this share {_GIVEN}")
    add("--top-k", type=int, metavar="K", help=f"of the so many likeliest tokens {_GIVEN}")
    add("--min-p", type=float, metavar="P", help=f"of tokens with this share of the likeliest one's {_GIVEN}")
    add("--repetition-penalty", type=float, metavar="X", help=f"above 1: tokens that were there are rarer {_GIVEN}")
    add(
        "--thinking",
        action=argparse.BooleanOptionalAction,
        help="turn thinking on or off, where the chat template has a switch for it (default: the template's)",
    )


def thinking_flag(thinking: bool | None) -> str:
    """The flag that was given."""
    return "--thinking" if thinking else "--no-thinking"


def stops_of(arguments: argparse.Namespace) -> tuple[str, ...]:
    """Stop strings; UsageError for an empty one."""
    stops = tuple(_ESCAPE.sub(lambda found: _ESCAPES[found[1]], text) for text in arguments.stop or ())
    for stop in stops:
        if not stop:
            raise UsageError("--stop is empty: give the text in front of which an answer ends")
        check_utf8(stop, "--stop")
    return stops


def cut_note(tokens: int) -> str:
    """What is said of an answer that ended for want of tokens."""
    return f"the answer was cut at its limit of {tokens} tokens: -n N allows more"


def sampling_of(arguments: argparse.Namespace) -> dict[str, Any]:
    """Arguments of `generate` that say how tokens are drawn; UsageError for values that cannot be used."""
    if arguments.max_new_tokens < 1:
        raise UsageError(f"--max-new-tokens is {arguments.max_new_tokens}: at least 1")
    if arguments.temperature is not None and not 0 <= arguments.temperature < math.inf:
        raise UsageError(f"--temperature is {arguments.temperature}: 0 (greedy) or more")
    if arguments.top_p is not None and not 0 < arguments.top_p <= 1:
        raise UsageError(f"--top-p is {arguments.top_p}: more than 0 and at most 1")
    if arguments.top_k is not None and arguments.top_k < 1:
        raise UsageError(f"--top-k is {arguments.top_k}: at least 1")
    if arguments.min_p is not None and not 0 <= arguments.min_p <= 1:
        raise UsageError(f"--min-p is {arguments.min_p}: from 0 to 1")
    penalty = arguments.repetition_penalty
    if penalty is not None and not 0 < penalty < math.inf:
        raise UsageError(f"--repetition-penalty is {penalty}: more than 0, and 1 is none")
    return _drawn(arguments) | ({} if penalty is None else {"repetition_penalty": penalty})


def _drawn(arguments: argparse.Namespace) -> dict[str, Any]:
    """Greedy, sampled by what was given, or as the checkpoint says."""
    if arguments.temperature == 0:
        if any(getattr(arguments, name) is not None for name in _SAMPLING):
            raise UsageError("--temperature 0 is greedy: --top-p, --top-k and --min-p would do nothing")
        return {"do_sample": False, "temperature": None, **dict.fromkeys(_SAMPLING)}
    names = ("temperature", *_SAMPLING)
    given = {name: getattr(arguments, name) for name in names if getattr(arguments, name) is not None}
    return given | ({"do_sample": True} if given else {})


def check_utf8(text: str, name: str) -> None:
    """UsageError for bytes that are not UTF-8: Python lets them through as lone surrogates, tokenizers do not."""
    if not text.isprintable() and any("\ud800" <= letter <= "\udfff" for letter in text):
        raise UsageError(f"{name} is not UTF-8")


class PrefillBar:
    """A bar of prefill's layers on stderr, if that is a terminal."""

    def __init__(self, model: "GriffinModel", *, quiet: bool) -> None:
        from tqdm import tqdm

        layers = len(model.plan.kept)
        self._bar = tqdm(total=layers, desc="prefill", unit="layer", leave=False, disable=quiet or None)
        model.progress = self._step

    def _step(self, done: int, layers: int) -> None:
        self._bar.update(done - self._bar.n)
        if done == layers:
            self._bar.close()

    def __enter__(self) -> None:
        pass

    def __exit__(self, *_: object) -> None:
        self._bar.close()
