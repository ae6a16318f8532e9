"""`griffin-offload eval summaries`: resumed, scored, refused."""

import json
import os
import signal
import time
from itertools import pairwise
from pathlib import Path

import pytest

from griffin_offload.cli import eval_summaries
from griffin_offload.cli.main import build_parser
from griffin_offload.demo import demo_directory
from griffin_offload.evaluation.config import SummariesConfig
from griffin_offload.evaluation.summaries import rouge

WORDS = "the cat sat on a mat and thought of rivers boats birds stones trees houses doors windows".split()  # noqa: SIM905


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "articles of mine.jsonl"
    rows = [
        {"article": " ".join(WORDS[i : i + 9] * (1 + i)), "summary_gt": " ".join(WORDS[i : i + 4])} for i in range(5)
    ]
    rows.append({"article": " ".join(WORDS * 60), "summary_gt": "too long for the model"})
    path.write_text("\n".join(map(json.dumps, rows)) + "\n")
    return path


def _command(llama: Path, data: Path, *options: object) -> list[object]:
    common = ("--device", "cpu", "--max-mem", "1GB", "-n", 12, "--density", "1,0.5", "--json")
    return ["eval", "summaries", "-m", llama, "--data", data, *common, *options]


def _rows(path: Path) -> list[dict[str, object]]:
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    return [{name: value for name, value in row.items() if name != "seconds"} for row in rows]


def test_results_and_going_on(cli, llama: Path, data: Path, tmp_path: Path):
    whole, parts = tmp_path / "whole.jsonl", tmp_path / "parts.jsonl"
    outcome = cli(*_command(llama, data, "--output", whole))
    assert outcome.code == 0, outcome
    results = outcome.json
    assert [(r["selection"], r["density"], r["samples"], r["skipped"]) for r in results] == [
        ("topk", 1.0, 5, 1),
        ("topk", 0.5, 5, 1),
    ]
    assert results[0]["activation_kept"] == 1
    assert 0 < results[1]["activation_kept"] < 1
    rows = _rows(whole)[1:]
    for result in results:
        own = [row for row in rows if row["density"] == result["density"]]
        assert result["rouge1"] == pytest.approx(sum(row["rouge1"] for row in own) / 5)

    assert cli(*_command(llama, data, "--output", parts, "--samples", 2)).code == 0
    with parts.open("a") as file:
        file.write('{"selection": "topk", "dens')  # torn by a crash
    again = cli(*_command(llama, data, "--output", parts))
    assert again.code == 0, again
    key = lambda row: (row["density"], row["sample"])  # noqa: E731
    assert sorted(_rows(parts)[1:], key=key) == sorted(rows, key=key)
    before = parts.read_bytes()
    assert cli(*_command(llama, data, "--output", parts)).json == again.json
    assert parts.read_bytes() == before  # nothing was left to do


@pytest.mark.slow
def test_a_killed_run_goes_on(cli, forks, llama: Path, data: Path, tmp_path: Path):
    expected, killed = tmp_path / "expected.jsonl", tmp_path / "killed.jsonl"
    assert cli(*_command(llama, data, "--output", expected)).code == 0
    running = forks.start("-m", "griffin_offload", *_command(llama, data, "--output", killed))
    end = time.monotonic() + 120
    while time.monotonic() < end and not (killed.exists() and killed.read_bytes().count(b"\n") > 2):
        time.sleep(0.01)
    running.send_signal(signal.SIGKILL)
    running.wait()
    assert killed.read_bytes().count(b"\n") > 2
    assert cli(*_command(llama, data, "--output", killed)).code == 0
    assert _rows(killed) == _rows(expected)


def test_bad_input(cli, llama: Path, data: Path, tmp_path: Path):
    def refuses(words: str, content: str, *options: object) -> None:
        path = tmp_path / "bad.jsonl"
        path.write_text(content)
        cli.refuses(2, words, *_command(llama, path, *options))

    good = data.read_text().splitlines()[0]
    refuses("line 2 is not JSON", f"{good}\n{{broken\n")
    refuses("document 2 lacks a text article or summary_gt", f'{good}\n{{"article": "x"}}\n')
    refuses("document 1 lacks", '{"article": 3, "summary_gt": "x"}\n')
    refuses("it is empty", "\n")
    refuses("none of its 1 prompts has at most", data.read_text().splitlines()[-1])
    refuses("context .* no prompt is left", good, "-n", 100000)
    refuses("1 or more", good, "--samples", 0)
    refuses("temperature", good, "--temperature", -1)
    cli.refuses(2, "cannot read", *_command(llama, tmp_path / "absent"))
    refuses("line 1 is not JSON: .* surrogates", '{"article": "\\ud800", "summary_gt": "x"}')
    refuses("line 2 is not JSON", f"{good}\n" + "[" * 100000)
    output = tmp_path / "out.jsonl"
    for text in ("a text of mine\n", "one line", "two\nlines", "\n", "[1]\n", "{}\n"):
        output.write_text(text)
        cli.refuses(2, "holds no summaries", *_command(llama, data, "--output", output))
        assert output.read_text() == text  # nothing is taken off what is not ours
    cli.refuses(2, "cannot be written", *_command(llama, data, "--output", tmp_path / "absent" / "out"))
    assert cli(*_command(llama, data, "--output", tmp_path / "made", "--samples", 1)).code == 0
    cli.refuses(
        2, "was made with seed 42, now it is 7", *_command(llama, data, "--output", tmp_path / "made", "--seed", 7)
    )
    with (tmp_path / "made").open("a") as file:
        file.write("{}\n")
    cli.refuses(2, "line 4 is damaged", *_command(llama, data, "--output", tmp_path / "made"))


def test_a_first_line_that_was_not_finished(cli, llama: Path, data: Path, tmp_path: Path):
    output = tmp_path / "out.jsonl"
    command = _command(llama, data, "--output", output, "--samples", 1)
    expected = cli(*command).json
    whole = output.read_text()
    output.write_text(whole[:40])
    assert [row["rouge1"] for row in cli(*command).json] == [row["rouge1"] for row in expected]
    assert output.read_text().splitlines()[0] == whole.splitlines()[0]


def test_a_full_disk_keeps_what_is_finished(
    cli, llama: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    output, calls = tmp_path / "out.jsonl", []

    def fsync(descriptor: int) -> None:
        calls.append(descriptor)
        if len(calls) == 4:  # the settings' is the first
            raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fsync)
        outcome = cli(*_command(llama, data, "--output", output))
    assert (outcome.code, outcome.out) == (1, "")
    assert "No space left on device" in outcome.err
    kept = output.read_text()
    assert cli(*_command(llama, data, "--output", output)).code == 0
    assert output.read_text().startswith(kept)


def test_experts_that_are_left_out_write_no_summary(cli, checkpoints, data: Path, tmp_path: Path):
    """Missing ones would be read, and every density would be the full model."""
    output = tmp_path / "rows.jsonl"
    assert cli(*_command(checkpoints("qwen3_moe"), data, "--density", "1,0.25", "--output", output)).code == 0
    rows = _rows(output)[1:]
    full, routed = ([row["summary"] for row in rows if row["density"] == density] for density in (1, 0.25))
    assert len(full) == len(routed) == 5
    assert full != routed


def test_the_full_model_is_one_whatever_the_selection(cli, llama: Path, data: Path):
    outcome = cli(*_command(llama, data, "--samples", 1, "--selection", "magnitude,topk"))
    variants = [(row["selection"], row["density"]) for row in outcome.json]
    assert variants == [("topk", 1), ("magnitude", 0.5), ("topk", 0.5)]


def test_finished_summaries_are_kept_when_a_variant_does_not_fit(cli, data: Path, tmp_path: Path):
    output = tmp_path / "out.jsonl"
    command = _command(demo_directory(), data, "--output", output, "--max-mem", "6MB", "--samples", 1)
    outcome = cli(*command)
    assert outcome.code == 3, outcome
    assert [result["samples"] for result in outcome.json] == [0, 1], outcome
    assert "needs" in outcome.json[0]["does_not_fit"]
    assert "full: needs" in outcome.err


def test_without_the_extra(cli, llama: Path, data: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(eval_summaries, "find_spec", lambda name: None)
    cli.refuses(1, r"pip install .griffin-offload\[eval\]", *_command(llama, data))


def test_defaults_are_the_references():
    parsed, config = build_parser().parse_args(["eval", "summaries", "--data", "x"]), SummariesConfig()
    for name in ("samples", "max_new_tokens", "temperature", "top_p", "seed", "end", "selection"):
        assert getattr(parsed, name) == getattr(config, name)
    assert (config.samples, config.max_new_tokens, config.temperature, config.seed) == (1000, 128, 0.3, 42)


def _f1(found: list[object], wanted: list[object]) -> float:
    common = sum(min(found.count(x), wanted.count(x)) for x in set(found))
    return 200 * common / (len(found) + len(wanted)) if common else 0.0


def _longest(a: list[str], b: list[str]) -> int:
    if not a or not b:
        return 0
    return 1 + _longest(a[1:], b[1:]) if a[0] == b[0] else max(_longest(a[1:], b), _longest(a, b[1:]))


@pytest.mark.parametrize(
    ("summary", "reference"),
    [
        ("the cat sat on the mat", "a cat sat on a mat"),
        ("one two three", "three two one"),
        ("Rivers, boats!", "rivers and boats"),
        ("nothing alike", "at all"),
        ("x y ### z", "x y z"),
        ("### everything is cut", "everything"),
    ],
)
def test_rouge_is_its_definition(summary: str, reference: str):
    clean = lambda text: "".join(c if c.isalnum() else " " for c in text.lower()).split()  # noqa: E731
    a, b = clean(summary.split("###")[0]), clean(reference)
    pairs = [list(pairwise(words)) for words in (a, b)]
    common = _longest(a, b)
    expected = {
        "rouge1": _f1(a, b),
        "rouge2": _f1(*pairs),
        "rougeL": 200 * common / (len(a) + len(b)) if common else 0.0,
    }
    assert rouge(summary, reference, "###") == pytest.approx(expected)
