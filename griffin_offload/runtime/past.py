"""A KV cache that a caller goes on with: what is in it, and what of the prompt is new, by transformers' own rule."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor

from griffin_offload.errors import UsageError
from griffin_offload.pricing import Usage
from griffin_offload.runtime.cache import KVCache

if TYPE_CHECKING:
    from griffin_offload.runtime.engine import Engine


@dataclass(frozen=True)
class Past:
    """`tokens` in the caller's `cache` (0 without one), and the `whole` of them and the new ones."""

    tokens: int
    whole: int
    cache: Any = None

    def check_batch(self, sequences: int) -> None:
        """UsageError unless the cache is one of so many sequences, beams included."""
        kept = self._sequences if self.tokens else None
        if kept not in (None, sequences):
            raise UsageError(
                f"past_key_values holds {kept} sequences and {sequences} are to be generated: its "
                "batch_repeat_interleave(n) or batch_select_indices(indices) make them as many"
            )

    @property
    def _sequences(self) -> int | None:
        if isinstance(self.cache, KVCache):
            return self.cache.batch
        keys = (getattr(layer, "keys", None) for layer in getattr(self.cache, "layers", ()))
        return next((found.shape[0] for found in keys if isinstance(found, Tensor)), None)

    def make_room(self, engine: "Engine", use: Usage) -> None:
        """Ours was made for the answer before: it becomes as large as `use` asks for."""
        if isinstance(self.cache, KVCache) and self.cache.ctx_tokens < use.cache_tokens:
            self.cache.grow(engine.roomy_tokens(use))


def past_of(prompt: Tensor, kwargs: dict[str, Any]) -> Past:
    """What `past_key_values` holds of `prompt` [B, T]; UsageError where the two do not belong together.

    Ids are the whole sequence, or the new tokens alone if an attention mask over the whole one is given; transformers
    tells them apart by the mask's length, and would compute nonsense where neither is the case.
    """
    cache, given = kwargs.get("past_key_values"), prompt.shape[1]
    if cache is None:
        return Past(0, given)
    if not hasattr(cache, "get_seq_length"):
        raise UsageError(f"past_key_values is a {type(cache).__name__}: give a Cache, as generate returns it")
    past, mask = cache.get_seq_length(), kwargs.get("attention_mask")
    if past == 0:
        return Past(0, given, cache)
    masked = given if mask is None else mask.shape[1]
    whole = given if masked == given else past + given
    if whole <= past or masked != whole:
        raise UsageError(
            f"past_key_values holds {past} tokens, the prompt {given} and the attention mask {masked}: give the whole "
            "sequence, longer than what is in the cache, or the new tokens alone with an attention mask over all"
        )
    return Past(past, whole, cache)
