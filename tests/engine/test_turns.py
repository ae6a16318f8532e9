"""One model, several callers: calls of threads wait for each other in order, sequences in turns keep their neurons."""

import copy
import threading
import time
from typing import Any

import pytest
import torch
from loaded_model import greedy, ids, load
from transformers import DynamicCache, StoppingCriteria

from griffin_offload import GriffinError, UsageError
from griffin_offload.engine.model_interface import FifoLock
from griffin_offload.errors import Busy
from griffin_offload.transformers_api import CACHE


class _Holding(StoppingCriteria):
    """Keeps a generate from going on until it is told."""

    def __init__(self) -> None:
        self.inside, self.go_on = threading.Event(), threading.Event()

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        self.inside.set()
        assert self.go_on.wait(60)
        return torch.zeros(len(input_ids), dtype=torch.bool)


def _wait_for_row(turns: FifoLock, callers: int) -> None:
    end = time.monotonic() + 60
    while turns.callers < callers:
        assert time.monotonic() < end
        time.sleep(0.001)


def test_callers_have_their_turns_in_order():
    turns, order, threads = FifoLock(), list[int](), []

    def call(number: int) -> None:
        with turns.turn("nested", None):
            order.append(number)

    with turns.turn("nested", None):
        for number in range(5):
            threads.append(threading.Thread(target=call, args=(number,)))
            threads[-1].start()
            _wait_for_row(turns, number + 2)
        with pytest.raises(GriffinError, match="nested"), turns.turn("nested", None):
            pass
    for thread in threads:
        thread.join()
    assert order == list(range(5))
    assert not turns.mine


def test_a_caller_that_gives_up_leaves_the_row():
    turns, errors = FifoLock(), list[str]()

    def call() -> None:
        try:
            with turns.turn("nested", 0.01):
                errors.append("a turn")
        except Busy as error:
            errors.append(str(error))

    with turns.turn("nested", None):
        thread = threading.Thread(target=call)
        thread.start()
        thread.join()
        assert turns.callers == 1
    assert errors == [
        "waited 0.01 s for this model and 1 call is still before this one: wait longer (wait_s), or load the model "
        "once more"
    ]


@pytest.mark.parametrize("stock", [False, True])
def test_answers_of_threads_are_those_of_one_after_the_other(checkpoints, stock: bool):
    """Also where each forward is a call by itself, and others choose neurons in between."""
    model = load(checkpoints("llama3"))
    called = model.model if stock else model
    prompts = [ids(seed) for seed in range(4)]
    expected = [greedy(load(checkpoints("llama3")), ids) for ids in prompts]
    found: dict[int, torch.Tensor] = {}
    threads = [
        threading.Thread(target=lambda i=i: found.update({i: greedy(called, prompts[i])})) for i in range(len(prompts))
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(found[i], tokens) for i, tokens in enumerate(expected))


def test_waiting_has_an_end_if_one_is_named(checkpoints):
    model, holding = load(checkpoints("llama3")), _Holding()
    holder = threading.Thread(target=lambda: greedy(model, ids(), stopping_criteria=[holding]))
    holder.start()
    try:
        assert holding.inside.wait(60)
        with pytest.raises(Busy, match=r"waited 0\.01 s"):
            greedy(model, ids(1), wait_s=0.01)
        model.wait_s = 0
        for call in (lambda: greedy(model, ids(1)), lambda: model(ids(1)), lambda: greedy(model.model, ids(1))):
            with pytest.raises(Busy, match="waited 0 s"):
                call()
    finally:
        holding.go_on.set()
        holder.join()
    assert greedy(model, ids(1)).shape == (1, 30)
    with pytest.raises(UsageError, match="wait_s is -1"):
        model.wait_s = -1


def test_closing_waits_for_the_answer_of_another_thread(checkpoints):
    model, holding, found = load(checkpoints("llama3")), _Holding(), list[torch.Tensor]()
    holder = threading.Thread(target=lambda: found.append(greedy(model, ids(), stopping_criteria=[holding])))
    holder.start()
    assert holding.inside.wait(60)
    closer = threading.Thread(target=model.close)
    closer.start()
    _wait_for_row(model.engine.turns, 2)
    holding.go_on.set()
    holder.join()
    closer.join()
    assert torch.equal(found[0], greedy(load(checkpoints("llama3")), ids()))
    with pytest.raises(GriffinError, match="closed"):
        greedy(model, ids())


def _by_hand(stock: Any, ids: torch.Tensor, cache: Any) -> tuple[torch.Tensor, Any]:
    output = stock(ids, use_cache=True, **{CACHE: cache})
    return output.logits[:, -1:].argmax(-1), output[CACHE]


@pytest.mark.parametrize("name", ["llama3", "gemma3", "opt"])
@pytest.mark.parametrize("quantize", ["none", "int8"])
def test_sequences_decoded_in_turns_keep_their_neurons(checkpoints, name: str, quantize: str):
    model, prompts = load(checkpoints(name), quantize=quantize), [ids(0), ids(1, 30)]
    expected = [greedy(model, ids)[0, ids.shape[1] :].tolist() for ids in prompts]
    tokens, caches, found = list(prompts), [None, None], [[], []]
    for _ in range(6):
        for i in range(2):
            tokens[i], caches[i] = _by_hand(model.model, tokens[i], caches[i])
            found[i].append(int(tokens[i]))
    assert found == expected


def test_copies_of_a_beginning_keep_its_neurons(checkpoints):
    model = load(checkpoints("llama3"))
    _, beginning = _by_hand(model.model, ids(), None)
    expected = model(torch.tensor([[7]]), past_key_values=copy.deepcopy(beginning)).logits
    model(ids(1))
    assert torch.equal(model(torch.tensor([[7]]), past_key_values=copy.deepcopy(beginning)).logits, expected)


def test_caches_that_nobody_chose_for_are_refused(checkpoints):
    model, other = load(checkpoints("llama3")), load(checkpoints("llama3"))
    model(ids())
    _, theirs = _by_hand(other.model, ids(), None)
    filled = DynamicCache()
    for layer in range(model.config.num_hidden_layers):
        filled.update(theirs.layers[layer].keys, theirs.layers[layer].values, layer)
    for cache in (theirs, filled):
        with pytest.raises(GriffinError, match="no neurons are chosen"):
            model(ids()[:, :1], past_key_values=cache)
        with pytest.raises(GriffinError, match="no neurons are chosen"):
            greedy(model, ids(0, 30), past_key_values=cache)
    whole = load(checkpoints("llama3"), density=1.0)
    assert whole(ids()[:, :1], past_key_values=theirs).logits.isfinite().all()
