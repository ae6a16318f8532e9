"""What is fuzzed: for every parser the valid files, how they are damaged, and what reads them."""

import contextlib
import io
import json
import random
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from fuzz_input import (
    any_value,
    as_bytes,
    damaged_bytes,
    damaged_json,
    damaged_part,
    damaged_safetensors,
    split_safetensors,
)
from fuzz_worker import Place, Unnamed
from transformers import AutoConfig, AutoModelForCausalLM

from griffin_offload.cli.main import main
from griffin_offload.config import LoadConfig
from griffin_offload.demo import demo_directory
from griffin_offload.errors import ModelError
from griffin_offload.runtime.convert import convert
from griffin_offload.runtime.model import GriffinModel
from griffin_offload.runtime.prompts import encode, encode_messages
from griffin_offload.runtime.prospect import examine_checkpoint, plan_for
from griffin_offload.runtime.saved import options_of, read_notes
from griffin_offload.units import parse_seconds, parse_size
from griffin_offload.weights.checkpoint import load_tokenizer, open_checkpoint, read_config
from griffin_offload.weights.converted import check_shard
from griffin_offload.weights.mapped_file import map_file
from griffin_offload.weights.weight_files import INDEX, read_header, read_headers

_SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 4096}
_SIZES |= {"max_position_embeddings": 128}
_MORE: dict[str, dict[str, Any]] = {
    "llama": {"intermediate_size": 64, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}},
    "mistral": {"intermediate_size": 64, "sliding_window": 16, "num_key_value_heads": 2},
    "gemma2": {"intermediate_size": 64, "head_dim": 16, "num_key_value_heads": 2, "sliding_window": 16},
    "qwen2": {"intermediate_size": 64, "num_key_value_heads": 2},
    "phi3": {"intermediate_size": 64, "pad_token_id": 0},
    "gpt_neox": {"intermediate_size": 64},
    "opt": {"ffn_dim": 64, "word_embed_proj_dim": 32},
    "falcon": {"ffn_hidden_size": 64},
    "gpt2": {"n_inner": 64},
    "gptj": {"n_inner": 64, "rotary_dim": 4},
    "bloom": {},
}
# What other configs say, for a config to contradict itself with.
_KEYS = ("auto_map", "quantization_config", "text_config", "layer_types", "num_labels", "rope_scaling", "id2label")
_KEYS += ("n_layer", "head_dim", "sliding_window", "attn_implementation", "_name_or_path", "torch_dtype", "dtype")
_MAPS = {"AutoConfig": "planted.Config", "AutoModelForCausalLM": "other/repo--planted.Model"}
_PLANTED = b"import os\nos.system('true')\nopen('/tmp/planted', 'w')\n"
_JSON_FILES = ("config.json", "generation_config.json", INDEX, "tokenizer_config.json")
_TOKENIZER = ("tokenizer.json", "tokenizer_config.json")


@dataclass(frozen=True)
class Kind:
    """One parser: the files it reads and a case of it."""

    name: str
    share: float
    """Of all cases."""
    case: Callable[[random.Random, Place], None]
    files: dict[str, bytes]


def make_kinds(folder: Path) -> list[Kind]:
    """Every kind, with valid files made in `folder`."""
    plain, converted, saved = _make_files(folder)
    configs = [AutoConfig.for_model(name, **_SIZES, **more).to_dict() for name, more in _MORE.items()]
    whole = plain | {"planted.py": _PLANTED}
    config_case, plan_case = _config_cases(configs)
    return [
        Kind("size", 0.25, _size, {}),
        Kind("header", 0.26, _header, plain),
        Kind("index", 0.15, _index, plain),
        Kind("converted", 0.06, _converted, converted),
        Kind("config", 0.10, config_case, whole),
        Kind("config to plan", 0.02, plan_case, whole),
        Kind(
            "tokenizer",
            0.015,
            _tokenizer,
            {name: whole[name] for name in ("config.json", *_TOKENIZER)} | {"planted.py": _PLANTED},
        ),
        Kind("saved context", 0.10, _Saved(folder / "plain"), {"a.ctx": saved}),
        Kind("command line", 0.02, _CommandLine(plain, converted), whole),
    ]


def _make_files(folder: Path) -> tuple[dict[str, bytes], dict[str, bytes], bytes]:
    """A checkpoint of three shards, its int8 copy, and a saved context."""
    config = AutoConfig.for_model("llama", **_SIZES, **_MORE["llama"], eos_token_id=None, tie_word_embeddings=True)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.save_pretrained(folder / "plain", max_shard_size="60kB")
    for name in _TOKENIZER:
        shutil.copy(demo_directory() / name, folder / "plain")
    convert(folder / "plain", folder / "converted", "int8")
    with GriffinModel.from_pretrained(folder / "plain", density=0.5, ctx_size=64) as loaded:
        context = loaded.new_context()
        loaded.generate(torch.arange(20)[None], max_new_tokens=4, context=context)
        loaded.save_context(context, folder / "a.ctx")
    read = [{path.name: path.read_bytes() for path in (folder / name).iterdir()} for name in ("plain", "converted")]
    return read[0], read[1], (folder / "a.ctx").read_bytes()


def _shards(files: dict[str, bytes] | Place) -> list[str]:
    names = files if isinstance(files, dict) else [path.name for path in files.directory.iterdir()]
    return sorted(name for name in names if name.endswith(".safetensors"))


_DIGITS = "0123456789\u0663\u56db\u00b2\U0001d7d7.eE+-_, %\0"
_UNITS = (
    "",
    "b",
    "B",
    "kB",
    "KiB",
    "MB",
    "MiB",
    "GB",
    "gIb",
    "TB",
    "TiB",
    "%",
    "auto",
    "s",
    "m",
    "h",
    "Gb ",
    " GB",
    "GB\n",
)


def _size(generator: random.Random, place: Place) -> None:
    text = "".join(generator.choice(_DIGITS) for _ in range(generator.choice((1, 2, 3, 5, 12))))
    if generator.random() < 0.3:
        text = generator.choice(("1", "12", "0.5", "9" * 400, "1e999", "0" * 20 + "1", ".5", "-1", "1" * 5000))
    text = generator.choice(("", "", " ", "\t")) + text + generator.choice(_UNITS)
    value: Any = any_value(generator) if generator.random() < 0.15 else text
    if generator.random() < 0.3:
        seconds = parse_seconds(str(value))
        if not 0 < seconds < float("inf"):
            raise Unnamed(f"{value!r} is {seconds} s")
        return
    number = float(value) if isinstance(value, int | float) and not isinstance(value, bool) else str(value)
    if generator.random() < 0.05:
        number = generator.choice((float("nan"), float("inf"), float("-inf"), 10**400, True, 0.3))
    size = parse_size(
        number, total_bytes=generator.choice((None, 0, 10**10)), free_bytes=generator.choice((None, 10**9))
    )
    if not isinstance(size, int) or size <= 0:
        raise Unnamed(f"{number!r} is {size!r} bytes")


def _header(generator: random.Random, place: Place) -> None:
    name = generator.choice(_shards(place))
    path = place.write(name, damaged_safetensors(generator, place.valid(name)))
    found = read_header(path)
    check_shard(path, None)
    data_bytes = path.stat().st_size - 8
    if any(not 0 <= size <= data_bytes for _, size in found.values()):
        raise Unnamed(f"tensors of {max(size for _, size in found.values())} bytes in a file of {data_bytes}")
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError, RuntimeError):  # which its caller names
        map_file(path)


def _index(generator: random.Random, place: Place) -> None:
    index = json.loads(place.valid(INDEX))
    kind = generator.random()
    if kind < 0.35:
        key = generator.choice(list(index["weight_map"]))
        index["weight_map"][key] = any_value(generator, [*_shards(place), "../outside/" + _shards(place)[0], INDEX])
    elif kind < 0.4:
        place.link(_shards(place)[0], generator.choice(("/dev/zero", "/dev/null", "loop", "absent", "..", INDEX)))
    else:
        index = damaged_json(generator, index, _shards(place))
    place.write(INDEX, as_bytes(generator, index))
    for path in read_headers(place.directory):
        if path.resolve().parent != place.directory.resolve():
            raise Unnamed(f"read {path}")


def _converted(generator: random.Random, place: Place) -> None:
    if generator.random() < 0.6:
        config = json.loads(place.valid("config.json"))
        if generator.random() < 0.8:
            config["quantization_config"] = damaged_json(generator, config["quantization_config"])
        else:
            config = damaged_json(generator, config)
        place.write("config.json", as_bytes(generator, config))
    else:
        name = generator.choice(_shards(place))
        place.write(name, _damaged_metadata(generator, place.valid(name)))
    open_checkpoint(place.directory)


def _damaged_metadata(generator: random.Random, content: bytes) -> bytes:
    header, data = split_safetensors(content)
    if generator.random() < 0.5:
        return damaged_safetensors(generator, content)
    header["__metadata__"] = damaged_json(generator, header["__metadata__"])
    raw = as_bytes(generator, header)
    return len(raw).to_bytes(8, "little") + raw + data


def _config_cases(configs: list[dict[str, Any]]) -> tuple[Callable[[random.Random, Place], None], ...]:
    values = [value for config in configs for value in config.values()]

    def damaged(generator: random.Random, place: Place) -> Path:
        config = damaged_json(generator, generator.choice(configs), [*values, _MAPS])
        if isinstance(config, dict) and generator.random() < 0.3:
            config[generator.choice(_KEYS)] = any_value(generator, [*values, _MAPS])
        return place.write("config.json", as_bytes(generator, config))

    def config(generator: random.Random, place: Place) -> None:
        read_config(damaged(generator, place))

    def plan(generator: random.Random, place: Place) -> None:
        checkpoint = read_config(damaged(generator, place))
        plan_for(examine_checkpoint(checkpoint, LoadConfig(max_gpu_mem="1GB")))

    return config, plan


_TEMPLATES = (
    "{% for m in messages %}{{ m.content }}{% endfor %}",
    "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "{{ 'a' * 10**10 }}",
    "{{ 10 ** (10 ** 9) }}",
    "{% set n = namespace(s='aa') %}{% for i in range(60) %}{% set n.s = n.s ~ n.s %}{% endfor %}{{ n.s | length }}",
    "{{ 'x'.ljust(10**11) }}",
    "{{ '%99999999999d' | format(1) }}",
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ cycler.__init__.__globals__.os.system('true') }}",
    "{{ lipsum.__globals__['os'].popen('id').read() }}",
    "{% include '/etc/passwd' %}",
    "{{ raise_exception('no') }}",
    "{{ messages[9].content.x.y }}",
    "{{ 'a' | attr('__class__') }}",
    "{% generation %}{{ messages }}{% endgeneration %}",
    "{{ ((((" * 500,
    "{{ strftime_now('%' * 1000) }}",
)


def _tokenizer(generator: random.Random, place: Place) -> None:
    kind = generator.random()
    if kind < 0.55:
        tokenizer = json.loads(place.valid("tokenizer.json"))
        part = generator.choice([key for key in tokenizer if key not in ("version",)])
        tokenizer[part] = (
            damaged_part(generator, tokenizer[part]) if part != "model" else _model(generator, tokenizer[part])
        )
        place.write("tokenizer.json", as_bytes(generator, tokenizer))
    elif kind < 0.65:
        place.write("tokenizer.json", damaged_bytes(generator, place.valid("tokenizer.json")))
    else:
        settings = json.loads(place.valid("tokenizer_config.json"))
        if generator.random() < 0.5:
            settings["chat_template"] = any_value(generator, _TEMPLATES)
        if generator.random() < 0.3:
            settings["auto_map"] = {"AutoTokenizer": [None, "planted.Tokenizer"]}
            settings["tokenizer_class"] = generator.choice(
                ("Planted", "LlamaTokenizer", "GPT2Tokenizer", "T5Tokenizer")
            )
        place.write("tokenizer_config.json", as_bytes(generator, damaged_json(generator, settings)))
    _use_tokenizer(load_tokenizer(place.directory))


def _model(generator: random.Random, model: dict[str, Any]) -> dict[str, Any]:
    """Vocabulary and merges are long: one entry of them, or another part, is damaged."""
    small = {key: value for key, value in model.items() if key not in ("vocab", "merges")}
    damaged = damaged_json(generator, small)
    if not isinstance(damaged, dict):
        return damaged
    vocab, merges = dict(model["vocab"]), list(model["merges"])
    if generator.random() < 0.5:
        vocab[generator.choice([*vocab, "new"])] = any_value(generator)
    if generator.random() < 0.5:
        merges[generator.randrange(len(merges))] = any_value(generator, [["a", "b"], ["", ""], ["zz", "zz"]])
    return damaged | {"vocab": vocab, "merges": merges}


def _use_tokenizer(tokenizer: Any) -> None:
    ids = encode(tokenizer, "the cat")
    if tokenizer.chat_template is not None:
        encode_messages(tokenizer, [{"role": "user", "content": "the cat"}])
    if not all(isinstance(number, int) for number in ids):
        raise Unnamed(f"ids {ids[:5]}")


class _Saved:
    """Contexts of one loaded model; it is loaded before the workers are forked."""

    def __init__(self, directory: Path) -> None:
        self._model = GriffinModel.from_pretrained(directory, density=0.5, ctx_size=64)

    def __call__(self, generator: random.Random, place: Place) -> None:
        content = place.valid("a.ctx")
        if generator.random() < 0.3:
            damaged = damaged_safetensors(generator, content)
        else:
            damaged = self._resigned(generator, content)
        path = place.write("a.ctx", damaged)
        read = generator.choice((read_notes, options_of, self._model.load_context))
        read(path)

    def _resigned(self, generator: random.Random, content: bytes) -> bytes:
        """Damaged, and with a digest that is right for it, as who means harm would write it."""
        import hashlib

        header, data = split_safetensors(content)
        metadata = header["__metadata__"]
        if generator.random() < 0.6:
            name = generator.choice(("identity", "notes", "covered", "exact_tokens", "version"))
            value = (
                damaged_part(generator, json.loads(metadata[name]))
                if generator.random() < 0.8
                else any_value(generator)
            )
            metadata[name] = as_bytes(generator, value).decode("utf-8", "replace")
        else:
            name = generator.choice([name for name in header if name != "__metadata__"])
            header[name] = damaged_json(generator, header[name], ["I64", "F64", "I8"])
        if generator.random() < 0.3:
            data = damaged_bytes(generator, data[:2000]) + data[2000:]
        with contextlib.suppress(KeyError, TypeError):
            parts = sorted((n, e["dtype"], tuple(e["shape"])) for n, e in header.items() if n != "__metadata__")
            said = [sorted(item for item in metadata.items() if item[0] != "digest"), parts]
            metadata["digest"] = hashlib.sha256(json.dumps(said).encode()).hexdigest()
        raw = as_bytes(generator, header)
        return len(raw).to_bytes(8, "little") + raw + data


class _CommandLine:
    """The whole loading path: `main`, with what it prints and leaves behind."""

    def __init__(self, plain: dict[str, bytes], converted: dict[str, bytes]) -> None:
        self._plain, self._converted = plain, converted

    def __call__(self, generator: random.Random, place: Place) -> None:
        files = generator.choice((self._plain, self._plain, self._converted))
        if files is self._converted:
            for name in self._plain:
                place.remove(name)
            for name, content in files.items():
                place.write(name, content)
        self._damage(generator, place, files)
        model = ("-m", str(place.directory), "--offline")
        command = generator.choice(
            (
                ("plan", *model),
                ("plan", "--config", str(place.directory / "config.json")),
                ("run", "the cat", "-n", "2", *model),
                ("run", "the cat", "-n", "2", "--quantize", "int8", *model),
                ("convert", str(place.out), "--quantize", "int8", *model),
            )
        )
        _check_output(*_main(command))

    def _damage(self, generator: random.Random, place: Place, files: dict[str, bytes]) -> None:
        names = (*_JSON_FILES, *_JSON_FILES, generator.choice(_shards(files)))
        name, kind = generator.choice(names), generator.random()
        if kind < 0.05:
            place.link(name, generator.choice(("/dev/zero", "/dev/null", "absent", name, "..")))
        elif kind < 0.15:
            place.write(name, damaged_bytes(generator, files[name]))
        elif name in _JSON_FILES:
            damaged = damaged_json(generator, json.loads(files[name]), [_MAPS, *_shards(files)])
            place.write(name, as_bytes(generator, damaged))
        else:
            place.write(name, damaged_safetensors(generator, files[name]))


def _main(command: tuple[str, ...]) -> tuple[int, str, str]:
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = main(command)
        except SystemExit as leaving:
            code = int(leaving.code or 0)
    return code, out.getvalue(), err.getvalue()


def _check_output(code: int, out: str, err: str) -> None:
    """Exit code 0, 2, 3 or 4; lines of ours; one error, in one line of bounded length."""
    lines = err.splitlines()
    errors = [line for line in lines if line.startswith("griffin-offload: error: ")]
    ours = all(line.isprintable() and len(line) < 2000 for line in lines)
    if code == 0 and ours and not errors:
        return
    if code not in (2, 3, 4) or len(errors) != 1 or not ours or "Traceback" in err:
        raise Unnamed(f"exit code {code}: {err[-600:]!r}")
    raise ModelError(errors[0])
