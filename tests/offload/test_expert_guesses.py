"""Guesses of the experts that a layer will need: read when nothing else is, and never a part of the answer."""

import _thread
import contextlib
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor

from griffin_offload.checkpoint.direct_io import DirectReader, Extent
from griffin_offload.checkpoint.safetensors import map_file
from griffin_offload.devices.memory import BLOCK_BYTES, block_buffer
from griffin_offload.formats.expert_form import record_rows
from griffin_offload.offload.expert_buffers import ExpertBuffers, Place
from griffin_offload.offload.expert_cache import ExpertCache
from griffin_offload.offload.expert_store import ExpertRead, ExpertStore, ReadQueue

EXPERTS, PLACES, TOP, LAYERS = 6, 2, 2, 2
SHAPES = ((4, 3), (2, 5))


class Log:
    """A queue of one reader, which can be held in a piece, and the order in which pieces were read."""

    def __init__(self) -> None:
        self.queue, self.order = ReadQueue(1), list[str]()
        self.entered, self.released = threading.Event(), threading.Event()

    def read(self, name: str, pieces: int, *, guess: bool, fails: bool = False) -> ExpertRead:
        work = [(1, self._piece(f"{name}{number}", fails)) for number in range(pieces)]
        read = ExpertRead(0, 0, [], work, made=False)
        self.queue.add(read, guess=guess)
        return read

    def _piece(self, name: str, fails: bool) -> Callable[[], None]:
        def piece() -> None:
            self.order.append(name)
            self.entered.set()
            assert self.released.wait(60)
            if fails:
                raise OSError("the disk is gone")

        return piece


@pytest.fixture
def log():
    found = Log()
    yield found
    found.released.set()
    found.queue.close()


def test_what_is_waited_for_comes_before_guesses(log: Log):
    guess = log.read("guess", 3, guess=True)
    assert log.entered.wait(60)  # one piece of it, which nothing can call back
    other = log.read("other", 1, guess=True)
    first, second = log.read("first", 2, guess=False), log.read("second", 1, guess=False)
    log.queue.want(other)
    log.released.set()
    for read in (first, second, other, guess):
        read.done.result(60)
    assert log.order == ["guess0", "first0", "first1", "second0", "other0", "guess1", "guess2"]


def test_a_guess_that_is_cancelled_is_read_no_further(log: Log):
    guess = log.read("guess", 3, guess=True)
    assert log.entered.wait(60)
    waiting = log.read("waiting", 2, guess=True)
    log.queue.cancel(guess)
    log.queue.cancel(waiting)
    waiting.done.result(60)
    assert not guess.done.done()  # its tensors are being written to
    log.released.set()
    guess.done.result(60)
    assert (log.order, guess.read_bytes, waiting.read_bytes) == (["guess0"], 1, 0)


def test_a_reader_that_fails_says_so_to_whoever_waits(log: Log):
    log.released.set()
    failing, next_one = log.read("failing", 3, guess=False, fails=True), log.read("next", 1, guess=False)
    with pytest.raises(OSError, match="gone"):
        failing.done.result(60)
    next_one.done.result(60)
    assert log.order == ["failing0", "next0"]


def test_closing_waits_for_what_is_read(log: Log):
    before = set(threading.enumerate())
    read = log.read("read", 2, guess=True)
    assert log.entered.wait(60)
    readers = [thread for thread in set(threading.enumerate()) - before if "griffin-offload-experts" in thread.name]
    assert readers
    log.released.set()
    log.queue.close()
    assert read.done.done()
    for thread in readers:
        thread.join(60)
        assert not thread.is_alive()


def _layers(
    few: int, kind: type[ExpertStore] = ExpertStore
) -> tuple[dict[int, list[Tensor]], ExpertStore, list[ExpertCache], ExpertBuffers]:
    full = {
        layer: [
            100.0 * layer + torch.arange(EXPERTS, dtype=torch.float32)[:, None, None] + torch.zeros(EXPERTS, *shape)
            for shape in SHAPES
        ]
        for layer in range(LAYERS)
    }
    store, buffers = kind(full, evict=False), ExpertBuffers(few + 2, few)
    places = [[torch.zeros(PLACES, *shape) for shape in SHAPES] for _ in full]
    return full, store, [ExpertCache(i, store, places[i], buffers, EXPERTS) for i in full], buffers


_STEP = st.tuples(
    st.integers(0, LAYERS - 1),
    st.permutations(range(EXPERTS)),
    st.lists(st.lists(st.integers(0, EXPERTS - 1), max_size=3, unique=True), max_size=2),
    st.booleans(),
    st.booleans(),
)


@settings(max_examples=40, deadline=None)
@given(steps=st.lists(_STEP, min_size=1, max_size=20), few=st.integers(1, 5))
def test_every_token_gets_its_experts_whatever_was_guessed(steps: Sequence[tuple], few: int):
    """Right, wrong, late, of a layer that is never reached; also where a prompt comes between, or a token is not
    finished. Residents are those of a cache that guesses nothing."""
    full, store, caches, buffers = _layers(few)
    _, plain_store, plain, plain_buffers = _layers(few)
    alike = True
    with contextlib.closing(store), contextlib.closing(plain_store):
        for layer, order, guesses, prompt, stopped in steps:
            experts = order[:TOP]
            for guess in guesses:
                if caches[layer].may_guess:
                    caches[layer].guess(guess)
            index = torch.tensor([experts])
            whole = full[layer]
            for cache, own_buffers in ((caches[layer], buffers), (plain[layer], plain_buffers)):
                if prompt:
                    own_buffers.begin()
                    cache.start_pass()
                    assert not cache.may_guess
                for expert in cache.begin(sorted(experts), index, torch.ones(index.shape))[: 1 if stopped else TOP]:
                    tensors = cache.tensors(expert)
                    assert all(torch.equal(found, own[expert]) for found, own in zip(tensors, whole, strict=True))
                if prompt:
                    if not stopped:
                        cache.settle(sorted(experts))
                    cache.end_pass()
                    own_buffers.shrink()
            alike = alike and not stopped  # which of its experts such a token got is not the same
            if alike:
                assert caches[layer].residents == plain[layer].residents
                assert (caches[layer].hits, caches[layer].misses) == (plain[layer].hits, plain[layer].misses)
            assert len(caches[layer].residents) <= PLACES
            each = sum(own[0].nbytes for own in full[0])
            assert buffers.nbytes <= (buffers.limit if prompt else few) * each
        buffers.begin()  # nothing is on its way from here on
        assert store.fetched_bytes - store.wrong_bytes == store.reads * store.expert_bytes(0)
        buffers.shrink()
        for cache in caches:  # no place was lost, and none is in two hands
            cache.place(range(PLACES))
        for layer, cache in enumerate(caches):
            index = torch.tensor([list(range(PLACES))])
            for expert in cache.begin(list(range(PLACES)), index, torch.ones(index.shape)):
                tensors = cache.tensors(expert)
                assert all(torch.equal(found, own[expert]) for found, own in zip(tensors, full[layer], strict=True))


def test_a_right_guess_becomes_resident_without_a_copy():
    full, store, (cache, _), buffers = _layers(2)
    with contextlib.closing(store):
        cache.place([0, 1])
        reads = store.reads
        cache.guess([4, 5])
        assert buffers.guessed(0) == [4, 5]
        for _ in range(4):  # until they have been of more use than what is there
            index = torch.tensor([[4, 5]])
            found = {expert: cache.tensors(expert) for expert in cache.begin([4, 5], index, torch.ones(index.shape))}
        assert cache.residents == [4, 5]
        assert (cache.guessed, store.wrong_bytes) == (2, 0)
        assert store.reads - reads <= 4
        assert all(torch.equal(own[4], part) for own, part in zip(full[0], found[4], strict=True))


class Failing(ExpertStore):
    """Its readers fail when told to."""

    failing = False

    def start(self, *arguments: Any, **options: bool) -> ExpertRead:
        read = super().start(*arguments, **options)
        if self.failing:
            read.done.result(60)
            read.done = Future()
            read.done.set_exception(OSError("the disk is gone"))
        return read


def test_an_error_of_a_guess_is_raised_when_the_guess_was_right():
    full, store, (cache, _), _ = _layers(2, Failing)
    with contextlib.closing(store):
        cache.place([0, 1])

        def token(experts: list[int]) -> Sequence[int]:
            return cache.begin(experts, torch.tensor([experts]), torch.ones(1, len(experts)))

        def guess() -> None:
            store.failing = True
            cache.guess([2, 3])
            store.failing = False

        guess()
        for expert in token([0, 1]):  # nobody needed it
            assert torch.equal(cache.tensors(expert)[0], full[0][0][expert])
        guess()
        for expert in token([2, 3]):
            with pytest.raises(OSError, match="gone"):
                cache.tensors(expert)
        for expert in token([2, 3]):
            assert torch.equal(cache.tensors(expert)[0], full[0][0][expert])


def test_records_are_read_into_their_places_without_a_copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Of whole blocks, in files and in memory: one read, and nothing goes through a buffer."""
    nbytes, experts = 2 * BLOCK_BYTES, 3
    content = torch.randint(0, 256, (experts, nbytes), dtype=torch.uint8)
    # The header's size puts the records at whole blocks.
    save_file({"records": content}, tmp_path / "at", {"fill": "x"})
    size = int.from_bytes((tmp_path / "at").read_bytes()[:8], "little") + 8
    save_file({"records": content}, tmp_path / "file", {"fill": "x" * (1 + -size % BLOCK_BYTES)})
    records = map_file(tmp_path / "file")["records"]
    copied: list[int] = []
    bounced: list[int] = []
    copy = DirectReader.copy

    def count(reader: DirectReader, extent: Extent, target: Tensor) -> None:
        copied.append(extent.nbytes)
        copy(reader, extent, target)

    monkeypatch.setattr(DirectReader, "copy", count)
    monkeypatch.setattr(DirectReader, "copy_by_bounce", lambda _, extent, target: bounced.append(extent.nbytes))

    def views(rows: Tensor) -> list[Tensor]:
        return [rows[:, :100].view(torch.int8).unflatten(1, (10, 10)), rows[:, 128:7000].view(torch.int16)]

    places = block_buffer(2 * nbytes).view(2, nbytes)
    found = record_rows(views(places))
    assert found is not None
    assert (found.data_ptr(), found.shape) == (places.data_ptr(), places.shape)
    assert record_rows([tensor.contiguous() for tensor in views(places)]) is None
    with contextlib.closing(ExpertStore({0: views(records)}, evict=True)) as store:
        cache = ExpertCache(0, store, views(places), ExpertBuffers(2, 2), experts)
        cache.place([1, 2])
        if not copied:
            pytest.skip("this file system has no direct reads")
        assert torch.equal(places, content[1:])
        cache.guess([0])
        cache.begin([0], torch.tensor([[0]]), torch.ones(1, 1))
        tensors = cache.tensors(0)
        assert all(torch.equal(own, part[0]) for own, part in zip(tensors, views(content), strict=True))
        assert store.fetched_bytes == 3 * nbytes
    assert (copied, bounced) == ([nbytes] * 3, [])


def test_a_pass_has_all_buffers_and_waits_for_what_writes_to_them():
    """Tokens before it have left theirs taken; of a forward that failed, reads may go on."""
    buffers, like = ExpertBuffers(limit=2, few=2), Place([torch.zeros(4)])
    first, second = (buffers.take(like, 2) for _ in range(2))
    assert first is not None
    assert second is not None
    assert buffers.take(like, 2) is None
    first.read = ExpertRead(0, 0, first.tensors, [], made=False)
    begun = threading.Thread(target=buffers.begin)
    begun.start()
    begun.join(0.05)
    assert begun.is_alive()
    first.read.done.set_result(None)
    begun.join(10)
    assert not begun.is_alive()
    again = {id(buffers.take(like, 2)) for _ in range(2)}
    assert again == {id(first), id(second)}


@pytest.mark.skipif(not hasattr(threading, "_shutdown_locks_lock"), reason="this Python has no such lock")
def test_a_queue_is_closed_by_whoever_collects_it(log: Log):
    """Also by a thread that is being started, which holds a lock that the end of any other one waits for."""
    read = log.read("a", 2, guess=False)
    assert log.entered.wait(60)
    log.released.set()
    closed = threading.Event()

    def close() -> None:
        log.queue.close()
        closed.set()

    with vars(threading)["_shutdown_locks_lock"]:
        _thread.start_new_thread(close, ())
        assert closed.wait(10)
    assert read.done.done()
