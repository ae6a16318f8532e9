"""Stop strings in a text that comes in pieces: cut at the first one, and never shown in part."""

from collections.abc import Sequence


class StopHolder:
    """Lets a text through, but for what may still become one of `stops`.

    The text ends where the first of them is complete (of several that end at the same letter, the one that begins
    first), however the text is divided into pieces.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = stops
        self._held = ""
        self.released = 0
        """Letters let through so far."""
        self.stopped = False

    def feed(self, piece: str) -> str:
        """What may be shown now; nothing more once a stop string was found."""
        if self.stopped:
            return ""
        text = self._held + piece
        found = [(at + len(stop), at) for stop in self._stops if (at := text.find(stop)) >= 0]
        if found:
            self.stopped = True
            return self._release(text, min(found)[1])
        return self._release(text, len(text) - self._possible(text))

    def flush(self) -> str:
        """The rest: the text has ended without a stop string."""
        return self._release(self._held, len(self._held))

    def _release(self, text: str, letters: int) -> str:
        self._held = "" if self.stopped else text[letters:]
        self.released += letters
        return text[:letters]

    def _possible(self, text: str) -> int:
        """Letters at the end of `text` that a stop string may begin with."""
        longest = min(max(map(len, self._stops), default=1) - 1, len(text))
        for letters in range(longest, 0, -1):
            end = text[-letters:]
            if any(stop.startswith(end) for stop in self._stops):
                return letters
        return 0
