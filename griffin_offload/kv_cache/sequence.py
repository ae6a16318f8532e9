"""What a model remembers of one sequence: KV entries, the statistic, what it selected, and states to go back to."""

import weakref
from dataclasses import dataclass

import torch
from torch import Tensor

from griffin_offload.blocks.states import RopeBorder
from griffin_offload.config import BatchStatistic
from griffin_offload.kv_cache.kv_cache import KVCache
from griffin_offload.kv_cache.kv_layer import States, copies_bytes
from griffin_offload.method.selection import share_kept, shared_score
from griffin_offload.transformers_api import StockCache

# Which neurons a KV cache goes on with: those that its own prompt chose, whoever was asked in between.


MAX_MARKS = 4
"""Earlier states of a conversation that are kept, to go back to."""
_INDEX_BYTES, _FLOAT_BYTES = 8, 4
_NAME = "_griffin_offload_chosen"


@dataclass(frozen=True, eq=False)
class Chosen:
    """What a prompt has chosen. Compared by identity of `selected`: a new choice is a new dict."""

    engine: str
    """Key of the engine whose compact parameters are meant."""
    selected: dict[int, Tensor]
    """Sorted indices of the neurons of each streamed layer."""
    activation_kept: float
    """Share of s^2 / S that they held when they were chosen."""

    def __deepcopy__(self, _: object) -> "Chosen":
        return self


def remember(cache: StockCache | None, chosen: Chosen) -> None:
    """`cache` was filled for these."""
    if cache is not None:
        setattr(cache, _NAME, chosen)


def chosen_for(cache: StockCache) -> Chosen | None:
    """What `cache` was filled for, if anything is known of it."""
    found = getattr(cache, _NAME, None)
    return found if isinstance(found, Chosen) else None


Statistic = dict[int, Tensor]
"""s^2 [B, F] of each streamed layer, float32."""


# So many tokens in front of a first prompt's end are states to go back to, too: a longer prompt seldom begins with the
# last of its tokens, which tokenizers join with what follows (a line's end, the rest of a word).
_SEAMS = (8, 3, 1)
# With states of convolutions and recurrences each is a copy of all of them: one is enough.
_STATE_SEAMS = _SEAMS[:1]


@dataclass(frozen=True)
class Snapshot:
    """The state after a prompt's streamed pass, or a few tokens in front of its end: what a rewind can go back to."""

    tokens: int
    squared: Statistic
    selected: dict[int, Tensor]
    logits: Tensor | None
    """Of the last token, [1, V]."""
    states: States | None = None
    """Of convolutions and recurrences; None where there are none."""


def statistic_bytes(samples: int, neurons: int) -> int:
    """Of s^2 of so many neurons, all streamed layers together."""
    return samples * neurons * _FLOAT_BYTES


def snapshot_bytes(samples: int, neurons: int, kept: int, vocab_size: int, state_bytes: int) -> int:
    """Of a snapshot: the statistic of so many neurons, those of them that are kept, logits, and states."""
    return statistic_bytes(samples, neurons) + kept * _INDEX_BYTES + vocab_size * _FLOAT_BYTES + state_bytes


def snapshots_kept(*, continued: bool) -> int:
    """Snapshots of a sequence at most: none where no later prompt goes on from it."""
    return MAX_MARKS if continued else 0


class Context:
    """One sequence that `generate` goes on with: give it the whole new prompt, and only what differs is computed.

    `tokens` are the ids whose KV entries exist. `squared` is the statistic of the streamed ones among them, the last
    of which is token `covered` - 1, `selected` the neurons it chose; tensors are replaced, never changed in place.
    The entries of the first `exact_tokens` are the full model's: exact mode goes on from no others. States of
    convolutions and recurrences are those behind the last token; they go back to marks alone.
    It belongs to the model that is `loaded`, which it does not keep alive.
    """

    def __init__(self, cache: KVCache, loaded: object, border: RopeBorder | None = None) -> None:
        self.cache, self._owner, self.border = cache, weakref.ref(loaded), border
        self.clear()

    def belongs_to(self, loaded: object) -> bool:
        """Whether it was made by this model."""
        return self._owner() is loaded

    def clear(self) -> None:
        """Forget everything; the memory of the KV cache stays."""
        self.cache.reset()
        self.tokens: list[int] = []
        self.covered = self.exact_tokens = 0
        self.squared: Statistic = {}
        self.selected: dict[int, Tensor] = {}
        self.marks: list[Snapshot] = []

    @property
    def logits(self) -> Tensor | None:
        """Logits [1, V] behind the last token, if that was the end of a prompt."""
        mark = self.marks[-1] if self.marks else None
        return mark.logits if mark is not None and mark.tokens == len(self.tokens) == self.covered else None

    @property
    def nbytes(self) -> int:
        """Bytes that it keeps alive: the KV cache as allocated, statistics, selections and logits."""
        tensors = [*self.squared.values(), *self.selected.values()]
        for mark in self.marks:
            tensors += [*mark.squared.values(), *mark.selected.values()]
            tensors += [mark.logits] if mark.logits is not None else []
        storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
        states = sum(copies_bytes(mark.states) for mark in self.marks if mark.states is not None)
        return self.cache.nbytes + self.cache.state_bytes + states + sum(storages.values())

    def common(self, ids: Tensor) -> int:
        """How many of the first tokens are those of `ids` [T]."""
        both = min(len(self.tokens), ids.numel())
        differ = (ids[:both].cpu() != torch.tensor(self.tokens[:both], dtype=ids.dtype, device="cpu")).nonzero()
        return int(differ[0]) if differ.numel() else both

    def known(self, ids: Tensor, *, exact: bool) -> int:
        """How many tokens at the start of `ids` [T] need not be computed again: where layers are streamed, their
        statistic only goes back to marks, and so do states wherever there are some. (Layers with a window may turn out
        to have lost what these would see; then it is none.)"""
        known = min(self.common(ids), self.exact_tokens) if exact else self.common(ids)
        if (known < self.covered and self.squared) or (known < len(self.tokens) and self.cache.stateful):
            known = max((mark.tokens for mark in self.marks if mark.tokens <= known), default=0)
        if self.border is not None and not self.border.goes_on(known, len(self.tokens), ids.numel()):
            return 0  # their positions were turned by other angles
        return known

    def start(self, ids: Tensor, *, exact: bool) -> Tensor | None:
        """Forget what is not the start of `ids` [T], so that the KV cache holds fewer tokens than those. If all of them
        are known, their last logits [1, V]; the KV cache then has the last token's entries behind its end."""
        self.rewind(self.known(ids, exact=exact))
        if len(self.tokens) < ids.numel():
            return None
        logits = self.logits
        if logits is None:
            self.rewind(self.known(ids[:-1], exact=exact))
        else:
            self.cache.hide(1)
        return logits

    def rewind(self, tokens: int, *, failed: bool = False) -> None:
        """Forget all but the first `tokens`, which are a mark's if they are fewer than `covered`, and where there are
        states if they are not all, or some forward has `failed` and left nobody knows what."""
        if self.cache.stateful and (failed or tokens < len(self.tokens)):
            states = next((mark.states for mark in self.marks if mark.tokens == tokens), None)
            if states is None:
                self.clear()
                return
            self.cache.put_back(states)
        if tokens < self.covered:
            self.marks = [mark for mark in self.marks if mark.tokens <= tokens]
            if self.squared and (not self.marks or self.marks[-1].tokens != tokens):
                self.clear()
                return
            if self.squared:
                self.squared, self.selected = dict(self.marks[-1].squared), self.marks[-1].selected
            self.covered = tokens
        self.tokens, self.exact_tokens = self.tokens[:tokens], min(self.exact_tokens, tokens)
        # Whatever a forward that was interrupted has left there goes, too.
        if not self.cache.trim(tokens):
            self.clear()

    def finish(self, sequence: list[int] | None) -> None:
        """The end of a `generate`: all its tokens, prompt included, or None if it failed."""
        self.cache.forget_start()
        if sequence is not None:
            self.tokens = sequence[: self.cache.get_seq_length()]
        tokens, failed = len(self.tokens), sequence is None
        if failed and self.cache.stateful:
            tokens = max((mark.tokens for mark in self.marks if mark.tokens <= tokens), default=0)
        self.rewind(tokens, failed=failed)

    def begin_again(self) -> None:
        """Forget entries and statistic: all tokens are about to be streamed once more."""
        self.cache.reset()
        self.covered = self.exact_tokens = 0
        self.squared, self.marks = {}, []

    def fade(self, share: float) -> None:
        """Keep `share` of the statistic: what a pass is about to add weighs more then."""
        self.squared = {index: squared * share for index, squared in self.squared.items()}

    def passed(self, sums: Statistic, start: int) -> None:
        """The tokens in the KV cache from `start` on have been streamed; `sums` is s^2 [B, F] of theirs."""
        self.covered = self.cache.get_seq_length()
        if start <= self.exact_tokens:
            self.exact_tokens = self.covered
        for index, squared in sums.items():
            earlier = self.squared.get(index)
            self.squared[index] = squared if earlier is None else earlier + squared

    def share_kept(self, formula: BatchStatistic, layers: int) -> float:
        """Share of s^2 that the chosen neurons hold, mean over `layers`, which have any; one with all of its
        neurons keeps everything."""
        shares = self.shares_kept(formula)
        return (sum(shares.values()) + layers - len(shares)) / layers if layers else 1.0

    def shares_kept(self, formula: BatchStatistic) -> dict[int, float]:
        """The same of each layer that has not all its neurons."""
        return {
            index: float(share_kept(shared_score(squared, formula), self.selected[index]))
            for index, squared in self.squared.items()
        }

    def mark(self, logits: Tensor) -> None:
        """Remember the state at the end of `tokens`, which have all been covered."""
        logits = logits.detach().reshape(1, -1).clone()
        states = self.cache.copied_states()
        self.marks.append(Snapshot(len(self.tokens), dict(self.squared), self.selected, logits, states))
        del self.marks[:-MAX_MARKS]

    def mark_seams(self, seams: list[int], squared: list[Statistic], states: list[States | None]) -> None:
        """Remember states inside a first prompt, which are the first ones to be forgotten: `squared` is s^2 of so many
        tokens. What the whole prompt selected stays, until the pass over what follows selects anew."""
        self.marks = [
            Snapshot(tokens, sums, self.selected, None, held)
            for tokens, sums, held in zip(seams, squared, states, strict=True)
        ]

    @property
    def seams(self) -> list[Snapshot]:
        """The states in front of the last one that share its selection."""
        return [mark for mark in self.marks if mark.tokens < self.covered and mark.selected is self.selected]


def seams_of(tokens: int, *, stateful: bool) -> list[int]:
    """Where in a first prompt of so many tokens there are states to go back to; `stateful`: of recurrences, too."""
    return [tokens - before for before in (_STATE_SEAMS if stateful else _SEAMS) if tokens > before]
