"""Plans of exact mode: what it keeps between tokens is counted, and the precision that it needs is said."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from griffin_offload.offload.weight_store import DIRECT_SLACK_BYTES

pytestmark = pytest.mark.usefixtures("measured_once")

HIDDEN, NEURONS, LAYERS, VOCAB = 5120, 13824, 40, 32000
CONFIG: dict[str, Any] = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "torch_dtype": "bfloat16",
    "hidden_size": HIDDEN,
    "intermediate_size": NEURONS,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 40,
    "num_key_value_heads": 40,
    "vocab_size": VOCAB,
    "max_position_embeddings": 4096,
}
CONVERTED = {"method": "griffin-offload", "version": 1, "precision": "int8", "tables": "none", "source": "0" * 32}


@pytest.fixture
def plan(cli, tmp_path: Path) -> Callable[..., Any]:
    def run(*flags: object, **config: Any) -> Any:
        path = tmp_path / "config.json"
        path.write_text(json.dumps(CONFIG | config))
        return cli("plan", "--config", path, "--device", "cpu", "--ctx-size", 2048, *flags)

    return run


def test_13b_in_16_bit_does_not_fit_12_gb_and_its_int8_copy_does(plan):
    outcome = plan("--exact", "--max-gpu-mem", "12GB")
    assert outcome.code == 3
    assert outcome.err.rstrip().endswith("or a copy converted to int8")
    converted = plan("--exact", "--max-gpu-mem", "12GB", "--json", quantization_config=CONVERTED)
    assert converted.code == 0, converted.err
    assert (converted.json["precision"], converted.json["density"]) == ("int4", 1.0)  # of neurons, which draft
    assert converted.json["parts"]["attention"] > 40 * 4 * 5120 * 5120  # as it is stored
    assert converted.json["peak_decode_bytes"] <= 12e9
    rows = plan("--exact", "--max-gpu-mem", "12GB", "-v", "--json", quantization_config=CONVERTED).json["alternatives"]
    assert {row["expected_kl"] for row in rows} == {0.0}  # the answer is the full model's
    assert "rounded" not in plan("--exact", "--max-gpu-mem", "12GB", quantization_config=CONVERTED).out


def test_what_exact_mode_keeps_between_tokens(plan):
    def parts(*flags: object) -> dict[str, int]:
        return plan("--max-gpu-mem", "30GB", "--density", 0.5, "--quantize", "none", "--json", *flags).json[
            "parts_decode"
        ]

    without, few, many = parts(), parts("--exact", "--draft-tokens", 16), parts("--exact", "--draft-tokens", 28)
    table = 4 * LAYERS * NEURONS
    assert without["slots"] == without["statistic"] == 0
    assert few["slots"] == many["slots"] == 2 * (3 * HIDDEN * NEURONS * 2 + DIRECT_SLACK_BYTES)
    assert (few["statistic"], many["statistic"]) == ((1 + 17) * table, (1 + 29) * table)
    assert many["logits"] - few["logits"] == 12 * VOCAB * (2 + 4)
    assert without["workspace"] < few["workspace"] < many["workspace"]


def test_what_refresh_keeps_between_tokens(plan):
    flags = ("--max-gpu-mem", "30GB", "--density", 0.5, "--quantize", "none", "--json", "--refresh")
    without, every = (plan(*flags, n).json["parts_decode"] for n in ("turn", 32))
    assert (without["slots"], without["statistic"]) == (0, 0)
    assert every["slots"] > 0
    assert every["statistic"] == 4 * LAYERS * NEURONS
    assert every["logits"] == without["logits"]


def test_contradictions_are_refused(plan):
    for words, *flags in (
        ("drafts in none or int8 or int4 here, not in int3", "--exact", "--quantize", "int3"),
        ("leave out kv_bits=8", "--exact", "--kv-bits", 8),
        ("from 1 to 31", "--exact", "--draft-tokens", 32),
        ("add --exact", "--draft-tokens", 3),
        ("every verifying pass refreshes already", "--exact", "--refresh", 8),
        ("turn, never or a number", "--refresh", "sometimes"),
    ):
        outcome = plan(*flags)
        assert (outcome.code, outcome.out) == (2, "")
        assert words in outcome.err


def test_a_window_takes_few_tokens_back(plan):
    windows = {"model_type": "mistral", "architectures": ["MistralForCausalLM"], "sliding_window": 512}
    assert plan("--max-gpu-mem", "30GB", "--refresh", 32, **windows).code == 0
    outcome = plan("--max-gpu-mem", "30GB", "--refresh", 33, **windows)
    assert outcome.code == 2
    assert "at most 32 tokens can be taken back" in outcome.err


def test_12_to_14b_in_6_gb_at_4096_tokens(plan):
    """With as many KV heads as queries the cache decides: in 8 bits 13B is refused, with the remedy; in 4 it fits. Of
    14B with 8 KV heads it leaves room for more neurons. Bytes by hand: codes of half a byte, for 32 numbers a step and
    a least one of two bytes each, and the last 32 tokens' keys as they come."""
    flags = ("--max-gpu-mem", "6GB", "--ctx-size", 4096)
    refused = plan(*flags)
    assert refused.code == 3
    assert refused.err.rstrip().endswith("or --ctx-size 2048 or --kv-bits 4")
    fits = plan(*flags, "--kv-bits", 4, "--json")
    assert fits.code == 0, fits.err
    token = 2 * 5120 * (1 / 2 + 2 * 2 / 32)
    assert fits.json["parts_decode"]["kv_cache"] == 40 * (4096 * token + 32 * 5120 * 2)
    assert max(fits.json["peak_prefill_bytes"], fits.json["peak_decode_bytes"]) <= 6e9
    assert fits.json["kv_bits"] == 4
    qwen = {
        **{"model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"], "intermediate_size": 17408},
        **{"num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151936},
    }
    eight, four = (plan(*flags, "--kv-bits", bits, "--json", **qwen).json for bits in (8, 4))
    assert (eight["kv_bits"], four["kv_bits"]) == (8, 4)
    assert four["density"] > eight["density"] > 0.5
