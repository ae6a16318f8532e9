"""One layer of the KV cache: keys and values, allocated once, written in place, in 16, 8 or 4 bits; states of
convolutions and recurrences; or both. Shapes: B batch, T tokens, D size of a head.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin, LinearAttentionCacheLayerMixin, LinearAttentionLayer

from griffin_offload.blocks.states import states_in
from griffin_offload.config import KVBits
from griffin_offload.errors import GriffinError
from griffin_offload.kernels.attention import KeptStates
from griffin_offload.kv_cache.store import KV_GROUP, STORES, DequantBuffer, Store, head_sizes
from griffin_offload.kv_cache.workload import KV_SLACK_TOKENS, kv_tokens_kept
from griffin_offload.transformers_api import DummyLayer

Scratches = tuple[DequantBuffer, DequantBuffer]
"""For keys and for values, of all layers."""


class KVLayer(CacheLayerMixin):  # type: ignore[misc]
    """One layer. The last `_held` of the `_seen` tokens lie at the start of the store, the oldest one first.

    A layer with a window is asked for `window - 1` past tokens. It has KV_SLACK_TOKENS more room: tokens are moved to
    the start only when that is full, and half of it stays behind then, so that as many can always be rolled back, or
    an update of up to all of it whole.
    """

    is_compileable = False
    is_croppable = True

    def __init__(self, ctx_tokens: int, window: int | None, bits: KVBits, scratches: Scratches) -> None:
        super().__init__()
        self.is_sliding = window is not None
        self._ctx_tokens, self.window, self.bits, self._scratches = ctx_tokens, window, bits, scratches
        self.room = kv_tokens_kept(window, ctx_tokens)
        """Tokens that there is memory for."""
        self._stores: list[Store] = []
        self._seen = self._held = 0

    @property
    def nbytes(self) -> int:
        return sum(store.nbytes for store in self._stores)

    @property
    def batch(self) -> int:
        return self._stores[0].parts(0)[0].shape[0] if self._stores else 0

    @property
    def addresses(self) -> tuple[int, ...]:
        return tuple(address for store in self._stores for address in store.addresses)

    @property
    def tokens_alike(self) -> int:
        """As many of the next tokens are kept and read in one update as one by one. With 4 bits one that ends a group
        has those before it rounded, and one for which others are moved is not to come early."""
        return min(KV_GROUP - self._held % KV_GROUP, self.room - self._held or KV_GROUP)

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Allocate for keys and values like these, [B, heads, T, D] for any T."""
        both, self.dtype = (key_states, value_states), key_states.dtype
        if self.bits == 16:
            self._stores = [Store(states, self.room) for states in both]
        else:
            three = zip(STORES[self.bits], both, self._scratches, strict=True)
            self._stores = [store(states, self.room, scratch) for store, states, scratch in three]
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Append [B, heads, T, D]; return what attention reads: the past that the layer sees, and these tokens.

        The result is valid until the next update: of this layer, and with 8 or 4 bits of any layer. The first tokens of
        a cache, which are the prompt, are returned as they are given, whatever is kept of them; so are later ones
        of which more come at once than a layer with a window has room for.
        """
        new = key_states.shape[-2]
        self._check_room(new)
        if self._seen == 0 and not (self._stores and self._stores[0].suits(key_states)):
            self.lazy_initialization(key_states, value_states)
        past, states = self._past, (key_states, value_states)
        read: list[Tensor] = list(states) if past == 0 else []
        if past + new > self.room and past:  # more at once than the slack: beside the store, before it goes
            old = [store.read(self._held - past, self._held) for store in self._stores]
            read = [torch.cat(pair, dim=-2) for pair in zip(old, states, strict=True)]
        self._append(states, past)
        if not read:
            read = [store.read(self._held - past - new, self._held) for store in self._stores]
        return read[0], read[1]

    @property
    def kept_states(self) -> tuple[KeptStates, KeptStates] | None:
        """Keys and values where they lie, to be written at the places that `advance` says; None where nothing is there
        yet."""
        if not self._stores:
            return None
        keys, values = self._stores
        return keys.kept_states, values.kept_states

    def read(self, first: int, end: int) -> tuple[Tensor, Tensor]:
        """Keys and values [B, heads, end - first, D] of tokens, by their places."""
        keys, values = self._stores
        return keys.read(first, end), values.read(first, end)

    def advance(self) -> tuple[int, int]:
        """Count one token more, which `put` will write: its place in the store, and that of the first one it sees."""
        self._check_room(1)
        past = self._past
        place = self._make_room(1, past)
        for store in self._stores:
            store.at(place)
        return place, place - past

    def put(self, place: Tensor, key_states: Tensor, value_states: Tensor, tokens: int) -> tuple[Tensor, Tensor]:
        """Write one token [B, heads, 1, D] at `place` [1] on the device, and return the first `tokens` of the store,
        whatever they are. Nothing here depends on how many tokens have passed: it can be captured in a graph."""
        read = []
        for store, states in zip(self._stores, (key_states, value_states), strict=True):
            store.put(place, states)
            read.append(store.read_put(place, tokens))
        return read[0], read[1]

    def _check_room(self, new: int) -> None:
        if self._seen + new > self._ctx_tokens:
            raise GriffinError(
                f"the KV cache holds {self._ctx_tokens} tokens, and {new} more than its {self._seen} were given: "
                "make it with a larger ctx_tokens"
            )

    @property
    def _past(self) -> int:
        """Tokens of the past that the next ones see."""
        return self._seen if self.window is None else min(self._seen, self.window - 1)

    def _append(self, states: tuple[Tensor, Tensor], past: int) -> None:
        place = self._make_room(states[0].shape[-2], past)
        for store, tokens in zip(self._stores, states, strict=True):
            store.write(place, tokens[:, :, -self.room :])

    def _make_room(self, new: int, past: int) -> int:
        """Count `new` tokens more, `past` of those before still being seen, and move what stays; where they go."""
        kept = self._held
        if kept + new > self.room:
            most = min(kept, max(self.room - new, 0))
            kept = min(most, past + KV_SLACK_TOKENS // 2)
            if self.bits == 4:  # groups are moved whole where there is room
                whole = self._held - (self._held - kept) // KV_GROUP * KV_GROUP
                kept = whole if whole <= most else kept
        if kept != self._held:
            for store in self._stores:
                store.move_to_start(self._held - kept, kept)
        self._seen += new
        self._held = min(kept + new, self.room)
        return kept

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Length of what `update` will return for `query_length` tokens, and the position of its first one."""
        return self._past + query_length, self._seen - self._past

    def get_seq_length(self) -> int:
        """Tokens that have passed."""
        return self._seen

    def get_max_length(self) -> int:
        """Tokens that there is room for; of a layer with a window, the window."""
        return self.window or self._ctx_tokens

    def check_crop(self, tokens_to_remove: int) -> None:
        """GriffinError unless `crop` can do it."""
        removed = -tokens_to_remove
        if removed < 0:
            raise GriffinError(
                f"crop({tokens_to_remove}) of a KV cache: give the tokens to remove as a negative number"
            )
        if removed > self._seen:
            raise GriffinError(f"{removed} tokens cannot be removed from a KV cache of {self._seen}")
        seen = self._seen - removed
        visible = seen if self.window is None else min(seen, self.window - 1)
        if self._held - removed < visible:
            raise GriffinError(
                f"{removed} tokens cannot be removed from a layer with a window of {self.window}: before its last "
                f"{visible + removed} tokens only {self._held} are kept"
            )

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last `-tokens_to_remove` tokens."""
        self.check_crop(tokens_to_remove)
        self._seen += tokens_to_remove
        self._held += tokens_to_remove

    def restore(self, tokens: int) -> None:
        """Take back a crop of `tokens`, if nothing was written since."""
        self._seen += tokens
        self._held += tokens

    def saved(self) -> list[Tensor]:
        """Views of what is kept: first the keys' parts, then the values'."""
        return [part for store in self._stores for part in store.parts(self._held)]

    def could_load(self, seen: int, shapes: list[list[int]]) -> bool:
        """Whether parts of these shapes can be what a layer like this one `saved` after `seen` tokens."""
        if not shapes or any(len(shape) != 4 for shape in shapes):
            return False
        heads, held = shapes[-1][1:3]
        visible = seen if self.window is None else min(seen, self.window - 1)
        known = head_sizes(self.bits, heads, held, shapes) is not None
        return known and visible <= held <= min(seen, self.room)

    def load(self, seen: int, parts: list[Tensor]) -> None:
        """Become a layer that `saved` these after `seen` tokens."""
        last = parts[-1]  # values' own, in the cache's precision
        batch, heads, held = last.shape[:3]
        sizes = head_sizes(self.bits, heads, held, [[1, *part.shape[1:]] for part in parts])
        assert sizes is not None, "could_load"
        self.lazy_initialization(*(last.new_empty(batch, heads, 0, size) for size in sizes))
        of_keys = len(parts) - len(self._stores[1].parts(0))
        for store, saved in zip(self._stores, (parts[:of_keys], parts[of_keys:]), strict=True):
            store.fill(saved, held)
        self._seen, self._held = seen, held

    def grow(self, ctx_tokens: int) -> None:
        """Have room for `ctx_tokens`, or for the window where that is less."""
        parts, seen = self.saved(), self._seen
        self._ctx_tokens = ctx_tokens
        room = kv_tokens_kept(self.window, ctx_tokens)
        if room > self.room:
            self.room = room
            if parts:
                self.load(seen, parts)

    def reset(self) -> None:
        """Forget every token; the memory stays."""
        self._seen = self._held = 0

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Sample i of the batch becomes sample `beam_idx[i]`, in place."""
        for store in self._stores:
            store.reorder(beam_idx, self._held)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Every sample `repeats` times, one after the other."""
        for store in self._stores:
            store.replace(lambda part: part.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the samples `indices` of the batch."""
        for store in self._stores:
            store.replace(lambda part: part[indices])


# Layers that hold states of convolutions and recurrences, too.

States = list[dict[str, Tensor]]
"""Copies of what the layers with states held, in their order, by name: "conv.0", "recurrent.0"."""


class StateLayer(LinearAttentionLayer):  # type: ignore[misc]
    """The states of one layer, as transformers' models read and write them."""

    is_compileable = False  # for captures of transformers' own, which take their masks as such

    @property
    def is_croppable(self) -> bool:
        """Whether transformers' own drafts can be taken back: inputs of convolutions, not recurrences."""
        return any(self.is_conv_states_initialized.values()) and not any(self.is_recurrent_states_initialized.values())

    def held(self) -> dict[str, Tensor]:
        """What is there, by name; nothing before tokens have passed."""
        return states_in(self)

    def put_back(self, states: dict[str, Tensor]) -> None:
        """Hold copies of these."""
        self.forget()
        for name, state in states.items():
            kind, number = name.split(".")
            getattr(self, f"{kind}_states")[int(number)] = state.clone()
            getattr(self, f"is_{kind}_states_initialized")[int(number)] = True
            self.has_previous_state[int(number)] = True
            if kind == "conv":
                self.conv_kernel_size[int(number)] = state.shape[-1]
                self.dtype, self.device = state.dtype, state.device

    def forget(self) -> None:
        """Hold nothing."""
        LinearAttentionLayer.__init__(self, number_of_states=self.number_of_states)

    def grow(self, ctx_tokens: int) -> None:
        """States have no length."""

    def reset(self) -> None:
        self.forget()

    def crop(self, tokens_to_remove: int) -> None:
        """Nothing: the KV cache puts copies back."""

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Every sample `repeats` times, one after the other."""
        self._replace(lambda state: state.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the samples `indices` of the batch."""
        self._replace(lambda state: state[indices])

    def _replace(self, change: Callable[[Tensor], Tensor]) -> None:
        self.put_back({name: change(state) for name, state in self.held().items()})


def copies(layers: Sequence[StateLayer]) -> States:
    """Of what they hold now."""
    return [{name: state.clone() for name, state in layer.held().items()} for layer in layers]


def copies_bytes(states: States) -> int:
    return sum(state.nbytes for held in states for state in held.values())


class TokenCount:
    """How many tokens have passed layers that keep states alone: what a layer of entries would know of that."""

    def __init__(self) -> None:
        self._tokens = 0

    def get_seq_length(self) -> int:
        return self._tokens

    def check_crop(self, tokens_to_remove: int) -> None:
        """Any number can be forgotten."""

    def crop(self, tokens_to_remove: int) -> None:
        self._tokens += tokens_to_remove

    def restore(self, tokens: int) -> None:
        """Take back a crop of `tokens`; or count so many more."""
        self._tokens += tokens


class StateAndKVLayer(StateLayer, KVLayer):
    """One layer with states beside attention."""

    def __init__(
        self, ctx_tokens: int, window: int | None, bits: KVBits, scratches: Scratches, number_of_states: int
    ) -> None:
        KVLayer.__init__(self, ctx_tokens, window, bits, scratches)
        self.number_of_states = number_of_states
        StateLayer.forget(self)

    is_compileable = False
    is_croppable = True
    grow, crop, get_max_length = KVLayer.grow, KVLayer.crop, KVLayer.get_max_length
    get_seq_length = KVLayer.get_seq_length  # since transformers 5.25 states count tokens, too, and do not go back

    def lazy_initialization(self, *args: Any, **kwargs: Any) -> None:
        """For keys and values, which come by place, or for states, by name."""
        (KVLayer if args else StateLayer).lazy_initialization(self, *args, **kwargs)

    def forget(self) -> None:
        dtype = self.dtype  # of keys and values, once they are there
        StateLayer.forget(self)
        self.dtype = dtype

    def reset(self) -> None:
        StateLayer.reset(self)
        KVLayer.reset(self)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        StateLayer.reorder_cache(self, beam_idx)
        KVLayer.reorder_cache(self, beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        StateLayer.batch_repeat_interleave(self, repeats)
        KVLayer.batch_repeat_interleave(self, repeats)

    def batch_select_indices(self, indices: Tensor) -> None:
        StateLayer.batch_select_indices(self, indices)
        KVLayer.batch_select_indices(self, indices)


def layer_like(stock: Any, ctx_tokens: int, window: int | None, bits: KVBits, scratches: Scratches) -> Any:
    """Ours in the place of one of transformers'."""
    if isinstance(stock, DummyLayer):
        return DummyLayer()
    if not isinstance(stock, LinearAttentionCacheLayerMixin):
        return KVLayer(ctx_tokens, window, bits, scratches)
    states = getattr(stock, "number_of_states", 1)
    if isinstance(stock, CacheLayerMixin):
        return StateAndKVLayer(ctx_tokens, window, bits, scratches, states)
    return StateLayer(number_of_states=states)
