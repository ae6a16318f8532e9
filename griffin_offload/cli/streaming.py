"""An answer on standard output while it is generated."""

from collections.abc import Sequence
from typing import Any

from griffin_offload.serving.text_stream import Detokeniser, StopHolder


class TextPrinter:
    """A streamer for `generate`: prints text as soon as its letters are complete, and a newline at the end. What is
    printed is the text of all tokens together, whatever the tokenizer does with spaces between two decodings; up to the
    first of `stops`, of which nothing is printed."""

    def __init__(self, tokenizer: Any, stops: Sequence[str] = ()) -> None:
        self._tokenizer, self._stops = tokenizer, stops
        self._text: Detokeniser | None = None

    def put(self, tokens: Any) -> None:
        """The prompt first, then one or more tokens at a time."""
        if self._text is None:
            self._text, self._holder = Detokeniser(self._tokenizer), StopHolder(self._stops)
            return
        self._print("".join(self._holder.feed(self._text.feed(token)) for token in tokens.reshape(-1).tolist()))

    def end(self) -> None:
        """No more tokens come; the next is a prompt."""
        rest = self._holder.feed(self._text.flush()) + self._holder.flush() if self._text is not None else ""
        self._print(rest + "\n")
        self._text = None

    def _print(self, text: str) -> None:
        if text:
            print(text, end="", flush=True)
