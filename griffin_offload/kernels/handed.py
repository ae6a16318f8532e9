"""What has to be true of tensors whose addresses kernels are handed: C sees neither sizes nor types.

Cheap enough for every call. Whoever packs an address has asked here first, or has just allocated what lies there.
"""

import torch
from torch import Tensor

from griffin_offload.kernels.compiled import NUMBER_TYPES


def check(tensor: Tensor, shape: tuple[int, ...], dtype: torch.dtype | None = None, name: str = "a tensor") -> None:
    """ValueError, by `name`, for what would be read or written past its end, or as what it is not."""
    fits = tensor.shape == shape and tensor.dtype == (dtype or tensor.dtype)
    if not (fits and tensor.is_contiguous() and tensor.is_cpu):
        kind = f" of {dtype}" if dtype else ""
        raise ValueError(f"{name}, {_told(tensor)}, must be {shape}{kind}, and contiguous, in the CPU's memory")


def check_rows(tensor: Tensor, shape: tuple[int, int], dtype: torch.dtype, name: str, *, written: bool = False) -> None:
    """The same for a matrix whose rows lie in one piece each, but may lie apart; and may not overlap if they are
    `written`."""
    fits = tensor.shape == shape and tensor.dtype == dtype and tensor.is_cpu
    in_pieces = fits and (tensor.stride(1) == 1 or shape[1] <= 1)
    if not in_pieces or (written and shape[0] > 1 and tensor.stride(0) < shape[1]):
        raise ValueError(
            f"{name}, {_told(tensor)}, must be {shape} of {dtype}, each row in one piece, in the CPU's memory"
        )


def number_type(tensor: Tensor, name: str) -> int:
    """Of the enum in halves.h; ValueError, by `name`, for numbers that kernels do not know."""
    known = NUMBER_TYPES.get(tensor.dtype)
    if known is None:
        raise ValueError(f"{name}, {_told(tensor)}, must be of one of {', '.join(map(str, NUMBER_TYPES))}")
    return known


def _told(tensor: Tensor) -> str:
    lies = "" if tensor.is_cpu else f" on {tensor.device}"
    return f"{tuple(tensor.shape)} of {tensor.dtype} in steps of {tensor.stride()}{lies}"
