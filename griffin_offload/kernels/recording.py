"""A computation on the CPU that is recorded once and replayed: what a CUDA graph is on a GPU.

A token of decode is some hundred operations of microseconds each, and the modules of Python around them take longer
than they do. A `Recording` watches one computation while it runs: torch's operators, each with a place in memory for
what it gives, and the calls of our kernels, whose structs hold addresses already. `replay` does the same at the same
addresses. What is not the same every time (keys and values become more, experts are others) is `called_again`, Python
and all.

A result that nothing refers to any more leaves its memory to later ones: all of it is about what one layer has at once.
"""

import contextlib
import ctypes
import functools
import gc
import itertools
import struct
import threading
from collections.abc import Callable, Hashable, Iterator
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from griffin_offload.kernels.library import Job, Kernel, Library, library, note_calls
from griffin_offload.kernels.small_operators import (
    COPY,
    MOST_TABLES,
    OF_ONE_NUMBER,
    OPERATIONS,
    elementwise_job,
    elementwise_knows,
    lookup_job,
    lookup_knows,
    may_be_looked_up,
    table_of,
)

_ALIGNED, _BLOCKS = 64, 256
_aten = torch.ops.aten
_EMPTY = (_aten.empty, _aten.empty_like, _aten.new_empty, _aten.empty_strided, _aten.new_empty_strided)
_COPIES = (_aten.clone, _aten._to_copy)
# Operators whose shapes or answers depend on numbers, or that draw some.
_UNSURE = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape, torch.Tag.nondeterministic_seeded}

_MASKS, _PLAIN = (torch.bool, torch.uint8), (Tensor, nn.Parameter)

Step = tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]]
_CALL, _CALLS = struct.Struct("@2P"), struct.Struct("@Pq")


class _Memory:
    """Of results: blocks that are given anew when no tensor lies in them any more."""

    def __init__(self) -> None:
        self._free: dict[int, list[Tensor]] = {}
        self._taken: list[tuple[StorageWeakRef, Tensor]] = []
        self._all: dict[int, Tensor] = {}
        self.nbytes = 0

    def like(self, result: Tensor) -> Tensor:
        """Room for a tensor of the same shape, strides and type."""
        block = self._block(max(-(-_extent(result) * result.itemsize // _ALIGNED), 1) * _ALIGNED)
        made = _lying_at(block.data_ptr(), result, block)
        self._taken.append((StorageWeakRef(made.untyped_storage()), block))
        return made

    def _block(self, nbytes: int) -> Tensor:
        if not self._free.get(nbytes):
            self._reclaim()
        if self._free.get(nbytes):
            return self._free[nbytes].pop()
        self.nbytes += nbytes
        block = torch.empty(nbytes, dtype=torch.uint8, device="cpu")
        self._all[block.data_ptr()] = block
        return block

    def _reclaim(self) -> None:
        """Find blocks in which no tensor lies any more."""
        taken = []
        for reference, block in self._taken:
            if reference.expired():
                self._free.setdefault(block.numel(), []).append(block)
            else:
                taken.append((reference, block))
        self._taken = taken

    def alias(self, tensor: Tensor) -> Tensor:
        """The same numbers; of a tensor in a block one that does not keep it taken."""
        block = self._all.get(tensor.untyped_storage().data_ptr())
        return tensor if block is None else _lying_at(tensor.data_ptr(), tensor, block)

    def holds(self, tensor: Tensor) -> bool:
        """Whether it lies in a block."""
        return tensor.untyped_storage().data_ptr() in self._all


def _extent(tensor: Tensor) -> int:
    """Numbers from its first to behind its last one in memory."""
    if not tensor.numel():
        return 0
    return 1 + sum((size - 1) * step for size, step in zip(tensor.shape, tensor.stride(), strict=True))


def _lying_at(address: int, like: Tensor, owner: object) -> Tensor:
    """A tensor as `like`, whose memory from `address` on is the `owner`'s."""
    if not like.numel():
        return torch.empty_strided(like.shape, like.stride(), dtype=like.dtype, device="cpu")
    memory = (ctypes.c_char * (_extent(like) * like.itemsize)).from_address(address)
    memory.owner = owner  # type: ignore[attr-defined]  # kept for as long as the tensor, wherever it goes
    return torch.frombuffer(memory, dtype=like.dtype).as_strided(like.shape, like.stride())


class Recording(TorchDispatchMode):
    """What `recorded` watched. `why_not` says why it cannot be replayed, if it cannot."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._memory, self._steps = _Memory(), list[Step | KernelCall]()
        self._ready = list[Step]()
        self._kept = list[Tensor]()
        self.tables: dict[Hashable, Tensor] = {}
        """Of functions that are looked up."""
        self._library = library()
        self._apart = False
        self.why_not: str | None = None

    @property
    def nbytes(self) -> int:
        """Of what replays write to."""
        return self._memory.nbytes

    @property
    def calls(self) -> int:
        """That a replay makes."""
        return len(self._ready)

    @torch.no_grad()
    def replay(self) -> None:
        """Do it again; results are where they were."""
        for function, args, kwargs in self._ready:
            function(*args, **kwargs)

    def close(self) -> None:
        """Nothing is recorded any more: kernels that follow each other become one call."""
        for kind, steps in itertools.groupby(self._steps, type):
            if kind is KernelCall:
                assert self._library is not None, "its kernels were called"
                self._ready.append(in_turn(self._library, cast(list[KernelCall], list(steps))))
            else:
                self._ready += cast(list[Step], list(steps))

    def note_call(self, kernel: Kernel, job: Job) -> None:
        """A kernel was called."""
        if not self._apart:
            self._steps.append(KernelCall(kernel, job))

    def call_again(self, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What `function` gives for these, as a whole: it is called again by every replay."""
        if self._apart:  # a part of what is called again already
            return function(*args, **kwargs)
        with self.paused():
            return self._written_again(function, args, kwargs, function(*args, **kwargs))

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Inside, nothing is recorded, and nothing kept for replays."""
        before, self._apart = self._apart, True
        try:
            yield
        finally:
            self._apart = before

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Nothing is compiled here; torch would import its compiler to say so."""
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, kind = kwargs or {}, _kind_of(func)
        result = func(*args, **kwargs)
        if self._apart:
            return result
        if kind == "view":
            self._keep(result)
            return result
        given = list(_tensors(args, kwargs))
        # Indexed by places a tensor has the shape of these; by booleans it has as many rows as are true.
        by_places = func is _aten.index.Tensor and not any(own.dtype in _MASKS for own in given[1:])
        if (kind == "unsure" and not by_places) or any(not tensor.is_cpu for tensor in given):
            self.why_not = self.why_not or f"{func} depends on numbers"
            return result
        if kind == "empty":
            return self._memory.like(result)
        if kind == "in place":
            if func is not _aten.copy_.default or not self._copied(args[0], args[1]):
                self._steps.append((func, *self._aliases((args, kwargs))))
            return result
        storages = {tensor.untyped_storage().data_ptr() for tensor in given} - {0}
        found = list(_tensors(result))
        if all(own.untyped_storage().data_ptr() in storages for own in found):
            self._keep(found)  # it lies in what was given, as views do
            return result
        return self._written_again(func, args, kwargs, result)

    def _written_again(self, function: Any, args: Any, kwargs: Any, result: Any) -> Any:
        """`result`, in places of its own, where every replay writes it."""
        placed = _changed(result, self._placed)
        if isinstance(placed, Tensor) and self._by_kernel(function, args, kwargs, placed):
            return placed
        out = _changed(placed, self._memory.alias)
        args, kwargs = self._aliases((args, kwargs))
        by_torch = isinstance(function, torch._ops.OpOverload) and isinstance(out, Tensor) and _are_plain(args)
        writing = _writing(function) if by_torch else None
        if writing is not None:
            self._steps.append((writing, args, kwargs | {"out": out}))
        else:
            self._steps.append((_copy_into, (out, function, args, kwargs), {}))
        return placed

    def _by_kernel(self, function: Any, args: Any, kwargs: Any, out: Tensor) -> bool:
        """Whether a kernel of ours gives the same: of the smallest operators, which take less time than their call."""
        if getattr(function, "overloadpacket", None) in _COPIES:
            return self._copied(out, args[0])
        if function is _aten.cat.default:
            parts, axis = args[0], args[1] if len(args) > 1 else 0
            places = out.split([part.shape[axis] for part in parts], axis)
            return elementwise_knows(*places, *parts) and all(map(self._copied, places, parts))
        if getattr(function, "overloadpacket", None) in OF_ONE_NUMBER:
            return self._looked_up(function, args, kwargs, out)
        operation = OPERATIONS.get(function)
        if operation is None or kwargs.get("alpha", 1) != 1 or not elementwise_knows(out, *args):
            return False
        if {own.dtype for own in args} != {out.dtype}:
            return False
        self._call_elementwise(operation, out, *args)
        return True

    def _looked_up(self, function: Any, args: Any, kwargs: Any, out: Tensor) -> bool:
        """Whether what torch's `function` gives is looked up, in a table that it has made itself."""
        key = function, out.dtype, args[1:], tuple(kwargs.items())
        if not may_be_looked_up(out, args[0]) or (key not in self.tables and len(self.tables) == MOST_TABLES):
            return False
        table = table_of(*key)
        if not lookup_knows(out, args[0], table):
            return False
        self.tables[key] = table.numbers
        assert self._library is not None, "its numbers are known"
        self._steps.append(KernelCall(self._library.functions.look_up, lookup_job(table, out, args[0])))
        return True

    def _copied(self, out: Tensor, source: Tensor) -> bool:
        """Whether a kernel copies `source`."""
        known = elementwise_knows(out, source)
        if known:
            self._call_elementwise(COPY, out, source)
        return known

    def _call_elementwise(self, operation: int, out: Tensor, *given: Tensor) -> None:
        assert self._library is not None, "its numbers are known"
        self._steps.append(KernelCall(self._library.functions.elementwise, elementwise_job(operation, out, *given)))

    def _keep(self, views: Any) -> None:
        """Have the memory of views outlive the run that is recorded: a constant's may be nobody's any more."""
        self._kept += [own for own in _tensors(views) if not self._memory.holds(own)]

    def _placed(self, result: Tensor) -> Tensor:
        return self._memory.like(result).copy_(result)

    def _aliases(self, values: Any) -> Any:
        return _changed(values, self._memory.alias)


class KernelCall(NamedTuple):
    kernel: Kernel
    job: Job


def in_turn(own: Library, calls: list[KernelCall]) -> Step:
    """Several calls as one of C. Jobs are read where they are: whoever changes one changes the call."""
    jobs = [(ctypes.c_char * len(job)).from_buffer(job) for _, job in calls]
    addresses = [ctypes.cast(cast(Any, call.kernel), ctypes.c_void_p).value for call in calls]
    pairs = zip(addresses, map(ctypes.addressof, jobs), strict=True)
    packed = ctypes.create_string_buffer(b"".join(_CALL.pack(*pair) for pair in pairs))
    job = _CALLS.pack(ctypes.addressof(packed), len(calls))
    return functools.partial(_call, own.functions.in_turn, (jobs, packed)), (job, own.parallel), {}


def _call(kernel: Kernel, kept: object, job: bytes, parallel: ctypes.c_void_p) -> None:
    kernel(job, parallel)


def _are_plain(args: Any) -> bool:
    return all(type(own) in _PLAIN for own in _tensors(args))


def _tensors(*values: Any) -> Iterator[Tensor]:
    """Those in arguments or results, one by one: torch's own way to walk trees knows more kinds, and takes longer."""
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (tuple, list)):
            yield from _tensors(*value)
        elif isinstance(value, dict):
            yield from _tensors(*value.values())


def _changed(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """The same with other tensors."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, (tuple, list)):
        new = [_changed(own, change) for own in value]
        return type(value)(*new) if hasattr(value, "_fields") else tuple(new) if isinstance(value, tuple) else new
    return {name: _changed(own, change) for name, own in value.items()} if isinstance(value, dict) else value


@functools.cache
def _kind_of(operator: Any) -> str:
    """What is to be known of an operator of torch's."""
    if operator.is_view:
        return "view"
    if _UNSURE & set(operator.tags):
        return "unsure"
    if operator.overloadpacket in _EMPTY:
        return "empty"
    return "in place" if operator._schema.is_mutable else "plain"


@functools.cache
def _writing(function: Any) -> Any:
    """Of an operator of torch's the one that takes the same and writes what it gives; None where there is none."""
    taken = [(own.name, str(own.type)) for own in function._schema.arguments]
    packet = function.overloadpacket
    for name in packet.overloads():
        other = getattr(packet, name)
        arguments = other._schema.arguments
        if [(own.name, str(own.type)) for own in arguments if not own.is_out] == taken and any(
            own.is_out and own.name == "out" for own in arguments
        ):
            return other
    return None


def _copy_into(out: Any, function: Callable[..., Any], args: Any, kwargs: Any) -> None:
    """Call it, and copy what it gives to where that was before."""
    for own, new in zip(_tensors(out), _tensors(function(*args, **kwargs)), strict=True):
        own.copy_(new)


def recorded_bytes(result_bytes: int) -> int:
    """Of a recording whose results take so many at once: the rest of a block may go with each."""
    return result_bytes + _BLOCKS * _ALIGNED


def is_recording() -> bool:
    """Whether what this thread computes is recorded."""
    return _current.recording is not None


@contextlib.contextmanager
def unrecorded() -> Iterator[None]:
    """Inside, nothing is recorded: what a replay finds done, in other places than now."""
    recording = _current.recording
    with contextlib.nullcontext() if recording is None else recording.paused():
        yield


class _Current(threading.local):
    recording: Recording | None = None


_current = _Current()


@contextlib.contextmanager
def recorded() -> Iterator[Recording]:
    """Inside, what this thread computes is recorded."""
    recording, collects = Recording(), gc.isenabled()
    _current.recording = recording
    gc.disable()  # all that is made here stays, and to look for what does not would take longer than all of it
    try:
        with note_calls(recording.note_call), recording:
            yield recording
    finally:
        _current.recording = None
        recording.close()
        if collects:
            gc.enable()


def called_again(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """What `function` gives for these, which a replay calls again: it sees what has changed meanwhile. Results have to
    have the same shapes every time."""
    recording = _current.recording
    return function(*args, **kwargs) if recording is None else recording.call_again(function, args, kwargs)
