"""`griffin-offload run`: the text alone on stdout, figures on stderr, the same tokens as the Python API."""

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from scripted_model import EOS, byte_tokenizer, llama2_tokenizer, write_scripted
from tiny_models import CHAT_TEMPLATE, write_tokenizer
from transformers import AutoTokenizer

from griffin_offload import GriffinModel
from griffin_offload.demo import PROMPT, demo_directory

TEXT = "the cat sat on the mat and thought of another river while nothing was left in their boats " * 2
NEW = 12
KEYS = {
    "graphs",
    "replays",
    "experts",
    "finish_reason",
    "structure",
    "lookup",
    *("text", "prompt_tokens", "generated_tokens", "load_s", "prefill_s", "decode_s", "prefill_tokens_per_s"),
    *("decode_tokens_per_s", "prefill_streamed_bytes", "decode_streamed_bytes", "decode_embedding_bytes"),
    *("resident_bytes", "peak_device_bytes", "budget_bytes", "peak_host_bytes", "host_growth_bytes", "density"),
    *(
        "activation_kept",
        "activation_kept_heldout",
        "wait_s",
        "select_s",
        "statistic_s",
        "precision",
        "tiers",
        "parts",
        "parts_16bit",
    ),
    *("cached_prompt_tokens", "decode_streamed_bytes_per_token", "drafting"),
}
FIGURES = (
    r"prefill  \d+ tok  [\d.]+ s \(\d+ tok/s\)   streamed .+ at .+/s\n"
    r"decode   12 tok  [\d.]+ s \([\d.]+ tok/s\)   streamed 0 B   density [\d.]+, activation kept [\d.]+ held out\n"
    r"resident .+ kB float32   peak CPU .+ of .+   RAM .+ \(process\)\n"
    r"note: the answer was cut at its limit of 12 tokens: -n N allows more\n"
)


@pytest.fixture(scope="module")
def run(llama: Path) -> tuple[object, ...]:
    """A command whose layers are streamed: the budget holds the residents and a part of the neurons."""
    return ("run", TEXT, "-n", NEW, "-m", llama, "--max-gpu-mem", "330kB", "--quantize", "none", "--seed", 7)


def from_api(directory: Path, text: str, sampling: dict[str, Any]) -> tuple[str, Any]:
    """The same prompt through the Python API: text and report."""
    tokenizer = AutoTokenizer.from_pretrained(directory)
    ids = tokenizer(text, return_tensors="pt").input_ids
    prompt_tokens = ids.shape[1]
    model = GriffinModel.from_pretrained(
        directory,
        max_gpu_mem="330kB",
        quantize="none",
        ctx_size=prompt_tokens + NEW,
        prompt_tokens=prompt_tokens,
        seed=7,
    )
    torch.manual_seed(7)
    output = model.generate(ids, max_new_tokens=NEW, **sampling)
    model.close()
    return tokenizer.decode(output[0, prompt_tokens:], skip_special_tokens=True), model.last_report


def test_text_on_stdout_and_figures_on_stderr(cli, run):
    outcome = cli(*run)
    assert outcome.code == 0
    assert re.fullmatch(FIGURES, outcome.err), outcome.err
    quiet = cli(*run, "-q")
    assert (quiet.code, quiet.out, quiet.err) == (0, outcome.out, "")
    assert outcome.out == cli(*run, "--json").json["text"] + "\n"


def test_neurons_that_are_quantised_for_every_prompt_are_told_of(cli, run, llama, tmp_path, monkeypatch):
    note = "s of this prompt went into choosing and quantising neurons: griffin-offload convert"
    quantised = [*run[:-3], "int8", *run[-2:], "--density", 0.5]
    assert note not in cli(*quantised).err
    monkeypatch.setattr("griffin_offload.cli.run._LONG_S", 0.0)
    assert note in cli(*quantised).err
    assert note not in cli(*run).err
    # Neurons that draft are quantised for every prompt whatever the copy.
    assert note not in cli("run", TEXT, "-n", NEW, "-m", llama, "--exact", "--quantize", "int8").err
    converted = tmp_path / "converted"
    assert cli("convert", "-m", llama, converted, "--quantize", "int8", "-q").code == 0
    at = quantised.index("-m") + 1
    assert note not in cli(*quantised[:at], converted, *quantised[at + 1 :]).err


def test_verbose_adds_the_plan(cli, run):
    outcome = cli(*run, "-v")
    table, figures = outcome.err.split("\nprefill  ")
    assert outcome.out == cli(*run, "-q").out
    assert re.search(r"^feed forward .* kB", table, re.MULTILINE)
    assert re.fullmatch(FIGURES, "prefill  " + figures)


def test_short_prompts_say_that_nothing_was_held_out(cli, llama: Path):
    command = ("run", "the cat", "-n", 2, "-m", llama, "--density", 0.5)
    assert "\nnote: the prompt is too short" in cli(*command).err
    assert cli(*command, "--json").json["activation_kept_heldout"] is None


def test_json_has_exactly_the_documented_keys(cli, run):
    outcome = cli(*run, "--json")
    report = outcome.json
    assert (outcome.code, outcome.err) == (0, "")
    assert set(report) == KEYS
    assert report["decode_streamed_bytes"] == 0
    assert report["prefill_streamed_bytes"] == 3 * 3 * 128 * 32 * 4  # layers, projections, F, H, float32
    assert report["resident_bytes"] < report["peak_device_bytes"] <= report["budget_bytes"] == 330_000
    assert (report["prompt_tokens"], report["generated_tokens"]) == (37, NEW)
    assert 0.25 <= report["density"] < 1
    assert 0 < report["activation_kept_heldout"] <= report["activation_kept"] <= 1
    assert report["prefill_tokens_per_s"] == pytest.approx(37 / report["prefill_s"])
    assert report["decode_tokens_per_s"] == pytest.approx((NEW - 1) / report["decode_s"])


def test_an_answer_by_a_json_schema(cli, llama: Path, tmp_path: Path):
    run = ("run", TEXT, "-m", llama, "--seed", 7)
    schema = tmp_path / "schema.json"
    schema.write_text('{"type": "array", "items": {"enum": [1, "two"]}, "minItems": 1, "maxItems": 2}')
    outcome = cli(*run, "--json-schema", schema, "-n", 60)
    assert outcome.code == 0, outcome.err
    answer = json.loads(outcome.out)
    assert 1 <= len(answer) <= 2
    assert set(answer) <= {1, "two"}
    assert "\nJSON schema  complete   " in outcome.err
    cut = cli(*run, "--json-schema", schema, "-n", 1)
    assert "\nJSON schema  NOT complete" in cut.err
    assert cli(*run, "--json-schema", schema, "-n", 60, "--json").json["finish_reason"] == "stop"
    for text, reason in (
        ("{", "is no JSON"),
        ('{"not": {}}', 'Unimplemented keys: ["not"]'),
        ("\0", "looks like UTF-16"),
    ):
        schema.write_text(text)
        refused = cli(*run, "--json-schema", schema)
        assert refused.code == 2
        assert reason in refused.err
    assert "cannot be read" in cli(*run, "--json-schema", tmp_path / "none").err


@pytest.mark.parametrize(
    ("flags", "sampling"),
    [
        ([], {}),
        (["--temperature", "0"], {"do_sample": False}),
        (["--temperature", "0.8", "--top-k", "20"], {"do_sample": True, "temperature": 0.8, "top_k": 20}),
        (["--top-p", "0.9"], {"do_sample": True, "top_p": 0.9}),
    ],
)
def test_the_text_is_that_of_the_api(cli, run, llama: Path, flags: list[str], sampling: dict[str, Any]):
    text, report = from_api(llama, TEXT, sampling)
    answer = cli(*run, *flags, "--json").json
    assert answer["text"] == text
    for name in ("density", "activation_kept", "peak_device_bytes", "resident_bytes"):
        assert answer[name] == getattr(report, name)


def test_seeds(cli, run):
    draws = {cli(*run, "-q", "--temperature", 1, "--seed", seed).out for seed in (1, 2, 3)}
    assert len(draws) == 3
    assert cli(*run, "-q", "--seed", 2**63 - 1).code == 0  # torch takes it


def test_prompts_from_stdin_and_from_a_file(cli, run, tmp_path: Path):
    expected = cli(*run, "-q").out
    file = tmp_path / "prompt.txt"
    file.write_text(TEXT, encoding="utf-8")
    assert cli("run", "-", *run[2:], "-q", stdin=TEXT).out == expected
    assert cli("run", "--prompt-file", file, *run[2:], "-q").out == expected


def test_a_module_and_a_process(forks, cli, run):
    """`python -m griffin_offload` in a process of its own does what main does."""
    outcome = forks.run("-m", "griffin_offload", *run)
    assert outcome.returncode == 0
    assert outcome.out == cli(*run, "-q").out
    assert re.fullmatch(FIGURES, outcome.err), outcome.err


def test_chat_template_is_applied_unless_raw(cli, llama: Path, chat: Path):
    def answer(directory: Path, prompt: str, *flags: str) -> dict[str, Any]:
        return cli("run", prompt, "-n", NEW, "--json", "-m", directory, *flags).json

    def same(first: dict[str, Any], second: dict[str, Any]) -> bool:
        return all(first[name] == second[name] for name in ("text", "prompt_tokens"))

    assert same(answer(chat, "hello"), answer(llama, "<s><|user|>hello</s><|assistant|>"))
    both = answer(chat, "hello", "--system", "be kind")
    assert same(both, answer(llama, "<s><|system|>be kind</s><|user|>hello</s><|assistant|>"))
    assert same(answer(chat, "hello", "--raw"), answer(llama, "hello"))
    assert not same(answer(chat, "hello"), answer(llama, "hello"))


def test_the_demo_shows_its_own_prompt_before_its_answer(cli):
    """On stderr, and only what nobody has typed."""
    shown = cli("run", "-n", 2)
    assert shown.err.startswith(f"prompt   {PROMPT}\nprefill ")
    typed = cli("run", PROMPT, "-n", 2)
    assert (typed.out, "prompt   " in typed.err) == (shown.out, False)
    assert cli("run", "-n", 2, "-q").err == ""
    assert cli("run", "-n", 2, "--json").err == ""


def test_an_answer_ends_in_front_of_a_stop_string(cli, run):
    """However tokens divide it; printed and in JSON, greedy, exact and with what transformers adds."""
    greedy = (*run, "--temperature", 0)
    whole = cli(*greedy, "--json").json
    assert whole["finish_reason"] == "length"
    for start, end in ((3, 5), (4, 9), (2, len(whole["text"]))):
        stop = whole["text"][start:end]
        cut = whole["text"][: whole["text"].index(stop)]
        stopped = cli(*greedy, "--json", "--stop", "not there", "--stop", stop).json
        assert (stopped["text"], stopped["finish_reason"]) == (cut, "stop")
        assert stopped["generated_tokens"] <= NEW
        printed = cli(*greedy, "--stop", stop)
        assert printed.out == cut + "\n"
        assert "cut at its limit" not in printed.err
    assert cli(*greedy, "--json", "--stop", "not there").json["text"] == whole["text"]


@pytest.mark.slow
def test_an_answer_that_is_not_cut_is_not_said_to_be(cli, tmp_path: Path):
    """Whole where its last token is the one that ends it, or a stop string; cut one token earlier."""
    tokenizer = byte_tokenizer()
    answer = tokenizer("b quick")["input_ids"]
    model = write_scripted(tmp_path, tokenizer, [*answer, EOS])
    flags = ("-m", model, "--device", "cpu", "--max-gpu-mem", "100MB", "--temperature", 0)
    note = r"answer was cut at its limit of %d tokens: -n N allows more"
    for exact in ((), ("--exact",)):
        for limit, stop, finish, text in (
            (len(answer), (), "stop", " quick"),  # as many as there are, the end among them
            (len(answer) - 1, (), "length", " quick"),
            (len(answer) - 2, (), "length", " quic"),
            (len(answer) - 2, ("--stop", "uic"), "stop", " q"),
            (1, (), "length", ""),
        ):
            found = cli("run", "b", "-n", limit, *flags, *stop, *exact, "--json").json
            assert (found["finish_reason"], found["text"].rstrip()) == (finish, text)
            said = cli("run", "b", "-n", limit, *flags, *stop, *exact).err
            assert bool(re.search(note % limit, said)) == (finish == "length"), said


def test_flags_are_arguments_of_generate(cli, run, llama: Path):
    for flags, sampling in (
        (["--repetition-penalty", 1.7, "--temperature", 0], {"repetition_penalty": 1.7, "do_sample": False}),
        (["--min-p", 0.05], {"min_p": 0.05, "do_sample": True}),
    ):
        assert cli(*run, *flags, "--json").json["text"] == from_api(llama, TEXT, sampling)[0]
    penalised = cli(*run, "--temperature", 0, "--repetition-penalty", 1.7, "-q").out
    assert penalised != cli(*run, "--temperature", 0, "-q").out


def test_thinking_is_turned_where_the_template_can(cli, llama: Path, chat: Path, tmp_path: Path):
    cli.refuses(2, "no switch for thinking", "run", "hello", "-m", chat, "--no-thinking")
    cli.refuses(2, "--thinking needs a chat template", "run", "hello", "-m", llama, "--thinking")
    cli.refuses(2, "--no-thinking needs a chat template", "run", "hello", "-m", chat, "--no-thinking", "--raw")
    for number, name in enumerate(("enable_thinking", "thinking")):
        directory = Path(shutil.copytree(llama, tmp_path / str(number)))
        switch = f"{{% if {name} is defined and not {name} %}} thought{{% endif %}}"
        write_tokenizer(directory, CHAT_TEMPLATE + switch)
        tokens = [
            cli("run", "hello", "-n", 1, "--json", "-m", directory, *flags).json["prompt_tokens"]
            for flags in ([], ["--thinking"], ["--no-thinking"])
        ]
        assert tokens[0] == tokens[1] < tokens[2]


@pytest.mark.parametrize("flags", [(), ("--quantize", "int4")], ids=["as stored", "calibrated"])
@pytest.mark.parametrize("command", ["run", "chat"])
def test_the_tokenizer_is_loaded_once(cli, chat: Path, monkeypatch, tmp_path: Path, command: str, flags):
    monkeypatch.setenv("GRIFFIN_OFFLOAD_CACHE", str(tmp_path))  # nothing is known of the inputs of its matrices
    loads: list[object] = []
    real = AutoTokenizer.from_pretrained
    monkeypatch.setattr(AutoTokenizer, "from_pretrained", lambda *a, **k: loads.append(a) or real(*a, **k))
    prompt = {"stdin": "hello\n"} if command == "chat" else {}
    typed = ["hello"] if command == "run" else []
    assert cli(command, *typed, "-n", 2, "-q", "-m", chat, *flags, **prompt).code == 0
    assert len(loads) == 1
    assert bool(list(tmp_path.glob("importance-*"))) == bool(flags)


def test_the_tokenizer_of_a_model_is_what_its_matrices_were_quantised_by(chat: Path, monkeypatch, tmp_path: Path):
    monkeypatch.setenv("GRIFFIN_OFFLOAD_CACHE", str(tmp_path))
    chat = shutil.copytree(chat, tmp_path / "model")  # of which nobody has one
    loads: list[object] = []
    real = AutoTokenizer.from_pretrained
    monkeypatch.setattr(AutoTokenizer, "from_pretrained", lambda *a, **k: loads.append(a) or real(*a, **k))
    options = {"device": "cpu", "max_gpu_mem": "100MB", "quantize": "int4"}
    with GriffinModel.from_pretrained(chat, **options) as first, GriffinModel.from_pretrained(chat, **options) as other:
        assert (len(loads), len(list(tmp_path.glob("importance-*")))) == (1, 1)
        assert first.tokenizer is first.tokenizer is not other.tokenizer  # which others may change
        assert len(loads) == 2


@pytest.mark.parametrize("command", ["batch", "eval ppl", "inspect", "convert", "export"])
def test_other_commands_load_the_tokenizer_once(cli, chat: Path, monkeypatch, tmp_path: Path, command: str):
    monkeypatch.setenv("GRIFFIN_OFFLOAD_CACHE", str(tmp_path))
    text, asked, out = tmp_path / "text", tmp_path / "asked.jsonl", tmp_path / "out"
    text.write_text("the cat sat on a private river and she was there with all of them " * 4)
    body = {"model": "tiny", "max_tokens": 2, "messages": [{"role": "user", "content": "hello"}]}
    line = {"custom_id": "a", "method": "POST", "url": "/v1/chat/completions", "body": body, "prompt": "the cat sat on"}
    asked.write_text("".join(f"{json.dumps(line | {'custom_id': name})}\n" for name in "abcd"))
    flags = {
        "batch": (asked, out, "--served-name", "tiny"),
        "eval ppl": ("--text", text, "--prompt-tokens", 16, "--generate-tokens", 8, "--density", 0.5),
        "inspect": ("--prompt-file", text),
        "convert": (out, "--quantize", "int4"),
        "export": (out, "--prompts", asked, "--density", 0.5),
    }
    loads: list[object] = []
    real = AutoTokenizer.from_pretrained
    monkeypatch.setattr(AutoTokenizer, "from_pretrained", lambda *a, **k: loads.append(a) or real(*a, **k))
    outcome = cli(*command.split(), *flags[command], "-m", chat)
    assert (outcome.code, len(loads)) == (0, 1), outcome.err


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A vocabulary of 150,000 words over the smallest of models: logits of 100 tokens would be 60 MB."""
    directory, words = tmp_path_factory.mktemp("wide"), [f"w{i}" for i in range(150_000)]
    write_scripted(directory, llama2_tokenizer(words), [])
    return directory


@pytest.mark.slow
@pytest.mark.parametrize("flags", [("--exact", "--density", "0.5"), ("--quantize", "int8")], ids="-".join)
def test_memory_beside_the_budget_with_a_large_vocabulary(forks, wide: Path, tmp_path: Path, flags: tuple[str, ...]):
    """docs/memory.md: interpreter, torch and its libraries, and the tokenizer once, with what reading it takes. Forked
    from a process that has imported more than `run` does, which counts."""
    file = tmp_path / "prompt.txt"
    file.write_text("w7 " * 30)
    options = ("--device", "cpu", "--max-gpu-mem", "200MB", "-n", 4, "--prompt-file", file, "--json", *flags)
    outcome = forks.run("-m", "griffin_offload", "run", "-m", wide, *options)
    assert outcome.returncode == 0, outcome.err
    found = json.loads(outcome.out)
    assert found["peak_host_bytes"] - found["peak_device_bytes"] < 750e6


def test_the_demo_needs_no_flags_and_less_memory_than_its_file(cli):
    file_bytes = (demo_directory() / "model.safetensors").stat().st_size
    assert cli("run", "-n", 20, "-q").out.strip()
    flags = ("--max-gpu-mem", file_bytes * 95 // 100, "--quantize", "none")
    answer = cli("run", "-n", 20, "--json", *flags).json
    assert answer["peak_device_bytes"] <= file_bytes * 95 // 100
    assert answer["density"] < 1
    assert answer["text"].strip()
    assert cli("run", PROMPT, "-n", 20, "-q", *flags).out == answer["text"] + "\n"
    smaller = cli("run", "-n", 20, "--json", "--max-gpu-mem", file_bytes * 8 // 10).json
    assert (smaller["precision"], smaller["density"]) == ("int8", 1)
    assert sum(smaller["parts"].values()) < sum(smaller["parts_16bit"].values())


def test_model_variable(cli, llama: Path, monkeypatch: pytest.MonkeyPatch):
    expected = cli("run", TEXT, "-n", NEW, "-q", "-m", llama).out
    monkeypatch.setenv("GRIFFIN_OFFLOAD_MODEL", str(llama))
    assert cli("run", TEXT, "-n", NEW, "-q").out == expected
    cli.refuses(2, "no prompt", "run", "-q")  # the demo's prompt belongs to the demo
    cli.refuses(4, "/absent", "run", "x", "-m", "/absent")
    monkeypatch.setenv("GRIFFIN_OFFLOAD_MODEL", "")
    assert cli("run", "-n", 2, "-q").code == 0  # set to nothing: the demo
    cli.refuses(4, "", "run", "x", "-m", "")  # as in -m "$UNSET": the demo was not asked for


@pytest.mark.parametrize(
    "settings",
    [
        {"do_sample": True, "temperature": 0.6, "top_p": 0.9, "top_k": 20},
        {"do_sample": False, "temperature": 0.6, "top_p": 0.9},
        {"eos_token_id": [2], "pad_token_id": None},
        {"max_length": 20},
        {"num_beams": 2},
    ],
    ids=lambda settings: "-".join(settings),
)
@pytest.mark.parametrize("flags", [[], ["--temperature", "0"]], ids=["given", "greedy"])
def test_generation_configs_in_the_wild_are_quiet(cli, copy: Path, edit: Callable[..., None], settings, flags):
    """-q is the text alone: advice that transformers logs about a checkpoint's own settings is not."""
    edit(copy / "generation_config.json", **settings)
    outcome = cli("run", "the cat", "-n", NEW, "-q", "-m", copy, *flags)
    assert (outcome.code, outcome.err) == (0, "")
    assert outcome.out.strip()


@pytest.mark.slow
def test_a_reader_that_goes_away(llama: Path):
    """`griffin-offload run ... | head -c 1`: no traceback when the pipe is closed."""
    command = [sys.executable, "-m", "griffin_offload", "run", TEXT, "-n", "100", "-q", "-m", str(llama)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as running:
        running.stdout.close()
        error = running.stderr.read().decode()
    assert error == ""
    assert running.returncode == 1
