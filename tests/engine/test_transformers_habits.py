"""docs/transformers_habits.md, line by line: what works is called, what is refused says what does it here."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_models import VOCAB
from transformers import CompileConfig, DynamicCache, GenerationConfig, pipeline

from griffin_offload import GriffinModel, UsageError
from griffin_offload.checkpoint.registry import locate
from griffin_offload.engine.options import HUB, REFUSED, TRANSLATED, translated
from griffin_offload.transformers_api import CACHE

PAGE = Path(__file__).parents[2] / "docs" / "transformers_habits.md"
Row = tuple[str, str, str]


def _rows(table: int) -> list[Row]:
    """(arguments, "works" or "refused", the rest) of each line of a table."""
    part = PAGE.read_text().split("\n## ")[table]
    lines = [line.strip("| ").split(" | ") for line in part.splitlines() if line.startswith("| `")]
    return [(arguments.strip("`"), here, rest) for arguments, here, rest in lines]


def _arguments(text: str, **names: Any) -> dict[str, Any]:
    named = {
        "np": np,
        "torch": torch,
        "DynamicCache": DynamicCache,
        "GenerationConfig": GenerationConfig,
        "CompileConfig": CompileConfig,
        **names,
    }
    arguments: dict[str, Any] = eval(f"dict({text})", named)
    return arguments


def _ids() -> torch.Tensor:
    return torch.randint(3, VOCAB, (1, 20), generator=torch.Generator().manual_seed(0))


def _load(path: Any, **options: Any) -> GriffinModel:
    settings = {"device": "cpu", "max_gpu_mem": "100MB", "ctx_size": 64}
    if "device_map" in options:
        del settings["device"]
    return GriffinModel.from_pretrained(path, **(settings | options))


@pytest.mark.parametrize(("arguments", "here", "rest"), _rows(1))
def test_what_loading_takes(checkpoints, arguments: str, here: str, rest: str):
    options = _arguments(arguments)
    if here == "works":
        with _load(checkpoints("llama3"), **options) as model:
            assert model.generate(_ids(), max_new_tokens=2).shape == (1, 22)
            assert model.dtype == torch.float32
        return
    assert here == "refused"
    with pytest.raises(UsageError) as raised:
        _load(checkpoints("llama3"), **options)
    assert rest.strip("`") in str(raised.value)
    assert next(iter(options)).split("_")[0] in str(raised.value)


@pytest.fixture(scope="module")
def models(checkpoints) -> dict[str, GriffinModel]:
    return {name: _load(checkpoints("llama3"), density=0.5, batch_size=2) for name in ("model", "other")}


@pytest.mark.parametrize(("arguments", "here", "rest"), _rows(2))
def test_what_generate_takes(models: dict[str, GriffinModel], arguments: str, here: str, rest: str):
    options = {"max_new_tokens": 3} | _arguments(arguments, ids=_ids(), **models)
    if "generation_config" in options:
        del options["max_new_tokens"]
    if here == "works" or CACHE in options:  # as releases from 5.24 on call it
        output = models["model"].generate(_ids(), **options)
        assert (output if isinstance(output, torch.Tensor) else output.sequences).shape == (1, 23)
        return
    assert here == "refused"
    with pytest.raises(UsageError) as raised:
        models["model"].generate(_ids(), **options)
    assert rest.strip("`") in str(raised.value)


def test_no_word_is_refused_without_a_way():
    for name, reason in REFUSED.items():
        with pytest.raises(UsageError, match=name) as raised:
            translated({name: "something"})
        assert reason in str(raised.value)
        assert translated({name: None}).options == {}


def test_words_that_contradict_each_other_are_refused():
    for options in (
        {"dtype": "float32", "torch_dtype": torch.bfloat16},
        {"device": "cpu", "device_map": "cuda"},
        {"offline": False, "local_files_only": True},
    ):
        with pytest.raises(UsageError, match="give one of them"):
            translated(options)
    same = translated({"dtype": "float32", "torch_dtype": torch.float32, "device": "cpu", "device_map": {"": "cpu:0"}})
    assert same.options == {"dtype": "float32", "device": "cpu"}


def test_words_for_the_hub_reach_its_client(checkpoints, monkeypatch: pytest.MonkeyPatch):
    asked: dict[str, Any] = {}

    def snapshot(name: str, **options: Any) -> str:
        asked.update(options, name=name)
        return str(checkpoints("llama3"))

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot)
    given = {"revision": "v2", "cache_dir": "/somewhere", "token": "hf_x"}
    assert given.keys() == set(HUB)
    _load("org/name", **given, local_files_only=True).close()
    assert asked.items() >= {**given, "name": "org/name", "local_files_only": True}.items()
    assert "local_files_only" in TRANSLATED
    assert locate("org/name") == checkpoints("llama3")
    assert "token" not in asked or asked["token"] == "hf_x"


def _again(model: GriffinModel) -> torch.Tensor:
    first = model.generate(_ids(), max_new_tokens=3, do_sample=False, return_dict_in_generate=True)
    longer = torch.cat([first.sequences, _ids()[:, :4]], dim=1)
    return model.generate(longer, past_key_values=first.past_key_values, max_new_tokens=3, do_sample=False)


_CACHED: dict[str, Callable[[GriffinModel], Any]] = {
    "beams": lambda m: m.generate(_ids(), num_beams=2, max_new_tokens=4, do_sample=False).tolist(),
    "the stock model": lambda m: m.model.generate(_ids(), max_new_tokens=4, do_sample=False).tolist(),
    "a past": lambda m: _again(m).tolist(),
    "a context": lambda m: m.generate(_ids(), max_new_tokens=4, do_sample=False, context=m.new_context()).tolist(),
    "one of many": lambda m: [a.tokens.tolist() for a in m.generate_many([_ids()], max_new_tokens=4)],
    "a pipeline": lambda m: pipeline("text-generation", model=m, tokenizer=m.tokenizer)(
        "the cat", max_new_tokens=4, do_sample=False
    ),
    "a conversation": lambda m: m.chat_session(max_new_tokens=4, do_sample=False).send("the cat").text,
    "logits": lambda m: m(_ids()).logits.tolist(),
}


@pytest.mark.parametrize("way", list(_CACHED))
def test_a_cache_that_training_has_switched_off(models: dict[str, GriffinModel], uncached: GriffinModel, way: str):
    assert _CACHED[way](uncached) == _CACHED[way](models["model"])


@pytest.fixture(scope="module")
def uncached(checkpoints, tmp_path_factory: pytest.TempPathFactory) -> GriffinModel:
    directory = Path(shutil.copytree(checkpoints("llama3"), tmp_path_factory.mktemp("trained") / "model"))
    for file in ("config.json", "generation_config.json"):
        said = json.loads((directory / file).read_text())
        (directory / file).write_text(json.dumps(said | {"use_cache": False}))
    return _load(directory, density=0.5, batch_size=2)
