"""What run and chat share: how tokens are drawn, and the bar of a prompt's layers."""

import argparse
import math
from typing import TYPE_CHECKING, Any

from griffin_offload.config import RunConfig
from griffin_offload.errors import UsageError

if TYPE_CHECKING:
    from griffin_offload.runtime.model import GriffinModel

_DEFAULTS = RunConfig()


def add_generation_options(parser: argparse.ArgumentParser) -> None:
    """How long an answer may be, and how its tokens are drawn."""
    add = parser.add_argument_group("generation").add_argument
    add("-n", "--max-new-tokens", type=int, default=_DEFAULTS.max_new_tokens, metavar="N")
    add("--temperature", type=float, help="0 is greedy (default: the checkpoint's generation config)")
    add("--top-p", type=float)
    add("--top-k", type=int)


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
    if arguments.temperature == 0:
        if arguments.top_p is not None or arguments.top_k is not None:
            raise UsageError("--temperature 0 is greedy: --top-p and --top-k would do nothing")
        return {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
    names = ("temperature", "top_p", "top_k")
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
