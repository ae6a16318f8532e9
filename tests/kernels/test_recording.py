"""Recorded computations: replays against the same computation by torch, to the last bit."""

import itertools
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from griffin_offload.kernels.library import library
from griffin_offload.kernels.recording import Recording, called_again, recorded
from griffin_offload.kernels.small_operators import tables_bytes

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
needs_library = pytest.mark.skipif(library() is None, reason="the kernels are not compiled")


def record(compute: Callable[[Tensor], Tensor], given: Tensor) -> tuple[Recording, Tensor]:
    with torch.no_grad(), recorded() as recording:
        result = compute(given)
    return recording, result


def trample() -> None:
    """Let memory that nobody keeps hold something else."""
    for size in (1, 16, 64, 100, 256, 1024, 4096):
        for _ in range(20):
            torch.full((size,), float("nan"))


def check(compute: Callable[[Tensor], Tensor], inputs: list[Tensor]) -> Recording:
    """Record for the first of `inputs`, and compare what replays give for the others."""
    given = inputs[0].clone()
    recording, result = record(compute, given)
    assert recording.why_not is None
    trample()
    for own in [*inputs[1:], inputs[0]]:
        given.copy_(own)
        recording.replay()
        expected = compute(own.clone())
        torch.testing.assert_close(result, expected, rtol=0, atol=0, equal_nan=True)
    return recording


def rotated(x: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    return torch.cat([-x[..., half:], x[..., :half]], dim=-1)


def mixed(x: Tensor) -> Tensor:
    """All kinds of operators: views, constants that nobody keeps, others in place, several results, changes of type."""
    scaled = x * torch.tensor(1.5, dtype=x.dtype) + torch.tensor([0.25], dtype=x.dtype)
    turned = rotated(scaled.view(2, 3, 8)) + scaled.view(2, 3, 8).transpose(0, 1).reshape(2, 3, 8)
    best, places = turned.topk(4, dim=-1)
    best = best.float().softmax(-1).to(x.dtype)
    total = torch.zeros_like(turned).scatter_add_(-1, places, best)
    total += turned
    wide, narrow = total.split([5, 3], dim=-1)
    return torch.cat([narrow, wide.sub_(1), nn.functional.silu(total), total.expand(2, 2, 3, 8)[1]], dim=-1).flatten(1)


@pytest.mark.parametrize("dtype", FLOATS)
def test_replays_give_what_torch_gives(dtype: torch.dtype):
    check(mixed, [torch.randn(2, 24).to(dtype) for _ in range(3)])


def test_matrices_are_read_where_they_are():
    """So a change of a weight's numbers is seen."""
    layer = nn.Linear(24, 24)
    given = torch.randn(2, 24)
    recording, result = record(lambda x: layer(layer(x).relu()), given)
    with torch.no_grad():
        layer.weight.mul_(2)
    recording.replay()
    assert torch.equal(result, layer(layer(given).relu()))


def test_memory_is_that_of_a_layer():
    def layers(count: int) -> Callable[[Tensor], Tensor]:
        def compute(x: Tensor) -> Tensor:
            for _ in range(count):
                x = x + rotated(x * x).softmax(-1)
            return x

        return compute

    few, many = (check(layers(count), [torch.randn(2, 64) for _ in range(2)]) for count in (2, 40))
    assert many.nbytes == few.nbytes


def test_a_view_keeps_its_memory_taken():
    def compute(x: Tensor) -> Tensor:
        first = (x * 2)[:1]  # whose other row is nobody's any more
        others = [x * number for number in range(3, 9)]
        return torch.cat([first, *others])

    check(compute, [torch.randn(2, 8) for _ in range(3)])


def test_what_is_not_the_same_again_is_called_again():
    added, seen = [1.0], list[int]()

    def more(x: Tensor, *, by: Tensor) -> tuple[Tensor, None]:
        seen.append(int(x.sum()))
        return x + added[0] * by, None

    given = torch.ones(4)
    recording, result = record(lambda x: called_again(more, x * 2, by=x * 1)[0] * 3, given)
    assert result.tolist() == [9.0] * 4
    added[0] = 2.0
    given.fill_(2)
    recording.replay()
    assert result.tolist() == [24.0] * 4
    assert seen == [8, 16]
    assert called_again(lambda x: x, 5) == 5


def test_what_is_called_again_may_call_others_again():
    factor = [2.0]

    def outer(x: Tensor) -> Tensor:
        return called_again(lambda y: y * factor[0], x + 1) * factor[0]

    given = torch.ones(4)
    recording, result = record(lambda x: called_again(outer, x) + 1, given)
    assert result.tolist() == [9.0] * 4
    factor[0] = 3.0
    recording.replay()
    assert result.tolist() == [19.0] * 4


@pytest.mark.parametrize(
    "unsure",
    [
        lambda x: x * float(x.sum()),
        lambda x: x[x > 0],
        lambda x: x if bool((x > 0).any()) else -x,
        lambda x: x + torch.rand(4),
        lambda x: torch.multinomial(x.abs(), 1),
    ],
)
def test_what_depends_on_numbers_is_not_replayed(unsure: Any):
    recording, _ = record(unsure, torch.randn(4))
    assert recording.why_not is not None


def test_nothing_is_recorded_afterwards():
    given = torch.randn(4)
    recording, result = record(lambda x: x * 2, given)
    later = given * 3
    recording.replay()
    assert torch.equal(result, given * 2)
    assert torch.equal(later, given * 3)


SIZES = st.lists(st.sampled_from([1, 2, 3, 8, 19]), min_size=1, max_size=4)


@needs_library
@settings(max_examples=60, deadline=None)
@given(sizes=SIZES, seed=st.integers(0, 2**20), data=st.data())
def test_elementwise_kernels_are_torchs_operators(sizes: list[int], seed: int, data: st.DataObject):
    """In any order of axes, broadcast, in steps; numbers that are none, and too large ones, too."""
    generator = torch.Generator().manual_seed(seed)
    order = data.draw(st.permutations(range(len(sizes))))
    alone = data.draw(st.lists(st.booleans(), min_size=len(sizes), max_size=len(sizes)))
    step = data.draw(st.sampled_from([1, 2]))
    for dtype in FLOATS:
        x = torch.randn([sizes[axis] for axis in order], generator=generator).mul_(100)
        x.flatten()[0] = float("nan")
        x.flatten()[-1] = 3e38
        x = x.to(dtype).permute([order.index(axis) for axis in range(len(sizes))])
        other = torch.randn([1 if one else size for one, size in zip(alone, sizes, strict=True)], generator=generator)
        other = other.repeat_interleave(step, -1)[..., ::step].to(dtype)

        def compute(x: Tensor, other: Tensor = other) -> Tensor:
            parts = [x * other, x + other, -x, x.clone(), x.contiguous() * x]
            parts += [x.to(kind).to(torch.float32).to(x.dtype) for kind in FLOATS]
            return torch.cat([part.expand(x.shape) for part in parts], dim=-1)

        check(compute, [x, -x])


FUNCTIONS = [nn.SiLU(), nn.GELU(), nn.GELU(approximate="tanh"), nn.Sigmoid(), nn.Tanh(), nn.ReLU()]


@needs_library
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("function", FUNCTIONS, ids=repr)
def test_functions_of_one_number_are_looked_up(function: nn.Module, dtype: torch.dtype):
    """Every number of 16 bits, in whole vectors; what is no number, too."""
    every = torch.arange(2**16, dtype=torch.int32).to(torch.uint16).view(dtype).view(2, -1)
    recording = check(function, [every[0], every[1]])
    assert recording.calls == 1
    assert [table.numel() for table in recording.tables.values()] == [2**16]
    small = check(function, [every[0, :4032], every[1, :4032]])
    assert not small.tables, "torch is as fast"


@needs_library
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("function", FUNCTIONS, ids=repr)
@pytest.mark.parametrize(("numbers", "threads"), [(4099, 1), (2**16, 3)])
def test_functions_are_those_of_torch_behind_whole_vectors(
    function: nn.Module, dtype: torch.dtype, numbers: int, threads: int
):
    """Where torch computes one number after another: some functions give others then."""
    every = torch.arange(2**16, dtype=torch.int32).to(torch.uint16).view(dtype)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        last = -(-len(every) // numbers) - 1
        pieces = [every.roll(-turn * numbers - shift)[:numbers] for turn in range(last + 1) for shift in (0, 1)]
        recording = check(function, pieces)
    finally:
        torch.set_num_threads(before)
    assert recording.calls == 1


@needs_library
def test_few_functions_are_looked_up():
    """Tables have their place in the plan."""

    def three(x: Tensor) -> Tensor:
        return x.sigmoid() + x.tanh() + nn.functional.silu(x.t()) + nn.functional.silu(x)

    recording = check(three, [torch.randn(80, 80).bfloat16(), torch.randn(80, 80).bfloat16()])
    assert len(recording.tables) == 2
    assert sum(table.nbytes for table in recording.tables.values()) == tables_bytes(80 * 80)


@needs_library
def test_kernels_of_one_recording_are_few_calls():
    """Those between two of torch's operators are one call; here all of them."""
    given = torch.randn(2, 64)
    counts = []
    for layers in (1, 20):
        recording, _ = record(lambda x, layers=layers: [x := rotated(x * x) + x for _ in range(layers)][-1], given)
        counts.append(recording.calls)
    assert counts == [1, 1]


def test_threads_record_apart():
    given, done = torch.ones(4), []
    with torch.no_grad(), recorded() as recording:
        thread = threading.Thread(target=lambda: done.append(called_again(lambda x: x + 1, torch.zeros(4))))
        thread.start()
        thread.join()
        result = given * 2
    for value in itertools.accumulate([1.0, 2.0]):
        given.fill_(value)
        recording.replay()
        assert result.tolist() == [2 * value] * 4
    assert done[0].tolist() == [1.0] * 4
