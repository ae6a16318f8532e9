"""One generate: its state, what it may not ask for, and what its forwards are given."""

from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, StaticCache

from griffin_offload.config import CacheKind
from griffin_offload.errors import UsageError
from griffin_offload.pricing import KV_SLACK_TOKENS, Usage
from griffin_offload.runtime.cache import KVCache
from griffin_offload.runtime.prospect import Prospect


class Run:
    """The state of one `generate`."""

    def __init__(self, prompts: int, prompt_tokens: int, mask: Tensor | None) -> None:
        self.prompts, self.prompt_tokens, self.mask = prompts, prompt_tokens, mask
        self.prefilled = False
        self.batch = 1
        self.fetched_bytes = 0
        """What had been fetched when prefill was over: more at the end would be decode's."""
        self.embedding_bytes = 0
        self.cache: Any = None


def tokens_of(arguments: dict[str, Any]) -> Tensor:
    """Token ids [B, T], or embeddings [B, T, H] in their place."""
    tokens = arguments.get("input_ids")
    found: Tensor = tokens if tokens is not None else arguments["inputs_embeds"]
    return found


def cache_of(output: Any, arguments: dict[str, Any]) -> Any:
    cache = arguments.get("past_key_values")
    return cache if cache is not None else getattr(output, "past_key_values", None)


def prompt_mask(tokens: Tensor, given: Any, prompt_tokens: int | None) -> Tensor:
    """[B, T] with 1 for the prompt's own tokens: not padding, not drafts appended by prompt lookup.

    `given` is the caller's [b, t] mask, repeated for beams; other forms of masks (4-D, per layer) say nothing here.
    """
    batch, length = tokens.shape[:2]
    mask = torch.ones(batch, length, device=tokens.device)
    if isinstance(given, Tensor) and given.dim() == 2 and batch % given.shape[0] == 0:
        known = min(given.shape[1], length)
        mask[:, :known] = given[:, :known].to(mask).repeat_interleave(batch // given.shape[0], dim=0)
    if prompt_tokens is not None:
        mask[:, prompt_tokens:] = 0
    return mask


def cache_bytes(cache: Any) -> int:
    """Bytes that the KV cache keeps alive; a sliced layer of transformers' keeps its whole storage."""
    if isinstance(cache, KVCache):
        return cache.nbytes
    storages = {}
    for layer in getattr(cache, "layers", ()):
        for tensor in (getattr(layer, "keys", None), getattr(layer, "values", None)):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def refuse_what_cannot_work(kwargs: dict[str, Any], given: GenerationConfig) -> None:
    """UsageError for arguments of transformers' generate that contradict a prompt streamed once."""
    if kwargs.get("use_cache", given.use_cache) is False:
        raise UsageError("use_cache=False cannot work here: decoding reads the prompt's KV cache")
    if kwargs.get("prefill_chunk_size") is not None:
        raise UsageError("prefill_chunk_size cannot be set: the prompt is streamed in one pass, see ff_chunk_tokens")
    if kwargs.get("assistant_early_exit") is not None:
        raise UsageError("assistant_early_exit cannot work here: it prefills with the first layers alone")
    cache = kwargs.get("past_key_values")
    if cache is not None and cache.get_seq_length() > 0:
        raise UsageError("past_key_values has to be empty: transformers would feed it the whole prompt again")


def usage_of(
    prompt: Tensor, kwargs: dict[str, Any], configs: tuple[GenerationConfig, ...], prospect: Prospect
) -> Usage:
    """What a generate with these arguments, and the configs behind them, needs of KV cache and workspace."""

    def value(name: str) -> Any:
        found = (kwargs.get(name), *(getattr(config, name, None) for config in configs))
        return next((value for value in found if value is not None), None)

    tokens, new = prompt.shape[1], value("max_new_tokens")
    total = tokens + new if new is not None else max(value("max_length"), tokens + 1)
    kept_scores = sum(bool(value(name)) for name in ("output_scores", "output_logits")) * (total - tokens)
    drafts = value("prompt_lookup_num_tokens") or 0
    cache = _cache_of_caller(kwargs.get("past_key_values"), value("cache_implementation"))
    if cache is None and any(layer.window is not None for layer in prospect.shape.layers):
        # A window of ours rolls back so many tokens; an assistant may draft more.
        cache = "dynamic" if drafts > KV_SLACK_TOKENS or kwargs.get("assistant_model") is not None else None
    return Usage(
        batch=prompt.shape[0] * max(value("num_beams") or 1, value("num_return_sequences") or 1),
        prompt_tokens=tokens,
        ctx_tokens=total,
        cache=cache or prospect.request.cache,
        drafts=drafts,
        logit_positions=1 + drafts,
        kept_scores=kept_scores,
    )


def _cache_of_caller(cache: Any, implementation: str | None) -> CacheKind | None:
    """What kind of KV cache the caller asked for, or None; "hybrid" in a config is what transformers overrides."""
    if isinstance(cache, StaticCache) or str(implementation).startswith("static"):
        return "static"
    return None if cache is None and implementation in (None, "hybrid") else "dynamic"


def check_length(use: Usage, context_tokens: int) -> None:
    """UsageError unless prompt and answer are within the context that was planned."""
    if use.ctx_tokens > context_tokens:
        new_tokens = use.ctx_tokens - use.prompt_tokens
        raise UsageError(
            f"a prompt of {use.prompt_tokens} tokens and {new_tokens} new ones are {use.ctx_tokens}, the context "
            f"is {context_tokens}: shorten one of them or raise --ctx-size (ctx_size)"
        )
