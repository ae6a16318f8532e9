"""ggml's own quantisers: plain C functions that the extension of `xllamacpp` exports. Runs in its environment."""

import ctypes
from concurrent.futures import ThreadPoolExecutor

import numpy
import xllamacpp
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

_quantise = ctypes.CDLL(xllamacpp.xllamacpp.__file__).ggml_quantize_chunk
_quantise.restype = ctypes.c_size_t
# Type, numbers, blocks, the first number of this call, its rows, numbers of a row, what errors of inputs weigh.
_quantise.argtypes = [ctypes.c_int, *[ctypes.c_void_p] * 2, *[ctypes.c_int64] * 3, ctypes.c_void_p]


def quantise(
    values: numpy.ndarray, kind: GGMLQuantizationType, importance: numpy.ndarray | None = None, threads: int = 1
) -> numpy.ndarray:
    """uint8 [R, bytes of a row] of float32 [R, N], N a multiple of the kind's block; `importance` [N] weighs the errors
    of inputs, and without it all count as llama.cpp has it then."""
    rows, width = values.shape
    numbers, nbytes = GGML_QUANT_SIZES[kind]
    if width % numbers:
        raise ValueError(f"{kind.name} has blocks of {numbers} numbers, a row has {width}")
    values = numpy.ascontiguousarray(values, dtype=numpy.float32)
    blocks = numpy.zeros((rows, width // numbers * nbytes), dtype=numpy.uint8)
    weights = None if importance is None else numpy.ascontiguousarray(importance, dtype=numpy.float32)
    address = None if weights is None else weights.ctypes.data

    def part(first: int, end: int) -> int:
        given = values.ctypes.data, blocks.ctypes.data, first * width, end - first, width, address
        return int(_quantise(int(kind), *given))

    bounds = [rows * piece // threads for piece in range(threads + 1)]
    with ThreadPoolExecutor(threads) as pool:
        written = sum(pool.map(part, bounds[:-1], bounds[1:]))
    if written != blocks.nbytes:
        raise RuntimeError(f"ggml wrote {written} bytes of {kind.name}, {blocks.nbytes} were expected")
    return blocks
