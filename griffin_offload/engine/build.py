"""From a checkpoint, of whatever kind, to the stock model with its parameters as they lie in the files.

The model is built on the meta device, modules of the formats take the place of the stock ones whose matrices the
checkpoint holds in them, and every parameter is then a view of the mapped files or translated when it is used.

On the CPU some stock modules then get kernels of ours: 16-bit linear layers, which torch multiplies below the memory's
rate, or far below the processor's, norms and attention. A few rows (decoding a token) go through a kernel of ours. For
many rows CPUs without 16-bit instructions emulate the GEMM at a third of the float32 rate: there, a part of the weight
is translated to float32 in the cache and multiplied, by a kernel of ours or, block by block in a scratch, by torch.
Sums are in float32 and rounded once, as in torch's, so results differ by the order of summation alone.
"""

import copy
import re
import sys
import warnings
import weakref
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AutoModelForCausalLM, PretrainedConfig
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

from griffin_offload.blocks.layouts import find_feed_forwards, leave_out_towers
from griffin_offload.blocks.replace import finer_names, swap_experts, swap_linears, turn_experts
from griffin_offload.checkpoint.base import Checkpoint, StoredTensor
from griffin_offload.checkpoint.mapped import FileMaps
from griffin_offload.checkpoint.renaming import Conversion, KeptTypes
from griffin_offload.devices.threads import building, parameters_on_meta, put
from griffin_offload.engine.precisions import held_finer, lying_in_rows
from griffin_offload.errors import CheckpointError, GriffinError, UnsupportedModel, memory_refused, one_line
from griffin_offload.formats import FLOATS
from griffin_offload.formats.base import is_plain
from griffin_offload.formats.linear import swap_tables
from griffin_offload.formats.translated import stacked
from griffin_offload.kernels import table
from griffin_offload.kernels.attention import each_token
from griffin_offload.kernels.by_blocks import Scratch
from griffin_offload.kernels.gemv import Known
from griffin_offload.kernels.library import HALVES
from griffin_offload.transformers_api import StockModel, adapted


def build(checkpoint: Checkpoint, scratch: Scratch | None = None) -> StockModel:
    """The model on the CPU; every tensor of it has to be there. `scratch` is for matrices that the checkpoint holds in
    a format. CheckpointError where the checkpoint and its config do not agree."""
    model = build_unfilled(checkpoint.config, checkpoint.dtype)
    if not checkpoint.precision.is_plain or checkpoint.records is not None or checkpoint.expert_rows:
        _swap_formats(model, checkpoint, scratch or Scratch(0, checkpoint.dtype, torch.device("cpu")))
    try:
        _Filling(model, checkpoint).fill()
    except GriffinError:
        raise
    except Exception as error:  # each architecture fails in its own way
        if memory_refused(error):
            raise
        raise CheckpointError(f"{checkpoint.directory} cannot be loaded: {one_line(error)}") from error
    checkpoint.set_generation_config(model)
    return model.eval()


def build_unfilled(config: PretrainedConfig, dtype: torch.dtype) -> StockModel:
    """The stock model with its buffers, and every parameter on the meta device."""
    with building(dtype), parameters_on_meta(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # advice about initialisation, which never happens here
        made = AutoModelForCausalLM.from_config(copy.deepcopy(config), dtype=dtype, trust_remote_code=False)
    model = adapted(made.eval())
    model.tie_weights()  # each parameter went to the meta device by itself
    leave_out_towers(model)
    return model


def _swap_formats(model: StockModel, checkpoint: Checkpoint, scratch: Scratch) -> None:
    decoder, blocks = find_feed_forwards(model, checkpoint.config.get_text_config().num_hidden_layers)
    finer: Sequence[Collection[str]] = ()
    if not checkpoint.precision.is_plain:
        held = held_finer(checkpoint)
        finer = [finer_names(layer, blocks[i], held.get(i, ())) for i, layer in enumerate(decoder)]
        formats = (checkpoint.precision, checkpoint.precision)
        rows = lying_in_rows(checkpoint)
        in_rows = [rows.get(i, set()) for i in range(len(blocks))]
        swap_linears(decoder, blocks, *formats, scratch, finer=checkpoint.small, finer_ones=finer, in_rows=in_rows)
    own = checkpoint.precision.rests_as()
    if checkpoint.expert_rows or checkpoint.records is not None:
        turn_experts(blocks)
    swap_experts(decoder, blocks, own, own, checkpoint.records, scratch, finer=checkpoint.small, finer_ones=finer)
    if not checkpoint.tables.is_plain:
        swap_tables(model, checkpoint.tables, scratch)


class _Filling:
    """The tensors of a model, given their places in the files of a checkpoint, by name."""

    def __init__(self, model: StockModel, checkpoint: Checkpoint) -> None:
        self._model, self._checkpoint, self._maps = model, checkpoint, FileMaps()
        self._there: dict[str, Tensor] = model.state_dict(keep_vars=True)
        self._types = KeptTypes(model, checkpoint.dtype)
        self._names: dict[int, list[str]] = {}
        """Of each tensor, tied ones having several."""
        for name, tensor in self._there.items():
            self._names.setdefault(id(tensor), []).append(name)
        self._filled: set[int] = set()
        self._unfitting: dict[str, str] = {}

    def fill(self) -> None:
        tensors = self._checkpoint.tensors()
        conversions = self._checkpoint.conversions(self._model, tensors)
        first = {names[0] for names in self._names.values()}
        for conversion in sorted(conversions, key=lambda c: c.target not in first):  # of tied ones the embeddings
            expected = self._there[conversion.target]
            if conversion.of_experts:
                self._stack(conversion, tensors, expected)
                continue
            sources = {name: self._mapped(tensors[name], conversion.target, expected) for name in conversion.sources}
            for name, tensor in conversion.apply(self._model, sources).items():
                self._put(name, tensor)
        if self._unfitting:
            raise self._checkpoint.unfitting(self._unfitting)
        lacking = [name for name, tensor in self._there.items() if id(tensor) not in self._filled]
        lacking = [name for name in lacking if not self._needless(name)]
        if lacking:
            raise self._checkpoint.lacking(lacking)

    def _stack(self, conversion: Conversion, tensors: Mapping[str, StoredTensor], expected: Tensor) -> None:
        """The experts of a layer as they lie: merging them would copy all of them into memory."""
        experts, shape = conversion.by_expert(), tuple(expected.shape)
        if experts is None:
            raise UnsupportedModel(f"{conversion.target} would be merged in memory: its experts do not lie as they are")
        missing = [
            conversion.missing(expert, pattern)
            for expert in range(shape[0])
            for pattern, name in (experts[expert] if expert < len(experts) else experts[0]).items()
            if name is None or expert >= len(experts)
        ]
        if missing:
            raise self._checkpoint.lacking(missing)
        rows = [[tensors[name] for name in found.values() if name is not None] for found in experts]
        for expert, row in enumerate(rows):
            made = (sum(part.shape[0] for part in row), *row[0].shape[1:])
            if made != shape[1:] or any(part.shape[1:] != row[0].shape[1:] for part in row) or expert >= shape[0]:
                first = next(iter(experts[expert].values())) or conversion.target
                needed = f"of {list(shape)}" if expert >= shape[0] else list(shape[1:])
                self._unfitting[first] = f"makes {list(made)} of expert {expert}, the model needs {needed}"
                self._filled.add(id(expected))
                return
        views = [[part.tensor(self._maps) for part in row] for row in rows]
        self._put(conversion.target, stacked(shape, rows[0][0].dtype, views))

    def _mapped(self, stored: StoredTensor, target: str, expected: Tensor) -> Tensor:
        """`stored`, floats in the precision that the model has there."""
        tensor = stored.tensor(self._maps)
        dtype = self._types.of(target, expected)
        both = is_plain(tensor) and dtype.is_floating_point
        return tensor.to(dtype) if both and tensor.dtype != dtype else tensor

    def _put(self, name: str, tensor: Tensor) -> None:
        expected = self._there.get(name)
        if expected is None or id(expected) in self._filled:
            return
        self._filled.add(id(expected))
        floats = is_plain(tensor) and is_plain(expected)
        if tensor.shape != expected.shape or not (floats or tensor.dtype == expected.dtype):
            self._unfitting[name] = f"is {_describe(tensor)}, the model needs {_describe(expected)}"
            return
        if not isinstance(expected, nn.Parameter):
            expected.copy_(tensor)
            return
        parameter = nn.Parameter(tensor, requires_grad=False)
        for one in self._names[id(expected)]:
            owner, _, attribute = one.rpartition(".")
            put(self._model.get_submodule(owner), attribute, parameter)

    def _needless(self, name: str) -> bool:
        """Whether transformers does without it: a buffer that older files do not hold."""
        patterns = self._model._keys_to_ignore_on_load_missing or ()
        return not self._there[name].is_meta and any(re.search(pattern, name) for pattern in patterns)


def _describe(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"


def emulates_halves(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether this is a CPU that has no instructions for `dtype`, a 16-bit one."""
    if device.type != "cpu" or dtype not in HALVES:
        return False
    # Other processors have other ways: only what was measured is replaced.
    if torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"):
        return False
    if dtype is torch.float16:
        return not torch.cpu._is_amx_fp16_supported()
    return not (torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


def use_own_linears(model: nn.Module, scratch: Scratch, *, translated: bool) -> None:
    """Give every plain Linear of `model` a forward that multiplies a few rows by our kernel; and, if `translated`, many
    of them in float32, block by block."""
    for module in model.modules():
        if type(module) is nn.Linear:
            module.__dict__["forward"] = _OwnLinear(module, scratch if translated else None)


class _OwnLinear:
    """The forward of one Linear; reads the weight at each call, because compact ones come and go. It does not keep the
    Linear alive, which would be a cycle: weights are freed with their model, not when the collector comes."""

    def __init__(self, linear: nn.Linear, scratch: Scratch | None) -> None:
        self._linear, self._scratch = weakref.ref(linear), scratch
        self._computes = None if scratch is None else scratch.dtype
        self._layout, self._known = FLOATS.stored(is_down=False).name, Known()

    def __call__(self, x: Tensor) -> Tensor:
        linear = self._linear()
        assert linear is not None, "its own forward runs"
        rows, tensors = x.numel() // max(x.shape[-1], 1), linear._parameters
        for kernel in table.products(self._layout, rows, x, self._computes, True):
            if kernel.takes is None or kernel.takes(x, tensors):
                if kernel.several is not None:
                    matrix, flat = self._known(self._layout, tensors, linear.out_features, x.dtype), x.flatten(0, -2)
                    return kernel.several(flat, (matrix,), ((0, rows),)).view(*x.shape[:-1], linear.out_features)
                product: Tensor = kernel.function(x, tensors, linear.out_features, self._scratch)
                return product
        raise AssertionError("torch multiplies what nothing else does")


# Attention of one token on the CPU: our kernel in place of torch's, for models that take theirs from transformers.


ATTENTION_NAME, STOCK_ATTENTION = "griffin_offload_one_token", "sdpa"
SINKS_NAME, STOCK_SINKS = "griffin_offload_with_sinks", "eager"
"""The same of models whose heads have sinks, which torch's own attention does not know."""
OWN_ATTENTION = (ATTENTION_NAME, SINKS_NAME)


def use_own_attention(model: StockModel) -> None:
    """Let our kernel attend for single tokens where a model's attention is torch's, found by transformers' interface,
    or one with sinks; others stay as they are."""
    stock = model.config._attn_implementation
    has_sinks = any(name.endswith(".sinks") for name, _ in model.named_parameters())
    if stock != (STOCK_SINKS if has_sinks else STOCK_ATTENTION) or not model._supports_attention_backend:
        return
    name = SINKS_NAME if has_sinks else ATTENTION_NAME
    masks = _mask_beside_sinks if has_sinks else ALL_MASK_ATTENTION_FUNCTIONS[stock]
    AttentionInterface.register(name, attention_forward)
    ALL_MASK_ATTENTION_FUNCTIONS.register(name, masks)
    model.set_attn_implementation(name)


def _mask_beside_sinks(batch_size: int, q_length: int, *rest: Any, **options: Any) -> Tensor | None:
    """For one token that of torch's attention, which is none where all is seen; else what is added to scores."""
    make = ALL_MASK_ATTENTION_FUNCTIONS[STOCK_ATTENTION if q_length == 1 else STOCK_SINKS]
    found: Tensor | None = make(batch_size, q_length, *rest, **options)
    return found


def attention_forward(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    """As `sdpa_attention_forward`: query [B, heads, T, D], key and value [B, kv heads, S, D] to [B, T, heads, D]."""
    found: tuple[Tensor, None]
    for kernel in table.candidates("attention", "one_token", query):
        if kernel.takes is None or kernel.takes(module, query, key, value, attention_mask, **kwargs):
            found = kernel.function(module, query, key, value, attention_mask, **kwargs)
            return found
    raise AssertionError("torch attends where nothing else does")


def eager_attention_of(module: nn.Module) -> Callable[..., tuple[Tensor, Any]] | None:
    """What the file of its class computes step by step."""
    return getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)


def _stock_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    if kwargs.get("s_aux") is None:
        found: tuple[Tensor, None] = sdpa_attention_forward(module, query, key, value, mask, **kwargs)
        return found
    eager = eager_attention_of(module)
    assert eager is not None, "it was the model's own"
    if mask is not None and mask.dtype == torch.bool:
        least = torch.finfo(query.dtype).min
        mask = torch.zeros(mask.shape, dtype=query.dtype, device=mask.device).masked_fill_(~mask, least)
    return eager(module, query, key, value, mask, **kwargs)[0], None


table.add(table.Kernel("attention", "one_token", "sdpa", _stock_attention, ours=False), last=True)


def own_attention_takes(
    module: nn.Module, query: Tensor, keys: Sequence[Tensor], values: Sequence[Tensor], **kwargs: Any
) -> bool:
    """Whether `attend_to_each` is a kernel of ours."""
    first = table.candidates("attention", "each_token", query)[0]
    takes = first.takes is None or first.takes(module, query, keys, values, **kwargs)
    return takes and first.function is each_token


def attend_to_each(
    module: nn.Module, query: Tensor, keys: Sequence[Tensor], values: Sequence[Tensor], **kwargs: Any
) -> tuple[Tensor, None]:
    """`attention_forward` for every row of query [N, heads, 1, D], over keys and values of its own."""
    for kernel in table.candidates("attention", "each_token", query):
        if kernel.takes is None or kernel.takes(module, query, keys, values, **kwargs):
            found: tuple[Tensor, None] = kernel.function(module, query, keys, values, **kwargs)
            return found
    raise AssertionError("one after the other takes everything")


def causal_mask(query: Tensor) -> Tensor:
    """What is added to the scores of a prompt's query [1, heads, T, D]: [1, 1, T, T]. torch's own attention needs none:
    it is causal by itself."""
    tokens, least = query.shape[2], torch.finfo(query.dtype).min
    full = torch.full((1, 1, tokens, tokens), least, dtype=query.dtype, device=query.device)
    return full.triu_(1)


def _one_after_the_other(
    module: nn.Module, query: Tensor, keys: Sequence[Tensor], values: Sequence[Tensor], **kwargs: Any
) -> tuple[Tensor, None]:
    pairs = enumerate(zip(keys, values, strict=True))
    return torch.cat([attention_forward(module, query[i : i + 1], *pair, None, **kwargs)[0] for i, pair in pairs]), None


table.add(table.Kernel("attention", "each_token", "one after the other", _one_after_the_other, ours=False), last=True)


# Root mean square norms on the CPU: our kernel for a few rows in place of torch's operators, one by one.


def use_own_norms(model: nn.Module) -> None:
    """Let our kernel norm a few rows in every module that is seen to do what it does."""
    for module in model.modules():
        if _is_plain(module) and _agrees(module):
            module.__dict__["forward"] = CpuNorm(module)


def _is_plain(module: nn.Module) -> bool:
    """One weight and an epsilon, by the names that transformers gives them."""
    own = [name for name, _ in module.named_parameters()] == ["weight"] and hasattr(module, "variance_epsilon")
    return own and type(module).__name__.endswith("RMSNorm") and "forward" not in module.__dict__


def _agrees(module: nn.Module) -> bool:
    """Whether both give the same with a weight of any kind (the module's may still be on its way), up to a rounding:
    some norms add 1 to theirs."""
    own = module.weight
    assert isinstance(own, Tensor)
    generator = torch.Generator().manual_seed(0)
    x, weight = (
        torch.randn(own.shape, generator=generator, dtype=torch.float32, device="cpu").mul_(3).to(own.dtype)
        for _ in range(2)
    )
    if own.dim() != 1 or not any(kernel.ours for kernel in table.candidates("rms_norm", "rows", x)):
        return False
    ours = table.call("rms_norm", "rows", x, weight, float(module.variance_epsilon), module)  # type: ignore[arg-type]
    stock = torch.func.functional_call(module, {"weight": weight}, (x,))
    step = torch.finfo(own.dtype).eps
    return stock.dtype == ours.dtype and torch.allclose(ours.float(), stock.float(), rtol=2 * step, atol=0)


class CpuNorm:
    """The forward of one norm, which it does not keep alive: that would be a cycle."""

    def __init__(self, module: nn.Module) -> None:
        self._module = weakref.ref(module)
        self._epsilon = float(module.variance_epsilon)  # type: ignore[arg-type]

    def __call__(self, hidden_states: Tensor) -> Tensor:
        module = self._module()
        assert module is not None, "its own forward runs"
        weight = module.weight
        assert isinstance(weight, Tensor)
        for kernel in table.candidates("rms_norm", "rows", hidden_states):
            if kernel.takes is None or kernel.takes(hidden_states, weight):
                normed: Tensor = kernel.function(hidden_states, weight, self._epsilon, module)
                return normed
        raise AssertionError("a stock norm takes everything")


def _stock_norm(x: Tensor, weight: Tensor, epsilon: float, module: nn.Module) -> Tensor:
    normed: Tensor = type(module).forward(module, x)
    return normed


table.add(table.Kernel("rms_norm", "rows", "the stock module", _stock_norm, ours=False), last=True)
