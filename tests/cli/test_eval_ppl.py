"""`griffin-offload eval ppl`: through the command line."""

import json
import socket
from pathlib import Path

import pytest
from fork_server import ForkServer
from tiny_models import BOS

from griffin_offload.cli.main import build_parser
from griffin_offload.evaluation.config import EvalConfig
from griffin_offload.evaluation.samples import take_windows

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


@pytest.mark.slow
def test_processes_split_the_windows(cli, forks: ForkServer, llama: Path, text: Path):
    """One of them has none. With the variables that torchrun gives each; it starts those of eval tasks itself."""
    options = ("-m", llama, "--device", "cpu", "--max-mem", "1GB", "--text", text, "--json", "--windows", 3)
    sizes = ("--prompt-tokens", "8,16", "--generate-tokens", 12, "--density", "0.5,0.25")
    command = ("eval", "ppl", *options, *sizes)
    with socket.create_server(("127.0.0.1", 0)) as free:
        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    place |= {"WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "4"}
    ranks = [
        forks.start("-m", "griffin_offload", *command, **place, RANK=str(rank), LOCAL_RANK=str(rank))
        for rank in range(4)
    ]
    for rank, started in enumerate(ranks):
        assert started.wait() == 0, started.err
        assert bool(started.out) == (rank == 0)
    for row, one in zip(json.loads(ranks[0].out), cli(*command).json, strict=True):
        assert row == {key: value if type(value) is str else pytest.approx(value) for key, value in one.items()}


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
    (tmp_path / "latin").write_bytes(b"caf\xe9")
    refuses("cannot read the text", file=tmp_path / "latin")
    refuses("no selection 'best'", "--selection", "topk,best")
    refuses("density is 1.5", "--density", "0.5,1.5")
    refuses("cannot read the densities", "--density", "half")
    refuses("1 or more", "--windows", 0)
    cli.refuses(
        2, "--prompt-tokens: .x. is no list of whole numbers", "eval", "ppl", "--text", text, "--prompt-tokens", "x"
    )
    cli.refuses_usage("required", "eval", "ppl")


def test_defaults_are_those_of_the_dataclass(cli, llama: Path, text: Path, monkeypatch: pytest.MonkeyPatch):
    parsed, config = build_parser().parse_args(["eval", "ppl", "--text", "x"]), EvalConfig()
    assert (parsed.prompt_tokens, parsed.generate_tokens) == ([config.prompt_tokens], [config.generate_tokens])
    seen = []
    monkeypatch.setattr("griffin_offload.evaluation.perplexity.measure", lambda *given: seen.append(given[3]) or [])
    sizes = ("--prompt-tokens", 8, "--generate-tokens", 8, "--json")
    assert cli("eval", "ppl", "-m", llama, "--device", "cpu", "--text", text, *sizes).code == 0
    assert [variant.density for variant in seen[0]] == list(config.densities)
    assert (parsed.selection, parsed.windows) == (config.selection, config.windows)
    assert parsed.window_start == config.window_start


def test_a_model_without_tokenizer_is_refused(cli, copy: Path, text: Path):
    for path in copy.glob("tokenizer*"):
        path.unlink()
    cli.refuses(4, "no tokenizer files", "eval", "ppl", "-m", copy, "--device", "cpu", "--text", text)


def test_a_budget_that_is_too_small(cli, llama: Path, text: Path):
    sizes = ("--prompt-tokens", 8, "--generate-tokens", 8, "--windows", 2)
    cli.refuses(3, "needs .* budget 300", "eval", "ppl", "-m", llama, "--max-mem", "300kB", "--device", "cpu",
                "--text", text, *sizes)  # fmt: skip


def test_windows():
    documents = [list(range(100, 110)), [1, 2], list(range(200, 220))]
    found = take_windows(documents, 6, 3, "even")
    text = [token for ids in documents for token in ids]
    assert [ids.tolist() for ids in found] == [text[:6], text[13:19], text[-6:]]
    starts = take_windows(documents, 6, 2, "documents", first=[7])
    assert [ids.tolist() for ids in starts] == [[7, 100, 101, 102, 103, 104], [7, 200, 201, 202, 203, 204]]


def test_gemma_windows_begin_with_its_first_token(cli, checkpoints, text: Path, monkeypatch: pytest.MonkeyPatch):
    """Without BOS a trained Gemma is lost; other models get none."""
    seen = {}
    monkeypatch.setattr(
        "griffin_offload.evaluation.perplexity.measure",
        lambda model, windows, *_: seen.setdefault(model.model.config.model_type, windows) and [],
    )
    for name in ("gemma", "llama2"):
        sizes = ("--prompt-tokens", 8, "--generate-tokens", 8, "--windows", 2, "--json")
        assert cli("eval", "ppl", "-m", checkpoints(name), "--device", "cpu", "--text", text, *sizes).code == 0
    assert all(ids[0] == BOS and ids.numel() == 16 for ids in seen["gemma"])
    assert not any(BOS in ids for ids in seen["llama"])


def test_precision_as_convert_makes_it(cli, llama: Path, text: Path, tmp_path: Path):
    """The figures of a converted copy, without one that stays."""
    options = ("--device", "cpu", "--max-mem", "1GB", "--text", text, "--json", "--windows", 2, "--density", "0.5")
    sizes = ("--prompt-tokens", 8, "--generate-tokens", 12)
    made = tmp_path / "made"
    assert cli("convert", "-m", llama, made, "--quantize", "int8", "-q").code == 0
    expected = cli("eval", "ppl", "-m", made, *options, *sizes)
    found = cli("eval", "ppl", "-m", llama, "--quantize", "int8", *options, *sizes)
    assert (found.code, found.json) == (0, expected.json)
    assert cli("eval", "ppl", "-m", made, "--quantize", "int8", *options, *sizes).json == expected.json
    assert cli("eval", "ppl", "-m", llama, "--quantize", "none", *options, *sizes).json != expected.json
    cli.refuses(2, "was converted to int8 already", "eval", "ppl", "-m", made, "--quantize", "int4", *options, *sizes)
