"""An answer's text on stdout as it comes, up to a stop string."""

from collections.abc import Sequence
from typing import Any

from transformers import TextStreamer

from griffin_offload.serving.stops import StopHolder


class AnswerStreamer(TextStreamer):  # type: ignore[misc]
    """Prints whole words; of what may become a stop string, only what turned out to be none."""

    def __init__(self, tokenizer: Any, stops: Sequence[str] = ()) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self._holder = StopHolder(stops)

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        shown = self._holder.feed(text)
        super().on_finalized_text(shown + (self._holder.flush() if stream_end else ""), stream_end)
