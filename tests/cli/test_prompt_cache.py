"""`run --prompt-cache FILE`: saved where there is no file, used where this prompt begins with it, never overwritten."""

import json
import os
import subprocess
from pathlib import Path

import pytest

from griffin_offload.engine.model import GriffinModel
from griffin_offload.errors import SavedContextError

PROMPT = "the cat sat on the mat and thought of another river"
OPTIONS = ("--device", "cpu", "--max-mem", "100MB", "--density", 0.5, "-n", 8, "--temperature", 0, "--json")


def test_a_prompt_is_saved_and_started_from(cli, llama: Path, tmp_path: Path):
    file = tmp_path / "a b.ctx"
    without = cli("run", PROMPT, "-m", llama, *OPTIONS).json
    first = cli("run", PROMPT, "-m", llama, *OPTIONS, "--prompt-cache", file).json
    written = file.read_bytes()
    again = cli("run", PROMPT, "-m", llama, *OPTIONS, "--prompt-cache", file).json
    assert without["text"] == first["text"] == again["text"]
    assert (first["cached_prompt_tokens"], again["prompt_tokens"]) == (0, 0)
    assert again["cached_prompt_tokens"] == first["prompt_tokens"]
    longer = cli("run", PROMPT + " while nothing", "-m", llama, *OPTIONS, "--prompt-cache", file).json
    assert longer["cached_prompt_tokens"] == first["prompt_tokens"]
    assert 0 < longer["prompt_tokens"] < first["prompt_tokens"]
    assert file.read_bytes() == written


def test_the_plan_follows_the_file(cli, llama: Path, tmp_path: Path):
    """Density, precision and context of the saved prompt, where the user names none."""
    file = tmp_path / "a.ctx"
    options = ("--device", "cpu", "-n", 4, "--temperature", 0, "--json", "--prompt-cache", file)
    cli("run", PROMPT, "-m", llama, "--max-mem", "100MB", "--density", 0.75, "--quantize", "int8", *options)
    again = cli("run", PROMPT, "-m", llama, "--max-mem", "90MB", *options).json
    assert (again["density"], again["precision"]) == (0.75, "int8")
    cli.refuses(4, "saved with another density", "run", PROMPT, "-m", llama, "--density", 0.5, *options)
    short = cli("run", "the cat", "-m", llama, "--max-mem", "90MB", *options)
    assert short.code == 0


def test_another_prompt_is_said_and_not_saved(cli, llama: Path, tmp_path: Path):
    file = tmp_path / "a.ctx"
    cli("run", PROMPT, "-m", llama, *OPTIONS, "--prompt-cache", file)
    written = file.read_bytes()
    other = cli("run", "nothing was left in their boats", "-m", llama, *OPTIONS, "--prompt-cache", file)
    assert other.code == 0
    assert "does not begin with, so it is not used: delete it" in other.err
    assert other.json["text"] == cli("run", "nothing was left in their boats", "-m", llama, *OPTIONS).json["text"]
    assert file.read_bytes() == written


def test_places_that_cannot_hold_a_file(cli, llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    for place in (tmp_path, tmp_path / "absent" / "a.ctx"):
        cli.refuses(4, "names no file", "run", PROMPT, "-m", llama, "--prompt-cache", place)
    with monkeypatch.context() as patch:
        patch.setattr(os, "access", lambda *_: False)
        cli.refuses(4, "read-only", "run", PROMPT, "-m", llama, "--prompt-cache", tmp_path / "a.ctx")
    os.mkfifo(tmp_path / "pipe")
    cli.refuses(4, "names no file", "run", PROMPT, "-m", llama, "--prompt-cache", tmp_path / "pipe")
    (tmp_path / "b.ctx").write_text("{}")
    cli.refuses(4, "truncated or damaged", "run", PROMPT, "-m", llama, "--prompt-cache", tmp_path / "b.ctx")


def test_the_answer_comes_although_saving_fails(cli, llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def full(*_: object) -> None:
        raise SavedContextError("the disk is full")

    monkeypatch.setattr(GriffinModel, "save_context", full)
    outcome = cli("run", PROMPT, "-m", llama, *OPTIONS, "--prompt-cache", tmp_path / "a.ctx")
    assert (outcome.code, outcome.err) == (4, "griffin-offload: error: the disk is full\n")
    assert outcome.json["generated_tokens"] == 8


def test_a_disk_that_fills_up(cli, llama: Path, small_disk):
    """The answer comes, the disk is as it was; a conversation's older file stays."""
    place = small_disk("12k")
    outcome = cli("run", PROMPT, "-m", llama, *OPTIONS, "--prompt-cache", place / "a.ctx")
    assert outcome.code == 4
    assert "a.ctx cannot be written" in outcome.err
    assert "No space left" in outcome.err
    assert outcome.json["generated_tokens"] == 8
    assert list(place.iterdir()) == []
    (place / "b.ctx").write_text("old")
    chat = cli("chat", "-m", llama, *OPTIONS, stdin=f"{PROMPT}\n/save {place / 'b.ctx'}\n")
    assert (chat.code, "No space left" in chat.err) == (4, True)
    assert [(file.name, file.read_text()) for file in place.iterdir()] == [("b.ctx", "old")]
    small_disk("60m")
    assert cli("run", PROMPT, "-m", llama, *OPTIONS, "--prompt-cache", place / "a.ctx").code == 0
    subprocess.run(["mount", "-o", "remount,ro", str(place)], check=True)
    assert cli("run", PROMPT, "-m", llama, *OPTIONS, "--prompt-cache", place / "a.ctx").code == 0
    cli.refuses(4, "is read-only", "run", PROMPT, "-m", llama, *OPTIONS, "--prompt-cache", place / "c.ctx")


def test_a_conversation_is_used_as_far_as_it_goes(cli, llama: Path, tmp_path: Path):
    """Of a file that a prompt leaves in the middle of its answer, the part before that is used, and nothing is said."""
    file = tmp_path / "a.ctx"
    talk = cli("chat", "-m", llama, *OPTIONS, "--ctx-size", 64, stdin=f"{PROMPT}\n/save {file}\n")
    assert talk.code == 0
    other = cli("run", PROMPT + " while", "-m", llama, *OPTIONS, "--prompt-cache", file)
    prompt_tokens = json.loads(talk.out)["report"]["prompt_tokens"]
    assert other.json["cached_prompt_tokens"] >= prompt_tokens
    assert other.err == ""


def test_exact_mode_uses_and_saves_prompts(cli, llama: Path, tmp_path: Path):
    file = tmp_path / "a.ctx"
    flags = ("--exact", "--prompt-cache", file)
    dense = cli("run", PROMPT, "-m", llama, *OPTIONS, "--density", 1).json["text"]
    for cached in (False, True):
        outcome = cli("run", PROMPT, "-m", llama, *OPTIONS, *flags).json
        assert outcome["text"] == dense
        assert bool(outcome["cached_prompt_tokens"]) == cached


@pytest.mark.slow
def test_tokens_that_the_longer_prompt_joins_are_all_that_is_lost(cli, llama: Path, tmp_path: Path):
    """Saved in the middle of a word, of which the longer prompt makes other tokens. The answer is a fresh one's."""
    joined = {"er while": (PROMPT[:-2], 0.5), "ile": (PROMPT + " wh", 1), "while": (PROMPT + " ", 0.5)}
    for more, (text, density) in joined.items():
        options = [density if option == 0.5 else option for option in OPTIONS]
        file = tmp_path / f"{more}.ctx"
        saved = cli("run", text, "-m", llama, *options, "--prompt-cache", file).json["prompt_tokens"]
        longer = cli("run", text + more, "-m", llama, *options, "--prompt-cache", file).json
        assert saved - 8 <= longer["cached_prompt_tokens"] < saved
        fresh = cli("run", text + more, "-m", llama, *options).json
        assert (longer["text"], longer["density"]) == (fresh["text"], fresh["density"])
    said = cli("run", text + more, "-m", llama, *options[:-1], "--prompt-cache", file).err
    assert f"note: {longer['cached_prompt_tokens']} of the {saved} tokens in {file} were used" in said
    assert cli("run", text + more, "-m", llama, *options[:-1], "-q", "--prompt-cache", file).err == ""


def test_another_models_file_is_named_as_that(cli, llama: Path, tmp_path: Path):
    """And no flag that nobody gave: what the file says of precision is another model's."""
    file, made = tmp_path / "a.ctx", tmp_path / "made"
    cli("run", PROMPT, "-m", llama, *OPTIONS, "--quantize", "none", "--prompt-cache", file)
    assert cli("convert", "-m", llama, made, "--quantize", "int8", "-q").code == 0
    error = cli.refuses(4, "saved with another model", "run", PROMPT, "-m", made, "-n", 2, "--prompt-cache", file)
    assert "--quantize" not in error
    chat = tmp_path / "b.ctx"
    assert cli("chat", "-m", llama, *OPTIONS, "--ctx-size", 64, stdin=f"the cat\n/save {chat}\n").code == 0
    cli.refuses(4, "saved with another model", "chat", "-m", made, "--load", chat, stdin="")
