"""The tensors of one safetensors file as views of a private mapping, none of which is touched.

The safetensors library reads the first page of every tensor that it hands out, and the kernel up to 16 MB around it: a
third of a converted 13B model. Which files are mapped here has been checked by the library before.
"""

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

_LENGTH_BYTES = 8
_DTYPES = {
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F32": torch.float32,
    "F64": torch.float64,
    "I8": torch.int8,
    "U8": torch.uint8,
    "I32": torch.int32,
    "I64": torch.int64,
    "BOOL": torch.bool,
}


def map_file(path: Path) -> dict[str, Tensor]:
    """Every tensor of a file by its name. ValueError or OSError for a file that is no longer what it was."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(_LENGTH_BYTES), "little")
        header = json.loads(file.read(length))
    start = _LENGTH_BYTES + length
    storage: Any = torch.UntypedStorage.from_file(str(path), False, path.stat().st_size)
    content = torch.empty(0, dtype=torch.uint8).set_(storage)
    found = {}
    for name, part in header.items():
        if name == "__metadata__":
            continue
        begin, end = (start + offset for offset in part["data_offsets"])
        dtype = _DTYPES.get(part["dtype"])
        if dtype is None or end > content.numel():
            raise ValueError(f"{name} has the type {part['dtype']} and ends at byte {end} of {content.numel()}")
        piece = content[begin:end]
        # Views want addresses in multiples of the type's size; files that are padded otherwise are copied.
        aligned = begin % dtype.itemsize == 0
        found[name] = (piece if aligned else piece.clone()).view(dtype).view(part["shape"])
    return found
