"""What differs between releases of transformers is bridged in one file: both names of the KV cache, layers without one,
and a word where the installed release is newer than what was tested."""

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tiny_models import VOCAB
from transformers import DynamicCache, LlamaConfig, cache_utils

import griffin_offload
from griffin_offload import GriffinModel, UsageError
from griffin_offload.transformers_api import CACHE, DummyLayer, NoEntries, stock_cache, untested, with_own_name

_PACKAGE = Path(griffin_offload.__file__).parent


def _ids(tokens: int = 12) -> torch.Tensor:
    return torch.randint(3, VOCAB, (1, tokens), generator=torch.Generator().manual_seed(0))


def test_the_old_name_means_the_same_in_a_forward_and_in_generate(checkpoints):
    model = GriffinModel.from_pretrained(
        checkpoints("llama3"), device="cpu", max_gpu_mem="100MB", density=0.5, ctx_size=64, quantize="none"
    )
    found: list[Any] = []
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for name in ("past_key_values", CACHE):
            cache = model.model(_ids())[CACHE]
            assert cache.get_seq_length() == 12
            found.append(model.model(torch.tensor([[5]]), **{name: cache}).logits)
            longer = torch.cat([_ids(), torch.tensor([[5, 6]])], 1)
            found.append(model.generate(longer, max_new_tokens=3, do_sample=False, **{name: cache}))
    assert torch.equal(found[0], found[2])
    assert torch.equal(found[1], found[3])


def test_one_cache_has_one_name():
    cache = DynamicCache()
    assert with_own_name({"past_key_values": cache, "use_cache": True}) == {CACHE: cache, "use_cache": True}
    if CACHE == "cache":
        with pytest.raises(UsageError, match="one argument by two names"):
            with_own_name({"past_key_values": cache, "cache": cache})


def test_a_shared_layer_stands_for_itself_in_every_release():
    config = LlamaConfig(num_hidden_layers=4, layer_types=["full_attention"] * 4)
    assert len(stock_cache(config).layers) == 4
    assert not any(isinstance(layer, DummyLayer) for layer in stock_cache(config).layers)
    own = {name for name in vars(NoEntries) if not name.startswith("_")}
    theirs = getattr(cache_utils, "DummyLayer", None)
    if theirs is not None:  # what newer releases ask of such a layer, our own for older ones answers
        assert {name for name in vars(theirs) if not name.startswith("_")} - own <= {"update", "supports_early_init"}


@pytest.mark.parametrize(
    ("installed", "warned"),
    [("5.20.0", False), ("5.25.9", False), ("5.25.0.dev0", False), ("5.26.0", True), ("5.26rc1", True), ("6.0", True)],
)
def test_a_newer_release_is_named_with_the_tested_one(installed: str, warned: bool):
    told = untested(installed)
    assert (told is not None) == warned
    if told is not None:
        assert installed in told
        assert "5.25" in told
        assert "pip install 'transformers<5.26'" in told


def test_the_installed_release_is_a_tested_one():
    assert untested(transformers.__version__) is None


def test_no_other_file_knows_what_the_cache_is_called():
    found = [
        str(path.relative_to(_PACKAGE))
        for path in _PACKAGE.rglob("*.py")
        if path.name != "transformers_api.py"
        for line in path.read_text().splitlines()
        if "past_key_values" in line and "`past_key_values`" not in line
    ]
    assert found == []
