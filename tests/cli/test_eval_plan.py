"""`griffin-offload eval ppl` of a plan: what `run` would answer, against the model as it is stored."""

from pathlib import Path
from typing import Any

import pytest
import torch
from marks import mostly_slow
from reference import dense_forward
from tiny_models import RECURRENT, with_outliers, write_tokenizer
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from griffin_offload import GriffinModel
from griffin_offload.engine.convert import convert
from griffin_offload.evaluation.samples import take_windows

PROMPT, SCORED, WINDOWS = 24, 12, 3
SIZES = ("--prompt-tokens", PROMPT, "--generate-tokens", SCORED, "--windows", WINDOWS)
MEMORY = ("--device", "cpu", "--max-mem", "100MB")
DOCUMENT = "the cat sat on the mat and thought of another river while nothing was left in their boats "
# A token by itself passes int4 as 15 bits, several at once as floats.
CLOSE = {"rel": 2e-3, "abs": 2e-4}


@pytest.fixture(scope="module")
def outliers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("outliers")
    with_outliers().save_pretrained(directory)
    write_tokenizer(directory)
    return directory


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(DOCUMENT * 8)
    return path


def _windows(path: Path, text: Path) -> list[Tensor]:
    ids = AutoTokenizer.from_pretrained(path)(text.read_text().strip(), add_special_tokens=False)["input_ids"]
    return take_windows([ids], PROMPT + SCORED, WINDOWS, "even")


def _forced(model: GriffinModel, ids: Tensor) -> Tensor:
    """log-probabilities [G, V] by stock forwards alone: the prompt's, and one of all that follows it."""
    first = model.model(input_ids=ids[None, :PROMPT], use_cache=True)
    rest = model.model(input_ids=ids[None, PROMPT:-1], past_key_values=first.past_key_values, use_cache=True)
    return torch.cat([first.logits[0, -1:], rest.logits[0]]).double().log_softmax(-1)


def _expected(full: PreTrainedModel, model: GriffinModel, windows: list[Tensor]) -> dict[str, float]:
    kl, top1, nll, nll_full = [], [], [], []
    for ids in windows:
        own, whole = _forced(model, ids), dense_forward(full, ids[None, :-1])[0, PROMPT - 1 :].double().log_softmax(-1)
        kl.append((whole.exp() * (whole - own)).sum(-1).mean())
        top1.append((whole.argmax(-1) == own.argmax(-1)).double().mean())
        nll.append(-own.gather(-1, ids[PROMPT:, None]).mean())
        nll_full.append(-whole.gather(-1, ids[PROMPT:, None]).mean())
    means = [torch.stack(values).mean() for values in (kl, top1, nll, nll_full)]
    return dict(
        zip(("kl", "top1", "ppl", "ppl_full"), map(float, (*means[:2], *(m.exp() for m in means[2:]))), strict=True)
    )


@torch.no_grad()
def _check(row: dict[str, Any], path: Path, original: Path, text: Path, **options: object) -> None:
    wanted = {"max_gpu_mem": "100MB", "ctx_size": PROMPT + SCORED, "prompt_tokens": PROMPT} | options
    with GriffinModel.from_pretrained(path, device="cpu", **wanted) as model:
        dense = AutoModelForCausalLM.from_pretrained(original, dtype=torch.float32)
        expected = _expected(dense, model, _windows(original, text))
        assert {name: row[name] for name in expected} == pytest.approx(expected, **CLOSE)
        assert row["precision"] == model.plan.in_words
        assert row["density"] == model.plan.density
        assert row["resident_bytes"] == model.resident_bytes
        assert row["windows"] == WINDOWS


@pytest.mark.parametrize(
    ("quantize", "bits"), mostly_slow([("tiers", 3.0), ("layers", 4.5), ("auto", "auto"), ("tiers", 4.5)], 2)
)
def test_a_plan_is_measured_as_it_answers(cli, outliers: Path, text: Path, quantize: str, bits: object):
    asked = ("--quantize", quantize, *(("--bits", bits) if bits != "auto" else ()))
    outcome = cli("eval", "ppl", "-m", outliers, *MEMORY, "--text", text, *SIZES, *asked, "--json")
    assert outcome.code == 0, outcome
    (row,) = outcome.json
    _check(row, outliers, outliers, text, quantize=quantize, bits=bits)
    if quantize == "auto":
        assert (row["kl"], row["expected_kl"]) == (pytest.approx(0, abs=1e-5), 0)
    else:
        assert row["kl"] > 1e-3
        assert row["ff_bits"] <= bits
        assert len(row["precision"].split(",")) > 1


@pytest.mark.slow
def test_a_copy_is_held_against_its_original(cli, outliers: Path, text: Path, tmp_path: Path):
    convert(outliers, tmp_path / "copy", "tiers")
    asked = ("--quantize", "tiers", "--bits", 3.5)
    command = ("eval", "ppl", "-m", tmp_path / "copy", *MEMORY, "--text", text, *SIZES, *asked)
    (row,) = cli(*command, "--reference", outliers, "--json").json
    _check(row, tmp_path / "copy", outliers, text, quantize="tiers", bits=3.5)
    (alone,) = cli(*command, "--json").json
    assert alone["ppl"] == row["ppl"]
    assert alone["ppl_full"] != row["ppl_full"]  # of int4, which prompts pass through


def test_what_it_prints(cli, outliers: Path, text: Path):
    command = ("eval", "ppl", "-m", outliers, *MEMORY, "--text", text, *SIZES, "--quantize", "layers", "--bits", 4.5)
    outcome = cli(*command, "--prompt-tokens", f"8,{PROMPT}", "--ctx-size", 64)
    assert outcome.code == 0, outcome
    lines = outcome.out.splitlines()
    assert [line.split()[2] for line in lines[1:3]] == ["8", str(PROMPT)]
    assert lines[3] == f"{WINDOWS} windows"
    assert lines[4].startswith("layers (int4 50%, int3 50%): 4.")
    assert lines[4].endswith("resident, KV cache in 16 bits")
    assert lines[5].startswith("expected KL about ")


@pytest.mark.parametrize("name", mostly_slow(RECURRENT, 1))
def test_models_without_a_feed_forward(cli, checkpoints, text: Path, name: str):
    """Unasked at density 1: the dense model's perplexity. A plan is held against it as all are."""
    path = checkpoints(name)
    command = ("eval", "ppl", "-m", path, *MEMORY, "--text", text, *SIZES, "--json")
    (row,), (planned,) = cli(*command).json, cli(*command, "--quantize", "auto").json
    assert cli(*command, "--density", 1).json == [row]
    dense = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    found = [dense_forward(dense, ids[None, :-1])[0, PROMPT - 1 :].double() for ids in _windows(path, text)]
    losses = [
        torch.nn.functional.cross_entropy(logits, ids[PROMPT:])
        for logits, ids in zip(found, _windows(path, text), strict=True)
    ]
    expected = float(torch.stack(losses).mean().exp())
    assert (row["ppl"], row["ppl_full"]) == pytest.approx((expected, expected))
    assert (row["density"], row["kl"], row["activation_kept"]) == (1, pytest.approx(0, abs=1e-6), 1)
    assert (planned["ppl"], planned["kl"]) == (pytest.approx(expected), pytest.approx(0, abs=1e-6))
    assert (planned["ff_bits"], planned["expected_kl"]) == (None, None)
    (int8,) = cli(*command, "--quantize", "int8").json
    assert int8["ppl"] == pytest.approx(expected, rel=0.05)
    assert int8["ppl"] != row["ppl"]


def test_nothing_is_left_out_of_models_without_a_feed_forward(cli, checkpoints, text: Path, tmp_path: Path):
    model = ("-m", checkpoints("mamba"), *MEMORY)
    cli.refuses(
        2, "no neurons to leave out: density 1", "eval", "ppl", *model, "--text", text, *SIZES, "--density", 0.5
    )
    nothing = "mamba has no feed-forward: there are no neurons to inspect; plan -v .* eval ppl --quantize"
    cli.refuses(2, nothing, "inspect", *model, "--prompt", "the cat")
    cli.refuses(2, nothing, "inspect", *model, "--text", text, "--output", tmp_path / "out")


def test_bad_input(cli, outliers: Path, llama: Path, text: Path):
    def refuses(words: str, *options: object, code: int = 2) -> None:
        cli.refuses(code, words, "eval", "ppl", "-m", outliers, *MEMORY, "--text", text, *SIZES, *options)

    tiers = ("--quantize", "tiers")
    refuses("--bits is of a plan: add --quantize auto or layers or tiers", "--bits", 3)
    refuses("--ctx-size is of a plan", "--quantize", "int4", "--ctx-size", 99)
    refuses("--reference is of a plan", "--reference", llama)
    refuses("a window has 36 tokens", *tiers, "--ctx-size", 20)
    refuses("a density is of one format", *tiers, "--density", 0.5)
    refuses("selection is 'topk,random'", *tiers, "--selection", "topk,random")
    refuses("bits per weight", *tiers, "--bits", -1)
    refuses("is for tiers or layers", "--quantize", "auto", "--bits", 3)
    refuses("take .* bits a weight", *tiers, "--bits", 0.1)
    refuses("needs", *tiers, "--max-mem", "300kB", code=3)
