"""Stock models built in one thread while others do what they like, and parameters installed without hooks of others.

torch's default type belongs to the whole process: transformers sets it while it builds a model, in any thread, and so
a model that is built meanwhile is of two types. Loads of ours take turns; the type that this thread's tensors get is
named for them.
"""

import contextlib
import threading
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

# Modes of torch that a caller may be in and that must not reach the weights or what outlives a call.


@contextlib.contextmanager
def own_modes(device: torch.device) -> Iterator[None]:
    """No gradients, no inference mode, no autocast inside, whatever the caller's are.

    Tensors made in inference mode (residents, KV caches) could not be written to outside of it; and autocast would
    compute in another precision than the one that was planned and loaded (`dtype`).
    """
    with contextlib.ExitStack() as modes:
        modes.enter_context(torch.inference_mode(False))
        modes.enter_context(torch.no_grad())
        for kind in {"cpu", device.type}:
            if torch.is_autocast_enabled(kind):
                modes.enter_context(torch.autocast(kind, enabled=False))
        yield


_alone = threading.RLock()
_MAKERS = frozenset((torch.empty, torch.zeros, torch.ones, torch.rand, torch.randn))
"""What parameters are made by."""


class _Typed(TorchFunctionMode):
    """Names the type of this thread's tensors that leave it to the process's default."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self._dtype = dtype

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        named = dict(kwargs or {})
        if func in _MAKERS and named.get("out") is None and named.get("dtype") is None:
            named["dtype"] = self._dtype
        return func(*args, **named)


@contextlib.contextmanager
def building(dtype: torch.dtype) -> Iterator[None]:
    """Inside, transformers builds a model of `dtype` in host memory, whatever other threads set meanwhile and whatever
    device this thread has made its default; one thread at a time."""
    with _alone, torch.device("cpu"), _Typed(dtype):
        yield


@contextlib.contextmanager
def parameters_on_meta() -> Iterator[None]:
    """Inside, this thread's modules hold parameters without memory; buffers are real. accelerate's init_empty_weights
    does it to the modules of every thread: of a model, say, that is generating."""
    me, stock = threading.get_ident(), nn.Module.register_parameter

    def register(self: nn.Module, name: str, param: nn.Parameter | None) -> None:
        stock(self, name, param)
        if param is not None and threading.get_ident() == me:
            self._parameters[name] = nn.Parameter(param.to("meta"), requires_grad=param.requires_grad)

    with _alone:
        nn.Module.register_parameter = register  # type: ignore[method-assign]
        try:
            yield
        finally:
            nn.Module.register_parameter = stock  # type: ignore[method-assign]


def put(module: nn.Module, name: str, tensor: Tensor) -> None:
    """Make `tensor` the parameter `name` of `module`, which has one of this name, or None. Assigning it would ask
    `register_parameter`, which other threads may have replaced."""
    parameter = tensor if isinstance(tensor, nn.Parameter) else nn.Parameter(tensor, requires_grad=False)
    module._parameters[name] = parameter
