"""The driver of passes by itself: what it calls, in which order, and what it leaves behind."""

from collections.abc import Callable, Sequence
from types import TracebackType

import pytest
import torch
from reference import collect_z
from tiny_models import ARCHITECTURES, LAYERS, VOCAB
from torch import Tensor, nn
from transformers import PreTrainedModel

from griffin_offload.blocks.base import Activations, Block, hooks_on
from griffin_offload.blocks.layouts import find_feed_forwards
from griffin_offload.engine.layer_pass import LayerPass, Visitor

TOKENS, CHUNK = 40, 16


class _Feed:
    """Brings copies of full tensors, and says when."""

    def __init__(self, blocks: Sequence[Block], layers: Sequence[int], said: list[str], fail_at: int = -1) -> None:
        self._blocks, self.layers, self._said, self._fail_at = blocks, layers, said, fail_at

    def __enter__(self) -> "_Feed":
        self._said.append("enter")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._said.append("exit")

    def bring(self, index: int) -> list[Tensor]:
        if index == self._fail_at:
            raise KeyboardInterrupt
        self._said.append(f"bring {index}")
        return [tensor.clone() for tensor in self._blocks[index].full()]

    def drop(self, index: int) -> None:
        self._said.append(f"drop {index}")


class _Told(Visitor):
    def __init__(self, said: list[str]) -> None:
        self._said, self.seen = said, dict[int, list[Tensor]]()

    def start(self, index: int, block: Block, full: list[Tensor]) -> None:
        assert all(torch.equal(own, given) for own, given in zip(block.full(), full, strict=True))
        self._said.append(f"start {index}")

    def see(self, index: int, found: Activations) -> None:
        own = found.by_sample(1)
        self._said.append(f"see {index} {own.start}-{own.start + own.tokens}")
        self.seen.setdefault(index, []).append(own.values().clone())

    def end(self, index: int, block: Block, full: list[Tensor]) -> None:
        self._said.append(f"end {index}")


def _model(name: str) -> tuple[PreTrainedModel, nn.ModuleList, list[Block]]:
    model = ARCHITECTURES[name].build()
    return model, *find_feed_forwards(model, LAYERS)


def _ids() -> Tensor:
    return torch.randint(3, VOCAB, (1, TOKENS), generator=torch.Generator().manual_seed(2))


def _traces(model: nn.Module) -> list[object]:
    hooks = [hook for m in model.modules() for hook in hooks_on(m)]
    return hooks + [m for m in model.modules() if "forward" in vars(m)]


@pytest.mark.parametrize("name", ["llama2", "opt", "phi3", "bloom"])
@torch.no_grad()
def test_layers_come_in_order_and_every_token_is_seen_once(name: str):
    model, decoder, blocks = _model(name)
    expected, logits = collect_z(model, ARCHITECTURES[name].down, _ids()), model(_ids()).logits
    said: list[str] = []
    told = _Told(said)
    with LayerPass(decoder, blocks, _Feed(blocks, [0, 2], said), [told], chunk_tokens=CHUNK) as done:
        found = model(_ids()).logits
    chunks = [(0, TOKENS)] if blocks[0].inline else [(0, 16), (16, 32), (32, TOKENS)]
    of = {i: [f"start {i}", *(f"see {i} {a}-{b}" for a, b in chunks), f"end {i}"] for i in (0, 2)}
    brought = [line for i in (0, 2) for line in (f"bring {i}", *of[i], f"drop {i}")]
    assert said == ["enter", *brought, "exit"]
    assert done.visited == 2
    for index, parts in told.seen.items():
        torch.testing.assert_close(torch.cat(parts, 1), expected[index])
    torch.testing.assert_close(found, logits)
    assert _traces(model) == []


@torch.no_grad()
def test_layers_that_are_not_brought_are_visited_on_request():
    model, decoder, blocks = _model("llama2")
    said: list[str] = []
    with LayerPass(decoder, blocks, _Feed(blocks, [1], said), [_Told(said)], every_layer=True):
        model(_ids())
    visits = [line for line in said if not line.startswith("see")]
    assert visits == [
        *("enter", "start 0", "end 0", "bring 1", "start 1", "end 1", "drop 1"),
        "start 2",
        "end 2",
        "exit",
    ]


@pytest.mark.parametrize("fail_at", range(LAYERS))
@torch.no_grad()
def test_nothing_stays_behind_when_a_layer_does_not_come(fail_at: int):
    model, decoder, blocks = _model("llama2")
    said: list[str] = []
    feed = _Feed(blocks, range(LAYERS), said, fail_at)
    with pytest.raises(KeyboardInterrupt), LayerPass(decoder, blocks, feed, [_Told(said)], chunk_tokens=CHUNK):
        model(_ids())
    assert said[-1] == "exit"
    assert f"drop {fail_at}" not in said
    assert _traces(model) == []


@torch.no_grad()
def test_a_walk_needs_no_forward():
    _, decoder, blocks = _model("llama2")
    said: list[str] = []
    LayerPass(decoder, blocks, _Feed(blocks, [2, 0], said), [_Told(said)]).walk()
    brought = [line for i in (2, 0) for line in (f"bring {i}", f"start {i}", f"end {i}", f"drop {i}")]
    assert said == ["enter", *brought, "exit"]


@pytest.mark.parametrize("change", [lambda z: z.mul_(0), lambda z: None])
@torch.no_grad()
def test_what_a_visitor_changes_goes_on(change: Callable[[Tensor], object]):
    model, decoder, blocks = _model("llama2")
    dense = model(_ids()).logits

    class Change(Visitor):
        def see(self, index: int, found: Activations) -> None:
            change(found.by_sample(1).z)

    with LayerPass(decoder, blocks, _Feed(blocks, [1], []), [Change()]):
        found = model(_ids()).logits
    silent = ARCHITECTURES["llama2"].build()
    if change(torch.ones(())) is not None:
        silent.get_submodule(ARCHITECTURES["llama2"].down.format(i=1)).weight.zero_()
        assert not torch.equal(found, dense)
    torch.testing.assert_close(found, silent(_ids()).logits)
