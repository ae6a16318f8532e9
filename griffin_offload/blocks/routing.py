"""Routing that is kept to the experts that are there, in every router's own way.

Routers differ in what they do to their scores: softmax before or after the choice, sigmoids with a bias, groups,
normalising again or not. All choose by `topk` over the scores of all experts; there, and only there, those that are
not resident are left out. Setting router logits to -inf would be another thing where weights are not normalised behind
the choice, and for a sigmoid with a bias it leaves them in it.
"""

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

_CHOOSING = (torch.topk, Tensor.topk)


class RestrictedForward:
    """The forward of a module that routes and calls experts, with the choice kept to `allowed`, which says for each
    of them (booleans [E]) whether it is resident, or None while all are."""

    def __init__(self, module: nn.Module, allowed: Callable[[], Tensor | None]) -> None:
        self._module, self._function, self._allowed = weakref.ref(module), type(module).forward, allowed
        self.choices = 0
        """Experts that the router chose, in all."""
        self._redirected: Tensor | int = 0

    @property
    def redirected(self) -> int:
        """Those of its choices that another expert had to stand in for."""
        return int(self._redirected)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        allowed = self._allowed()
        if allowed is None:
            return self._function(self._module(), *args, **kwargs)
        with _Choosing(self, allowed):
            return self._function(self._module(), *args, **kwargs)

    def count(self, own: Tensor, allowed: Tensor) -> None:
        """The router's `own` choice is known."""
        self.choices += own.numel()
        self._redirected = self._redirected + (~allowed[own]).sum()


class _Choosing(TorchFunctionMode):
    def __init__(self, forward: RestrictedForward, allowed: Tensor) -> None:
        super().__init__()
        self._forward, self._allowed = forward, allowed

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func not in _CHOOSING or args[0].shape[-1] != self._allowed.numel():
            return func(*args, **kwargs)
        self._forward.count(func(*args, **kwargs).indices, self._allowed)
        # Residents that the router has ruled out already (other groups) come last, but before all that are not there.
        least = args[0].clamp_min(torch.finfo(args[0].dtype).min)
        return func(torch.where(self._allowed, least, -torch.inf), *args[1:], **kwargs)
