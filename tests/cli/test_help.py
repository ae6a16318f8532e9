"""Help without torch, and one home for every default."""

import argparse
import dataclasses
import json
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import get_args

import pytest

from griffin_offload import __version__, config
from griffin_offload.cli.main import build_parser
from griffin_offload.config import ChatConfig, LoadConfig, RunConfig
from griffin_offload.evaluation import config as measuring
from griffin_offload.formats import every

FILES = Path(config.__file__).parent / "cli"

# For each command line what it printed, its exit code and the heavy modules that it or one before it brought in.
PROBE = """
import contextlib, io, json, sys
from griffin_offload.cli.main import main
found = []
for line in json.loads(sys.argv[1]):
    text = io.StringIO()
    with contextlib.redirect_stdout(text), contextlib.redirect_stderr(text):
        try:
            code = main(line)
        except SystemExit as leaving:
            code = leaving.code
    found.append([code, text.getvalue(), [name for name in json.loads(sys.argv[2]) if name in sys.modules]])
print(json.dumps(found))
"""
HEAVY = ["torch", "transformers", "numpy", "safetensors", "psutil", "asyncio", "matplotlib", "rich", "lm_eval"]
LINES = [
    ["--version"],
    ["--help"],
    *([command, "--help"] for command in ("run", "chat", "serve", "plan", "convert", "inspect")),
    *(["eval", command, "--help"] for command in ("ppl", "tasks")),
    ["run", "-n", "0"],
    ["chat", "-n", "0"],
    ["serve", "--port", "-1"],
    ["chat", "--raw", "--system", "x"],
    *([command, "--density", "2"] for command in ("run", "chat", "serve")),
]
# Arguments of the API that have no flag: tests and measurements alone use them, or `generate` has its own.
WITHOUT_FLAG = {"cuda_graphs", "batch_statistic", "ff_chunk_tokens", "always_stream", "decay", "keep_prompts"}
# Only a server keeps several conversations.
OF_SERVE = {"session_mem"}
OF_PLAN = {"prompt_tokens", "batch_size", "sequences"}
OF_RUN = {"selection", "seed", "threads"}


def test_help_and_mistakes_import_nothing_heavy(process):
    outcome = process("-c", PROBE, json.dumps(LINES), json.dumps(HEAVY))
    for line, (code, text, heavy) in zip(LINES, json.loads(outcome.out), strict=True):
        assert set(heavy) <= ({"asyncio"} if code else set()), line  # with which ports are tried
        assert code == (0 if line[-1] in ("--help", "--version") else 2), line
        assert text.startswith({"--version": f"griffin-offload {__version__}"}.get(line[-1], ("usage:", "griffin")))


def test_help_names_every_command_and_flag(cli):
    assert {"run", "chat", "serve", "plan", "convert"} <= set(cli("--help").out.split())
    shared = "--model --max-gpu-mem --max-cpu-mem --device --density --offload --ctx-size --kv-bits --dtype --json -q"
    run = (
        "--prompt-file --system --raw --max-new-tokens -n --temperature --top-p --top-k --selection --offline --seed -v"
    )
    words = set(cli("run", "--help").out.replace(",", " ").replace("[", " ").replace("]", " ").split())
    assert {*(shared + " " + run).split(), "--prompt-cache", "--exact", "--draft-tokens", "--refresh"} <= words
    words = set(cli("chat", "--help").out.replace(",", " ").replace("[", " ").replace("]", " ").split())
    ours = {*(shared + " " + run).split(), "--load", "--on-overflow", "--exact", "--draft-tokens", "--refresh"}
    assert ours - {"--prompt-file"} <= words
    words = set(cli("plan", "--help").out.replace(",", " ").replace("[", " ").replace("]", " ").split())
    assert {*shared.split(), "--prompt-tokens", "--batch-size", "--config"} <= words
    words = set(cli("eval", "ppl", "--help").out.replace("[", " ").split())
    ppl = "--text --prompt-tokens --generate-tokens --density --selection --windows --window-start --max-gpu-mem --json"
    assert set(ppl.split()) <= words
    assert {"--tasks", "--include-path", "--mode", "--num-fewshot", "--output"} <= set(
        cli("eval", "tasks", "--help").out.replace("[", " ").split()
    )
    words = set(cli("convert", "--help").out.replace(",", " ").replace("[", " ").replace("]", " ").split())
    assert {
        "OUT",
        "--model",
        "-m",
        "--offline",
        "--json",
        "--quiet",
        "-q",
        "int8",
        "int4",
        "int3",
        "int2",
        "tiers}",
    } <= words


@pytest.mark.parametrize("command", ["run", "chat", "serve", "plan"])
def test_load_defaults_are_those_of_the_dataclass(command: str):
    parsed = vars(build_parser().parse_args([command]))
    missing = {field.name for field in dataclasses.fields(LoadConfig)} - set(parsed)
    assert missing == WITHOUT_FLAG | (OF_RUN if command == "plan" else OF_PLAN) | (
        set() if command == "serve" else OF_SERVE
    )
    for field in dataclasses.fields(LoadConfig):
        assert field.name in missing or parsed[field.name] == field.default, field.name


@pytest.mark.parametrize(
    ("command", "defaults"), [("run", RunConfig), ("chat", RunConfig), ("chat", ChatConfig)], ids=str
)
def test_defaults_of_commands_are_those_of_a_dataclass(command: str, defaults: type):
    parsed = vars(build_parser().parse_args([command]))
    for field in dataclasses.fields(defaults):
        if command == "chat" and defaults is RunConfig and hasattr(ChatConfig, field.name):
            continue  # chat's own
        assert parsed[field.name] == field.default, field.name


@pytest.mark.parametrize("command", ["run", "plan"])
def test_shown_defaults_and_choices_are_those_of_the_dataclass(cli, command: str):
    text = " ".join(cli(command, "--help").out.split())
    assert f"80% or auto (default: {LoadConfig.max_gpu_mem})" in text
    for name, kind in {
        "device": tuple(config.DEVICE_NAMES),
        "offload": get_args(config.Offload),
        "selection": get_args(config.SelectionMethod),
        "quantize": ("auto", *(format.name for format in every()), *config.MIXED),
        "dtype": get_args(config.DType),
    }.items():
        if command == "plan" and name in OF_RUN:
            continue
        assert f"--{name} {{{','.join(kind)}}}" in text


def _parsers(parser: argparse.ArgumentParser) -> Iterator[argparse.ArgumentParser]:
    yield parser
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for command in action.choices.values():
                yield from _parsers(command)


def test_every_option_has_help_that_names_its_default():
    for parser in _parsers(build_parser()):
        formatter = parser._get_formatter()
        for action in (action for action in parser._actions if action.option_strings):
            assert action.help, (parser.prog, action.option_strings)
            if action.default not in (None, False, [], argparse.SUPPRESS):
                assert "default" in formatter._expand_help(action), (parser.prog, action.option_strings)


def test_every_command_shows_an_example_that_it_understands():
    leaves = [parser for parser in _parsers(build_parser()) if not parser._subparsers]
    for parser in leaves:
        label, _, line = (parser.epilog or "").partition(": ")
        assert label == "example", parser.prog
        assert line.startswith(f"{parser.prog} ")
        build_parser().parse_args(shlex.split(line)[1:])


def test_every_flag_is_asked_for():
    """By name in the file of its command or in what commands share, or as a field of a dataclass that takes all."""
    kinds = filter(dataclasses.is_dataclass, (vars(config) | vars(measuring)).values())
    taken = {field.name for kind in kinds for field in dataclasses.fields(kind)}
    shared = "".join((FILES / f"{name}.py").read_text() for name in ("options", "terminal", "eval", "inspect_text"))
    for parser in _parsers(build_parser()):
        if not parser._subparsers:
            name = "_".join(parser.prog.split()[1:])
            asked = set(re.findall(r'arguments(?:\.|, ")(\w+)', shared + (FILES / f"{name}.py").read_text()))
            unasked = {action.dest for action in parser._actions} - taken - asked - {"help"}
            assert not unasked, parser.prog


def test_what_a_flag_shows_is_what_it_does_there(cli):
    """Flags that several commands share, in the words of each."""
    run, serve, plan = (" ".join(cli(command, "--help").out.split()) for command in ("run", "serve", "plan"))
    assert "memory is kept for (default: prompt and answer)" in run
    assert f"memory is kept for (default: {config.FLOOR_AUTO_CTX}, and up to {config.MAX_AUTO_CTX} with" in serve
    assert "default: True" not in serve
    assert "as one JSON object when it is ready" in serve
    assert "--parallel N" in plan


def test_an_unknown_flag_shows_the_usage_of_its_command(cli):
    for words in (["run"], ["eval", "ppl", "--text", "x"]):
        error = cli(*words, "--no-such-flag").err
        command = " ".join(word for word in words if word in ("run", "eval", "ppl"))
        assert error.startswith(f"usage: griffin-offload {command} [-h]"), error
        assert error.endswith(f"griffin-offload {command}: error: unrecognized arguments: --no-such-flag\n")


def test_defaults_are_shown_as_they_are_typed(cli):
    bench = " ".join(cli("bench", "--help").out.split())
    assert f"(default: {config.BenchConfig.prompt_tokens})" in bench
    assert "--max-new-tokens N most tokens of an answer (default: 128)" in " ".join(cli("run", "--help").out.split())
    assert "--max-new-tokens N most tokens of an answer (default: 1024)" in " ".join(cli("chat", "--help").out.split())


def test_model_default(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    assert build_parser().parse_args(["plan"]).model is None
    monkeypatch.setenv("GRIFFIN_OFFLOAD_MODEL", str(tmp_path))
    assert build_parser().parse_args(["plan"]).model == str(tmp_path)
    assert build_parser().parse_args(["plan", "-m", "other"]).model == "other"
