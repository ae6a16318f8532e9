"""What the next layer's router says of a layer before it decides what is read early, and nothing else."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from marks import mostly_slow
from tiny_models import MIXTURE_KINDS, MIXTURES, VOCAB
from torch import Tensor

from griffin_offload import GriffinModel
from griffin_offload.blocks.experts import Experts
from griffin_offload.blocks.layouts import find_feed_forwards
from griffin_offload.blocks.model_shape import model_shape
from griffin_offload.blocks.routing import RouterGuess
from griffin_offload.formats import FLOATS
from griffin_offload.formats.expert_form import BLOCK_BYTES

NEW, EXPERTS = 6, 8
# Their routers take more than hidden states, or choose elsewhere.
NOT_ASKED = {"lfm2_moe", "minimax_m2"}
NORMED_BEHIND = {"flex_olmo"}


def _answer(model: GriffinModel) -> list[Tensor]:
    ids = torch.randint(5, VOCAB - 8, (1, 20), generator=torch.Generator().manual_seed(1))
    settings = {"do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    return list(model.generate(ids, max_new_tokens=NEW, min_new_tokens=NEW, **settings).logits)


def _load(directory: Path, **options: object) -> GriffinModel:
    sizes = {"max_gpu_mem": "40MB", "ctx_size": 64, "device": "cpu", "density": 0.375}
    return GriffinModel.from_pretrained(directory, **{**sizes, **options})


_GUESSES: dict[str, Callable[[Sequence[int]], list[int]]] = {
    "the router's": list,
    "wrong": lambda chosen: [expert for expert in range(EXPERTS) if expert not in chosen],
    "none": lambda chosen: [],
    "all": lambda chosen: list(range(EXPERTS)),
}


@contextmanager
def _guessing(monkeypatch: pytest.MonkeyPatch, how: str) -> Iterator[None]:
    own = RouterGuess.__call__
    with monkeypatch.context() as patch:
        patch.setattr(RouterGuess, "__call__", lambda self, hidden: _GUESSES[how](own(self, hidden)))
        yield


@pytest.mark.parametrize("name", mostly_slow(MIXTURE_KINDS, 2))
def test_guesses_do_not_change_the_answer(mixtures, name: str, monkeypatch: pytest.MonkeyPatch):
    found, reports = {}, {}
    for how in _GUESSES:
        with _guessing(monkeypatch, how), _load(mixtures(name)) as model:
            found[how], report = _answer(model), model.last_report
            reports[how] = report.experts
            assert report.peak_device_bytes <= model.plan.peak_bytes
            sizes = {
                model.engine.loaded.layers.expert_store.expert_bytes(i) for i in model.engine.loaded.layers.experts
            }
            assert report.decode_streamed_bytes - report.experts.wrong_bytes == report.experts.misses * sizes.pop()
    for how, logits in found.items():
        assert torch.equal(torch.stack(logits), torch.stack(found["none"])), how
        assert reports[how].misses == reports["none"].misses > 0
    assert (reports["none"].guessed, reports["none"].wrong_bytes) == (0, 0)
    assert reports["the router's"].guessed > 0 < reports["wrong"].wrong_bytes


def test_nothing_is_guessed_where_nothing_is_fetched(mixtures, monkeypatch: pytest.MonkeyPatch):
    with _guessing(monkeypatch, "all"), _load(mixtures("mixtral"), missing_experts="route") as model:
        _answer(model)
        assert model.last_report.decode_streamed_bytes == model.last_report.experts.guessed == 0


@pytest.mark.parametrize("name", mostly_slow(MIXTURES, 4))
def test_the_router_itself_is_asked(mixtures, name: str):
    """Given what its layer's own norm was given, it says what its layer then chooses."""
    with _load(mixtures(name), density=1.0) as model:
        stock = model.engine.loaded.model
        decoder, blocks = find_feed_forwards(stock, len(model.engine.loaded.layers.decoder))
        experts = {i: block for i, block in enumerate(blocks) if isinstance(block, Experts)}
        given: dict[int, Tensor] = {}
        chosen: dict[int, Tensor] = {}
        normed: dict[int, list[tuple[Tensor, Tensor]]] = {i: [] for i in experts}
        for i, block in experts.items():
            block.parent.register_forward_pre_hook(lambda _, args, i=i: given.update({i: args[0]}))
            block.module.register_forward_pre_hook(lambda _, args, i=i: chosen.update({i: args[1]}))
            for module in decoder[i].children():
                if "norm" in type(module).__name__.lower():
                    module.register_forward_hook(lambda _, args, out, i=i: normed[i].append((args[0], out)))
        stock(torch.tensor([[7]]))
        for i, block in experts.items():
            before = [states for states, out in normed[i] if out.numel() == given[i].numel() and out.equal(given[i])]
            assert bool(before) == (name not in NORMED_BEHIND)
            for states in before:
                found = RouterGuess(decoder[i], block.parent)(states)
                assert sorted(found) == ([] if name in NOT_ASKED else sorted(chosen[i].flatten().tolist()))


class _Backwards:
    """A source of experts that come in another order."""

    away = ()

    def __init__(self, full: list[Tensor]) -> None:
        self._full = full

    def begin(self, experts: Sequence[int], index: Tensor, weights: Tensor) -> Sequence[int]:
        return [*experts[3:], *reversed(experts[:3])]

    def tensors(self, expert: int) -> Sequence[Tensor]:
        return [tensor[expert] for tensor in self._full]

    def settle(self, chosen: Sequence[int]) -> None:
        """All stay."""


@pytest.mark.parametrize("tokens", [1, 9])
def test_the_order_in_which_experts_arrive_changes_no_bit(mixtures, tokens: int):
    with _load(mixtures("mixtral"), density=1.0) as model:
        model.engine.loaded.model(torch.tensor([[7]]))  # residents may be on their way until then
        block = next(block for block in model.engine.loaded.layers.blocks if isinstance(block, Experts))
        random = torch.Generator().manual_seed(2)
        hidden = torch.randn(tokens, block.hidden, generator=random).to(block.full()[0].dtype)
        weights = torch.rand(tokens, 5, generator=random).to(hidden.dtype)
        index = torch.stack([torch.randperm(EXPERTS, generator=random)[:5] for _ in range(tokens)])
        expected, block.source = block.compute(hidden, index, weights), _Backwards(block.full())
        assert torch.equal(block.compute(hidden, index, weights), expected)


def test_the_plan_prices_places_of_whole_blocks(monkeypatch: pytest.MonkeyPatch, mixtures):
    """What a record has beside its tensors is memory, too."""
    monkeypatch.setattr("griffin_offload.formats.expert_form._LARGE_BYTES", 1)
    with _load(mixtures("gpt_oss"), density=1.0) as model:
        stock = model.engine.loaded.model
        shape = model_shape(stock, FLOATS, FLOATS)
        block = next(block for block in model.engine.loaded.layers.blocks if isinstance(block, Experts))
        tensors = sum(tensor[0].nbytes for tensor in block.full())
    sizes = shape.layers[0]
    assert sizes.neuron_bytes == -(-tensors // BLOCK_BYTES) * BLOCK_BYTES > tensors
    assert sizes.resident_ff_bytes((3,)) == 3 * sizes.neuron_bytes
