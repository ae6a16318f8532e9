"""Structured answers to the schemas of a public suite: what is refused, whether finished answers validate, what masks
cost.

    git clone --depth 1 https://github.com/json-schema-org/JSON-Schema-Test-Suite
    python benchmarks/structured.py --suite JSON-Schema-Test-Suite/tests/draft2020-12

Every schema is either refused by a reason, or answered: at random by the tokens that are allowed (the hardest judge:
no model keeps it near what is usual), and by the embedded demo. `jsonschema` judges every finished answer. The ceiling
of a mask is what a token of a model takes: it is computed meanwhile. Needs `pip install ".[structured]" jsonschema`.
The last line is JSON, the exit code 1 if an answer is not valid.
"""

import argparse
import collections
import itertools
import json
import random
import re
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import jsonschema
import torch

from griffin_offload import GriffinModel, Structure, UsageError
from griffin_offload.demo import demo_directory
from griffin_offload.engine.structure import StructureGuide

MOST_TOKENS = 300


def schemas(suite: Path, most: int) -> list[tuple[str, dict[str, Any]]]:
    """(where, schema) of objects, the first ones of all files in turn."""
    groups = [
        [(f"{file.stem}: {one['description']}", one["schema"]) for one in json.loads(file.read_text())]
        for file in sorted(suite.glob("*.json"))
    ]
    found = [one for turn in itertools.zip_longest(*groups) for one in turn if one is not None]
    return [(name, schema) for name, schema in found if isinstance(schema, dict)][:most]


class Walk:
    """Random answers, and what their masks cost."""

    def __init__(self, tokenizer: Any, end: int) -> None:
        self._tokenizer, self._end = tokenizer, end
        self._closing = {t for t in range(len(tokenizer)) if tokenizer.decode([t]).strip()[:1] in ('"', "]", "}")}
        self.seconds: list[float] = []

    def answer(self, structure: Structure, draw: random.Random) -> str | None:
        """None if it did not end."""
        words = len(self._tokenizer)
        guide, ids, scores = StructureGuide(structure, self._tokenizer, words, [self._end]), [0], torch.zeros(1, words)
        try:
            while len(ids) < MOST_TOKENS:
                start = time.perf_counter()
                allowed = (guide(torch.tensor([ids]), scores)[0] == 0).nonzero()[:, 0].tolist()
                self.seconds.append(time.perf_counter() - start)
                ends = [token for token in allowed if token == self._end or token in self._closing]
                ids.append(draw.choice(ends if ends and draw.random() < 0.5 else allowed))
                if ids[-1] == self._end or guide.ended(torch.tensor([ids]))[0]:
                    return str(self._tokenizer.decode([token for token in ids[1:] if token != self._end]))
            return None
        finally:
            guide.close()


def by_model(model: GriffinModel, structure: Structure) -> str | None:
    ids = model.tokenizer("JSON:", return_tensors="pt")["input_ids"]
    found = model.generate(ids, max_new_tokens=MOST_TOKENS, do_sample=False, structure=structure)
    assert model.last_report is not None
    assert model.last_report.structure is not None
    if not model.last_report.structure.complete or found.shape[1] - ids.shape[1] == MOST_TOKENS:
        return None
    return str(model.tokenizer.decode(found[0, ids.shape[1] :], skip_special_tokens=True))


def why_invalid(text: str, schema: dict[str, Any]) -> str | None:
    try:
        kind = jsonschema.validators.validator_for(schema, default=jsonschema.Draft202012Validator)
        kind(schema, format_checker=kind.FORMAT_CHECKER).validate(json.loads(text))
    except (jsonschema.ValidationError, ValueError) as error:
        return str(error).splitlines()[0]
    return None


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--suite", type=Path, required=True, help="a folder of the suite's JSON files")
    parser.add_argument("--schemas", type=int, default=200)
    parser.add_argument("--answers", type=int, default=3, help="random ones to each schema")
    arguments = parser.parse_args()
    refused: collections.Counter[str] = collections.Counter()
    counts = collections.Counter[str]()
    invalid: list[dict[str, str]] = []
    with GriffinModel.from_pretrained(demo_directory(), device="cpu", max_gpu_mem="1GB") as model:
        walk = Walk(model.tokenizer, model.tokenizer.eos_token_id)
        for number, (where, schema) in enumerate(schemas(arguments.suite, arguments.schemas)):
            counts["schemas"] += 1
            try:
                structure = Structure(json_schema=schema)
                answers = [walk.answer(structure, random.Random(number * 100 + i)) for i in range(arguments.answers)]
                answers.append(by_model(model, structure))
            except UsageError as error:
                refused[str(error)] += 1
                continue
            counts["answered"] += 1
            for text in answers:
                counts["answers"] += 1
                counts["finished"] += text is not None
                try:
                    reason = None if text is None else why_invalid(text, schema)
                except re.error:  # the judge knows fewer of a pattern's classes
                    counts["not judged"] += 1
                    continue
                if text is not None and reason is not None:
                    invalid.append({"schema": where, "answer": text, "reason": reason})
    for reason, times in refused.most_common():
        print(f"refused {times:3d}  {reason}")
    for one in invalid:
        print(f"INVALID {one['schema']}: {one['answer']!r:.100}: {one['reason']:.200}")
    figures = {
        **counts,
        "refused": refused.total(),
        "invalid": len(invalid),
        "masks": len(walk.seconds),
        "mask_ms_median": 1000 * statistics.median(walk.seconds),
        "mask_ms_p99": 1000 * statistics.quantiles(walk.seconds, n=100)[98],
        "mask_ms_most": 1000 * max(walk.seconds),
    }
    print(json.dumps(figures))
    return 1 if invalid else 0


if __name__ == "__main__":
    sys.exit(main())
