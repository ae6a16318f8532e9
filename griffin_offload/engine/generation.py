"""One generate: its state, and what its forwards are given."""

import contextlib
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList

from griffin_offload.blocks.states import states_in
from griffin_offload.checkpoint.tokenizer import template_end
from griffin_offload.config import LoadConfig, Refresh, pass_tokens
from griffin_offload.engine.report import DraftReport, ExpertReport, GraphReport, LookupReport, PrefillReport
from griffin_offload.engine.structure import StructureGuide
from griffin_offload.errors import CheckpointError, NotFinite, UsageError
from griffin_offload.kv_cache.kv_cache import KVCache
from griffin_offload.kv_cache.sequence import Context
from griffin_offload.kv_cache.workload import Workload
from griffin_offload.transformers_api import (
    CACHE,
    Arguments,
    StockCache,
    StockModel,
    StockOutput,
    Tokenizer,
    counts_tokens,
)

# Where an answer ends: checkpoints say it in up to three places, which need not agree.


def end_tokens(tokenizer: Tokenizer, settings: GenerationConfig, vocab_size: int, *, chat: bool) -> list[int]:
    """Ids that end an answer, sorted: those of the generation `settings`, which transformers knows alone; the
    tokenizer's end of sequence, which fine-tunes change and forget to tell the settings; and for a `chat` what the
    template writes behind an answer, if that is a special token."""
    told = settings.eos_token_id
    found = set(told if isinstance(told, list) else [told]) | {tokenizer.eos_token_id}
    if chat and tokenizer.chat_template is not None:
        found |= _turn_ends(tokenizer)
    return sorted(end for end in found if end is not None and 0 <= end < vocab_size)


def _turn_ends(tokenizer: Tokenizer) -> set[int]:
    try:
        return set(template_end(tokenizer))
    except CheckpointError:  # a template that takes no such conversation says nothing here
        return set()


# How an answer ends: at an end of sequence, at a stop string, or at its last allowed token.


Finish = Literal["stop", "length", "interrupted"]

# Tokens that a letter may be spread over, and some that have no text of their own.
_TOKENS_PER_LETTER, _SPARE_TOKENS = 4, 8


class StopStrings(StoppingCriteria):  # type: ignore[misc]
    """Ends one sequence when its text behind the first `prompt_tokens` holds one of `stops`.

    transformers' own criterion goes through the whole vocabulary first, seconds for 262,144 words; here the last tokens
    are decoded again for each new one.
    """

    def __init__(self, tokenizer: Tokenizer, stops: Sequence[str], prompt_tokens: int) -> None:
        self._tokenizer, self._stops, self._start = tokenizer, tuple(stops), prompt_tokens
        self._window = _TOKENS_PER_LETTER * max(map(len, self._stops), default=0) + _SPARE_TOKENS
        self.happened = False

    def __call__(self, input_ids: Tensor, scores: object, **_: object) -> Tensor:
        if self._stops and not self.happened:
            tail = input_ids[0, max(self._start, input_ids.shape[1] - self._window) :]
            text = self._tokenizer.decode(tail, skip_special_tokens=True, clean_up_tokenization_spaces=False)
            self.happened = any(stop in text for stop in self._stops)
        return torch.full((input_ids.shape[0],), self.happened, dtype=torch.bool, device=input_ids.device)


def cut(text: str, stops: Sequence[str]) -> str:
    """`text` up to the stop string that is complete first; of several that end there, the one that begins first."""
    found = [(at + len(stop), at) for stop in stops if (at := text.find(stop)) >= 0]
    return text[: min(found)[1]] if found else text


def ends_of(generation_config: GenerationConfig, arguments: Arguments | None = None) -> set[int]:
    """Ids that end a sequence, by the arguments of a `generate`, else by the model's config."""
    ends = (arguments or {}).get("eos_token_id", generation_config.eos_token_id)
    if ends is None:
        return set()
    return {ends} if isinstance(ends, int) else set(ends)


def finish_of(answer: Tensor, most_tokens: int, ends: Collection[int], *, stopped: bool) -> Finish:
    """Why the `answer` [T] is over; `stopped`: by a stop string or its structure. Also with its last allowed token it
    may have ended."""
    full = answer.numel() >= most_tokens and not stopped
    return "length" if full and int(answer[-1]) not in ends else "stop"


# A KV cache that a caller goes on with: what is in it, and what of the prompt is new, by transformers' own rule.


@dataclass(frozen=True)
class Past:
    """`tokens` in the caller's `cache` (0 without one), and the `whole` of them and the new ones."""

    tokens: int
    whole: int
    cache: StockCache | None = None

    def check_batch(self, sequences: int) -> None:
        """UsageError unless the cache is one of so many sequences, beams included."""
        kept = self._sequences if self.tokens else None
        if kept not in (None, sequences):
            raise UsageError(
                f"{CACHE} holds {kept} sequences and {sequences} are to be generated: its "
                "batch_repeat_interleave(n) or batch_select_indices(indices) make them as many"
            )

    @property
    def _sequences(self) -> int | None:
        if isinstance(self.cache, KVCache):
            return self.cache.batch
        keys = (getattr(layer, "keys", None) for layer in getattr(self.cache, "layers", ()))
        return next((found.shape[0] for found in keys if isinstance(found, Tensor)), None)

    def make_room(self, use: Workload, roomy_tokens: Callable[[Workload], int]) -> None:
        """Ours was made for the answer before: it grows to `roomy_tokens(use)` if it is too small for `use`."""
        if isinstance(self.cache, KVCache) and self.cache.ctx_tokens < use.cache_tokens:
            self.cache.grow(roomy_tokens(use))


def past_of(prompt: Tensor, kwargs: Arguments) -> Past:
    """What the KV cache among `kwargs` holds of `prompt` [B, T]; UsageError where the two do not belong together.

    Ids are the whole sequence, or the new tokens alone if an attention mask over the whole one is given; transformers
    tells them apart by the mask's length, and would compute nonsense where neither is the case.
    """
    cache, given = kwargs.get(CACHE), prompt.shape[1]
    if cache is None:
        return Past(0, given)
    if not hasattr(cache, "get_seq_length"):
        raise UsageError(f"{CACHE} is a {type(cache).__name__}: give a Cache, as generate returns it")
    if not counts_tokens(cache):
        kind = type(cache).__name__
        raise UsageError(
            f"{CACHE} is a {kind} of states alone, which counts no tokens: give one that generate returned"
        )
    past, mask = cache.get_seq_length(), kwargs.get("attention_mask")
    if past == 0:
        return Past(0, given, cache)
    masked = given if mask is None else mask.shape[1]
    whole = given if masked == given else past + given
    if whole <= past or masked != whole:
        raise UsageError(
            f"{CACHE} holds {past} tokens, the prompt {given} and the attention mask {masked}: give the whole "
            "sequence, longer than what is in the cache, or the new tokens alone with an attention mask over all"
        )
    return Past(past, whole, cache)


@dataclass(frozen=True)
class GenerationMode:
    """How one `generate` makes its tokens."""

    exact: bool = False
    draft_tokens: int | None = None
    refresh: Refresh = "turn"
    lookup: bool | None = None

    def __post_init__(self) -> None:
        LoadConfig(exact=self.exact, draft_tokens=self.draft_tokens, refresh=self.refresh)  # checks them

    @property
    def pass_tokens(self) -> int:
        """Tokens of the streamed passes between tokens of the answer; 0: there are none."""
        return pass_tokens(self.exact, self.draft_tokens, self.refresh)


class LogitsObserver(LogitsProcessor):  # type: ignore[misc]
    """Given to `generate` among its logits processors, it sees the model's own logits: those are called with what
    penalties and bans have made of them, this one before all of them. It changes nothing."""

    def observe(self, logits: Tensor) -> None:
        """The logits [B, V] from which the next token will be made, as they are."""
        raise NotImplementedError

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        return scores


class TokenLoop(Protocol):
    """What makes the tokens of an answer that has drafts: transformers' `custom_generate`."""

    @property
    def report(self) -> DraftReport | None: ...
    @property
    def looked_up(self) -> LookupReport | None: ...
    def __call__(
        self,
        model: StockModel,
        input_ids: Tensor,
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        generation_config: GenerationConfig,
        **model_kwargs: Any,
    ) -> Any: ...


class GenerationState:
    """The state of one `generate`."""

    def __init__(
        self,
        prompts: int,
        prompt_tokens: int,
        mask: Tensor | None,
        use: Workload,
        mode: GenerationMode,
        context: Context | None,
    ) -> None:
        self.prompts, self.prompt_tokens, self.mask = prompts, prompt_tokens, mask
        self.use, self.mode, self.context = use, mode, context
        self.prompt_ids: list[int] = []
        """With a context: the whole prompt."""
        self.ready: Tensor | None = None
        """Logits [1, V] behind a prompt of which the context knows every token."""
        self.cached_tokens = 0
        """Tokens of the prompt that its context knew, or the caller's KV cache."""
        self.past_tokens = 0
        """Of those, what is in the caller's KV cache."""
        self.prefill: PrefillReport | None = None
        self.prompt_done: Callable[[Context], None] | None = None
        self.keeps_invalid = False
        """Somebody else replaces logits that are no numbers."""
        self._invalid: Tensor | None = None
        """On the device, whether logits were no numbers."""
        self.observers: list[LogitsObserver] = []
        self.passes = False
        """Whether there are streamed passes between its tokens."""
        self.lookup = 0
        """Most drafts from the text at once; 0: none."""
        self.guide: StructureGuide | None = None
        """What its answers are held to."""
        self.loop: TokenLoop | None = None
        """What drafts, if something does."""
        self.graphs = GraphReport()
        self.joint = False
        """Whether its tokens are computed together with other sequences', whose prompts choose with it."""
        self.prefilled = False
        self.batch = 1
        self.fetched_bytes = 0
        """What had been fetched when prefill was over: more at the end would be decode's."""
        self.embedding_bytes = 0
        self.experts: ExpertReport | None = None
        """What had been counted then."""
        self.cache: StockCache | None = None
        self.own_cache: KVCache | None = None
        """Ours, where the forwards are to fill that."""

    def check_numbers(self, logits: Tensor, dtype: torch.dtype, *, waits: bool) -> None:
        """NotFinite if `logits` [B, V] are none. One of each row tells: the head adds up all hidden numbers for each.
        On a device that is waited for (`waits`), only the prompt's are looked at at once, `end_check` does the
        rest."""
        if self.keeps_invalid:
            return
        invalid = logits[:, 0].isnan().any()
        if not waits or self._invalid is None:
            raise_if_invalid(bool(invalid), dtype)
            self._invalid = invalid
        else:
            self._invalid = self._invalid | invalid

    def end_check(self, dtype: torch.dtype) -> None:
        """NotFinite if any of the logits so far were no numbers."""
        raise_if_invalid(self._invalid is not None and bool(self._invalid), dtype)


def raise_if_invalid(invalid: bool, dtype: torch.dtype) -> None:
    """NotFinite, with what can be done about it."""
    if not invalid:
        return
    name = str(dtype).removeprefix("torch.")
    reason = "the weights hold numbers that are none: the checkpoint is damaged, or its training failed"
    if dtype == torch.float16:
        reason = "it overflows at 65504, which this model exceeds: compute in --dtype bfloat16 or float32 (dtype=)"
    raise NotFinite(f"the model's logits are no numbers (NaN) in {name}: {reason}")


@contextlib.contextmanager
def probabilities_named(dtype: torch.dtype) -> Iterator[None]:
    """NotFinite for scores from which torch cannot draw: infinite ones, all of them impossible."""
    try:
        yield
    except RuntimeError as error:
        if "probability tensor contains" not in str(error):
            raise
        name = str(dtype).removeprefix("torch.")
        raise NotFinite(
            f"no token can be drawn: scores are infinite in {name}, or settings rule out every token; try "
            "--temperature 0, or another --dtype"
        ) from error


def tokens_of(arguments: Arguments) -> Tensor:
    """Token ids [B, T], or embeddings [B, T, H] in their place."""
    tokens = arguments.get("input_ids")
    found: Tensor = tokens if tokens is not None else arguments["inputs_embeds"]
    return found


def cache_of(output: StockOutput, arguments: Arguments) -> StockCache | None:
    cache = arguments.get(CACHE)
    return cache if cache is not None else getattr(output, CACHE, None)


def prompt_mask(tokens: Tensor, given: object, prompt_tokens: int | None) -> Tensor:
    """[B, T] with 1 for the prompt's own tokens: not padding, not drafts appended by prompt lookup.

    `given` is the caller's [b, t] mask, repeated for beams; other forms of masks (4-D, per layer) say nothing here.
    """
    batch, length = tokens.shape[:2]
    mask = torch.ones(batch, length, dtype=torch.float32, device=tokens.device)
    if isinstance(given, Tensor) and given.dim() == 2 and batch % given.shape[0] == 0:
        known = min(given.shape[1], length)
        mask[:, :known] = given[:, :known].to(mask).repeat_interleave(batch // given.shape[0], dim=0)
    if prompt_tokens is not None:
        mask[:, prompt_tokens:] = 0
    return mask


def cache_bytes(cache: StockCache | None) -> int:
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


def state_bytes(cache: StockCache | None) -> int:
    """Bytes of the convolutions' and recurrences' states in it, and of what takes them back."""
    if isinstance(cache, KVCache):
        return cache.state_bytes
    layers = getattr(cache, "layers", ())
    return sum(state.nbytes for layer in layers for state in states_in(layer).values())
