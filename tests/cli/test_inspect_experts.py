"""`inspect` of mixtures of experts: how often each is used, and which ones stay."""

import io
import json
from pathlib import Path

import pytest
import torch
from tiny_models import write_tokenizer
from transformers import AutoModelForCausalLM

from griffin_offload.evaluation.config import InspectConfig
from griffin_offload.evaluation.terminal_plots import show_prompt_loss

PROMPT = "the cat sat on the mat and thought of another river while nothing was left in their boats"
PICTURES = {f"{name}.{kind}" for name in ("prompt", "experts") for kind in ("png", "svg")} | {"prompt.json"}


@pytest.mark.parametrize("name", ["qwen3_moe", "deepseek_v3"])
def test_a_prompt(checkpoints, cli, tmp_path: Path, name: str):
    directory = checkpoints(name)
    ids = write_tokenizer(directory)(PROMPT, return_tensors="pt").input_ids
    flags = (
        "-m",
        directory,
        "--device",
        "cpu",
        "--max-gpu-mem",
        "40MB",
        "--density",
        "0.5",
        "--raw",
        "--prompt",
        PROMPT,
    )
    numbers = cli("inspect", *flags, "--json", "--output", tmp_path).json
    assert {path.name for path in tmp_path.iterdir()} == PICTURES
    assert json.loads((tmp_path / "prompt.json").read_text()) == numbers
    assert (numbers["unit"], numbers["prompt_tokens"]) == ("experts", ids.shape[1])
    assert min(numbers["densities"]) == 0.25  # what a token needs
    calls = {}
    dense = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    for layer, module in enumerate(dense.model.layers):
        if hasattr(module.mlp, "experts"):
            module.mlp.experts.register_forward_pre_hook(lambda _, args, i=layer: calls.update({i: args[1]}))
    dense(ids)
    assert [layer["layer"] for layer in numbers["layers"]] == sorted(calls)  # a dense first layer is none of them
    for layer in numbers["layers"]:
        expected = calls[layer["layer"]].flatten().bincount(minlength=8) / ids.shape[1]
        torch.testing.assert_close(torch.tensor(layer["used"]), expected.float())
        assert (layer["active"], len(layer["stay"])) == (2, 4)
        assert sum(layer["used"]) == pytest.approx(2)
    shown = cli("inspect", *flags, "-q").out
    assert "experts chosen on the first" in shown
    assert f"{sum(use > 0 for use in numbers['layers'][0]['used'])} of 8" in shown


def test_layers_of_many_experts_show_those_that_are_used_most():
    used = [0.0] * 100 + [0.5, 1.0] + [0.01] * 98
    layer = {"layer": 3, "used": used, "stay": [100, 101], "held_out": None, "kept": [0.5], "planned_kept": 0.9}
    numbers = {
        "model": "m",
        "unit": "experts",
        "measured_in": "bfloat16",
        "prompt_tokens": 4,
        "held_out_tokens": 0,
        "densities": [0.5],
        "kept": [0.5],
        "held_out": None,
        "planned_kept": 0.9,
        "planned_held_out": None,
        "planned_error": None,
        "bits_gained": None,
        "layers": [layer],
        "plan": {
            "density": 0.75,
            "budget": "1 GB",
            "in_words": "bfloat16",
            "levels": ["bfloat16"],
            "counts": [[150]],
            "expected_error": None,
        },
    }
    file = io.TextIOWrapper(io.BytesIO(), encoding="utf-8")
    show_prompt_loss(numbers, file)
    file.seek(0)
    row = next(line for line in file.read().splitlines() if "of 200" in line)
    assert row.split() == ["3", "█▄" + "▁" * 46, "100", "of", "200", "2"]


@pytest.mark.slow
def test_figures_of_a_text(checkpoints, cli, tmp_path: Path, undrawn: list[str]):
    """None asks for fewer experts than a token is sent to."""
    directory, text = checkpoints("qwen3_moe"), tmp_path / "text"
    write_tokenizer(directory)
    text.write_text(f"{PROMPT} " * 9)
    small = ("--windows", 2, "--tokens", 24, "--prompt-tokens", "4,8", "--generate-tokens", "3,6", "--json")
    found = cli(
        "inspect", "-m", directory, "--device", "cpu", "--text", text, "--output", tmp_path / "out", *small
    ).json
    assert {row["density"] for row in found["sparsity"]["rows"]} == {0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9}
    assert found["flocking"]["layers"][0]["share_of_top_half"] > 0.5
    assert undrawn == list(InspectConfig.figures)
