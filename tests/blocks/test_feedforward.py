"""Layouts: registered, refused, and caught by the self-check when the names mean something else."""

import pytest
import torch
from tiny_models import ARCHITECTURES, refused_models
from torch import nn

from griffin_offload.blocks import layouts
from griffin_offload.blocks.base import Block
from griffin_offload.blocks.feedforward import FeedForward
from griffin_offload.blocks.layouts import (
    FeedForwardLayout,
    find_feed_forwards,
    register_block,
    register_layout,
    self_check,
)
from griffin_offload.errors import UnsupportedModel

LAYERS = 3


@pytest.mark.parametrize("name", list(ARCHITECTURES))
def test_the_table_finds_the_down_projection_and_the_width(name: str):
    model = ARCHITECTURES[name].build()
    _, blocks = find_feed_forwards(model, LAYERS)
    for block, down in zip(blocks, ARCHITECTURES[name].down_names(), strict=True):
        assert block.down is model.get_submodule(down)
        assert block.neurons == ARCHITECTURES[name].neurons
        before = [tensor.clone() for tensor in block.full()]
        self_check(block)
        assert all(torch.equal(a, b) for a, b in zip(before, block.full(), strict=True))


@pytest.mark.parametrize("name", list(refused_models()))
def test_others_are_refused_by_name(name: str):
    with pytest.raises(UnsupportedModel, match=r"experts|register"):
        find_feed_forwards(refused_models()[name](), LAYERS)


class _Layer(nn.Module):
    def __init__(self, ff: nn.Module) -> None:
        super().__init__()
        self.ff = ff


class _Model(nn.Module):
    def __init__(self, *ffs: nn.Module) -> None:
        super().__init__()
        self.layers = nn.ModuleList(_Layer(ff) for ff in ffs)


class _Interleaved(nn.Module):
    """Gate and up alternate row by row: names and shapes of a known layout, another meaning."""

    def __init__(self) -> None:
        super().__init__()
        self.gate_up_proj, self.down_proj = nn.Linear(8, 24), nn.Linear(12, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate_up = self.gate_up_proj(x)
        return self.down_proj(gate_up[..., ::2].sigmoid() * gate_up[..., 1::2])


class _Bypassing(nn.Module):
    """Uses the down projection's weight without calling it: Z would never be seen."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(8, 12), nn.Linear(12, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(self.fc1(x).relu(), self.fc2.weight)


@pytest.mark.parametrize("ff", [_Interleaved, _Bypassing])
def test_the_self_check_catches_another_meaning(ff: type[nn.Module]):
    _, blocks = find_feed_forwards(_Model(ff(), ff()), 2)
    with pytest.raises(UnsupportedModel, match="self-check failed"):
        self_check(blocks[0])


class _Renamed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.expand, self.shrink = nn.Linear(8, 12), nn.Linear(12, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.shrink(self.expand(x).relu())


def test_a_registered_layout_is_found(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(layouts, "LAYOUTS", list(layouts.LAYOUTS))
    model = _Model(_Renamed())
    with pytest.raises(UnsupportedModel, match=r"ff\.expand, ff\.shrink; register"):
        find_feed_forwards(model, 1)
    register_layout(FeedForwardLayout(inputs=("expand",), down="shrink"))
    _, (block,) = find_feed_forwards(model, 1)
    self_check(block)
    assert block.neurons == 12


class _Normed(nn.Module):
    """Usual names, and a norm over the neurons between them of which nothing is known."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(8, 12), nn.Linear(12, 8)
        self.ffn_norm = nn.LayerNorm(12)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc2(self.ffn_norm(self.fc1(x).relu()))


class _NormedBlock(FeedForward):
    """Stands for one that gathers the norm, too."""


def test_a_registered_finder_comes_before_the_layouts(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(layouts, "FINDERS", list(layouts.FINDERS))
    model = _Model(_Normed(), nn.ModuleDict({"fc1": nn.Linear(8, 12), "fc2": nn.Linear(12, 8)}))
    with pytest.raises(UnsupportedModel, match=r"ffn_norm\.weight of size 12 .* write a Block and .*\.register_block"):
        find_feed_forwards(model, 2)

    def find(layer: nn.Module, where: str) -> Block | None:
        parts = (part for part in layer.modules() if isinstance(part, _Normed))
        return next((_NormedBlock(part, ("fc1",), "fc2", inline=False) for part in parts), None)

    register_block(find)
    _, blocks = find_feed_forwards(model, 2)
    assert [type(block) for block in blocks] == [_NormedBlock, FeedForward]


def test_gathering_takes_the_rows_and_columns():
    ff = _Interleaved()
    block = FeedForward(ff, ("gate_up_proj",), "down_proj", inline=False)
    chosen = torch.tensor([0, 3, 11])
    compact = block.allocate((3,), torch.float32, torch.device("cpu"))
    block.gather(block.full(), [chosen], compact)
    both = torch.tensor([0, 3, 11, 12, 15, 23])
    assert torch.equal(compact[0], ff.gate_up_proj.weight[both])
    assert torch.equal(compact[1], ff.gate_up_proj.bias[both])
    assert torch.equal(compact[2], ff.down_proj.weight[:, chosen])
