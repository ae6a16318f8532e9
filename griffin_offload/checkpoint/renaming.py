"""How transformers names what a checkpoint calls otherwise: its own mapping, asked without loading anything.

Old names, names without the base model's prefix or with another one, several tensors that became one. The rules are
transformers' (conversion_mapping.py, core_model_loading.py; the same functions from 5.20 to 5.24), and so is the code
that applies them.
"""

import copy
import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    Concatenate,
    MergeModulelist,
    WeightConverter,
    WeightRenaming,
    build_glob_alternation,
    dot_natural_key,
    rename_source_key,
    revert_weight_conversion,
)

from griffin_offload.blocks.routing import RENAMED
from griffin_offload.transformers_api import StockModel


@dataclass(frozen=True)
class Conversion:
    """What makes one tensor of the model, or several at once."""

    target: str
    """The first of them."""
    sources: tuple[str, ...]
    """The checkpoint's names, in order."""
    rule: Any = None
    """transformers' own, where more than the name changes."""
    patterns: tuple[str, ...] = ()
    """Of the rule, one for each of `sources`."""

    @property
    def of_experts(self) -> bool:
        """Whether it makes one tensor of those of all experts of a layer."""
        return self.rule is not None and any(isinstance(step, MergeModulelist) for step in self.rule.operations)

    def by_expert(self) -> list[dict[str, str | None]] | None:
        """For each expert the checkpoint's names by pattern, in the order in which they lie one above the other in its
        row of the target, None for one that is missing; None where the rule does more than laying them so."""
        steps = self.rule.operations
        simple = [isinstance(step, kind) for step, kind in zip(steps, (MergeModulelist, Concatenate), strict=False)]
        if len(steps) > 2 or not all(simple) or steps[0].dim != 0 or (len(steps) == 2 and steps[1].dim != 1):
            return None
        patterns = list(self.rule.source_patterns)
        numbers: dict[int, dict[str, str | None]] = {}
        for name, pattern in zip(self.sources, self.patterns, strict=True):
            match = re.search(_numbered(pattern), name)
            if match is None or not match.groups():
                return None
            numbers.setdefault(int(match[1]), dict.fromkeys(patterns))[pattern] = name
        return [numbers.get(expert, dict.fromkeys(patterns)) for expert in range(max(numbers) + 1)]

    def missing(self, expert: int, pattern: str) -> str:
        """The name that `pattern` would have for `expert`."""
        known = next(name for name, own in zip(self.sources, self.patterns, strict=True) if own == pattern)
        return re.sub(_numbered(pattern), lambda found: pattern.replace(r"\.", ".").replace("*", str(expert)), known)

    def apply(self, model: StockModel, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Tensors of `model` by name, made of `tensors`, which are the sources'."""
        if self.rule is None:
            return {self.target: tensors[self.sources[0]]}
        rule = copy.deepcopy(self.rule)
        for name, pattern in zip(self.sources, self.patterns, strict=True):
            rule.add_tensor(self.target, name, pattern, tensors[name])
        made = rule.convert(self.target, model=model, config=model.config)
        return {name: tensor[0] if isinstance(tensor, list) else tensor for name, tensor in made.items()}


ONE_BY_ONE = {
    "llama4_text": (
        (("experts.*.gate_proj.weight", "experts.*.up_proj.weight"), "experts.gate_up_proj"),
        (("experts.*.down_proj.weight",), "experts.down_proj"),
    )
}
"""By model type, what makes the tensors of all experts of a layer where they were saved one by one, [outputs, inputs],
as libraries do that quantise single matrices; transformers reads such files of these types in no way."""


def _one_by_one(model: StockModel) -> list[WeightConverter]:
    known = ONE_BY_ONE.get(model.config.get_text_config().model_type, ())
    stacked = [MergeModulelist(dim=0)], [MergeModulelist(dim=0), Concatenate(dim=1)]
    return [WeightConverter(list(sources), target, stacked[len(sources) - 1]) for sources, target in known]


def _numbered(pattern: str) -> str:
    """As an expression; some of transformers' patterns are written as such, but for their star."""
    return re.escape(pattern.replace(r"\.", ".")).replace(r"\*", r"(\d+)")


def conversions_of(model: StockModel, names: Iterable[str]) -> list[Conversion]:
    """Which tensors of `names` make which of those of `model`. Names that lead nowhere are left out. What was used is
    noted in `model`, as transformers does for saving it under the same names."""
    own = RENAMED.get(model.config.model_type, {}).items()
    transforms = [*get_model_conversion_mapping(model), *(WeightRenaming(old, new) for old, new in own)]
    transforms += _one_by_one(model)
    renamings = [entry for entry in transforms if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in transforms if isinstance(entry, WeightConverter)]
    rules = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    there, prefix = model.state_dict(), model.base_model_prefix
    found: dict[str, Conversion] = {}
    for name in sorted(names, key=dot_natural_key):
        target, pattern = rename_source_key(name, renamings, converters, prefix, there)
        if target not in there and name in there:
            target, pattern = rename_source_key(name, [], [], base_model_prefix=prefix, meta_state_dict=there)
        if target in there and pattern is None:
            found.setdefault(target, Conversion(target, (name,)))
        elif target in there:
            before = found.get(target, Conversion(target, (), rules[pattern]))
            more = (*before.sources, name), before.rule, (*before.patterns, pattern)
            found[target] = Conversion(target, *more)
    model._weight_conversions = [transform for transform in transforms if transform.was_used()]
    return list(found.values())


def names_left_out(
    model: StockModel, config: PretrainedConfig, names: Iterable[str], towers: Collection[str]
) -> set[str]:
    """Those of `names` that belong to what a checkpoint of `config` sees or hears with: `model` is its language model,
    and `towers` are `left_out_parts` of it, none where its class knows of text alone."""
    if towers or config.get_text_config() is config:
        return {name for name in names if not set(towers).isdisjoint(name.split("."))}
    alike = {name: _NUMBER.sub("0", name) for name in names}  # one of each kind is asked about
    used = {part for own in conversions_of(model, set(alike.values())) for name in own.sources for part in _parts(name)}
    return {name for name, kind in alike.items() if _begins_elsewhere(kind, used)}


_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")


def _parts(name: str) -> Iterator[str]:
    """What `name` begins with, up to each of its dots, and all of it."""
    return accumulate(name.split("."), "{}.{}".format)


def _begins_elsewhere(name: str, used: Collection[str]) -> bool:
    """Whether it leaves what is `used` outside of all lists: inside of one, packed matrices have names of their own."""
    first = next((part for part in _parts(name) if part not in used), None)
    return first is not None and "0" not in first.split(".")


def same_names(model: StockModel, names: Iterable[str]) -> list[Conversion]:
    """The same for checkpoints that name every tensor as the model does."""
    there = model.state_dict()
    return [Conversion(name, (name,)) for name in names if name in there]


def saved(model: StockModel, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """`tensors` of `model`, by the names and in the pieces that checkpoints of it have: experts one by one."""
    found: dict[str, Tensor] = revert_weight_conversion(model, dict(tensors))
    return found


class KeptTypes:
    """Which tensors of a model transformers keeps in another precision than the model's."""

    def __init__(self, model: StockModel, dtype: torch.dtype) -> None:
        plan = model._get_dtype_plan(dtype)
        self._types = plan
        self._pattern, self._globs, _ = build_glob_alternation(list(plan)) if plan else (None, {}, {})

    def of(self, name: str, expected: Tensor) -> torch.dtype:
        """The type of `name`, which is `expected` in the model as it was built."""
        match = self._pattern.search(name) if self._pattern is not None else None
        if match is None or match.lastgroup is None:
            return expected.dtype
        found: torch.dtype = self._types[self._globs[match.lastgroup]]
        return found
