"""Decode on the CPU by replays: a step is recorded once, and later ones are its operators and kernels without Python's
modules, which take a small model's token as long as its weights do.

A recording serves all prompts and KV caches: weights stay where they are, keys and values are looked for anew before
every replay. What cannot be recorded is computed as ever, and the report says why.
"""

import time
import weakref
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from griffin_offload.engine.decode_graph import hooked, settings_of
from griffin_offload.engine.generation import tokens_of
from griffin_offload.engine.model_interface import one_token_each
from griffin_offload.engine.report import GraphReport
from griffin_offload.errors import GriffinError, one_line
from griffin_offload.kernels.attention import AS_THEY_COME, KeptStates, KeptToken, SeenTokens, kernels_know
from griffin_offload.kernels.library import library
from griffin_offload.kernels.recording import recorded, unrecorded
from griffin_offload.kernels.small_operators import COPY, elementwise_job, elementwise_knows, point_copy
from griffin_offload.kv_cache.kv_cache import KVCache
from griffin_offload.transformers_api import StockModel

MOST_KEPT = 4
"""Numbers of sequences of which a step is kept: those that join for a while leave again."""
_FEWEST_STEPS = 6
"""So many of its kind are computed before a step is recorded, which takes as long as a few."""
NOT_YET = "not recorded yet"
_PLAIN = (Tensor, nn.Parameter)


class ReplayedLayer(Protocol):
    """What stands for the same layer of several KV caches while a step is computed."""

    def hold(self, caches: Sequence[KVCache]) -> None:
        """Be a layer of these from now on, or of none."""

    def advance(self) -> int:
        """Before a replay: have tokens go behind what is there. Scores that attention will need room for."""

    def attend_with(self, scores: Tensor) -> None:
        """Have attention read what is there then."""


Step = Callable[[dict[str, Any], Sequence[KVCache], list[ReplayedLayer]], Tensor]
"""The logits [N, V] for inputs and KV caches; layers in the place of theirs are added to the list."""


class TokenWrite:
    """A token's key and value, [heads, D] each, which a recording knows, become a sequence's newest, another one every
    time."""

    def __init__(self, key: Tensor, value: Tensor, seen: SeenTokens) -> None:
        pairs = zip((key, value), seen[:2], strict=True)
        self._writes = [
            (_MovingCopy if kept.kind == AS_THEY_COME else KeptToken)(states, kept, seen.end - 1)
            for states, kept in pairs
        ]

    @staticmethod
    def knows(tokens: Sequence[Tensor], kept: Sequence[KeptStates]) -> bool:
        """Whether there is one for keys and values [N, heads, 1, D], and for what a sequence keeps."""
        return all(
            elementwise_knows(states, *own.parts) if own.kind == AS_THEY_COME else kernels_know(own, states)
            for states, own in zip(tokens, kept, strict=True)
        )

    def go_to(self, seen: SeenTokens) -> None:
        """The next one is this sequence's."""
        for write, kept in zip(self._writes, seen[:2], strict=True):
            write.go_to(kept, seen.end - 1)


class _MovingCopy:
    """To keys or values that lie as they come."""

    def __init__(self, token: Tensor, states: KeptStates, place: int) -> None:
        own = library()
        assert own is not None, "`elementwise_knows` was asked"
        with unrecorded():  # a recording keeps what it sees views of
            self._job = elementwise_job(COPY, states.parts[0][0, :, place], token)
        own.call("elementwise", self._job)

    def go_to(self, states: KeptStates, place: int) -> None:
        (numbers,) = states.parts
        _, head_step, token_step, _ = numbers.stride()
        point_copy(self._job, numbers.data_ptr() + place * token_step * numbers.itemsize, head_step)


class _Scores:
    """Room for those of attention, which recordings that never compute at the same time have in common."""

    def __init__(self) -> None:
        self.buffer = torch.empty(0, dtype=torch.float32, device="cpu")

    def of(self, numbers: int) -> Tensor:
        """For at least so many; a little more, so that not every token asks for memory."""
        if numbers > self.buffer.numel():
            self.buffer = torch.empty(numbers + numbers // 8, dtype=torch.float32, device="cpu")
        return self.buffer


class _RecordedStep:
    """A token of each of some sequences, recorded for whichever KV caches hold these."""

    def __init__(self, inputs: dict[str, Any], caches: Sequence[KVCache], step: Step, places: object) -> None:
        self._inputs = {name: tensor.clone() for name, tensor in inputs.items()}
        self._layers = list[ReplayedLayer]()
        self.places = places
        """Where the model's weights lay."""
        self.tried = False
        """Whether a replay was compared with what it replays."""
        with recorded() as self._recording:
            self._logits = step(self._inputs, caches, self._layers)
        self._hold([])

    @property
    def why_not(self) -> str | None:
        """Why there can be no replay."""
        return self._recording.why_not

    @property
    def nbytes(self) -> int:
        return self._recording.nbytes

    @property
    def tables(self) -> list[Tensor]:
        """That it reads, with others."""
        return list(self._recording.tables.values())

    @property
    def logits(self) -> Tensor:
        """Of the last time [N, V]: a copy, those of the next one are written over them."""
        return self._logits.clone()

    def __call__(self, inputs: dict[str, Any], caches: Sequence[KVCache], scores: _Scores) -> Tensor:
        for name, own in self._inputs.items():
            own.copy_(inputs[name])
        self._hold(caches)
        try:
            room = scores.of(max((layer.advance() for layer in self._layers), default=0))
            for layer in self._layers:
                layer.attend_with(room)
            with one_token_each(tokens_of(inputs)):
                self._recording.replay()
        finally:
            self._hold([])
        return self.logits

    def _hold(self, caches: Sequence[KVCache]) -> None:
        for layer in self._layers:
            layer.hold(caches)


def _key(inputs: dict[str, Any], caches: Sequence[KVCache]) -> tuple[int, str]:
    """What a step is recorded for: so many sequences, and inputs of those names."""
    return len(caches), " ".join(inputs)


class NotRecorded(RuntimeError):
    """A step could not be recorded, and nothing has happened."""


def _forget_behind(cache: KVCache, tokens: int) -> None:
    """Forget what a forward wrote behind so many tokens: in layers that it came to."""
    for layer in cache.kept:
        layer.crop(min(tokens - layer.get_seq_length(), 0))


class StepReplays:
    """Steps by replays, for each number of sequences. After a few, one is recorded, and the next computed twice, by a
    replay and as ever: what is not the same to the last bit is not replayed any more."""

    def __init__(self, model: StockModel) -> None:
        self._weak = weakref.ref(model)
        self._recorded: dict[tuple[int, str], _RecordedStep] = {}
        self._steps: dict[int, int] = {}
        """Those that were computed before any of so many sequences was recorded."""
        self._reason: str | None = None
        self._prompt_reason: str | None = "no prompt has passed"
        self._settings = list[object]()
        self._weights: list[dict[str, Any]] = []
        self._scores = _Scores()

    @property
    def why_not(self) -> str | None:
        """Why a step is not replayed."""
        return self._reason or self._prompt_reason

    @property
    def nbytes(self) -> int:
        """Of all that is kept for replays."""
        steps = self._recorded.values()
        tables = {table.data_ptr(): table.nbytes for step in steps for table in step.tables}
        return self._scores.buffer.nbytes + sum(step.nbytes for step in steps) + sum(tables.values())

    def waits(self, rows: int) -> bool:
        """Whether a step of so many sequences is not to be recorded yet, of which this is one."""
        if any(known == rows for known, _ in self._recorded):
            return False
        self._steps[rows] = self._steps.get(rows, 0) + 1
        return self._steps[rows] < _FEWEST_STEPS

    def begin(self, reason: str | None) -> None:
        """A prompt has passed; for a `reason` its answer is not replayed."""
        model = self._weak()
        assert model is not None, "whoever decodes keeps it alive"
        without = model.get_input_embeddings()  # whose rows are given
        self._prompt_reason = reason
        if reason is None and hooked(model, without):
            self._prompt_reason = "hooks on the model's modules"
        before, self._settings = self._settings, settings_of(model)
        if before != self._settings:  # by whoever has the model between two answers
            self._recorded.clear()
            self._reason = None
        self._weights = [own for module in model.modules() for own in (module._parameters, module._buffers) if own]

    def close(self) -> None:
        """Give the memory back."""
        self._recorded.clear()
        self._scores = _Scores()
        self._weights, self._prompt_reason = [], "the model is closed"

    def __call__(
        self, step: Step, inputs: dict[str, Any], caches: Sequence[KVCache], reports: Sequence[GraphReport]
    ) -> Tensor:
        """What `step` gives; `reports` are those of the answers that are decoded."""
        reason = self.why_not or ("gradients" if torch.is_grad_enabled() else None)
        if reason is None and len(caches) > 1 and self.waits(len(caches)):
            reason = NOT_YET
        if reason is not None:
            for report in reports:
                report.count(reason)
            return step(inputs, caches, [])
        key, places = _key(inputs, caches), self._places()
        found = self._recorded.pop(key, None)
        if found is None or found.places != places:
            own = self._recorded.items()  # others of weights that lay elsewhere would keep these
            self._recorded = {key: step for key, step in own if step.places == places}
            return self._record(step, inputs, caches, places, reports)
        self._recorded[key] = found
        logits = found(inputs, caches, self._scores)
        for report in reports:
            report.replayed, report.kept_bytes = report.replayed + 1, self.nbytes
        return logits if found.tried else self._tried(found, step, inputs, caches, logits)

    def _places(self) -> tuple[object, ...]:
        """Where everything lies that a replay reads of the model, and how many threads compute."""
        owns = (own for weights in self._weights for own in weights.values() if own is not None)
        return torch.get_num_threads(), *(own.data_ptr() if type(own) in _PLAIN else id(own) for own in owns)

    def _record(
        self,
        step: Step,
        inputs: dict[str, Any],
        caches: Sequence[KVCache],
        places: object,
        reports: Sequence[GraphReport],
    ) -> Tensor:
        while len(self._recorded) >= MOST_KEPT:
            self._recorded.pop(next(iter(self._recorded)))
        start, before = time.perf_counter(), [cache.get_seq_length() for cache in caches]
        try:
            new = _RecordedStep(inputs, caches, step, places)
        except (GriffinError, MemoryError):
            raise
        except Exception as error:  # whatever an architecture does with keys and values that it does not know
            self._reason = f"keys and values do not pass its attention as they are: {one_line(error)}"
            for cache, tokens in zip(caches, before, strict=True):
                _forget_behind(cache, tokens)
            raise NotRecorded(self._reason) from error
        for report in reports:
            report.captured += 1
            report.capture_s += time.perf_counter() - start
        self._reason = new.why_not
        if self._reason is None and self._places() != places:
            self._reason = "its forward replaces tensors of the model"
        if self._reason is None:
            self._recorded[_key(inputs, caches)] = new
        return new.logits

    def _tried(
        self, found: _RecordedStep, step: Step, inputs: dict[str, Any], caches: Sequence[KVCache], logits: Tensor
    ) -> Tensor:
        for cache in caches:
            _forget_behind(cache, cache.get_seq_length() - 1)
        expected = step(inputs, caches, [])
        found.tried = torch.equal(expected, logits)
        if not found.tried:
            self._recorded.clear()
            self._reason = "a replay gave other numbers"
        return expected
