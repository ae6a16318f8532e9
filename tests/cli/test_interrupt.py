"""Ctrl-C and failures in the middle of a prompt: nothing is left behind, the next prompt is as good as the first."""

import gc
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from marks import mostly_slow
from tiny_models import VOCAB

from griffin_offload import GriffinError, GriffinModel
from griffin_offload.blocks.base import hooks_on
from griffin_offload.blocks.feedforward import FeedForward
from griffin_offload.checkpoint.mapped import FilePages

OPTIONS = [
    {},  # mapped pages are used in place
    {"offload": "ram"},
    {"dtype": "bfloat16"},  # another precision: through slots
    {"selection": "magnitude"},  # keeps norms from one prompt to the next
    {"ff_chunk_tokens": 16},  # forwards of the FF modules are replaced for the pass
]


def make(directory: Path, **options: object) -> GriffinModel:
    defaults = {"device": "cpu", "max_gpu_mem": "10MB", "density": 0.5, "ctx_size": 64}
    model = GriffinModel.from_pretrained(directory, **(defaults | options))
    assert model.model is not None  # all residents are there
    for thread in threading.enumerate():
        if thread.name.startswith("griffin-offload-resident"):
            thread.join()
    return model


def answer(model: GriffinModel) -> torch.Tensor:
    ids = torch.randint(3, VOCAB, (1, 40), generator=torch.Generator().manual_seed(1))
    return model.generate(ids, max_new_tokens=10, do_sample=False)


def traces(model: GriffinModel) -> dict[str, Any]:
    """Everything a prompt could leave behind: hooks, replaced forwards, full weights, threads, descriptors."""
    modules = {name: (len(hooks_on(module)), "forward" in vars(module)) for name, module in model.model.named_modules()}
    return {
        "modules": modules,
        "parameters": {name: (p.shape, p.data_ptr()) for name, p in model.model.named_parameters()},
        "threads": [thread.name for thread in threading.enumerate()],
        "descriptors": descriptors(),
    }


def descriptors() -> list[str]:
    """What every open descriptor of this process leads to."""
    links = [f"/proc/self/fd/{fd}" for fd in os.listdir("/proc/self/fd")]
    return sorted(os.readlink(link) for link in links if os.path.lexists(link))


def interrupt_after(layer: int) -> Callable[[int, int], None]:
    def progress(done: int, layers: int) -> None:
        if done == layer:
            raise KeyboardInterrupt

    return progress


@pytest.mark.parametrize(("name", "options"), [("opt", {}), *(("llama2", options) for options in OPTIONS)], ids=str)
def test_interrupted_after_a_layer(checkpoints, name: str, options: dict[str, object]):
    expected, fresh = answer(fresh_model := make(checkpoints(name), **options)), fresh_model.selected
    model = make(checkpoints(name), **options)
    before = traces(model)
    for layer in (1, 2, 3):
        model.progress = interrupt_after(layer)
        with pytest.raises(KeyboardInterrupt):
            answer(model)
        assert traces(model) == before
    model.progress = None
    assert torch.equal(answer(model), expected)
    assert model.last_report.decode_streamed_bytes == 0
    assert all(torch.equal(model.selected[layer], fresh[layer]) for layer in fresh)
    assert traces(model) == before


@pytest.mark.parametrize(
    ("failing", "options"),
    mostly_slow([*((0, options) for options in OPTIONS), (1, {}), (2, OPTIONS[1])], len(OPTIONS)),
    ids=str,
)
def test_a_failing_reader(checkpoints, monkeypatch: pytest.MonkeyPatch, options: dict[str, object], failing: int):
    path = checkpoints("llama2")
    expected = answer(make(path, **options))
    model = make(path, **options)
    before = traces(model)
    source = model.engine.loaded.layers.source
    fetch = source.fetch

    def broken(layer: int) -> list[torch.Tensor]:
        if layer == failing:
            raise OSError("the disk is gone")
        return fetch(layer)

    with monkeypatch.context() as patch:
        patch.setattr(source, "fetch", broken)
        with pytest.raises(GriffinError, match="the disk is gone"):
            answer(model)
    assert traces(model) == before
    assert torch.equal(answer(model), expected)


@pytest.mark.parametrize("at", ["chunked", "gather"])
def test_interrupted_inside_the_pass(checkpoints, monkeypatch: pytest.MonkeyPatch, at: str):
    """While hooks are still being placed, and while a layer's neurons are chosen."""
    path = checkpoints("llama2")
    expected = answer(make(path))
    model = make(path)
    before = traces(model)
    calls = []

    def interrupted(original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            calls.append(at)
            if len(calls) == 2:
                raise KeyboardInterrupt
            return original(*arguments)

        return call

    with monkeypatch.context() as patch:
        patch.setattr(FeedForward, at, interrupted(getattr(FeedForward, at)))
        with pytest.raises(KeyboardInterrupt):
            answer(model)
    assert len(calls) == 2
    assert traces(model) == before
    assert torch.equal(answer(model), expected)


def test_interrupted_while_decoding(checkpoints):
    path = checkpoints("llama2")
    expected = answer(make(path))
    model = make(path)
    before = traces(model)

    def stop(tokens: torch.Tensor, scores: torch.Tensor, **_: Any) -> torch.Tensor:
        if tokens.shape[1] == 44:
            raise KeyboardInterrupt
        return torch.zeros(1, dtype=torch.bool)

    with pytest.raises(KeyboardInterrupt):
        model.generate(torch.full((1, 40), 5), max_new_tokens=10, do_sample=False, stopping_criteria=[stop])
    assert traces(model) == before
    assert torch.equal(answer(model), expected)


def test_interrupted_while_loading(checkpoints, monkeypatch: pytest.MonkeyPatch):
    """Nothing stays open when loading fails half-way; the next load works."""
    path = checkpoints("gpt2")  # positions and the last norm are copied before the rest, which may come later
    expected = answer(make(path))
    gc.collect()
    before = descriptors()
    calls = []

    def interrupted(*arguments: Any) -> Any:
        calls.append(arguments)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return original(*arguments)

    original = FilePages.copy
    with monkeypatch.context() as patch:
        patch.setattr(FilePages, "copy", interrupted)
        with pytest.raises(KeyboardInterrupt):
            make(path)
    assert len(calls) >= 2  # the others were under way in other threads
    calls.clear()
    assert descriptors() == before
    assert torch.equal(answer(make(path)), expected)
