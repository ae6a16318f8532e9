"""Embeddings that stay on the host: looked up there, only the rows of the tokens at hand are moved."""

from typing import Any

import torch
from torch import Tensor, nn

from griffin_offload.weights.pages import FilePages


class HostEmbedding:
    """Hooks on the stock embedding module, for the life of the model; counts the bytes of the rows it reads.

    A lookup raises CheckpointChanged when the file that the rows rest in was written to or cut since."""

    def __init__(self, module: nn.Module, device: torch.device, dtype: torch.dtype) -> None:
        self._device, self._dtype = device, dtype
        self._pages = FilePages(list(module.parameters()), evict=False)
        self.row_bytes = 0
        # A plain tensor: transformers takes a model's device from its first parameter, and moves inputs there.
        for name, parameter in list(module._parameters.items()):  # a quantised one has scales, too
            if parameter is not None:
                del module._parameters[name]
                setattr(module, name, parameter.detach())
        module.register_forward_pre_hook(self._to_host)
        module.register_forward_hook(self._to_device)

    def _to_host(self, module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (args[0].to("cpu"), *args[1:])

    def _to_device(self, module: nn.Module, args: Any, rows: Tensor) -> Tensor:
        self._pages.files.check_contents()
        self.row_bytes += rows.nbytes
        return rows.to(device=self._device, dtype=self._dtype)

    def close(self) -> None:
        """Close the file."""
        self._pages.close()
