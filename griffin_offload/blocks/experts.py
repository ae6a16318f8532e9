"""A mixture of experts as a block: an expert is a neuron of it, kept or not as a whole.

transformers calls the experts of every architecture alike, with hidden states [T, H], the experts chosen [T, k] and
their weights [T, k], and lets an implementation be registered. Ours runs an expert at a time, in the order of their
numbers, over all of its tokens; an `ExpertSource` knows where an expert's tensors are.
"""

import weakref
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from griffin_offload.blocks.base import ActivationCallback, Activations, Block
from griffin_offload.errors import CheckpointError, UnsupportedModel
from griffin_offload.formats.base import Format, Spec
from griffin_offload.formats.floats import FLOATS
from griffin_offload.formats.stacked import read_row
from griffin_offload.kernels import table
from griffin_offload.kernels.library import HALVES
from griffin_offload.method.allocation import Counts

IMPLEMENTATION = "griffin_offload"
"""Under which transformers finds ours."""
_BLOCK = "_griffin_offload_block"
_LAYOUT = FLOATS.stored(is_down=False).name
# As configs call the number of experts that a token is sent to.
_ACTIVE = ("num_experts_per_tok", "moe_topk", "moe_k", "top_k_experts", "num_experts_per_token")


class ExpertSource(Protocol):
    """Where the tensors of experts are while tokens pass."""

    def begin(self, experts: Sequence[int], index: Tensor, weights: Tensor) -> None:
        """Tokens were sent to `experts` (rising numbers), by `index` and `weights` [T, k]."""

    def tensors(self, expert: int) -> Sequence[Tensor]:
        """Those of one of `experts`, in their order, valid until the next one is asked for."""

    def settle(self, chosen: Sequence[int]) -> None:
        """Of the experts that were handed out since the pass began, keep those that were `chosen`."""


class ExpertActivations(Activations):
    """Of each token the norms of what its experts add to the output, [B, T, k], and which experts those are."""

    def __init__(self, z: Tensor, start: int, index: Tensor, neurons: int) -> None:
        super().__init__(z, start, copied=True)
        self.index, self.neurons = index, neurons

    def by_sample(self, samples: int) -> "ExpertActivations":
        shape = (samples, -1, self.z.shape[-1])
        return ExpertActivations(self.z.reshape(shape), self.start, self.index.reshape(shape), self.neurons)

    def part(self, rows: slice, columns: slice) -> "ExpertActivations":
        start = self.start + columns.start
        return ExpertActivations(self.z[rows, columns], start, self.index[rows, columns], self.neurons)

    def values(self) -> Tensor:
        """[B, T, E]; nothing of experts that a token was not sent to."""
        found = torch.zeros(*self.z.shape[:2], self.neurons, dtype=self.z.dtype, device=self.z.device)
        return found.scatter_add_(2, self.index, self.z)

    def summed(self, weights: Tensor) -> Tensor:
        raise UnsupportedModel("experts have no activations that could be summed: leave out compensation")

    def leave_out(self, kept: Tensor, instead: Tensor | None = None) -> None:
        raise UnsupportedModel("experts cannot be left out of a pass: only FF neurons can")


class Experts(Block):
    """The routed experts of a layer. Shared experts and the router are not of it: they are residents like attention."""

    inline, linears = False, ()

    def __init__(self, module: nn.Module, parent: nn.Module, active: int) -> None:
        self.module, self.parent, self.active = module, parent, active
        self.names = tuple(name for name, _ in module.named_parameters(recurse=False))
        down, transposed = module.down_proj, bool(module.is_transposed)
        assert isinstance(down, Tensor)
        self.neurons = down.shape[0]
        self.hidden, self.inner = down.shape[2 if transposed else 1], down.shape[1 if transposed else 2]
        self.width = active * self.inner
        self.source: ExpertSource | None = None
        """None: all experts are the module's own."""
        self._observer: ActivationCallback | None = None
        self._limit: int | None = None
        config: Any = module.config
        config._experts_implementation = IMPLEMENTATION
        module.__dict__[_BLOCK] = weakref.ref(self)  # no cycle: weights go with the last name of the model

    @property
    def gated(self) -> bool:
        return bool(self.module.has_gate)

    @property
    def formats(self) -> tuple[Format, ...]:
        return (FLOATS,)

    @property
    def read_numbers(self) -> int:
        return self.active * (3 if self.gated else 2) * self.inner * self.hidden

    def is_down(self, linear: nn.Module) -> bool:
        return False

    def full(self) -> list[Tensor]:
        return [getattr(self.module, name) for name in self.names]

    def full_specs(self, precision: Format | None = None) -> list[Spec]:
        return self.compact_specs((self.neurons,), None if precision is None else (precision,))

    def compact_specs(self, counts: Counts, formats: Sequence[Format] | None = None) -> list[Spec]:
        if formats is not None and not all(format.is_plain for format in formats):
            raise UnsupportedModel(
                f"{type(self.module).__name__} is a mixture of experts: not quantised yet, take --quantize none"
            )
        return [((sum(counts), *tensor.shape[1:]), None) for tensor in self.full()]

    def multiple(self, precision: Format) -> int:
        return 1

    def install_full(self, tensors: Sequence[Tensor]) -> None:
        """Nothing: a source hands out full experts one by one."""

    def install_compact(self, tensors: Sequence[Tensor]) -> None:
        for name, tensor in zip(self.names, tensors, strict=True):
            own = tensor if isinstance(tensor, nn.Parameter) else nn.Parameter(tensor, requires_grad=False)
            self.module._parameters[name] = own

    @torch.no_grad()
    def gather(self, full: Sequence[Tensor], chosen: Sequence[Tensor], out: Sequence[Tensor]) -> None:
        experts = torch.cat(list(chosen)).tolist()
        if self.source is not None:  # whose places `out` are, and which has the experts already
            self.source.settle(experts)
            return
        for source, target in zip(full, out, strict=True):
            for place, expert in enumerate(experts):
                read_row(source, expert, target[place])

    def rows_needed(self, chosen: Tensor) -> list[Tensor | None]:
        return [chosen for _ in self.names]

    def neuron_norms(self, full: Sequence[Tensor]) -> Tensor:
        raise UnsupportedModel("experts are chosen by what they do, not by their weights: take --selection topk")

    def output_norms(self, full: Sequence[Tensor]) -> Tensor:
        return self.neuron_norms(full)

    def observe(self, callback: ActivationCallback) -> None:
        self._observer = callback

    def chunked(self, limit: int) -> None:
        self._limit = limit

    def unhook(self) -> None:
        self._observer = self._limit = None

    def run(self, x: Tensor) -> Tensor:
        found: Any = self.parent(x)
        output: Tensor = found[0] if isinstance(found, tuple) else found
        return output

    @torch.no_grad()
    def compute(self, hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        """What the experts module answers: [T, H] for hidden states [T, H], experts `index` and `weights` [T, k]."""
        experts: list[int] = index.unique().tolist()
        source = self.source or _Own(self.full())
        source.begin(experts, index, weights)
        output, norms = torch.zeros_like(hidden), torch.zeros(index.shape, dtype=torch.float32, device=index.device)
        for expert in experts:
            tensors = dict(zip(self.names, source.tensors(expert), strict=True))
            places = torch.where(index == expert)
            limit = self._limit or places[0].numel()
            for token, choice in zip(*(found.split(limit) for found in places), strict=True):
                added = _expert(self.module, hidden[token], tensors) * weights[token, choice, None]
                norms[token, choice] = added.float().norm(dim=-1)
                output.index_add_(0, token, added.to(output.dtype))
        if self._observer is not None:
            self._observer(ExpertActivations(norms, 0, index, self.neurons))
        return output


class _Own:
    """Experts that are all in the module."""

    def __init__(self, full: Sequence[Tensor]) -> None:
        self._full = full

    def begin(self, experts: Sequence[int], index: Tensor, weights: Tensor) -> None:
        """All are there."""

    def tensors(self, expert: int) -> Sequence[Tensor]:
        return [tensor[expert] for tensor in self._full]

    def settle(self, chosen: Sequence[int]) -> None:
        """All stay."""


def _expert(module: Any, x: Tensor, tensors: dict[str, Tensor]) -> Tensor:
    first = "gate_up_proj" if module.has_gate else "up_proj"
    inner = _linear(x, tensors[first], tensors.get(f"{first}_bias"), transposed=module.is_transposed)
    inner = module._apply_gate(inner) if module.has_gate else module.act_fn(inner)
    output = _linear(inner, tensors["down_proj"], tensors.get("down_proj_bias"), transposed=module.is_transposed)
    return module.post_expert_norm(output) if module.has_post_expert_norm else output


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None, *, transposed: bool) -> Tensor:
    if transposed or not x.is_cpu or x.dtype not in HALVES:
        return nn.functional.linear(x, weight.t() if transposed else weight, bias)
    tensors = {"weight": weight, "bias": bias}
    for kernel in table.products(_LAYOUT, x.shape[0], x, None, True):
        if kernel.takes is None or kernel.takes(x, tensors):
            product: Tensor = kernel.function(x, tensors, weight.shape[0], None)
            return product
    raise AssertionError("torch multiplies what nothing else does")


def _forward(module: Any, hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
    if hidden.is_meta:  # a trial that asks for sizes
        return torch.empty_like(hidden)
    block = module.__dict__.get(_BLOCK, lambda: None)()
    if block is None:  # nobody has made one of its model, or kept it
        block = Experts(module, module, index.shape[-1])
    output: Tensor = block.compute(hidden, index, weights)
    return output


ALL_EXPERTS_FUNCTIONS.register(IMPLEMENTATION, _forward)


def is_experts(module: nn.Module) -> bool:
    """Whether `module` is of a class that transformers lets an implementation be registered for."""
    return all(hasattr(module, name) for name in ("is_transposed", "is_concatenated", "has_gate", "_apply_gate"))


def find_experts(layer: nn.Module, where: str) -> Block | None:
    """The experts of a decoder layer; None where it has none that are called as transformers' own. UnsupportedModel,
    CheckpointError for such that do not go together."""
    found = [(name, module) for name, module in layer.named_modules() if is_experts(module)]
    if not found:
        return None
    if len(found) > 1:
        raise UnsupportedModel(f"{where} has {len(found)} modules of experts: one is supported")
    name, module = found[0]
    parent = layer.get_submodule(name.rpartition(".")[0])
    sizes = {own: parameter.shape[0] for own, parameter in module.named_parameters(recurse=False)}
    if len(set(sizes.values())) != 1 or "down_proj" not in sizes:
        raise UnsupportedModel(f"{where}: parameters of {name} are not one for each expert: {sizes}")
    config: Any = module.config
    active = next((getattr(config, own) for own in _ACTIVE if isinstance(getattr(config, own, None), int)), None)
    if active is None:
        raise UnsupportedModel(f"{where}: its config does not say how many experts a token is sent to")
    if not 1 <= active <= sizes["down_proj"]:
        raise CheckpointError(f"{where}: its router sends a token to {active} experts, there are {sizes['down_proj']}")
    return Experts(module, parent, active)
