"""`TieredLinear`: neurons in three formats, against the sum of what each of them gives by itself in float64."""

import pytest
import quantised_reference as ref
import torch
from torch import Tensor, nn

from griffin_offload.formats import FLOATS, every
from griffin_offload.formats.linear import QuantizedLinear, TieredLinear
from griffin_offload.kernels.by_blocks import Scratch

HIDDEN = 64
COUNTS = (64, 128, 70)
TIERS = [format for format in every() if format.is_tier][:3]


def _scratch() -> Scratch:
    return Scratch(2**16, torch.float32, torch.device("cpu"))


def _filled(weight: Tensor, chosen: list[Tensor], bias: Tensor | None, *, is_down: bool, stacked: int) -> TieredLinear:
    """Of `weight` [O, I], with the tiers' tensors gathered from it."""
    full, scratch = FLOATS.stored(is_down=is_down), _scratch()
    tiers = []
    for format, own in zip(TIERS, chosen, strict=True):
        sizes = (weight.shape[0], len(own)) if is_down else (stacked * len(own), weight.shape[1])
        resident = format.resident(is_down=is_down)
        tier = QuantizedLinear(*sizes, is_down=is_down, full=resident, resident=resident, scratch=scratch)
        room = -(-len(own) // 64) * 64
        sizes = (weight.shape[0], room) if is_down else (stacked * room, weight.shape[1])
        specs = resident.specs(*sizes, is_down=is_down)
        out = {name: torch.zeros(shape, dtype=dtype or weight.dtype) for name, (shape, dtype) in specs.items()}
        source = {"weight": weight}
        if bias is not None and not is_down:
            source["bias"], out["bias"] = bias, torch.zeros(stacked * room)
        format.gather(source, full, own, out, is_down=is_down, parts=stacked)
        for name, tensor in out.items():
            setattr(tier, name, nn.Parameter(tensor, requires_grad=False))
        tier.declare_features()
        tiers.append(tier)
    outputs, inputs = weight.shape
    module = TieredLinear(outputs, inputs, is_down=is_down, full=full, tiers=tiers, stacked=stacked, scratch=scratch)
    module.weight = nn.Parameter(weight, requires_grad=False)
    if bias is not None:
        module.bias = nn.Parameter(bias, requires_grad=False)
    return module


def _chosen(neurons: int) -> list[Tensor]:
    order = torch.randperm(neurons, generator=torch.Generator().manual_seed(1))
    return [part.sort().values for part in order[: sum(COUNTS)].split(COUNTS)]


def _rounded(weight: Tensor, format: str, *, is_down: bool) -> Tensor:
    return ref.stored_values(weight, format, weight.dtype, is_down=is_down)


@pytest.mark.parametrize("stacked", [1, 2])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("rows", [(1,), (1, 40)])
def test_outputs_of_tiers_stand_behind_each_other(stacked: int, biased: bool, rows: tuple[int, ...]):
    generator, neurons = torch.Generator().manual_seed(0), 300
    weight = torch.randn(stacked * neurons, HIDDEN, generator=generator)
    bias = torch.randn(stacked * neurons, generator=generator) if biased else None
    chosen = _chosen(neurons)
    module = _filled(weight, chosen, bias, is_down=False, stacked=stacked)
    x = torch.randn(*rows, HIDDEN, generator=generator)
    torch.testing.assert_close(module(x), nn.functional.linear(x, weight, bias), rtol=1e-4, atol=1e-4)
    module.take_tiers()
    module.declare_features()
    expected = []
    for part in range(stacked):
        for format, own in zip(TIERS, chosen, strict=True):
            index = own + part * neurons
            values = _rounded(weight, format.name, is_down=False)[index]
            found = x.double() @ values.t() + (0 if bias is None else bias[index].double())
            expected.append(nn.functional.pad(found, (0, -len(own) % 64)))
    whole = torch.cat(expected, dim=-1)
    assert module.out_features == whole.shape[-1]
    assert (module(x).double() - whole).norm() <= 4e-3 * whole.norm()
    assert module.weight is module.bias is None


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("rows", [(1,), (3, 7)])
def test_a_down_projection_adds_its_tiers_up(biased: bool, rows: tuple[int, ...]):
    generator, neurons = torch.Generator().manual_seed(0), 300
    weight = torch.randn(HIDDEN, neurons, generator=generator)
    bias = torch.randn(HIDDEN, generator=generator) if biased else None
    chosen = _chosen(neurons)
    module = _filled(weight, chosen, bias, is_down=True, stacked=1)
    module.take_tiers()
    module.declare_features()
    x = torch.randn(*rows, module.in_features, generator=generator)
    expected = torch.zeros(*rows, HIDDEN, dtype=torch.float64) + (0 if bias is None else bias.double())
    start = 0
    for format, own in zip(TIERS, chosen, strict=True):
        values = _rounded(weight, format.name, is_down=True)[:, own]
        expected += x[..., start : start + len(own)].double() @ values.t()
        start += len(own) + -len(own) % 64
    assert module.in_features == start
    assert (module(x).double() - expected).norm() <= 4e-3 * expected.norm()


def test_the_full_matrix_comes_and_goes():
    """A streamed pass installs it for a moment; the tiers stay where they are."""
    weight = torch.randn(HIDDEN, 300, generator=torch.Generator().manual_seed(0))
    module = _filled(weight, _chosen(300), None, is_down=True, stacked=1)
    module.take_tiers()
    module.declare_features()
    held = {name: parameter.data_ptr() for name, parameter in module.named_parameters()}
    assert set(held) == {f"_registered.{i}.{name}" for i in range(3) for name in ("weight", "groups", "input_scale")}
    module.weight = nn.Parameter(weight, requires_grad=False)
    module.take_layout(module.full)
    module.declare_features()
    assert module.in_features == 300
    x = torch.randn(2, 300, generator=torch.Generator().manual_seed(2))
    torch.testing.assert_close(module(x), x @ weight.t(), rtol=1e-4, atol=1e-4)
    module.take_tiers()
    assert {name: parameter.data_ptr() for name, parameter in module.named_parameters()} == held
