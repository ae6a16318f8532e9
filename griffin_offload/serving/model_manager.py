"""The loaded model: loaded when it is needed, as it was the first time, and given back when it is not;
and the contexts that it keeps."""

import contextlib
import functools
import gc
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor

from griffin_offload.config import LoadConfig
from griffin_offload.devices.memory import Ledger, give_back_freed
from griffin_offload.engine.generation import end_tokens
from griffin_offload.engine.layer_pass import DecoderLayers
from griffin_offload.engine.model import GriffinModel
from griffin_offload.engine.spec import examine, plan_for
from griffin_offload.errors import GriffinError, ModelError
from griffin_offload.kv_cache.sequence import Context
from griffin_offload.method.selection import neurons_kept
from griffin_offload.planner.plan import Plan
from griffin_offload.planner.tiers import options_again
from griffin_offload.serving.api_errors import ApiError
from griffin_offload.serving.requests import NO_PENALTIES, Request, sampling_of
from griffin_offload.transformers_api import Tokenizer
from griffin_offload.units import parse_size

# Contexts of earlier requests, kept as far as the budget goes: a request that continues one computes only the rest.


class PrefixCache:
    """Contexts that no request uses at the moment, the longest unused first.

    Besides one context, which the plan has counted as the one in use, they take at most `limit_bytes`, and are at
    most `most`.
    """

    def __init__(self, new_context: Callable[[], Context], limit_bytes: int, most: int) -> None:
        self._new_context, self.limit_bytes, self._most = new_context, limit_bytes, most
        self._kept: list[Context] = []
        self._beside_bytes = 0

    def __len__(self) -> int:
        return len(self._kept)

    @property
    def nbytes(self) -> int:
        return sum(context.nbytes for context in self._kept)

    def take(self, ids: Tensor, *, exact: bool, beside_bytes: int = 0) -> Context:
        """The context that knows the longest start of the prompt `ids` [T], or one that knows nothing. The others are
        within the limit afterwards, together with the `beside_bytes` of those that others decode with, and the caller
        gives it back by `keep`."""
        self._beside_bytes = beside_bytes
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
        return self.nbytes + self._beside_bytes > self.limit_bytes or len(self._kept) > self._most

    def _worth(self, context: Context, known: int) -> bool:
        """Whether a prompt that shares so many tokens may have `context`, which is cut back to them: a long
        conversation is not given for its first question, while there is room for both."""
        if known == 0:
            return False
        return 2 * known >= len(context.tokens) or self._full

    def _evict(self) -> Context | None:
        """Drop the longest unused until the rest is within the limit; the last one that went."""
        evicted = None
        while self._kept and self._full:
            evicted = self._kept.pop(0)
        return evicted


@dataclass
class LoadedModel:
    """A model on the device, and the contexts that belong to it."""

    model: GriffinModel
    sessions: PrefixCache | None
    """None for models of which no context can be kept."""

    @functools.cached_property
    def chat_ends(self) -> frozenset[int]:
        """Tokens that end an answer in a chat."""
        return self._ends(chat=True)

    @functools.cached_property
    def text_ends(self) -> frozenset[int]:
        """Tokens that end the completion of a text."""
        return self._ends(chat=False)

    def _ends(self, *, chat: bool) -> frozenset[int]:
        model = self.model
        return frozenset(end_tokens(model.tokenizer, model.generation_config, model.engine.shape.vocab_size, chat=chat))

    @property
    def budget_bytes(self) -> int:
        """Of the device's memory."""
        return self.model.plan.budget_bytes

    @property
    def ledger(self) -> Ledger:
        """Of what was held of it, answers that were given up included."""
        return self.model.engine.loaded.ledger

    @property
    def host_budget_bytes(self) -> int:
        """What was allowed of the host's memory; 0 if nothing was said."""
        if self.model.hardware.shares_host_memory:
            return self.model.plan.budget_bytes
        allowed = self.model.engine.loaded.layers.config.max_cpu_mem
        if allowed is None:
            return 0
        host = psutil.virtual_memory()
        return parse_size(allowed, total_bytes=host.total, free_bytes=host.available)

    def figures(self) -> dict[str, Any]:
        """The plan, what requests get that say nothing, and which neurons are there: what is told of the model."""
        model, layers = self.model, self.model.engine.loaded.layers
        return {
            "device": model.hardware.name,
            "chat": model.tokenizer.chat_template is not None,
            "plan": model.plan.to_json(),
            "peak_bytes": self.ledger.peak_bytes,
            "defaults": sampling_of(Request("chat"), model.generation_config) | {"exact": layers.config.exact},
            "residents": {"unit": "experts" if layers.experts else "neurons", "layers": residents_by_part(layers)},
        }


_PARTS = 64


def residents_by_part(layers: DecoderLayers) -> list[list[int]]:
    """Of each layer, per cent of the neurons of each 64th that are on the device, or of every expert where there are
    fewer; [100] where all are."""
    found = []
    for index, block in enumerate(layers.blocks):
        if index not in layers.compact:
            found.append([100])
            continue
        cache, parts = layers.experts.get(index), min(_PARTS, block.neurons)
        there = layers.selected.get(index, torch.empty(0, dtype=torch.int64, device="cpu"))
        if cache is not None:
            there = torch.tensor(cache.residents, dtype=torch.int64, device="cpu")
        every = torch.arange(block.neurons, dtype=torch.int64, device="cpu")
        of_part, all_of_part = (
            (one.cpu() * parts // block.neurons).bincount(minlength=parts) for one in (there, every)
        )
        found.append((100 * of_part / all_of_part).round().int().tolist())
    return found


class ModelManager:
    """Belongs to the worker's thread. `options` are `LoadConfig`'s.

    What the planner solved when the model was loaded first (density, precision, context) stays: a later load fits the
    same budget, or fails. A request may name another density; the model is loaded anew for it, and again for the next
    request that names none. `tokenizer` is the model's where somebody has loaded it.
    """

    def __init__(
        self, model: str | Path, options: Mapping[str, object], most_sessions: int, tokenizer: Tokenizer | None = None
    ) -> None:
        self._model, self._options = model, dict(options) | {"keep_prompts": True}
        self._most_sessions = most_sessions
        self._neurons: list[int] = []
        self._kept_first: tuple[int, ...] = ()
        self.held: LoadedModel | None = None
        self._tokenizer = tokenizer
        self.loads = 0
        self.unusable = False
        """Whether the last attempt to load failed."""

    def first(self) -> LoadedModel:
        """Load, and fix what was solved. Any GriffinError of loading."""
        held = self._load(self._options)
        _warn_of_penalties(held.model.generation_config)
        model, plan = held.model, held.model.plan
        shape = model.engine.shape
        self._neurons, self._kept_first = [layer.neurons for layer in shape.layers], plan.kept
        self._model = model.directory
        self._options |= {
            "max_gpu_mem": plan.budget_bytes,
            **options_again(shape, plan.counts),
            "ctx_size": plan.context_tokens,
            "kv_bits": plan.kv_bits,
            "session_mem": plan.decode_parts["sessions"] or None,
        }
        if model.hardware.shares_host_memory:
            self._options["max_cpu_mem"] = None
        return held

    def get(self, density: float | None) -> LoadedModel:
        """The model, at `density` or the one that it was first loaded with. ApiError 400 with the numbers, and nothing
        is changed, if that density does not fit; 503 if loading fails."""
        options, wanted = dict(self._options), self._kept_first
        if density is not None and self._kept(density) != wanted:
            options["density"], wanted = density, self._kept(density)
        if self.held is not None and self.held.model.plan.kept == wanted:
            return self.held
        if density is not None:
            self._check_plan(options, density)
        self.unload()
        try:
            return self._load(options)
        except GriffinError as error:
            self.unusable = True
            self.unload()
            # Files may have changed or gone; their paths are nothing for clients.
            reason = "its checkpoint cannot be used any more" if isinstance(error, ModelError) else str(error)
            raise ApiError(503, f"the model cannot be loaded: {reason}", code="model_unavailable") from error

    def is_held(self, density: float | None) -> bool:
        """Whether the model is there, at `density` or the one that it was first loaded with."""
        wanted = self._kept_first if density is None else self._kept(density)
        return self.held is not None and self.held.model.plan.kept == wanted

    def unload(self) -> None:
        """Give the model's memory back."""
        if self.held is None:
            return
        hardware = self.held.model.hardware
        if self.held.sessions is not None:
            self.held.sessions.drop_all()
        self.held.model.close()
        self.held = None
        gc.collect()
        hardware.empty_cache()
        give_back_freed()

    def _kept(self, density: float) -> tuple[int, ...]:
        return tuple(neurons_kept(neurons, density) for neurons in self._neurons)

    def _check_plan(self, options: dict[str, Any], density: float) -> None:
        try:
            plan_for(examine(self._model, LoadConfig(**options)))
        except ModelError as error:
            raise ApiError(503, "the model's checkpoint cannot be used any more", code="model_unavailable") from error
        except GriffinError as error:
            raise ApiError(400, f"density {density:g}: {error}", param="density", code="does_not_fit") from error

    def _load(self, options: dict[str, object]) -> LoadedModel:
        model = GriffinModel.from_pretrained(self._model, **options)
        if self._tokenizer is None:
            self._tokenizer = model.tokenizer  # the encoder's, too, so it stays when the model goes
        model.tokenizer = self._tokenizer
        self.loads, self.unusable = self.loads + 1, False
        sessions = None
        with contextlib.suppress(GriffinError):  # layers whose past cannot be taken back: every prompt from its start
            model.new_context()
            sequences = model.engine.model_spec.request.sequences
            sessions = PrefixCache(
                partial(model.new_context, 1), session_limit(model.plan, sequences), self._most_sessions
            )
        self.held = LoadedModel(model, sessions)
        return self.held


def _warn_of_penalties(settings: object) -> None:
    found = {name: getattr(settings, name, None) for name in NO_PENALTIES}
    asked = [f"{name} {value}" for name, value in found.items() if value not in (None, NO_PENALTIES[name])]
    if asked:
        what = f"the checkpoint's generation settings ask for {', '.join(asked)}"
        warnings.warn(f"{what}: the server leaves out what no request asks for", stacklevel=2)


def session_limit(plan: Plan, sequences: int = 1) -> int:
    """Bytes for contexts beside the one in use: what was set aside for them, what was planned for the others of so many
    `sequences` at once, and what the plan has left over."""
    others = sum(plan.parts[part] * (sequences - 1) // sequences for part in ("kv_cache", "statistic"))
    return plan.budget_bytes - plan.peak_bytes + plan.parts["sessions"] + others
