"""Arguments of transformers' `generate` that cannot work here, each with what can: a table, and its check."""

from typing import Any

from transformers import GenerationConfig

from griffin_offload.errors import UsageError

_REMOVED = "transformers 5 has no such method any more and would run code from the hub: use num_beams or do_sample"
REFUSED = {
    "prefill_chunk_size": "the prompt is streamed in one pass: ff_chunk_tokens= of from_pretrained bounds its memory",
    "assistant_early_exit": "it prefills with the first layers alone: exact=True drafts with the chosen neurons",
    "penalty_alpha": _REMOVED,
    "dola_layers": _REMOVED,
    "num_beam_groups": _REMOVED,
    "force_words_ids": _REMOVED,
    "constraints": _REMOVED,
    "use_mtp": "layers that predict several tokens are not loaded: exact=True drafts with the chosen neurons",
    "synced_gpus": "one process runs the whole model: leave it out",
    "negative_prompt_ids": "a second prompt would choose the same neurons anew: generate twice, and mix the scores",
    "compile_config": "decode is captured as CUDA graphs where there are some: cuda_graphs= of from_pretrained",
    "cache": "the argument is called past_key_values",
}
"""Arguments that are refused if they ask for something, and why."""
# What processors of checkpoints make that see or hear.
_NOT_TEXT = ("pixel_values", "pixel_values_videos", "image_patches", "input_features", "input_values")
_CACHES = {
    "quantized": "load with kv_bits=8",
    "offloaded": "the plan has counted a resident one: load with kv_bits=8 or a smaller ctx_size",
    "offloaded_static": "the plan has counted a resident one: load with kv_bits=8 or a smaller ctx_size",
    "paged": "one call is answered at a time: calls of several threads wait for each other",
}


def refuse_what_cannot_work(kwargs: dict[str, Any], given: Any, stock: Any) -> None:
    """UsageError for arguments, and settings of the config `given`, that a model whose prompt is streamed once cannot
    honour."""
    if not isinstance(given, GenerationConfig):
        raise UsageError(f"generation_config is of type {type(given).__name__}: give a GenerationConfig, or arguments")
    for name, reason in REFUSED.items():
        value = kwargs.get(name, getattr(given, name, None) if name != "prefill_chunk_size" else None)
        nothing = value is None or (isinstance(value, bool | int | float) and not value)
        if not nothing and (name, value) != ("num_beam_groups", 1):
            raise UsageError(f"{name} cannot be used here: {reason}")
    if kwargs.get("use_cache", given.use_cache) is False:
        raise UsageError("use_cache=False cannot work here: decoding reads the prompt's KV cache")
    for name in _NOT_TEXT:
        if kwargs.get(name) is not None:
            raise UsageError(f"{name} cannot be used here: text alone is run, give token ids without images or sound")
    kind = kwargs.get("cache_implementation", given.cache_implementation)
    if kind in _CACHES:
        raise UsageError(f"cache_implementation={kind!r} cannot be used here: {_CACHES[kind]}")
    if isinstance(kwargs.get("custom_generate"), str):
        raise UsageError("custom_generate names code to be fetched, which is never run: give a function, or exact=True")
    assistant = kwargs.get("assistant_model")
    if assistant is not None and stock in (assistant, getattr(assistant, "model", None)):
        raise UsageError("a model cannot assist itself: exact=True drafts with its own chosen neurons")
    _refuse_attentions(kwargs, given, stock)


def _refuse_attentions(kwargs: dict[str, Any], given: GenerationConfig, stock: Any) -> None:
    asked = kwargs.get("output_attentions", given.output_attentions)
    if asked and stock.config._attn_implementation != "eager":
        raise UsageError(
            "output_attentions cannot be used here: attention is computed without ever making them; "
            "output_hidden_states=True and output_logits=True can"
        )
