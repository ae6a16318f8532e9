"""Texts that users wrote with whatever editor they have: UTF-8, or what a byte order mark at the start says."""

import codecs
from pathlib import Path

# The longest first: one of UTF-32 begins as one of UTF-16 does.
_MARKS = (
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
    (codecs.BOM_UTF8, "utf-8-sig"),
)


def read_text(path: Path) -> str:
    """The text in a file, line ends made "\\n" and without its byte order mark, which would become tokens. Raises
    OSError, and ValueError where it is no text."""
    return decoded(path.read_bytes())


def decoded(content: bytes, otherwise: str = "utf-8") -> str:
    """The same for the bytes of a file, in the encoding `otherwise` where no mark names another."""
    named = next((encoding for mark, encoding in _MARKS if content.startswith(mark)), otherwise)
    if named == "utf-8" and b"\0" in content[:2]:  # every second byte of a plain text, without a mark
        raise ValueError("it looks like UTF-16 without a byte order mark: save it as UTF-8")
    return content.decode(named).replace("\r\n", "\n").replace("\r", "\n")
