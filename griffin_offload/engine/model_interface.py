"""What transformers, and programs written for it, ask of a model: answered for a `GriffinModel` by its stock model.

An explicit list, from what pipelines, assisted decoding and common helpers use (docs/transformers_habits.md). Anything
else is an AttributeError that names `.model`.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from griffin_offload.errors import UsageError

_READ = (
    "config",
    "dtype",
    "name_or_path",
    "main_input_name",
    "base_model_prefix",
    "input_modalities",
    "output_modalities",
    "framework",
    "training",
    "_supports_logits_to_keep",
)
_CALLED = (
    "can_generate",
    "num_parameters",
    "get_memory_footprint",
    "get_input_embeddings",
    "get_output_embeddings",
    "compute_transition_scores",
    "save_pretrained",
    "push_to_hub",
    "state_dict",
)
DELEGATED = (*_READ, *_CALLED)
"""Names that a `GriffinModel` answers with what its stock model has under them."""


class StockInterface:
    """The face of a transformers model; `model` is the stock one."""

    @property
    def model(self) -> Any:
        raise NotImplementedError

    @property
    def _stock(self) -> Any:
        """The stock model, whose residents may still be on their way."""
        raise NotImplementedError

    def __getattr__(self, name: str) -> Any:
        if name in DELEGATED:
            return getattr(self._stock if name in _READ else self.model, name)
        if not name.startswith("_") and "_engine" in self.__dict__ and hasattr(self._stock, name):
            raise AttributeError(f"a GriffinModel has no {name!r}: the stock transformers model has, use .model.{name}")
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """One forward, as the stock model's: streamed with an empty KV cache, resident with a filled one."""
        named = {name: self._on_device(value) for name, value in kwargs.items()}
        return self.model(*map(self._on_device, args), **named)

    forward = __call__

    def _on_device(self, value: Any) -> Any:
        return value.to(self._stock.device) if isinstance(value, torch.Tensor) else value

    @property
    def generation_config(self) -> Any:
        """The defaults for `generate`: at first the checkpoint's."""
        return self._stock.generation_config

    @generation_config.setter
    def generation_config(self, config: Any) -> None:
        self._stock.generation_config = config

    def eval(self) -> Any:
        """Nothing: a loaded model is for inference."""
        return self

    def train(self, mode: bool = True) -> Any:
        """UsageError but for train(False), which is `eval`."""
        if mode:
            raise UsageError(
                "this model cannot be trained: its neurons change with every prompt; train it in transformers"
            )
        return self

    def requires_grad_(self, requires_grad: bool = True) -> Any:
        """UsageError but for requires_grad_(False), which is so already."""
        return self.train(requires_grad)

    def to(self, *args: Any, **kwargs: Any) -> Any:
        """The model, if that is its device and precision; UsageError with the options that choose them otherwise."""
        self._stock.to(*args, **kwargs)
        return self

    def cpu(self) -> Any:
        """As `to`."""
        return self.to("cpu")

    def cuda(self, device: Any = None) -> Any:
        """As `to`."""
        return self.to(torch.device("cuda", device) if isinstance(device, int) else device or "cuda")

    def half(self) -> Any:
        """As `to`."""
        return self.to(torch.float16)

    def float(self) -> Any:
        """As `to`."""
        return self.to(torch.float32)

    def bfloat16(self) -> Any:
        """As `to`."""
        return self.to(torch.bfloat16)

    def parameters(self, recurse: bool = True) -> Iterator[nn.Parameter]:
        """The residents: of pruned layers the last prompt's neurons."""
        found: Iterator[nn.Parameter] = self.model.parameters(recurse)
        return found

    def named_parameters(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, nn.Parameter]]:
        """As `parameters`."""
        found: Iterator[tuple[str, nn.Parameter]] = self.model.named_parameters(*args, **kwargs)
        return found

    def __deepcopy__(self, _: Any) -> Any:
        raise UsageError("a loaded model cannot be copied or pickled: load it once more with from_pretrained")

    def __reduce_ex__(self, _: Any) -> Any:
        raise UsageError("a loaded model cannot be copied or pickled: load it once more with from_pretrained")
