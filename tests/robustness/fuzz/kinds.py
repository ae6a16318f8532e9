"""What is fuzzed: for every parser the valid files, and the cases that damage and read them."""

from dataclasses import dataclass
from pathlib import Path

from robustness.fuzz import foreign, loading, parsers
from robustness.fuzz.files import MORE, PLANTED, SIZES, TOKENIZER_FILES, make_files, make_foreign
from robustness.fuzz.worker import Case
from transformers import AutoConfig


@dataclass(frozen=True)
class Kind:
    """One parser: the files it reads and a case of it."""

    name: str
    case: Case
    files: dict[str, bytes]


def make_kinds(folder: Path) -> list[Kind]:
    """Every kind, with valid files made in `folder`."""
    plain, converted, saved = make_files(folder)
    configs = [AutoConfig.for_model(name, **SIZES, **more).to_dict() for name, more in MORE.items()]
    whole = plain | {"planted.py": PLANTED}
    tokenizer = {name: whole[name] for name in ("config.json", "planted.py", *TOKENIZER_FILES)}
    config, plan = parsers.config_cases(configs)
    gguf, packed = make_foreign(folder)
    return [
        *(Kind(f"quantised by others: {name}", foreign.quantised, files) for name, files in packed.items()),
        Kind("gguf", foreign.gguf_header, {foreign.GGUF: gguf}),
        Kind("size", parsers.size, {}),
        Kind("header", parsers.header, plain),
        Kind("index", parsers.index, plain),
        Kind("converted", parsers.converted, converted),
        Kind("config", config, whole),
        Kind("config to plan", plan, whole),
        Kind("tokenizer", loading.tokenizer_files, tokenizer),
        Kind("saved context", loading.SavedContexts(folder / "plain"), {"a.ctx": saved}),
        Kind("command line", loading.CommandLine(plain, converted), whole),
    ]
