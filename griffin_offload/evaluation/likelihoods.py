"""Log-likelihoods of continuations under the full model and several variants, computed once for all of them."""

import hashlib
import warnings
from array import array
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

from griffin_offload.config import EvalMode
from griffin_offload.evaluation.samples import Sample
from griffin_offload.evaluation.scoring import Scores
from griffin_offload.evaluation.simulation import Simulated

# Samples whose scores are held before they are summed. Far more than one pass takes of a model worth streaming.
_SAMPLES_AT_ONCE = 4096


class LikelihoodResult(NamedTuple):
    """What lm-eval asks of a continuation."""

    log_likelihood: float
    """Natural logarithm, summed over its tokens."""
    greedy: bool
    """Every token is the most likely one."""


class LikelihoodRequest(NamedTuple):
    """Token ids; those from `scored_from` on are the continuation, at least one token is before them."""

    ids: Sequence[int]
    scored_from: int

    @property
    def key(self) -> bytes:
        """Stands for the request: thousands of lists of ids are not worth keeping."""
        return hashlib.blake2b(array("q", [self.scored_from, *self.ids]).tobytes(), digest_size=16).digest()


def can_choose(request: LikelihoodRequest, mode: EvalMode) -> bool:
    """Whether any token is left to choose neurons; if none is, the full model scores the request."""
    before_experts = {"gen": request.scored_from, "class": len(request.ids) - 2, "strict": request.scored_from - 1}
    return before_experts[mode] >= 1


def sample_of(request: LikelihoodRequest, mode: EvalMode) -> Sample:
    """What is simulated for a request."""
    ids = torch.tensor(request.ids, dtype=torch.long, device="cpu")
    context, continuation = ids[: request.scored_from], ids[request.scored_from :]
    if not can_choose(request, mode):
        return Sample.dense(context, continuation)
    makers = {"gen": Sample.generation, "class": Sample.classification, "strict": Sample.strict}
    return makers[mode](context, continuation)


class Likelihoods:
    """Answers of all rows: the full model is row 0, the variants follow. What was asked before is remembered."""

    def __init__(self, mode: EvalMode, simulate: Callable[[list[Sample]], list[Simulated]]) -> None:
        self._mode, self._simulate = mode, simulate
        self._known: dict[bytes, tuple[LikelihoodResult, ...]] = {}

    def of(self, requests: Sequence[LikelihoodRequest], row: int) -> list[LikelihoodResult]:
        """The answers of one row, in the requests' order."""
        keys = [request.key for request in requests]
        new = {key: place for place, key in enumerate(keys) if key not in self._known}
        if new:
            self._compute({key: requests[place] for key, place in new.items()})
        return [self._known[key][row] for key in keys]

    def forget(self) -> None:
        """Drop all answers."""
        self._known.clear()

    def _compute(self, requests: dict[bytes, LikelihoodRequest]) -> None:
        short = sum(not can_choose(request, self._mode) for request in requests.values())
        if short:
            warnings.warn(
                f"{short} of {len(requests)} requests have too few tokens to choose neurons in mode {self._mode}: the "
                "full model scores them",
                stacklevel=2,
            )
        order = sorted(requests, key=lambda key: -len(requests[key].ids))
        for start in range(0, len(order), _SAMPLES_AT_ONCE):
            keys = order[start : start + _SAMPLES_AT_ONCE]
            found = self._simulate([sample_of(requests[key], self._mode) for key in keys])
            for key, simulated in zip(keys, found, strict=True):
                self._known[key] = tuple(_summed(scores) for scores in (simulated.full, *simulated.variants))


def _summed(scores: Scores) -> LikelihoodResult:
    return LikelihoodResult(float(scores.log_probs.double().sum()), bool(scores.greedy.all()))
