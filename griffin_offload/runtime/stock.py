"""The stock model as it is handed out: its forward is the engine's, it keeps all that it needs alive and nothing keeps
it, and what would break it is refused by name.

The stock model owns the engine (by its forward), and whatever must not outlive the stock model refers to it weakly: no
cycle, so that weights go when the last name of the model goes. Methods are replaced on the instance, never on
transformers' classes.
"""

import inspect
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from griffin_offload.errors import GriffinError, UsageError
from griffin_offload.runtime.memory import give_back_freed


def stock_forward(model: Any) -> Callable[..., Any]:
    """The forward of `model`'s class, for `model`, which it does not keep alive."""
    weak, function = weakref.ref(model), type(model).forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        return function(weak(), *args, **kwargs)

    forward.__signature__ = inspect.signature(model.forward)  # type: ignore[attr-defined]
    return forward


class _Method:
    """Takes a method's place on an instance, with the stock one's signature, which generate reads."""

    def __init__(self, function: Callable[..., Any], stock: Any) -> None:
        self._function = function
        self.__signature__, self.__name__, self.__doc__ = inspect.signature(stock), stock.__name__, stock.__doc__

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._function(*args, **kwargs)


def hand_out(model: Any, forward: Callable[..., Any], why_not_saved: Callable[[], str | None]) -> None:
    """Give `model` the engine's `forward`, and methods that refuse what cannot work. `why_not_saved` says why its
    parameters are no checkpoint, if they are none."""
    weak, kind = weakref.ref(model), type(model)

    def save_pretrained(*args: Any, **kwargs: Any) -> Any:
        reason = why_not_saved()
        if reason is not None:
            raise UsageError(f"this model cannot be saved: {reason}")
        return kind.save_pretrained(weak(), *args, **kwargs)

    def state_dict(*args: Any, **kwargs: Any) -> Any:
        reason = why_not_saved()
        if reason is not None:
            raise UsageError(f"this model has no state_dict: {reason}")
        return kind.state_dict(weak(), *args, **kwargs)

    def apply(function: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        return _unmoved(weak(), function)

    def copied(*_: Any) -> Any:
        raise UsageError("a loaded model cannot be copied or pickled: load it once more with from_pretrained")

    own = {"forward": forward, "save_pretrained": save_pretrained, "state_dict": state_dict, "_apply": apply}
    for name, function in own.items():
        model.__dict__[name] = _Method(function, getattr(model, name))
    for name in ("__deepcopy__", "__reduce_ex__"):
        model.__dict__[name] = copied
    model.__dict__["_griffin_offload_last"] = _Last()  # behind `forward`: freed when the engine is


def _unmoved(model: Any, function: Callable[[Tensor], Tensor]) -> Any:
    """`model`, if `function`, which `to`, `half`, `cuda` and their like would apply to every tensor, changes none."""
    probe = torch.empty(1, dtype=model.dtype, device=model.device)
    changed = function(probe)
    moved = (changed.dtype, changed.device.type) != (probe.dtype, probe.device.type)
    moved = moved or (changed.device.index or 0) != (probe.device.index or 0)
    if moved or (probe.is_cpu and changed.is_shared()):
        raise UsageError(
            f"the model's residents are {str(model.dtype).removeprefix('torch.')} on {model.device} and stay so: load "
            "it with the dtype= and device= that are wanted (in a pipeline, give device=model.device)"
        )
    return model


class _Last:
    """The last of a stock model's attributes: when it goes, what was before it has gone."""

    def __init__(self) -> None:
        weakref.finalize(self, give_back_freed).atexit = False


class Guard:
    """A hook in front of the first layer: parts of the model run only inside a forward of the whole."""

    def __init__(self, check: Callable[[], None], *, whole: bool) -> None:
        """`check` is an engine's method, which is not kept alive; `whole` layers can do without."""
        self._check, self._whole = weakref.WeakMethod(check), whole

    def __call__(self, *_: Any) -> None:
        check = self._check()
        if check is not None:
            check()
        elif not self._whole:
            raise GriffinError("the model that these layers belong to is gone: keep it, or load it with density=1.0")


def hollow(model: nn.Module) -> None:
    """Leave no weight in `model`, of which only the shapes stay."""
    gone: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                empty = nn.Parameter(torch.empty_like(parameter, device="meta"), requires_grad=False)
                module._parameters[name] = gone.setdefault(id(parameter), empty)
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = torch.empty_like(buffer, device="meta")
