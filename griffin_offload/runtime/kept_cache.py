"""The KV cache of the last run, kept for the next one: captured graphs belong to the addresses of one."""

from typing import Any

from griffin_offload.config import KVBits
from griffin_offload.runtime.cache import KVCache


class KeptCache:
    """At most one KV cache, handed out again when another of its size is asked for."""

    def __init__(self, config: Any, bits: KVBits) -> None:
        self._config, self._bits = config, bits
        self._cache: KVCache | None = None

    def take(self, batch: int, ctx_tokens: int, *, keep: bool) -> KVCache:
        """An empty one for `ctx_tokens` of `batch` sequences, kept or not; one of another size is released first."""
        kept = self._cache
        if keep and kept is not None and (kept.batch, kept.ctx_tokens) == (batch, ctx_tokens):
            kept.reset()
            return kept
        del kept
        self.release()
        cache = KVCache(self._config, ctx_tokens=ctx_tokens, bits=self._bits)
        self._cache = cache if keep else None
        return cache

    def release(self) -> None:
        """Give back what the last run left, and with it the captures."""
        self._cache = None
