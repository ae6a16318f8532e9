"""Every flag, prompt and budget that cannot be used: one line, exit code 2 or 3, nothing computed."""

import re
from functools import partial
from pathlib import Path

import pytest
import torch

from griffin_offload import DoesNotFit, GriffinModel
from griffin_offload.devices import memory
from griffin_offload.devices.registry import CpuDevice

PLAN_FLAGS = [
    ("--max-gpu-mem=12XB", "cannot read the size '12XB'"),
    ("--max-gpu-mem=", "cannot read the size ''"),
    ("--max-gpu-mem=-3GB", "cannot read the size '-3GB'"),
    ("--max-gpu-mem=0", "more than nothing"),
    ("--max-gpu-mem=0.4", "more than nothing"),
    ("--max-gpu-mem=0%", "more than nothing"),
    ("--max-gpu-mem=101%", "cannot read the size"),
    ("--max-gpu-mem=nan", "cannot read the size"),
    (f"--max-gpu-mem={'9' * 300}TB", "size"),
    ("--max-cpu-mem=lots", "cannot read the size 'lots'"),
    ("--density=-0.1", "density is -0.1"),
    ("--density=1.5", "density is 1.5"),
    ("--density=nan", "density is nan"),
    ("--density=abc", "cannot read the density 'abc'"),
    ("--density=", "cannot read the density ''"),
    ("--density=0.5,,0.5", "cannot read the density"),
    ("--density=0.5,0.5", "2 densities for 3 layers"),
    ("--density=0.5,0.5,1.5", "density is 1.5"),
    ("--ctx-size=0", "ctx_size is 0"),
    ("--ctx-size=-4", "ctx_size is -4"),
    ("--ctx-size=1", "ctx_size is 1"),
    ("--ctx-size=513", "513 tokens is more than the model's 512"),
]
RUN_FLAGS = [
    ("--seed=99999999999999999999", "seed"),
    ("--max-new-tokens=0", "--max-new-tokens is 0"),
    ("-n-3", "--max-new-tokens is -3"),
    ("--max-new-tokens=511", "513 tokens is more than the model's 512"),
    ("--temperature=-0.1", "--temperature is -0.1"),
    ("--temperature=nan", "--temperature is nan"),
    ("--top-p=0", "--top-p is 0"),
    ("--top-p=1.1", "--top-p is 1.1"),
    ("--top-p=nan", "--top-p is nan"),
    ("--top-k=0", "--top-k is 0"),
    ("--min-p=-0.1", "--min-p is -0.1"),
    ("--min-p=1.1", "--min-p is 1.1"),
    ("--min-p=nan", "--min-p is nan"),
    ("--repetition-penalty=0", "--repetition-penalty is 0"),
    ("--repetition-penalty=nan", "--repetition-penalty is nan"),
    ("--repetition-penalty=inf", "--repetition-penalty is inf"),
    ("--stop=", "--stop is empty"),
    ("--stop=caf\udce9", "--stop is not UTF-8"),
    ("--system=be brief", "chat template"),
]
# Values that no option can take: what is said names the option, the value and the remedy.
MALFORMED = [
    (("--max-gpu-mem", "-5GB"), r"cannot read the size '-5GB': write for example 12GB"),
    (("--max-gpu-mem", "-.5GB"), r"cannot read the size '-.5GB': write for example 12GB"),
    (("--max-gpu-mem", "-5"), r"cannot read the size '-5': write for example 12GB"),
    (("--max-gpu-mem",), r"--max-gpu-mem/--max-mem: expected one argument: write --option=VALUE"),
    (("--max-gpu-mem", "-lots"), r"--max-gpu-mem/--max-mem: expected one argument: write --option=VALUE"),
    (("--max-cpu-mem", "-5GB"), r"cannot read the size '-5GB': write for example 12GB"),
    (("--density", "-50%"), r"cannot read the density '-50%': auto, 0.5"),
    (("--ctx-size", "many"), r"--ctx-size: 'many' is no whole number: write for example 8"),
    (("--ctx-size", "-4k"), r"--ctx-size: '-4k' is no whole number: write for example 8"),
    (("--bits", "-3b"), r"--bits: '-3b' is no number of bits: auto, or for example 3.5"),
    (("--device", "tpu"), r"--device: invalid choice: 'tpu' \(choose from .*cpu"),
    (("--dtype", "int8"), r"--dtype: invalid choice: 'int8' \(choose from .*float32"),
    (("--kv-bits", "5"), r"--kv-bits: invalid choice: 5 \(choose from .*16"),
    (("--kv-bits", "-8b"), r"--kv-bits: invalid choice: '-8b' \(choose from .*16"),
    (("--offload", "tape"), r"--offload: invalid choice: 'tape' \(choose from .*disk"),
]
MALFORMED_OF_RUN = [
    (("--seed", "x"), r"--seed: 'x' is no whole number: write for example 8"),
    (("--seed", "1.5"), r"--seed: '1.5' is no whole number: write for example 8"),
    (("-n", "-3x"), r"-n/--max-new-tokens: '-3x' is no whole number: write for example 8"),
    (("--temperature", "-1e"), r"--temperature: '-1e' is no number: write for example 0.5"),
    (("--temperature", "-inf"), r"--temperature: expected one argument: write --option=VALUE"),
    (("--temperature=-inf",), r"--temperature is -inf: 0 \(greedy\) or more"),
    (("--threads", "a\nb"), r"--threads: 'a\\nb' is no whole number"),
    (("--selection", "best"), r"--selection: invalid choice: 'best' \(choose from .*top"),
    (("--refresh", "-2x"), r"refresh is '-2x'"),
    (("--quiet", "--verbose"), r"-v/--verbose: not allowed with argument -q/--quiet"),
]


@pytest.mark.parametrize(("flag", "words"), PLAN_FLAGS)
def test_flags_of_both_commands(cli, llama: Path, flag: str, words: str):
    cli.refuses(2, words, "plan", "-m", llama, flag)
    cli.refuses(2, words, "run", "the cat", "-n", 4, "-m", llama, flag)


@pytest.mark.parametrize(("flag", "words"), RUN_FLAGS)
def test_flags_of_run(cli, llama: Path, flag: str, words: str):
    cli.refuses(2, words, "run", "the cat", "-m", llama, flag)


@pytest.mark.parametrize(
    ("flag", "words"), [("--prompt-tokens=0", "prompt_tokens is 0"), ("--batch-size=-1", "batch_size is -1")]
)
def test_flags_of_plan(cli, llama: Path, flag: str, words: str):
    cli.refuses(2, words, "plan", "-m", llama, flag)


@pytest.mark.parametrize(("flags", "words"), MALFORMED)
def test_values_that_no_option_of_both_commands_takes(cli, llama: Path, flags: tuple[str, ...], words: str):
    cli.refuses(2, words, "run", "the cat", "-m", llama, *flags)
    cli.refuses(2, words, "plan", "-m", llama, *flags)


@pytest.mark.parametrize(("flags", "words"), MALFORMED_OF_RUN)
def test_values_that_no_option_of_run_takes(cli, llama: Path, flags: tuple[str, ...], words: str):
    cli.refuses(2, words, "run", "the cat", "-m", llama, *flags)


@pytest.mark.parametrize("flag", ["--no-such-flag", "-5GB"])
def test_what_is_no_option_is_refused_with_the_usage(cli, llama: Path, flag: str):
    cli.refuses_usage("unrecognized arguments", "run", "the cat", "-m", llama, flag)
    cli.refuses_usage("unrecognized arguments", "plan", "-m", llama, flag)


def test_no_command(cli):
    cli.refuses_usage("COMMAND")
    cli.refuses_usage("invalid choice", "dance")


def test_a_bad_flag_is_found_before_the_model_is_looked_for(cli):
    cli.refuses(2, "density", "run", "x", "-m", "/absent", "--density", "2")
    cli.refuses(2, "--max-new-tokens", "run", "x", "-m", "/absent", "-n", "0")


def test_greedy_and_sampling_flags_contradict_each_other(cli, llama: Path):
    cli.refuses(2, "greedy", "run", "x", "-m", llama, "--temperature", 0, "--top-k", 3)
    cli.refuses(2, "greedy", "run", "x", "-m", llama, "--temperature", 0, "--top-p", 0.5)
    cli.refuses(2, "greedy", "run", "x", "-m", llama, "--temperature", 0, "--min-p", 0.5)


@pytest.mark.parametrize("prompt", ["", " \n\t"])
def test_blank_prompts(cli, llama: Path, tmp_path: Path, prompt: str):
    file = tmp_path / "prompt"
    file.write_text(prompt)
    cli.refuses(2, "prompt is empty", "run", prompt, "-m", llama)
    cli.refuses(2, "prompt is empty", "run", "-", "-m", llama, stdin=prompt)
    cli.refuses(2, "prompt is empty", "run", "--prompt-file", file, "-m", llama)


def test_two_prompts_and_none(cli, llama: Path, tmp_path: Path):
    cli.refuses(2, "two prompts", "run", "x", "--prompt-file", tmp_path / "absent", "-m", llama)
    cli.refuses(2, "two prompts", "run", "-", "--prompt-file", tmp_path / "absent", "-m", llama, stdin="x")
    cli.refuses(2, "no prompt", "run", "-m", llama)
    cli.refuses_usage("unrecognized", "run", "one", "two", "-m", llama)


def test_prompts_that_cannot_be_read(cli, llama: Path, tmp_path: Path):
    binary = tmp_path / "binary"
    binary.write_bytes(b"\xff\xfe\x00")
    for file in (tmp_path / "absent", tmp_path, binary):
        cli.refuses(2, "cannot read the prompt", "run", "--prompt-file", file, "-m", llama)


@pytest.mark.parametrize("stdin", [None, b"caf\xe9"])
def test_prompts_that_are_not_utf8(cli, llama: Path, stdin: bytes | None):
    """From a shell, bytes that are not UTF-8 arrive as lone surrogates in the argument."""
    cli.refuses(2, "prompt", "run", "-" if stdin else "caf\udce9", "-m", llama, stdin=stdin)


def test_prompts_longer_than_the_context(cli, llama: Path):
    long = "the cat " * 300
    cli.refuses(2, "601 tokens and 4 new ones do not fit", "run", long, "-n", 4, "--ctx-size", 500, "-m", llama)
    cli.refuses(2, "605 tokens is more than the model's 512", "run", long, "-n", 4, "-m", llama)
    cli.refuses(2, "2 tokens and 128 new", "run", "the cat", "--ctx-size", 64, "-m", llama)


def test_system_message_needs_a_template(cli, chat: Path):
    cli.refuses(2, "--raw turned it off", "run", "hello", "--system", "be brief", "--raw", "-m", chat)


def test_one_budget_on_the_cpu(cli, llama: Path):
    flags = ("--max-gpu-mem", "1GB", "--max-cpu-mem", "1GB", "--device", "cpu", "-m", llama)
    cli.refuses(2, "one budget", "plan", *flags)
    cli.refuses(2, "one budget", "run", "the cat", *flags)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_device_that_is_not_there(cli, llama: Path):
    cli.refuses(2, "device cuda is not available", "run", "the cat", "--device", "cuda", "-m", llama)
    cli.refuses(2, "no cuda device is here.*give --max-gpu-mem as a size", "plan", "--device", "cuda", "-m", llama)


@pytest.mark.parametrize("budget", ["1", "1kB", "100kB"])
def test_budget_below_the_minimum(cli, llama: Path, budget: str):
    words = r"needs [\d.]+ kB, budget .*\(density [01].\d+, context 6: .*feed forward.*\): try --max-gpu-mem"
    cli.refuses(3, words, "run", "the cat", "-n", 4, "-m", llama, "--max-gpu-mem", budget)
    outcome = cli("plan", "-m", llama, "--max-gpu-mem", budget)
    assert outcome.code == 3
    assert re.fullmatch(r"griffin-offload: error: needs [^\n]+ try --max-gpu-mem [^\n]+\n", outcome.err)
    cli.refuses(3, "try --max-gpu-mem", "plan", "-q", "-m", llama, "--max-gpu-mem", budget)


def test_no_room_for_offloaded_weights(cli, llama: Path):
    """On the CPU they count: what fits from disk does not fit from RAM."""
    flags = ("run", "the cat", "-n", 4, "-m", llama, "--density", 0.5, "--quantize", "none", "--max-gpu-mem", "330kB")
    assert cli(*flags, "-q").code == 0
    cli.refuses(3, "offloaded 147.5 kB.* --offload disk", *flags, "--offload", "ram")


class _Crowded(CpuDevice):
    name, torch_type = "crowded", "cpu"

    def memory_bytes(self) -> tuple[int, int]:
        return 100_000, 10**9


def test_no_free_memory(cli, llama: Path, register_device):
    flags = ("run", "the cat", "-n", 4, "-m", llama, "--max-gpu-mem", "1MB", "--device", "crowded")
    register_device(_Crowded)
    cli.refuses(3, "only 100.0 kB of the crowded device's memory are free", *flags)


class _Roomy(CpuDevice):
    name, torch_type = "roomy", "cpu"
    free_bytes = 10**9

    def memory_bytes(self) -> tuple[int, int]:
        return self.free_bytes, 10**9


def test_the_program_itself_needs_room_beside_a_large_plan(llama: Path, register_device, monkeypatch):
    """Seen with 13B in a container whose limit the plan filled: pages of libraries were read for every token."""
    register_device(_Roomy)
    load = partial(GriffinModel.from_pretrained, llama, device="roomy", max_gpu_mem="1MB", density=1.0)
    with load() as model:
        needed = model.plan.peak_bytes
    monkeypatch.setattr(memory, "LARGE_MODEL_BYTES", 1)
    monkeypatch.setattr(_Roomy, "free_bytes", needed + memory.HOST_OVERHEAD_BYTES)
    load().close()
    monkeypatch.setattr(_Roomy, "free_bytes", needed + memory.HOST_OVERHEAD_BYTES - 1)
    with pytest.raises(DoesNotFit, match=r"the program itself up to 500.0 MB, but only 501.\d MB of the roomy"):
        load()
    monkeypatch.setattr(memory, "LARGE_MODEL_BYTES", 10**9)
    load().close()
