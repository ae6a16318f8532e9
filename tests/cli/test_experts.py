"""Mixtures of experts on the command line: what is shown, and what is refused."""

from pathlib import Path

import pytest
from packed_experts import write_mxfp4
from tiny_models import CHAT_TEMPLATE, write_checkpoint, write_tokenizer

from griffin_offload.units import format_bytes


@pytest.fixture
def mixture(tmp_path: Path) -> Path:
    directory = write_checkpoint("mixtral", tmp_path / "model", shards=1)
    write_tokenizer(directory)
    return directory


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text"
    path.write_text("the cat sat on the mat and thought of another river " * 40)
    return path


def test_plan_and_run(cli, mixture: Path):
    flags = ("-m", mixture, "--device", "cpu", "--density", "0.5", "--ctx-size", "64")
    assert "4 of 8 experts a layer" in cli("plan", *flags).out
    assert cli("plan", *flags, "--json").json["experts"] == [4, 8]
    fetched = cli("run", "the cat", *flags, "-n", "8", "--raw", "--json").json
    needed = fetched["decode_streamed_bytes"] - fetched["experts"]["wrong_bytes"]
    assert fetched["experts"]["misses"] * 3 * 96 * 32 * 4 == needed
    routed = cli("run", "the cat", *flags, "-n", "8", "--raw", "--json", "--missing-experts", "route").json
    assert routed["decode_streamed_bytes"] == 0
    assert 0 < routed["experts"]["redirected_share"] < 1


def test_experts_that_the_cpu_computes(cli, mixture: Path):
    """A plan for another machine says what travels; here, where the CPU is the device, every command refuses."""
    sizes = ("-m", mixture, "--missing-experts", "host")
    flags = (*sizes, "--density", "0.5", "--ctx-size", "64")
    plan = ("plan", *flags, "--device", "cuda", "--max-gpu-mem", "3GB", "--quantize", "none")
    shown, found = cli(*plan).out, cli(*plan, "--json").json
    expert_bytes, forecast = 3 * 96 * 32 * 4, found["expert_forecast"]
    assert found["host_bytes"] == 4 * expert_bytes  # of two that a token is sent to, and two that the next one may be
    assert found["parts_decode"]["slots"] == 0 < found["parts_prefill"]["slots"]
    room = format_bytes(found["host_bytes"])
    assert f"the CPU computes missing experts, in at most {room} beside the files" in shown
    assert "multiplied by the CPU for each token" in shown
    missed = 3 * 2 * (1 - forecast["expected_hit_rate"])
    assert forecast["host_bytes_per_token"] == pytest.approx(missed * expert_bytes)
    assert forecast["fetched_bytes_per_token"] == 0
    for command in (("run", "the cat", *sizes), ("chat", *sizes), ("serve", *sizes), ("bench", *sizes)):
        cli.refuses(2, r"missing_experts='host' .* take missing_experts='fetch'", *command, "--device", "cpu")


def test_drafts_and_saved_prompts(cli, mixture: Path, tmp_path: Path):
    flags = ("-m", mixture, "--device", "cpu", "--density", "0.5", "--ctx-size", "64", "-n", "8", "--raw", "--json")
    fetched = cli("run", "the cat", *flags).json
    exact = cli("run", "the cat", *flags, "--exact").json
    assert exact["text"] == fetched["text"]
    assert exact["drafting"]["passes"] > 0 == exact["experts"]["misses"]
    saved = [cli("run", "the cat", *flags, "--prompt-cache", tmp_path / "saved").json for _ in range(2)]
    assert [run["text"] for run in saved] == [fetched["text"]] * 2
    assert saved[1]["prefill_streamed_bytes"] == 0 < saved[0]["prefill_streamed_bytes"]
    cli.refuses(2, "missing_experts='route'", "run", "the cat", *flags, "--refresh", "4")


@pytest.mark.slow
def test_a_conversation(cli, mixture: Path):
    """Every turn of one that is fetched is what the full model answers, whatever is resident."""
    write_tokenizer(mixture, CHAT_TEMPLATE)
    flags = ("-m", mixture, "--device", "cpu", "--ctx-size", "160", "-n", "6", "--temperature", "0", "-q")
    talk = "the cat\nthe dog\nthe river\n"
    whole = cli("chat", *flags, "--density", "1", stdin=talk).out
    for more in ((), ("--exact",)):
        assert cli("chat", *flags, "--density", "0.25", *more, stdin=talk).out == whole
    assert cli("chat", *flags, "--density", "0.25", "--missing-experts", "route", stdin=talk).code == 0


def test_perplexity(cli, mixture: Path, text: Path):
    few = ("--prompt-tokens", "16", "--generate-tokens", "16", "--windows", "2", "--json")
    rows = cli("eval", "ppl", "-m", mixture, "--text", text, "--selection", "topk,random,magnitude", *few).json
    assert {row["density"] for row in rows} == {0.75, 0.5, 0.25}
    by_topk = [row for row in rows if row["selection"] == "topk"]
    assert all(0 < row["activation_kept"] < 1 and row["kl"] > 0 for row in by_topk)
    cli.refuses(2, "keeps 1 of the 8 experts", "eval", "ppl", "-m", mixture, "--text", text, "--density", "0.2", *few)


def test_plan_of_a_packed_config_alone(cli, tmp_path: Path):
    packed = write_mxfp4(tmp_path / "model")
    flags = ("--device", "cpu", "--max-gpu-mem", "40MB", "--ctx-size", "64", "--density", "0.5", "--quantize", "int8")
    alone = cli("plan", "--config", packed / "config.json", *flags, "--json").json
    whole = cli("plan", "-m", packed, *flags, "--json").json
    assert alone["experts"] == whole["experts"] == [4, 8]
    assert alone["resident_bytes"] == whole["resident_bytes"]
