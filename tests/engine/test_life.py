"""Life and death of a model: who keeps what, what goes when, and what a closed or pruned one refuses."""

import contextlib
import copy
import gc
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from loaded_model import greedy, ids, load
from transformers import AutoModelForCausalLM

from griffin_offload import GriffinError, UsageError
from griffin_offload.engine import model as model_module
from griffin_offload.engine import model_interface


@contextlib.contextmanager
def _no_collector() -> Iterator[None]:
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


@pytest.mark.parametrize(
    ("name", "dtype", "options"),
    [
        ("llama3", torch.float32, {}),
        ("llama3", torch.bfloat16, {}),
        ("qwen3", torch.bfloat16, {"quantize": "int8"}),
        ("gemma3", torch.float32, {"density": 1.0}),
        ("opt", torch.float32, {"exact": True}),
        ("gpt2", torch.float32, {"offload": "ram"}),
    ],
)
def test_a_model_goes_with_its_last_name(checkpoints, name: str, dtype: torch.dtype, options: dict[str, Any]):
    """Without the collector of cycles: a notebook's cell that is run again loads beside nothing."""
    path = checkpoints(name, dtype)
    with _no_collector():
        model = load(path, **options)
        greedy(model, ids())
        parts = [*map(weakref.ref, model.model.modules()), *map(weakref.ref, model.model.parameters())]
        parts += [weakref.ref(model), weakref.ref(model.engine), weakref.ref(model.engine.loaded)]
        del model
        assert not [part() for part in parts if part() is not None]


def test_contexts_and_caches_that_stay_keep_no_weights(checkpoints):
    with _no_collector():
        model = load(checkpoints("llama3"), keep_prompts=True)
        context = model.new_context()
        greedy(model, ids(), context=context)
        output = greedy(model, ids(), return_dict_in_generate=True)
        weight = weakref.ref(next(model.model.parameters()))
        del model
        assert weight() is None
    assert context.tokens
    assert output.past_key_values.get_seq_length() > 0


def test_the_stock_model_alone_keeps_all_that_it_needs(checkpoints):
    expected = greedy(load(checkpoints("llama3")), ids())
    stock = load(checkpoints("llama3")).model
    gc.collect()
    for _ in range(2):
        assert torch.equal(greedy(stock, ids()), expected)
        gc.collect()


def test_the_heap_is_trimmed_when_the_weights_have_gone(checkpoints, monkeypatch: pytest.MonkeyPatch):
    alive: list[bool] = []
    with _no_collector():
        monkeypatch.setattr(
            model_interface, "give_back_freed", lambda: alive.append(any(w() is not None for w in weights))
        )
        model = load(checkpoints("llama3"))
        weights = [weakref.ref(parameter) for parameter in model.model.parameters()]
        del model
        assert alive == [False]


def test_closing_takes_the_weights_from_whoever_keeps_the_model(checkpoints, monkeypatch: pytest.MonkeyPatch):
    alive: list[bool] = []
    with load(checkpoints("llama3"), offload="ram") as model:
        stock = model.model
        greedy(model, ids())
        weights = [weakref.ref(parameter) for parameter in stock.parameters()]
        weights += [weakref.ref(buffer) for buffer in model.engine.loaded.layers.source.flat.values()]
        monkeypatch.setattr(
            model_module, "give_back_freed", lambda: alive.append(any(w() is not None for w in weights))
        )
    assert alive == [False]
    assert stock.config.model_type == model.config.model_type == "llama"
    for call in (lambda: greedy(model, ids()), lambda: greedy(stock, ids()), lambda: model.save_pretrained("x")):
        with pytest.raises(GriffinError, match="closed"):
            call()
    for part in list(stock.modules())[1:]:  # of which torch would multiply by what lies around
        with pytest.raises(GriffinError, match="closed"):
            part(torch.zeros(1, 1, stock.config.hidden_size))


def test_closing_while_residents_are_on_their_way(checkpoints):
    for _ in range(3):
        load(checkpoints("llama3"), quantize="int8").close()


def test_a_part_of_a_pruned_model_does_not_run_by_itself(checkpoints):
    model = load(checkpoints("llama3"))
    greedy(model, ids())
    with pytest.raises(UsageError, match="call the whole model"):
        model.model.model(ids())
    layers = model.model.model.layers
    hidden = torch.zeros(1, 3, model.config.hidden_size)
    del model
    with pytest.raises(GriffinError, match="is gone"):
        layers[0](hidden)


def test_a_part_of_a_whole_model_does(checkpoints):
    path = checkpoints("llama3")
    found = load(path, density=1.0).model.model(ids()).last_hidden_state
    expected = AutoModelForCausalLM.from_pretrained(path).model(ids()).last_hidden_state
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize(
    ("name", "dtype"), [("llama3", torch.float32), ("gemma3", torch.bfloat16), ("gpt2", torch.float16)]
)
def test_a_whole_model_is_saved_as_it_is(checkpoints, tmp_path, name: str, dtype: torch.dtype):
    path = checkpoints(name, dtype)
    load(path, density=1.0).save_pretrained(tmp_path)
    saved, stored = (AutoModelForCausalLM.from_pretrained(place, dtype="auto") for place in (tmp_path, path))
    assert saved.dtype == dtype
    assert "griffin" not in (tmp_path / "config.json").read_text()
    tensors = stored.state_dict()
    assert saved.state_dict().keys() == tensors.keys()
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in saved.state_dict().items())


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"density": 0.5}, "0.5 of the neurons"),
        ({"density": 1.0, "quantize": "int8"}, "int8"),
        ({"density": 1.0, "always_stream": True}, "always_stream"),
    ],
)
def test_what_is_no_checkpoint_is_not_saved(checkpoints, tmp_path, options: dict[str, Any], reason: str):
    model = load(checkpoints("llama3"), **options)
    saving: list[Callable[[], Any]] = [
        lambda: model.save_pretrained(tmp_path),
        lambda: model.model.save_pretrained(tmp_path),
        lambda: model.push_to_hub("me/mine"),
        lambda: model.state_dict(),
        lambda: model.model.state_dict(),
    ]
    for save in saving:
        with pytest.raises(UsageError, match=reason):
            save()
    assert not list(tmp_path.iterdir())


def test_copies_and_pickles_are_refused(checkpoints, tmp_path):
    model = load(checkpoints("llama3"), dtype="float32")
    for whole in (model, model.model):
        with pytest.raises(UsageError, match="load it once more"):
            copy.deepcopy(whole)
        with pytest.raises(UsageError, match="load it once more"):
            torch.save(whole, tmp_path / "model.pt")


@pytest.mark.parametrize("move", ["to", "half", "float64", "cuda"])
def test_residents_stay_where_they_are(checkpoints, move: str):
    model = load(checkpoints("llama3"))
    change: dict[str, Callable[[Any], Any]] = {
        "to": lambda m: m.to("meta"),
        "half": lambda m: m.half(),
        "float64": lambda m: m.to(torch.float64),
        "cuda": lambda m: m.cuda(),
    }
    for whole in (model, model.model):
        with pytest.raises((UsageError, AssertionError, RuntimeError), match=r"stay so|CUDA|NVIDIA"):
            change[move](whole)
        assert whole.to("cpu") is whole.to("cpu:0") is whole.to(torch.float32) is whole.float() is whole


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad, torch.enable_grad])
def test_modes_of_torch_do_not_reach_a_model(checkpoints, mode: Callable[[], Any]):
    """Loaded in one and used outside, or the other way round; contexts and captures outlive calls."""
    expected = greedy(load(checkpoints("llama3")), ids())
    with mode():
        inside = load(checkpoints("llama3"), keep_prompts=True)
        context = inside.new_context()
        first = greedy(inside, ids(), context=context, return_dict_in_generate=True)
    assert torch.equal(first.sequences, expected)
    longer = torch.cat([expected, ids(1, 4)], 1)
    again = greedy(inside, longer, context=context)
    with mode():
        assert torch.equal(greedy(inside, longer, context=context), again)
        assert not inside.model(ids()).logits.is_inference()
    assert torch.equal(greedy(inside, ids()), expected)


@pytest.mark.parametrize("name", ["llama3", "opt"])
def test_autocast_does_not_change_the_precision(checkpoints, name: str):
    model = load(checkpoints(name))
    prompt = ids()
    expected, tokens = model.model(prompt).logits, greedy(model, prompt)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = load(checkpoints(name))
        for one in (model, inside):
            assert torch.equal(one.model(prompt).logits, expected)
            assert torch.equal(greedy(one, prompt), tokens)
