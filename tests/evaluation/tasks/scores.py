"""A metric that random weights do not leave at zero: every other generation has another value."""

import zlib


def fingerprint(document, results):
    """A number between 0 and 1 that stands for the generated text."""
    return {"print": zlib.crc32(f"{document['question']} {results[0]}".encode()) / 2**32}
