"""What routers choose: kept to the experts that are there, or guessed before a layer has been reached. And mixtures
whose own classes of transformers' route and call experts in a way of their own."""

import contextlib
import functools
import inspect
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from griffin_offload.transformers_api import ADAPTERS, StockModel

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


@contextlib.contextmanager
def kept_inside(
    layer: nn.Module, block: Any, allowed: Tensor, count: Callable[[Tensor, Tensor], None]
) -> Iterator[None]:
    """Inside, `RoutingKept` is in force while the part of `layer` computes that routes to the experts of `block`:
    routers of other parts choose freely."""
    mode: Any = RoutingKept(allowed, count)
    module = getattr(block, "parent", layer)
    if module is layer:
        with mode:
            yield
        return
    hooks = [
        module.register_forward_pre_hook(lambda *_: _nothing(mode.__enter__())),
        module.register_forward_hook(lambda *_: _nothing(mode.__exit__(None, None, None)), always_call=True),
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _nothing(_: object) -> None:
    """What hooks answer that change nothing."""


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


# Experts that are called as all others' are, where transformers' own classes do otherwise. Llama 4's are given all
# tokens for each of them, already multiplied by weights, which are zero for most. JetMoE's are slices of two matrices,
# given tokens in the order of experts; its attention has experts of this kind, too, which stay as they are. Ergo's are
# called once for every choice of a token, for a norm that each expert has of its own. Some of what is beside experts is
# derived, too: Ergo's layers ask a projection's weight for the type of floats, which codes do not have, and its head is
# copied in float32 for every token; and what Kolibri 1.1 chooses keys by cannot be traced.

_FLOAT_ROWS = 256
"""Of Ergo's head, as many as are made float32 at once: a few MB."""
EXPERTS_IMPLEMENTATION = "griffin_offload"
"""Under which transformers finds our way to call experts."""
RENAMED: dict[str, dict[str, str]] = {
    "jetmoe": {
        r"\.mlp\.input_linear\.weight": ".mlp.experts.gate_up_proj",
        r"\.mlp\.output_linear\.weight": ".mlp.experts.down_proj",
    }
}
"""By model type, what names of checkpoints become in a model that was adapted."""


def _adapt_llama4(module: Any, model: StockModel) -> None:
    module.config = model.config.get_text_config()
    _derive(module)


def _adapt_jetmoe(mixture: Any, model: StockModel) -> None:
    mixture.experts = _Slices(mixture, model.config)
    _derive(mixture)
    _derive(mixture.router)  # attention's own stays
    del mixture.input_linear, mixture.output_linear


def _adapt_ergo(experts: Any, model: StockModel) -> None:
    experts.has_post_expert_norm = True
    _derive(experts)


def _derive(module: Any) -> None:
    stock: Any = type(module)
    module.__class__ = _derived(stock)


@functools.cache
def _derived(stock: Any) -> Any:
    own = (_LLAMA4 | _JETMOE | _ERGO | _KOLIBRI)[stock.__name__]
    return type(stock.__name__, (stock,), {**own, "__module__": stock.__module__})


def _call_experts(experts: Any, hidden: Tensor, index: Tensor, weights: Tensor) -> Any:
    return ALL_EXPERTS_FUNCTIONS[EXPERTS_IMPLEMENTATION](experts, hidden, index, weights)


def _gate(experts: Any, gate_up: Tensor) -> Any:
    gate, up = gate_up.chunk(2, dim=-1)
    return up * experts.act_fn(gate)


def _route_llama4(router: Any, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Weights of the experts chosen for each token, sigmoids of their own logits alone; all logits, which stay the
    second; and the experts."""
    logits = nn.functional.linear(hidden, router.weight)
    best, chosen = torch.topk(logits, router.top_k, dim=1)
    return best.float().sigmoid().to(best.dtype), logits, chosen


def _mix_llama4(mixture: Any, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
    tokens = hidden_states.reshape(-1, mixture.hidden_dim)
    weights, logits, chosen = mixture.router(tokens)
    output: Tensor = mixture.shared_expert(tokens)
    return output + mixture.experts(tokens, chosen, weights), logits


def _route_jetmoe(router: Any, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor, None, Tensor]:
    """As Llama 4's; all logits again as the fifth, where transformers looks for them."""
    logits = router.layer(hidden).float()
    best, chosen = torch.topk(logits, router.top_k, dim=1)
    return best.softmax(dim=1).type_as(hidden), logits, chosen, None, logits


def _mix_jetmoe(mixture: Any, layer_input: Tensor) -> Tensor:
    tokens = layer_input.reshape(-1, mixture.input_size)
    weights, _, chosen, *_ = mixture.router(tokens)
    output: Tensor = mixture.experts(tokens, chosen, weights) + mixture.bias
    return output.view_as(layer_input)


def _pass_ergo(layer: Any, hidden_states: Tensor, **given: Any) -> Tensor:
    """Residuals are of float32, and what is added to them is computed in the type of floats that matrices have."""
    out = layer.self_attn.o_proj
    dtype = getattr(out, "scratch", out.weight).dtype  # a QuantizedLinear has one, for floats, whatever its weight is
    attended, _ = layer.self_attn(layer.input_layernorm(hidden_states).to(dtype), **given)
    hidden_states = layer.attention_residual_gate(layer.post_attention_layernorm(attended.float()), hidden_states)
    fed = layer.mlp(layer.pre_feedforward_layernorm(hidden_states).to(dtype))
    output: Tensor = layer.feedforward_residual_gate(layer.post_feedforward_layernorm(fed.float()), hidden_states)
    return output


def _float_logits(linear: Any, hidden_states: Tensor) -> Tensor:
    """Products in float32 of numbers rounded to 16 bits, without a copy of all of the matrix."""
    weight: Tensor = linear.weight
    if weight.dtype == torch.float32 or hidden_states.is_cuda:
        stock: Any = type(linear).__base__
        found: Tensor = stock.forward(linear, hidden_states)
        return found
    x = hidden_states.to(weight.dtype).float()
    logits = x.new_empty((*x.shape[:-1], weight.shape[0]))
    for rows, part in zip(weight.split(_FLOAT_ROWS), logits.split(_FLOAT_ROWS, dim=-1), strict=True):
        part.copy_(nn.functional.linear(x, rows.float()))
    return logits


def _choose_keys(indexer: Any, queries: Tensor, keys: Tensor, attention_mask: Tensor, pool: Any = None) -> Any:
    """A mask of the keys that each query attends to, and the pool that these are of."""
    if attention_mask.is_meta:  # a trial that asks for sizes: how many are chosen depends on the numbers
        every = torch.ones_like(attention_mask, dtype=torch.bool)
        return every, every[:, 0]
    stock: Any = type(indexer).__base__
    return stock.forward(indexer, queries, keys, attention_mask, pool)


_DESCRIBED = {"is_concatenated": True, "has_gate": True, "has_post_expert_norm": False, "_apply_gate": _gate}
_LLAMA4: dict[str, dict[str, Any]] = {
    "Llama4Router": {"forward": _route_llama4},
    "Llama4TextMoe": {"forward": _mix_llama4},
    "Llama4TextExperts": {"forward": _call_experts, "weighs_inputs": True, "is_transposed": True, **_DESCRIBED},
}
_JETMOE: dict[str, dict[str, Any]] = {
    "JetMoeTopKGating": {"forward": _route_jetmoe},
    "JetMoeMoE": {"forward": _mix_jetmoe},
}
_ERGO: dict[str, dict[str, Any]] = {
    "ErgoExperts": {"forward": _call_experts, "norm_by_expert": True},
    "ErgoDecoderLayer": {"forward": _pass_ergo},
    "ErgoLinearWithFP32Output": {"forward": _float_logits},
}
_KOLIBRI: dict[str, dict[str, Any]] = {"Kolibri1_1Indexer": {"forward": _choose_keys}}
ADAPTERS.update({**dict.fromkeys(_LLAMA4, _adapt_llama4), "JetMoeMoE": _adapt_jetmoe})
ADAPTERS.update({name: lambda module, _: _derive(module) for name in _ERGO | _KOLIBRI})
ADAPTERS["ErgoExperts"] = _adapt_ergo


class _Slices(nn.Module):
    """The experts of JetMoE's feed-forward, its matrices [E, 2F, H] and [E, H, F] by the names of all others'."""

    is_transposed, is_concatenated, has_gate, has_post_expert_norm = False, True, True, False
    forward, _apply_gate = _call_experts, _gate

    def __init__(self, mixture: Any, config: Any) -> None:
        super().__init__()
        self.config, self.act_fn = config, mixture.activation
        self.gate_up_proj, self.down_proj = mixture.input_linear.weight, mixture.output_linear.weight
