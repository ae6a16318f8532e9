"""Options of `from_pretrained` and arguments of `generate` as users of transformers write them.

`translated` takes objects for names, other words and None for a default, and makes them fields of `LoadConfig` and what
finds the checkpoint. What cannot be honoured is refused with the option that does it here; nothing is dropped. Stated
for users in docs/transformers_habits.md, which a test holds against this file.
"""

import difflib
import numbers
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields
from typing import Any

import torch
from torch import Tensor

from griffin_offload.config import DEVICE_NAMES, LoadConfig
from griffin_offload.devices.registry import device_kind
from griffin_offload.errors import UsageError
from griffin_offload.transformers_api import CACHE, with_own_name

_NO_TRAINING = "a checkpoint is loaded as it is stored: save what you want to load with transformers first"
_STREAMED = "full layers stay in the checkpoint's own files: offload='disk' (or 'ram') says where they rest"
_ONE_PROCESS = "one process runs the whole model on one device: leave it out"
_DEFAULTS: dict[str, tuple[Any, ...]] = {
    "trust_remote_code": (False,),
    "low_cpu_mem_usage": (True,),
    "use_safetensors": (True,),
    "weights_only": (True,),
    "ignore_mismatched_sizes": (False,),
    "output_loading_info": (False,),
    "load_in_8bit": (False,),
    "load_in_4bit": (False,),
    "force_download": (False,),
    "use_kernels": (False,),
    "subfolder": ("",),
    "attn_implementation": ("sdpa",),
    "offload_buffers": (False,),
    "offload_state_dict": (False,),
    "local_files_only": (),
}
# What transformers takes as an argument in place of a key of config.json.
_IN_CONFIG = (
    "rope_scaling",
    "rope_parameters",
    "rope_theta",
    "max_position_embeddings",
    "sliding_window",
    "use_sliding_window",
    "tie_word_embeddings",
    "pad_token_id",
    "eos_token_id",
    "bos_token_id",
    "attention_dropout",
    "output_hidden_states",
    "output_attentions",
)
REFUSED = {
    "trust_remote_code": "code that comes with a checkpoint is never run: leave it out",
    "low_cpu_mem_usage": "weights are always mapped, never held twice: leave it out",
    "use_safetensors": "only safetensors are read: save_pretrained of transformers 5 writes them",
    "weights_only": "only safetensors are read: leave it out",
    "ignore_mismatched_sizes": "weights of other sizes are always refused: leave it out",
    "output_loading_info": "missing weights are errors: leave it out",
    "load_in_8bit": "quantize='int8' does it here",
    "load_in_4bit": "quantize='int4' does it here",
    "quantization_config": "quantize='int8' or quantize='int4' does it here",
    "force_download": "delete the model from the hub's cache instead (hf cache delete)",
    "use_kernels": "kernels of this package are used where they are faster: leave it out",
    "subfolder": "give the directory itself as the model",
    "attn_implementation": "attention is torch's sdpa and kernels of this package, and the plan counts its memory so: "
    "leave it out, or write 'sdpa'",
    "offload_folder": _STREAMED,
    "offload_buffers": _STREAMED,
    "offload_state_dict": _STREAMED,
    "max_memory": "max_gpu_mem='12GB' is the device's budget, max_cpu_mem= the host's",
    "config": "change config.json in the checkpoint's directory",
    "state_dict": _NO_TRAINING,
    "key_mapping": _NO_TRAINING,
    "gguf_file": "give the path of the GGUF file itself as the model",
    "variant": "give a directory that holds this variant alone",
    "from_tf": "only safetensors are read: save_pretrained of transformers 5 writes them",
    "from_flax": "only safetensors are read: save_pretrained of transformers 5 writes them",
    "adapter_kwargs": "adapter= merges a LoRA adapter, a directory that peft has written",
    "adapter_name": "adapter= merges a LoRA adapter, a directory that peft has written",
    "tp_plan": _ONE_PROCESS,
    "tp_size": _ONE_PROCESS,
    "device_mesh": _ONE_PROCESS,
    "distributed_config": _ONE_PROCESS,
    "experts_implementation": "experts run as this package does it: leave it out",
    "proxies": "set HTTPS_PROXY in the environment",
    "code_revision": "code that comes with a checkpoint is never run: leave it out",
    "use_auth_token": "the word for it is token=",
    "resume_download": "a download that was broken off is always gone on with: leave it out",
    "mirror": "set HF_ENDPOINT in the environment",
    "use_flash_attention_2": "attention is torch's sdpa and kernels of this package: leave it out",
    "generation_config": "give it to generate, or change generation_config.json in the checkpoint's directory",
    "_fast_init": "weights are never initialised: leave it out",
    **dict.fromkeys(_IN_CONFIG, "change config.json in the checkpoint's directory"),
    "max_length": "it is an argument of generate; ctx_size= plans the memory for prompt and answer",
    "max_new_tokens": "it is an argument of generate; ctx_size= plans the memory for prompt and answer",
    "n_ctx": "ctx_size= does it here",
    "use_cache": "decoding reads the prompt's KV cache: leave it out",
}
"""Words that are refused unless they ask for what is done anyway, and what does it here."""
HUB = ("revision", "cache_dir", "token")
"""Words for the hub's client."""
TRANSLATED = ("torch_dtype", "device_map", "local_files_only")
"""Other words for fields of `LoadConfig`."""
_NUMBERS = (
    "ctx_size",
    "prompt_tokens",
    "batch_size",
    "sequences",
    "seed",
    "draft_tokens",
    "ff_chunk_tokens",
    "threads",
)
_SIZES = ("max_gpu_mem", "max_cpu_mem", "session_mem")
_SWITCHES = ("exact", "keep_prompts", "cuda_graphs", "offline", "always_stream")
_SEVERAL = ("balanced", "balanced_low_0", "sequential")


@dataclass(frozen=True)
class TranslatedOptions:
    """What a call of `from_pretrained` means."""

    options: dict[str, Any]
    """Fields of `LoadConfig`."""
    hub: dict[str, Any]
    """Arguments of the hub's client."""


def translated(options: Mapping[str, object]) -> TranslatedOptions:
    """`options` as ours. UsageError for one that is not known, contradicts another one, or cannot be honoured."""
    left = dict(options)
    _refuse(left)
    hub = {name: left.pop(name) for name in HUB if name in left}
    _merge(left, "torch_dtype", "dtype")
    _merge(left, "device_map", "device")
    _merge(left, "local_files_only", "offline")
    return TranslatedOptions(_fields(left), {name: value for name, value in hub.items() if value is not None})


def _refuse(left: dict[str, object]) -> None:
    known = {field.name for field in fields(LoadConfig)}
    for name in list(left):
        if name in known or name in HUB or name in TRANSLATED:
            continue
        if name not in REFUSED:
            raise UsageError(_unknown(name, known))
        value = left.pop(name)
        if value is not None and not any(value is same or value == same for same in _DEFAULTS.get(name, ())):
            raise UsageError(f"{name} cannot be used here: {REFUSED[name]}")


def _unknown(name: str, known: set[str]) -> str:
    alike = difflib.get_close_matches(name, sorted(known), 1)
    hint = f"did you mean {alike[0]}? " if alike else ""
    return f"unknown option {name!r}: {hint}known are {', '.join(field.name for field in fields(LoadConfig))}"


def _merge(left: dict[str, object], theirs: str, ours: str) -> None:
    """Make the option `theirs` the one that is called `ours`; given both, they have to agree."""
    if theirs not in left:
        return
    value = left.pop(theirs)
    if value is None:
        return
    given = left.get(ours)
    if given is not None and _plain(ours, given) != _plain(ours, value):
        raise UsageError(f"{theirs} is {value!r} and {ours} {given!r}: give one of them")
    left[ours] = value


def _fields(left: dict[str, object]) -> dict[str, Any]:
    """Fields of `LoadConfig`: None is the default, numbers and objects of other libraries are plain ones."""
    found = {}
    for field in fields(LoadConfig):
        if field.name not in left:
            continue
        value = left[field.name]
        if value is None and field.default is not MISSING:
            value = field.default
        found[field.name] = _plain(field.name, value)
    return found


def _plain(name: str, value: object) -> Any:
    value = _number(value)
    if name == "dtype" and value is not None:
        return _dtype(value)
    if name == "device" and value is not None:
        return _device(value)
    if name in _NUMBERS and value is not None:
        return _whole(name, value)
    if name in _SWITCHES and not isinstance(value, bool):
        raise UsageError(f"{name} is {value!r}: give True or False")
    if name == "density" and value != "auto" and not _numbers(value):
        raise UsageError(f"density is {value!r}: give a number from 0 to 1, one per layer, or 'auto'")
    if name in _SIZES and value is not None and (isinstance(value, bool) or not isinstance(value, int | float | str)):
        raise UsageError(f"{name} is {value!r}: give bytes, or a size such as '12GB'")
    if name in ("decay", "density") and isinstance(value, bool):
        raise UsageError(f"{name} is {value!r}: give a number from 0 to 1")
    if name == "decay" and not isinstance(value, int | float):
        raise UsageError(f"decay is {value!r}: give a number from 0 to 1")
    if name in ("refresh", "kv_bits") and not isinstance(value, str):
        return _whole(name, value)
    return value


def _numbers(value: object) -> bool:
    """Whether it is a number, or a list of them."""
    return all(isinstance(one, int | float) for one in (value if isinstance(value, list) else [value]))


def _number(value: object) -> Any:
    """Python's own number, or list of numbers, for those of numpy and torch."""
    if isinstance(value, list | tuple):
        return [_number(one) for one in value]
    if isinstance(value, bool | int | float | str) or value is None:
        return value
    if hasattr(value, "tolist") and hasattr(value, "shape") and not isinstance(value, type):
        return _number(value.tolist())
    if isinstance(value, numbers.Integral):
        return int(value)
    return float(value) if isinstance(value, numbers.Real) else value


def _whole(name: str, value: object) -> int:
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if not isinstance(value, int) or isinstance(value, bool):
        raise UsageError(f"{name} is {value!r}: give a whole number")
    return value


def _dtype(value: object) -> str:
    """Its name, also of numpy's classes."""
    return str(value.__name__ if isinstance(value, type) else value).removeprefix("torch.")


def _device(value: object) -> str:
    """Its kind; UsageError for several devices, or one that is not torch's current one."""
    if isinstance(value, Mapping):
        if len(set(map(str, value.values()))) != 1 or not value:
            raise UsageError(f"device_map has {len(value)} entries: one device holds the residents; {_BUDGET}")
        value = next(iter(value.values()))
    if isinstance(value, bool) or not isinstance(value, int | str | torch.device):
        raise UsageError(f"device is {value!r}: give one of {', '.join(DEVICE_NAMES)}, or a torch.device")
    if value in _SEVERAL:
        raise UsageError(f"device_map={value!r} cannot be used here: one device holds the residents; {_BUDGET}")
    if value == "auto":
        return "auto"
    try:
        device = torch.device("cuda", value) if isinstance(value, int) else torch.device(value)
    except RuntimeError:  # torch knows no such device: told by LoadConfig, with those that there are
        return str(value)
    if device.type in DEVICE_NAMES:
        device_kind(device.type).check_index(device)
    return device.type


_BUDGET = "max_gpu_mem= is its budget, and layers that do not fit stream from the checkpoint"


# What is given to `generate`.


def checked_prompt(prompt: object, vocab_size: int) -> Tensor:
    """`prompt`; UsageError unless it holds token ids [B, T] of the vocabulary, or embeddings [B, T, H]."""
    if prompt is not None and not isinstance(prompt, Tensor):
        raise UsageError(f"the prompt is {_described(prompt)}")
    if prompt is not None and prompt.dim() == 1:
        raise UsageError("the prompt has one dimension: give a batch, a tensor of [batch, tokens], as in ids[None]")
    if prompt is None or prompt.dim() < 2 or 0 in prompt.shape[:2]:
        raise UsageError("the prompt is empty: give at least one token, as a tensor of [batch, tokens]")
    if prompt.dim() > 3 or (prompt.dim() == 3 and not prompt.is_floating_point()):
        raise UsageError(f"the prompt is of {list(prompt.shape)}: give token ids as a tensor of [batch, tokens]")
    if prompt.dim() == 2 and prompt.dtype not in (torch.int64, torch.int32):  # what torch's embeddings take
        raise UsageError(f"the prompt's ids are {prompt.dtype}: give whole numbers of 64 or 32 bits, as in ids.long()")
    least, largest = (int(prompt.min()), int(prompt.max())) if prompt.dim() == 2 else (0, 0)
    if least < 0 or largest >= vocab_size:
        raise UsageError(
            f"the prompt has token ids from {least} to {largest}, the vocabulary ends at {vocab_size - 1}: the "
            "tokenizer is of another model"
        )
    return prompt


# Of each the least that it may be: where transformers compares with nothing, an answer would be another one's.
_LEAST = {"max_new_tokens": None, "max_length": None, "min_new_tokens": 0, "min_length": 0}
_LEAST |= {"num_beams": 1, "num_return_sequences": 1}


def checked_arguments(kwargs: dict[str, object], prompt: Tensor) -> dict[str, Any]:
    """`kwargs` of a generate for `prompt`, the KV cache by the installed release's name, and whole numbers, in whatever
    form they are written, as Python's own. UsageError for other numbers, single processors and criteria, and a mask of
    another size."""
    kwargs = with_own_name(kwargs)
    config = kwargs.get("generation_config")
    for name, least in _LEAST.items():
        value = kwargs.get(name, getattr(config, name, None))
        if value is not None and type(value) is not int:
            kwargs[name] = value = _whole(name, _number(value))
        if value is not None and least is not None and value < least:
            raise UsageError(f"{name} is {value}: give a whole number of at least {least}")
    for name in ("logits_processor", "stopping_criteria"):
        if kwargs.get(name) is not None and not isinstance(kwargs[name], list | tuple):
            raise UsageError(f"{name} is of type {type(kwargs[name]).__name__}: give a list, even of one")
    mask = kwargs.get("attention_mask")
    alone = kwargs.get(CACHE) is None and kwargs.get("inputs_embeds") is None
    if isinstance(mask, Tensor) and alone and mask.shape != prompt.shape[:2]:
        raise UsageError(
            f"the attention mask is of {list(mask.shape)}, the prompt of {list(prompt.shape[:2])}: give both as "
            "[batch, tokens]"
        )
    return kwargs


def _described(prompt: object) -> str:
    """What was given in a prompt's place, and what to do."""
    if isinstance(prompt, str) or (isinstance(prompt, list) and prompt and isinstance(prompt[0], str)):
        return (
            "a text: give its token ids, a tensor of [batch, tokens], as in generate(**tokenizer(text, "
            "return_tensors='pt')); the tokenizer is .tokenizer"
        )
    if hasattr(prompt, "keys"):
        return "what a tokenizer returns: give its parts as arguments, generate(**tokens), tensors of [batch, tokens]"
    return f"of type {type(prompt).__name__}: give a tensor of [batch, tokens]"
