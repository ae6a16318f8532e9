"""A CUDA graph's behaviour on the CPU: operators are recorded once, with the tensors they read and write, and replayed
without Python. What a capture forbids, reading the device and bringing data from the host, fails here, too."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

_aten = torch.ops.aten
_FORBIDDEN = {
    _aten._local_scalar_dense.default,  # .item(), bool(), int()
    _aten.lift_fresh.default,  # torch.tensor of Python numbers
    _aten.nonzero.default,
    _aten.masked_select.default,
    _aten.equal.default,
}


class OpRecorder:
    """Records as `CudaRecorder` does; `recorded` counts operators of each recording."""

    def __init__(self) -> None:
        self.recorded: list[int] = []
        self.warmed_up = 0

    def warm_up(self, function: Callable[[], None]) -> None:
        self.warmed_up += 1
        function()

    def record(self, function: Callable[[], None]) -> Callable[[], None]:
        recording = _Recording()
        with recording:
            function()
        self.recorded.append(len(recording.calls))
        return recording.replay


class _Recording(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any, Any, Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _FORBIDDEN:
            raise RuntimeError(f"operation not permitted when stream is capturing: {func}")
        result = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, result))
        return result

    def replay(self) -> None:
        made: dict[int, Tensor] = {}

        def now(value: Any) -> Any:
            """Operators take tensors, numbers and lists of them: a tree's own functions would cost more than they."""
            if isinstance(value, Tensor):
                return made.get(id(value), value)
            return [now(part) for part in value] if isinstance(value, (list, tuple)) else value

        for func, args, kwargs, recorded in self.calls:
            result = func(*now(args), **{name: now(value) for name, value in kwargs.items()})
            for old, new in zip(_parts(recorded), _parts(result), strict=True):
                if isinstance(old, Tensor):
                    made[id(old)] = new


def _parts(result: Any) -> Sequence[Any]:
    return result if isinstance(result, (list, tuple)) else (result,)
