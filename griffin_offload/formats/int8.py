"""int8: symmetric whole numbers from -127 to 127, scaled by rows."""

import torch
from torch import Tensor

from griffin_offload.formats.base import divisor
from griffin_offload.formats.row_scaled import RowScaled
from griffin_offload.kernels import table


class Int8(RowScaled):
    """q [O, I] int8."""

    name, number_type, largest = "int8", torch.int8, 127
    distortion = 0.0002

    def write(self, weight: Tensor, scale: Tensor, out: Tensor, input_scale: Tensor | None = None) -> None:
        columns = None if input_scale is None else divisor(input_scale)
        table.call("quantize", "int8", weight, divisor(scale), out, columns)

    def rounded(self, numbers: Tensor) -> Tensor:
        return super().rounded(numbers.round_())


INT8 = Int8()


def _by_blocks(weight: Tensor, scale: Tensor, out: Tensor, columns: Tensor | None) -> None:
    RowScaled.write(INT8, weight, scale, out, columns)  # no scale is 0 here


table.add(table.Kernel("quantize", "int8", "by blocks", _by_blocks, ours=False), last=True)
