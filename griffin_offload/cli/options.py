"""Flags that several commands share, and how they become a `LoadConfig`."""

import argparse
import os
from typing import Any, get_args

from griffin_offload.config import (
    FLOOR_AUTO_CTX,
    MAX_AUTO_CTX,
    Device,
    DType,
    KVBits,
    LoadConfig,
    Offload,
    Quantize,
    SelectionMethod,
)
from griffin_offload.demo import demo_directory
from griffin_offload.errors import UsageError

MODEL_VARIABLE = "GRIFFIN_OFFLOAD_MODEL"
_DEFAULTS = LoadConfig()


def add_model_option(parser: argparse.ArgumentParser) -> None:
    """The model, and what every command has."""
    parser.add_argument(
        "-m",
        "--model",
        default=os.environ.get(MODEL_VARIABLE) or None,
        help=f"checkpoint directory or hub id (default: ${MODEL_VARIABLE}, else the embedded demo)",
    )
    parser.add_argument("--offline", action="store_true", help="never ask the hub")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of text")


def add_memory_options(parser: argparse.ArgumentParser) -> "argparse._ArgumentGroup":
    """The budget, where the weights rest and how they are computed with; the group, for more of its kind."""
    group = parser.add_argument_group("memory")
    add = group.add_argument
    add("--max-gpu-mem", "--max-mem", default=_DEFAULTS.max_gpu_mem, metavar="SIZE", help=_SIZES)
    add("--max-cpu-mem", metavar="SIZE", help="host memory for offloaded weights, when the device is not the CPU")
    add("--device", choices=get_args(Device), default=_DEFAULTS.device, help="where the model computes")
    add("--offload", choices=get_args(Offload), default=_DEFAULTS.offload, help="where the full weights rest")
    add("--dtype", choices=get_args(DType), default=_DEFAULTS.dtype, help="precision of the computation")
    return group


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """What a plan depends on: the model, the budget, the density, under the names of `LoadConfig`."""
    add_model_option(parser)
    add = add_memory_options(parser).add_argument
    add("--ctx-size", type=int, metavar="TOKENS", help=_CONTEXT)
    add("--kv-bits", type=int, choices=get_args(KVBits), default=_DEFAULTS.kv_bits, help="precision of the KV cache")
    add(
        "--density",
        default=_DEFAULTS.density,
        help="fraction of FF neurons kept: auto, 0.5, or one per layer (0.5,0.7)",
    )
    add(
        "--quantize",
        choices=get_args(Quantize),
        default=_DEFAULTS.quantize,
        help=f"precision of what stays on the device (default: {_DEFAULTS.quantize}, the first with room for all "
        "neurons, else the last)",
    )
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
        "--refresh",
        type=_refresh,
        default=_DEFAULTS.refresh,
        metavar="turn|never|N",
        help="choose neurons with every prompt, the first alone, or by a streamed pass after every N tokens, too",
    )


def add_run_options(parser: argparse.ArgumentParser) -> None:
    """What only matters when a model computes."""
    add = parser.add_argument_group("method").add_argument
    add("--selection", choices=get_args(SelectionMethod), default=_DEFAULTS.selection, help="how neurons are chosen")
    add("--seed", type=int, default=_DEFAULTS.seed, help="seed of sampling, of tokens and of neurons")
    add("--threads", type=int, metavar="N", help="threads that compute on the CPU (default: by a short trial)")
    loudness = parser.add_mutually_exclusive_group()
    loudness.add_argument("-v", "--verbose", action="store_true", help="the plan, too")
    loudness.add_argument("-q", "--quiet", action="store_true", help="the text alone")


def _refresh(text: str) -> str | int:
    return int(text) if text.isdecimal() else text


_CONTEXT = (
    "context that memory is kept for (default: run: prompt and answer; else "
    f"{FLOOR_AUTO_CTX}, and up to {MAX_AUTO_CTX} with what is left over)"
)
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
