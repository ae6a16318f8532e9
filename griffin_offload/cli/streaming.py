"""An answer on standard output while it is generated."""

from typing import Any

from griffin_offload.serving.text import Detokeniser


class TextPrinter:
    """A streamer for `generate`: prints text as soon as its letters are complete, and a newline at the end. What is
    printed is the text of all tokens together, whatever the tokenizer does with spaces between two decodings."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._text: Detokeniser | None = None

    def put(self, tokens: Any) -> None:
        """The prompt first, then one or more tokens at a time."""
        if self._text is None:
            self._text = Detokeniser(self._tokenizer)
            return
        self._print("".join(self._text.feed(token) for token in tokens.reshape(-1).tolist()))

    def end(self) -> None:
        """No more tokens come; the next is a prompt."""
        self._print((self._text.flush() if self._text is not None else "") + "\n")
        self._text = None

    def _print(self, text: str) -> None:
        if text:
            print(text, end="", flush=True)
