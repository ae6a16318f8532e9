"""`griffin-offload eval latency`: what it runs and reports; how long it takes is judged nowhere."""

from pathlib import Path

import pytest

from griffin_offload.cli.main import build_parser
from griffin_offload.errors import GriffinError
from griffin_offload.evaluation import speed
from griffin_offload.evaluation.config import LatencyConfig

COMMON = ("--device", "cpu", "--sizes", "24+6,12+8", "-r", 2, "--density", ".5,.25", "--selection", "magnitude,topk")


def test_every_variant_at_every_size(cli, llama: Path, lengths):
    outcome = cli("eval", "latency", "-m", llama, "--max-mem", "1GB", "--json", *COMMON)
    assert outcome.code == 0, outcome
    rows = outcome.json
    variants = [("topk", 1.0), ("magnitude", 0.5), ("magnitude", 0.25), ("topk", 0.5), ("topk", 0.25)]
    sizes = [(24, 6), (12, 8)]
    found = [(r["selection"], r["density"], r["prompt_tokens"], r["generate_tokens"]) for r in rows]
    assert found == [(*variant, *size) for variant in variants for size in sizes]
    assert lengths == [(24, 4), (24, 6), (24, 6), (12, 4), (12, 8), (12, 8)] * 5
    for row in rows:
        assert row["least_s"] <= row["total_s"] <= row["most_s"]
        assert row["total_s"] == pytest.approx(row["prefill_s"] + row["decode_s"], rel=0.5)
        assert (row["streamed_bytes"] > 0) == (row["density"] < 1)


@pytest.mark.slow
def test_what_does_not_fit_is_said_and_the_rest_measured(cli):
    outcome = cli("eval", "latency", "--max-mem", "6MB", "--json", *COMMON)
    assert outcome.code == 0, outcome
    refused = [row for row in outcome.json if "does_not_fit" in row]
    assert [(row["density"], row["prompt_tokens"]) for row in refused] == [(1.0, 24), (1.0, 12)]
    assert "needs" in refused[0]["does_not_fit"]
    table = cli("eval", "latency", "--max-mem", "6MB", *COMMON, "-r", 1, "--density", 0.25, "--selection", "topk")
    assert table.out.splitlines()[0].split()[:4] == ["neurons", "precision", "prompt", "generate"]
    assert table.out.splitlines()[-1].startswith("full 12+8 does not fit: needs")
    assert cli("eval", "latency", "--max-mem", "100kB", *COMMON).code == 3


def test_a_long_answer_that_does_not_fit_leaves_the_short_one(cli):
    outcome = cli("eval", "latency", "--max-mem", "7.5MB", "--json", *COMMON, "--sizes", "24+6,24+900", "--density", 1)
    found = [(row["density"], row["generate_tokens"], "does_not_fit" in row) for row in outcome.json]
    assert found == [(1.0, 6, False), (1.0, 900, True)]  # at density 1 both selections are one


def test_what_was_measured_is_printed_when_something_stops_the_rest(cli, llama: Path, monkeypatch: pytest.MonkeyPatch):
    time_generation, calls = speed.time_generation, []

    def failing(*arguments):
        calls.append(arguments)
        if len(calls) == 3:
            raise GriffinError("the disk is gone")
        return time_generation(*arguments)

    monkeypatch.setattr(speed, "time_generation", failing)
    outcome = cli("eval", "latency", "-m", llama, "--max-mem", "1GB", "--json", *COMMON)
    assert (outcome.code, outcome.err) == (1, "griffin-offload: error: the disk is gone\n")
    assert [(row["density"], row["prompt_tokens"]) for row in outcome.json] == [(1, 24), (1, 12)]


def test_bad_input(cli, llama: Path, tmp_path: Path):
    def refuses(words: str, *options: object) -> None:
        cli.refuses(2, words, "eval", "latency", "-m", llama, "--device", "cpu", *options)

    refuses("cannot read the sizes", "--sizes", "128")
    refuses("at least 2 are generated", "--sizes", "8+1")
    refuses("more than the model's context", "--sizes", "100000+2")
    refuses("1 or more", "--repeats", 0)
    short = tmp_path / "short.txt"
    short.write_text("the cat")
    refuses("the text has 2 tokens", "--text", short, "--sizes", "20+4")


def test_defaults_are_the_papers():
    parsed, config = build_parser().parse_args(["eval", "latency"]), LatencyConfig()
    assert parsed.sizes == "2048+128,2048+2048"
    assert parsed.selection == ",".join(config.selections)
    assert parsed.repeats == config.repeats
