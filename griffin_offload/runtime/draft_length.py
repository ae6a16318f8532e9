"""How many tokens to draft before the next verifying pass."""

from griffin_offload.config import AUTO_DRAFT_TOKENS

# What is assumed before anything was seen, and how fast that is forgotten.
_PRIOR_ACCEPTED, _PRIOR_TESTED = 4.0, 5.0
_DECAY = 0.9


class DraftLength:
    """A fixed number of drafts, or the one that gives the most tokens per second by what was measured so far.

    If every draft is accepted with probability a, a pass after N drafts yields (1 - a^(N+1)) / (1 - a) tokens in
    T_pass + N * t_draft seconds (DESIGN, section 6).
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
        a = min(self.acceptance, 0.999)
        return (1 - a ** (drafts + 1)) / (1 - a) / (self._pass_s + drafts * self._draft_s)

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
