"""`griffin-offload chat`: through pipes, and through a terminal."""

import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from tiny_models import CHAT_TEMPLATE, write_checkpoint, write_tokenizer

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
    assert "chat template" not in outcome.err
    quiet = cli("chat", "-m", chatty, "-q", *OPTIONS, stdin="the cat\nthe dog\n")
    assert (quiet.code, quiet.out, quiet.err) == (0, outcome.out, "")


def test_json_is_an_object_per_turn(cli, chatty: Path):
    outcome = cli("chat", "-m", chatty, "--json", *OPTIONS, stdin="the cat\nthe dog\n")
    turns = [json.loads(line) for line in outcome.out.splitlines()]
    assert [turn["finish"] for turn in turns] == ["length", "length"]
    assert all(turn["report"]["generated_tokens"] == 6 for turn in turns)
    assert turns[1]["report"]["cached_prompt_tokens"] > 0
    plain = cli("chat", "-m", chatty, "-q", *OPTIONS, stdin="the cat\nthe dog\n")
    assert plain.out.split() == " ".join(turn["text"] for turn in turns).split()


def test_commands(cli, chatty: Path, tmp_path: Path):
    saved = tmp_path / "a b.ctx"
    lines = [
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
    for words in ("saved to", "took the last", "turns 2 ", "context ", "streamed ", "begun anew", "1 turns", "/undo  "):
        assert words in outcome.err
    loaded = cli("chat", "-m", chatty, "--json", "--load", saved, *OPTIONS, stdin="the dog\n")
    assert json.loads(loaded.out)["text"] == texts[1]


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
        ("/save\n", 2, "/save needs the name of a file"),
        ("/save x.ctx\n", 2, "nothing to save"),
        ("/load absent.ctx\n", 4, "no file absent.ctx"),
        ("the cat\n/save /\n", 4, "cannot be written"),
        ("river " * 100, 2, "the message is .* the context is 200"),
        (b"\xff\xfe\n", 2, "not UTF-8"),
    ],
    ids=str,
)
def test_the_first_error_of_a_script_ends_it(cli, chatty: Path, script, code: int, words: str):
    outcome = cli("chat", "-m", chatty, "-q", *OPTIONS, stdin=script)
    assert outcome.code == code
    assert re.fullmatch(rf"griffin-offload: error: [^\n]*{words}[^\n]*\n", outcome.err), outcome.err


def test_a_full_context_drops_the_oldest_turns_if_asked(cli, chatty: Path):
    script = "the cat sat on the mat\n" * 12
    refused = cli("chat", "-m", chatty, "-q", *OPTIONS, stdin=script)
    assert (refused.code, "the conversation is" in refused.err) == (2, True)
    dropped = cli("chat", "-m", chatty, "--on-overflow", "drop", *OPTIONS, stdin=script)
    assert dropped.code == 0
    assert "messages were dropped" in dropped.err


def test_bad_flags(cli, chatty: Path, llama: Path):
    cli.refuses(2, "chat template", "chat", "-m", llama, "--system", "x", stdin="")
    cli.refuses(2, "draft_tokens", "chat", "-m", chatty, "--draft-tokens", 3, stdin="")
    cli.refuses(4, "no file", "chat", "-m", chatty, "--load", "absent", stdin="")
    cli.refuses_usage("invalid choice", "chat", "--on-overflow", "x")


PLACES = {"pass": "MappedWeights, 'fetch'", "answer": "_Interrupted, '__call__'"}


class Terminal:
    """A chat behind a pseudo-terminal; `slow` seconds are slept in every layer of a pass, or after every token."""

    def __init__(self, model: Path, where: str) -> None:
        program = (
            "import sys, time\n"
            "from griffin_offload.cli.main import main\n"
            "from griffin_offload.weights.source import MappedWeights\n"
            "from griffin_offload.runtime.session import _Interrupted\n"
            f"kind, name = {PLACES[where]}\n"
            "original = getattr(kind, name)\n"
            "def slow(*a, **k):\n"
            "    time.sleep(0.3)\n"
            "    return original(*a, **k)\n"
            "setattr(kind, name, slow)\n"
            "sys.exit(main(sys.argv[1:]))\n"
        )
        arguments = ["chat", "-m", str(model), *map(str, OPTIONS)]
        self.fd, child = pty.openpty()
        self.process = subprocess.Popen(
            [sys.executable, "-c", program, *arguments], stdin=child, stdout=child, stderr=child, start_new_session=True
        )
        os.close(child)
        self.seen = ""

    def expect(self, words: str) -> None:
        """Wait for `words` in what comes."""
        end = time.monotonic() + 120
        while words not in self.seen:
            assert time.monotonic() < end, self.seen
            if select.select([self.fd], [], [], 1)[0]:
                try:
                    self.seen += os.read(self.fd, 4096).decode(errors="replace")
                except OSError:  # the other side is closed
                    break
        assert words in self.seen, self.seen
        self.seen = self.seen.split(words, 1)[1]

    def say(self, text: str) -> None:
        os.write(self.fd, text.encode() + b"\n")

    def interrupt(self) -> None:
        os.kill(self.process.pid, signal.SIGINT)


@pytest.fixture
def terminal(chatty: Path, request: pytest.FixtureRequest) -> Iterator[Terminal]:
    talk = Terminal(chatty, request.param)
    yield talk
    talk.process.kill()
    talk.process.wait()
    os.close(talk.fd)


@pytest.mark.parametrize("terminal", ["answer"], indirect=True)
def test_ctrl_c_stops_the_answer_and_not_the_program(terminal: Terminal):
    terminal.expect("> ")
    terminal.interrupt()
    terminal.expect("/exit or Ctrl-D to leave")
    terminal.expect("> ")
    terminal.say("the cat")
    time.sleep(1.2)
    terminal.interrupt()
    terminal.expect("(interrupted: kept as far as it came)")
    terminal.expect("> ")
    terminal.say("/stats")
    terminal.expect("turns 1")
    terminal.say("/foo")
    terminal.expect("no command /foo")
    terminal.say("/exit")
    assert terminal.process.wait(60) == 0


@pytest.mark.parametrize("terminal", ["pass"], indirect=True)
def test_ctrl_c_before_the_first_token_takes_the_message_back(terminal: Terminal):
    terminal.expect("> ")
    terminal.say("the cat")
    time.sleep(0.5)
    terminal.interrupt()
    terminal.expect("(cancelled: the message was not added)")
    terminal.expect("> ")
    terminal.say("/stats")
    terminal.expect("turns 0")
    os.write(terminal.fd, b"\x04")
    assert terminal.process.wait(60) == 0
