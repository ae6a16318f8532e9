"""`griffin-offload chat` through pipes: one line, one message. (In a terminal: test_chat_terminal.py.)"""

import io
import json
import re
import sys
from pathlib import Path

import pytest
from fork_server import Started
from tiny_models import CHAT_TEMPLATE, write_checkpoint, write_tokenizer

from griffin_offload import GriffinModel

OPTIONS = ("--device", "cpu", "--density", 0.5, "--max-mem", "1GB", "--ctx-size", 200, "-n", 6, "--temperature", 0)


@pytest.fixture(scope="module")
def chatty(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with a chat template."""
    directory = tmp_path_factory.mktemp("with a space, ünïcode")
    write_checkpoint("llama2", directory)
    write_tokenizer(directory, CHAT_TEMPLATE)
    return directory


def test_a_line_is_a_message(cli, chatty: Path):
    outcome = cli("chat", "-m", chatty, *OPTIONS, stdin="the cat\n\n  \nthe dog\n")
    assert outcome.code == 0
    assert len(re.findall(r"^\[\d+ tok in .* context \d+ of 200\]$", outcome.err, re.M)) == 2
    start = outcome.err.splitlines()[0]
    assert start == f"{chatty}: float32, density 0.50, context 200 tokens, budget 1.00 GB"
    quiet = cli("chat", "-m", chatty, "-q", *OPTIONS, stdin="the cat\nthe dog\n")
    assert (quiet.code, quiet.out, quiet.err) == (0, outcome.out, "")


def test_the_words_are_those_of_the_api(cli, chatty: Path):
    """Sampled: the seed is that of the flag."""
    flags = [*OPTIONS[:-1], 0.9, "--seed", 5, "--json", "--system", "be kind", "--top-k", 20]
    outcome = cli("chat", "-m", chatty, *flags, stdin="the cat\nthe dog\n")
    options = {"device": "cpu", "density": 0.5, "max_gpu_mem": "1GB", "ctx_size": 200, "keep_prompts": True, "seed": 5}
    with GriffinModel.from_pretrained(chatty, **options) as model:
        sampling = {"do_sample": True, "temperature": 0.9, "top_k": 20}
        talk = model.chat_session(system="be kind", seed=5, max_new_tokens=6, **sampling)
        expected = [talk.send(text).text for text in ("the cat", "the dog")]
    assert [json.loads(line)["text"] for line in outcome.out.splitlines()] == expected


def test_without_a_template_texts_are_continued_and_that_is_said_once(cli, llama: Path, chatty: Path):
    outcome = cli("chat", "-m", llama, *OPTIONS, stdin="the cat\nthe dog\n")
    assert outcome.err.count("no chat template: texts are put one after the other") == 1
    raw = cli("chat", "-m", chatty, "--raw", "-q", *OPTIONS, stdin="the cat\nthe dog\n")
    assert raw.out == outcome.out  # the same weights


def test_json_is_an_object_per_turn(cli, chatty: Path):
    outcome = cli("chat", "-m", chatty, "--json", *OPTIONS, stdin="the cat\nthe dog\n")
    turns = [json.loads(line) for line in outcome.out.splitlines()]
    assert [turn["finish_reason"] for turn in turns] == ["length", "length"]
    assert all(turn["report"]["generated_tokens"] == 6 for turn in turns)
    assert turns[1]["report"]["cached_prompt_tokens"] > 0
    plain = cli("chat", "-m", chatty, "-q", *OPTIONS, stdin="the cat\nthe dog\n")
    assert plain.out.split() == " ".join(turn["text"] for turn in turns).split()


def test_commands(cli, chatty: Path, tmp_path: Path):
    saved = tmp_path / "a b.ctx"
    lines = [
        "/undo",
        "the cat",
        f"/save {saved}",
        "the dog",
        "/undo",
        "the dog",
        "/stats",
        "/reset",
        f"/load {saved}",
        "the dog",
    ]
    script = "\n".join([*lines, "//odd", "/help", "/exit", "no"])
    outcome = cli("chat", "-m", chatty, "--json", *OPTIONS, stdin=script)
    assert outcome.code == 0
    texts = [json.loads(line)["text"] for line in outcome.out.splitlines()]
    assert len(texts) == 5
    assert texts[1] == texts[2] == texts[3]
    for words in (
        "nothing to take back",
        "saved to",
        "took the last",
        "turns 2 ",
        "context ",
        "streamed ",
        "begun anew",
        "1 turns",
        "/undo  ",
    ):
        assert words in outcome.err
    loaded = cli("chat", "-m", chatty, "--json", "--load", saved, *OPTIONS, stdin="the dog\n")
    assert json.loads(loaded.out)["text"] == texts[1]
    assert [path.name for path in tmp_path.iterdir()] == ["a b.ctx"]


def test_a_home_is_known_by_its_tilde(cli, chatty: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    script = "the cat\n/save ~/a b.ctx\n/save  ~/a b.ctx \n/load ~/a b.ctx\n"
    assert cli("chat", "-m", chatty, "-q", *OPTIONS, stdin=script).code == 0
    assert [path.name for path in tmp_path.iterdir()] == ["a b.ctx"]


def test_exact_chats_say_what_the_full_model_says(cli, chatty: Path):
    script = "the cat\nthe dog\n/stats\n"
    options = [0.25 if option == 0.5 else option for option in OPTIONS]
    exact = cli("chat", "-m", chatty, "-q", "--exact", *options, stdin=script)
    full = cli("chat", "-m", chatty, "-q", *[1.0 if option == 0.5 else option for option in OPTIONS], stdin=script)
    assert exact.code == full.code == 0
    assert exact.out == full.out
    assert "passes between tokens" in exact.err


@pytest.mark.parametrize(
    ("script", "code", "words"),
    [
        ("/nothing\n", 2, "no command /nothing"),
        ("/exit now\n", 2, "/exit stands alone: leave out 'now'"),
        ("/undo 3\n", 2, "/undo stands alone"),
        ("/save\n", 2, "/save needs the name of a file"),
        ("/load \n", 2, "/load needs the name of a file"),
        ("/save x.ctx\n", 2, "nothing to save"),
        ("/load absent.ctx\n", 4, "no file absent.ctx"),
        ("/load a\0b\n", 4, "no file a"),
        ("the cat\n/save /\n", 4, "cannot be written"),
        ("the cat\n/save ~nosuchuser/x\n", 4, "cannot be written"),
        ("the cat\n/save a\0b\n", 4, "cannot be written"),
        ("the cat\n/reset\n/save x.ctx\n", 2, "nothing to save: the conversation is empty"),
        ("river " * 300, 2, "the message is .* the context is 200"),
        (b"\xff\xfe\n", 2, "not UTF-8"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_the_first_error_of_a_script_ends_it(cli, chatty: Path, script, code: int, words: str):
    outcome = cli("chat", "-m", chatty, "-q", *OPTIONS, stdin=script)
    assert outcome.code == code
    error = outcome.err.removeprefix("(begun anew)\n")
    assert re.fullmatch(rf"griffin-offload: error: [^\n]*{words}[^\n]*\n", error), outcome.err


def test_an_answer_is_shortened_to_what_the_context_has_left(cli, chatty: Path):
    """And it says so, whichever of the two limits it met; -q says nothing."""
    options = list(OPTIONS)
    options[options.index("-n") + 1] = 1000
    options[options.index("--ctx-size") + 1] = 60
    outcome = cli("chat", "-m", chatty, "--json", *options, stdin="the cat\n")
    turn = outcome.json
    tokens = turn["report"]["prompt_tokens"] + turn["report"]["generated_tokens"]
    assert (turn["finish_reason"], tokens) == ("length", 60)
    said = cli("chat", "-m", chatty, *options, stdin="the cat\n").err
    assert said.splitlines()[-1].endswith("tokens, the context is full: /reset, or raise --ctx-size)")
    limited = cli("chat", "-m", chatty, *OPTIONS, stdin="the cat\n").err
    assert limited.splitlines()[-1] == "(the answer was cut at its limit of 6 tokens: -n N allows more)"
    assert cli("chat", "-m", chatty, "-q", *options, stdin="the cat\n").err == ""


def test_stop_strings_and_what_follows(cli, chatty: Path):
    """The conversation goes on from the text that was shown."""
    turns = cli("chat", "-m", chatty, "--json", *OPTIONS, stdin="the cat\nthe dog\n").out.splitlines()
    text = json.loads(turns[0])["text"]
    stop = text[2:4]
    cut = text[: text.index(stop)]
    stopped = cli("chat", "-m", chatty, "--json", *OPTIONS, "--stop", stop, stdin="the cat\nthe dog\n")
    first = json.loads(stopped.out.splitlines()[0])
    assert (first["text"], first["finish_reason"]) == (cut, "stop")
    printed = cli("chat", "-m", chatty, "-q", *OPTIONS, "--stop", stop, stdin="the cat\n")
    assert printed.out == cut + "\n"


@pytest.mark.slow
def test_a_full_context_drops_the_oldest_turns_if_asked(cli, chatty: Path):
    script, options = "the cat sat on the mat\n" * 6, list(OPTIONS)
    options[options.index("--ctx-size") + 1] = 90
    refused = cli("chat", "-m", chatty, "-q", *options, stdin=script)
    assert (refused.code, "the conversation is" in refused.err) == (2, True)
    dropped = cli("chat", "-m", chatty, "--on-overflow", "drop", *options, stdin=script)
    assert dropped.code == 0
    assert "messages were dropped" in dropped.err


def test_bad_flags(cli, chatty: Path, llama: Path, monkeypatch: pytest.MonkeyPatch):
    """All of them before any weight is read."""
    monkeypatch.setattr(GriffinModel, "from_pretrained", None)
    cli.refuses(2, "chat template, and this model has none", "chat", "-m", llama, "--system", "x", stdin="")
    cli.refuses(2, "--raw turns it off", "chat", "-m", chatty, "--system", "x", "--raw", stdin="")
    cli.refuses(2, "the system message is not UTF-8", "chat", "-m", chatty, "--system", "caf\udce9", stdin="")
    cli.refuses(2, "no switch for thinking", "chat", "-m", chatty, "--thinking", stdin="")
    cli.refuses(2, "--raw turns it off", "chat", "-m", chatty, "--no-thinking", "--raw", stdin="")
    cli.refuses(2, "--stop is empty", "chat", "-m", chatty, "--stop", "", stdin="")
    cli.refuses(2, "draft_tokens", "chat", "-m", chatty, "--draft-tokens", 3, stdin="")
    cli.refuses(2, "--temperature is -1", "chat", "-m", chatty, "--temperature", -1, stdin="")
    cli.refuses(4, "no file", "chat", "-m", chatty, "--load", "absent", stdin="")
    cli.refuses(2, "leave out --system or --load", "chat", "-m", chatty, "--load", "x", "--system", "x", stdin="")
    cli.refuses(2, "leave out --raw or --load", "chat", "-m", chatty, "--load", "x", "--raw", stdin="")
    cli.refuses(2, "--on-overflow: invalid choice", "chat", "--on-overflow", "x")
    monkeypatch.setattr(sys, "stdin", None)
    cli.refuses(2, "standard input is closed", "chat", "-m", chatty)


def test_a_checkpoint_without_a_tokenizer(cli, copy: Path):
    for file in copy.glob("token*"):
        file.unlink()
    cli.refuses(4, "no tokenizer files", "chat", "-m", copy, stdin="hello\n")
    cli.refuses(4, "no tokenizer files", "run", "hello", "-m", copy)


def test_a_saved_prompt_is_no_conversation(cli, chatty: Path, tmp_path: Path):
    file = tmp_path / "a.ctx"
    options = ("-m", chatty, "--device", "cpu", "--density", 0.5, "--max-mem", "1GB", "-q")
    assert cli("run", "the cat", *options, "-n", 2, "--prompt-cache", file).code == 0
    cli.refuses(4, "is a saved prompt and no conversation", "chat", *options, "--load", file, stdin="")


def test_bytes_that_a_locale_lets_through(cli, chatty: Path, monkeypatch: pytest.MonkeyPatch):
    """In C.UTF-8 Python reads bytes that are not UTF-8 as lone surrogates."""
    raw = io.BytesIO(b"the caf\xe9\n")
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(raw, encoding="utf-8", errors="surrogateescape"))
    cli.refuses(2, "the message is not UTF-8", "chat", "-m", chatty, "-q", *OPTIONS)


def test_processes_hand_a_conversation_on(forks, chatty: Path, tmp_path: Path):
    """A file from one process to the next."""

    def talk(script: bytes, *flags: object) -> Started:
        command = ("-m", "griffin_offload", "chat", "-m", chatty, "-q", *OPTIONS, "--threads", 1, *flags)
        return forks.run(*command, stdin=script)

    whole = talk(b"the cat\nthe dog\n")
    first = talk(f"the cat\n/save {tmp_path / 'a.ctx'}\n".encode())
    second = talk(b"the dog\n", "--load", tmp_path / "a.ctx")
    assert (whole.returncode, first.returncode, second.returncode) == (0, 0, 0)
    assert whole.out == first.out + second.out
    assert whole.err == ""
