"""Prompts as files and editors give them: byte order marks, encodings, and a beginning of sequence already written."""

import codecs
from pathlib import Path

import pytest
from tiny_models import CHAT_TEMPLATE, write_tokenizer

TEXT = "the cat, naïve ✓\nand the mat"
RUN = ("-n", "3", "--temperature", "0", "--json")
ENCODINGS = [
    TEXT.encode(),
    codecs.BOM_UTF8 + TEXT.encode(),
    TEXT.encode("utf-16"),
    codecs.BOM_UTF16_BE + TEXT.encode("utf-16-be"),
    TEXT.encode("utf-32"),
    codecs.BOM_UTF8 + TEXT.replace("\n", "\r\n").encode(),
]


def answer(outcome) -> tuple[str, int]:
    return outcome.json["text"], outcome.json["prompt_tokens"]


@pytest.mark.parametrize("content", ENCODINGS, ids=["plain", "utf-8", "utf-16", "utf-16-be", "utf-32", "dos"])
def test_byte_order_marks_are_no_tokens(cli, llama: Path, tmp_path: Path, content: bytes):
    expected = answer(cli("run", TEXT, *RUN, "-m", llama))
    (tmp_path / "prompt.txt").write_bytes(content)
    assert answer(cli("run", "--prompt-file", tmp_path / "prompt.txt", *RUN, "-m", llama)) == expected
    assert answer(cli("run", "-", *RUN, "-m", llama, stdin=content)) == expected


def test_a_mark_in_what_is_piped_into_chat(cli, llama: Path):
    flags = ("chat", "-q", *RUN[:4], "-m", llama)
    assert cli(*flags, stdin=codecs.BOM_UTF8 + b"the cat\n").out == cli(*flags, stdin="the cat\n").out


@pytest.mark.parametrize("content", [TEXT.encode("utf-16-le"), TEXT.encode("cp1252", "ignore"), b"\xff\xfe\x00"])
def test_what_is_no_text_is_named(cli, llama: Path, tmp_path: Path, content: bytes):
    (tmp_path / "prompt.txt").write_bytes(content)
    cli.refuses(2, "prompt.txt: .*(UTF-16|utf-8|utf-16)", "run", "--prompt-file", tmp_path / "prompt.txt", "-m", llama)
    cli.refuses(2, "standard input is not UTF-8", "run", "-", "-m", llama, stdin=content)


@pytest.fixture(scope="module")
def begins(chat: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose tokenizer begins every text with its BOS token, as Gemma's and Llama's do."""
    import shutil

    from tokenizers.processors import TemplateProcessing

    directory = tmp_path_factory.mktemp("begins") / "model"
    shutil.copytree(chat, directory)
    tokenizer = write_tokenizer(directory, CHAT_TEMPLATE)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing("<s> $A", "<s> $A <s> $B", [("<s>", 1)])
    tokenizer.save_pretrained(directory)
    return directory


@pytest.mark.parametrize("written", ["<s>", "<s><s>", "<s> "])
def test_a_text_begins_once(cli, begins: Path, written: str):
    """With two of them some models answer otherwise, and nobody has asked for that."""
    rest = written.removeprefix("<s><s>").removeprefix("<s>")
    flags = (*RUN, "-m", begins, "--raw")
    expected = answer(cli("run", rest + "the cat", *flags))
    assert answer(cli("run", written + "the cat", *flags)) == expected
    spoken = cli("chat", "-q", "--raw", *RUN[:4], "-m", begins, stdin=f"{written}the cat\n").out
    assert spoken == cli("chat", "-q", "--raw", *RUN[:4], "-m", begins, stdin=f"{rest}the cat\n").out


def test_a_template_that_writes_the_beginning(cli, begins: Path, chat: Path):
    assert answer(cli("run", "the cat", *RUN, "-m", begins)) == answer(cli("run", "the cat", *RUN, "-m", chat))


def test_a_beginning_in_the_middle_stays(cli, begins: Path):
    flags = (*RUN, "-m", begins, "--raw")
    assert cli("run", "a<s><s>b", *flags).json["prompt_tokens"] == cli("run", "ab", *flags).json["prompt_tokens"] + 2
