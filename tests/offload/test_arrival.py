"""Residents that arrive while the first prompt already passes."""

import threading
import time

import pytest
import torch
from torch import nn

from griffin_offload import GriffinModel
from griffin_offload.blocks.base import hooks_on
from griffin_offload.checkpoint.mapped import FilePages
from griffin_offload.errors import GriffinError
from griffin_offload.offload.background_loader import BackgroundLoader


def decoder(layers: int) -> nn.ModuleList:
    return nn.ModuleList(nn.Linear(2, 2) for _ in range(layers))


def test_a_layer_waits_for_its_own_residents_and_no_others() -> None:
    layers, second, done = decoder(2), threading.Event(), threading.Event()
    arrival = BackgroundLoader(
        layers, [[lambda: None], [lambda: second.wait() and None]], check=lambda: None, finished=done.set
    )
    arrival.start()
    row = torch.ones(1, 2)
    layers[0](row)
    passed: list[torch.Tensor] = []
    behind = threading.Thread(target=lambda: passed.append(layers[1](row)))
    behind.start()
    behind.join(0.2)
    assert not passed
    second.set()
    behind.join(10)
    assert passed
    assert done.is_set()
    assert not any(hooks_on(layer) for layer in layers)


def test_a_failure_is_raised_by_every_forward_that_needs_it() -> None:
    def fails() -> None:
        raise OSError("the disk is gone")

    layers = decoder(2)
    arrival = BackgroundLoader(layers, [[fails], [lambda: None]], check=lambda: None, finished=lambda: None)
    arrival.start()
    for layer in layers:
        with pytest.raises(GriffinError, match="the disk is gone"):
            layer(torch.ones(1, 2))
    arrival.close()


def test_close_ends_what_is_under_way() -> None:
    layers, asked, go_on = decoder(3), threading.Event(), threading.Event()

    def slow() -> None:
        asked.set()
        go_on.wait(10)

    done = threading.Event()
    many = [slow] * 8
    arrival = BackgroundLoader(layers, [many, many, many], check=lambda: None, finished=done.set)
    arrival.start()
    asked.wait(10)
    threading.Timer(0.1, go_on.set).start()
    arrival.close()
    assert done.is_set()
    with pytest.raises(GriffinError, match="closed"):
        arrival.wait()


@pytest.mark.parametrize("quantize", ["none", "int8"])
@pytest.mark.parametrize("density", [0.5, 1.0])
def test_slow_residents_change_nothing(checkpoints, monkeypatch, quantize: str, density: float) -> None:
    folder = checkpoints("llama3")
    prompt = torch.arange(1, 20)[None]
    options = {"device": "cpu", "density": density, "quantize": quantize, "dtype": "float32"}
    with GriffinModel.from_pretrained(folder, **options) as model:
        model.model  # noqa: B018  waits for all
        expected = model.generate(prompt, max_new_tokens=8, do_sample=False)
    gate = threading.Event()
    for name in ("copy", "read"):
        stock = getattr(FilePages, name)
        monkeypatch.setattr(FilePages, name, lambda *args, stock=stock: (_wait_in_background(gate), stock(*args))[1])
    with GriffinModel.from_pretrained(folder, **options) as model:
        threading.Timer(0.3, gate.set).start()
        assert torch.equal(model.generate(prompt, max_new_tokens=8, do_sample=False), expected)
        assert model.last_report is not None
        assert model.last_report.wait_s > 0


@pytest.mark.parametrize("name", ["llama2", "gemma"])
@pytest.mark.parametrize("table", ["get_input_embeddings", "get_output_embeddings"])
def test_no_table_is_waited_for_by_loading(checkpoints, monkeypatch: pytest.MonkeyPatch, name: str, table: str) -> None:
    """The embedding and the head, which may be one: each is there before it is used."""
    folder, prompt = checkpoints(name), torch.arange(1, 20)[None]
    with GriffinModel.from_pretrained(folder, device="cpu") as model:
        expected = model.generate(prompt, max_new_tokens=8, do_sample=False)
        wanted = getattr(model.model, table)().weight
    copy, loaded, slow = FilePages.copy, threading.Event(), []

    def slowly(pages: FilePages, source: torch.Tensor, target: torch.Tensor) -> None:
        if torch.equal(source, wanted):
            assert loaded.wait(10)
            slow.append(target)
            time.sleep(0.3)
        copy(pages, source, target)

    monkeypatch.setattr(FilePages, "copy", slowly)
    with GriffinModel.from_pretrained(folder, device="cpu") as model:
        loaded.set()
        assert torch.equal(model.generate(prompt, max_new_tokens=8, do_sample=False), expected)
    assert len(slow) == 1


def _wait_in_background(gate: threading.Event) -> None:
    if threading.current_thread().name.startswith("griffin-offload-resident"):
        gate.wait(10)
