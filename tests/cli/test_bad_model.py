"""Every way a checkpoint can be unusable: exit code 4 and one line that says what was found."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import huggingface_hub
import pytest
from safetensors.torch import load_file, save_file
from tiny_models import write_checkpoint, write_tokenizer

from griffin_offload.checkpoint.registry import locate
from griffin_offload.errors import ModelNotFound

INDEX = "model.safetensors.index.json"
COMMANDS = [("run", "the cat", "-n", "4"), ("plan",)]
both = pytest.mark.parametrize("command", COMMANDS, ids=["run", "plan"])


def shards(directory: Path) -> list[Path]:
    return sorted(directory.glob("*.safetensors"))


def remove_weights(directory: Path) -> None:
    for path in directory.glob("model*"):
        path.unlink()


def only_pickles(directory: Path) -> None:
    remove_weights(directory)
    (directory / "pytorch_model.bin").write_bytes(b"\x80\x04.")


def truncate(directory: Path) -> None:
    shard = shards(directory)[-1]
    shard.write_bytes(shard.read_bytes()[:-1])


def append(directory: Path) -> None:
    shard = shards(directory)[0]
    shard.write_bytes(shard.read_bytes() + b"\0")


def promise_more(directory: Path) -> None:
    index = json.loads((directory / INDEX).read_text())
    index["weight_map"]["model.layers.9.mlp.up_proj.weight"] = shards(directory)[0].name
    (directory / INDEX).write_text(json.dumps(index))


def write(name: str, text: str) -> Callable[[Path], object]:
    return lambda directory: (directory / name).write_text(text)


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "no weights": (remove_weights, "has no model.safetensors"),
    "only pickles": (only_pickles, r"pickled weights \(pytorch_model.bin\)"),
    "shard cut short": (truncate, r"\(\d+ bytes\) is truncated or damaged"),
    "shard too long": (append, r"\(\d+ bytes\) is truncated or damaged"),
    "shard empty": (lambda d: shards(d)[0].write_bytes(b""), r"\(0 bytes\) is truncated or damaged"),
    "shard absent": (lambda d: shards(d)[1].unlink(), "00002-of-.* named by the index but absent"),
    "index promises more": (promise_more, "promises model.layers.9.mlp.up_proj.weight, no shard holds it"),
    "index not JSON": (write(INDEX, "{"), "index.json cannot be read"),
    "index a list": (write(INDEX, "[]"), "index.json cannot be read"),
    "index without map": (write(INDEX, "{}"), "index.json cannot be read"),
    "index of numbers": (write(INDEX, '{"weight_map": {"a": 1}}'), "index.json cannot be read"),
    "index deep": (write(INDEX, "[" * 100_000), "index.json cannot be read"),
    "index empty": (write(INDEX, '{"weight_map": {}}'), "holds no tensors"),
    "config absent": (lambda d: (d / "config.json").unlink(), "has no config.json"),
    "config not JSON": (write("config.json", '{"model_type":'), "config.json cannot be read"),
    "config empty": (write("config.json", "{}"), "model_type"),
    "config a list": (write("config.json", "[1]"), "config.json cannot be read: it holds a list"),
    "config of an unknown type": (write("config.json", '{"model_type": "nonesuch"}'), "nonesuch"),
    "config of no language model": (write("config.json", '{"model_type": "vit"}'), "causal language model"),
}


@both
@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_files(cli, copy: Path, damage: str, command: tuple[str, ...]):
    harm, words = DAMAGES[damage]
    harm(copy)
    assert str(copy) in cli.refuses(4, words, *command, "-m", copy) or damage.startswith("config")


@both
def test_no_directory(cli, llama: Path, tmp_path: Path, command: tuple[str, ...]):
    cli.refuses(4, "no directory", *command, "-m", tmp_path / "absent")
    file = llama / "config.json"
    cli.refuses(4, "is a file, and no GGUF file: give the checkpoint's directory", *command, "-m", file)
    cli.refuses(4, "no directory", *command, "-m", "a/b/c")


@both
def test_hub_id_that_is_not_cached(cli, command: tuple[str, ...]):
    cli.refuses(
        4,
        "griffin-tests/absent was not found in the local hub cache",
        *command,
        "-m",
        "griffin-tests/absent",
        "--offline",
    )


PATHS = {
    "a directory's end": "absent/",
    "spaces": "no such/model id",
    "a file of GGUF": "absent/model.gguf",
    "a file of weights": "absent/model.safetensors",
    "two folders up": "../../absent",
    "a home": "~/absent",
    "of Windows": "C:\\models\\absent",
    "a drive of Windows": "C:/absent",
    "one word": "absent",
    "beside others": "here/absent",
}


@pytest.fixture
def no_hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A hub that fails the test when it is asked, and a working directory with a folder `here`."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", lambda *_, **__: pytest.fail("the hub is asked"))
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("name", PATHS)
def test_what_looks_like_a_path_is_not_asked_of_the_hub(cli, no_hub: Path, llama: Path, name: str):
    missing = PATHS[name]
    here = missing.startswith("here/")
    words = "though here is a directory here: check the name, or griffin-offload pull" if here else "give a checkpoint"
    cli.refuses(4, rf"no directory or file {re.escape(missing)}[:,].*{words}", "plan", "-m", missing)
    words = words if here else "give the directory, or the hub id, of an adapter"
    adapted = ("plan", "-m", llama, "--adapter", missing)
    cli.refuses(4, rf"no directory or file {re.escape(missing)}[:,].*{words}", *adapted)


def test_a_link_to_nothing_is_named(cli, no_hub: Path, llama: Path):
    (no_hub / "here" / "link").symlink_to("nothing")
    for command in ("-m", "here/link"), ("-m", llama, "--adapter", "here/link"):
        cli.refuses(4, r"here/link cannot be read: it is a link to nothing, which is not there", "plan", *command)


def test_a_hub_id_that_is_cached_is_found_beside_a_folder_of_its_first_part(no_hub: Path, monkeypatch, llama: Path):
    """Folders are often called as the organisation is."""
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **options: _cached(llama, **options))
    assert locate("here/model") == llama


def _cached(directory: Path, *, local_files_only: bool, **_: object) -> str:
    assert local_files_only
    return str(directory)


def test_hub_id_offline_with_an_empty_cache(process):
    outcome = process("-m", "griffin_offload", "plan", "-m", "griffin-tests/absent", "--offline")
    assert (outcome.code, outcome.out) == (4, "")
    assert outcome.err.startswith("griffin-offload: error: griffin-tests/absent was not found")
    assert outcome.err.count("\n") == 1


MISMATCHES = {
    "hidden_size": 64,
    "intermediate_size": 64,
    "vocab_size": 100,
    "num_key_value_heads": 2,
    "num_hidden_layers": 4,
}


@pytest.mark.parametrize("key", MISMATCHES)
def test_config_that_contradicts_the_files(cli, copy: Path, edit, key: str):
    """The line names a parameter, so that the reader knows which file is wrong."""
    edit(copy / "config.json", **{key: MISMATCHES[key]})
    cli.refuses(4, r"model\.|lm_head", "run", "the cat", "-m", copy)


IMPOSSIBLE = [
    ("hidden_size", "32"),
    ("hidden_size", -8),
    ("intermediate_size", None),
    ("intermediate_size", 0),
    ("num_attention_heads", 0),
    ("num_key_value_heads", 0),
    ("num_hidden_layers", 0),
    ("num_hidden_layers", -1),
    ("vocab_size", 0),
    ("head_dim", 7),
    ("hidden_act", "nonesuch"),
    ("rope_parameters", {"rope_type": "nonesuch"}),
    ("rope_parameters", 7),
    ("dtype", "nonesuch"),
    ("pad_token_id", 9999),
    ("quantization_config", {"quant_method": "gptq"}),
    ("num_hidden_layers", 10**9),
    ("num_labels", 10**9),
    ("max_window_layers", float("inf")),
    ("hidden_size", 10**30),
    ("sliding_window", 2**63),
    ("rope_parameters", {"rope_type": "linear", "rope_theta": 1e4, "factor": float("inf")}),
    ("rope_parameters", {"rope_type": "linear", "rope_theta": 1e4, "factor": float("nan")}),
    ("num_key_value_heads", [2]),
    ("vocab_size", True),
    ("attn_implementation", "kernels-community/flash-attn"),
    ("_attn_implementation", "other/repository"),
]


@both
@pytest.mark.parametrize(("key", "value"), IMPOSSIBLE)
def test_config_that_makes_no_model(cli, copy: Path, edit, key: str, value: object, command: tuple[str, ...]):
    edit(copy / "config.json", **{key: value})
    cli.refuses(4, "", *command, "-m", copy)


def test_parameters_missing_from_the_files(cli, copy: Path):
    """Without an index nothing promises the parameter, only the config does."""
    tensors = {name: tensor for shard in shards(copy) for name, tensor in load_file(shard).items()}
    remove_weights(copy)
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    cli.refuses(4, "missing keys, first model.layers.1.mlp.up_proj.weight", "run", "the cat", "-m", copy)


@both
def test_architectures_that_are_refused(cli, tmp_path: Path, command: tuple[str, ...]):
    write_checkpoint("openai-gpt", tmp_path, shards=1)
    write_tokenizer(tmp_path)
    cli.refuses(4, "has no KV cache", *command, "-m", tmp_path)


TOKENIZERS = {
    "absent": lambda d: [path.unlink() for path in d.glob("tokenizer*")],
    "not JSON": write("tokenizer.json", "{"),
    "empty": write("tokenizer.json", "{}"),
    "config not JSON": write("tokenizer_config.json", "{"),
}


@pytest.mark.parametrize("damage", TOKENIZERS)
def test_no_tokenizer(cli, copy: Path, damage: str):
    TOKENIZERS[damage](copy)
    words = {"absent": "no tokenizer files", "empty": "no tokenizer that can be loaded"}.get(damage, "json.*damaged")
    cli.refuses(4, words, "run", "the cat", "-m", copy)
    assert cli("plan", "-m", copy).code == 0


@pytest.mark.parametrize("template", ["{{ raise_exception('no system role') }}", "{% for", "{{ 1 / 0 }}"])
def test_chat_template_that_fails(cli, copy: Path, template: str):
    (copy / "chat_template.jinja").write_text(template)
    outcome = cli("run", "hello", "-m", copy)
    assert outcome.code in (2, 4)
    assert outcome.err.startswith("griffin-offload: error: ")
    assert outcome.err.count("\n") == 1


def test_a_name_that_is_not_utf_8(cli, copy: Path, llama: Path, tmp_path: Path):
    """Python opens it, safetensors and torch do not: they would say that the file is damaged."""
    odd = copy.rename(tmp_path / "odd \udcff")
    words = r"odd \\udcff' is not UTF-8, .* rename it"
    cli.refuses(2, words, "run", "the cat", "-m", odd)
    cli.refuses(2, words, "convert", odd, "-m", llama, "--quantize", "int8")


@pytest.mark.parametrize("name", ["", "x" * 300, "Once upon a time there was " * 20], ids=["none", "long", "a prompt"])
def test_names_that_no_directory_has(name: str):
    with pytest.raises(ModelNotFound, match=r"is empty|cannot be looked at: File name too long"):
        locate(name)
