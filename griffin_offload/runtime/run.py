"""One generate: its state, and what its forwards are given."""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor

from griffin_offload.config import LoadConfig, Refresh
from griffin_offload.errors import NotFinite
from griffin_offload.pricing import Usage
from griffin_offload.runtime.cache import KVCache
from griffin_offload.runtime.context import Context
from griffin_offload.runtime.prospect import pass_tokens
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


class LogitsObserver(LogitsProcessor):  # type: ignore[misc]
    """Given to `generate` among its logits processors, it sees the model's own logits: those are called with what
    penalties and bans have made of them, this one before all of them. It changes nothing."""

    def observe(self, logits: Tensor) -> None:
        """The logits [B, V] from which the next token will be made, as they are."""
        raise NotImplementedError

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        return scores


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
        self.loop: Any = None
        """What drafts, if something does."""
        self.graphs = GraphReport()
        self.prefilled = False
        self.batch = 1
        self.fetched_bytes = 0
        """What had been fetched when prefill was over: more at the end would be decode's."""
        self.embedding_bytes = 0
        self.cache: Any = None
        self.own_cache: KVCache | None = None
        """Ours, where the forwards are to fill that."""

    def check_numbers(self, logits: Tensor, dtype: torch.dtype) -> None:
        """NotFinite if `logits` [B, V] are none. One of each row tells: the head adds up all hidden numbers for each.
        On a device that would have to be waited for, only the prompt's are looked at at once, `end_check` does the
        rest."""
        if self.keeps_invalid:
            return
        invalid = logits[:, 0].isnan().any()
        if logits.device.type == "cpu" or self._invalid is None:
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
    mask = torch.ones(batch, length, dtype=torch.float32, device=tokens.device)
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


def state_bytes(cache: Any) -> int:
    """Bytes of the convolutions' and recurrences' states in it."""
    layers = getattr(cache, "layers", ())
    kinds = (getattr(layer, kind, {}) for layer in layers for kind in ("conv_states", "recurrent_states"))
    return sum(state.nbytes for states in kinds for state in states.values() if isinstance(state, Tensor))
