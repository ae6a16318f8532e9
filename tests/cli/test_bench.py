"""`griffin-offload bench`: rows, ceilings and parts; nothing is judged by how long it took."""

import json
from pathlib import Path

import pytest

from griffin_offload.cli.main import build_parser
from griffin_offload.config import BenchConfig

SIZES = ("--device", "cpu", "-p", "24,8", "-n", 6, "-r", 2)


def _check(row: dict, density: float) -> None:
    for spread in (row["prefill"], row["decode"]):
        assert 0 < spread["least"] <= spread["median"] <= spread["most"]
    assert row["density"] == density
    assert sum(row["prefill_parts"].values()) == pytest.approx(row["prefill"]["median"])
    assert sum(row["decode_parts"].values()) == pytest.approx(row["decode"]["median"])
    assert row["prefill_share"] == pytest.approx(row["prefill_ceiling_s"] / row["prefill"]["median"])
    assert row["decode_share"] == pytest.approx(row["decode_ceiling_s"] / row["decode"]["median"])
    assert (row["streamed_bytes"] > 0) == (density < 1)
    assert 0 < row["peak_bytes"] <= row["budget_bytes"] == 10**9
    assert (row["decode_streamed_bytes"], row["graphs"]) == (0, None)


@pytest.mark.parametrize("density", [0.5, 1.0])
def test_a_mixture_of_experts(cli, checkpoints, density: float):
    """Bytes while decoding are those of missing experts."""
    flags = ("--max-mem", "1GB", "-d", density, "-o", "json", "--quantize", "none", *SIZES)
    rows = cli("bench", "-m", checkpoints("qwen3_moe"), *flags).json["rows"]
    assert [row["density"] for row in rows] == [density] * 2
    for row in rows:
        assert (row["streamed_bytes"] > 0) == (density < 1)
        assert (row["decode_streamed_bytes"] > 0) == (density < 1)
        assert 0 < row["decode_ceiling_s"] < row["decode"]["median"]


def test_json(cli, llama: Path, lengths):
    outcome = cli("bench", "-m", llama, "--max-mem", "1GB", "-d", "1,0.5", "-o", "json", "--quantize", "none", *SIZES)
    assert outcome.code == 0, outcome
    rows = outcome.json["rows"]
    assert [(r["density"], r["prompt_tokens"], r["generate_tokens"], r["repeats"]) for r in rows] == [
        (density, p, 6, 2) for density in (1.0, 0.5) for p in (24, 8)
    ]
    assert lengths == [(24, 4), (24, 6), (24, 6), (8, 4), (8, 6), (8, 6)] * 2
    for row in rows:
        _check(row, row["density"])
        assert row["cache"] == "warm"
    ceilings = outcome.json["ceilings"]
    assert set(ceilings["gemm_flops_per_s"]) == {"8", "24"}
    assert ceilings["gemv_bytes_per_s"] > 0


def test_the_table_ends_in_json(cli, llama: Path):
    outcome = cli("bench", "-m", llama, "--max-mem", "1GB", "-d", "0.5", "--cold", *SIZES)
    assert outcome.code == 0, outcome
    *table, last = outcome.out.splitlines()
    assert json.loads(last)["rows"][0]["cache"] == "cold"
    assert any(line.startswith("one row times matrices") for line in table)
    tests = [line.split()[3] for line in table if line.startswith("0.50")]
    assert tests == ["pp24", "tg6", "pp8", "tg6"]


def test_what_does_not_fit_is_said(cli):
    outcome = cli("bench", "--max-mem", "6MB", "-d", "1,0.5", "--quantize", "none", *SIZES)
    assert outcome.code == 0, outcome
    assert "density 1.0: needs" in outcome.out
    assert len(json.loads(outcome.out.splitlines()[-1])["rows"]) == 2
    assert cli("bench", "--max-mem", "100kB", "-d", "1", *SIZES).code == 3


def test_bad_input(cli):
    cli.refuses(2, "at least 2", "bench", "--device", "cpu", "-n", 1)
    cli.refuses(2, "1 or more", "bench", "--device", "cpu", "-r", 0)
    cli.refuses(2, "cannot read the densities", "bench", "--device", "cpu", "-d", "half")
    cli.refuses(2, "more than the model's context", "bench", "--device", "cpu", "-p", 100000)


def test_defaults_are_those_of_the_dataclass():
    parsed, config = build_parser().parse_args(["bench"]), BenchConfig()
    assert (parsed.prompt_tokens, parsed.generate_tokens) == ([config.prompt_tokens], [config.generate_tokens])
    assert parsed.repeats == config.repeats
