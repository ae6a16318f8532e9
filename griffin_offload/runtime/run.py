"""One generate: its state, what it may not ask for, and what its forwards are given."""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, StaticCache, StoppingCriteriaList, StopStringCriteria

from griffin_offload.config import CacheKind, LoadConfig, Refresh
from griffin_offload.errors import UsageError
from griffin_offload.pricing import KV_SLACK_TOKENS, MAX_MARKS, Usage, statistics_kept
from griffin_offload.runtime.cache import KVCache
from griffin_offload.runtime.context import Context
from griffin_offload.runtime.prospect import Prospect, pass_tokens
from griffin_offload.runtime.report import GraphReport, PrefillReport


@dataclass(frozen=True)
class Mode:
    """How one `generate` makes its tokens."""

    exact: bool = False
    draft_tokens: int | None = None
    refresh: Refresh = "turn"

    def __post_init__(self) -> None:
        LoadConfig(exact=self.exact, draft_tokens=self.draft_tokens, refresh=self.refresh)  # checks them

    @property
    def pass_tokens(self) -> int:
        """Tokens of the streamed passes between tokens of the answer; 0: there are none."""
        return pass_tokens(self.exact, self.draft_tokens, self.refresh)


class Run:
    """The state of one `generate`."""

    def __init__(
        self, prompts: int, prompt_tokens: int, mask: Tensor | None, use: Usage, mode: Mode, context: Context | None
    ) -> None:
        self.prompts, self.prompt_tokens, self.mask = prompts, prompt_tokens, mask
        self.use, self.mode, self.context = use, mode, context
        self.prompt_ids: list[int] = []
        """With a context: the whole prompt."""
        self.ready: Tensor | None = None
        """Logits [1, V] behind a prompt of which the context knows every token."""
        self.cached_tokens = 0
        """Tokens of the prompt that its context knew."""
        self.prefill: PrefillReport | None = None
        self.prompt_done: Callable[[Context], None] | None = None
        self.loop: Any = None
        """What drafts, if something does."""
        self.graphs = GraphReport()
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


def _value(name: str, kwargs: dict[str, Any], configs: tuple[GenerationConfig, ...]) -> Any:
    """An argument, or the first config's that has one."""
    found = (kwargs.get(name), *(getattr(config, name, None) for config in configs))
    return next((value for value in found if value is not None), None)


def returns_cache(kwargs: dict[str, Any], configs: tuple[GenerationConfig, ...]) -> bool:
    """Whether the caller gets the KV cache with the result."""
    return bool(_value("return_dict_in_generate", kwargs, configs))


_ONE_SEQUENCE_REFUSES = (
    "assistant_model",
    "prompt_lookup_num_tokens",
    "past_key_values",
    "cache_implementation",
    "watermarking_config",
    "guidance_scale",
    "penalty_alpha",
    "dola_layers",
    "output_attentions",
    "output_hidden_states",
)


def check_one_sequence(
    prompt: Tensor, use: Usage, kwargs: dict[str, Any], configs: tuple[GenerationConfig, ...]
) -> None:
    """UsageError unless this can be generated with a context: one sequence of ids, whose past can be taken back."""
    mask = kwargs.get("attention_mask")
    if prompt.dim() != 2 or use.batch != 1 or (mask is not None and not bool(mask.all())):
        raise UsageError(
            "exact mode, refresh and contexts take one sequence of token ids at a time: no batch, no beams, no "
            "padding, no inputs_embeds"
        )
    for name in _ONE_SEQUENCE_REFUSES:
        value = _value(name, kwargs, configs)
        if value not in (None, False) and (name, value) not in (
            ("guidance_scale", 1),
            ("cache_implementation", "hybrid"),
        ):
            raise UsageError(f"{name} cannot be used in exact mode, with refresh or with a context: leave it out")


def as_arguments(kwargs: dict[str, Any], settings: dict[str, Any], given: GenerationConfig) -> dict[str, Any]:
    """`kwargs` with our `settings`: transformers wants either a config, which `given` is then, or arguments."""
    if kwargs.get("generation_config") is None:
        return kwargs | settings
    config = copy.deepcopy(given)  # what is none of a config's stays an argument
    return {**kwargs, **config.update(**settings), "generation_config": config}


def stop_strings_as_criteria(kwargs: dict[str, Any], given: GenerationConfig) -> dict[str, Any]:
    """`kwargs` with `stop_strings` made a criterion: transformers drops the tokenizer that it needs for them when
    the decoding method is not its own."""
    if given.stop_strings is not None:
        raise UsageError("stop_strings of a generation config cannot be used here: give them as an argument")
    kwargs = dict(kwargs)
    strings, tokenizer = kwargs.pop("stop_strings", None), kwargs.pop("tokenizer", None)
    if strings is not None:
        if tokenizer is None:
            raise UsageError("stop_strings need the tokenizer: give it as an argument, too")
        criteria = list(kwargs.get("stopping_criteria") or [])
        kwargs["stopping_criteria"] = StoppingCriteriaList([*criteria, StopStringCriteria(tokenizer, strings)])
    return kwargs


def usage_of(
    prompt: Tensor,
    kwargs: dict[str, Any],
    configs: tuple[GenerationConfig, ...],
    prospect: Prospect,
    mode: Mode,
    passes: bool,
    context: Context | None,
) -> Usage:
    """What a generate with these arguments, and the configs behind them, needs of KV cache and workspace; `passes`
    says whether there are streamed ones between its tokens."""

    def value(name: str) -> Any:
        return _value(name, kwargs, configs)

    pass_tokens, exact = (mode.pass_tokens, mode.exact) if passes else (0, False)
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
        logit_positions=pass_tokens if exact else 1 + drafts,
        past_tokens=context.known(prompt[0], exact=mode.exact) if context is not None else 0,
        pass_tokens=pass_tokens,
        statistics=statistics_kept(pass_tokens, exact, context is not None),
        marks=MAX_MARKS if context is not None else 0,
        kept_scores=kept_scores,
    )


def _cache_of_caller(cache: Any, implementation: str | None) -> CacheKind | None:
    """What kind of KV cache the caller asked for, or None; "hybrid" in a config is what transformers overrides."""
    if isinstance(cache, StaticCache) or str(implementation).startswith("static"):
        return "static"
    return None if cache is None and implementation in (None, "hybrid") else "dynamic"


def checked_prompt(prompt: Tensor | None, vocab_size: int) -> Tensor:
    """`prompt`; UsageError unless it holds token ids [B, T] of the vocabulary, or embeddings [B, T, H]."""
    if prompt is None or prompt.dim() < 2 or prompt.shape[1] == 0:
        raise UsageError("the prompt is empty: give at least one token, as a tensor of [batch, tokens]")
    least, largest = (int(prompt.min()), int(prompt.max())) if prompt.dim() == 2 else (0, 0)
    if least < 0 or largest >= vocab_size:
        raise UsageError(
            f"the prompt has token ids from {least} to {largest}, the vocabulary ends at {vocab_size - 1}: the "
            "tokenizer is of another model"
        )
    return prompt


def check_length(use: Usage, context_tokens: int) -> None:
    """UsageError unless prompt and answer are within the context that was planned."""
    if use.ctx_tokens > context_tokens:
        new_tokens = use.ctx_tokens - use.prompt_tokens
        raise UsageError(
            f"a prompt of {use.prompt_tokens} tokens and {new_tokens} new ones are {use.ctx_tokens}, the context "
            f"is {context_tokens}: shorten one of them or raise --ctx-size (ctx_size)"
        )
