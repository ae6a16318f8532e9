"""Copies for tiers: every neuron in int4, in int3 and in int2, each rounded once and as well as the format can.

A prompt passes through int4, as through an int4 copy, and its residents are copied from the tensors of their own
format: `weight_int3` and `groups_int3` beside `weight` and `groups`, the scale being that of all. 10.5 bits a number;
matrices that hold no neurons are in int4 alone.
"""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from griffin_offload.config import TIERS
from griffin_offload.formats.base import Format, Layout, Spec, Tensors
from griffin_offload.formats.compensation import Compensation
from griffin_offload.formats.few_bits import INT2, INT3
from griffin_offload.formats.int4 import INT4

_OWN = ("weight", "groups")
"""Tensors that each format has for itself."""


class TiersCopy(Format):
    """int4, and beside it what int3 and int2 have."""

    name, holds, wants_importance = TIERS, (INT4, INT3, INT2), True
    bits = sum(format.bits for format in holds)
    gives_chosen, neuron_multiple, scratch_rows = True, INT4.neuron_multiple, INT4.scratch_rows

    def __init__(self) -> None:
        self._layouts = {is_down: self._layout(is_down=is_down) for is_down in (False, True)}

    def _layout(self, *, is_down: bool) -> Layout:
        def specs(outputs: int, inputs: int, down: bool) -> dict[str, Spec]:
            found: dict[str, Spec] = {}
            for format in self.holds:
                for name, spec in format.stored(is_down=down).specs(outputs, inputs, is_down=down).items():
                    found[_named(name, format)] = spec
            return found

        return replace(INT4.stored(is_down=is_down), format=self, tensors=specs)

    def stored(self, *, is_down: bool) -> Layout:
        return self._layouts[is_down]

    @property
    def option(self) -> str:
        return INT4.name

    def rests_as(self) -> Format:
        return INT4

    def outside(self) -> Format:
        return INT4

    def part(self, format: Format, full: Tensors) -> Tensors:
        others = {_named(name, other) for other in self.holds for name in _OWN}
        own = {name: full[_named(name, format)] for name in _OWN}
        return {name: tensor for name, tensor in full.items() if name not in others} | own

    def check(self, outputs: int, inputs: int, where: str, *, is_down: bool) -> None:
        INT4.check(outputs, inputs, where, is_down=is_down)

    def check_device(self, device: str) -> None:
        INT4.check_device(device)

    def quantize(
        self, weight: Tensor, dtype: torch.dtype, *, is_down: bool, compensation: Compensation | None = None
    ) -> Tensors:
        found: Tensors = {}
        for format in self.holds:
            own = format.quantize(weight, dtype, is_down=is_down, compensation=compensation)
            found |= {_named(name, format): tensor for name, tensor in own.items()}
        return found

    def compensation(self, x: Tensor, *, is_down: bool) -> Compensation:
        return INT4.compensation(x, is_down=is_down)

    def missed(self, matrix: Tensor, found: Tensors, *, is_down: bool) -> tuple[int, float]:
        return INT4.missed(matrix, self.part(INT4, found), is_down=is_down)

    def chosen_floats(self, full: Tensors, index: Tensor, dtype: torch.dtype, *, is_down: bool) -> Tensor:
        return INT4.chosen_floats(full, index, dtype, is_down=is_down)

    def row_norms(self, full: Tensors) -> Tensor:
        return INT4.row_norms(full)

    def gather_bytes(self, outputs: int, neurons: int, item_bytes: int) -> int:
        return INT4.gather_bytes(outputs, neurons, item_bytes)

    def floats_bytes(self, *sizes: Any) -> int:
        return 0  # nothing is made floats


def _named(name: str, format: Format) -> str:
    return name if format is INT4 or name not in _OWN else f"{name}_{format.name}"


TIERS_COPY = TiersCopy()
