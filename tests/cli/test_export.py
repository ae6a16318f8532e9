"""`griffin-offload export`: prompts in, a checkpoint and its card out."""

import json
import sys
from pathlib import Path

import pytest

from griffin_offload.engine import export

OPTIONS = ("--device", "cpu", "--max-mem", "1GB")
TEXTS = ["the cat sat", "on a private river", "she was there", "with all of them", "a river", "the cat", "she", "he"]


def written(path: Path, chats: bool = False) -> Path:
    rows = [{"messages": [{"role": "user", "content": text}]} if chats else {"prompt": text} for text in TEXTS]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_it_says_what_it_wrote_and_what_that_costs(cli, llama: Path, tmp_path: Path):
    out = tmp_path / "out"
    outcome = cli("export", out, "--prompts", written(tmp_path / "p.jsonl"), "-m", llama, *OPTIONS, "--json")
    found = outcome.json
    assert (outcome.code, found["prompts"], found["directory"]) == (0, 8, str(out))
    assert found["written_bytes"] < found["read_bytes"]
    assert 0 < found["activation_kept_heldout"] < found["activation_kept"] < 1
    assert found["kl"] > 0
    card = (out / "README.md").read_text()
    assert f"with {found['neurons']} of {found['of_neurons']} feed-forward neurons" in card
    assert str(tmp_path) not in card
    assert f"-m {llama.name} --prompts FILE --density 0.5 --selection topk --to unquantized\n" in card
    assert cli("run", "-m", out, "the cat", "-n", 4, *OPTIONS).code == 0
    plan = cli("plan", "-m", out, *OPTIONS, "--json").json
    assert plan["density"] == 1


@pytest.mark.slow
@pytest.mark.parametrize("form", ["unquantized", "gguf"])
def test_it_goes_on_where_only_its_card_is_lacking(
    cli, llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: str
):
    options = ("--prompts", written(tmp_path / "p.jsonl"), "-m", llama, *OPTIONS, "--to", form)
    cli("export", tmp_path / "whole" / "out", *options)
    with monkeypatch.context() as patch:

        def interrupted(*_: object) -> None:
            raise KeyboardInterrupt

        patch.setattr(export, "measured", interrupted)
        assert cli("export", tmp_path / "out", *options).code == 130
    cli.refuses(2, "another model, form or choice", "export", tmp_path / "out", *options, "--selection", "magnitude")
    assert not (tmp_path / "out" / "README.md").exists()
    assert cli("export", tmp_path / "out", *options).code == 0
    files, whole = (sorted(path.iterdir()) for path in (tmp_path / "out", tmp_path / "whole" / "out"))
    assert [(file.name, file.read_bytes()) for file in files] == [(file.name, file.read_bytes()) for file in whole]
    cli.refuses(2, "exists already", "export", tmp_path / "out", *options)


@pytest.mark.slow
def test_refit(cli, llama: Path, tmp_path: Path):
    command = ("--prompts", written(tmp_path / "p.jsonl"), "-m", llama, *OPTIONS, "--json")
    plain, found = (cli("export", tmp_path / n, *command, *more).json for n, more in (("a", ()), ("b", ["--refit"])))
    assert (plain["refit"], found["refit"]) == (False, True)
    assert (found["activation_kept"], found["written_bytes"]) == (plain["activation_kept"], plain["written_bytes"])
    # Every fourth text is held out; the others are what the neurons are fit on.
    assert found["tokens"] < found["neurons"]
    said = cli("export", tmp_path / "c", *command[:-1], "--refit").err
    assert f"refit on {found['tokens']} tokens, fewer than the {found['neurons']} neurons that stay" in said
    assert found["kl"] != plain["kl"]
    card = (tmp_path / "b" / "README.md").read_text()
    assert "make up for the other neurons' on these prompts" in card
    assert "--to unquantized --refit\n" in card


def test_places_that_cannot_be_written_are_named_before_prompts_pass(cli, llama: Path, tmp_path: Path):
    (tmp_path / "file").touch()
    command = ("--prompts", written(tmp_path / "p.jsonl"), "-m", llama, *OPTIONS)
    outs = (Path("/proc/none/out"), tmp_path / "file" / "out")
    for out in outs[not sys.platform.startswith("linux") :]:
        cli.refuses(2, f"{out} cannot be written", "export", out, *command)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "p.jsonl"]


def test_texts_chats_and_few_prompts(cli, llama: Path, chat: Path, tmp_path: Path):
    (tmp_path / "p.txt").write_text("the cat sat<|endoftext|>on a river")
    few = ("--prompts", tmp_path / "p.txt", "-m", llama, *OPTIONS)
    outcome = cli("export", tmp_path / "a", *few, "--to", "gguf-q8_0", "--density", 0.4)
    assert outcome.code == 0
    assert "neurons rounded down, as gguf-q8_0 is written in whole blocks" in outcome.err
    assert "too few prompts to hold some out" in outcome.err
    assert "--density 0.4 --selection topk --to gguf-q8_0" in (tmp_path / "a" / "README.md").read_text()
    assert cli("run", "-m", tmp_path / "a", "the cat", "-n", 4, *OPTIONS).code == 0
    command = ("export", tmp_path / "b", "--prompts", written(tmp_path / "p.jsonl", chats=True), "--system", "be brief")
    assert cli(*command, "-m", chat, *OPTIONS).code == 0
    cli.refuses(2, "--system needs a chat template", *command[:1], tmp_path / "c", *command[2:], "-m", llama, *OPTIONS)


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ("{", "line 1 is not JSON"),
        ("3", "prompt 1 has neither"),
        ('{"messages": []}', "neither"),
        ("", "no prompt"),
        ('{"prompt": "a"}\n{"prompt": " \\n"}', "prompt 2 is empty"),
    ],
)
def test_files_without_prompts(cli, llama: Path, tmp_path: Path, row: str, words: str):
    (tmp_path / "p.jsonl").write_text(row)
    cli.refuses(2, words, "export", tmp_path / "out", "--prompts", tmp_path / "p.jsonl", "-m", llama, *OPTIONS)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("chats", [False, True])
def test_json_lines_by_another_name_are_no_text(cli, llama: Path, tmp_path: Path, chats: bool):
    file = written(tmp_path / "p.json", chats)
    words = "p.json holds lines of JSON, and would be read as text: name it .jsonl"
    cli.refuses(2, words, "export", tmp_path / "out", "--prompts", file, "-m", llama, *OPTIONS)
    assert not (tmp_path / "out").exists()


def test_its_memory_does_not_grow_with_the_density(cli, llama: Path, tmp_path: Path):
    """Every layer passes, and none stays: more neurons than the budget can hold are kept, and measured."""
    budget = ("--device", "cpu", "--max-mem", "310kB")
    cli.refuses(3, "needs .* budget 310.0 kB", "run", "-m", llama, "the cat", *budget, "--density", 0.9)
    command = ("--prompts", written(tmp_path / "p.jsonl"), "-m", llama, *budget, "--density", 0.9, "--json")
    assert cli("export", tmp_path / "out", *command).json["kl"] > 0


@pytest.mark.parametrize("density", ["0", "1", "50", "50%", "nan", "0.5,0.5,0.5", "auto"])
def test_densities_that_are_none(cli, llama: Path, tmp_path: Path, density: str):
    command = ("export", tmp_path / "out", "--prompts", written(tmp_path / "p.jsonl"), "--density", density)
    cli.refuses(2, "one number, more than 0 and less than 1", *command, "-m", llama, *OPTIONS)
