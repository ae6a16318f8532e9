"""Several sequences in one forward, whose KV caches stay their own: a token of each, or the prompt of each.

Linear layers, norms and the head see a batch [N, 1], or prompts behind each other, [1, T] of all. Attention alone takes
one sequence after the other, each over the keys and values that it sees: lengths differ without padding, nothing is
copied to be put side by side, and no mask is needed. It works where a model looks its attention up in transformers'
`AttentionInterface`; `why_alone` and `why_prompts_alone` say where not.
"""

import contextlib
import functools
import inspect
import weakref
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.cache_utils import Cache, CacheLayerMixin
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from griffin_offload.blocks.base import hooks_on
from griffin_offload.blocks.states import lasting_kinds, looks_at_length, rope_border, state_kinds, windows_of
from griffin_offload.engine.build import (
    OWN_ATTENTION,
    SINKS_NAME,
    attend_to_each,
    causal_mask,
    eager_attention_of,
    own_attention_takes,
)
from griffin_offload.engine.decode_graph import why_not_static
from griffin_offload.engine.generation import tokens_of
from griffin_offload.engine.model_interface import StockForward, one_token_each
from griffin_offload.engine.report import GraphReport
from griffin_offload.engine.step_replay import NOT_YET, NotRecorded, ReplayedLayer, StepReplays, TokenWrite
from griffin_offload.errors import one_line
from griffin_offload.kernels.attention import EachTokenJob, SeenTokens, each_token
from griffin_offload.kernels.recording import called_again, is_recording, unrecorded
from griffin_offload.kv_cache.kv_cache import KVCache, can_cache
from griffin_offload.kv_cache.kv_layer import KVLayer
from griffin_offload.transformers_api import CACHE, Arguments, StockModel, StockOutput

_NAME = "griffin_offload_joint"
# Of the largest logit: rounding of 16 bits through many layers is far below, another computation far above.
_CLOSE = 0.05


class _JointStates:
    """What stands for the keys, or the values, of a layer while a model hands them on to its attention: `parts`, those
    of every sequence apart, [1, heads, T, D] each; None in a recording, where they are the layer's of that moment."""

    def __init__(self, layer: "_JointLayer", parts: Sequence[Tensor] | None) -> None:
        self.layer, self.parts = layer, parts


Lengths = Sequence[int] | None
"""Tokens of the prompts that lie behind each other; None where a batch has a token of each sequence."""


def _apart(states: Tensor, lengths: Lengths) -> Sequence[Tensor]:
    """Of every sequence its own, [1, heads, T, D] each."""
    found: tuple[Tensor, ...] = states.split(1) if lengths is None else states.split(list(lengths), dim=2)
    return found


class _JointLayer(CacheLayerMixin):  # type: ignore[misc]
    """The same layer of several KV caches; `implementation` attends to one sequence's."""

    is_compileable = False

    def __init__(self, number: int, caches: Sequence[KVCache], implementation: str, lengths: Lengths) -> None:
        super().__init__()
        self.number, self.implementation, self.lengths = number, implementation, lengths
        self._read: tuple[list[Tensor], list[Tensor]]  # what `update` gave, where tokens are appended by it
        self.hold(caches)
        self.is_sliding, self.is_initialized = self.layers[0].is_sliding, True
        self._writes: list[TokenWrite] | None = None
        self.jobs = list[EachTokenJob]()
        """Of attention that a recording knows."""

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        raise AssertionError("every sequence has a prompt")

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[_JointStates, _JointStates]:
        """Append a token [N, heads, 1, D], row i to cache i; or prompts [1, heads, T, D]."""
        if not is_recording():
            keys, values = self._appended(key_states, value_states)
            return _JointStates(self, keys), _JointStates(self, values)
        with unrecorded():  # a window that moves does so now, in these KV caches
            kept = [layer.kept_states for layer in self.layers]
            moves = all(own is not None and TokenWrite.knows((key_states, value_states), own) for own in kept)
            if moves:
                self._advance()
        if moves:
            rows = zip(key_states[:, :, 0], value_states[:, :, 0], self.rows, strict=True)
            self._writes = [TokenWrite(*row) for row in rows]
        else:
            called_again(self._append, key_states, value_states)
        return _JointStates(self, None), _JointStates(self, None)

    @property
    def moves(self) -> bool:
        """Whether a recording knows how its tokens are written."""
        return self._writes is not None

    def _advance(self) -> None:
        """Count one token more of every sequence, and see it among the others; it is written later."""
        self.rows = []
        for layer in self.layers:
            place, first = layer.advance()
            kept = layer.kept_states
            assert kept is not None, "`update` has asked"
            self.rows.append(SeenTokens(*kept, first, place + 1))

    def advance(self) -> int:
        """Before a replay: have tokens go behind what the caches hold now. Scores that attention will need room for."""
        if self._writes is None:
            return 0
        self._advance()
        for write, seen in zip(self._writes, self.rows, strict=True):
            write.go_to(seen)
        heads = max((job.heads for job in self.jobs), default=0)
        return heads * sum(seen.end - seen.first for seen in self.rows)

    def attend_with(self, scores: Tensor) -> None:
        """Have attention read what copies will write; that of other layers, too, which read this one's."""
        for job in self.jobs:
            job.attend_to(self.rows, scores)

    def seen(self) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
        """What the newest token of every sequence attends to, keys and values apart, [1, heads, T, D] each."""
        if not self.moves:
            return self._read
        with unrecorded():  # a recording keeps what it sees views of
            pairs = [layer.read(own.first, own.end) for layer, own in zip(self.layers, self.rows, strict=True)]
            return [key for key, _ in pairs], [value for _, value in pairs]

    def _append(self, key_states: Tensor, value_states: Tensor) -> None:
        self._read = self._appended(key_states, value_states)

    def _appended(self, key_states: Tensor, value_states: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        own = zip(self.layers, *(_apart(states, self.lengths) for states in (key_states, value_states)), strict=True)
        pairs = [layer.update(*states) for layer, *states in own]
        return [key for key, _ in pairs], [value for _, value in pairs]

    def hold(self, caches: Sequence[KVCache]) -> None:
        """Be a layer of these KV caches, or of none, from now on."""
        self.layers: list[KVLayer] = [cache.layers[self.number] for cache in caches]
        self.rows = list[SeenTokens]()  # what the newest token of each attends to
        self._read = [], []

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return max(layer.get_mask_sizes(query_length) for layer in self.layers)

    def get_seq_length(self) -> int:
        return max(layer.get_seq_length() for layer in self.layers)

    def get_max_length(self) -> int:
        return max(layer.get_max_length() for layer in self.layers)


def _attend(
    module: nn.Module, query: Tensor, key: _JointStates, value: _JointStates, mask: object, **options: Any
) -> tuple[Tensor, None]:
    """As transformers calls an attention: query [N, heads, 1, D] to [N, 1, heads, D], or that of prompts,
    [1, heads, T, D], to [1, T, heads, D]."""
    layer = key.layer
    if key.parts is not None and value.parts is not None:
        return _attend_apart(module, layer, (key.parts, value.parts), mask, options, query), None
    if layer.moves:
        keys, values = layer.seen()
        if own_attention_takes(module, query, keys, values, **options):
            return each_token(module, query, keys, values, jobs=layer.jobs, rows=layer.rows, **options)
    return called_again(functools.partial(_attend_apart, module, layer, None, mask, options), query), None


def _attend_apart(
    module: nn.Module,
    layer: _JointLayer,
    states: tuple[Sequence[Tensor], Sequence[Tensor]] | None,
    mask: object,
    options: dict[str, Any],
    query: Tensor,
) -> Tensor:
    keys, values = states or layer.seen()
    lengths = layer.lengths
    if lengths is None and layer.implementation in OWN_ATTENTION:
        return attend_to_each(module, query, keys, values, **options)[0]
    eager = eager_attention_of(module)
    attend = ALL_ATTENTION_FUNCTIONS.get_interface(layer.implementation, eager)
    own = list(zip(_apart(query, lengths), keys, values, strict=True))
    adds_masks = (attend is eager or layer.implementation == SINKS_NAME) and lengths is not None
    masks = [causal_mask(states[0]) if adds_masks else None for states in own]
    found = [attend(module, *states, mask, **options)[0] for states, mask in zip(own, masks, strict=True)]
    return torch.cat(found, dim=0 if lengths is None else 1)


def _no_mask(*_: Any, **__: Any) -> None:
    """A sequence's newest token sees all that its own KV cache gives."""


AttentionInterface.register(_NAME, _attend)
ALL_MASK_ATTENTION_FUNCTIONS.register(_NAME, _no_mask)


class JointStep:
    """Forwards of several sequences at once, a token or the prompt of each, by `forward`, the stock model's."""

    def __init__(self, model: StockModel, forward: StockForward, *, replays: bool) -> None:
        """`replays`: steps are recorded, and replayed."""
        self._weak, self._forward = weakref.ref(model), forward
        known = inspect.signature(forward).parameters
        self._knows_positions = "position_ids" in known
        self._checked = False
        self._replays = StepReplays(model) if replays else None
        self.why_alone = _why_alone(model)
        """Why this model computes one sequence at a time; None where it need not."""
        self.why_prompts_alone = self.why_alone or _why_prompts_alone(model, known)
        """Why prompts pass it one by one; None where they need not."""
        windows = [] if self.why_prompts_alone else windows_of(model.config)
        self._least_window = min((window for window in windows if window is not None), default=None)

    def __call__(
        self,
        tokens: Tensor,
        caches: Sequence[KVCache],
        positions: Tensor | None = None,
        reports: Sequence[GraphReport] = (),
    ) -> Tensor:
        """The logits [N, V] behind `tokens` [N, 1], the next ones of the sequences in `caches`; `positions` [N, 1] if
        they are not the lengths of these. `reports` are told how they were computed."""
        try:
            return self._logits(tokens, caches, positions, reports)
        except NotRecorded:  # `check` has seen that several pass all the same
            return self._logits(tokens, caches, positions, reports)

    def _logits(
        self, tokens: Tensor, caches: Sequence[KVCache], positions: Tensor | None, reports: Sequence[GraphReport]
    ) -> Tensor:
        model = self._weak()
        assert model is not None, "whoever decodes keeps it alive"
        embedding = model.get_input_embeddings()
        inputs: dict[str, Any] = {"input_ids": tokens}
        if self._replays is not None and hooks_on(embedding):  # which bring the rows of one that rests elsewhere
            with one_token_each(tokens):
                inputs = {"inputs_embeds": embedding(tokens)}
        if self._knows_positions:
            lengths = [[cache.get_seq_length()] for cache in caches]
            places = torch.tensor(lengths, dtype=torch.long, device=tokens.device)
            inputs["position_ids"] = places if positions is None else positions
        replays = self._replays
        return self._step(inputs, caches, []) if replays is None else replays(self._step, inputs, caches, reports)

    def _step(self, inputs: dict[str, Any], caches: Sequence[KVCache], keep: list[ReplayedLayer]) -> Tensor:
        return self._joint(inputs, caches, None, keep)[:, -1]

    def begin(self, mask: object) -> None:
        """A prompt has passed, with the caller's `mask`."""
        if self._replays is not None:
            padded = isinstance(mask, Tensor) and (mask.dim() != 2 or not bool(mask.all()))
            self._replays.begin("padded prompts" if padded else None)

    @property
    def replay_bytes(self) -> int:
        """Of what is kept for replays."""
        return 0 if self._replays is None else self._replays.nbytes

    def close(self) -> None:
        """Give back what is kept for replays."""
        if self._replays is not None:
            self._replays.close()

    def alone(self, arguments: Arguments, report: GraphReport) -> StockOutput | None:
        """The stock model's output for a forward with these `arguments` by a replay; None if that is not one of one
        token of one sequence, or nothing is recorded here."""
        if self._replays is None:
            return None
        reason = self.why_alone or self._replays.why_not or why_not_static(arguments)
        tokens: Tensor | None = arguments.get("input_ids")
        cache: Any = arguments.get(CACHE)
        if reason is None and (tokens is None or tokens.shape[0] != 1):
            reason = "embeddings in the place of tokens" if tokens is None else "several sequences in one KV cache"
        if reason is None and self._replays.waits(1):
            reason = NOT_YET
        if reason is not None or tokens is None:
            report.count(str(reason))
            return None
        try:
            logits = self._logits(tokens, [cache], arguments.get("position_ids"), [report])
        except NotRecorded as error:
            report.count(str(error))
            return None
        output: StockOutput = CausalLMOutputWithPast(logits=logits[:, None], **{CACHE: cache})
        return output

    def prompts(self, prompts: Sequence[Tensor], caches: Sequence[KVCache]) -> Tensor:
        """The logits [N, V] behind each of `prompts`, [1, T] each, the first tokens of the sequences in `caches`."""
        tokens, lengths = torch.cat(list(prompts), dim=1), [prompt.shape[1] for prompt in prompts]
        numbers = torch.arange(max(lengths), dtype=torch.long, device=tokens.device)
        last = torch.tensor(lengths, dtype=torch.long, device=tokens.device).cumsum(0) - 1
        positions = torch.cat([numbers[:length] for length in lengths])[None]
        inputs = {"input_ids": tokens, "position_ids": positions, "logits_to_keep": last}
        return self._joint(inputs, caches, lengths, [])[0]

    def _joint(
        self, inputs: dict[str, Any], caches: Sequence[KVCache], lengths: Lengths, keep: list[ReplayedLayer]
    ) -> Tensor:
        """The logits that a forward over `inputs` gives, [N, 1, V], or [1, N, V] behind prompts. What stands for layers
        of the caches is added to `keep`."""
        with self._attending_apart() as implementation, one_token_each(tokens_of(inputs)):
            layers = [
                _JointLayer(number, caches, implementation, lengths) if isinstance(own, KVLayer) else own
                for number, own in enumerate(caches[0].layers)
            ]
            keep += [layer for layer in layers if isinstance(layer, _JointLayer)]
            more = {CACHE: Cache(layers=layers), "use_cache": True, "return_dict": True}
            logits: Tensor = self._forward(**inputs, **more).logits
            return logits

    def fits_windows(self, tokens: int) -> bool:
        """Whether so many tokens of a prompt see each other in every layer: beyond, they need a mask."""
        return self._least_window is None or tokens <= self._least_window

    @contextlib.contextmanager
    def _attending_apart(self) -> Iterator[str]:
        """Inside, the model finds our attention in the place of its own, whose name this gives."""
        config = self._weak().config.get_text_config()  # type: ignore[union-attr]
        before = config._attn_implementation
        config._attn_implementation = _NAME
        try:
            yield before
        finally:
            config._attn_implementation = before

    def check(self, new_cache: Callable[[], KVCache], device: torch.device) -> None:
        """Once, let two sequences of two tokens pass alone and together, and say in `why_alone` if that is not the
        same: an architecture may do more with keys and values than attend to them. Their prompts, too, of two tokens
        and one, for `why_prompts_alone`."""
        if self._checked or self.why_alone is not None:
            return
        self._checked = True
        tokens = torch.tensor([[1], [2]], dtype=torch.long, device=device)
        alone, joint = ([new_cache(), new_cache()] for _ in range(2))

        def steps() -> tuple[Tensor, Tensor]:
            for caches in (alone, joint):
                self._alone(tokens.split(1), caches)
            return self._alone(tokens.split(1), alone), self(tokens, joint)

        def passes() -> tuple[Tensor, Tensor]:
            prompts = [torch.tensor([ids], dtype=torch.long, device=device) for ids in ([1, 2], [3])]
            caches = [new_cache() for _ in range(4)]
            return self._alone(prompts, caches[:2]), self.prompts(prompts, caches[2:])

        self.why_alone = _why_not_same(steps)
        self.why_prompts_alone = self.why_alone or self.why_prompts_alone or _why_not_same(passes)

    def _alone(self, tokens: Sequence[Tensor], caches: Sequence[KVCache]) -> Tensor:
        rows = [self._forward(input_ids=own, **{CACHE: cache}) for own, cache in zip(tokens, caches, strict=True)]
        return torch.cat([row.logits[:, -1] for row in rows])


def _why_not_same(compute: Callable[[], tuple[Tensor, Tensor]]) -> str | None:
    """Why what `compute` gives, the logits of sequences alone and together, is not the same; None if it is."""
    try:
        expected, found = compute()
    except Exception as error:  # whatever an architecture does with what it does not know
        return f"keys and values of several do not pass its attention: {one_line(error)}"
    scale = float(expected.float().abs().max())
    if torch.allclose(found.float(), expected.float(), atol=_CLOSE * scale, rtol=0):
        return None
    return "its layers give other numbers for several sequences than for each of them"


def _why_alone(model: StockModel) -> str | None:
    config = model.config
    if not can_cache(config) or state_kinds(config):
        return f"layers of kind {lasting_kinds(config) or state_kinds(config)} keep states"
    if not model._supports_attention_backend:
        return f"the attention of {config.model_type} is its own"
    return looks_at_length(config)


def _why_prompts_alone(model: StockModel, known: Collection[str]) -> str | None:
    """Of a model that computes several tokens together."""
    lacking = {"position_ids", "logits_to_keep"} - set(known)
    if lacking:
        return f"{model.config.model_type} takes no {' and no '.join(sorted(lacking))}"
    border = rope_border(model.config, type(model))
    if border is not None and border.moving:
        return f"rope kind {border.kind} turns positions by what has passed before"
    return None
