"""config.json: what it counts and what it asks for is checked before transformers makes lists and modules of it.

Checkpoints of other kinds are refused by the name that people know them by, with what to do instead.
"""

import copy
import json
import math
import re
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import torch
from transformers import AutoConfig, GenerationConfig, PretrainedConfig
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)

from griffin_offload.checkpoint.files import check_content
from griffin_offload.errors import CheckpointError, UnsupportedModel, one_line, unreadable
from griffin_offload.transformers_api import StockModel
from griffin_offload.units import format_bytes

# JSON that a stranger wrote: of bounded size, an object, or a named error.


def read_object(path: Path, most_bytes: int) -> dict[str, Any]:
    """The object in `path`; CheckpointError for anything else, and for a file of more than `most_bytes`."""
    check_content(path)
    try:
        with path.open("rb") as file:
            content = file.read(most_bytes + 1)
        if len(content) > most_bytes:
            raise CheckpointError(f"{path} is larger than {format_bytes(most_bytes)}: no such file needs to be")
        found = json.loads(content)
    except OSError as error:
        raise CheckpointError(unreadable(path, error)) from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be read: {one_line(error)}") from error
    if not isinstance(found, dict):
        raise CheckpointError(f"{path} cannot be read: it holds a {type(found).__name__}, not an object")
    return found


def is_there(path: Path) -> bool:
    """Whether it is a file; CheckpointError where this user may not know."""
    try:
        return path.is_file()
    except OSError as error:
        raise CheckpointError(unreadable(path, error)) from error


MAX_LAYERS = 1024
"""Far above any model there is; every one costs milliseconds before anything is known to fit."""
_MAX_LABELS = 100_000
_MAX_SIZE = 2**40
MOST_CONFIG_BYTES = 16_000_000
_LAYER_COUNT = re.compile(r"layers?$|^depth$")
# Others are packages, or repositories of compiled code that transformers would download and run.
_IMPLEMENTATIONS = (None, "eager", "sdpa")
_COUNTED = ("sliding_window", "factor")  # by which libraries count tokens: infinity and 2**63 they cannot
_SIZES = (
    "hidden_size",
    "vocab_size",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "max_position_embeddings",
    "num_hidden_layers",
)


def load_config(file: Path) -> PretrainedConfig:
    """The config in `file`; CheckpointError for one that transformers cannot use, or that would cost it the machine,
    UnsupportedModel for what is no causal language model."""
    read = partial(AutoConfig.from_pretrained, file, local_files_only=True, trust_remote_code=False)
    return _checked(read_object(file, MOST_CONFIG_BYTES), read, file)


def config_from(raw: dict[str, object], file: Path) -> PretrainedConfig:
    """The same of what a config.json would say, which `file` says in other words."""
    settings = {key: value for key, value in raw.items() if key != "model_type"}
    return _checked(raw, partial(AutoConfig.for_model, raw["model_type"], **settings), file)


def _checked(raw: dict[str, object], read: Callable[[], PretrainedConfig], file: Path) -> PretrainedConfig:
    for key, value in _entries(raw):
        _check_entry(key, value, file)
    try:
        config = read()
        check_kind(config, file)
        text = config.get_text_config()
        sizes = {name: _values(text, name) for name in _SIZES}
    except UnsupportedModel:
        raise
    except Exception as error:  # each architecture validates its config in its own way
        raise CheckpointError(f"{file} cannot be used: {one_line(error)}") from error
    for name, values in sizes.items():
        for value in values:
            _check_size(name, value, file)
    return config


def _values(config: PretrainedConfig, name: str) -> list[Any]:
    """What the config says `name` is; of each layer, where layers differ: transformers raises an error of its own for
    the model's value then."""
    try:
        return [getattr(config, name, None)]
    except RuntimeError:
        return [getattr(layer, name, None) for layer in config.per_layer_config]


def _entries(raw: dict[str, object]) -> Iterator[tuple[str, Any]]:
    """Every key with its value, those inside included."""
    waiting: list[Any] = [raw]
    while waiting:
        value = waiting.pop()
        if isinstance(value, dict):
            yield from value.items()
            waiting += value.values()
        elif isinstance(value, list):
            waiting += value


def _check_entry(key: str, value: object, file: Path) -> None:
    most = MAX_LAYERS if _LAYER_COUNT.search(key) else _MAX_LABELS if key == "num_labels" else None
    if most is not None and isinstance(value, int | float) and not value <= most:
        raise CheckpointError(f"{file} says {key} is {value}: at most {most} are supported")
    if key in _COUNTED and isinstance(value, int | float) and not value <= _MAX_SIZE:
        raise CheckpointError(f"{file} says {key} is {value}: at most {_MAX_SIZE} is supported")
    if key.endswith(("attn_implementation", "experts_implementation")) and value not in _IMPLEMENTATIONS:
        raise CheckpointError(f"{file} asks for {key} {value!r}: only eager and sdpa are used, take it out")


def _check_size(name: str, value: object, file: Path) -> None:
    if value is None:
        return
    most = MAX_LAYERS if name == "num_hidden_layers" else _MAX_SIZE
    if not isinstance(value, int) or isinstance(value, bool) or not 0 < value <= most:
        raise CheckpointError(f"{file} says {name} is {value!r}: it has to be a whole number from 1 to {most}")


# generation_config.json: transformers takes most of its values unseen, and fails on them in the middle of a prompt.


_MOST = 2**31
_IDS = ("bos_token_id", "pad_token_id", "eos_token_id", "decoder_start_token_id")
_VOCABULARY = ("forced_bos_token_id", "forced_eos_token_id", "suppress_tokens", "begin_suppress_tokens")
_COUNTS = (
    "max_length",
    "max_new_tokens",
    "min_length",
    "min_new_tokens",
    "top_k",
    "prompt_lookup_num_tokens",
    "no_repeat_ngram_size",
    "encoder_no_repeat_ngram_size",
)
_AT_LEAST_ONE = ("num_beams", "num_return_sequences")
_SHARES = ("top_p", "min_p", "top_h", "typical_p", "epsilon_cutoff", "eta_cutoff")
_ABOVE_NOTHING = ("temperature", "repetition_penalty", "encoder_repetition_penalty", "max_time")
_NUMBERS = ("length_penalty", "diversity_penalty", "guidance_scale", "penalty_alpha")
_SWITCHES = (
    "do_sample",
    "use_cache",
    "renormalize_logits",
    "remove_invalid_values",
    "token_healing",
    "output_scores",
    "output_logits",
    "output_attentions",
    "output_hidden_states",
    "return_dict_in_generate",
    "disable_compile",
)


def read_generation_config(model: StockModel, directory: Path) -> None:
    """Give `model` the settings of the file, where there is one."""
    path = directory / "generation_config.json"
    if not path.is_file():
        return
    check_content(path)
    try:
        model.generation_config = GenerationConfig.from_pretrained(directory, local_files_only=True)
    except Exception as error:  # a file of the checkpoint's author
        raise CheckpointError(f"{path} cannot be used: {one_line(error)}") from error


# An empty list asks for nothing, and transformers fails on it.
_LISTS = ("stop_strings", "bad_words_ids", "sequence_bias", "suppress_tokens", "begin_suppress_tokens")
# How transformers would go about it; here the plan decides.
_WAYS = (
    "cache_implementation",
    "cache_config",
    "max_cache_len",
    "prompt_lookup_num_tokens",
    "assistant_early_exit",
    "use_mtp",
    "is_assistant",
    "compile_config",
    "prefill_chunk_size",
)
# What every cache does, and what Gemma's files say of a kind that transformers itself has given up.
_USUAL = ("dynamic", "hybrid")
_ELSEWHERE = "transformers itself would fetch code for it from the hub"
_REFUSED: dict[str, tuple[Callable[[Any], bool], str]] = {
    "token_healing": (bool, "it would generate from another prompt than the one given"),
    "dola_layers": (lambda value: value is not None, _ELSEWHERE),
    "constraints": (lambda value: value is not None, _ELSEWHERE),
    "force_words_ids": (lambda value: value is not None, _ELSEWHERE),
    "penalty_alpha": (lambda value: bool(value), _ELSEWHERE),
    "num_beam_groups": (lambda value: value not in (None, 1), _ELSEWHERE),
    "guidance_scale": (lambda value: value not in (None, 1), "it needs a second prompt"),
    "watermarking_config": (lambda value: value is not None, "conversations and exact answers are not watermarked"),
}


def settle_generation_config(model: StockModel, vocab_size: int, directory: Path) -> None:
    """Make the `model`'s generation settings ones that `generate` can honour. CheckpointError where that cannot be."""
    config = model.generation_config
    config.use_cache = True  # training with gradient checkpointing leaves it off; decoding here is never without
    for name in _LISTS:
        if getattr(config, name, None) in ([], {}):
            setattr(config, name, None)
    check_generation_config(config, vocab_size, directory)
    _refuse(config, directory)
    _set_aside(config, directory)
    if (config.num_return_sequences or 1) > 1:
        more = f"{config.num_return_sequences}: run, chat and serve give one answer"
        warnings.warn(f"num_return_sequences of {directory.name} is {more}", stacklevel=2)
    _try_out(model, vocab_size, directory)


def _refuse(config: PretrainedConfig, directory: Path) -> None:
    for name, (asks, reason) in _REFUSED.items():
        value = getattr(config, name, None)
        if asks(value):
            raise CheckpointError(
                f"{directory} says in its generation_config.json that {name} is {str(value)[:60]!r}, which cannot be "
                f"done here ({reason}): take it out of the file"
            )


def _set_aside(config: PretrainedConfig, directory: Path) -> None:
    for name in _WAYS:
        value = getattr(config, name, None)
        if value in (None, False):
            continue
        setattr(config, name, None)
        if value not in _USUAL:
            told = f"{name} of {directory.name}'s generation_config.json ({str(value)[:60]!r}) is ignored"
            warnings.warn(f"{told}: the plan decides how the answer is computed", stacklevel=3)


def _try_out(model: StockModel, vocab_size: int, directory: Path) -> None:
    """Have the settings change the scores of a token once, where they fail if they will ever."""
    config = copy.deepcopy(model.generation_config)
    config.max_length = 8
    ids = torch.zeros(1, 4, dtype=torch.long, device="cpu")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model._prepare_special_tokens(config, kwargs_has_attention_mask=True, device="cpu")
            processors = model._get_logits_processor(
                config, input_ids_seq_length=4, encoder_input_ids=ids, device="cpu", model_kwargs={}
            )
            processors(ids, torch.zeros(1, vocab_size, dtype=torch.float32, device="cpu"))
    except Exception as error:  # each setting is checked in its own way
        where = f"{directory / 'generation_config.json'} or config.json"
        raise CheckpointError(f"{where} has settings that generate refuses: {one_line(error)}") from error


def check_generation_config(config: GenerationConfig, vocab_size: int, directory: Path) -> None:
    """CheckpointError for settings of a checkpoint, a `GenerationConfig`, with which nothing can be generated."""
    rules: list[tuple[tuple[str, ...], Callable[[Any], bool], str]] = [
        (_IDS, lambda value: _ids(value, -1, _MOST), "a token id, or several"),
        (_VOCABULARY, lambda value: _ids(value, 0, vocab_size - 1), f"token ids below {vocab_size}"),
        (_COUNTS, lambda value: _whole(value, 0, _MOST), "a whole number, 0 or more"),
        (_AT_LEAST_ONE, lambda value: _whole(value, 1, _MOST), "a whole number, 1 or more"),
        (_SHARES, lambda value: _number(value) and 0 <= value <= 1, "a number from 0 to 1"),
        (_ABOVE_NOTHING, lambda value: _number(value) and value > 0, "a number above 0"),
        (_NUMBERS, _number, "a number"),
        (_SWITCHES, lambda value: isinstance(value, bool), "true or false"),
        (("stop_strings",), _texts, "a text, or several, none of them empty"),
    ]
    for names, fits, words in rules:
        for name in names:
            value = getattr(config, name, None)
            greedy = name == "temperature" and value == 0 and not config.do_sample  # how some files say so
            if value is not None and not greedy and not fits(value):
                raise CheckpointError(
                    f"{directory} says in its generation_config.json or config.json that {name} is "
                    f"{str(value)[:60]!r}: it has to be {words}"
                )


def _ids(value: object, least: int, most: int) -> bool:
    values = value if isinstance(value, list) else [value]
    return bool(values) and all(_whole(one, least, most) for one in values)


def _texts(value: object) -> bool:
    values = value if isinstance(value, list) else [value]
    return all(isinstance(one, str) and one for one in values)


def _whole(value: object, least: int, most: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and least <= value <= most


def _number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and -math.inf < value < math.inf


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


def refuse_quantised(where: Path, said: dict[str, object], why: str | None = None) -> NoReturn:
    """UnsupportedModel for a checkpoint that was quantised as its config `said`, which is not read."""
    words = f": {why}" if why else f", which is not read here ({_READ} are)"
    raise UnsupportedModel(f"{where} is quantised by {_method(said)}{words}; {_ORIGINAL}")


def refuse_plain(where: Path, said: dict[str, object], tensors: int, dtype: torch.dtype) -> NoReturn:
    """UnsupportedModel for a checkpoint that config `said` was quantised, of whose `tensors` none is packed. Other
    software would quantise them while loading, or look in vain for what is packed and make it up."""
    plain = str(dtype).removeprefix("torch.")
    raise UnsupportedModel(
        f"{where} says that it is quantised by {_method(said)}, and holds plain {plain}: 0 of its {tensors} tensors "
        "are packed; if they are the model's weights, take out what says so (quantization_config of config.json, or "
        f"hf_quant_config.json), else {_ORIGINAL}"
    )


def _method(said: dict[str, object]) -> str:
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
