"""Stop strings, against a cut by brute force."""

from hypothesis import given
from hypothesis import strategies as st

from griffin_offload.serving.text_stream import StopHolder

letters = st.text("abc\n", min_size=1, max_size=4)
stops_lists = st.lists(letters, max_size=4)
pieces_lists = st.lists(st.text("abc\n", max_size=5), max_size=12)


def cut(text: str, stops: list[str]) -> tuple[str, bool]:
    """Letter by letter: the text ends when it ends in a stop string, which is taken off, the longest one."""
    for end in range(1, len(text) + 1):
        found = [stop for stop in stops if text[:end].endswith(stop)]
        if found:
            return text[: end - max(map(len, found))], True
    return text, False


@given(pieces_lists, stops_lists)
def test_the_text_is_cut_at_the_first_stop(pieces: list[str], stops: list[str]):
    holder = StopHolder(stops)
    shown = ""
    for piece in pieces:
        shown += holder.feed(piece)
        assert holder.released == len(shown)
    if not holder.stopped:
        shown += holder.flush()
    assert (shown, holder.stopped) == cut("".join(pieces), stops)


@given(pieces_lists, stops_lists)
def test_what_is_shown_is_never_taken_back_and_nothing_is_held_that_need_not_be(pieces: list[str], stops: list[str]):
    holder = StopHolder(stops)
    text = shown = ""
    for piece in pieces:
        text += piece
        shown += holder.feed(piece)
        if holder.stopped:
            break
        held = text[len(shown) :]
        # What is held begins a stop string, and nothing longer at the text's end does.
        assert not held or any(stop.startswith(held) for stop in stops)
        assert all(text[-more:] not in [s[:more] for s in stops] for more in range(len(held) + 1, len(text) + 1))


def test_nothing_is_shown_behind_a_stop():
    holder = StopHolder(["END"])
    assert [holder.feed(piece) for piece in ("one E", "N", "D two", "three")] == ["one ", "", "", ""]
    assert (holder.stopped, holder.released) == (True, 4)


def test_without_stops_text_passes():
    holder = StopHolder([])
    assert (holder.feed("abc"), holder.flush(), holder.stopped) == ("abc", "", False)
