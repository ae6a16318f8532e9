"""Checkpoints of other kinds, refused by the name that people know them by, with what to do instead."""

from pathlib import Path
from typing import Any, NoReturn

from transformers import PretrainedConfig
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)

from griffin_offload.errors import UnsupportedModel

_READ = "FP8, compressed-tensors, modelopt, GPTQ, AWQ and bitsandbytes"
_ORIGINAL = "take the checkpoint it was made from, and --quantize int8 or int4"
# As the headers of safetensors files name the numbers in them.
_WORDS = {"F8_E4M3": "FP8", "F8_E5M2": "FP8", "F4": "FP4", "I8": "8-bit integers", "U8": "packed bytes"}
_WORDS |= {"I32": "packed integers", "I64": "integers", "U32": "packed integers"}


def check_numbers(where: Path, stored: str | None) -> None:
    """UnsupportedModel for a checkpoint that others quantised without saying how: `stored` is the kind of its numbers
    where that is no float that is loaded."""
    if stored is not None:
        words = f"{_WORDS[stored]}, " if stored in _WORDS else ""
        raise UnsupportedModel(
            f"{where} is quantised ({words}{stored}), and its config.json does not say how (quantization_config): "
            f"{_ORIGINAL}"
        )


def refuse_quantised(where: Path, said: dict[str, Any], why: str | None = None) -> NoReturn:
    """UnsupportedModel for a checkpoint that was quantised as its config `said`, which is not read."""
    words = f": {why}" if why else f", which is not read here ({_READ} are)"
    raise UnsupportedModel(f"{where} is quantised by {_method(said)}{words}; {_ORIGINAL}")


def _method(said: dict[str, Any]) -> str:
    """The name of a method of quantisation with its bits, from what config.json says."""
    bits = next((f"{n} bit" for n in (4, 8) if said.get(f"load_in_{n}bit") or said.get(f"_load_in_{n}bit")), None)
    unnamed = "bitsandbytes" if bits else "a method that its config.json does not name"
    name = str(said.get("quant_method") or unnamed)[:60]
    number = said.get("bits", said.get("w_bit"))
    more = (said.get(key) for key in ("format", "fmt", "quant_algo"))
    details = (bits or (f"{number} bit" if number else None), *more)
    known = ", ".join(str(detail)[:40] for detail in details if detail)
    return f"{name} ({known})" if known else name


def check_kind(config: PretrainedConfig, where: Path) -> None:
    """UnsupportedModel for what is no causal language model."""
    kind = config.model_type
    if getattr(config, "is_encoder_decoder", False):
        raise UnsupportedModel(
            f"{where} is of an encoder-decoder model ({kind}): only models that are a decoder alone are loaded"
        )
    if kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        return
    if kind in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES:
        raise UnsupportedModel(
            f"{where} is of a vision-language model ({kind}), whose language model is "
            f"{config.get_text_config().model_type}: only text models are loaded, take one without a vision tower"
        )
    raise UnsupportedModel(f"{where} is of a {kind} model, which transformers knows no causal language model of")


def refuse_what_is_no_checkpoint(directory: Path) -> None:
    """UnsupportedModel for a directory without config.json in which something else that is known lies."""
    if (directory / "adapter_config.json").is_file():
        raise UnsupportedModel(
            f"{directory} holds an adapter (PEFT), no whole model: give its base model, and this directory as --adapter"
        )
    if (directory / "params.json").is_file():
        raise UnsupportedModel(
            f"{directory} holds weights in their maker's own layout (params.json): take the model's version for "
            "transformers"
        )
    inside = [*directory.glob("*/config.json"), *directory.glob("snapshots/*/config.json")]  # as in the hub's cache
    found = sorted(path.parent for path in inside if path.is_file())
    if found:
        raise UnsupportedModel(f"{directory} has no config.json, {found[0]} has one: give that directory")
