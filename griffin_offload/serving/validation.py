"""Reading a JSON object field by field: every value is checked, and what nobody asked for is refused."""

import json
import math
from collections.abc import Collection, Mapping
from typing import Any

from griffin_offload.serving.api_errors import ApiError, invalid, unsupported

Values = dict[str, Any]
"""A JSON object, or a part of one."""


def parse_object(body: bytes) -> dict[str, Any]:
    """The JSON object that a body is; ApiError 400 for anything else, numbers that are none and names twice, too."""
    try:
        found = json.loads(body.decode("utf-8"), parse_constant=_refuse_constant, object_pairs_hook=_unique)
    except RecursionError:
        raise invalid("the body is nested too deeply", code="invalid_json") from None
    except ValueError as error:  # not UTF-8, not JSON, or an integer of thousands of digits
        raise invalid(f"the body is not JSON: {str(error)[:200]}", code="invalid_json") from None
    if not isinstance(found, dict):
        raise invalid("the body has to be a JSON object", code="invalid_json")
    return found


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is no number of JSON")


def _unique(pairs: list[tuple[str, object]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name comes twice in one object")
    if any(map(_half_letter, found)):
        raise ValueError("a name has half of a surrogate pair")
    return found


def _half_letter(text: str) -> bool:
    """Whether `text` cannot be written in UTF-8: JSON can escape what is no letter."""
    return any("\ud800" <= letter <= "\udfff" for letter in text)


class FieldReader:
    """The fields of one object. Readers return None for a field that is absent or null.

    `known` are the names that will be read. `neutral` are names of OpenAI's API that are not served, each with the
    values that ask for nothing; `ignored` have no effect on an answer by definition.
    """

    def __init__(
        self,
        values: Mapping[str, object],
        *,
        known: Collection[str],
        neutral: Mapping[str, Collection[Any]] | None = None,
        ignored: Collection[str] = (),
        where: str = "",
    ) -> None:
        self._values, self._where = values, where
        neutral = neutral or {}
        for name, value in values.items():
            if name in known or name in ignored:
                continue
            if name not in neutral:
                raise invalid(f"unknown field {self.path(name)!r:.100}", self.path(name)[:100], "unknown_parameter")
            if value is not None and not any(_same(value, allowed) for allowed in neutral[name]):
                raise unsupported(self.path(name), "leave it out")

    def path(self, name: str) -> str:
        return f"{self._where}.{name}" if self._where else name

    def raw(self, name: str) -> Any:
        return self._values.get(name)

    def wrong(self, name: str, wanted: str) -> ApiError:
        return invalid(f"{self.path(name)} has to be {wanted}", self.path(name))

    def text(self, name: str) -> str | None:
        value = self.raw(name)
        return None if value is None else self.checked_text(name, value)

    def checked_text(self, name: str, value: object) -> str:
        if not isinstance(value, str):
            raise self.wrong(name, "a string")
        if _half_letter(value):
            raise self.wrong(name, "valid Unicode: it has half of a surrogate pair")
        return value

    def flag(self, name: str) -> bool | None:
        value = self.raw(name)
        if value is not None and not isinstance(value, bool):
            raise self.wrong(name, "true or false")
        return value

    def integer(self, name: str, least: int, most: int) -> int | None:
        value = self.raw(name)
        if value is None:
            return None
        if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
            raise self.wrong(name, f"an integer from {least} to {most}")
        return value

    def number(self, name: str, least: float, most: float) -> float | None:
        value = self.raw(name)
        if value is None:
            return None
        plain = isinstance(value, int | float) and not isinstance(value, bool)
        # Compared before it is made a float, which huge integers cannot be; 1e999 is infinite.
        if not plain or not least <= value <= most or not math.isfinite(value):
            raise self.wrong(name, f"a number from {least:g} to {most:g}")
        return float(value)


def _same(value: object, allowed: object) -> bool:
    """Equal, and of one kind: false is not 0."""
    return isinstance(value, bool) == isinstance(allowed, bool) and bool(value == allowed)


def list_of_objects(value: object, where: str) -> list[Values]:
    if not isinstance(value, list) or not all(isinstance(one, dict) for one in value):
        raise invalid(f"{where} has to be a list of objects", where)
    return value


def texts_of(value: object, where: str, kinds: tuple[str, ...]) -> str:
    """One text, or those of all blocks, which are of these `kinds`."""
    if isinstance(value, str):
        return value
    found = []
    for index, block in enumerate(list_of_objects(value, where)):
        if block.get("type") not in kinds:
            raise unsupported(f"{where}[{index}].type", "the model reads text alone")
        text = block.get("text")
        if not isinstance(text, str):
            raise invalid(f"{where}[{index}].text has to be a string", f"{where}[{index}].text")
        found.append(text)
    return "\n".join(found)
