"""Answers with a structure: a JSON schema, a regular expression or a grammar decides which tokens may come next.

llguidance says so, anew for every token. Here its place in the grammar follows sequences of which tokens may be taken
back (drafts), and the next mask is computed while the model computes the scores that it is for.
"""

import json
import time
import weakref
from collections.abc import Collection, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedTokenizerFast,
    StoppingCriteria,
    StoppingCriteriaList,
)

from griffin_offload.engine.report import StructureReport
from griffin_offload.errors import UsageError, one_line
from griffin_offload.transformers_api import Tokenizer

_STRUCTURES = {"json_schema": "JSON schema", "regex": "regular expression", "grammar": "grammar"}


@dataclass(frozen=True)
class Structure:
    """What an answer has to be: JSON by a schema (an object, or its text), a match of a regular expression, or what a
    grammar makes (Lark, as llguidance reads it). Exactly one of them is given."""

    json_schema: str | Mapping[str, Any] | None = None
    regex: str | None = None
    grammar: str | None = None

    def __post_init__(self) -> None:
        given = [name for name in _STRUCTURES if getattr(self, name) is not None]
        if len(given) != 1:
            raise UsageError(f"a structure is one of json_schema, regex and grammar: {len(given)} are given")
        value = getattr(self, given[0])
        if isinstance(value, Mapping):
            object.__setattr__(self, "json_schema", json.dumps(value))
        elif not isinstance(value, str):
            raise UsageError(f"{given[0]} is of type {type(value).__name__}: give a text")
        if self.json_schema is not None:
            self._check_schema(str(self.json_schema))

    def _check_schema(self, text: str) -> None:
        try:
            schema = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise UsageError(f"the JSON schema is no JSON: {str(error)[:200]}") from None
        if not isinstance(schema, dict):
            raise UsageError("the JSON schema has to be an object")

    @property
    def name(self) -> str:
        """Of the field that is given."""
        return next(name for name in _STRUCTURES if getattr(self, name) is not None)

    @property
    def kind(self) -> str:
        """In messages."""
        return _STRUCTURES[self.name]


# One space, or a line's end and what it is indented by: models that write JSON write it so, and cannot go on with
# nothing but spaces.
WHITESPACE = r" |\n(?:(?:  ){0,10}|\t{0,10})"
# Of the lexer, a kilobyte or two each.
_MOST_STATES = 50_000
_COMPILED = 4
# Keywords that its older standard alone knows, and llguidance takes for names without a meaning.
_OLD_STANDARD, _OLD_KEYWORDS = "draft-03", ("disallow", "divisibleBy", "extends")
_NAMED = ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas")
_VALUES = ("const", "enum", "default", "examples", "example")
_vocabularies: "weakref.WeakKeyDictionary[Any, dict[int, Any]]" = weakref.WeakKeyDictionary()


def _library() -> Any:
    try:
        import llguidance
    except ModuleNotFoundError as error:
        raise UsageError(
            "structured answers need the package llguidance: pip install 'griffin-offload[structured]'"
        ) from error
    return llguidance


def _vocabulary(tokenizer: Tokenizer, words: int) -> Any:
    """llguidance's view of the tokens; UsageError for a tokenizer that is no fast one."""
    _library()
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        kind = type(tokenizer).__name__
        raise UsageError(f"structured answers need a fast tokenizer (tokenizer.json), this one is a {kind}")
    known = _vocabularies.setdefault(tokenizer, {})
    if words not in known:
        import llguidance.hf

        known[words] = llguidance.hf.from_tokenizer(tokenizer, n_vocab=max(words, len(tokenizer)))
    return known[words]


def _described(structure: Structure) -> str:
    """The grammar in llguidance's own form."""
    matcher = _library().LLMatcher
    if structure.regex is not None:
        return str(matcher.grammar_from_regex(structure.regex))
    if structure.grammar is not None:
        return str(matcher.grammar_from_lark(structure.grammar))
    schema = json.loads(str(structure.json_schema))
    _check_schema(schema)
    strict = {"lenient": False, "coerce_one_of": False}  # whatever the schema's own x-guidance says
    try:
        return str(matcher.grammar_from_json_schema(schema, {"whitespace_pattern": WHITESPACE}, strict))
    except ValueError as error:
        raise UsageError(f"the JSON schema cannot be used: {one_line(error)}") from error


def _check_schema(schema: dict[str, object]) -> None:
    """UsageError for what llguidance would not refuse by itself."""
    if _OLD_STANDARD in str(schema.get("$schema", "")):
        raise UsageError(f"the JSON schema is one of {_OLD_STANDARD}: draft-04 and later are read")
    for part in _parts(schema):
        found = [name for name in _OLD_KEYWORDS if name in part]
        if found:
            raise UsageError(f"the JSON schema cannot be enforced: unknown keywords {found}, those of {_OLD_STANDARD}")


def _parts(schema: object) -> Iterator[dict[str, Any]]:
    """Every schema within `schema`; values and names of properties are none."""
    waiting = [schema]
    while waiting:
        part = waiting.pop()
        if isinstance(part, list):
            waiting += part
        elif isinstance(part, dict):
            yield part
            named = [list(part[name].values()) for name in _NAMED if isinstance(part.get(name), dict)]
            waiting += named + [value for name, value in part.items() if name not in (*_NAMED, *_VALUES)]


def _limits() -> Any:
    return _library().LLParserLimits(max_lexer_states=_MOST_STATES, verbose_errors=False)


def check_structure(structure: Structure) -> None:
    """UsageError for what cannot be enforced, by its name."""
    said = _library().LLMatcher.validate_grammar(_described(structure), limits=_limits())
    _refuse(structure, "" if said.startswith("WARNING") else said)


def _refuse(structure: Structure, said: str) -> None:
    if said:
        raise UsageError(f"the {structure.kind} cannot be enforced: {one_line(UsageError(said))}")


@lru_cache(maxsize=_COMPILED)
def _compiled(structure: Structure, vocabulary: Any) -> Any:
    """A matcher at the grammar's beginning, to be copied; UsageError for what cannot be enforced."""
    matcher = _library().LLMatcher(vocabulary, _described(structure), log_level=0, limits=_limits())
    _refuse(structure, matcher.get_error())
    return matcher


class _Sequence:
    """Where one answer is in the grammar."""

    def __init__(self, matcher: Any, structure: Structure) -> None:
        self._matcher, self._structure = matcher, structure
        self._tokens: list[int] = []
        self._ended = self._astray = False

    def follow(self, answer: list[int], ends: Collection[int]) -> None:
        """Go to behind `answer`, and back as far as it is another one than before. Behind the end of what the grammar
        allows there is nothing but padding."""
        end = next((place for place, token in enumerate(answer) if token in ends), len(answer))
        self._ended, answer = end < len(answer), answer[:end]
        same = len(self._tokens)
        if answer[:same] != self._tokens:
            pairs = zip(answer, self._tokens, strict=False)
            same = next((i for i, (one, other) in enumerate(pairs) if one != other), min(end, same))
            self._matcher.rollback(len(self._tokens) - same)
        taken = self._matcher.try_consume_tokens(answer[same:])
        self._tokens = answer[: same + taken]
        left = len(self._tokens) < end
        self._check()
        stopped = bool(self._matcher.is_stopped())
        self._ended, self._astray = self._ended or (left and stopped), left and not stopped

    def _check(self) -> None:
        if self._matcher.is_error():
            reason = one_line(UsageError(self._matcher.get_error()))
            raise UsageError(f"the {self._structure.kind} is too complex to go on with: {reason}")

    @property
    def complete(self) -> bool:
        """Whether the answer is one that the grammar allows."""
        return not self._astray and bool(self._matcher.is_accepting())

    @property
    def over(self) -> bool:
        """Whether nothing but an end may follow."""
        return not self._astray and bool(self._matcher.is_stopped())

    def mask(self, words: int, ends: Collection[int], others: Collection[int]) -> NDArray[np.bool_] | None:
        """Which of so many `words` may come next, `others` never; None: any, as behind an end, and behind drafts that
        the grammar does not allow, which are never asked about again."""
        if self._ended or self._astray:
            return None
        bits = np.frombuffer(self._matcher.compute_bitmask(), dtype=np.uint8)
        self._check()
        mask = np.unpackbits(bits, count=words, bitorder="little").astype(np.bool_)
        mask[[token for token in others if token < words]] = False
        mask[[token for token in ends if token < words]] = self._matcher.is_accepting()
        return mask

    def drafts(self, answer: list[int], ends: Collection[int], drafts: list[int]) -> list[int]:
        """As many of `drafts` behind `answer` as the grammar allows."""
        self.follow(answer, ends)
        if self._ended or self._astray:
            return []
        return drafts[: self._matcher.validate_tokens(drafts)]


class StructureGuide(LogitsProcessor):  # type: ignore[misc]
    """Lets through what `structure` allows, for one `generate`. Answers that end before they are complete are told by
    its `report`."""

    def __init__(self, structure: Structure, tokenizer: Tokenizer, words: int, ends: Collection[int]) -> None:
        start = time.perf_counter()
        self._structure, self._words, self._ends = structure, words, frozenset(ends)
        vocabulary = _vocabulary(tokenizer, words)
        self._matcher = _compiled(structure, vocabulary)
        self._others = frozenset(vocabulary.eos_tokens) - self._ends
        self._start: int | None = None
        self._sequences: list[_Sequence] = []
        self._thread = ThreadPoolExecutor(1, "griffin-offload-structure")
        self._ahead: tuple[list[list[int]], Future[list[NDArray[np.bool_] | None]]] | None = None
        self.report = StructureReport(structure.kind, compile_s=time.perf_counter() - start)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """`scores` [B, V] with minus infinity for every token that may not follow `input_ids` [B, T]."""
        start = time.perf_counter()
        if self._start is None:
            self._start = input_ids.shape[1]
        answers: list[list[int]] = input_ids[:, self._start :].tolist()
        known = self._taken()
        masks = known[1] if known is not None and known[0] == answers else self._masks(answers)
        self.report.wait_s += time.perf_counter() - start
        for row, mask in enumerate(masks):
            if mask is not None:
                forbidden = torch.from_numpy(~mask).to(scores.device)
                kept = scores[row].masked_fill(forbidden, float("-inf"))
                if bool(kept.isneginf().all()):
                    raise UsageError(
                        f"no token is left: other settings rule out what the {self._structure.kind} allows"
                    )
                scores = torch.cat([scores[:row], kept[None], scores[row + 1 :]])
        return scores

    def among(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        """Arguments of `generate` with the guide among its processors and criteria: behind the caller's."""
        processors = LogitsProcessorList([*(kwargs.get("logits_processor") or []), self])
        criteria = StoppingCriteriaList([*(kwargs.get("stopping_criteria") or []), StructureEnd(self)])
        return kwargs | {"logits_processor": processors, "stopping_criteria": criteria}

    def ended(self, input_ids: Tensor) -> list[bool]:
        """Whether nothing may follow each of `input_ids` [B, T]; the masks for what may are begun."""
        self._taken()
        answers: list[list[int]] = input_ids[:, self._start :].tolist()
        self._follow(answers)
        over = [sequence.over for sequence in self._sequences[: len(answers)]]
        if not all(over):
            self._ahead = answers, self._thread.submit(self._masks, answers)
        return over

    def allowed(self, ids: Tensor, drafts: list[int]) -> list[int]:
        """As many of `drafts` behind the sequence `ids` [1, T] as may be tokens of the answer."""
        self._taken()
        answer: list[int] = ids[0, self._start :].tolist()
        self._follow([answer])
        return self._sequences[0].drafts(answer, self._ends, drafts)

    def complete(self, answers: list[list[int]]) -> None:
        """The `generate` ended well, with these answers."""
        self._taken()
        self._follow(answers)
        sequences = self._sequences[: len(answers)]
        self.report.complete = all(sequence.complete for sequence in sequences)
        self.report.over = all(sequence.over for sequence in sequences)

    def close(self) -> None:
        """Nothing is asked any more."""
        self._thread.shutdown()

    def _taken(self) -> tuple[list[list[int]], list[NDArray[np.bool_] | None]] | None:
        """Masks that were begun, and what for; nothing else touches a matcher in the meantime."""
        if self._ahead is None:
            return None
        (answers, future), self._ahead = self._ahead, None
        return answers, future.result()

    def _follow(self, answers: list[list[int]]) -> None:
        while len(self._sequences) < len(answers):
            self._sequences.append(_Sequence(self._matcher.deep_copy(), self._structure))
        for sequence, answer in zip(self._sequences, answers, strict=False):
            sequence.follow(answer, self._ends)

    def _masks(self, answers: list[list[int]]) -> list[NDArray[np.bool_] | None]:
        start = time.perf_counter()
        self._follow(answers)
        sequences = self._sequences[: len(answers)]
        masks = [sequence.mask(self._words, self._ends, self._others) for sequence in sequences]
        self.report.masks += len(masks)
        self.report.mask_s += time.perf_counter() - start
        return masks


class StructureEnd(StoppingCriteria):  # type: ignore[misc]
    """Ends an answer behind which its structure allows nothing."""

    def __init__(self, guide: StructureGuide) -> None:
        self._guide = guide

    def __call__(self, input_ids: Tensor, scores: object, **_: object) -> Tensor:
        return torch.tensor(self._guide.ended(input_ids), dtype=torch.bool, device=input_ids.device)
