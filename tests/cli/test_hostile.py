"""What the fuzzer (tests/robustness/fuzz) found and was built to find: each is one line and an exit code now."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from marks import mostly_slow

from griffin_offload.checkpoint import tokenizer as prompts

INDEX = "model.safetensors.index.json"
RUN, PLAN = ("run", "the cat", "-n", "2"), ("plan",)


@pytest.fixture(scope="module")
def one_child() -> None:
    """Every question to a tokenizer goes to a child: some of these do not end."""


def link_a_shard(target: str | None = None) -> Callable[[Path], object]:
    """To `target`, or to itself."""

    def harm(directory: Path) -> None:
        shard = min(directory.glob("*.safetensors"))
        shard.unlink()
        shard.symlink_to(target or shard.name)

    return harm


def name_a_shard(name: str) -> Callable[[Path], object]:
    def harm(directory: Path) -> None:
        index = json.loads((directory / INDEX).read_text())
        index["weight_map"][next(iter(index["weight_map"]))] = name
        (directory / INDEX).write_text(json.dumps(index))

    return harm


def write(name: str, text: str | bytes) -> Callable[[Path], object]:
    return lambda directory: (directory / name).write_bytes(text if isinstance(text, bytes) else text.encode())


FILES: dict[str, tuple[Callable[[Path], object], str]] = {
    "shard above": (name_a_shard("../outside.safetensors"), "outside of the checkpoint"),
    "shard far away": (name_a_shard("/etc/passwd"), "outside of the checkpoint"),
    "shard in a folder": (name_a_shard("a/b.safetensors"), "outside of the checkpoint"),
    "shard of a long name": (name_a_shard("x" * 5000), "x{300}"),
    "shard of no name": (name_a_shard(""), "outside of the checkpoint"),
    "shard with a NUL": (name_a_shard("a\0b"), "named by the index but absent"),
    "shard of half a letter": (name_a_shard("\ud800"), "named by the index but absent"),
    "shard a device": (link_a_shard("/dev/zero"), "named by the index but absent"),
    "shard a circle": (link_a_shard(), "Too many levels of symbolic links: check the name"),
    "index not UTF-8": (write(INDEX, b'{"weight_map": {"\xff": "a"}}'), "cannot be read"),
    "index without end": (write(INDEX, '{"a":' * 50_000), "cannot be read"),
    "index with a long number": (write(INDEX, '{"weight_map": %s}' % ("9" * 5000)), "cannot be read"),
    "config not UTF-8": (write("config.json", b'{"model_type": "\xff"}'), "config.json cannot be read"),
    "config without end": (write("config.json", '{"a":' * 50_000), "config.json cannot be read"),
    "config too large": (write("config.json", " " * 16_000_001), "larger than 16.0 MB"),
}


@pytest.mark.parametrize("damage", FILES)
def test_files(cli, copy: Path, damage: str):
    harm, words = FILES[damage]
    harm(copy)
    cli.refuses(4, words, *PLAN, "-m", copy)


@pytest.mark.parametrize("number", ["1e400", "NaN", "-1", "0", "0.5", "null", '"a"', "[]", "true", "9" * 400])
@pytest.mark.parametrize("key", ["hidden_size", "num_attention_heads", "num_hidden_layers", "vocab_size"])
def test_numbers_of_a_config(cli, copy: Path, key: str, number: str):
    """Refused, or where transformers has a default for nothing, planned with."""
    text = (copy / "config.json").read_text()
    raw = json.dumps(json.loads(text) | {key: "@"}).replace('"@"', number)
    (copy / "config.json").write_text(raw)
    outcome = cli("plan", "--config", copy / "config.json", "-q")
    assert outcome.code in ((0, 4) if number == "null" else (4,)), outcome
    assert outcome.err.count("\n") == (outcome.code == 4)


def test_more_neurons_than_a_list_has_room_for(cli, copy: Path, edit):
    """The planner weighs them one by one, and does not write them down before."""
    edit(copy / "config.json", intermediate_size=2**45)
    cli.refuses(3, "needs", "plan", "--config", copy / "config.json", "-q", "--max-mem", "1GB")


@pytest.mark.parametrize("precision", ["none", "int8"])
def test_weights_that_are_not_there_are_not_made_up(cli, copy: Path, made: Path, edit, precision: str):
    """transformers would fill them with random numbers first."""
    directory = copy if precision == "none" else made
    edit(directory / "config.json", vocab_size=5_000_000)
    words = r"config.json describes \d.* GB of weights, the files hold .* kB"
    cli.refuses(4, words, *RUN, "--max-mem", "8GB", "-m", directory)
    if precision == "none":
        cli.refuses(4, words, "convert", copy.with_name("out"), "--quantize", "int8", "-m", copy)


SETTINGS = [
    ("eos_token_id", "a"),
    ("eos_token_id", [[1]]),
    ("eos_token_id", 2**63),
    ("pad_token_id", 1e400),
    ("suppress_tokens", [10**6]),
    ("forced_bos_token_id", -5),
    ("temperature", "hot"),
    ("temperature", -1.0),
    ("top_k", 0.5),
    ("top_p", 7),
    ("repetition_penalty", float("nan")),
    ("num_beams", 0),
    ("max_new_tokens", [1]),
    ("do_sample", "yes"),
]


@pytest.mark.parametrize(("key", "value"), SETTINGS)
def test_generation_settings(cli, copy: Path, key: str, value: object):
    settings = {"do_sample": True} | {key: value}
    (copy / "generation_config.json").write_text(json.dumps(settings))
    cli.refuses(4, f"{key}|generation_config.json cannot be used", *RUN, "-m", copy)


def test_settings_that_many_checkpoints_have(cli, copy: Path):
    usual = {"bos_token_id": 1, "eos_token_id": [2, 7], "pad_token_id": -1, "temperature": 0.6, "top_p": 0.9}
    (copy / "generation_config.json").write_text(json.dumps(usual | {"do_sample": True, "max_length": 64}))
    assert cli(*RUN, "-q", "-m", copy).code == 0


TEMPLATES = {
    "loops": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "one long word": "{{ 'a' * 10**11 }}",
    "a power": "{{ 10 ** (10 ** 9) }}",
    "doubling": "{% set n = namespace(s='aa') %}{% for i in range(60) %}{% set n.s = n.s ~ n.s %}{% endfor %}",
    "padding": "{{ 'x'.ljust(10**12) }}",
    "recursion": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "internals": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "a command": "{{ lipsum.__globals__['os'].popen('id').read() }}",
    "a file": "{% include '/etc/passwd' %}",
}


@pytest.mark.parametrize("template", mostly_slow(TEMPLATES, 2))
def test_chat_templates(cli, copy: Path, monkeypatch: pytest.MonkeyPatch, template: str):
    monkeypatch.setattr(prompts, "LIMIT_S", 0.2)
    (copy / "chat_template.jinja").write_text(TEMPLATES[template])
    cli.refuses(4, "chat template fails, --raw turns it off: ", *RUN, "-m", copy)
    cli.refuses(4, "chat template fails", "chat", "-q", "-m", copy, stdin="hello\n")


def test_a_tokenizer_of_another_model(cli, copy: Path):
    """Ids that the embeddings do not have."""
    tokenizer = json.loads((copy / "tokenizer.json").read_text())
    tokenizer["model"]["vocab"] = {word: number + 10**6 for word, number in tokenizer["model"]["vocab"].items()}
    tokenizer["added_tokens"] = []
    (copy / "tokenizer.json").write_text(json.dumps(tokenizer))
    cli.refuses(2, "the vocabulary ends at 319: the tokenizer is of another model", *RUN, "-m", copy)


def test_a_tokenizer_that_grows_without_end(cli, copy: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(prompts, "LIMIT_S", 0.2)
    tokenizer = json.loads((copy / "tokenizer.json").read_text())
    twice = {"type": "Replace", "pattern": {"String": "t"}, "content": "tt"}
    tokenizer["normalizer"] = {"type": "Sequence", "normalizers": [twice] * 40}
    (copy / "tokenizer.json").write_text(json.dumps(tokenizer))
    cli.refuses(4, "memory|takes more than", *RUN, "-m", copy)


def test_names_do_not_reach_the_terminal_as_they_are(cli, copy: Path):
    index = json.loads((copy / INDEX).read_text())
    index["weight_map"]["\x1b]0;owned\x07\x1b[2J" + "x" * 100_000] = next(iter(index["weight_map"].values()))
    (copy / INDEX).write_text(json.dumps(index))
    line = cli.refuses(4, r"\\x1b\]0;owned\\x07", *PLAN, "-m", copy)
    assert line.strip().isprintable()
    assert len(line) < 2000
