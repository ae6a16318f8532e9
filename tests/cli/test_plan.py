"""`griffin-offload plan`: the promise in bytes, exit code 3 when nothing fits, and remedies that work."""

import json
import re
from pathlib import Path

import pytest
from marks import mostly_slow
from tiny_models import VOCAB
from transformers import LlamaConfig, LlamaForCausalLM

from griffin_offload.devices.gpu import CudaDevice, XpuDevice
from griffin_offload.devices.registry import MpsDevice
from griffin_offload.units import format_bytes

pytestmark = pytest.mark.usefixtures("measured_once")

KEYS = {
    *("experts", "expert_slots", "host_bytes", "expert_forecast", "tiers"),
    *("fits", "density", "precision", "context_tokens", "prompt_tokens", "batch", "kv_bits"),
    *("peak_prefill_bytes", "peak_decode_bytes", "resident_bytes", "streamed_bytes", "slots", "ff_chunk_tokens"),
    *("budget_bytes", "full_bytes", "embeddings", "parts", "parts_prefill", "parts_decode", "parts_16bit", "remedy"),
    *("device", "assumed", "small_matrices"),
}
BUDGETS = ["2kB", "150kB", "180kB", "210kB", "240kB", "300kB", "340kB", "400kB", "470kB", "600kB", "700kB"]
REMEDY = re.compile(
    r"(--max-gpu-mem) (\S+)|(--ctx-size) (\d+)|(--density) ([\d.]+) or auto|(--offload) (disk)"
    r"|(--quantize) (int8|int4|tiers)"
)


def remedies(text: str) -> list[tuple[str, str]]:
    """Flag and value of each remedy in "try A or B or C"."""
    found = [(match[match.lastindex - 1], match[match.lastindex]) for match in REMEDY.finditer(text)]
    left = REMEDY.sub("", text).replace(" or ", "").strip()
    assert not left, f"a remedy this test does not know: {left}"
    return found


def with_remedy(command: tuple[object, ...], remedy: tuple[str, str]) -> tuple[object, ...]:
    """The command with the remedy's flag in the place of what the user gave."""
    flags = list(command)
    if remedy[0] in flags:
        at = flags.index(remedy[0])
        del flags[at : at + 2]
    return (*flags, *remedy)


@pytest.mark.parametrize(
    ("budget", "flags"),
    [
        *(("580kB", ()), ("800kB", ("--density", "0.5")), ("1.2MB", ("--prompt-tokens", "40"))),
        *(("1GB", ("--offload", "ram")), ("580kB", ("--density", "0.5")), ("800kB", ("--prompt-tokens", "40"))),
        *(("1.2MB", ("--offload", "ram")), ("1GB", ())),
    ],
)
def test_json(cli, llama: Path, budget: str, flags: tuple[str, ...]):
    outcome = cli("plan", "-m", llama, "--max-gpu-mem", budget, "--quantize", "none", "--json", *flags)
    plan = outcome.json
    assert set(plan) == KEYS
    assert outcome.err == ""
    assert outcome.code == (0 if plan["fits"] else 3)
    assert plan["fits"] == (plan["remedy"] is None)
    peaks = {phase: sum(plan[f"parts_{phase}"].values()) for phase in ("prefill", "decode")}
    assert plan["peak_prefill_bytes"] == peaks["prefill"]
    assert plan["peak_decode_bytes"] == peaks["decode"]
    assert sum(plan["parts"].values()) == max(peaks.values())
    assert plan["fits"] == (max(peaks.values()) <= plan["budget_bytes"])
    assert plan["budget_bytes"] == int(float(budget[:-2]) * {"kB": 10**3, "MB": 10**6, "GB": 10**9}[budget[-2:]])
    assert plan["precision"] == "float32"
    assert 256 <= plan["context_tokens"] <= 512
    assert plan["full_bytes"] == 279456  # counted from the checkpoint: 32 bytes are rotary frequencies


def test_kv_cache_in_fewer_bits_by_hand(cli, llama: Path):
    """One byte a number and four for the scale of 8 numbers, instead of 32 bytes for these 8."""
    flags = ("plan", "-m", llama, "--max-gpu-mem", "1GB", "--ctx-size", 512, "--json")
    plans = [cli(*flags, "--kv-bits", bits).json for bits in (16, 8, 4)]
    assert [plan["kv_bits"] for plan in plans] == [16, 8, 4]
    for phase in ("prefill", "decode"):
        sixteen, eight, four = (plan[f"parts_{phase}"]["kv_cache"] for plan in plans)
        assert eight * 32 == sixteen * 12
        # Half a byte a number; eight bytes for the step and the least of 8 values, and of each 32 tokens' keys, of
        # which the last 32 are float32, too.
        assert four * 512 * 32 == sixteen * (512 * (4 + 4 + 8 + 2) // 2 + 32 * 32 // 2)


def test_table(cli, llama: Path):
    flags = ("plan", "-m", llama, "--max-gpu-mem", "850kB", "--quantize", "none")
    outcome, plan = cli(*flags), cli(*flags, "--json").json
    assert (outcome.code, outcome.err) == (0, "")
    rows = {line[:14].strip(): line[14:].split() for line in outcome.out.splitlines()}
    peaks = (format_bytes(plan[f"peak_{phase}_bytes"]) for phase in ("prefill", "decode"))
    assert " ".join(rows["peak"]) == " ".join(peaks)
    assert rows["budget"] == ["850.0", "kB"] * 2
    for name, size_bytes in plan["parts_prefill"].items():
        assert not size_bytes or rows[name.replace("_", " ")][:2] == format_bytes(size_bytes).split()
    assert f"density {plan['density']:.2f}, float32, context {plan['context_tokens']} tokens" in outcome.out
    assert cli(*flags, "-q").out == ""


@pytest.mark.parametrize("device", ["cuda", "xpu", "mps"])
def test_a_device_of_another_machine(cli, llama: Path, monkeypatch: pytest.MonkeyPatch, device: str):
    """Planning is arithmetic: what cannot be asked is assumed and said, or has to be given."""
    for kind in (CudaDevice, XpuDevice, MpsDevice):
        monkeypatch.setattr(kind, "available", lambda: False)
    flags = ("plan", "-m", llama, "--device", device)
    here = cli("plan", "-m", llama, "--device", "cpu", "--max-gpu-mem", "2GB", "--json").json
    outcome, plan = cli(*flags, "--max-gpu-mem", "2GB"), cli(*flags, "--max-gpu-mem", "2GB", "--json").json
    assert (outcome.code, outcome.err, plan["device"]) == (0, "", device)
    runtime = plan["parts"]["overhead"]
    assert runtime == (0 if device == "mps" else 1_100_000_000)
    said = f"no {device} device is here, {format_bytes(runtime)} are assumed for its runtime"
    assert outcome.out.splitlines()[-1] == plan["assumed"] == said
    assert (here["device"], here["assumed"]) == ("cpu", None)
    assert plan["full_bytes"] == here["full_bytes"]
    for size in ((), ("--max-gpu-mem", "auto"), ("--max-gpu-mem", "80%")):
        cli.refuses(2, f"no {device} device is here whose memory could be asked: give --max-gpu-mem", *flags, *size)
    cli.refuses(2, f"device {device} is not available here", "run", "a", "-m", llama, "--device", device)
    verbose = cli(*flags, "--max-gpu-mem", "2GB", "-v", "--json").json
    assert {row["expected_tokens_per_s"] for row in verbose["alternatives"]} == {None}


def test_speed_is_preferred_to_bits_that_fit(cli, llama: Path, tmp_path: Path):
    best, fast = (cli("plan", "-m", llama, "--max-mem", "1GB", *more) for more in ((), ("--prefer", "speed")))
    assert "all neurons resident, nothing streamed, int4" in fast.out
    assert " of the bytes a token that float32 reads, which fits; expected KL about 0.1 instead of 0" in fast.out
    assert "for speed" not in best.out
    flags = ("-m", llama, "--prefer", "speed", "--max-mem", "1GB")
    report = cli("run", "the cat", "-n", 2, *flags, "--json").json
    assert (report["precision"], report["density"]) == ("int4", 1.0)
    for more in (("--quantize", "int8"), ("--density", "0.5"), ("--exact",)):
        cli.refuses(2, "give it without quantize, density and exact", "plan", *flags, *more)
    assert cli("convert", "-m", llama, tmp_path / "copy", "--quantize", "int8").code == 0
    cli.refuses(2, "--prefer speed has nothing to choose", "plan", "-m", tmp_path / "copy", "--prefer", "speed")


@pytest.mark.slow
def test_a_config_for_a_device_of_another_machine(cli, llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """13B's, of which nothing else is here: whatever a run there could be asked for is planned or refused alike."""
    for kind in (CudaDevice, XpuDevice, MpsDevice):
        monkeypatch.setattr(kind, "available", lambda: False)
    config = json.loads((llama / "config.json").read_text())
    sizes = {"hidden_size": 5120, "intermediate_size": 13824, "num_hidden_layers": 40, "dtype": "bfloat16"}
    sizes |= {"num_attention_heads": 40, "num_key_value_heads": 40, "head_dim": 128, "vocab_size": 32000}
    sizes |= {"max_position_embeddings": 4096}
    file = tmp_path / "13b.json"
    file.write_text(json.dumps(config | sizes))
    there = ("plan", "--config", file, "--ctx-size", 2048, "--device")
    whole = cli(*there, "cuda", "--max-gpu-mem", "40GB", "--json").json
    assert (whole["precision"], whole["density"], whole["full_bytes"] > 25e9) == ("bfloat16", 1.0, True)
    mixed = cli(*there, "cuda", "--max-gpu-mem", "12GB", "--json").json
    assert (mixed["density"], list(mixed["tiers"])) == (1.0, ["int8", "int4"])
    assert all(mixed["tiers"].values())
    assert (
        "rounded whenever it is loaded: layers of a copy are of one format"
        in cli(*there, "cuda", "--max-gpu-mem", "12GB").out
    )
    fast = cli(*there, "cuda", "--max-gpu-mem", "12GB", "--prefer", "speed", "--json").json
    assert (fast["precision"], fast["density"]) == ("int4", 1.0)
    assert fast["resident_bytes"] < mixed["resident_bytes"] < 12e9
    assert (
        "for speed: no more bits would fit\n" in cli(*there, "cuda", "--max-gpu-mem", "9.5GB", "--prefer", "speed").out
    )
    assert (
        cli(*there, "mps", "--max-gpu-mem", "16GB", "--json").json["precision"] == "int8"
    )  # int4 was never tried there
    half = cli(*there, "cuda", "--max-gpu-mem", "12GB", "--quantize", "int8", "--json").json
    assert 0 < half["density"] < 1
    for flags in (("--exact",), ("--kv-bits", 8), ("--offload", "ram"), ("--batch-size", 4), ("-q",)):
        assert cli(*there, "cuda", "--max-gpu-mem", "40GB", *flags).code == 0
    assert cli(*there, "cuda", "--max-gpu-mem", "3GB").code == 3
    cli.refuses(
        4, "int4 is not supported on mps: use int8", *there, "mps", "--max-gpu-mem", "16GB", "--quantize", "int4"
    )


def test_the_demo_and_the_variable(cli, llama: Path, monkeypatch: pytest.MonkeyPatch):
    demo = cli("plan", "--json").json
    assert demo["fits"]
    assert demo["full_bytes"] > 10**6
    monkeypatch.setenv("GRIFFIN_OFFLOAD_MODEL", str(llama))
    assert cli("plan", "--json").json["full_bytes"] == 279456


def test_a_plan_is_what_run_does(cli, llama: Path):
    text = "the cat sat on the mat " * 6
    run = cli("run", text, "-n", 8, "-m", llama, "--max-gpu-mem", "320kB", "--quantize", "none", "--json").json
    flags = ("--ctx-size", run["prompt_tokens"] + 8, "--prompt-tokens", run["prompt_tokens"])
    plan = cli("plan", "-m", llama, "--max-gpu-mem", "320kB", "--quantize", "none", "--json", *flags).json
    assert run["density"] == plan["density"] < 1
    assert run["resident_bytes"] == plan["resident_bytes"]
    assert run["prefill_streamed_bytes"] == plan["streamed_bytes"]
    assert run["peak_device_bytes"] <= max(plan["peak_prefill_bytes"], plan["peak_decode_bytes"])


QUICK_FLAGS = [
    (),
    ("--offload", "ram", "--density", "0.6", "--ctx-size", "64"),
]
MORE_FLAGS = [
    ("--density", "0.9"),
    ("--batch-size", "4"),
    ("--quantize", "none", "--density", "0.9"),
    ("--ctx-size", "512"),
    ("--ctx-size", "40"),
    ("--density", "0.3,0.9,1", "--ctx-size", "64"),
    ("--offload", "ram", "--ctx-size", "64"),
    ("--prompt-tokens", "30", "--ctx-size", "200"),
    ("--dtype", "bfloat16"),
    ("--quantize", "none"),
    ("--quantize", "int8"),
]


ALL_FLAGS = [*QUICK_FLAGS, *MORE_FLAGS]


@pytest.mark.parametrize("flags", mostly_slow([(flags,) for flags in ALL_FLAGS], len(QUICK_FLAGS)), ids=" ".join)
def test_remedies_of_plan_work_when_followed(cli, llama: Path, flags: tuple[str, ...]):
    """Of all budgets every third one, others for the next flags."""
    refused = 0
    for budget in BUDGETS[ALL_FLAGS.index(flags) % 3 :: 3]:
        command = ("plan", "-m", llama, "--json", "--max-gpu-mem", budget, *flags)
        outcome = cli(*command)
        assert outcome.code == (0 if outcome.json["fits"] else 3)
        if outcome.json["fits"]:
            continue
        refused += 1
        offered = remedies(outcome.json["remedy"])
        assert offered[0][0] == "--max-gpu-mem"
        for remedy in offered:
            followed = cli(*with_remedy(command, remedy))
            assert followed.code == 0, f"{budget}: {remedy} of {outcome.json['remedy']}: {followed}"
    assert refused


@pytest.mark.slow
def test_density_remedies_are_not_rounded_up(cli, tmp_path: Path):
    """F = 11008, as in Llama 2 7B: one step of the planner is less than what two decimals can say."""
    config = LlamaConfig(
        vocab_size=VOCAB, hidden_size=16, intermediate_size=11008, num_hidden_layers=4, num_attention_heads=2
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    followed = 0
    for budget in range(9000, 11000, 150):
        flags = ("--ctx-size", 64, "--density", 0.98, "--max-gpu-mem", f"{budget}kB")
        command = ("plan", "-m", tmp_path, "--json", *flags)
        for remedy in remedies(cli(*command).json["remedy"]):
            if remedy[0] == "--density":
                followed += 1
                assert cli(*with_remedy(command, remedy)).code == 0, f"{budget} kB: {remedy}"
    assert followed > 6


@pytest.mark.slow
@pytest.mark.parametrize(
    "flags", [(), ("--density", "0.9"), ("--offload", "ram", "--density", "0.5"), ("--ctx-size", "200")], ids=" ".join
)
def test_remedies_of_run_work_when_followed(cli, llama: Path, flags: tuple[str, ...]):
    """What run offers must not contradict what run itself asks for: prompt and answer have to fit the context."""
    refused = 0
    for budget in BUDGETS[:7:3]:
        command = ("run", "the cat sat on the mat " * 6, "-n", 16, "-q", "-m", llama, "--max-gpu-mem", budget, *flags)
        outcome = cli(*command)
        if outcome.code == 0:
            continue
        refused += 1
        assert (outcome.code, outcome.out) == (3, "")
        for remedy in remedies(outcome.err.partition(": try ")[2]):
            followed = cli(*with_remedy(command, remedy))
            assert followed.code == 0, f"{budget}: {remedy} of {outcome.err}: {followed}"
    assert refused


def test_the_smallest_budget_is_exact(cli, llama: Path):
    """The bytes that are said to be needed are enough, one fewer is not."""
    flags = ("plan", "-m", llama, "--ctx-size", 64, "--quantize", "none", "--json", "--max-gpu-mem")
    plan = cli(*flags, 1).json
    needed = max(plan["peak_prefill_bytes"], plan["peak_decode_bytes"])
    assert cli(*flags, needed).code == 0
    assert cli(*flags, needed - 1).code == 3


def test_plan_for_several_requests_is_that_of_a_server(cli, llama: Path):
    """Each has a KV cache for the whole context; `serve --parallel 3` asks for as much."""
    arguments = ("-m", llama, "--device", "cpu", "--max-gpu-mem", "20MB", "--ctx-size", 64, "--json")
    one, three = (json.loads(cli("plan", *arguments, "--parallel", n).out) for n in (1, 3))
    assert three["parts"]["kv_cache"] == 3 * one["parts"]["kv_cache"]
    cli.refuses(2, "--parallel: '0' is no number of requests", "plan", *arguments, "--parallel", 0)
