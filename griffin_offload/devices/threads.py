"""Threads: one that works in the background, and how many compute on the CPU, by a short timed trial.

More threads than free cores are worse than one: OpenMP's threads spin while they wait for a descheduled one. And a
matrix of a small model is done before a second thread has woken up.

What torch keeps for a whole process is here, too. Its default type is set by transformers while it builds a model, in
any thread, so that a model that is built meanwhile is of two types. Loads of ours take turns; the type that this
thread's tensors get is named for them.
"""

import contextlib
import os
import statistics
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

_TRIAL_BYTES = 128 * 2**20  # more than a cache, where the matrix is: decoding reads memory
# One thread is done with a matrix of this size before a second one is awake.
_SMALL_BYTES = 2 * 2**20
_REPEATS = 5
_WAKING = 8  # a part of the matrix that is large enough for all threads
_START_S = 1.0  # after this long a thread whose start was interrupted never came to be
# Fewer threads are kept unless more are clearly faster: they leave room for the reader thread and for others.
_WORTH_IT = 0.9


class BackgroundThread:
    """A background thread that can be waited for even when a Ctrl-C came while it was being started.

    `threading.Thread` cannot be joined until its start is complete, and an interrupted start never is. At its end it
    lets go of its target, which mostly holds the worker: nothing large has to wait for the garbage collector.
    """

    def __init__(self, target: Callable[[], None], name: str) -> None:
        self._target: Callable[[], None] | None = target
        self._launched, self._finished = False, threading.Event()
        self._inference = False
        self._thread = threading.Thread(target=self._work, name=name, daemon=True)

    def start(self) -> None:
        # What was allocated in inference mode may be written to in inference mode alone, which is a thread's own.
        self._inference = torch.is_inference_mode_enabled()
        self._launched = True
        self._thread.start()

    def join(self) -> None:
        """Wait for the end; whoever calls has told the target to stop."""
        if self._launched:
            self._finished.wait(_START_S)
            if self._thread.ident is not None:
                self._thread.join()

    def _work(self) -> None:
        target, self._target = self._target, None
        try:
            assert target is not None, "a worker is started once"
            with torch.inference_mode(self._inference):
                target()
        finally:
            self._finished.set()


def choose_threads(inputs: int, outputs: int, dtype: torch.dtype) -> int:
    """Threads for matrices of [outputs, inputs]: 1, half or all of torch's own number, whichever is fastest.

    OMP_NUM_THREADS, when set, decides instead. The trial multiplies one row by a part of such a matrix, as decoding
    does.
    """
    most = torch.get_num_threads()
    if "OMP_NUM_THREADS" in os.environ or most == 1:
        return most
    rows = max(1, min(outputs, _TRIAL_BYTES // (inputs * dtype.itemsize)))
    if rows * inputs * dtype.itemsize < _SMALL_BYTES:
        return 1
    weight = torch.ones(rows, inputs, dtype=dtype, device="cpu")
    row = weight.new_ones(inputs)
    seconds: dict[int, list[float]] = {count: [] for count in sorted({1, max(most // 2, 1), most})}
    # In turns, so that a busy moment of the machine falls on all of them.
    for _ in range(_REPEATS):
        for count, taken in seconds.items():
            taken.append(_seconds(count, weight, row))
    best = 1
    for count, taken in seconds.items():
        if statistics.median(taken) < _WORTH_IT * statistics.median(seconds[best]):
            best = count
    return best


def _seconds(threads: int, weight: Tensor, row: Tensor) -> float:
    with limited_threads(threads):
        torch.mv(weight[: -(-len(weight) // _WAKING)], row)  # wakes the threads up
        start = time.perf_counter()
        torch.mv(weight, row)
        return time.perf_counter() - start


@contextlib.contextmanager
def limited_threads(count: int | None) -> Iterator[None]:
    """torch computes with `count` threads inside; None changes nothing."""
    before = torch.get_num_threads()
    if count is None:
        yield
        return
    # Also where it changes nothing: in a forked process torch makes a pool of threads anew, and fails where two of its
    # own threads are the first to ask for it.
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


# Modes of torch that a caller may be in and that must not reach the weights or what outlives a call.


@contextlib.contextmanager
def own_modes(device: torch.device) -> Iterator[None]:
    """No gradients, no inference mode, no autocast inside, whatever the caller's are.

    Tensors made in inference mode (residents, KV caches) could not be written to outside of it; and autocast would
    compute in another precision than the one that was planned and loaded (`dtype`).
    """
    with contextlib.ExitStack() as modes:
        modes.enter_context(torch.inference_mode(False))
        modes.enter_context(torch.no_grad())
        for kind in {"cpu", device.type}:
            if torch.is_autocast_enabled(kind):
                modes.enter_context(torch.autocast(kind, enabled=False))
        yield


_alone = threading.RLock()
_MAKERS = frozenset((torch.empty, torch.zeros, torch.ones, torch.rand, torch.randn))
"""What parameters are made by."""
_FILLERS = frozenset(
    ("normal_", "uniform_", "trunc_normal_", "kaiming_normal_", "kaiming_uniform_", "xavier_normal_", "xavier_uniform_")
)
"""What parameters are filled by, of torch or in its place, as transformers has them: by name."""


class _Typed(TorchFunctionMode):
    """Names the type of this thread's tensors that leave it to the process's default. Tensors without memory are not
    filled: on the meta device torch works out shapes of random numbers in Python, a quarter of a millisecond each."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self._dtype = dtype

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        named = dict(kwargs or {})
        if getattr(func, "__name__", "") in _FILLERS and (filled := args[0] if args else named["tensor"]).is_meta:
            return filled
        if func in _MAKERS and named.get("out") is None and named.get("dtype") is None:
            named["dtype"] = self._dtype
        return func(*args, **named)


@contextlib.contextmanager
def building(dtype: torch.dtype) -> Iterator[None]:
    """Inside, transformers builds a model of `dtype` in host memory, whatever other threads set meanwhile and whatever
    device this thread has made its default; one thread at a time."""
    with _alone, torch.device("cpu"), _Typed(dtype):
        yield


@contextlib.contextmanager
def parameters_on_meta() -> Iterator[None]:
    """Inside, this thread's modules hold parameters without memory; buffers are real. accelerate's init_empty_weights
    does it to the modules of every thread: of a model, say, that is generating."""
    me, stock = threading.get_ident(), nn.Module.register_parameter

    def register(self: nn.Module, name: str, param: nn.Parameter | None) -> None:
        stock(self, name, param)
        if param is not None and threading.get_ident() == me:
            self._parameters[name] = nn.Parameter(param.to("meta"), requires_grad=param.requires_grad)

    with _alone:
        nn.Module.register_parameter = register  # type: ignore[method-assign]
        try:
            yield
        finally:
            nn.Module.register_parameter = stock  # type: ignore[method-assign]


def put(module: nn.Module, name: str, tensor: Tensor) -> None:
    """Make `tensor` the parameter `name` of `module`, which has one of this name, or None. Assigning it would ask
    `register_parameter`, which other threads may have replaced."""
    parameter = tensor if isinstance(tensor, nn.Parameter) else nn.Parameter(tensor, requires_grad=False)
    module._parameters[name] = parameter
