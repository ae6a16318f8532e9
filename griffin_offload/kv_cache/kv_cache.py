"""The KV cache: allocated once for the whole context, written in place, in 16, 8 or 4 bits.

transformers' DynamicCache makes a new tensor of a layer's whole past for every token, and its memory grows with
the answer. Here a layer's keys and values have their final size from the layer's first update on; what attention
reads are views. Shapes: B batch, T tokens, D size of a head.

Layers hold states of convolutions and recurrences, too. A state knows nothing of single tokens, so none can be taken
out of it. Copies of states are kept instead: at the ends of prompts, and before tokens that may be taken back.
Between two copies the part of a layer that writes its states is run again.
"""

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig
from transformers.cache_utils import Cache

from griffin_offload.blocks.base import PassForward
from griffin_offload.blocks.states import cache_layers, lasting_kinds, state_kinds, windows_of
from griffin_offload.config import KVBits
from griffin_offload.errors import GriffinError
from griffin_offload.kv_cache.kv_layer import KVLayer, StateLayer, States, TokenCount, copies, copies_bytes, layer_like
from griffin_offload.kv_cache.store import DequantBuffer
from griffin_offload.transformers_api import keeps_entries

# Parts of layers that write states, during one pass.


@contextlib.contextmanager
def single_steps(parts: Sequence[nn.Module]) -> Iterator[None]:
    """Inside, several tokens pass `parts` as one after the other would: a scan keeps time steps within limits
    (Nemotron-H makes none shorter than a least one), and what decodes does not."""
    limits = [(part, part.time_step_limit) for part in parts if hasattr(part, "time_step_limit")]
    try:
        for part, _ in limits:
            part.__dict__["time_step_limit"] = (0.0, math.inf)
        yield
    finally:
        for part, limit in limits:
            part.__dict__["time_step_limit"] = limit


class RecordedWriter(PassForward):
    """The forward of a part that writes states: what it is given for `tokens` tokens is kept, to be run again."""

    def __init__(self, part: nn.Module, tokens: int) -> None:
        super().__init__(part.forward)
        self._part, self._tokens = part, tokens
        self._given: tuple[Any, Any] = ((), {})

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self._given = (args, kwargs)
        return self._forward(*args, **kwargs)

    @property
    def nbytes(self) -> int:
        args, kwargs = self._given
        given = (value for value in (*args, *kwargs.values()) if isinstance(value, Tensor))
        return sum(value.nbytes for value in given)

    @torch.no_grad()
    def again(self, tokens: int) -> None:
        """Write the states once more, of the first `tokens`, behind what was put back."""
        args, kwargs = _of_tokens(self._given, 0, tokens, self._tokens)
        with single_steps([self._part]):
            self._forward(*args, **kwargs)


class SplitWriter(PassForward):
    """The forward of a part that writes states, over a prompt of `tokens` tokens: first those in front of `seam`, then
    the rest inside of `behind`."""

    def __init__(
        self, part: nn.Module, tokens: int, seam: int, behind: Callable[[], AbstractContextManager[None]]
    ) -> None:
        super().__init__(part.forward)
        self._tokens, self._seam, self._behind = tokens, seam, behind

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        first, rest = (
            _of_tokens((args, kwargs), *part, self._tokens) for part in ((0, self._seam), (self._seam, self._tokens))
        )
        outputs = [self._forward(*first[0], **first[1])]
        with self._behind():
            outputs.append(self._forward(*rest[0], **rest[1]))
        return _joined(outputs)


def _joined(outputs: Sequence[Any]) -> Any:
    """Of all tokens; hidden states, or a tuple of these and None."""
    if all(isinstance(output, Tensor) for output in outputs):
        return torch.cat(list(outputs), dim=1)
    if not all(isinstance(output, tuple) and output[1:] == (None,) for output in outputs):
        raise GriffinError(f"a part that writes states gave {type(outputs[0]).__name__}: hidden states are known")
    return torch.cat([output[0] for output in outputs], dim=1), None


def _of_tokens(value: object, start: int, end: int, tokens: int) -> Any:
    """Of arguments what belongs to these of `tokens` tokens: tensors with a row for each are cut."""
    if isinstance(value, Tensor):
        return value[:, start:end] if value.dim() > 1 and value.shape[1] == tokens else value
    if isinstance(value, tuple):
        return tuple(_of_tokens(item, start, end, tokens) for item in value)
    if type(value) is dict:
        return {name: _of_tokens(item, start, end, tokens) for name, item in value.items()}
    return value


def can_cache(config: PretrainedConfig) -> bool:
    """Whether every layer of `config`'s model caches plain attention (all of the past, or a window of it, or nothing
    where it reads another layer's), states of convolutions and recurrences, or both."""
    return not config.is_encoder_decoder and not lasting_kinds(config)


def why_not_back(config: PretrainedConfig) -> str:
    """Why tokens that have passed cannot be taken back, for a model of which `can_cache` is false."""
    kinds = lasting_kinds(config) or state_kinds(config)
    return f"layers of kind {kinds} keep a state that cannot be rolled back ({config.model_type})"


def recurs(model: Any) -> bool:
    """Whether it keeps more than entries and inputs of convolutions. transformers 5.25 does not say so any more: its
    own caches take recurrences back, ours do not for its drafts."""
    own = set(state_kinds(model.config).split(", ")) - {"", "conv"}
    return bool(getattr(model, "_is_stateful", own))


def why_no_drafts(config: PretrainedConfig) -> str:
    """Why transformers' own drafts are none for a model with states, and what is instead; of states alone nothing."""
    instead = "; exact=True can" if keeps_entries(cache_layers(config)) else ""
    return f"takes drafts back: {why_not_back(config)}{instead}"


class KVCache(Cache):  # type: ignore[misc]
    """Keys and values of every layer, and states, for a model of which `can_cache` is true.

    A layer holds [B, heads, tokens, D] from its first update on: `ctx_tokens`, or its window and KV_SLACK_TOKENS. With
    16 `bits` numbers are kept as they come, in the precision of the computation; with 8 as int8 with a scale per
    token and head, with 4 in groups of KV_GROUP, and a layer is dequantised into a scratch of all layers when it is
    read. More tokens than
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
        self._counting: Sequence[KVLayer | TokenCount] = self.kept or [TokenCount()]
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
        """Of every layer, whether it holds states alone; of none where all do: `generate` would ask for no length."""
        return [bool(self.kept) and layer in self.stateful and layer not in self.kept for layer in self.layers]

    @property
    def batch(self) -> int:
        """Sequences that it was allocated for; 0 before the first update."""
        states = [state.shape[0] for layer in self.stateful[:1] for state in layer.held().values()]
        return min((layer.batch for layer in self.kept), default=min(states, default=0))

    @property
    def addresses(self) -> tuple[int, ...]:
        """Where keys and values lie: they stay there until another batch or a saved context comes."""
        return tuple(address for layer in self.kept for address in layer.addresses)

    @property
    def tokens_alike(self) -> int:
        """As many of the next tokens may come at once without one being kept or read otherwise than one by one."""
        return min((layer.tokens_alike for layer in self.kept if layer.bits == 4), default=self.ctx_tokens)

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last `-tokens_to_remove` tokens (transformers counts them below zero): in all layers or none."""
        for layer in self._counting:
            layer.check_crop(tokens_to_remove)
        if self.stateful and tokens_to_remove:
            self._take_states_back(self.get_seq_length() + tokens_to_remove)
        self.hide(-tokens_to_remove)

    def hide(self, tokens: int) -> None:
        """Forget the entries of the last `tokens`, and leave states as they are: to be followed by `restore`."""
        for layer in self._counting:
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
        surplus = [layer.get_seq_length() - tokens for layer in self._counting]
        try:
            for layer, removed in zip(self._counting, surplus, strict=True):
                layer.check_crop(-removed)
        except GriffinError:
            return False
        for layer, removed in zip(self._counting, surplus, strict=True):
            layer.crop(-removed)
        return True

    def restore(self, tokens: int) -> None:
        """Take back a crop of `tokens`, if nothing was written since."""
        for layer in self._counting:
            layer.restore(tokens)

    def count(self, tokens: int) -> None:
        """So many more have passed a model whose layers keep states alone."""
        if not self.kept:
            self.restore(tokens)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        asked = self.layers[layer_idx] if layer_idx < len(self.layers) else None
        return (asked if isinstance(asked, KVLayer) else self._counting[0]).get_seq_length()

    def reset(self) -> None:
        self.forget_start()
        if not self.kept:
            self.hide(self.get_seq_length())
        super().reset()

    def grow(self, ctx_tokens: int) -> None:
        """Have room for `ctx_tokens`, if there is less: a layer after the other is copied into a larger store."""
        if ctx_tokens > self.ctx_tokens:
            self.ctx_tokens = ctx_tokens
            for layer in self.kept:
                layer.grow(ctx_tokens)


class ReusedKVCache:
    """At most one KV cache, handed out again when another of its size is asked for: captured graphs belong to the
    addresses of one."""

    def __init__(self, config: PretrainedConfig, bits: KVBits) -> None:
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
