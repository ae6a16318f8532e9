"""The one model an evaluation has loaded at a time: to stream all layers for a simulation, or to generate."""

from collections.abc import Callable
from typing import Any

import torch

from griffin_offload.config import MIN_AUTO_CTX
from griffin_offload.errors import DoesNotFit
from griffin_offload.method.variant import Variant
from griffin_offload.runtime.model import GriffinModel
from griffin_offload.weights.checkpoint import Checkpoint


class ModelSlot:
    """Loads what is asked for, and gives back the memory of what was loaded before. `options` are `LoadConfig`'s."""

    def __init__(self, checkpoint: Checkpoint, options: dict[str, Any]) -> None:
        self._checkpoint = checkpoint
        self._options = options | {"quantize": checkpoint.precision}
        self._model: GriffinModel | None = None
        self._purpose: Variant | None = None

    def streaming(self) -> GriffinModel:
        """A model without resident neurons. Its plan's context does not matter: a simulation has no KV cache."""
        ctx_tokens = min(MIN_AUTO_CTX, getattr(self._checkpoint.config, "max_position_embeddings", MIN_AUTO_CTX))
        if self._model is None or self._purpose is not None:
            self._load(None, ctx_tokens, ctx_tokens, density=0.0, always_stream=True)
        assert self._model is not None
        return self._model

    def generating(self, variant: Variant, prompt_tokens: int, ctx_tokens: int) -> GriffinModel:
        """A model with the neurons of `variant` resident, for prompts and answers of these lengths. The full model,
        where it does not fit, answers in exact mode."""
        plan = self._model.plan if self._model is not None and self._purpose == variant else None
        if plan is None or plan.context_tokens < ctx_tokens or plan.prompt_tokens < prompt_tokens:
            kept = {"density": variant.density, "selection": variant.selection}
            try:
                self._load(variant, prompt_tokens, ctx_tokens, **kept)
            except DoesNotFit:
                if variant.density < 1:
                    raise
                self._load(variant, prompt_tokens, ctx_tokens, exact=True)
        assert self._model is not None
        return self._model

    def close(self) -> None:
        """Give back the memory."""
        if self._model is not None:
            self._model.close()
        self._model = None

    def _load(self, purpose: Variant | None, prompt_tokens: int, ctx_tokens: int, **kept: Any) -> None:
        self.close()
        options = self._options | kept | {"prompt_tokens": prompt_tokens, "ctx_size": ctx_tokens}
        self._model = GriffinModel.from_pretrained(self._checkpoint.directory, **options)
        self._purpose = purpose


class Standin:
    """What lm-eval asks of a transformers model, before any is loaded."""

    device = torch.device("cpu")
    """Where requests are made; the runtime moves them."""

    def __init__(self, checkpoint: Checkpoint, generate: Callable[..., Any]) -> None:
        self.config, self.dtype, self.generate = checkpoint.config, checkpoint.dtype, generate
        self.name_or_path = str(checkpoint.directory)
