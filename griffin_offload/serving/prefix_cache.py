"""Contexts of earlier requests, kept as far as the budget goes: a request that continues one computes only the rest."""

from collections.abc import Callable

from torch import Tensor

from griffin_offload.kv_cache.sequence import Context


class PrefixCache:
    """Contexts that no request uses at the moment, the longest unused first.

    Besides one context, which the plan has counted as the one in use, they take at most `limit_bytes`, and are at
    most `most`.
    """

    def __init__(self, new_context: Callable[[], Context], limit_bytes: int, most: int) -> None:
        self._new_context, self.limit_bytes, self._most = new_context, limit_bytes, most
        self._kept: list[Context] = []

    def __len__(self) -> int:
        return len(self._kept)

    @property
    def nbytes(self) -> int:
        return sum(context.nbytes for context in self._kept)

    def take(self, ids: Tensor, *, exact: bool) -> Context:
        """The context that knows the longest start of the prompt `ids` [T], or one that knows nothing. The others are
        within the limit afterwards, and the caller gives it back by `keep`."""
        known = [context.known(ids, exact=exact) for context in self._kept]
        longest = max(range(len(known)), key=lambda i: (known[i], i), default=None)
        if longest is not None and self._worth(self._kept[longest], known[longest]):
            context = self._kept.pop(longest)
            self._evict()
            return context
        evicted = self._evict()
        if evicted is None:
            return self._new_context()
        evicted.clear()  # its memory is of the right size
        return evicted

    def keep(self, context: Context) -> None:
        """Keep `context` for requests that continue it."""
        if context.tokens:
            self._kept.append(context)

    def drop_all(self) -> None:
        self._kept.clear()

    @property
    def _full(self) -> bool:
        """More is kept than may be beside the context in use."""
        return self.nbytes > self.limit_bytes or len(self._kept) > self._most

    def _worth(self, context: Context, known: int) -> bool:
        """Whether a prompt that shares so many tokens may have `context`, which is cut back to them: a long
        conversation is not given for its first question, while there is room for both."""
        if known == 0:
            return False
        return 2 * known >= len(context.tokens) or self._full

    def _evict(self) -> Context | None:
        """Drop the longest unused until the rest is within the limit; the last one that went."""
        evicted = None
        while self._full:
            evicted = self._kept.pop(0)
        return evicted
