"""Sizes and times in words: read, or refused with a UsageError, whatever the text."""

import contextlib
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from griffin_offload.errors import UsageError
from griffin_offload.units import parse_seconds, parse_size

NUMBERS = st.text("0123456789.eE+-_ \u0663\u00b2", max_size=12)
UNITS = st.sampled_from(["", "b", "kB", "MiB", "GB", "tib", "%", "s", "m", "h", " GB", "\n", "auto"])


@given(st.text() | st.builds(str.__add__, NUMBERS, UNITS) | st.floats() | st.integers())
def test_any_size_is_whole_or_refused(text: str | float):
    with contextlib.suppress(UsageError):
        size = parse_size(text, total_bytes=10**10, free_bytes=10**9)
        assert isinstance(size, int)
        assert size > 0


@given(st.text() | st.builds(str.__add__, NUMBERS, UNITS))
def test_any_time_is_finite_or_refused(text: str):
    with contextlib.suppress(UsageError):
        assert 0 < parse_seconds(text) < math.inf


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf, 0.3, -1])
def test_numbers_that_are_no_size(number: float):
    with pytest.raises(UsageError):
        parse_size(number)


@pytest.mark.parametrize(
    "text",
    [
        "1e999GB",
        "\u0661\u0662GB",
        "12,5GB",
        "1_000",
        "GB",
        "G",
        "Gi",
        "12i",
        "12Bi",
        "12GG",
        "12iB",
        "9" * 400 + "GB",
        "0x10",
    ],
)
def test_texts_that_are_no_size(text: str):
    with pytest.raises(UsageError, match="cannot read the size"):
        parse_size(text)


def test_a_long_text_is_read_once():
    """A quarter of an hour, were the digits read anew from every one of them."""
    for parse in (parse_size, parse_seconds):
        with pytest.raises(UsageError, match=r"1{37}\.\.\."):
            parse("1" * 200_000 + "!")


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("12GB", 12 * 10**9),
        (".5kib", 512),
        ("1.5 MB", 1_500_000),
        ("007", 7),
        ("12G", 12 * 10**9),
        ("12Gi", 12 * 2**30),
        ("1.5 gi", 3 * 2**29),
        ("512m", 512 * 10**6),
        ("2Ti", 2**41),
        ("8k", 8000),
        ("3B", 3),
    ],
)
def test_sizes(text: str, size: int):
    assert parse_size(text) == size
