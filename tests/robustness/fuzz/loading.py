"""Cases of what loads and runs a model: tokenizers, saved contexts, and the whole command line."""

import contextlib
import hashlib
import io
import json
import random
import re
from functools import partial
from pathlib import Path
from typing import Any

from robustness.fuzz.damage import (
    any_value,
    as_bytes,
    damaged_bytes,
    damaged_json,
    damaged_part,
    damaged_safetensors,
    split_safetensors,
)
from robustness.fuzz.files import shards
from robustness.fuzz.parsers import MAPS
from robustness.fuzz.place import Place
from robustness.fuzz.worker import Unnamed

from griffin_offload.checkpoint.registry import open_checkpoint
from griffin_offload.checkpoint.safetensors import INDEX
from griffin_offload.checkpoint.tokenizer import encode, encode_messages, load_tokenizer
from griffin_offload.cli.main import main
from griffin_offload.engine.model import GriffinModel
from griffin_offload.errors import ModelError
from griffin_offload.kv_cache.sequence_file import options_of, read_notes

# What the machine had to refuse, the package should have before.
_MEMORY = re.compile("out of memory|allocate memory|MemoryError|OutOfMemory")
_JSON_FILES = ("config.json", "generation_config.json", INDEX, "tokenizer_config.json")

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


def tokenizer_files(generator: random.Random, place: Place) -> None:
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


class SavedContexts:
    """Contexts of one loaded model; it is loaded before the workers are forked."""

    def __init__(self, directory: Path) -> None:
        self._model = GriffinModel.from_pretrained(directory, density=0.5, ctx_size=64)
        self._fingerprint = open_checkpoint(directory).fingerprint()

    def __call__(self, generator: random.Random, place: Place) -> None:
        content = place.valid("a.ctx")
        if generator.random() < 0.3:
            damaged = damaged_safetensors(generator, content)
        else:
            damaged = self._resigned(generator, content)
        path = place.write("a.ctx", damaged)
        read = generator.choice((read_notes, partial(options_of, model=self._fingerprint), self._model.load_context))
        read(path)

    def _resigned(self, generator: random.Random, content: bytes) -> bytes:
        """Damaged, and with a digest that is right for it, as who means harm would write it."""
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


class CommandLine:
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
        names = (*_JSON_FILES, *_JSON_FILES, generator.choice(shards(files)))
        name, kind = generator.choice(names), generator.random()
        if kind < 0.05:
            place.link(name, generator.choice(("/dev/zero", "/dev/null", "absent", name, "..")))
        elif kind < 0.15:
            place.write(name, damaged_bytes(generator, files[name]))
        elif name in _JSON_FILES:
            damaged = damaged_json(generator, json.loads(files[name]), [MAPS, *shards(files)])
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
    if code not in (2, 3, 4) or len(errors) != 1 or not ours or "Traceback" in err or _MEMORY.search(err):
        raise Unnamed(f"exit code {code}: {err[-600:]!r}")
    raise ModelError(errors[0])
