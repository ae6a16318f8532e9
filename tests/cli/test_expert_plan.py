"""What a plan says of a mixture of experts: against parameters counted one by one, and a drawn routing."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from tiny_models import MIXTURES

from griffin_offload.blocks.layouts import build_on_meta
from griffin_offload.blocks.model_shape import model_shape
from griffin_offload.kv_cache.workload import KV_SLACK_TOKENS
from griffin_offload.planner.experts import ASSUMED_SKEW, forecast, hit_rate
from griffin_offload.planner.request import PlanRequest
from griffin_offload.planner.solve import best_plan

GPT_OSS_20B: dict[str, Any] = {
    "num_hidden_layers": 24,
    "num_local_experts": 32,
    "num_experts_per_tok": 4,
    "hidden_size": 2880,
    "intermediate_size": 2880,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "vocab_size": 201088,
}
BUDGET = 16 * 10**9


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe", "gpt_oss", "deepseek_v3"])
def test_parameters_are_counted(name: str):
    model = MIXTURES[name].build()
    shape = model_shape(build_on_meta(model.config, torch.float32))
    plan = best_plan(shape, PlanRequest(10**9, ctx_tokens=64, density=0.5), 64)
    found = forecast(shape, plan)
    experts = [m for n, m in model.named_modules() if n.endswith(".experts")]
    each = [sum(p[0].numel() for p in module.parameters()) for module in experts]
    total = sum(parameter.numel() for parameter in model.parameters())
    buffers = sum(buffer.numel() for buffer in model.buffers())  # counted with what is beside matrices
    assert found.parameters == pytest.approx(total, abs=buffers + 1)
    assert found.parameters - found.active_parameters == sum(6 * size for size in each)
    assert found.parameters - found.resident_parameters == sum(4 * size for size in each)


def test_gpt_oss_20b_is_what_its_makers_say():
    """20.9 billion parameters, 3.6 billion for a token, embeddings included."""
    shape = model_shape(build_on_meta(hf.GptOssConfig(**GPT_OSS_20B), torch.bfloat16))
    plan = best_plan(shape, PlanRequest(BUDGET, ctx_tokens=4096, prompt_tokens=256), 4096)
    found = forecast(shape, plan, stored_share=4.25 / 16)
    assert found.parameters == pytest.approx(20.9e9, rel=0.01)
    assert found.active_parameters == pytest.approx(4.2e9, rel=0.02)  # 3.6 and the embeddings, of which it reads a row
    kept = plan.kept[0]
    assert plan.fits
    assert 4 < kept < 32
    assert found.expected_hit_rate == pytest.approx(hit_rate(kept, 32))
    expert = 3 * 2880 * 2880 * 4.25 / 8
    expected = 24 * 4 * (1 - found.expected_hit_rate) * expert
    assert found.fetched_bytes_per_token == pytest.approx(expected, rel=0.01)
    assert found.read_bytes_per_token < plan.decoded_bytes


def test_llama_4_scout_is_what_its_makers_say():
    """17 billion parameters for a token of 109 billion, of which the tower has one; 3 of 4 layers keep a chunk."""
    shape = model_shape(build_on_meta(hf.Llama4Config(), torch.bfloat16))
    tokens = 3 * 8192
    plan = best_plan(shape, PlanRequest(64 * 10**9, ctx_tokens=tokens, prompt_tokens=256, density=0.25), tokens)
    found = forecast(shape, plan)
    assert found.parameters == pytest.approx(108e9, rel=0.01)
    assert found.active_parameters == pytest.approx(17.2e9, rel=0.01)
    assert [layer.window for layer in shape.layers] == [8192, 8192, 8192, None] * 12
    kept = 12 * (3 * (8192 + KV_SLACK_TOKENS) + tokens)
    assert plan.decode_parts["kv_cache"] == pytest.approx(kept * 2 * 8 * 128 * 2, rel=0.01)


def test_the_hit_rate_is_that_of_the_assumed_law():
    generator = torch.Generator().manual_seed(0)
    weights = torch.arange(1, 65, dtype=torch.float64) ** -ASSUMED_SKEW
    drawn = weights.multinomial(200_000, replacement=True, generator=generator)
    for kept in (8, 16, 48):
        assert hit_rate(kept, 64) == pytest.approx(float((drawn < kept).double().mean()), abs=0.005)
    assert hit_rate(64, 64) == 1


def test_it_is_printed(cli, tmp_path: Path):
    hf.GptOssConfig(**GPT_OSS_20B).save_pretrained(tmp_path)
    config = tmp_path / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"dtype": "bfloat16"}))
    flags = ("plan", "--config", config, "--device", "cpu", "--max-gpu-mem", "12GB", "--ctx-size", "1024")
    said = cli(*flags).out
    assert "20.9 billion parameters, 4.19 for a token" in said
    assert "assumed: routing by Zipf's law, exponent 0.8" in said
    found = cli(*flags, "--json").json
    assert found["expert_forecast"]["parameters"] == pytest.approx(20.9e9, rel=0.01)
    assert 0 < found["expert_forecast"]["expected_hit_rate"] < 1
    assert found["expert_slots"] > 0
