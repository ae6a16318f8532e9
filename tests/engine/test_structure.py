"""Structured answers: what is finished is what was asked for, judged by others; what cannot be enforced is refused."""

import itertools
import json
import random
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from marks import by_turns
from scripted_model import byte_tokenizer
from tiny_models import QUICK
from transformers import AutoModelForCausalLM

from griffin_offload import GriffinModel, Structure, UsageError
from griffin_offload.engine.structure import StructureGuide, check_structure

END = 2
TOKENIZER = byte_tokenizer()
WORDS = len(TOKENIZER) + 5  # logits may have more of them than the tokenizer
# A finite language: every prefix of its texts can be listed.
TEXTS = [json.dumps(list(pair), separators=(",", ":")) for pair in itertools.product(["ab", 1, True], [12, "abc"])]
FINITE = Structure(regex="|".join(re.escape(text) for text in TEXTS))


def _scores(words: int = WORDS) -> torch.Tensor:
    return torch.zeros(1, words, dtype=torch.float32)


def _allowed(guide: StructureGuide, answer: Sequence[int]) -> list[int]:
    """What may follow `answer`, by what becomes of even scores; the prompt is one token."""
    scores = guide(torch.tensor([[0, *answer]]), _scores())
    return (scores[0] == 0).nonzero()[:, 0].tolist()


def _written(structure: Structure, draw: random.Random, most: int = 400) -> str | None:
    """A text of random tokens that `structure` allows, ends of strings and lists likelier; None: too long."""
    guide = StructureGuide(structure, TOKENIZER, WORDS, [END])
    closing = [TOKENIZER.convert_tokens_to_ids(letter) for letter in '"]}']
    try:
        _allowed(guide, [])
        answer: list[int] = []
        while len(answer) < most:
            allowed = _allowed(guide, answer)
            likely = [token for token in allowed if token in (END, *closing)]
            token = draw.choice(likely if likely and draw.random() < 0.5 else allowed)
            answer.append(token)
            if token == END or guide.ended(torch.tensor([[0, *answer]]))[0]:
                guide.complete([answer])
                assert guide.report.complete
                return TOKENIZER.decode([token for token in answer if token != END])
        return None
    finally:
        guide.close()


def _bounds(names: tuple[str, str], most: int) -> st.SearchStrategy[dict[str, Any]]:
    both = st.tuples(st.integers(0, most), st.integers(0, most)).map(sorted)
    return both.map(lambda found: dict(zip(names, found, strict=True))) | st.just({})


_WORD = st.text('abc"\\ é\n\u2028', max_size=4)
_FORMATS = ["date", "time", "date-time", "ipv4", "ipv6", "uuid", "email", "hostname"]
_PLAIN = st.one_of(
    st.just({"type": "boolean"}),
    st.just({"type": "null"}),
    _bounds(("minLength", "maxLength"), 6).map(lambda more: {"type": "string", **more}),
    st.sampled_from(["^[a-c]{2,3}$", "a+b", r"^\d{3}-\d$", "^(x|yz)*$"]).map(
        lambda p: {"type": "string", "pattern": p}
    ),
    st.sampled_from(_FORMATS).map(lambda name: {"type": "string", "format": name}),
    _bounds(("minimum", "maximum"), 200).map(lambda more: {"type": "integer", **more}),
    _bounds(("minimum", "maximum"), 200).map(lambda more: {"type": "number", **more}),
    st.sampled_from([2, 5, 10]).map(lambda n: {"type": "integer", "multipleOf": n, "minimum": 0, "maximum": 1000}),
    st.lists(_WORD | st.integers(-5, 5) | st.booleans() | st.none(), min_size=1, max_size=4).map(lambda v: {"enum": v}),
    _WORD.map(lambda value: {"const": {"k": [value]}}),
    st.just({"type": ["string", "null"], "maxLength": 3}),
)


def _objects(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[dict[str, Any]]:
    properties = st.dictionaries(st.sampled_from(["a", "b", 'q"', "ü"]), inner, max_size=3)
    more = st.booleans() | inner

    def made(parts: tuple[dict[str, Any], Any, int]) -> dict[str, Any]:
        found, others, required = parts
        return {
            "type": "object",
            "properties": found,
            "required": sorted(found)[:required],
            "additionalProperties": others,
        }

    return st.tuples(properties, more, st.integers(0, 3)).map(made)


def _arrays(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[dict[str, Any]]:
    plain = st.tuples(inner, _bounds(("minItems", "maxItems"), 3)).map(
        lambda parts: {"type": "array", "items": parts[0], **parts[1]}
    )
    fixed = st.lists(inner, min_size=1, max_size=2).map(
        lambda parts: {"type": "array", "prefixItems": parts, "items": False, "minItems": len(parts)}
    )
    return plain | fixed


SCHEMAS = st.recursive(
    _PLAIN,
    lambda inner: (
        _objects(inner) | _arrays(inner) | st.lists(inner, min_size=1, max_size=3).map(lambda v: {"anyOf": v})
    ),
    max_leaves=5,
)


@settings(max_examples=60)
@given(schema=SCHEMAS, seed=st.integers(0, 2**16))
def test_finished_answers_are_valid(schema: dict[str, Any], seed: int):
    """By another package's word, formats included."""
    text = _written(Structure(json_schema=schema), random.Random(seed))
    if text is not None:
        checker = jsonschema.Draft202012Validator.FORMAT_CHECKER
        jsonschema.Draft202012Validator(schema, format_checker=checker).validate(json.loads(text))


def test_most_answers_are_finished():
    structure = Structure(json_schema={"type": "object", "properties": {"a": {"type": "string"}}, "required": ["a"]})
    texts = [_written(structure, random.Random(seed)) for seed in range(8)]
    assert sum(text is not None for text in texts) >= 6


@settings(max_examples=40)
@given(regex=st.sampled_from([r"[a-f]{2,5}[0-9]?", "(yes|no|maybe)", r"é+ ü", r"x*"]), seed=st.integers(0, 2**16))
def test_matches_of_regular_expressions(regex: str, seed: int):
    text = _written(Structure(regex=regex), random.Random(seed))
    assert text is None or re.fullmatch(regex, text)


def _continued(answer: list[int]) -> list[int]:
    """Tokens that may follow in FINITE, by its list of texts."""
    ids = [[TOKENIZER.convert_tokens_to_ids(letter) for letter in text] for text in TEXTS]
    found = {text[len(answer)] for text in ids if text[: len(answer)] == answer and len(text) > len(answer)}
    return sorted(found | ({END} if answer in ids else set()))


@given(st.data())
def test_places_are_found_again_whatever_is_taken_back(data: st.DataObject):
    """Any order of answers, some of them impossible: masks are those of the listed language."""
    letters = st.sampled_from(sorted({token for text in TEXTS for token in TOKENIZER.encode(text)}))
    known = st.sampled_from(TEXTS).flatmap(lambda t: st.integers(0, len(t)).map(lambda n: TOKENIZER.encode(t[:n])))
    guide = StructureGuide(FINITE, TOKENIZER, WORDS, [END])
    try:
        _allowed(guide, [])
        for _ in range(data.draw(st.integers(1, 6))):
            answer = data.draw(known)
            more = data.draw(st.lists(letters, max_size=2))
            possible = bool(_continued(answer)) and all(
                token in _continued(answer + more[:place]) for place, token in enumerate(more)
            )
            if data.draw(st.booleans()) and possible:
                guide.ended(torch.tensor([[0, *answer, *more]]))  # the mask is begun, and may be of another answer
            expected = _continued(answer + more) if possible else list(range(WORDS))
            assert _allowed(guide, answer + more) == expected
            drafts = guide.allowed(torch.tensor([[0, *answer]]), more)
            count = next((i for i, t in enumerate(more) if t not in _continued(answer + more[:i])), len(more))
            assert drafts == more[:count]
    finally:
        guide.close()


def test_behind_an_end_everything_goes():
    """Where one sequence of a batch is over, padding follows."""
    guide = StructureGuide(FINITE, TOKENIZER, WORDS, [END])
    _allowed(guide, [])
    ids = TOKENIZER.encode(TEXTS[0])
    assert _allowed(guide, ids) == [END]
    assert len(_allowed(guide, [*ids, END])) == len(_allowed(guide, [*ids, END, 0, 0])) == WORDS
    guide.close()


def test_settings_that_leave_no_token():
    guide = StructureGuide(FINITE, TOKENIZER, WORDS, [END])
    with pytest.raises(UsageError, match="no token is left: other settings rule out what the regular expression"):
        guide(torch.tensor([[0]]), torch.full((1, WORDS), float("-inf")))
    guide.close()


def _load(path: Path, **options: object) -> GriffinModel:
    defaults = {"device": "cpu", "max_gpu_mem": "1GB", "density": 0.5, "ctx_size": 128, "always_stream": True}
    return GriffinModel.from_pretrained(path, **{**defaults, **options})


def _languages(model: GriffinModel) -> tuple[Structure, Any]:
    """FINITE, and transformers' own word for it: which tokens may follow, each text by bytes."""
    tokenizer = model.tokenizer
    texts = [text.encode() for text in TEXTS]
    words = {token: tokenizer.decode([token]).encode() for token in range(len(tokenizer))}

    def following(_: int, ids: torch.Tensor) -> list[int]:
        written = tokenizer.decode(ids[_languages.start :]).encode()  # type: ignore[attr-defined]
        if written in texts:
            return [END]
        return [t for t, word in words.items() if word and any(text.startswith(written + word) for text in texts)]

    return FINITE, following


@pytest.mark.parametrize(
    ("name", "options"),
    by_turns(
        ("llama2", "gemma2", "gpt2"),
        ({}, {"exact": True}, {"exact": True, "draft_tokens": 3}, {"refresh": 4}),
        each=2,
        whole=("llama2",),
    ),
)
def test_answers_are_those_of_the_dense_model(checkpoints, name: str, options: dict[str, Any]):
    """Which is held to the listed texts by transformers' own means."""
    path = checkpoints(name)
    dense = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float64)
    with _load(path, density=1.0, dtype="float64") as model:
        ids = torch.randint(3, 300, (1, 20), generator=torch.Generator().manual_seed(1))
        structure, following = _languages(model)
        _languages.start = 20  # type: ignore[attr-defined]
        more = {"max_new_tokens": 40, "do_sample": False, "eos_token_id": END, "pad_token_id": 0}
        mask = torch.ones_like(ids)
        expected = dense.generate(ids, attention_mask=mask, prefix_allowed_tokens_fn=following, **more)
        found = model.generate(ids, structure=structure, **more, **options)
        text = model.tokenizer.decode(found[0, 20:], skip_special_tokens=True)
        assert text in TEXTS
        # Where nothing can follow ours ends without the end token.
        assert expected[0].tolist() == [*found[0].tolist(), END]
        assert model.last_report.structure.complete


@pytest.mark.parametrize(
    "options",
    [
        {"do_sample": True},
        {"do_sample": True, "num_return_sequences": 3},
        {"num_beams": 3},
        {"num_beams": 2, "num_return_sequences": 2},
        {"do_sample": True, "exact": True},
        {"repetition_penalty": 1.4},
    ],
    ids=str,
)
def test_every_way_of_choosing_keeps_to_it(checkpoints, options: dict[str, Any]):
    with _load(checkpoints("llama2")) as model:
        ids = torch.arange(3, 23)[None]
        torch.manual_seed(3)
        found = model.generate(ids, structure=FINITE, max_new_tokens=40, eos_token_id=END, pad_token_id=0, **options)
        assert all(model.tokenizer.decode(row[20:], skip_special_tokens=True) in TEXTS for row in found)
        assert model.last_report.structure.complete


def test_an_answer_that_ends_by_its_length_is_told(checkpoints):
    with _load(checkpoints("llama2")) as model:
        model.generate(torch.arange(3, 23)[None], structure=FINITE, max_new_tokens=2, do_sample=False)
        report = model.last_report
        assert report.structure is not None
        assert not report.structure.complete
        assert any("NOT complete" in line for line in report.lines("CPU"))
        assert report.to_json()["structure"]["masks"] >= 2


@pytest.mark.slow
@pytest.mark.parametrize("name", QUICK)  # what is masked are logits: an architecture has no part in it
def test_every_architecture(checkpoints, name: str):
    with _load(checkpoints(name)) as model:
        found = model.generate(torch.arange(3, 23)[None], structure=FINITE, max_new_tokens=40, do_sample=False)
        assert model.tokenizer.decode(found[0, 20:], skip_special_tokens=True) in TEXTS


def _everywhere(keywords: dict[str, Any]) -> Iterator[dict[str, Any]]:
    yield keywords
    yield {"type": "object", "properties": {"not": keywords}}
    yield {"type": "array", "items": {"anyOf": [{"type": "null"}, keywords]}}


_REFUSED: list[dict[str, Any]] = [
    {"not": {"type": "string"}},
    {"if": {"type": "string"}, "then": {"minLength": 1}},
    {"type": "array", "uniqueItems": True},
    {"type": "array", "contains": {"type": "null"}},
    {"type": "object", "propertyNames": {"maxLength": 2}},
    {"type": "object", "dependentRequired": {"a": ["b"]}},
    {"type": "object", "dependentSchemas": {"a": {}}},
    {"type": "object", "dependencies": {"a": ["b"]}},
    {"type": "object", "unevaluatedProperties": False},
    {"type": "array", "unevaluatedItems": False},
    {"$dynamicRef": "#a"},
    {"type": "number", "divisibleBy": 3},
    {"extends": {"type": "string"}},
    {"disallow": "string"},
    {"type": "string", "format": "semver"},
    {"x-guidance": {"lenient": True}, "type": "array", "uniqueItems": True},
]


@pytest.mark.parametrize("keywords", _REFUSED, ids=lambda found: next(iter(found)))
def test_keywords_that_cannot_be_enforced_are_refused_by_name(keywords: dict[str, Any]):
    name = next(word for word in keywords if word not in ("type", "then", "x-guidance"))
    for schema in _everywhere(keywords):
        with pytest.raises(UsageError, match=r"the JSON schema cannot be enforced") as error:
            check_structure(Structure(json_schema=schema))
        assert name.strip("$") in str(error.value) or "semver" in str(error.value)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ({}, "0 are given"),
        ({"regex": "a", "grammar": "b"}, "2 are given"),
        ({"json_schema": "{"}, "is no JSON"),
        ({"json_schema": "[]"}, "has to be an object"),
        ({"regex": 3}, "of type int"),
        ({"regex": "(a"}, "regular expression cannot be enforced: .*unclosed group"),
        ({"regex": "a(?=b)"}, "look-around"),
        ({"grammar": "start: foo"}, 'grammar cannot be enforced: .*unknown name: "foo"'),
        ({"json_schema": {"$schema": "http://json-schema.org/draft-03/schema#"}}, "draft-04 and later"),
        ({"json_schema": {"$ref": "http://example.org/x"}}, "cannot be enforced"),
        ({"json_schema": {"enum": []}}, "Unsatisfiable"),
    ],
    ids=str,
)
def test_what_cannot_be_used(given: dict[str, Any], reason: str):
    with pytest.raises(UsageError, match=reason):
        check_structure(Structure(**given))


def test_names_of_properties_are_no_keywords():
    check_structure(Structure(json_schema={"properties": {"extends": {"const": {"disallow": 1}}}}))


def test_without_the_package(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(UsageError, match=r"pip install 'griffin-offload\[structured\]'"):
        check_structure(FINITE)


def test_a_slow_tokenizer_is_refused():
    with pytest.raises(UsageError, match=r"need a fast tokenizer .* this one is a object"):
        StructureGuide(FINITE, object(), WORDS, [END])
