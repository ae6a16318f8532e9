"""Round a checkpoint's FF matrices by one of ggml's codecs, and write them as numbers again: rivals of real_models.py.

    PYTHONPATH=benchmarks ENV/bin/python -m peers.worker_codecs CHECKPOINT IMPORTANCE.npz CODEC OUT

IMPORTANCE has, by a matrix's name, what an error of each of its inputs weighs. Rows of no whole blocks are tried in two
ways, filled up by zeros that weigh nothing and each behind the other without a gap, and what errs less is taken. OUT
receives a float32 .npy for each matrix; one line of JSON says the codec's bits a weight, and how many matrices took
which way. ENV has `xllamacpp`, `gguf` and `numpy`.
"""

import argparse
import json
import sys
from collections import Counter
from pathlib import Path

import numpy
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, quants
from peers.ggml import quantise
from peers.gguf_file import checkpoint_tensors, float32

PARTS = ("gate_proj", "up_proj", "down_proj")


def filled_up(values: numpy.ndarray, kind: GGMLQuantizationType, weights: numpy.ndarray) -> numpy.ndarray:
    """The numbers [R, N] by rows whose last block has zeros behind them, if it is not whole."""
    width = values.shape[1]
    missing = -width % GGML_QUANT_SIZES[kind][0]
    blocks = quantise(numpy.pad(values, ((0, 0), (0, missing))), kind, numpy.pad(weights, (0, missing)))
    return quants.dequantize(blocks, kind).reshape(len(values), -1)[:, :width]


def joined(values: numpy.ndarray, kind: GGMLQuantizationType, weights: numpy.ndarray) -> numpy.ndarray:
    """The same by one row of all."""
    blocks = quantise(values.reshape(1, -1), kind, numpy.tile(weights, len(values)))
    return quants.dequantize(blocks, kind).reshape(values.shape)


def rounded(
    values: numpy.ndarray, kind: GGMLQuantizationType, weights: numpy.ndarray
) -> tuple[numpy.ndarray, float, str]:
    """Numbers, their squared error over that of zeros, weighed, and how rows lay."""
    size = GGML_QUANT_SIZES[kind][0]
    ways = {"rows of whole blocks": filled_up}
    if values.shape[1] % size:
        ways = {"rows filled up": filled_up} | ({} if values.size % size else {"rows joined": joined})
    found = []
    for name, way in ways.items():
        numbers = way(values, kind, weights)
        error = ((numbers - values).astype("f8") ** 2 @ weights).sum() / (values.astype("f8") ** 2 @ weights).sum()
        found.append((numbers, float(error), name))
    return min(found, key=lambda each: each[1])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="checkpoint")
    parser.add_argument("importance", type=Path)
    parser.add_argument("codec", help="Q4_K, IQ3_XXS, ...")
    parser.add_argument("out", type=Path)
    args = parser.parse_args()
    kind, importance = GGMLQuantizationType[args.codec], numpy.load(args.importance)
    tensors = {name.removesuffix(".weight"): tensor for name, tensor in checkpoint_tensors(args.folder).items()}
    args.out.mkdir()
    ways: Counter[str] = Counter()
    errors = []
    for name in (name for name in tensors if name.endswith(PARTS)):
        numbers, error, way = rounded(float32(tensors[name].read()), kind, importance[name].astype("f4"))
        numpy.save(args.out / f"{name}.npy", numbers.astype("f4"))
        ways[way] += 1
        errors.append(error)
    count, nbytes = GGML_QUANT_SIZES[kind]
    print(json.dumps({"bits": 8 * nbytes / count, "ways": ways, "error": sum(errors) / len(errors)}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
