"""The tokenizer of a checkpoint, and why there is none: its library tells of files by what it meets in them."""

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerFast

from griffin_offload.errors import CheckpointError, one_line
from griffin_offload.weights.files import check_content

# Every kind of tokenizer has a file with such a name.
_PATTERNS = ("*token*", "*vocab*", "*.model", "merges*", "*tekken*", "*.tiktoken", "chat_template*")
_WHOLE = "tokenizer.json"
# What older kinds are read with, by their files' names: packages by what they are imported and installed as.
_READERS = (
    ("*.model", "sentencepiece's", {"sentencepiece": "sentencepiece", "google.protobuf": "protobuf"}),
    ("*.tiktoken", "tiktoken's", {"tiktoken": "tiktoken"}),
    ("*tekken*", "Mistral's", {"mistral_common": "mistral-common"}),
)


def load_tokenizer(directory: Path) -> Any:
    """The tokenizer of a checkpoint; CheckpointError if there is none that can be loaded."""
    files = sorted({path for pattern in _PATTERNS for path in directory.glob(pattern) if path.is_file()})
    for path in files:
        if path.suffix in (".json", ".jinja", ".txt") or not (directory / _WHOLE).is_file():
            check_content(path)
    try:
        tokenizer = AutoTokenizer.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
        _drop_copies(tokenizer)
        return tokenizer
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # tokenizers fail in many ways; a panic of native code is no Exception
        raise CheckpointError(_reason(directory, files, error)) from error


def _drop_copies(tokenizer: Any) -> None:
    """Forget the tables of words and merges that transformers keeps as Python objects beside the native tokenizer's
    own: 0.15 GB for 262,144 words, of which nothing makes use once that has been built."""
    if isinstance(tokenizer, PreTrainedTokenizerFast):
        for name in ("_vocab", "_merges"):
            vars(tokenizer).pop(name, None)


def _reason(directory: Path, files: list[Path], error: BaseException) -> str:
    if not files:
        return (
            f"{directory} has no tokenizer files: copy tokenizer.json or the like beside its config.json, or use the "
            "Python API with token ids"
        )
    damaged = [found for found in map(_damage, files) if found is not None]
    if damaged:
        return damaged[0]
    for pattern, whose, packages in _READERS:
        found = [path.name for path in files if path.match(pattern)]
        lacking = [name for module, name in packages.items() if not _installed(module)]
        if found and lacking and not (directory / _WHOLE).is_file():
            return (
                f"{directory} has no {_WHOLE}, only {found[0]}, which is read with {whose} packages: pip install "
                f"{' '.join(lacking)}"
            )
    return (
        f"{directory} has no tokenizer that can be loaded (from {', '.join(p.name for p in files)}): {one_line(error)}"
    )


def _damage(path: Path) -> str | None:
    """What is wrong with a file that has to hold JSON."""
    if path.suffix != ".json":
        return None
    try:
        json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        return f"{path} ({path.stat().st_size} bytes) is truncated or damaged, download it again: {one_line(error)}"
    return None


def _installed(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:  # of the package that it is a part of
        return False
