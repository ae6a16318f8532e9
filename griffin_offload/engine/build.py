"""From a checkpoint, of whatever kind, to the stock model with its parameters as they lie in the files.

The model is built on the meta device, modules of the formats take the place of the stock ones whose matrices the
checkpoint holds in them, and every parameter is then a view of the mapped files or translated when it is used.
"""

import copy
import re
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PretrainedConfig

from griffin_offload.blocks.layouts import find_feed_forwards, leave_out_towers
from griffin_offload.blocks.replace import swap_experts, swap_linears, turn_experts
from griffin_offload.checkpoint.base import Checkpoint, StoredTensor
from griffin_offload.checkpoint.mapped import FileMaps
from griffin_offload.checkpoint.renaming import Conversion, KeptTypes
from griffin_offload.devices.torch_state import building, parameters_on_meta, put
from griffin_offload.errors import CheckpointError, GriffinError, UnsupportedModel, memory_refused, one_line
from griffin_offload.formats.base import is_plain
from griffin_offload.formats.linear import swap_tables
from griffin_offload.formats.stacked import stacked
from griffin_offload.kernels.by_blocks import Scratch
from griffin_offload.transformers_api import StockModel


def build(checkpoint: Checkpoint, scratch: Scratch | None = None) -> Any:
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


def build_unfilled(config: PretrainedConfig, dtype: torch.dtype) -> Any:
    """The stock model with its buffers, and every parameter on the meta device."""
    with building(dtype), parameters_on_meta(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # advice about initialisation, which never happens here
        model = AutoModelForCausalLM.from_config(copy.deepcopy(config), dtype=dtype, trust_remote_code=False).eval()
    model.tie_weights()  # each parameter went to the meta device by itself
    leave_out_towers(model)
    return model


def _swap_formats(model: StockModel, checkpoint: Checkpoint, scratch: Scratch) -> None:
    decoder, blocks = find_feed_forwards(model, checkpoint.config.get_text_config().num_hidden_layers)
    if not checkpoint.precision.is_plain:
        swap_linears(decoder, blocks, checkpoint.precision, checkpoint.precision, scratch)
    own = checkpoint.precision.rests_as()
    if checkpoint.expert_rows or checkpoint.records is not None:
        turn_experts(blocks)
    swap_experts(blocks, own, own, checkpoint.records, scratch)
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
