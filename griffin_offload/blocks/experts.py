"""A mixture of experts as a block: an expert is a neuron of it, kept or not as a whole.

transformers calls the experts of every architecture alike, with hidden states [T, H], the experts chosen [T, k] and
their weights [T, k], and lets an implementation be registered. Ours runs an expert at a time, in the order of their
numbers, over all of its tokens; an `ExpertSource` knows where an expert's tensors are.
"""

import weakref
from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from griffin_offload.blocks.base import ActivationCallback, Activations, Block
from griffin_offload.blocks.expert_products import ExpertCall, ExpertSource, HostExperts
from griffin_offload.blocks.routing import EXPERTS_IMPLEMENTATION
from griffin_offload.devices.memory import in_host_memory, untouched_zeros
from griffin_offload.errors import CheckpointError, UnsupportedModel
from griffin_offload.formats.base import Format, Spec, specs_bytes
from griffin_offload.formats.expert_form import RECORDS, ExpertForm, ExpertMatrix
from griffin_offload.formats.floats import FLOATS
from griffin_offload.formats.translated import read_row
from griffin_offload.kernels.by_blocks import Scratch
from griffin_offload.kernels.gemv import Address, addresses_of, still_at
from griffin_offload.kernels.recording import called_again
from griffin_offload.method.allocation import Counts

EXPERTS_INPUT = "experts"
"""What importances call the input that all experts of a layer have."""
_BLOCK, _FORM = "_griffin_offload_block", "_griffin_offload_form"
# As configs call the number of experts that a token is sent to.
_ACTIVE = ("num_experts_per_tok", "moe_topk", "moe_k", "top_k_experts", "num_experts_per_token")


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
        form: ExpertForm | None = module.__dict__.get(_FORM)
        self.form = form or ExpertForm(_matrices(module), FLOATS, FLOATS)
        """Its `precision` is that of the experts that are computed with, resident or not."""
        self.neurons = expert_count(module)
        self.hidden, self.inner = self.form.matrices[-1].outputs, self.form.matrices[-1].inputs
        self.width = active * self.inner
        self._weighs_inputs = bool(getattr(module, "weighs_inputs", False))  # Llama 4: weights are of what goes in
        self.source: ExpertSource | None = None
        """None: all experts are the module's own."""
        self._host: tuple[HostExperts, ExpertForm] | None = None
        """What computes those that the source says are away, and how; None where none ever is."""
        self._observer: ActivationCallback | None = None
        self._limit: int | None = None
        self._checked: dict[tuple[int, torch.dtype], Any] = {}
        self._checked_form: ExpertForm | None = None
        self._checked_at: list[Address] = []
        config: Any = module.config
        config._experts_implementation = EXPERTS_IMPLEMENTATION
        module.__dict__[_BLOCK] = weakref.ref(self)  # no cycle: weights go with the last name of the model

    @property
    def gated(self) -> bool:
        return bool(self.module.has_gate)

    @property
    def formats(self) -> tuple[Format, ...]:
        return (self.form.precision,)

    @property
    def rests_as_stored(self) -> bool:
        return self.is_plain and not self.form.records

    @property
    def read_numbers(self) -> int:
        return self.active * (3 if self.gated else 2) * self.inner * self.hidden

    def is_down(self, linear: nn.Module) -> bool:
        return False

    def full(self) -> list[Tensor]:
        records = self.module._parameters.get(RECORDS)
        if records is not None:
            return self.form.views(records.detach())
        compact = self.module._parameters.keys() >= set(self.form.names)
        return [
            getattr(self.module, name) for name in (self.form.names if compact else self.form.specs(self.form.stored))
        ]

    def full_specs(
        self, precision: Format | None = None, finer: Format | None = None, finer_ones: Collection[str] = ()
    ) -> list[Spec]:
        """Of records, too, some of whose matrices may be in a `finer` format."""
        own = precision or self.form.precision
        form = replace(self.form, precision=own, finer=finer, finer_ones=frozenset(finer_ones)) if finer else self.form
        return [((self.neurons, *shape), kind) for shape, kind in form.specs(own).values()]

    def compact_specs(self, counts: Counts, formats: Sequence[Format] | None = None) -> list[Spec]:
        (kept,), (format,) = counts, self.formats if formats is None else formats
        return [((kept, *shape), own) for shape, own in self.form.specs(format).values()]

    def place_bytes(
        self, precision: Format, dtype: torch.dtype, finer: Format | None = None, finer_ones: Collection[str] = ()
    ) -> int:
        """Of the place of one expert, some of whose matrices may be in a `finer` format; a record where that is of
        whole blocks."""
        form = replace(self.form, finer=finer, finer_ones=frozenset(finer_ones))
        form = replace(form, precision=precision, stored=precision, records=dtype)
        return form.record_bytes if form.copies_records(dtype) else specs_bytes(form.specs(precision).values(), dtype)

    def check(self, precision: Format) -> None:
        self.form.check(precision, type(self.module).__name__)

    def multiple(self, precision: Format) -> int:
        return 1

    def install_full(self, tensors: Sequence[Tensor]) -> None:
        """Nothing: a source hands out full experts one by one."""

    def allocate(self, counts: Counts, dtype: torch.dtype, device: torch.device) -> list[nn.Parameter]:
        if not in_host_memory(device) or not self.form.copies_records(dtype):
            return super().allocate(counts, dtype, device)
        rows = untouched_zeros((*counts, self.form.record_bytes), torch.uint8, device)
        return [nn.Parameter(rows, requires_grad=False)]

    def places(self, compact: Sequence[Tensor]) -> list[Tensor]:
        """The tensors [N, ...] of experts in what was allocated."""
        records = len(compact) < len(self.form.names)
        return self.form.views(compact[0].detach()) if records else [tensor.detach() for tensor in compact]

    def install_compact(self, tensors: Sequence[Tensor]) -> None:
        self.module._parameters.clear()
        names = self.form.names if len(tensors) > 1 else (RECORDS,)
        for name, tensor in zip(names, tensors, strict=True):
            own = tensor if isinstance(tensor, nn.Parameter) else nn.Parameter(tensor, requires_grad=False)
            self.module._parameters[name] = own

    def take_form(
        self,
        precision: Format,
        stored: Format,
        records: torch.dtype | None,
        scratch: Scratch | None = None,
        importance: Tensor | None = None,
        finer: Format | None = None,
        finer_ones: Collection[str] = (),
    ) -> None:
        """Say, once, what experts are computed in, some matrices in a `finer` format, and how files hold them; as
        records they are on meta, to be assigned."""
        known = replace(self.form, scratch=scratch, importance=importance)
        known = replace(known, finer=finer, finer_ones=frozenset(finer_ones))
        self.form = replace(known, precision=precision, stored=stored, records=records)
        self.module.__dict__[_FORM] = self.form
        if records is not None and RECORDS not in self.module._parameters:
            shape = (self.neurons, self.form.record_bytes)
            self.module._parameters.clear()
            rows = torch.empty(shape, dtype=torch.uint8, device="meta")
            self.module.register_parameter(RECORDS, nn.Parameter(rows, requires_grad=False))

    def take_rows(self) -> None:
        """Say that matrices of experts lie as [outputs, inputs] from now on; they are on meta, to be assigned."""
        self.form = self.module.__dict__[_FORM] = self.form.as_rows()
        for matrix in self.form.matrices:
            own = self.module._parameters[matrix.name]
            assert own is not None, "the stock parameters are there"
            rows = own.new_empty((self.neurons, *matrix.shape), device="meta")
            self.module._parameters[matrix.name] = nn.Parameter(rows, requires_grad=False)

    def as_stock(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """`tensors` [E, ...], which lie as its full ones, as transformers' own class of experts has them."""
        turned = {own.name for own in self.form.matrices if own.transposed != self.module.is_transposed}
        named = zip(self.form.names, tensors, strict=True)
        return [tensor.transpose(1, 2).contiguous() if name in turned else tensor for name, tensor in named]

    @torch.no_grad()
    def gather(self, full: Sequence[Tensor], chosen: Sequence[Tensor], out: Sequence[Tensor]) -> None:
        experts = torch.cat(list(chosen)).tolist()
        if self.source is not None:  # whose places `out` are, and which has the experts already
            self.source.settle(experts)
            return
        for place, expert in enumerate(experts):
            self.form.fill(full, expert, [tensor[place] for tensor in self.places(out)])

    def rows_needed(self, chosen: Tensor) -> list[Tensor | None]:
        return [chosen for _ in self.form.names]

    @torch.no_grad()
    def neuron_norms(self, full: Sequence[Tensor]) -> Tensor:
        """Product of the norms of an expert's matrices, for comparison: reads every expert."""
        if not self.form.stored.is_plain:
            raise UnsupportedModel(f"the norms of experts in {self.form.stored} are not known: take --selection topk")
        product = torch.ones(self.neurons, dtype=torch.float32, device=full[0].device)
        for tensor in full:
            if tensor.dim() > 2:  # the others are biases
                own = torch.empty(tensor.shape[1:], dtype=torch.float32, device=tensor.device)
                for expert in range(self.neurons):
                    read_row(tensor, expert, own)
                    product[expert] *= own.norm()
        return product

    def output_norms(self, full: Sequence[Tensor]) -> Tensor:
        raise UnsupportedModel("what experts add is in their statistic already: take --selection topk")

    def observe(self, callback: ActivationCallback) -> None:
        self._observer = callback

    def chunked(self, limit: int) -> None:
        self._limit = limit

    def unhook(self) -> None:
        self._observer = self._limit = None

    def take_host(self, host: HostExperts) -> None:
        """Have the CPU compute the experts that the source says are away."""
        self._host = host, replace(self.form, scratch=host.scratch)

    def run(self, x: Tensor) -> Tensor:
        found: Any = self.parent(x)
        output: Tensor = found[0] if isinstance(found, tuple) else found
        return output

    @torch.no_grad()
    def compute(self, hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        """What the experts module answers: [T, H] for hidden states [T, H], experts `index` and `weights` [T, k]."""
        module: Any = self.module
        call = ExpertCall(module, self.form, (hidden, index, weights), index.tolist(), self._limit)
        output, norms = torch.zeros_like(hidden), torch.zeros(index.shape, dtype=torch.float32, device=index.device)
        for token, choice, given in call.outputs(self.source or _Own(self), self._host):
            added = self._normed(given, index, token, choice) if module.has_post_expert_norm else given
            added = added if self._weighs_inputs else added * weights[token, choice, None]
            if self._observer is not None:
                norms[token, choice] = added.float().norm(dim=-1)
            output.index_add_(0, token, added.to(output.dtype))
        if self._observer is not None:
            self._observer(ExpertActivations(norms, 0, index, self.neurons))
        return output

    def _normed(self, given: Tensor, index: Tensor, token: Tensor, choice: Tensor) -> Tensor:
        """What experts give, by the module's norm, of which each expert may have its own."""
        module: Any = self.module
        own = (index[token, choice],) if getattr(module, "norm_by_expert", False) else ()
        output: Tensor = module.post_expert_norm(given, *own)
        return output

    def checked(self) -> dict[tuple[int, torch.dtype], Any] | None:
        """By expert and type of what it is given, the matrices of the module's own experts as they lie now; None where
        they are made whenever they are asked for."""
        parameters = self.module._parameters.values()
        if self._checked_form is not self.form or not still_at(parameters, self._checked_at):
            if any(type(own) is not nn.Parameter for own in parameters if own is not None):
                return None
            self._checked, self._checked_form, self._checked_at = {}, self.form, addresses_of(parameters)
        return self._checked


class _Own:
    """Experts that are all in the module, for one call."""

    away = ()

    def __init__(self, block: Experts) -> None:
        self._block, self._checked = block, block.checked()
        self._full: list[Tensor] | None = None
        self._made: Sequence[Tensor] = ()
        self.there = 0

    def begin(self, experts: Sequence[int], index: Tensor, weights: Tensor) -> Sequence[int]:
        """All are there."""
        self.there = 0 if self._checked is None else len(experts)
        return experts

    def tensors(self, expert: int) -> Sequence[Tensor]:
        if self._full is None:
            self._full = self._block.full()
        return [tensor[expert] for tensor in self._full]

    def checked(self, expert: int, dtype: torch.dtype, check: Callable[[Sequence[Tensor], torch.dtype], Any]) -> Any:
        if self._checked is None:
            self._made = self.tensors(expert)  # which nothing else keeps
            return check(self._made, dtype)
        key = expert, dtype
        if key not in self._checked:
            self._checked[key] = check(self.tensors(expert), dtype)
        return self._checked[key]

    def settle(self, chosen: Sequence[int]) -> None:
        """All stay."""


def _matrices(module: Any) -> tuple[ExpertMatrix, ...]:
    """Those of a stock module, in the order in which they are multiplied."""
    found = []
    for name in ("gate_up_proj" if module.has_gate else "up_proj", "down_proj"):
        _, rows, columns = getattr(module, name).shape
        outputs, inputs = (columns, rows) if module.is_transposed else (rows, columns)
        bias = f"{name}_bias" in module._parameters
        found.append(ExpertMatrix(name, outputs, inputs, name == "down_proj", bool(module.is_transposed), bias))
    return tuple(found)


def _forward(module: Any, hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
    if hidden.is_meta:  # a trial that asks for sizes
        return torch.empty_like(hidden)
    block = module.__dict__.get(_BLOCK, lambda: None)()
    if block is None:  # nobody has made one of its model, or kept it
        block = Experts(module, module, index.shape[-1])
    output: Tensor = called_again(block.compute, hidden, index, weights)  # of other experts every time
    return output


ALL_EXPERTS_FUNCTIONS.register(EXPERTS_IMPLEMENTATION, _forward)


def is_experts(module: nn.Module) -> bool:
    """Whether `module` is of a class that transformers lets an implementation be registered for."""
    known = hasattr(type(module), "_apply_gate")  # of most modules a class is asked: they make an error of each answer
    return known and all(hasattr(module, name) for name in ("is_transposed", "is_concatenated", "has_gate"))


def expert_count(module: nn.Module) -> int:
    """Of a module of experts."""
    return next(module.parameters(recurse=False)).shape[0]


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
    if RECORDS in sizes:
        sizes["down_proj"] = sizes.pop(RECORDS)
    if len(set(sizes.values())) != 1 or "down_proj" not in sizes:
        raise UnsupportedModel(f"{where}: parameters of {name} are not one for each expert: {sizes}")
    config: Any = module.config
    active = next((getattr(config, own) for own in _ACTIVE if isinstance(getattr(config, own, None), int)), None)
    if active is None:
        raise UnsupportedModel(f"{where}: its config does not say how many experts a token is sent to")
    if not 1 <= active <= sizes["down_proj"]:
        raise CheckpointError(f"{where}: its router sends a token to {active} experts, there are {sizes['down_proj']}")
    return Experts(module, parent, active)
