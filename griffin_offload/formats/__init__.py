"""Weight formats: how a matrix is stored, gathered and multiplied. One file each, and a registry by name.

A new one is a subclass of `Format` (base.py) and `register_format(...)`, here or at run time.
"""

from griffin_offload.formats.base import (
    Format,
    Layout,
    every,
    forget_format,
    get,
    of_copies,
    register_copy,
    register_format,
)
from griffin_offload.formats.few_bits import INT2, INT3, TiersCopy
from griffin_offload.formats.floats import FLOATS, planned_as
from griffin_offload.formats.int4 import INT4
from griffin_offload.formats.int8 import INT8

TABLE_FORMATS = (FLOATS, INT8)
"""What embeddings and head may be in."""
RESTING_HEAD = INT8
"""What a head rests in, in 16 bit in the checkpoint, where the matrices around it are in fewer bits than that."""
SMALL_MATRICES = INT8
"""What small matrices of a layer (blocks/replace.py) rest in where the others are in fewer bits than that."""
__all__ = [
    "FLOATS",
    "INT4",
    "INT8",
    "RESTING_HEAD",
    "SMALL_MATRICES",
    "TABLE_FORMATS",
    "Format",
    "Layout",
    "every",
    "forget_format",
    "get",
    "of_copies",
    "planned_as",
    "register_format",
]

for _format in (FLOATS, INT8, INT4, INT3, INT2):
    register_format(_format)
register_copy(TiersCopy(INT4, INT3, INT2))
