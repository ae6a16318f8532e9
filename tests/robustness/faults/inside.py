"""Faults that come from inside a process: prepared in it, at the call of a function, or as its limits."""

import ctypes
import errno
import os
import random
import resource
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

from robustness.faults.world import NO_ROOM, RIGHT, RUNTIME, VARIANTS, Result, World, label


def at_call(place: str, number: int, harm: Callable[[], Any]) -> Callable[[], None]:
    """Preparation of a process: `harm` before the `number`-th call (from 0) of what `place` names."""

    def prepare() -> None:
        for owner, name in _places()[place]:
            setattr(owner, name, _counting(getattr(owner, name), counted, number, harm))

    counted: list[None] = []
    return prepare


def _counting(function: Callable[..., Any], counted: list[None], number: int, harm: Callable[[], Any]) -> Any:
    def call(*arguments: Any, **options: Any) -> Any:
        counted.append(None)
        if len(counted) == number + 1:
            given = harm()
            if given is not None:
                return given
        return function(*arguments, **options)

    return call


def _places() -> dict[str, list[tuple[Any, str]]]:
    """Where a fault can come from inside a process."""
    from griffin_offload.blocks.base import ChunkedForward
    from griffin_offload.blocks.feedforward import FeedForward
    from griffin_offload.checkpoint import mapped
    from griffin_offload.engine import prefill
    from griffin_offload.offload.weight_store import MmapStore

    return {
        # Before and after the computation with a layer, alternately.
        "fetch_or_check": [(MmapStore, "fetch"), (MmapStore, "read"), (MmapStore, "check")],
        "preadv": [(os, "preadv")],
        "madvise": [(mapped.LIBC, "madvise")],
        "compute": [(prefill, "select_neurons"), (FeedForward, "gather"), (ChunkedForward, "in_chunks")],
    }


def failing_disk(world: World, rng: random.Random, place: Path) -> Result:
    """EIO from a read, or from mapping pages; injected, because no disk here fails by order."""
    direct = rng.random() < 0.5
    name = "direct" if direct else rng.choice(["mapped", "slots", "exact"])
    variant = next(variant for variant in VARIANTS if variant.name == name)

    def fail() -> int:
        if direct:
            raise OSError(errno.EIO, "Input/output error")
        ctypes.set_errno(errno.EFAULT)  # what the kernel says where a page cannot be read
        return -1

    harm = at_call("preadv" if direct else "madvise", rng.randrange(40), fail)
    found = world.run(variant, world.pristine(variant.model), place, harm).outcome()
    return Result(label(found), found.problem((RIGHT, RUNTIME), world.answers_of(variant)))


# What libraries say who end the process when they are refused a few bytes: Rust's (tokenizers, safetensors), glibc's
# loader, OpenMP's. No Python comes after that.
_ABORT_WORDS = (
    "memory allocation of",
    "cannot allocate memory for thread-local data",
    "libgomp: Thread creation failed",
)
_ABORTS = [(code, list[str]()) for code in (-signal.SIGABRT, 127, 1)]


def little_memory(world: World, rng: random.Random, place: Path) -> Result:
    """The system refuses more addresses than the process has and a random share of what a run takes."""
    variant = rng.choice(VARIANTS)
    room = rng.randrange(70_000_000)

    def limit() -> None:
        taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (taken + room, taken + room))

    found = world.run(variant, world.pristine(variant.model), place, limit).outcome()
    if (found.code, found.error_lines) in _ABORTS and any(words in found.err for words in _ABORT_WORDS):
        return Result("ended by a library below Python, which says so", None)
    return Result(label(found), found.problem((RIGHT, NO_ROOM), world.answers_of(variant)))


def device_memory(world: World, rng: random.Random, place: Path) -> Result:
    """CUDA's allocator refuses, inside a pass; injected, because there is no such device here."""
    variant = rng.choice(VARIANTS)

    def refuse() -> None:
        import torch

        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB. GPU 0 has 1.00 MiB free.")

    harm = at_call("compute", rng.randrange(6), refuse)
    found = world.run(variant, world.pristine(variant.model), place, harm).outcome()
    return Result(label(found), found.problem((NO_ROOM,), world.answers_of(variant)))
