"""The method in plain torch, as examples/griffin_by_hand.py has it, against the package: statistic, neurons, tokens."""

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from fork_server import ForkServer
from transformers import AutoModelForCausalLM, AutoTokenizer

from griffin_offload import GriffinModel
from griffin_offload.demo import PROMPT, demo_directory

EXAMPLE = Path(__file__).parents[2] / "examples" / "griffin_by_hand.py"
NEW_TOKENS = 24


def _by_hand() -> Any:
    spec = importlib.util.spec_from_file_location("griffin_by_hand", EXAMPLE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def prompt() -> torch.Tensor:
    return AutoTokenizer.from_pretrained(demo_directory())(PROMPT, return_tensors="pt").input_ids


@pytest.mark.parametrize("density", [0.25, 0.5, 1.0])
def test_the_engine_does_the_same(prompt: torch.Tensor, density: float):
    plain = AutoModelForCausalLM.from_pretrained(demo_directory(), dtype=torch.float32)
    expected, squared = _by_hand().generate(plain, prompt, density, NEW_TOKENS)
    options = {"dtype": "float32", "quantize": "none", "device": "cpu", "max_gpu_mem": "60MB", "always_stream": True}
    with GriffinModel.from_pretrained(demo_directory(), density=density, ctx_size=160, **options) as model:
        context = model.new_context()
        found = model.generate(prompt, context=context, max_new_tokens=NEW_TOKENS, do_sample=False)
        assert found.tolist() == expected.tolist()
        for index, total in enumerate(squared):
            torch.testing.assert_close(context.squared[index][0], total, rtol=1e-4, atol=1e-7)
            kept = int(density * len(total))
            assert set(model.selected[index].tolist()) == set(total.topk(kept).indices.tolist())


def test_it_prints_the_text(forks: ForkServer):
    run = forks.run("-c", EXAMPLE.read_text())
    assert run.returncode == 0, run.err
    assert run.out.startswith("One day, a little girl named Sue")
    assert "weights wrote this" in run.err


def test_it_is_short():
    code = [line for line in EXAMPLE.read_text().split("def main")[0].splitlines() if line.strip()]
    assert len(code) <= 45
