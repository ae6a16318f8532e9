"""The KV cache: allocated once for the whole context, written in place, in 16 bits or in 8.

transformers' DynamicCache makes a new tensor of a layer's whole past for every token, and its memory grows with
the answer. Here a layer's keys and values have their final size from the layer's first update on; what attention
reads are views. Shapes: B batch, T tokens, D size of a head.
"""

from collections.abc import Sequence
from typing import Any

from transformers import PretrainedConfig
from transformers.cache_utils import Cache, CacheLayerMixin

from griffin_offload.blocks.states import cache_layers, lasting_kinds, state_kinds, windows_of
from griffin_offload.config import KVBits
from griffin_offload.errors import GriffinError
from griffin_offload.kv_cache.kv_layer import KVLayer, layer_like
from griffin_offload.kv_cache.state_layer import RecordedWriter, StateLayer, States, copies, copies_bytes
from griffin_offload.kv_cache.store import DequantBuffer


def can_cache(config: PretrainedConfig) -> bool:
    """Whether every layer of `config`'s model caches plain attention (all of the past, or a window of it, or nothing
    where it reads another layer's), states of convolutions and recurrences, or both; and some layer attention."""
    if not any(isinstance(layer, CacheLayerMixin) for layer in cache_layers(config)):
        return False
    return not config.is_encoder_decoder and not lasting_kinds(config)


def why_not_back(config: PretrainedConfig) -> str:
    """Why tokens that have passed cannot be taken back, for a model of which `can_cache` is false."""
    kinds = lasting_kinds(config) or state_kinds(config)
    return f"layers of kind {kinds} keep a state that cannot be rolled back ({config.model_type})"


class KVCache(Cache):  # type: ignore[misc]
    """Keys and values of every layer, and states, for a model of which `can_cache` is true.

    A layer holds [B, heads, tokens, D] from its first update on: `ctx_tokens`, or its window and KV_SLACK_TOKENS. With
    16 `bits` numbers are kept as they come, in the precision of the computation; with 8 as int8 with a scale per
    token and head, and a layer is dequantised into a scratch of all layers when it is read. More tokens than
    `ctx_tokens`, or a rollback further than is kept, raise GriffinError. States go back to where `keep_start` was
    called, and to any token of one pass behind that whose `writers` were recorded.
    """

    def __init__(self, config: PretrainedConfig, *, ctx_tokens: int, bits: KVBits = 16) -> None:
        self._scratches = (DequantBuffer(), DequantBuffer())
        self.ctx_tokens = ctx_tokens
        layers = [
            layer_like(layer, ctx_tokens, window, bits, self._scratches)
            for layer, window in zip(cache_layers(config), windows_of(config), strict=True)
        ]
        self.kept = [layer for layer in layers if isinstance(layer, KVLayer)]
        """Those that hold entries: a layer may read another one's."""
        self.stateful: list[StateLayer] = [layer for layer in layers if isinstance(layer, StateLayer)]
        """Those that hold states."""
        self._start: tuple[int, States] | None = None
        self.writers: Sequence[RecordedWriter] = ()
        """Of the one pass behind the start."""
        self.halted: int | None = None
        """The layer that is halted inside a prompt, whose states alone are those of its first tokens."""
        super().__init__(layers=layers)

    @property
    def nbytes(self) -> int:
        """Bytes allocated so far, the scratch included."""
        scratch = sum(scratch.nbytes for scratch in self._scratches)
        return scratch + sum(layer.nbytes for layer in self.kept)

    @property
    def state_bytes(self) -> int:
        """Of states, of their copies at the start, and of what is kept to write them again."""
        now = sum(state.nbytes for layer in self.stateful for state in layer.held().values())
        start = copies_bytes(self._start[1]) if self._start is not None else 0
        return now + start + sum(writer.nbytes for writer in self.writers)

    def has_previous_state(self, layer_idx: int | None = None, *args: Any, **kwargs: Any) -> bool:
        """Whether tokens have passed a layer; before transformers 5.23 some ask for none, and mean their own."""
        found: bool = super().has_previous_state(self.halted if layer_idx is None else layer_idx, *args, **kwargs)
        return found

    @property
    def is_linear(self) -> list[bool]:
        """Of every layer, whether it holds states alone."""
        return [isinstance(layer, StateLayer) and not isinstance(layer, KVLayer) for layer in self.layers]

    @property
    def batch(self) -> int:
        """Sequences that it was allocated for; 0 before the first update."""
        return min((layer.batch for layer in self.kept), default=0)

    @property
    def addresses(self) -> tuple[int, ...]:
        """Where keys and values lie: they stay there until another batch or a saved context comes."""
        return tuple(address for layer in self.kept for address in layer.addresses)

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last `-tokens_to_remove` tokens (transformers counts them below zero): in all layers or none."""
        for layer in self.kept:
            layer.check_crop(tokens_to_remove)
        if self.stateful and tokens_to_remove:
            self._take_states_back(self.get_seq_length() + tokens_to_remove)
        self.hide(-tokens_to_remove)

    def hide(self, tokens: int) -> None:
        """Forget the entries of the last `tokens`, and leave states as they are: to be followed by `restore`."""
        for layer in self.kept:
            layer.crop(-tokens)

    def keep_start(self) -> None:
        """Copy the states: what comes behind is about to be taken back."""
        self.forget_start()
        if self.stateful:
            self._start = self.get_seq_length(), copies(self.stateful)

    def forget_start(self) -> None:
        """No more tokens are taken back."""
        self._start, self.writers = None, ()

    def copied_states(self) -> States | None:
        """For `put_back`; None where no layer holds any."""
        return copies(self.stateful) if self.stateful else None

    def put_back(self, states: States) -> None:
        """Hold states as they were when these were copied."""
        for layer, held in zip(self.stateful, states, strict=True):
            layer.put_back(held)

    def _take_states_back(self, tokens: int) -> None:
        """States of the first `tokens`. GriffinError where nothing was kept to make them of."""
        first, states = self._start or (tokens + 1, [])
        behind = tokens - first
        if behind < 0 or (behind and not self.writers):
            raise GriffinError(f"no states were kept that go back to token {tokens}: call keep_start() there")
        self.put_back(states)
        for writer in self.writers if behind else ():
            writer.again(behind)

    def trim(self, tokens: int) -> bool:
        """Forget all but the first `tokens`, also when layers hold different numbers of them, as after an interrupted
        forward. False, and nothing is done, if a layer holds fewer, or its window has lost what would be visible."""
        surplus = [layer.get_seq_length() - tokens for layer in self.kept]
        try:
            for layer, removed in zip(self.kept, surplus, strict=True):
                layer.check_crop(-removed)
        except GriffinError:
            return False
        for layer, removed in zip(self.kept, surplus, strict=True):
            layer.crop(-removed)
        return True

    def restore(self, tokens: int) -> None:
        """Take back a crop of `tokens`, if nothing was written since."""
        for layer in self.kept:
            layer.restore(tokens)

    def reset(self) -> None:
        self.forget_start()
        super().reset()

    def grow(self, ctx_tokens: int) -> None:
        """Have room for `ctx_tokens`, if there is less: a layer after the other is copied into a larger store."""
        if ctx_tokens > self.ctx_tokens:
            self.ctx_tokens = ctx_tokens
            for layer in self.kept:
                layer.grow(ctx_tokens)
