"""Text on standard output: as it is streamed it is what all tokens decode to, in whatever encoding the output has."""

import io
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

    from griffin_offload.cli.prompt import TextPrinter

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
def writes_japanese(tmp_path_factory: pytest.TempPathFactory) -> Path:
    tokenizer = byte_tokenizer()
    return write_scripted(tmp_path_factory.mktemp("letters"), tokenizer, [*tokenizer("b 日end")["input_ids"], EOS])


@pytest.mark.parametrize(("encoding", "letter"), [("cp1252", "\\u65e5"), ("ascii", "\\u65e5"), ("utf-8", "日")])
def test_letters_that_the_output_lacks(cli, writes_japanese: Path, monkeypatch, encoding: str, letter: str):
    """Redirected on Windows, or under a locale of another age: written as Python writes them, and nothing is lost."""
    flags = ("-m", writes_japanese, *FLAGS, "-q")
    for command, given in ((("run", "b"), None), (("chat",), "b\nb\n")):
        raw = io.BytesIO()
        monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding=encoding, write_through=True))
        assert cli(*command, *flags, stdin=given).code == 0
        assert raw.getvalue().decode(encoding) == f" {letter}end\n" * (1 if given is None else 2)
