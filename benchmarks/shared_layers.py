"""A model of many layers over a checkpoint of few, for the bytes and the work of one that no host here could hold.

Layer i takes the tensors of layer i modulo the checkpoint's number. On the device every layer has residents of its
own; on the host those layers share one copy, so that each is still moved, computed and gathered for itself.
"""

import contextlib
import copy
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import nn
from transformers import AutoModelForCausalLM

from griffin_offload import GriffinModel
from griffin_offload.checkpoint.registry import open_checkpoint
from griffin_offload.config import LoadConfig
from griffin_offload.engine import load as loading
from griffin_offload.engine.spec import examine_checkpoint, plan_for
from griffin_offload.offload.weight_store import HostStore


def load_repeated(directory: Path, layers: int, **options: Any) -> GriffinModel:
    """The Llama checkpoint in `directory` as a model of `layers` layers; options as `GriffinModel.from_pretrained`."""
    start = time.perf_counter()
    checkpoint = open_checkpoint(directory, offline=True)
    config = copy.deepcopy(checkpoint.config)
    distinct, config.num_hidden_layers = config.num_hidden_layers, layers
    wanted = LoadConfig(**options, offload="ram")
    model_spec = examine_checkpoint(replace(checkpoint, config=config), wanted)
    plan = plan_for(model_spec)
    with _repeating(distinct):
        loaded = loading.load(model_spec, plan, wanted)
    return GriffinModel(model_spec, plan, loaded, time.perf_counter() - start)


@contextlib.contextmanager
def _repeating(distinct: int) -> Iterator[None]:
    map_few, copy_one = loading.build, HostStore._copy_layer

    def map_many(checkpoint: Any, scratch: Any) -> Any:
        return _repeated(map_few(checkpoint, scratch), checkpoint.config, checkpoint.dtype)

    def copy_or_share(self: HostStore, origin: Any, index: int, *more: Any) -> None:
        first = index % distinct
        if first in self.flat:
            self.flat[index], self._layers[index] = self.flat[first], self._layers[first]
        else:
            copy_one(self, origin, index, *more)

    with (
        mock.patch.object(loading, "build", map_many),
        mock.patch.object(loading, "_offload_tier", return_value="ram"),  # it would count every layer's bytes
        mock.patch.object(HostStore, "_copy_layer", copy_or_share),
    ):
        yield


def _repeated(few: Any, config: Any, dtype: torch.dtype) -> Any:
    with torch.device("meta"):
        many = AutoModelForCausalLM.from_config(config, dtype=dtype)
    for name in ("embed_tokens", "norm", "rotary_emb"):
        setattr(many.model, name, getattr(few.model, name))
    many.lm_head = few.lm_head
    for index, layer in enumerate(many.model.layers):
        source = few.model.layers[index % len(few.model.layers)]
        for name, parameter in source.named_parameters():
            owner, _, leaf = name.rpartition(".")
            # A parameter of its own over the same memory: what is moved to the device is moved for every layer.
            setattr(layer.get_submodule(owner), leaf, nn.Parameter(parameter.detach(), requires_grad=False))
    return many.eval()
