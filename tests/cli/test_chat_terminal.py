"""`griffin-offload chat` in a terminal: errors and Ctrl-C end a turn and not the program."""

import io
import os
import pty
import re
import select
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from fork_server import ForkServer

from griffin_offload.cli.chat import Interrupts
from griffin_offload.engine import chat as session
from griffin_offload.engine.chat import ChatSession
from griffin_offload.offload.weight_store import MmapStore

OPTIONS = ("--device", "cpu", "--density", 0.5, "--max-mem", "1GB", "--ctx-size", 200, "-n", 6, "--temperature", 0)


class _Keyboard(io.StringIO):
    """What a user types; each `^C` is a Ctrl-C at the prompt."""

    def isatty(self) -> bool:
        return True

    def readline(self, *_: Any) -> str:
        line = super().readline()
        if line == "^C\n":
            raise KeyboardInterrupt
        return line


@pytest.fixture
def type_in(cli, chat: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """`type_in(lines, *flags)`: a conversation whose standard input alone is a terminal."""

    def type_in(lines: list[str], *flags: object) -> Any:
        monkeypatch.setattr(sys, "stdin", _Keyboard("".join(f"{line}\n" for line in lines)))
        return cli("chat", "-m", chat, *OPTIONS, *flags)

    return type_in


def interrupting(at: int, times: int = 1) -> Callable[..., Any]:
    """What is asked after every token, with a user who presses Ctrl-C after token `at`."""
    original, calls = session.Interrupted.__call__, []

    def pressed(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        found = original(*args, **kwargs)
        if len(calls) == at:
            for _ in range(times):
                os.kill(os.getpid(), signal.SIGINT)
                time.sleep(0.05)
        return found

    return pressed


def test_errors_are_a_line_and_the_chat_goes_on(type_in):
    lines = ["the cat", "/nothing", "/save", "/load absent", "river " * 300, "caf\udce9", "/undo 3", "^C", "the dog"]
    outcome = type_in(lines)
    assert outcome.code == 0
    errors = [line.removeprefix("> ") for line in outcome.err.splitlines() if "error: " in line]
    words = ("no command", "needs the name", "no file", "the conversation is", "not UTF-8", "stands alone")
    assert len(errors) == len(words)
    assert all(re.match(f"griffin-offload: error: [^(]*{word}", line) for word, line in zip(words, errors, strict=True))
    assert "/exit or Ctrl-D to leave" in outcome.err
    assert outcome.out == type_in(["the cat", "the dog", "/exit", "no"]).out


def test_the_prompt_is_not_written_among_answers(type_in):
    """`griffin-offload chat > answers.txt`."""
    outcome = type_in(["the cat", ""], "-q")
    assert outcome.err == "> > > "
    assert ">" not in outcome.out
    assert type_in(["the cat"], "--json").json["finish_reason"] == "length"


def test_an_interrupted_answer_stays_as_far_as_it_came(type_in, monkeypatch: pytest.MonkeyPatch):
    whole = type_in(["the cat"], "-q").out
    monkeypatch.setattr(session.Interrupted, "__call__", interrupting(3))
    outcome = type_in(["the cat", "/stats"])
    assert outcome.code == 0
    assert "(interrupted: kept as far as it came)" in outcome.err
    assert "turns 1 (1 answered here)" in outcome.err
    assert 0 < len(outcome.out) < len(whole)
    assert whole.startswith(outcome.out.rstrip("\n\ufffd"))
    monkeypatch.setattr(session.Interrupted, "__call__", interrupting(3))
    assert type_in(["the cat"], "--json").json["finish_reason"] == "interrupted"


def test_a_second_ctrl_c_takes_the_message_back(type_in, monkeypatch: pytest.MonkeyPatch):
    second = type_in(["the dog"], "-q").out
    monkeypatch.setattr(session.Interrupted, "__call__", interrupting(3, times=2))
    outcome = type_in(["the cat", "/stats", "the dog"])
    assert outcome.code == 0
    assert "(cancelled: the message was not added)" in outcome.err
    assert "turns 0 (0 answered here)" in outcome.err
    assert outcome.out.endswith(second)


def test_ctrl_c_in_the_pass_takes_the_message_back(type_in, monkeypatch: pytest.MonkeyPatch):
    """In the second turn: the first one is as it was, and can be gone on from."""
    expected = type_in(["the cat", "the dog"], "-q").out
    fetch, calls = MmapStore.fetch, []

    def pressed(source: object, layer: int) -> Any:
        calls.append(layer)
        if len(calls) == 5:  # the second turn's second layer
            time.sleep(0.1)
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.2)
        return fetch(source, layer)

    monkeypatch.setattr(MmapStore, "fetch", pressed)
    outcome = type_in(["the cat", "the dog", "/stats", "the dog"])
    assert len(calls) >= 8
    assert outcome.code == 0
    assert "(cancelled: the message was not added)" in outcome.err
    assert "turns 1 (1 answered here)" in outcome.err
    assert outcome.out.split() == expected.split()


def test_ctrl_c_between_answers_is_no_end(type_in, monkeypatch: pytest.MonkeyPatch):
    """While a file is read, for example."""
    monkeypatch.setattr(ChatSession, "load", lambda *_: os.kill(os.getpid(), signal.SIGINT) or time.sleep(1))
    outcome = type_in(["/load x", "the cat"])
    assert outcome.code == 0
    assert "(interrupted)" in outcome.err
    assert outcome.out.strip()


def test_ctrl_c_in_a_script_ends_it(cli, chat: Path, monkeypatch: pytest.MonkeyPatch):
    for times in (1, 2):
        monkeypatch.setattr(session.Interrupted, "__call__", interrupting(3, times))
        outcome = cli("chat", "-m", chat, "-q", *OPTIONS, stdin="the cat\nthe dog\n")
        assert (outcome.code, outcome.err) == (130, "\ngriffin-offload: interrupted\n")


def test_the_signal_is_given_back():
    before = signal.getsignal(signal.SIGINT)
    with Interrupts(catch=True):
        assert signal.getsignal(signal.SIGINT) is not before
    assert signal.getsignal(signal.SIGINT) is before


PLACES = {"pass": "MmapStore, 'fetch'", "answer": "Interrupted, '__call__'"}


class Pty:
    """A chat behind a pseudo-terminal, slow in every layer of a pass, or after every token: it says <here> then."""

    def __init__(self, forks: ForkServer, model: Path, where: str) -> None:
        program = (
            "import sys, time\n"
            "from griffin_offload.cli.main import main\n"
            "from griffin_offload.offload.weight_store import MmapStore\n"
            "from griffin_offload.engine.chat import Interrupted\n"
            f"kind, name = {PLACES[where]}\n"
            "original = getattr(kind, name)\n"
            "def slow(*a, **k):\n"
            "    found = original(*a, **k)\n"
            "    print('<here>', file=sys.stderr, flush=True)\n"
            "    time.sleep(0.5)\n"
            "    return found\n"
            "setattr(kind, name, slow)\n"
            "sys.exit(main(sys.argv[1:]))\n"
        )
        arguments = ["chat", "-m", str(model), *map(str, OPTIONS)]
        self.fd, child = pty.openpty()
        self.process = forks.start("-c", program, *arguments, terminal=child)
        os.close(child)
        self.seen = ""

    def expect(self, words: str, *, pressing: bool = False) -> None:
        """Wait for `words` in what comes; `pressing` Ctrl-C all the while, as one that comes just before readline waits
        is seen by it with the next key only."""
        end = time.monotonic() + 120
        while words not in self.seen:
            assert time.monotonic() < end, self.seen
            if pressing:
                self.interrupt()
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
def terminal(forks: ForkServer, chat: Path, request: pytest.FixtureRequest) -> Iterator[Pty]:
    talk = Pty(forks, chat, request.param)
    yield talk
    os.close(talk.fd)


@pytest.mark.parametrize("terminal", ["answer"], indirect=True)
def test_a_terminal_whose_answer_is_stopped(terminal: Pty):
    terminal.expect("> ")
    terminal.expect("/exit or Ctrl-D to leave", pressing=True)
    terminal.expect("> ")
    terminal.say("the cat")
    terminal.expect("<here>")
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
def test_a_terminal_whose_pass_is_stopped(terminal: Pty):
    terminal.expect("> ")
    terminal.say("the cat")
    terminal.expect("<here>")
    terminal.interrupt()
    terminal.expect("(cancelled: the message was not added)")
    terminal.expect("> ")
    terminal.say("/stats")
    terminal.expect("turns 0")
    terminal.expect("> ")  # until readline waits, the terminal would swallow a Ctrl-D
    os.write(terminal.fd, b"\x04")
    assert terminal.process.wait(60) == 0
