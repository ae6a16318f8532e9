"""What this machine can do at best with the model's own matrices: GEMV bytes/s and GEMM flop/s.

    python benchmarks/ceilings.py --hidden 5120 --ff 13824 --tokens 128 --threads 1 2 --precision int8

Prints one JSON object per thread count. Enough different matrices are walked through to leave any cache
behind, as a decoding model does. Bytes count a matrix's scales, too. Quantised matrices are only multiplied by one
row: prompts are multiplied in 16 bit or more, so the GEMM is the same for every precision.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch
from torch.nn.functional import linear

from griffin_offload.devices.host_memory import untouched_zeros
from griffin_offload.kernels import gemv as few_rows

PRECISIONS = ("none", "int8", "int4")
WORKING_SET_BYTES = int(1e9)
MAX_MATRICES = 64  # small shapes would otherwise need thousands of calls
INT4_GROUP = 32

Matrix = tuple[torch.Tensor, ...]
"""A matrix [F, H] and, when it is quantised, its scales."""


@dataclass(frozen=True)
class Rates:
    """Kernel name -> rate. The ceiling is the best kernel, also where the model calls another one."""

    threads: int
    gemv_bytes_per_s: dict[str, float]
    gemm_flops_per_s: dict[str, float]

    @property
    def best_gemv(self) -> float:
        return max(self.gemv_bytes_per_s.values())


def median_s(work: Callable[[], None], repeats: int) -> float:
    work()  # warm-up: pages, kernels, thread pool
    times_s = []
    for _ in range(repeats):
        start_s = time.perf_counter()
        work()
        times_s.append(time.perf_counter() - start_s)
    return statistics.median(times_s)


def make_matrix(hidden: int, feed_forward: int, dtype: torch.dtype, precision: str) -> Matrix:
    """[F, H] with random numbers; scales are ones."""
    if precision == "int8":
        numbers = torch.randint(-127, 128, (feed_forward, hidden), dtype=torch.int8)
        return numbers, torch.ones(feed_forward, dtype=dtype)
    if precision == "int4":
        codes = torch.randint(0, 256, (feed_forward, hidden // 2), dtype=torch.uint8)
        groups = torch.full((feed_forward, hidden // INT4_GROUP, 2), 128, dtype=torch.uint8)
        return codes, groups, torch.ones(feed_forward, dtype=dtype)
    return (torch.randn(feed_forward, hidden, dtype=torch.float32).mul_(0.02).to(dtype),)


def make_matrices(hidden: int, feed_forward: int, dtype: torch.dtype, precision: str = "none") -> list[Matrix]:
    """Drawn once and copied, since drawing is slower than everything measured here."""
    first = make_matrix(hidden, feed_forward, dtype, precision)
    count = min(MAX_MATRICES, max(2, -(-WORKING_SET_BYTES // matrix_bytes(first))))
    return [tuple(_resident(part) for part in first) for _ in range(count)]


def _resident(tensor: torch.Tensor) -> torch.Tensor:
    """A copy in huge pages, as residents are: walking through them is faster than through small ones."""
    return untouched_zeros(tensor.shape, tensor.dtype, tensor.device).copy_(tensor)


def matrix_bytes(matrix: Matrix) -> int:
    return sum(part.nbytes for part in matrix)


Kernels = dict[str, Callable[..., object]]
TORCH_INT8: Kernels = {"int8pack_mm": torch._weight_int8pack_mm}


def kernels() -> dict[str, Kernels]:
    """By precision; the first of each is what decoding calls for one row."""
    found = {
        "none": {"linear": linear, "mv": lambda one, weight: torch.mv(weight, one[0])},
        "int8": TORCH_INT8,
        "int4": {},  # torch has no kernel of this format
    }
    ours = few_rows.kernels()
    if ours is not None:
        found["none"]["few_rows"] = ours.multiply_floats
        found["int8"] = {"few_rows": ours.multiply_int8} | TORCH_INT8
        found["int4"] = {"few_rows": ours.multiply_int4_rows}
    return found


def gemv_bytes_per_s(
    matrices: list[Matrix], hidden: int, dtype: torch.dtype, kernel: Callable[..., object], repeats: int
) -> float:
    one = torch.randn(1, hidden).to(dtype)

    def work() -> None:
        for matrix in matrices:
            kernel(one, *matrix)

    return sum(map(matrix_bytes, matrices)) / median_s(work, repeats)


def gemm_flops_per_s(matrix: torch.Tensor, tokens: int, repeats: int) -> float:
    feed_forward, hidden = matrix.shape
    many = torch.randn(tokens, hidden).to(matrix.dtype)
    return 2.0 * tokens * hidden * feed_forward / median_s(lambda: linear(many, matrix), repeats)


def measure_rates(
    matrices: list[Matrix], plain: torch.Tensor, precision: str, tokens: int, threads: int, repeats: int
) -> Rates:
    """GEMV of `matrices` in `precision`, GEMM of `plain`, a floating-point matrix [F, H] of the same sizes."""
    torch.set_num_threads(threads)
    gemm = {str(plain.dtype): gemm_flops_per_s(plain, tokens, repeats)}
    if plain.dtype != torch.float32:  # faster on processors without bf16 instructions
        gemm["torch.float32"] = gemm_flops_per_s(plain.float(), tokens, repeats)
    gemv = {
        name: gemv_bytes_per_s(matrices, plain.shape[1], plain.dtype, kernel, repeats)
        for name, kernel in kernels()[precision].items()
    }
    return Rates(threads, gemv, gemm)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--hidden", type=int, required=True)
    parser.add_argument("--ff", type=int, required=True)
    parser.add_argument("--tokens", type=int, default=128, help="rows of the GEMM")
    parser.add_argument("--threads", type=int, nargs="+", default=[1])
    parser.add_argument("--dtype", choices=["bfloat16", "float16", "float32"], default="bfloat16")
    parser.add_argument("--precision", choices=PRECISIONS, default="none", help="of the one-row products")
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    dtype = getattr(torch, args.dtype)
    with torch.inference_mode():
        matrices = make_matrices(args.hidden, args.ff, dtype, args.precision)
        plain = make_matrix(args.hidden, args.ff, dtype, "none")[0]
        rates = [
            measure_rates(matrices, plain, args.precision, args.tokens, threads, args.repeats)
            for threads in args.threads
        ]
    json.dump([asdict(rate) for rate in rates], sys.stdout)
    print()


if __name__ == "__main__":
    main()
