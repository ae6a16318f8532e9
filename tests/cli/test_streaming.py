"""Text on standard output: as it is streamed it is what all tokens decode to, in whatever encoding the output has."""

import io
import json
import sys
from pathlib import Path

import pytest
from scripted_model import EOS, byte_tokenizer, llama2_tokenizer, write_scripted
from tokenizers import decoders

FLAGS = ("--device", "cpu", "--max-gpu-mem", "100MB", "--temperature", "0", "-n", "24")
WORDS = ["▁def", "▁f", "(x):", "▁▁▁", "▁return", "▁x"]
CODE = "def f(x):\n    return x"
METASPACE = decoders.Sequence([decoders.Metaspace("▁", "always"), decoders.ByteFallback(), decoders.Fuse()])


@pytest.fixture(scope="module", params=[None, METASPACE], ids=["strip", "metaspace"])
def writes_code(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    tokenizer = llama2_tokenizer(WORDS, request.param)
    chain = tokenizer.convert_tokens_to_ids(["e", "▁def", "▁f", "(x):", "<0x0A>", "▁▁▁", "▁return", "▁x", "</s>"])
    return write_scripted(tmp_path_factory.mktemp("code"), tokenizer, chain)


def test_lines_keep_their_indentation(cli, writes_code: Path):
    flags = ("-m", writes_code, *FLAGS)
    assert cli("run", "write code", "-q", *flags).out == CODE + "\n"
    assert cli("run", "write code", "--json", *flags).json["text"] == CODE
    assert cli("chat", "-q", *flags, stdin="write code\n").out == CODE + "\n"
    assert cli("chat", "--json", *flags, stdin="write code\n").json["text"] == CODE


def test_every_token_is_shown_when_it_comes(writes_code: Path, monkeypatch: pytest.MonkeyPatch):
    import torch
    from transformers import AutoTokenizer

    from griffin_offload.cli.terminal import TextPrinter

    tokenizer, shown = AutoTokenizer.from_pretrained(writes_code), io.StringIO()
    monkeypatch.setattr(sys, "stdout", shown)
    printer = TextPrinter(tokenizer)
    printer.put(torch.tensor([[1, 5]]))
    lengths = []
    for token in tokenizer.convert_tokens_to_ids(["▁def", "▁f", "(x):", "<0xC3>", "<0xA9>"]):
        printer.put(torch.tensor([token]))
        lengths.append(len(shown.getvalue()))
    assert lengths == [3, 5, 9, 9, 10]
    printer.end()
    assert shown.getvalue() == "def f(x):é\n"


@pytest.fixture(scope="module")
def writes_letters(tmp_path_factory: pytest.TempPathFactory) -> Path:
    tokenizer = byte_tokenizer()
    return write_scripted(tmp_path_factory.mktemp("letters"), tokenizer, [*tokenizer("b 日🦊end")["input_ids"], EOS])


def writing_to(monkeypatch: pytest.MonkeyPatch, encoding: str, errors: str = "strict") -> io.BytesIO:
    """The bytes that reach a standard output of that encoding."""
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding=encoding, errors=errors, write_through=True))
    return raw


@pytest.mark.parametrize(
    ("encoding", "letters"),
    [
        ("utf-8", "日🦊"),
        ("utf-16-le", "日🦊"),
        ("cp932", "日\\U0001f98a"),  # a Japanese Windows has the first and not the second
        ("cp1252", "\\u65e5\\U0001f98a"),
        *(
            pytest.param(encoding, "\\u65e5\\U0001f98a", marks=pytest.mark.slow)
            for encoding in ("ascii", "latin-1", "cp437", "koi8-r")
        ),
    ],
)
def test_letters_that_the_output_lacks(cli, writes_letters: Path, monkeypatch, encoding: str, letters: str):
    """Redirected on Windows, or under a locale of another age: written as Python writes them, and nothing is lost."""
    flags = ("-m", writes_letters, *FLAGS, "-q")
    for command, given in ((("run", "b"), None), (("chat",), "b\nb\n")):
        raw = writing_to(monkeypatch, encoding)
        assert cli(*command, *flags, stdin=given).code == 0
        assert raw.getvalue().decode(encoding) == f" {letters}end\n" * (1 if given is None else 2)


@pytest.mark.parametrize(
    ("errors", "shown"),
    [("replace", " ??end\n"), ("ignore", " end\n"), ("surrogateescape", " \\u65e5\\U0001f98aend\n")],
)
def test_what_somebody_asked_for_letters_that_lack_is_kept(cli, writes_letters: Path, monkeypatch, errors, shown: str):
    """PYTHONIOENCODING=ascii:replace. Python sets the last one by itself, for C and POSIX locales."""
    raw = writing_to(monkeypatch, "ascii", errors)
    assert cli("run", "b", "-m", writes_letters, *FLAGS, "-q").code == 0
    assert raw.getvalue().decode() == shown


@pytest.mark.parametrize("command", [("run", "b"), ("chat",)])
def test_json_needs_no_letters(cli, writes_letters: Path, monkeypatch, command: tuple[str, ...]):
    raw = writing_to(monkeypatch, "ascii")
    assert cli(*command, "-m", writes_letters, *FLAGS, "--json", stdin="b\n").code == 0
    assert json.loads(raw.getvalue())["text"] == " 日🦊end"


def test_an_answer_that_ends_inside_a_letter(cli, writes_letters: Path, monkeypatch):
    """-n 2 leaves a space and the first byte of three: nothing of these bytes can be shown, in no encoding."""
    flags = list(FLAGS)
    flags[flags.index("-n") + 1] = "2"
    whole = cli("run", "b", "-m", writes_letters, *flags, "--json").json["text"]
    for encoding in ("utf-8", "ascii"):
        raw = writing_to(monkeypatch, encoding)
        assert cli("run", "b", "-m", writes_letters, *flags, "-q").code == 0
        shown = raw.getvalue().decode(encoding)
        assert shown == whole.encode(encoding, "backslashreplace").decode(encoding) + "\n"
