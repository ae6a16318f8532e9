"""What a new token passes beside matrices and attention: norms (rms_norm.c), and copies, sums, products and functions
of a few numbers (replay.c)."""

import functools
import struct
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from griffin_offload.kernels.library import HALVES, NUMBER_TYPES, check, library, needs_gradient

# Root mean square norm of a few 16-bit rows: one call in place of eight small ones.


ROWS = 32
"""Up to so many rows one thread is faster than torch's operators."""
_NORM = struct.Struct("@3P3qf")
"""The struct Norm of rms_norm.c."""


def takes_rows(x: Tensor, weight: Tensor, *beside: object) -> bool:
    """Whether `rms_norm` takes these: a few rows of 16 bits on the CPU."""
    alike = x.dtype == weight.dtype and weight.is_contiguous() and x.is_contiguous()
    few = 0 < x.numel() <= ROWS * weight.numel() and x.shape[-1:] == weight.shape
    return alike and few and not needs_gradient(x)


def rms_norm(x: Tensor, weight: Tensor, epsilon: float, *beside: object) -> Tensor:
    """x [..., H] over the root of its mean square and `epsilon`, rounded, times `weight` [H]: as x."""
    found = library()
    assert found is not None, "the table was not asked"
    if x.dtype not in HALVES or x.shape[-1:] != weight.shape:
        raise ValueError(f"x, {tuple(x.shape)} of {x.dtype}, must be of 16-bit rows of {weight.numel()}")
    check(x, x.shape, name="x")
    check(weight, weight.shape, x.dtype, "the weight")
    normed, size = torch.empty_like(x), weight.numel()
    where = (x.data_ptr(), weight.data_ptr(), normed.data_ptr())
    found.call("rms_norm", _NORM.pack(*where, x.numel() // size, size, NUMBER_TYPES[x.dtype], epsilon))
    return normed


# Copies, sums and products of a few numbers (replay.c), for who has to do without torch's operators.


_AXES = 4
_ELEMENTWISE = struct.Struct(f"@3P3q{4 * _AXES}q")
"""The struct Elementwise of replay.c."""
COPY, NEGATE, ADD, MULTIPLY = range(4)
_aten = torch.ops.aten
OPERATIONS = {_aten.neg.default: NEGATE, _aten.add.Tensor: ADD, _aten.mul.Tensor: MULTIPLY}
"""Of torch's operators, which give the same."""


def elementwise_knows(*tensors: Any) -> bool:
    """Whether a kernel reads and writes these."""
    plain = all(type(own) in (Tensor, nn.Parameter) for own in tensors) and library() is not None
    return plain and all(own.dtype in NUMBER_TYPES and own.dim() <= _AXES and own.is_cpu for own in tensors)


def elementwise_job(operation: int, out: Tensor, *given: Tensor) -> bytearray:
    """Of replay.c: `out` becomes what `operation` makes of what is `given`, which broadcasts to it."""
    filled = (1,) * (_AXES - out.dim()) + out.shape
    steps = [own.expand(out.shape).stride() for own in (*given, *given[:1], out)]
    if len(given) == 2:
        del steps[2]
    addresses = [own.data_ptr() for own in (*given, *given[:1])][:2]
    padded = [step for own in steps for step in ((0,) * (_AXES - out.dim()) + own)]
    types = NUMBER_TYPES[given[0].dtype], NUMBER_TYPES[out.dtype]
    return bytearray(_ELEMENTWISE.pack(*addresses, out.data_ptr(), operation, *types, *filled, *padded))


def point_copy(job: bytearray, address: int, head_step: int) -> None:
    """Have the copy of `job`, whose result is [heads, D], go to an address, in so many numbers from head to head."""
    _TARGET.pack_into(job, _TARGET_AT, address)
    _STEP.pack_into(job, _HEADS_AT, head_step)


_TARGET, _STEP = struct.Struct("@P"), struct.Struct("@q")
_TARGET_AT, _HEADS_AT = 2 * _TARGET.size, _ELEMENTWISE.size - 2 * _STEP.size


# Functions of one 16-bit number (replay.c): looked up in a table of all 65,536, which torch's own operator has filled.


OF_ONE_NUMBER = (_aten.silu, _aten.gelu, _aten.sigmoid, _aten.tanh, _aten.relu)
_LOOKUP = struct.Struct("@3P2q")
"""The struct Lookup of replay.c."""
_LOOKED_UP_FROM = 4096  # numbers: fewer torch computes in about as long as its call takes
_VECTOR, _ONE_THREAD = 64, 32768  # numbers: torch computes whole vectors, and so many by one thread
MOST_TABLES = 2
"""Of one computation: most models have one function."""


class Table(NamedTuple):
    """What a function gives for each number of 16 bits."""

    numbers: Tensor
    """[65536], as torch computes them by vectors."""
    everywhere: bool
    """Whether it computes the same one by one, which it does behind the last whole vector of a thread."""


def may_be_looked_up(out: Tensor, given: Tensor) -> bool:
    """Whether a function of so many numbers is worth a table."""
    many = out.dtype in HALVES and given.dtype == out.dtype and out.numel() >= _LOOKED_UP_FROM
    return many and elementwise_knows(out, given)


def lookup_knows(out: Tensor, given: Tensor, table: Table) -> bool:
    """Whether what a function gives is what is looked up."""
    by_vectors = out.numel() % _VECTOR == 0 and out.numel() <= _ONE_THREAD
    return (table.everywhere or by_vectors) and given.is_contiguous() and out.is_contiguous()


@functools.lru_cache(2 * MOST_TABLES)
def table_of(function: Any, dtype: torch.dtype, args: tuple[Any, ...], kwargs: tuple[tuple[str, Any], ...]) -> Table:
    """`args` and `kwargs` are those beside the number."""
    every = torch.arange(2**16, dtype=torch.int32, device="cpu").to(torch.uint16).view(dtype)
    parts = every.split(_ONE_THREAD)
    numbers = torch.cat([function(part, *args, **dict(kwargs)) for part in parts])
    one_by_one = function(every.repeat_interleave(2)[::2], *args, **dict(kwargs))  # in steps there are no vectors
    return Table(numbers, torch.allclose(numbers, one_by_one, rtol=0, atol=0, equal_nan=True))


def lookup_job(table: Table, out: Tensor, given: Tensor) -> bytearray:
    """Of replay.c: `out` becomes what `table` has for what is `given`."""
    addresses = table.numbers.data_ptr(), given.data_ptr(), out.data_ptr()
    return bytearray(_LOOKUP.pack(*addresses, out.numel(), torch.get_num_threads()))


def tables_bytes(numbers: int) -> int:
    """Of the tables that a computation keeps whose functions take up to so many numbers."""
    return MOST_TABLES * 2**16 * 2 if numbers >= _LOOKED_UP_FROM else 0
