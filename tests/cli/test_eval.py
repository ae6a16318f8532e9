"""`griffin-offload eval ppl`: through the command line."""

from pathlib import Path

import pytest

KEYS = (
    "selection density prompt_tokens generate_tokens windows ppl_full ppl kl top1 activation_kept".split()  # noqa: SIM905
)


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "a text.txt"
    document = "the cat sat on the mat and thought of another river while nothing was left in their boats "
    path.write_text("\n<|endoftext|>\n".join([document * 2, "short", document * 3]))
    return path


def test_rows_of_all_variants_and_sizes(cli, llama: Path, text: Path):
    outcome = cli(
        "eval", "ppl", "-m", llama, "--device", "cpu", "--max-mem", "1GB", "--text", text, "--json", "--windows", 2,
        "--prompt-tokens", "8,16", "--generate-tokens", 12, "--density", "1,0.5", "--selection", "topk,random",
    )  # fmt: skip
    assert outcome.code == 0, outcome
    rows = outcome.json
    assert [list(row) for row in rows] == [KEYS] * 8
    assert [(row["selection"], row["density"], row["prompt_tokens"]) for row in rows[:5]] == [
        ("topk", 1.0, 8),
        ("topk", 0.5, 8),
        ("random", 1.0, 8),
        ("random", 0.5, 8),
        ("topk", 1.0, 16),
    ]
    for row in rows:
        assert (row["windows"], row["generate_tokens"]) == (2, 12)
        if row["density"] == 1:
            assert row["ppl"] == pytest.approx(row["ppl_full"])
            assert (row["top1"], row["activation_kept"]) == (1, pytest.approx(1))
        else:
            assert row["kl"] > 0
            assert 0 < row["activation_kept"] < 1


def test_the_table(cli, llama: Path, text: Path):
    outcome = cli(
        "eval", "ppl", "-m", llama, "--max-mem", "1GB", "--device", "cpu", "--text", text, "--windows", 2,
        "--prompt-tokens", 8, "--generate-tokens", 8, "--window-start", "documents", "--density", 0.5,
    )  # fmt: skip
    assert outcome.code == 0, outcome
    lines = outcome.out.splitlines()
    assert lines[0].split()[:4] == ["selection", "density", "prompt", "generate"]
    assert lines[1].split()[:4] == ["topk", "0.5", "8", "8"]
    assert lines[-1] == "2 windows"


def test_bad_input(cli, llama: Path, text: Path, tmp_path: Path):
    def refuses(words: str, *options: object, file: Path = text) -> None:
        cli.refuses(
            2, words, "eval", "ppl", "-m", llama, "--device", "cpu", "--max-mem", "1GB", "--text", file, *options
        )

    sizes = ("--prompt-tokens", 8, "--generate-tokens", 8)
    refuses("text has .* tokens, a window 480", "--prompt-tokens", 470, "--generate-tokens", 10)
    refuses("2 of 3 documents have 16 tokens, 5 windows", *sizes, "--window-start", "documents", "--windows", 5)
    refuses("places for a window", *sizes, "--windows", 100000)
    refuses("cannot read the text", file=tmp_path / "absent")
    (tmp_path / "latin").write_bytes(b"\xff\xfe")
    refuses("cannot read the text", file=tmp_path / "latin")
    refuses("no selection 'best'", "--selection", "topk,best")
    refuses("density is 1.5", "--density", "0.5,1.5")
    refuses("cannot read the densities", "--density", "half")
    refuses("1 or more", "--windows", 0)
    cli.refuses_usage("invalid", "eval", "ppl", "--text", text, "--prompt-tokens", "x")
    cli.refuses_usage("required", "eval", "ppl")
