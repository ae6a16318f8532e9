"""How many drafts are worth their forward, by what was accepted and what was measured; and drafts from the text itself.

Those (prompt lookup) are what followed the last tokens when they were there before. They cost no forward; one forward
of several rows says which of them the model would have written. Where they are not worth its rows, they are compared
with what comes anyhow, so that a text that repeats nothing costs nothing.
"""

from collections.abc import Callable, Sequence
from itertools import count

from torch import Tensor

from griffin_offload.config import AUTO_DRAFT_TOKENS
from griffin_offload.engine.report import LookupReport

# What is assumed before anything was seen, and how fast that is forgotten.
_PRIOR_ACCEPTED, _PRIOR_TESTED = 4.0, 5.0
_DECAY = 0.9


def expected_tokens(drafts: int, acceptance: float) -> float:
    """Of a forward over so many drafts, the model's own token behind them included."""
    a = min(acceptance, 0.999)
    return (1 - a ** (drafts + 1)) / (1 - a)


class DraftLength:
    """A fixed number of drafts, or the one that gives the most tokens per second by what was measured so far.

    If every draft is accepted with probability a, a pass after N drafts yields (1 - a^(N+1)) / (1 - a) tokens in
    T_pass + N * t_draft seconds.
    """

    def __init__(self, fixed: int | None) -> None:
        self._fixed = fixed
        self._accepted, self._tested = _PRIOR_ACCEPTED, _PRIOR_TESTED
        self._pass_s = self._draft_s = 0.0

    @property
    def acceptance(self) -> float:
        """Estimated probability that a draft is accepted when all before it were."""
        return self._accepted / self._tested

    def next(self) -> int:
        """Drafts before the next pass."""
        if self._fixed is not None:
            return self._fixed
        if not self._draft_s:
            return AUTO_DRAFT_TOKENS // 2  # nothing was measured yet
        return max(range(1, AUTO_DRAFT_TOKENS + 1), key=self._tokens_per_s)

    def _tokens_per_s(self, drafts: int) -> float:
        return expected_tokens(drafts, self.acceptance) / (self._pass_s + drafts * self._draft_s)

    def prefers(self, found: int, acceptance: float) -> bool:
        """Whether a pass over so many drafts that cost nothing gives more tokens per second than one over `next`."""
        if self._fixed is not None or not found:
            return False
        if not self._draft_s:
            return acceptance >= self.acceptance
        return expected_tokens(found, acceptance) / self._pass_s > self._tokens_per_s(self.next())

    def observe(self, drafted: int, accepted: int, draft_s: float, pass_s: float, *, ended: bool) -> None:
        """A round: `draft_s` seconds for all its drafts, `pass_s` for the pass. In one that `ended` the answer, the
        draft after the last accepted one was not judged."""
        rejected = accepted < drafted and not ended
        self._accepted = self._accepted * _DECAY + accepted
        self._tested = self._tested * _DECAY + accepted + rejected
        self._pass_s = _mean(self._pass_s, pass_s)
        if drafted:
            self._draft_s = _mean(self._draft_s, draft_s / drafted)


def _mean(before: float, now: float) -> float:
    return (before + now) / 2 if before else now


# Drafts from the text.


MOST_DRAFTS = 15
"""In one forward, with the token before them: kernels for a few rows read the weights once."""
# Lengths of the ends that are looked for, and how many drafts behind such are assumed to be accepted, of how many.
_PRIORS = {4: (1.6, 2.0), 3: (1.2, 2.0), 2: (0.7, 2.0)}
_FORGETTING = 0.95
# Before any was measured, what a row more is taken to cost: a share of the first one.
_ASSUMED_ROW = 0.05
# So many times as fast drafts have to be by what is known.
_WORTH = 1.05
_FEWEST_STEPS = 3
# Share by which what was measured long ago goes back to what would be assumed, with every token.
_FADING = 0.01


class StepCosts:
    """Seconds of a resident forward by its rows, kept from answer to answer."""

    def __init__(self, *, alike: bool | None = None) -> None:
        self._seconds: dict[int, float] = {}
        self._steps = 0
        self._beside_s = 0.0
        self.alike = alike
        """Whether rows that are computed together are the same, to the last bit, as one by one; None: not tried."""

    def rules_out(self, lookup: bool | None) -> bool:
        """Whether nobody asked for drafts that may change a tie, and these may."""
        return lookup is None and self.alike is False

    def observe(self, rows: int, seconds: float, beside_s: float) -> None:
        """A forward took `seconds`, and what is done with each token that comes of it `beside_s`."""
        before = self._seconds.get(rows, seconds)
        # A forward that met a busy moment counts for as little as one that met none.
        self._seconds[rows] = before + (min(seconds, 3 * before) - before) / 4
        self._beside_s += (beside_s - self._beside_s) / (4 if self._steps else 1)
        if rows == 1:
            self._steps += 1
            for other in self._seconds.keys() - {1}:
                self._seconds[other] += _FADING * (self._assumed(other) - self._seconds[other])

    @property
    def known(self) -> bool:
        """Whether a token's cost was measured often enough to judge by."""
        return self._steps >= _FEWEST_STEPS

    def _assumed(self, rows: int) -> float:
        return self._seconds[1] * (1 + _ASSUMED_ROW * (rows - 1))

    def _of(self, rows: int) -> float:
        """By what was measured with fewer rows and with more."""
        fewer = max(one for one in self._seconds if one <= rows)
        more = min((one for one in self._seconds if one >= rows), default=None)
        if fewer == 1 and more is None:
            return self._assumed(rows)
        if more is None:
            per_row = (self._seconds[fewer] - self._seconds[1]) / (fewer - 1)
            return self._seconds[fewer] + max(per_row, 0.0) * (rows - fewer)
        share = (rows - fewer) / max(more - fewer, 1)
        return self._seconds[fewer] + share * (self._seconds[more] - self._seconds[fewer])

    def best(self, most: int, acceptance: float) -> int:
        """Of 0 to `most` drafts, of which each is accepted with that probability where all before were, those that
        give the most tokens per second."""
        if not self.known:
            return 0
        rates = [self._rate(drafts, acceptance) for drafts in range(most + 1)]
        best = max(range(most + 1), key=rates.__getitem__)
        return best if rates[best] > _WORTH * rates[0] else 0

    def _rate(self, drafts: int, acceptance: float) -> float:
        tokens = expected_tokens(drafts, acceptance)
        return tokens / (self._of(1 + drafts) + tokens * self._beside_s)


class TextDrafts:
    """The tokens of one sequence, and where their ends were before."""

    def __init__(self, ids: Sequence[int]) -> None:
        self._ids: list[int] = []
        self._behind: dict[int, int] = {}
        self._counts = dict(_PRIORS)
        self._expected: list[int] = []
        self._size = min(_PRIORS)
        for token in ids:
            self._enter(token)

    def _enter(self, token: int) -> None:
        place = len(self._ids)
        for size in _PRIORS:
            if place >= size:
                self._behind[self._key(size)] = place
        self._ids.append(token)

    def _key(self, size: int) -> int:
        return hash(tuple(self._ids[-size:]))  # two ends with one hash make a draft that is not accepted

    def find(self, most: int) -> list[int]:
        """Up to `most` tokens that followed the longest end that was there before, the last time it was."""
        for size in _PRIORS:
            place = self._behind.get(self._key(size)) if len(self._ids) >= size else None
            if place is not None:
                self._size = size
                return self._continued(place, most)
        return []

    def _continued(self, place: int, most: int) -> list[int]:
        """Tokens from `place` on; behind the last one they go on with themselves."""
        found: list[int] = []
        for at in count(place):
            if len(found) == most:
                return found
            found.append(self._ids[at] if at < len(self._ids) else found[at - len(self._ids)])
        return found

    @property
    def acceptance(self) -> float:
        """Of drafts like those that were found last."""
        accepted, tested = self._counts[self._size]
        return accepted / tested

    def expect(self, drafts: list[int]) -> None:
        """These were found and not tried: what comes is compared with them."""
        if not self._expected:
            self._expected, self._expected_size = list(drafts), self._size

    def add(self, token: int) -> None:
        """A token of the answer."""
        if self._expected:
            accepted = token == self._expected.pop(0)
            self._count(self._expected_size, int(accepted), 1)
            if not accepted:
                self._expected = []
        self._enter(token)

    def judged(self, drafted: int, accepted: int, *, ended: bool) -> None:
        """Of the drafts that were found last, so many were tried, and accepted; behind an end none is judged."""
        self._expected = []
        self._count(self._size, accepted, accepted + (accepted < drafted and not ended))

    def _count(self, size: int, accepted: int, tested: int) -> None:
        known, of = self._counts[size]
        keeps = _FORGETTING**tested
        self._counts[size] = known * keeps + accepted, of * keeps + tested


class LookupState:
    """Drafts from the text of one `generate`: `allowed` drops those that its structure rules out."""

    def __init__(
        self, most: int, allowed: Callable[[Tensor, list[int]], list[int]] | None, *, only_alike: bool
    ) -> None:
        """`only_alike`: not where rows that are computed together are others than one by one."""
        self.most, self._allowed, self.only_alike = most, allowed, only_alike
        self.text = TextDrafts(())
        self.report = LookupReport()

    def find(self, ids: Tensor, most: int) -> list[int]:
        """Drafts behind `ids` [1, T]."""
        found = self.text.find(min(most, self.most))
        return self._allowed(ids, found) if found and self._allowed is not None else found

    def judged(self, drafted: int, accepted: int, *, ended: bool) -> None:
        self.text.judged(drafted, accepted, ended=ended)
        self.report.add(drafted, accepted)
