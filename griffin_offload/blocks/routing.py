"""What routers choose: kept to the experts that are there, or guessed before a layer has been reached."""

import inspect
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

_CHOOSING = (torch.topk, Tensor.topk)


class RoutingKept(TorchFunctionMode):
    """A context manager: inside it, whatever chooses by `topk` over as many scores as `allowed` has for a token,
    booleans [E] for all tokens or [N, E] for each, chooses among those alone. `count` is called with what would have
    been chosen, and with `allowed` [N, E].

    Routers differ in what they do to their scores: softmax before or after the choice, sigmoids with a bias, groups,
    normalising again or not. All choose by `topk` over the scores of all experts; there, and only there, those that
    are not resident are left out. Setting router logits to -inf would be another thing where weights are not
    normalised behind the choice, and for a sigmoid with a bias it leaves them in it.
    """

    def __init__(self, allowed: Tensor, count: Callable[[Tensor, Tensor], None]) -> None:
        super().__init__()
        self._allowed, self._count = allowed, count

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func not in _CHOOSING or not self._concerns(args[0].shape):
            return func(*args, **kwargs)
        each = self._allowed.view(args[0].shape) if self._allowed.dim() > 1 else self._allowed.expand(args[0].shape)
        self._count(func(*args, **kwargs).indices, each)
        # Residents that the router has ruled out already (other groups) come last, but before all that are not there.
        least = args[0].clamp_min(torch.finfo(args[0].dtype).min)
        return func(torch.where(each, least, -torch.inf), *args[1:], **kwargs)

    def _concerns(self, scores: torch.Size) -> bool:
        own = self._allowed.shape
        return scores[-1] == own[-1] and (len(own) == 1 or scores.numel() == own.numel())


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
        with RoutingKept(allowed, self._count):
            return self._function(self._module(), *args, **kwargs)

    def _count(self, own: Tensor, allowed: Tensor) -> None:
        self.choices += own.numel()
        self._redirected = self._redirected + (~allowed.gather(-1, own)).sum()


# As layers call the norm of what their experts are given, in their order of preference.
_NORMS = ("pre_feedforward_layernorm", "post_attention_layernorm", "ffn_norm", "norm")
_ROUTERS = ("router", "gate")


class RouterGuess:
    """What a layer's router would choose for hidden states of a layer before it: asked of the router itself."""

    def __init__(self, layer: nn.Module, parent: nn.Module) -> None:
        """`parent` is the module inside `layer` that routes and calls experts."""
        found = (getattr(parent, name, None) for name in _ROUTERS)
        self._router = next((own for own in found if _takes_states_alone(own)), None)
        self._norm = next((own for name in _NORMS if (own := getattr(layer, name, None)) is not None), None)

    @torch.no_grad()
    def __call__(self, hidden: Tensor) -> list[int]:
        """Experts for tokens [..., H] on their way through the layers, the likeliest first; none where the router does
        not say."""
        if self._router is None or self._norm is None:
            return []
        chosen = self._router(self._norm(hidden).reshape(-1, hidden.shape[-1]))
        if not isinstance(chosen, tuple) or len(chosen) < 3 or chosen[2].dtype != torch.long:
            return []
        return list(dict.fromkeys(chosen[2].t().flatten().tolist()))


def _takes_states_alone(router: Any) -> bool:
    if not isinstance(router, nn.Module):
        return False
    return len(inspect.signature(router.forward).parameters) == 1
