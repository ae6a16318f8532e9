"""What a generate is called with: checked against the plan, and made transformers' arguments."""

import copy
from dataclasses import replace
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import GenerationConfig, StaticCache, StoppingCriteriaList, StopStringCriteria

from griffin_offload.blocks.states import RopeBorder, state_kinds
from griffin_offload.config import CacheKind, RunConfig
from griffin_offload.engine.drafts import MOST_DRAFTS
from griffin_offload.engine.generation import GenerationMode, GenerationState, LogitsObserver, Past, past_of
from griffin_offload.engine.speculative import FullModel, loop_of
from griffin_offload.engine.structure import StructureGuide
from griffin_offload.errors import DoesNotFit, UsageError, one_line
from griffin_offload.kv_cache.kv_cache import KVCache, recurs, why_no_drafts, why_not_back
from griffin_offload.kv_cache.sequence import Context, snapshots_kept
from griffin_offload.kv_cache.workload import KV_SLACK_TOKENS, ModelKV, Workload
from griffin_offload.planner.plan import Plan
from griffin_offload.planner.request import PlanRequest, statistics_kept
from griffin_offload.transformers_api import CACHE, FOREIGN_CACHE_NAMES, StockCache, StockModel


class _Spec(Protocol):
    @property
    def device(self) -> torch.device: ...
    @property
    def request(self) -> PlanRequest: ...
    @property
    def shape(self) -> ModelKV: ...


class _HasStock(Protocol):
    @property
    def model(self) -> StockModel: ...


class _KeptCache(Protocol):
    def release(self) -> None: ...


class LoadedModel(FullModel, Protocol):
    """What the arguments of a generate are checked against and made for (a `ModelRunner`)."""

    @property
    def plan(self) -> Plan: ...
    @property
    def model_spec(self) -> _Spec: ...
    @property
    def loaded(self) -> _HasStock: ...
    @property
    def kept_cache(self) -> _KeptCache: ...
    def check_open(self) -> None: ...
    def require(self, use: Workload) -> None: ...
    def roomy_tokens(self, use: Workload) -> int: ...
    def kv_cache(self, use: Workload, *, returned: bool) -> KVCache: ...


# Arguments of transformers' `generate` that cannot work here, each with what can: a table, and its check.


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
    "token_healing": "neurons would be another prompt's: give model.model.heal_tokens(ids, tokenizer) as the prompt",
    **dict.fromkeys(FOREIGN_CACHE_NAMES, f"the argument is called {CACHE}"),
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


def refuse_what_cannot_work(kwargs: dict[str, object], given: object, stock: StockModel) -> None:
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


def _refuse_attentions(kwargs: dict[str, Any], given: GenerationConfig, stock: StockModel) -> None:
    asked = kwargs.get("output_attentions", given.output_attentions)
    if asked and stock.config._attn_implementation != "eager":
        raise UsageError(
            "output_attentions cannot be used here: attention is computed without ever making them; "
            "output_hidden_states=True and output_logits=True can"
        )


ONE_ANSWER: dict[str, Any] = {
    "num_beams": 1,  # text is shown as it comes
    "num_return_sequences": 1,
    "return_dict_in_generate": False,
    "output_scores": False,
    "output_logits": False,
    "output_attentions": False,
    "output_hidden_states": False,
}
"""Arguments of `generate` for whoever wants the tokens of one answer, whatever a checkpoint's settings say."""
# A context's KV cache grows by so many tokens, copied each time.
_CONTEXT_STEP = 256
_LIMITS = ("max_new_tokens", "max_length")


def prepared(
    engine: LoadedModel,
    prompt: Tensor,
    kwargs: dict[str, Any],
    mode: GenerationMode,
    context: Context | None,
    guide: StructureGuide | None = None,
) -> tuple[GenerationState, dict[str, Any]]:
    """The run, and transformers' arguments for it, after checking the caller's against the plan."""
    plan, defaults = engine.plan, engine.loaded.model.generation_config
    given = kwargs.get("generation_config") or defaults
    _refuse_drafts(engine.loaded.model, kwargs, (given, defaults))
    refuse_what_cannot_work(kwargs, given, engine.loaded.model)
    past = past_of(prompt, kwargs)
    settings: dict[str, Any] = {"prefill_chunk_size": None}
    if "disable_compile" not in kwargs:
        settings["disable_compile"] = True  # a static cache would compile, anew for every shape
    if all(kwargs.get(name) is None for name in _LIMITS) and all(getattr(given, name) is None for name in _LIMITS):
        settings["max_new_tokens"] = max(min(RunConfig.max_new_tokens, plan.context_tokens - past.whole), 1)
    passes = bool(mode.pass_tokens and plan.streamed)
    configs = (given, defaults)
    use = usage_of(prompt, kwargs | settings, configs, engine.model_spec, mode, passes, context, past)
    check_length(use, plan.context_tokens)
    if context is not None:
        use = replace(use, reserved_tokens=_roomy(context, use.ctx_tokens, plan.context_tokens))
    past.check_batch(use.batch)
    use = _across_border(engine.border, use, passes)
    if use.cache != "ours" or passes or context is not None:
        engine.kept_cache.release()
    lookup, use = _lookup(engine, prompt, use, kwargs, configs, mode, passes)
    engine.require(use)
    run = GenerationState(prompt.shape[0], past.whole, kwargs.get("attention_mask"), use, mode, context)
    run.passes, run.lookup, run.guide = passes, lookup, guide
    run.past_tokens = run.cached_tokens = past.tokens
    run.keeps_invalid = bool(_value("remove_invalid_values", kwargs, configs))
    run.observers = [one for one in kwargs.get("logits_processor") or () if isinstance(one, LogitsObserver)]
    if passes or context is not None:
        check_one_sequence(prompt, use, kwargs, configs)
        run.prompt_ids = prompt[0].tolist() if prompt.dim() == 2 else []
        run.context = empty_context(engine) if context is None else context
        settings[CACHE] = run.own_cache = run.context.cache
        run.own_cache.grow(use.cache_tokens)
        # Otherwise transformers takes every pad token for padding, also one that was generated.
        settings["attention_mask"] = torch.ones_like(prompt, device=engine.model_spec.device)
    elif past.tokens:
        past.make_room(use, engine.roomy_tokens)
    elif use.cache == "ours" and kwargs.get(CACHE) is None:
        run.own_cache = engine.kv_cache(use, returned=returns_cache(kwargs, configs))
        settings[CACHE] = run.own_cache
    kwargs = stop_strings_as_criteria(kwargs, (given, defaults), settings)
    if passes or run.lookup:
        settings["custom_generate"] = run.loop = loop_of(run, engine, kwargs.get("streamer"))
    return run, as_arguments(kwargs, settings, given)


def _lookup(
    engine: LoadedModel,
    prompt: Tensor,
    use: Workload,
    kwargs: dict[str, object],
    configs: tuple[GenerationConfig, ...],
    mode: GenerationMode,
    passes: bool,
) -> tuple[int, Workload]:
    """Most drafts from the text at once, 0 where there are none, and the `use` with them: not where they cannot be
    taken back, where the caller has another way to draft, or where memory is short."""
    if state_kinds(engine.loaded.model.config):
        return 0, use
    if passes:
        looks_up = mode.exact and mode.lookup is not False and mode.draft_tokens is None
        return (mode.pass_tokens - 1 if looks_up else 0), use
    border, most = engine.border, min(MOST_DRAFTS, use.prompt_tokens - 1)
    others = kwargs.get("custom_generate") is not None or getattr(configs[0], "is_assistant", False)
    others = others or use.cache != "ours" or engine.plan.experts is not None
    crosses = border is not None and use.ctx_tokens > border.tokens
    if mode.lookup is False or engine.step_costs.rules_out(mode.lookup) or others or crosses or most < 1:
        return 0, use
    with_drafts = replace(use, logit_positions=max(use.logit_positions, 1 + most))
    try:
        check_one_sequence(prompt, use, kwargs, configs)
        engine.require(with_drafts)
    except (UsageError, DoesNotFit):
        return 0, use
    return most, with_drafts


def _refuse_drafts(model: StockModel, kwargs: dict[str, object], configs: tuple[GenerationConfig, ...]) -> None:
    """UsageError for drafts of transformers' own where they could not be taken back."""
    for name in ("prompt_lookup_num_tokens", "assistant_model"):
        if _value(name, kwargs, configs) is not None and recurs(model):
            raise UsageError(f"{name} {why_no_drafts(model.config)}")


def _roomy(context: Context, tokens: int, most: int) -> int:
    """Tokens that the KV cache of `context` shall hold for a use of so many: in large steps, for what may follow."""
    return max(context.cache.ctx_tokens, min(-(-tokens // _CONTEXT_STEP) * _CONTEXT_STEP, most))


def _across_border(border: RopeBorder | None, use: Workload, passes: bool) -> Workload:
    """`use` of an answer that may cross `border`; UsageError where tokens could not be taken back behind it."""
    if border is None or use.ctx_tokens <= border.tokens:
        return use
    if passes and border.moving:
        raise UsageError(
            f"exact mode and refresh end at {border.tokens} tokens here, prompt and answer are {use.ctx_tokens}: "
            f"beyond, rope kind {border.kind} turns every position anew with each token"
        )
    if border.rereads and border.crossed(use.prompt_tokens, use.ctx_tokens):
        return replace(use, pass_tokens=max(use.pass_tokens, border.tokens + 1))
    return use


def _value(name: str, kwargs: dict[str, object], configs: tuple[GenerationConfig, ...]) -> Any:
    """An argument, or the first config's that has one."""
    found = (kwargs.get(name), *(getattr(config, name, None) for config in configs))
    return next((value for value in found if value is not None), None)


def returns_cache(kwargs: dict[str, object], configs: tuple[GenerationConfig, ...]) -> bool:
    """Whether the caller gets the KV cache with the result."""
    return bool(_value("return_dict_in_generate", kwargs, configs))


_ONE_SEQUENCE_REFUSES = (
    "assistant_model",
    "prompt_lookup_num_tokens",
    CACHE,
    "cache_implementation",
    "watermarking_config",
    "guidance_scale",
    "output_attentions",
    "output_hidden_states",
    "custom_generate",
)


def check_one_sequence(
    prompt: Tensor, use: Workload, kwargs: dict[str, Any], configs: tuple[GenerationConfig, ...]
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


def as_arguments(kwargs: dict[str, object], settings: dict[str, object], given: GenerationConfig) -> dict[str, Any]:
    """`kwargs` with our `settings`: transformers wants either a config, which `given` is then, or arguments."""
    if kwargs.get("generation_config") is None:
        return kwargs | settings
    config = copy.deepcopy(given)  # what is none of a config's stays an argument
    arguments = {**kwargs, **config.update(**settings), "generation_config": config}
    # None in a config is filled in by the checkpoint's settings, as an argument it is the last word.
    return arguments | {name: None for name in ("stop_strings",) if name in settings}


def stop_strings_as_criteria(
    kwargs: dict[str, Any], configs: tuple[GenerationConfig, ...], settings: dict[str, Any]
) -> dict[str, Any]:
    """`kwargs` with `stop_strings` made a criterion, those of `configs` too, which `settings` then take back:
    transformers drops the tokenizer that it needs for them when the decoding method is not its own. UsageError for
    strings that no tokens make."""
    strings = kwargs["stop_strings"] if "stop_strings" in kwargs else _value("stop_strings", {}, configs)
    if not strings:
        return kwargs
    kwargs = dict(kwargs)
    tokenizer = kwargs.pop("tokenizer", None)
    kwargs.pop("stop_strings", None)
    settings["stop_strings"] = None
    if tokenizer is None:
        raise UsageError("stop_strings need the tokenizer: give it as an argument, too")
    try:
        criterion = StopStringCriteria(tokenizer, strings)
    except Exception as error:  # it takes the vocabulary apart
        raise UsageError(f"stop_strings {str(strings)[:80]} cannot be used: {one_line(error)}") from error
    kwargs["stopping_criteria"] = StoppingCriteriaList([*(kwargs.get("stopping_criteria") or []), criterion])
    return kwargs


def usage_of(
    prompt: Tensor,
    kwargs: dict[str, Any],
    configs: tuple[GenerationConfig, ...],
    model_spec: _Spec,
    mode: GenerationMode,
    passes: bool,
    context: Context | None,
    past: Past,
) -> Workload:
    """What a generate with these arguments, and the configs behind them, needs of KV cache and workspace; `passes`
    says whether there are streamed ones between its tokens."""

    def value(name: str) -> Any:
        return _value(name, kwargs, configs)

    pass_tokens, exact = (mode.pass_tokens, mode.exact) if passes else (0, False)
    tokens, new = past.whole, value("max_new_tokens")
    # transformers counts a length from what it is given, which need not be all that is behind it.
    total = tokens + new if new is not None else max(value("max_length") + tokens - prompt.shape[1], tokens + 1)
    kept_scores = sum(bool(value(name)) for name in ("output_scores", "output_logits")) * (total - tokens)
    drafts = value("prompt_lookup_num_tokens") or 0
    cache = _cache_of_caller(kwargs.get(CACHE), value("cache_implementation"))
    if cache is None and any(layer.window is not None or layer.states for layer in model_spec.shape.layers):
        # A window of ours rolls back so many tokens; an assistant may draft more. States of ours go back to no draft.
        drafted = kwargs.get("assistant_model") is not None or getattr(configs[0], "is_assistant", False)
        most = 0 if any(layer.states for layer in model_spec.shape.layers) else KV_SLACK_TOKENS
        cache = "dynamic" if drafts > most or drafted else None
    return Workload(
        batch=prompt.shape[0] * max(value("num_beams") or 1, value("num_return_sequences") or 1),
        prompt_tokens=tokens,
        ctx_tokens=total,
        cache=cache or model_spec.request.cache,
        drafts=drafts,
        logit_positions=pass_tokens if exact else 1 + drafts,
        past_tokens=context.known(prompt[0], exact=mode.exact) if context is not None else past.tokens,
        pass_tokens=pass_tokens,
        statistics=statistics_kept(pass_tokens, exact, context is not None),
        marks=snapshots_kept(continued=context is not None),
        kept_scores=kept_scores,
    )


def _cache_of_caller(cache: StockCache | None, implementation: str | None) -> CacheKind | None:
    """What kind of KV cache the caller asked for, or None; "hybrid" in a config is what transformers overrides."""
    if isinstance(cache, KVCache):
        return "ours"
    if isinstance(cache, StaticCache) or str(implementation).startswith("static"):
        return "static"
    return None if cache is None and implementation in (None, "hybrid") else "dynamic"


def check_length(use: Workload, context_tokens: int) -> None:
    """UsageError unless prompt and answer are within the context that was planned."""
    if use.ctx_tokens > context_tokens:
        new_tokens = use.ctx_tokens - use.prompt_tokens
        raise UsageError(
            f"a prompt of {use.prompt_tokens} tokens and {new_tokens} new ones are {use.ctx_tokens}, the context "
            f"is {context_tokens}: shorten one of them or raise --ctx-size (ctx_size)"
        )


def empty_context(engine: LoadedModel, tokens: int | None = None) -> Context:
    """With a KV cache for so many tokens at first, else for all that was planned. UsageError where layers keep a state
    that cannot be taken back."""
    engine.check_open()
    config, plan = engine.loaded.model.config, engine.plan
    if engine.model_spec.request.cache != "ours":
        raise UsageError(f"no context can be kept: {why_not_back(config)}")
    cache = KVCache(config, ctx_tokens=plan.context_tokens if tokens is None else tokens, bits=plan.kv_bits)
    return Context(cache, engine.loaded, border=engine.border)
