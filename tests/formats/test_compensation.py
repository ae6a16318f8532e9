"""Int4 whose errors later inputs make up for, against least squares solved anew for every input, in float64."""

from collections.abc import Callable
from contextlib import nullcontext

import pytest
import quantised_reference as ref
import torch
from torch import Tensor

from griffin_offload.formats.base import neuron_scale, row_scale
from griffin_offload.formats.compensation import (
    FLOOR,
    SHRINKING,
    Compensation,
    Packed,
    Passing,
    feedback,
    has_huge_token,
    known_of,
)
from griffin_offload.formats.floats import FLOATS
from griffin_offload.formats.int4 import INT4
from griffin_offload.kernels import table
from griffin_offload.kernels.by_blocks import Scratch

GROUP = ref.GROUP


def _random(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def _inputs(tokens: int, inputs: int) -> Tensor:
    """[T, I], which go together, and of which some are large."""
    x = _random(tokens, inputs, seed=1) + _random(tokens, 8, seed=2) @ _random(8, inputs, seed=3)
    return x * torch.exp(_random(inputs, seed=4))


def _moments(x: Tensor) -> Tensor:
    """[I, I], shrunk towards their diagonal, which has a floor."""
    moments = x.double().t() @ x.double() / len(x)
    own = moments.diagonal() + FLOOR * moments.diagonal().sqrt().mean() ** 2
    return (1 - SHRINKING) * moments + SHRINKING * own.diag()


def _objective(x: Tensor, change: Tensor) -> float:
    """Of a change [O, I] of the weights."""
    return float(((change.double() @ _moments(x)) * change.double()).sum())


def _in_order(counts: Tensor, *, neurons: bool) -> list[int]:
    """Indices of inputs, or of whole groups, from those that count most on."""
    if neurons:
        return sorted(range(len(counts)), key=lambda i: -float(counts[i]))
    groups = sorted(range(len(counts) // GROUP), key=lambda g: -float(counts[g * GROUP : (g + 1) * GROUP].sum()))
    return [g * GROUP + i for g in groups for i in range(GROUP)]


def _by_least_squares(weight: Tensor, stored: ref.Int4, moments: Tensor, order: list[int]) -> Tensor:
    """Levels [O, I] of `weight` [O, I]: one input after another goes to its nearest level, and all that are left become
    what errs least. Steps and offsets [O, I] are those that were stored."""
    now, levels = weight.double().clone(), torch.zeros(weight.shape)
    for at, i in enumerate(order):
        grid = stored.step[:, i, None] * (torch.arange(16).double() + stored.offset[:, i, None])
        levels[:, i] = (grid - now[:, i, None]).abs().argmin(-1)
        missed = now[:, i] - grid.gather(1, levels[:, i, None].long())[:, 0]
        rest = torch.tensor(order[at + 1 :], dtype=torch.long)
        now[:, rest] += missed[:, None] * torch.linalg.solve(moments[rest][:, rest], moments[rest, i])
    return levels


SIZES = pytest.mark.parametrize("tokens", [20, 400], ids=["fewer tokens than inputs", "more"])


@SIZES
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows(tokens: int, dtype: torch.dtype):
    weight, x = _random(12, 128, seed=5).to(dtype), _inputs(tokens, 128)
    scale = row_scale(weight, torch.float32)
    compensation = Compensation(x, grouped=True)
    codes, groups = INT4.compensated_rows(weight, scale, compensation)
    stored = ref.Int4.of_bytes(codes, groups)
    order = _in_order(_moments(x).diagonal(), neurons=False)
    expected = _by_least_squares(weight / scale[:, None], stored, _moments(x), order)
    assert (stored.levels == expected).all(1).sum() >= 11  # but for ties, behind which all is another
    first = slice(order[0], order[0] + GROUP)
    _, expected_groups = INT4.quantize_rows(weight[:, first].contiguous(), scale, compensation.importance[first])
    assert torch.equal(groups[:, order[0] // GROUP], expected_groups[:, 0])


@SIZES
def test_neurons(tokens: int):
    """Whose scales are part of what their inputs are worth."""
    columns, x = _random(64, 96, seed=6) * torch.exp(_random(96, seed=7)), _inputs(tokens, 96)
    scale = neuron_scale(columns, torch.float32)
    codes, groups = INT4.compensated_neurons(columns, scale, Compensation(x, grouped=False))
    stored = ref.Int4.of_bytes(codes, groups)  # [I, O]
    turned = ref.Int4(stored.levels.t(), stored.step.t(), stored.offset.t())
    moments = scale.double()[:, None] * _moments(x) * scale.double()
    expected = _by_least_squares(columns / scale, turned, moments, _in_order(_moments(x).diagonal(), neurons=True))
    assert (turned.levels == expected).all(1).sum() >= 60


def _values(found: Packed, scale: Tensor) -> Tensor:
    return ref.Int4.of_bytes(*found).values * scale.double()[:, None]


@SIZES
def test_products_err_less_than_those_of_what_is_nearest(tokens: int):
    weight, x = _random(96, 256, seed=8), _inputs(tokens, 256)
    scale = row_scale(weight, torch.float32)
    ways = INT4.compensated_rows(weight, scale, Compensation(x, grouped=True)), INT4.quantize_rows(weight, scale)
    errors = [_objective(x, _values(found, scale) - weight) for found in ways]
    assert errors[0] < 0.7 * errors[1]
    scale = neuron_scale(weight, torch.float32)
    ways = INT4.compensated_neurons(weight, scale, Compensation(x, grouped=False)), INT4.quantize_neurons(weight, scale)
    errors = [_objective(x, _values(found, scale).t() - weight) for found in ways]
    assert errors[0] < 0.7 * errors[1]


def _with(x: Tensor, columns: slice, value: float) -> Tensor:
    x[:, columns] = value
    return x


ODD: dict[str, Callable[[], Tensor]] = {
    "no input counts": lambda: torch.zeros(5, 96),
    "some are never anything": lambda: _with(_inputs(30, 96), slice(3, 40), 0),
    "none is a number": lambda: _with(_inputs(30, 96), slice(7, 8), float("nan")),
    "one token": lambda: _inputs(1, 96),
    "inputs that are the same": lambda: _random(30, 1, seed=9).expand(30, 96),
    "tiny": lambda: _inputs(30, 96) * 1e-12,
    "large": lambda: _inputs(30, 96) * 1e12,
}


@pytest.mark.parametrize("kind", ODD)
def test_odd_inputs(kind: str):
    """Codes are some: every number comes back within a step or two of what makes up for others."""
    weight, x = _random(32, 96, seed=10), ODD[kind]()
    weight[4] = 0
    scale, norms = row_scale(weight, torch.float32), neuron_scale(weight, torch.float32)
    rows = _values(INT4.compensated_rows(weight, scale, Compensation(x, grouped=True)), scale)
    neurons = _values(INT4.compensated_neurons(weight, norms, Compensation(x, grouped=False)), norms).t()
    assert not rows[4].any()
    for values in (rows, neurons):
        assert (values - weight).norm() < 0.5 * weight.norm()


def test_tokens_that_are_no_numbers_say_nothing():
    weight, x = _random(8, 96, seed=12), _inputs(30, 96)
    scale, broken = row_scale(weight, torch.float32), x.clone()
    broken[4, 9], broken[20, 90] = float("inf"), float("nan")
    kept = x[[i for i in range(30) if i not in (4, 20)]]
    found, expected = (INT4.compensated_rows(weight, scale, Compensation(of, grouped=True)) for of in (broken, kept))
    assert torch.equal(found[0], expected[0])
    assert torch.equal(found[1], expected[1])


def test_inputs_that_never_are_anything_make_up_for_nothing():
    """And nothing makes up for them: they are rounded to the nearest."""
    weight = _random(8, 96, seed=11)
    scale = row_scale(weight, torch.float32)
    found = INT4.compensated_rows(weight, scale, Compensation(torch.zeros(7, 96), grouped=True))
    stored = ref.Int4.of_bytes(*found)
    assert torch.equal(stored.levels.long(), stored.nearest(weight / scale[:, None]))


def _with_a_leading_one(tokens: int, inputs: int) -> Tensor:
    """[T, I], most of which is one component."""
    return _inputs(tokens, inputs) + 5 * _random(tokens, 1, seed=10) * _random(inputs, seed=11)


def test_what_is_known_of_inputs():
    """The component is that of the largest singular value, in units of what an error of each counts."""
    x = _with_a_leading_one(300, 96)
    counts, leading, takes = known_of(x).double()
    squares = x.double().square().mean(0)
    torch.testing.assert_close(counts, squares + FLOOR * squares.sqrt().mean() ** 2, rtol=1e-4, atol=0)
    _, sizes, directions = torch.linalg.svd(x.double() / counts.sqrt(), full_matrices=False)
    expected = sizes[0] / len(x) ** 0.5 * directions[0] * counts.sqrt()
    expected = expected * (expected @ leading).sign()
    torch.testing.assert_close(leading, expected, rtol=1e-3, atol=1e-3)
    share = SHRINKING / (1 - SHRINKING)
    torch.testing.assert_close(takes, leading / (counts + (squares - leading**2) / share), rtol=1e-3, atol=1e-4)
    assert feedback(None) == feedback(counts) == (None, None)


@pytest.mark.parametrize("down", [False, True])
def test_where_there_is_no_time_the_leading_component_is_made_up_for(down: bool):
    """At the cost of little elsewhere."""
    x = _with_a_leading_one(300, 224)
    known, weight = known_of(x), _random(96, 224, seed=12)
    scale = neuron_scale(weight, torch.float32) if down else row_scale(weight, torch.float32)
    if down:
        passing = (Passing.of(known, torch.arange(224), 1024), None)
        found = [_values(INT4.quantize_neurons(weight, scale, passing=of), scale).t() for of in passing]
    else:
        found = [_values(INT4.quantize_rows(weight, scale, of), scale) for of in (known, known[0])]
    leading = [float(((values - weight) @ known[1].double()).norm()) for values in found]
    assert leading[0] < 0.6 * leading[1]
    products = [float(((values - weight) @ x.double().t()).norm()) for values in found]
    assert products[0] < 0.9 * products[1]
    counted = [float(((values - weight) * known[0].sqrt()).norm()) for values in found]
    assert counted[0] < 1.1 * counted[1]


def test_a_selection_makes_up_for_its_own_errors():
    """Whatever other neurons would have taken of them, also where a down projection is gathered a few at a time."""
    x, weight = _with_a_leading_one(300, 320), _random(64, 320, seed=13)
    known, chosen = known_of(x), torch.arange(0, 320, 3)
    layout, full, errors = FLOATS.stored(is_down=True), {"weight": weight}, []
    scratch = Scratch(2**20, torch.float32, torch.device("cpu"))
    for of in (known, None):
        specs = INT4.resident(is_down=True).specs(64, 128, is_down=True)
        out = {name: torch.zeros(shape, dtype=own or torch.float32) for name, (shape, own) in specs.items()}
        INT4.gather(full, layout, chosen, out, is_down=True, importance=of)
        product = INT4.resident(is_down=True).multiply(torch.eye(128), {**out, "bias": None}, 64, scratch)
        missed = product[: len(chosen)] - weight[:, chosen].t()
        errors.append(float((known[1, chosen] @ missed).norm()))
    assert errors[0] < 0.6 * errors[1]


@pytest.mark.parametrize("ours", [True, False])
def test_neurons_make_up_for_those_of_chunks_before(ours: bool):
    """In the kernels and by torch."""
    x, weight = _with_a_leading_one(300, 320), _random(96, 320, seed=13)
    known, scale, errors = known_of(x), neuron_scale(weight, torch.float32), []
    for anew in (False, True):
        passing, found = Passing.of(known, torch.arange(320), 64), []
        for part in torch.arange(320).split(64):
            own = Passing.of(known, part, 64) if anew else passing
            with nullcontext() if ours else table.leaving_out(lambda kernel: kernel.ours):
                packed = INT4.quantize_neurons(weight[:, part].contiguous(), scale[part], passing=own)
            found.append(_values(packed, scale[part]).t())
        errors.append(float(((torch.cat(found, dim=1) - weight) @ known[1].double()).norm()))
    assert errors[0] < 0.7 * errors[1]


@pytest.mark.parametrize("chunk", [None, 64])
def test_what_is_carried_is_least_squares(chunk: int | None):
    """Solved anew before every block, in whatever order; blocks that count most come first, within their chunk."""
    known = known_of(_with_a_leading_one(300, 200))
    fed, order = feedback(known, chunk)
    counts, leading, takes = known.double()
    blocks = [slice(start, start + GROUP) for start in range(0, 200, GROUP)]
    sums = [float(counts[block].sum()) for block in blocks]
    each = (chunk or 200) // GROUP + (chunk is None)
    groups = [range(start, min(start + each, len(blocks))) for start in range(0, len(blocks), each)]
    assert order.tolist() == [i for group in groups for i in sorted(group, key=lambda i: -sums[i])]
    share, carried, along = SHRINKING / (1 - SHRINKING), 0.0, 0.0
    for at, place in enumerate(order.tolist()):
        rest = torch.cat([torch.arange(200)[blocks[i]] for i in order.tolist()[at:]])
        change = -takes[rest] * along / (share + leading[rest] @ takes[rest])
        own = blocks[place]
        found = fed[0, own].double() * carried
        torch.testing.assert_close(found, change[: len(found)], rtol=1e-4, atol=1e-6)
        missed = _random(len(found), seed=place).double()
        carried += float(fed[1, own].double() @ missed)
        along += float(leading[own] @ (found - missed))


def test_in_rows_what_a_huge_token_gives_comes_back():
    """First tokens are, in a few layers of most models: of one neuron here, beside which all others are small."""
    weight, x = _random(64, 256, seed=20), _inputs(200, 256)
    assert not has_huge_token(x)
    x[0, 77] = 300 * x.norm(dim=1).median()
    assert has_huge_token(x)

    def missed(*, is_down: bool) -> tuple[float, float]:
        stored = INT4.quantize(
            weight, torch.float32, is_down=is_down, compensation=INT4.compensation(x, is_down=is_down)
        )
        numbers = ref.grouped_matrix(stored)
        products = x.double() @ weight.double().t()
        errors = (x.double() @ (numbers - weight).t()).square().sum(1) / products.square().sum(1)
        return float(errors[0]), float(errors[1:].mean())

    (first, others), (first_by_neurons, others_by_neurons) = missed(is_down=False), missed(is_down=True)
    assert first < 0.2 * first_by_neurons
    assert others < 1.5 * others_by_neurons
