"""What this machine can do at best with the model's own matrices: GEMV bytes/s and GEMM flop/s.

    python benchmarks/ceilings.py --hidden 5120 --ff 13824 --tokens 128 --threads 1 2

Prints one JSON object per thread count. Enough different matrices are walked through to leave any cache
behind, as a decoding model does.
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

WORKING_SET_BYTES = int(1e9)
MAX_MATRICES = 64  # small shapes would otherwise need thousands of calls


@dataclass(frozen=True)
class Rates:
    """Kernel name -> rate. The ceiling is the best kernel, also where the model calls another one."""

    threads: int
    gemv_bytes_per_s: dict[str, float]
    gemm_flops_per_s: dict[str, float]


def median_s(work: Callable[[], None], repeats: int) -> float:
    work()  # warm-up: pages, kernels, thread pool
    times_s = []
    for _ in range(repeats):
        start_s = time.perf_counter()
        work()
        times_s.append(time.perf_counter() - start_s)
    return statistics.median(times_s)


def make_matrices(hidden: int, feed_forward: int, dtype: torch.dtype) -> list[torch.Tensor]:
    """[F, H] each; drawn once and copied, since drawing is slower than everything measured here."""
    first = torch.randn(feed_forward, hidden, dtype=torch.float32).mul_(0.02).to(dtype)
    count = min(MAX_MATRICES, max(2, -(-WORKING_SET_BYTES // first.nbytes)))
    return [first] + [first.clone() for _ in range(count - 1)]


def gemv_bytes_per_s(matrices: list[torch.Tensor], kernel: Callable[..., object], repeats: int) -> float:
    one = torch.randn(1, matrices[0].shape[1]).to(matrices[0].dtype)

    def work() -> None:
        for matrix in matrices:
            kernel(one, matrix)

    return sum(matrix.nbytes for matrix in matrices) / median_s(work, repeats)


def gemm_flops_per_s(matrix: torch.Tensor, tokens: int, repeats: int) -> float:
    feed_forward, hidden = matrix.shape
    many = torch.randn(tokens, hidden).to(matrix.dtype)
    return 2.0 * tokens * hidden * feed_forward / median_s(lambda: linear(many, matrix), repeats)


def measure_rates(matrices: list[torch.Tensor], tokens: int, threads: int, repeats: int) -> Rates:
    torch.set_num_threads(threads)
    stored = matrices[0]
    gemm = {str(stored.dtype): gemm_flops_per_s(stored, tokens, repeats)}
    if stored.dtype != torch.float32:  # faster on processors without bf16 instructions
        gemm["torch.float32"] = gemm_flops_per_s(stored.float(), tokens, repeats)
    gemv = {
        "linear": gemv_bytes_per_s(matrices, linear, repeats),
        "mv": gemv_bytes_per_s(matrices, lambda one, matrix: torch.mv(matrix, one[0]), repeats),
    }
    return Rates(threads, gemv, gemm)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--hidden", type=int, required=True)
    parser.add_argument("--ff", type=int, required=True)
    parser.add_argument("--tokens", type=int, default=128, help="rows of the GEMM")
    parser.add_argument("--threads", type=int, nargs="+", default=[1])
    parser.add_argument("--dtype", choices=["bfloat16", "float16", "float32"], default="bfloat16")
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    with torch.inference_mode():
        matrices = make_matrices(args.hidden, args.ff, getattr(torch, args.dtype))
        rates = [measure_rates(matrices, args.tokens, threads, args.repeats) for threads in args.threads]
    json.dump([asdict(rate) for rate in rates], sys.stdout)
    print()


if __name__ == "__main__":
    main()
