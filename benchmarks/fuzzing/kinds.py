"""What is fuzzed: for every parser the valid files, and the cases that damage and read them."""

from dataclasses import dataclass
from pathlib import Path

from transformers import AutoConfig

from fuzzing import loading, parsers
from fuzzing.files import MORE, PLANTED, SIZES, TOKENIZER_FILES, make_files
from fuzzing.worker import Case


@dataclass(frozen=True)
class Kind:
    """One parser: the files it reads and a case of it."""

    name: str
    share: float
    """Of all cases."""
    case: Case
    files: dict[str, bytes]


def make_kinds(folder: Path) -> list[Kind]:
    """Every kind, with valid files made in `folder`."""
    plain, converted, saved = make_files(folder)
    configs = [AutoConfig.for_model(name, **SIZES, **more).to_dict() for name, more in MORE.items()]
    whole = plain | {"planted.py": PLANTED}
    tokenizer = {name: whole[name] for name in ("config.json", "planted.py", *TOKENIZER_FILES)}
    config, plan = parsers.config_cases(configs)
    return [
        Kind("size", 0.38, parsers.size, {}),
        Kind("header", 0.26, parsers.header, plain),
        Kind("index", 0.16, parsers.index, plain),
        Kind("converted", 0.04, parsers.converted, converted),
        Kind("config", 0.07, config, whole),
        Kind("config to plan", 0.01, plan, whole),
        Kind("tokenizer", 0.005, loading.tokenizer_files, tokenizer),
        Kind("saved context", 0.06, loading.SavedContexts(folder / "plain"), {"a.ctx": saved}),
        Kind("command line", 0.015, loading.CommandLine(plain, converted), whole),
    ]
