"""Sizes in words and in bytes: "12GB" or "12G" is 12e9 bytes, "12GiB" or "12Gi" 12 * 2**30. Times: "10m" is 600 s."""

import math
import re

from griffin_offload.errors import UsageError

_PREFIXES = {"k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12, "ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}
_FACTORS = {"": 1, "b": 1} | {prefix + b: factor for prefix, factor in _PREFIXES.items() for b in ("", "b")}
# Two ways to read the same digits would cost the square of their number where neither fits.
_NUMBER = r"([0-9]+(?:\.[0-9]+)?|\.[0-9]+)"
_SIZE = re.compile(rf"\s*{_NUMBER}\s*([a-z%]*)\s*", re.IGNORECASE)
_SECONDS = {"": 1, "s": 1, "m": 60, "h": 3600}
_TIME = re.compile(rf"\s*{_NUMBER}\s*([smh]?)\s*", re.IGNORECASE)
# "auto" leaves a tenth of the free memory to everybody else.
_AUTO_SHARE = 0.9


def parse_size(text: str | float, *, total_bytes: int | None = None, free_bytes: int | None = None) -> int:
    """Bytes meant by `text`: a number, "12GB", "12G", "12GiB", "12Gi", "80%" of `total_bytes`, or "auto".

    "auto" is `free_bytes` less a margin of a tenth. Raises UsageError for anything else.
    """
    if not isinstance(text, str):
        if not -math.inf < text < math.inf:
            raise UsageError(f"the size {text} is not a number of bytes: write for example 12GB")
        return _positive(int(text), str(text))
    if text.strip().lower() == "auto" and free_bytes is not None:
        return int(free_bytes * _AUTO_SHARE)
    match = _SIZE.fullmatch(text)
    number, unit = (float(match[1]), match[2].lower()) if match else (0.0, "?")
    bytes_meant = number * _FACTORS.get(unit, 1)
    if unit == "%" and total_bytes is not None and number <= 100:
        return _positive(int(total_bytes * number / 100), text)
    if unit not in _FACTORS or not math.isfinite(bytes_meant):
        raise UsageError(f"cannot read the size {_short(text)}: write for example 12GB, 12GiB, 80% or auto")
    return _positive(int(bytes_meant), text)


def parse_seconds(text: str) -> float:
    """Seconds meant by `text`: "90", "90s", "10m", "2h". UsageError for anything else, and for none."""
    match = _TIME.fullmatch(text)
    seconds = float(match[1]) * _SECONDS[match[2].lower()] if match else 0.0
    if not 0 < seconds < math.inf:
        raise UsageError(f"cannot read the time {_short(text)}: write for example 30s, 10m or 2h")
    return seconds


def _positive(size_bytes: int, text: str) -> int:
    if size_bytes <= 0:
        raise UsageError(f"the size {_short(text)} is {size_bytes} bytes: it has to be more than nothing")
    return size_bytes


def _short(text: str) -> str:
    return repr(text if len(text) <= 40 else f"{text[:37]}...")


def format_bytes(size_bytes: float) -> str:
    """`size_bytes` for people, in decimal units: "11.2 GB", "640 kB", "0 B"."""
    for unit, factor in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if abs(size_bytes) >= factor:
            number = size_bytes / factor
            return f"{number:.2f} {unit}" if number < 10 else f"{number:.1f} {unit}"
    return f"{int(size_bytes)} B"
