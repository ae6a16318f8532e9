"""`griffin-offload inspect`: through the command line."""

import json
import os
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch
from reference import collect_z, statistic_float64
from transformers import AutoModelForCausalLM, AutoTokenizer

from griffin_offload import GriffinModel
from griffin_offload.cli.main import build_parser
from griffin_offload.engine.convert import convert
from griffin_offload.evaluation.config import InspectConfig

ALL = InspectConfig.figures
MEMORY = ("--device", "cpu", "--max-mem", "1GB")
SMALL = ("--windows", 3, "--tokens", 24, "--prompt-tokens", "4,8", "--generate-tokens", "3,6")
DOWN = "model.layers.{i}.mlp.down_proj"
DOCUMENT = "the cat sat on the mat and thought of another river while nothing was left in their boats "


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "a text.txt"
    path.write_text("\n<|endoftext|>\n".join([DOCUMENT * 4, "short", DOCUMENT * 6]))
    return path


def _written(directory: Path) -> set[str]:
    return {path.name for path in directory.iterdir()}


@pytest.mark.slow
def test_all_figures(cli, llama: Path, text: Path, tmp_path: Path):
    output = tmp_path / "new" / "pictures"
    outcome = cli("inspect", "-m", llama, *MEMORY, "--text", text, "--output", output, *SMALL)
    assert outcome.code == 0, outcome
    pixels = {f"{name}-heatmaps.json" for name in ("flocking", "inputs")}
    assert _written(output) == {f"{name}.{kind}" for name in ALL for kind in ("png", "svg", "json")} | pixels
    lines = outcome.out.splitlines()
    assert [line.split(".{")[0] for line in lines] == [str(output / name) for name in ALL]
    for name in ALL:
        assert (output / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        ElementTree.parse(output / f"{name}.svg")
        numbers = json.loads((output / f"{name}.json").read_text())
        assert (numbers["model"], numbers["text"], numbers["measured_in"]) == (str(llama), text.name, "float32")


def test_numbers_are_those_of_the_model(cli, llama: Path, text: Path, tmp_path: Path, undrawn: list[str]):
    """stdout, the file and dense transformers on the text's first window agree."""
    outcome = cli(
        "inspect", "-m", llama, *MEMORY, "--text", text, "--output", tmp_path, *SMALL[:4], "--json",
        "--figure", "jaccard,flocking", "--density", "0.5,0.25", "--layers", "2,0",
    )  # fmt: skip
    assert outcome.code == 0, outcome
    found = outcome.json
    assert list(found) == ["jaccard", "flocking"] == undrawn
    assert found == {name: json.loads((tmp_path / f"{name}.json").read_text()) for name in found}
    assert [(row["layer"], row["density"]) for row in found["jaccard"]["rows"]] == [
        (layer, density) for layer in range(3) for density in (0.5, 0.25)
    ]
    documents = [document.strip() for document in text.read_text().split("<|endoftext|>")]
    tokenizer = AutoTokenizer.from_pretrained(llama)
    ids = [token for text in documents for token in tokenizer(text, add_special_tokens=False)["input_ids"]][:24]
    dense = AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32)
    heatmaps = json.loads((tmp_path / "flocking-heatmaps.json").read_text())["tokens_by_features"]["original"]
    assert list(heatmaps) == ["0", "2"]
    for layer, z in enumerate(collect_z(dense, DOWN, torch.tensor([ids]))):
        squared = statistic_float64(z[0]) ** 2
        share = float(squared.sort(descending=True).values[:64].sum() / squared.sum())
        assert found["flocking"]["layers"][layer]["share_of_top_half"] == pytest.approx(share, abs=1e-5)
        if str(layer) in heatmaps:
            expected = (z[0] / z[0].norm(dim=-1, keepdim=True)).abs()
            torch.testing.assert_close(torch.tensor(heatmaps[str(layer)]) * 1e-4, expected, atol=1e-4, rtol=0)


@pytest.mark.slow
def test_layers_without_a_feed_forward_are_in_no_figure(cli, checkpoints, text: Path, tmp_path: Path, undrawn):
    """Of those that there are to choose from, the first and the last are shown; a prompt's table has no others."""
    options = ("-m", checkpoints("nemotron_h"), *MEMORY)
    shown = ("--figure", "flocking,statistic,jaccard,inputs", *SMALL[:4])  # all but the one of perplexities
    figures = ("--text", text, "--output", tmp_path, *shown, "--json")
    found = cli("inspect", *options, *figures).json
    assert undrawn == list(found)
    layers = {name: [row["layer"] for row in found[name]["layers"]] for name in ("flocking", "statistic")}
    assert layers == {"flocking": [1, 3], "statistic": [1, 3]}
    assert {row["layer"] for name in ("jaccard", "inputs") for row in found[name]["rows"]} == {1, 3}
    assert found["flocking"]["shown"] == [1, 3]
    cli.refuses(2, "layer 2 has no feed-forward: choose of 1, 3", "inspect", *options, *figures, "--layers", "2")
    of_prompt = cli("inspect", *options, "--prompt", DOCUMENT, "--json").json
    assert [row["layer"] for row in of_prompt["layers"]] == [1, 3]
    assert of_prompt["plan"]["densities"] == [1.0] * 4


def test_perplexities_are_those_of_eval(cli, llama: Path, text: Path, tmp_path: Path, undrawn: list[str]):
    options = ("-m", llama, *MEMORY, "--text", text, "--windows", 2, "--density", "0.5,0.25")
    outcome = cli(
        "inspect", *options, "--output", tmp_path, "--figure", "lengths", "--json", "--selection", "topk,random",
        "--prompt-tokens", 8, "--generate-tokens", 6,
    )  # fmt: skip
    assert outcome.code == 0, outcome
    assert undrawn == ["lengths"]
    rows = outcome.json["lengths"]["rows"]
    sizes = ("--prompt-tokens", 8, "--generate-tokens", 6, "--selection", "topk,random", "--json")
    expected = cli("eval", "ppl", *options, *sizes)
    for row, other in zip(rows, expected.json, strict=True):
        assert row.pop("increase") == pytest.approx(row["ppl"] / row["ppl_full"] - 1)
        assert {**row, "selection": 0} == pytest.approx({**other, "selection": 0}, rel=1e-5)


def test_sparsity_from_rows(cli, tmp_path: Path):
    """Of eval ppl and eval tasks; without a model."""
    row = {"selection": "topk", "density": 0.25, "prompt_tokens": 8, "generate_tokens": 8, "ppl_full": 8.0, "ppl": 10.0}
    (tmp_path / "ppl.json").write_text(json.dumps([row, {**row, "density": 0.5, "ppl": 9.0}]))

    def run(acc: float, **made: object) -> dict[str, object]:
        results = {"piqa": {"alias": "piqa", "acc_norm,none": 0.3, "acc,none": acc, "acc_stderr,none": 0.1}}
        return {"results": results, "config": {"model_args": made}}

    tasks = [run(0.8), run(0.6, selection="topk", density=0.5), run(0.2, selection="random", density=0.5)]
    (tmp_path / "tasks.json").write_text(json.dumps(tasks))
    files = ("--rows", tmp_path / "ppl.json", "--rows", tmp_path / "tasks.json")
    outcome = cli("inspect", "--output", tmp_path / "out", *files, "--json")
    assert outcome.code == 0, outcome
    found = [
        (point["metric"], point["selection"], point["sparsity"], round(point["relative"], 6))
        for point in outcome.json["sparsity"]["rows"]
    ]
    assert found == [
        ("1 / perplexity", "topk", 0.75, 0.8),
        ("1 / perplexity", "topk", 0.5, round(8 / 9, 6)),
        ("piqa acc", "topk", 0.5, 0.75),
        ("piqa acc", "random", 0.5, 0.25),
    ]
    assert _written(tmp_path / "out") == {"sparsity.png", "sparsity.svg", "sparsity.json"}


def test_a_prompt(cli, llama: Path, tmp_path: Path):
    options = ("inspect", "-m", llama, *MEMORY, "--prompt", DOCUMENT, "--quantize", "none", "--density", "0.5,0.25,1")
    outcome = cli(*options)
    assert outcome.code == 0, outcome
    assert all(len(line) <= 80 for line in outcome.out.splitlines())
    found = cli(*options, "--json", "--output", tmp_path).json
    assert found == json.loads((tmp_path / "prompt.json").read_text())
    assert _written(tmp_path) == {"prompt.png", "prompt.svg", "prompt.json"}
    assert found["plan"]["densities"] == [0.5, 0.25, 1]
    assert found["plan"]["density"] == pytest.approx(1.75 / 3)
    assert [layer["planned_kept"] for layer in found["layers"]] == pytest.approx(
        [found["layers"][0]["kept"][5], found["layers"][1]["kept"][2], 1.0]
    )
    assert f"{found['planned_held_out']:.3f}" in outcome.out
    run = cli("run", "-m", llama, *MEMORY, DOCUMENT, "--quantize", "none", "--density", 0.5, "-n", 1, "--json").json
    at_half = found["densities"].index(0.5)
    assert found["prompt_tokens"] == run["prompt_tokens"]
    assert found["held_out"][at_half] == pytest.approx(run["activation_kept_heldout"], abs=1e-4)


@pytest.mark.parametrize("stored", ["float32", "bfloat16", "int8"])
def test_it_says_in_which_precision_it_measures(cli, llama: Path, checkpoints, tmp_path: Path, stored: str):
    """That of the checkpoint; the plan's is its own."""
    path = llama if stored == "float32" else checkpoints("llama2", torch.bfloat16)
    if stored == "int8":
        path = convert(path, tmp_path / "copy", "int8").directory
    options = (
        "inspect",
        "-m",
        path,
        *MEMORY,
        "--prompt",
        DOCUMENT,
        "--quantize",
        "int8" if stored == "int8" else "int4",
    )
    outcome = cli(*options)
    assert outcome.code == 0, outcome
    assert f"measured on all neurons in {stored}, whatever a plan keeps them in\n" in outcome.out
    found = cli(*options, "--json").json
    assert (found["measured_in"], found["plan"]["precision"]) == (stored, "int8" if stored == "int8" else "int4")


def test_the_budget_marks_a_density(cli):
    """The demo and its own prompt, in the budget of the README."""
    options = ("--device", "cpu", "--max-mem", "6.35MB", "--quantize", "none", "-n", 2, "--json")
    outcome = cli("inspect", *options)
    assert outcome.code == 0, outcome
    found, run = outcome.json, cli("run", *options).json
    assert found["prompt_tokens"] == 74
    assert 0.25 < found["plan"]["density"] < 1
    assert found["plan"]["density"] == pytest.approx(run["density"])
    assert found["planned_held_out"] == pytest.approx(run["activation_kept_heldout"], abs=1e-4)
    assert found["kept"] == sorted(found["kept"])


@pytest.mark.parametrize(("quantize", "bits"), [("tiers", 5.0), ("layers", 6.3)])
def test_a_plan_of_several_formats(cli, llama: Path, quantize: str, bits: float):
    """The counts that a run has, and what they cost by the formula, from dense transformers."""
    flags = ("-m", llama, *MEMORY, "--quantize", quantize, "--bits", bits)
    outcome = cli("inspect", *flags, "--prompt", DOCUMENT)
    assert outcome.code == 0, outcome
    found = cli("inspect", *flags, "--prompt", DOCUMENT, "--json").json
    with GriffinModel.from_pretrained(llama, device="cpu", max_gpu_mem="1GB", quantize=quantize, bits=bits) as model:
        plan = model.plan
    assert found["plan"]["counts"] == [list(own) for own in plan.counts]
    assert found["plan"]["in_words"] == plan.in_words
    assert sum(map(bool, map(sum, zip(*plan.counts, strict=True)))) > 1
    dense = AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32)
    ids = torch.tensor([AutoTokenizer.from_pretrained(llama)(DOCUMENT)["input_ids"]])
    distortions, gained, errors = {"int8": 0.0002, "int4": 0.013, "int3": 0.04, "int2": 0.145}, [], []
    for layer, z in enumerate(collect_z(dense, DOWN, ids)):
        norms = dense.get_submodule(DOWN.format(i=layer)).weight.detach().double().norm(dim=0)
        s = statistic_float64(z[0])
        energies = (s * norms) ** 2
        gained.append(float(energies.mean().log2() - energies.log2().mean()) / 2)
        levels = [distortions[name] for name, n in zip(plan.levels, plan.counts[layer], strict=True) for _ in range(n)]
        levels += [1.0] * (len(s) - len(levels))
        ranked = energies[s.argsort(descending=True)]
        errors.append(float((ranked * torch.tensor(levels, dtype=torch.float64)).sum() / energies.sum()))
    assert found["bits_gained"] == pytest.approx(sum(gained) / 3, abs=1e-4)
    assert found["planned_error"] == pytest.approx(sum(errors) / 3, rel=1e-3)
    shown = [f"{count} {name}" for name, count in zip(plan.levels, plan.counts[0], strict=True) if count]
    assert any(line.startswith("layer") and ", ".join(shown) in line for line in outcome.out.splitlines())
    assert f"tiers save {found['bits_gained']:.2f} bits" in outcome.out


def test_a_plan_that_does_not_fit_is_said(cli, llama: Path):
    """The prompt is measured all the same: that takes less than the model's KV cache for a long answer."""
    outcome = cli(
        "inspect", "-m", llama, "--device", "cpu", "--max-mem", "450kB", "--prompt", "one two", "-n", 480,
        "--quantize", "none", "--density", 1, "--json",
    )  # fmt: skip
    assert outcome.code == 0, outcome
    assert outcome.json["plan"] is None
    assert "no density is marked, needs" in outcome.err


def test_bad_input(cli, llama: Path, text: Path, tmp_path: Path):
    def refuses(words: str, *options: object, code: int = 2) -> None:
        cli.refuses(code, words, "inspect", "-m", llama, *MEMORY, *options)

    of_text = ("--text", text, "--output", tmp_path / "out")
    refuses("text has .* tokens, a window 480", *of_text, "--figure", "statistic", "--tokens", 480)
    refuses("text has .* tokens, a window 768", *of_text, "--figure", "lengths")
    refuses("no figure 'flock': choose of flocking, jaccard", *of_text, "--figure", "flock")
    refuses("no layer 3: the model has 3, from 0 to 2", *of_text, "--layers", "0,3")
    refuses("no layer -1", *of_text, "--layers=-1")
    refuses("cannot read the layers", *of_text, "--layers", "first")
    refuses("--windows is 2 or more", *of_text, "--figure", "jaccard", "--windows", 1)
    refuses("1 or more", *of_text, "--windows", 0)
    refuses("density is 2.0", *of_text, "--density", "2")
    refuses("cannot read the densities", *of_text, "--density", "auto")
    refuses("no selection 'best'", *of_text, "--selection", "best")
    refuses("--output DIR", "--text", text)
    refuses("cannot write to", "--text", text, "--output", text)
    refuses("cannot read the text", "--text", tmp_path / "absent", "--output", tmp_path / "out")
    refuses("--windows belongs to --text", "--prompt", "x", "--windows", 4)
    refuses("--prompt belongs to a prompt", *of_text, "--prompt", "x")
    refuses("no prompt")
    refuses("the prompt is empty", "--prompt", " ")
    refuses("--max-new-tokens is 0", "--prompt", "x", "-n", 0)
    refuses("--bits belongs to a prompt", *of_text, "--bits", 3)
    refuses("is for tiers or layers", "--prompt", "x", "--bits", 3)
    refuses("a density is of one format", "--prompt", "x", "--quantize", "layers", "--density", 0.5)
    refuses("density is 2.0", "--prompt", "x", "--density", "2")
    refuses("2 densities for 3 layers", "--prompt", "x", "--density", "0.5,0.25")
    refuses("--rows is for sparsity", *of_text, "--rows", text, "--figure", "jaccard")
    refuses("jaccard needs --text", "--rows", text, "--figure", "jaccard,sparsity", "--output", tmp_path / "out")
    refuses("cannot read the rows", "--rows", text, "--output", tmp_path / "out")
    for wrong in ([], {}, [{"density": 1}], [{"results": {}}]):
        (tmp_path / "rows.json").write_text(json.dumps(wrong))
        refuses(r"rows.json (is not what eval ppl|has no row)", "--rows", tmp_path / "rows.json", *of_text[2:])


def test_missing_matplotlib_is_said_before_anything_is_loaded(cli, text: Path, tmp_path: Path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    words = r'pip install "griffin-offload\[plot\]"'
    cli.refuses(1, words, "inspect", "-m", tmp_path / "absent", "--text", text, "--output", tmp_path)
    cli.refuses(1, words, "inspect", "-m", tmp_path / "absent", "--prompt", "x", "--output", tmp_path)
    assert cli("inspect", "--device", "cpu", "-q").code == 0  # the terminal needs none


def test_defaults_are_those_of_the_dataclass(cli):
    parsed = build_parser().parse_args(["inspect"])
    assert all(getattr(parsed, name) is None for name in ("figure", "windows", "tokens", "prompt_tokens", "density"))
    shown = " ".join(cli("inspect", "--help").out.split())
    assert f"(default: {InspectConfig.windows})" in shown
    assert f"(default: {InspectConfig.tokens})" in shown
    assert f"(default: {','.join(map(str, InspectConfig.prompt_tokens))})" in shown


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may make a small file system")
def test_a_full_disk_leaves_no_half_file(cli, llama: Path, text: Path, small_disk):
    disk = small_disk("40k")
    outcome = cli("inspect", "-m", llama, *MEMORY, "--text", text, "--output", disk, *SMALL, "--figure", "jaccard")
    assert outcome.code == 1
    assert "jaccard.png" not in _written(disk) or (disk / "jaccard.png").read_bytes().endswith(b"IEND\xaeB`\x82")
    assert not any(path.name.endswith(".tmp") for path in disk.iterdir())
