"""The ceilings of this machine for one model: disk, GEMV and GEMM, and the thread count of each side."""

import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ceilings import Rates
from disk import checkpoint_files, drop_page_cache, measure_read
from model_bytes import Ceilings, ModelBytes

DISK_METHODS = ("mmap, WILLNEED", "pread, O_DIRECT, 2 threads")  # the two fastest of disk.py
DISK_SAMPLE_BYTES = int(2e9)


@dataclass(frozen=True)
class SideCeilings:
    """Each side with the thread count that suits it."""

    ours: Ceilings
    rival: Ceilings


def measure_disk(folder: Path) -> float:
    """Best cold sequential rate, each method on other files so that no host cache helps the second."""
    files = [path for path in checkpoint_files(folder) if path.stat().st_size >= DISK_SAMPLE_BYTES]
    files = files or checkpoint_files(folder)
    rates = []
    for number, method in enumerate(DISK_METHODS * 2):
        path = files[number % len(files)]
        drop_page_cache([path])
        figure = measure_read(path, method, DISK_SAMPLE_BYTES)
        rates.append(figure.read_bytes / figure.wall_s)
    return max(rates)


def measure_rates(
    model: ModelBytes, prompt_tokens: int, threads: Sequence[int], precision: str = "none"
) -> list[Rates]:
    """In a process of its own, so that its matrices are gone before the sides run."""
    command = [sys.executable, str(Path(__file__).with_name("ceilings.py")), "--hidden", str(model.hidden)]
    command += ["--ff", str(model.feed_forward), "--tokens", str(prompt_tokens), "--precision", precision]
    command += ["--threads", *map(str, threads)]
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    return [Rates(**rates) for rates in json.loads(output.splitlines()[-1])]


def choose_threads(rates: Sequence[Rates], flops: float, token_bytes: int, tokens: int) -> int:
    """The thread count whose compute alone, at the kernels `linear` really calls, is done first."""

    def compute_s(rate: Rates) -> float:
        stored = next(iter(rate.gemm_flops_per_s.values()))
        return flops / stored + (tokens - 1) * token_bytes / next(iter(rate.gemv_bytes_per_s.values()))

    return min(rates, key=compute_s).threads


def ceilings_for(rates: Sequence[Rates], threads: int, disk_bytes_per_s: float) -> Ceilings:
    rate = next(rate for rate in rates if rate.threads == threads)
    return Ceilings(threads, disk_bytes_per_s, rate.best_gemv, max(rate.gemm_flops_per_s.values()))


def measure_ceilings(
    folder: Path,
    model: ModelBytes,
    threads: Sequence[int],
    prompt_tokens: int,
    density: float,
    precision: str,
    new_tokens: tuple[int, int],
) -> SideCeilings:
    """`new_tokens` of ours and of the rival weigh decoding against the prompt when threads are chosen."""
    disk_bytes_per_s = measure_disk(folder)
    rates = measure_rates(model, prompt_tokens, threads)
    our_rates = rates if precision == "none" else measure_rates(model, prompt_tokens, threads, precision)
    for rate, ours in zip(rates, our_rates, strict=True):  # the same products, measured twice
        for kernel, flops_per_s in ours.gemm_flops_per_s.items():
            fastest = max(flops_per_s, rate.gemm_flops_per_s[kernel])
            rate.gemm_flops_per_s[kernel] = ours.gemm_flops_per_s[kernel] = fastest
    flops = model.prefill_flops(prompt_tokens)
    our_threads = choose_threads(our_rates, flops, model.token_bytes(density, precision), new_tokens[0])
    rival_threads = choose_threads(rates, flops, model.bytes_per_token, new_tokens[1])
    return SideCeilings(
        ours=ceilings_for(our_rates, our_threads, disk_bytes_per_s),
        rival=ceilings_for(rates, rival_threads, disk_bytes_per_s),
    )
