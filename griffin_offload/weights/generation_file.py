"""generation_config.json: transformers takes most of its values unseen, and fails on them in the middle of a prompt."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers import GenerationConfig

from griffin_offload.errors import CheckpointError, one_line

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


def read_generation_config(model: Any, directory: Path) -> None:
    """Give `model` the settings of the file, where there is one."""
    path = directory / "generation_config.json"
    if not path.is_file():
        return
    try:
        model.generation_config = GenerationConfig.from_pretrained(directory, local_files_only=True)
    except Exception as error:  # a file of the checkpoint's author
        raise CheckpointError(f"{path} cannot be used: {one_line(error)}") from error


def check_generation_config(config: Any, vocab_size: int, directory: Path) -> None:
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


def _ids(value: Any, least: int, most: int) -> bool:
    values = value if isinstance(value, list) else [value]
    return bool(values) and all(_whole(one, least, most) for one in values)


def _whole(value: Any, least: int, most: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and least <= value <= most


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and -math.inf < value < math.inf
