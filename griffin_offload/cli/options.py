"""Flags that several commands share, and how they become a `LoadConfig`."""

import argparse
import gc
import math
import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol, get_args

from griffin_offload.config import (
    DEVICE_NAMES,
    FLOOR_AUTO_CTX,
    FORMAT_NAMES,
    LAYERS,
    MAX_AUTO_CTX,
    MIXED,
    TIERS,
    AskedKVBits,
    DType,
    LoadConfig,
    MissingExperts,
    Offload,
    Preference,
    SelectionMethod,
)
from griffin_offload.demo import demo_directory
from griffin_offload.errors import UsageError

AddOption = Callable[..., argparse.Action]
"""`add_argument` of a parser or of a group."""


class Commands(Protocol):
    """What a command adds its parser to."""

    def add_parser(self, name: str, **settings: Any) -> argparse.ArgumentParser: ...


# The imports that a command waits for: torch, transformers and what of ours stands on them.


_MODEL = "griffin_offload.engine.model"
NOT_NEEDED = ("scipy",)
"""What transformers imports where it is installed, for the losses of vision models: a tenth of its imports."""


@contextmanager
def heavy_imports(hidden: Sequence[str] = NOT_NEEDED) -> Iterator[None]:
    """Imports inside this are made without the collector of cycles, which never looks at what they leave.

    They make half a million objects that stay until the end. Going through them again and again was a sixth of the time
    to the first word; later, each full collection would pause an answer for them, and the one at exit the shell.

    Packages that are `hidden` are left out, as if they were not installed.
    """
    if _MODEL in sys.modules or not gc.isenabled():
        # A process that knows the model may hold some, and those have to be collected when they are given up.
        yield
        return
    gc.disable()
    try:
        with _hidden(hidden), _listed_once():
            yield
    finally:
        gc.freeze()
        gc.enable()


@contextmanager
def _listed_once() -> Iterator[None]:
    """transformers reads the files of all its models to list what is in them when it is imported, and does so again for
    its package `models`, which it calls by another name: a ninth of what `plan` takes. The first list serves both."""
    import_utils = import_module("transformers.utils.import_utils")
    stock = getattr(import_utils, "create_import_structure_from_path", None)
    if stock is None or "transformers.models" in sys.modules:
        yield
        return
    place = Path(import_utils.__file__ or "").parents[1] / "models"
    vars(import_utils)["create_import_structure_from_path"] = lambda path: stock(
        place if Path(path) == place / "__init__.py" else path
    )
    try:
        yield
    finally:
        vars(import_utils)["create_import_structure_from_path"] = stock


@contextmanager
def _hidden(names: Sequence[str]) -> Iterator[None]:
    """Packages that nobody has imported yet are as if they were not installed; afterwards they can be imported.

    Not where transformers is there already: it asks once what is installed, and would import what it was told of."""
    hidden = {name: None for name in names if name not in sys.modules and "transformers" not in sys.modules}
    sys.modules.update(hidden)  # type: ignore[arg-type]  # None is Python's own sign for it
    try:
        yield
    finally:
        for name in hidden:
            del sys.modules[name]


# What run and chat share: how tokens are drawn, and the bar of a prompt's layers.


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


MODEL_VARIABLE = "GRIFFIN_OFFLOAD_MODEL"
_DEFAULTS = LoadConfig()


ONE_OBJECT = "print one JSON object instead of text"
LEFT_OVER = f"{FLOOR_AUTO_CTX}, and up to {MAX_AUTO_CTX} with what is left over"
"""The context of a command that knows no prompt yet."""


def add_model_option(parser: argparse.ArgumentParser, json: str = ONE_OBJECT) -> None:
    """The model, and what every command has; `json` says what is printed as such."""
    parser.add_argument(
        "-m",
        "--model",
        default=os.environ.get(MODEL_VARIABLE) or None,
        help=f"checkpoint directory, GGUF file or hub id (default: ${MODEL_VARIABLE}, else the embedded demo)",
    )
    parser.add_argument("--offline", action="store_true", help="never ask the hub")
    parser.add_argument("--json", action="store_true", help=json)


def add_adapter_option(parser: argparse.ArgumentParser) -> None:
    """A LoRA adapter."""
    parser.add_argument("--adapter", metavar="DIR", help="LoRA adapter (peft) to merge into the weights as they pass")


def add_memory_options(parser: argparse.ArgumentParser) -> "argparse._ArgumentGroup":
    """The budget, where the weights rest and how they are computed with; the group, for more of its kind."""
    group = parser.add_argument_group("memory")
    add = group.add_argument
    add("--max-gpu-mem", "--max-mem", default=_DEFAULTS.max_gpu_mem, metavar="SIZE", help=_SIZES)
    add("--max-cpu-mem", metavar="SIZE", help="host memory for offloaded weights, when the device is not the CPU")
    add("--device", choices=DEVICE_NAMES, default=_DEFAULTS.device, help="where the model computes")
    add("--offload", choices=get_args(Offload), default=_DEFAULTS.offload, help="where the full weights rest")
    add("--dtype", choices=get_args(DType), default=_DEFAULTS.dtype, help="precision of the computation")
    return group


def add_model_options(parser: argparse.ArgumentParser, context: str = LEFT_OVER, json: str = ONE_OBJECT) -> None:
    """What a plan depends on: the model, the budget, the density, under the names of `LoadConfig`; `context` says which
    one is planned where none is named."""
    add_model_option(parser, json)
    add_adapter_option(parser)
    add = add_memory_options(parser).add_argument
    add("--ctx-size", type=int, metavar="TOKENS", help=f"context that memory is kept for (default: {context})")
    add("--kv-bits", type=_number_or_word, choices=get_args(AskedKVBits), default=_DEFAULTS.kv_bits, help=_KV_BITS)
    kept = "fraction of FF neurons kept: auto, 0.5, or one per layer (0.5,0.7)"
    add("--density", default=_DEFAULTS.density, help=kept)
    _add_precision_options(add)
    add_missing_experts_option(add)
    add = parser.add_argument_group("exactness").add_argument
    add(
        "--exact",
        action="store_true",
        help="the full model's own answer: the pruned one drafts, streamed passes verify",
    )
    add(
        "--draft-tokens",
        type=int,
        metavar="N",
        help="drafts per verifying pass (default: by what is accepted and costs)",
    )
    add(
        "--lookup",
        action=argparse.BooleanOptionalAction,
        default=_DEFAULTS.lookup,
        help="draft from the text itself where it repeats, if measured seconds say that it pays",
    )
    add(
        "--refresh",
        type=_refresh,
        default=_DEFAULTS.refresh,
        metavar="turn|never|N",
        help="choose neurons with every prompt, the first alone, or by a streamed pass after every N tokens, too",
    )


def _add_precision_options(add: Callable[..., Any]) -> None:
    """In how many bits neurons stay on the device."""
    add(
        "--quantize",
        choices=("auto", *FORMAT_NAMES, *MIXED),
        default=_DEFAULTS.quantize,
        help=f"precision of what stays on the device (default: {_DEFAULTS.quantize}, the first with room for all "
        f"neurons, of files in four bits int4; else {LAYERS} of fewer bits or {TIERS}: the prompt's neurons in more "
        "bits than the others)",
    )
    add(
        "--prefer",
        choices=get_args(Preference),
        default=_DEFAULTS.prefer,
        help="the most bits that fit, or the fewest in which no neuron is left out, int4, where more would fit, too "
        f"(default: {_DEFAULTS.prefer})",
    )
    add_bits_option(add)


def add_missing_experts_option(add: Callable[..., Any]) -> None:
    """What becomes of a token that is sent to an expert that is not on the device."""
    add(
        "--missing-experts",
        choices=get_args(MissingExperts),
        default=_DEFAULTS.missing_experts,
        help="mixtures of experts: read a missing one, send tokens to those that are there, or have the CPU compute it",
    )


def add_bits_option(add: Callable[..., Any], default: float | str | None = _DEFAULTS.bits) -> None:
    """How many they are together; `default` where none are named."""
    add(
        "--bits",
        type=_bits,
        default=default,
        metavar="auto|N",
        help=f"with --quantize {TIERS} or {LAYERS}: bits per weight of the FFs, such as 3.5 "
        f"(default: {_DEFAULTS.bits}, what fits)",
    )


def add_run_options(
    parser: argparse.ArgumentParser, verbose: str | None = "the plan, too", quiet: str = "the text alone"
) -> None:
    """What only matters when a model computes; `verbose` (None: no such flag) and `quiet` say what is shown."""
    add = parser.add_argument_group("method").add_argument
    add("--selection", choices=get_args(SelectionMethod), default=_DEFAULTS.selection, help="how neurons are chosen")
    add("--seed", type=int, default=_DEFAULTS.seed, help="seed of sampling, of tokens and of neurons")
    add("--threads", type=int, metavar="N", help="threads that compute on the CPU (default: by a short trial)")
    loudness = parser.add_mutually_exclusive_group()
    if verbose is not None:
        loudness.add_argument("-v", "--verbose", action="store_true", help=verbose)
    loudness.add_argument("-q", "--quiet", action="store_true", help=quiet)


def _number_or_word(text: str) -> str | int:
    return int(text) if text.isascii() and text.isdigit() else text


def _bits(text: str) -> str | float:
    try:
        return text if text == "auto" else float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of bits: auto, or for example 3.5") from None


def _refresh(text: str) -> str | int:
    return int(text) if text.isdecimal() else text


_KV_BITS = "bits of the KV cache (default: auto, 8 where 16 would cost weights bits or neurons; 4 by name alone)"
_SIZES = f"device budget: 12GB, 12G, 12GiB, 80%% or auto (default: {_DEFAULTS.max_gpu_mem})"


def model_of(arguments: argparse.Namespace) -> str:
    """The model that was asked for, or the demo."""
    return str(demo_directory()) if arguments.model is None else arguments.model


def quiet_libraries() -> None:
    """Advice that transformers logs is for authors of Python files; what concerns users is said by us."""
    from transformers.utils import logging

    logging.set_verbosity_error()


def load_options(arguments: argparse.Namespace) -> dict[str, Any]:
    """Keyword arguments for `LoadConfig`."""
    given = {name: getattr(arguments, name) for name in LoadConfig.__dataclass_fields__ if hasattr(arguments, name)}
    return given | {"density": parse_density(arguments.density)}


def parse_density(text: str) -> Any:
    """ "auto", a number, or numbers separated by commas; UsageError for anything else."""
    if text == "auto":
        return text
    try:
        values = [float(part) for part in text.split(",")]
    except ValueError:
        raise UsageError(f"cannot read the density {text!r}: auto, 0.5, or one number per layer (0.5,0.7)") from None
    return values if "," in text else values[0]


# What serve and batch share.


# On CPUs oneDNN and torch's layer over it keep compiled kernels for every length of a prompt, 1024 of them each: 1.5 MB
# for every new length, up to some 200 MB. A layer has fewer than this many.
_KERNELS = {"ONEDNN_PRIMITIVE_CACHE_CAPACITY": "32", "LRU_CACHE_CAPACITY": "32"}


def prepare_serving(command: str) -> None:
    """What a process needs before torch is loaded if it answers many requests; UsageError where the extra lacks."""
    try:
        import prometheus_client  # noqa: F401
        import starlette  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as error:
        raise UsageError(f"{command} needs {error.name}: pip install 'griffin-offload[serve]'") from error
    for name, value in _KERNELS.items():
        os.environ.setdefault(name, value)  # read when torch is loaded
    quiet_libraries()
