"""The API key, as it is given to the server."""

from griffin_offload.errors import UsageError

KEY_VARIABLE = "GRIFFIN_OFFLOAD_API_KEY"
_SHORTEST = 8
_LONGEST = 1000


def check_key(key: str, source: str) -> str:
    """`key` without the line's end; UsageError if it cannot be one."""
    key = key.strip()
    if not _SHORTEST <= len(key) <= _LONGEST or not key.isascii() or not key.isprintable() or " " in key:
        raise UsageError(f"{source} has no usable key: {_SHORTEST} printable ASCII letters or more, without spaces")
    return key
