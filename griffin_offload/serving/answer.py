"""One answer while it is generated: tokens become text, stop strings end it, an interruption, too."""

from collections import deque
from collections.abc import Callable, Collection

import torch
from torch import Tensor
from transformers import StoppingCriteria

from griffin_offload.serving.job import Finish
from griffin_offload.serving.logprobs import LogprobRecorder, TokenLogprob
from griffin_offload.serving.stops import StopHolder
from griffin_offload.serving.text import Detokeniser


class Answer(StoppingCriteria):  # type: ignore[misc]
    """Asked after every token whether to go on, which is where it learns of the token: all but the first
    `prompt_tokens` are the answer's.

    `show` is called with text and the tokens that begin in it; tokens of which nothing is shown are left out.
    `interrupted` is asked once a token. `ends` are the ids that end a sequence.
    """

    def __init__(
        self,
        prompt_tokens: int,
        detokeniser: Detokeniser,
        holder: StopHolder,
        recorder: LogprobRecorder | None,
        ends: Collection[int],
        show: Callable[[str, tuple[TokenLogprob, ...]], None],
        interrupted: Callable[[], bool],
    ) -> None:
        self._detokeniser, self._holder, self._recorder = detokeniser, holder, recorder
        self._ends, self._show, self._interrupted = ends, show, interrupted
        self._seen = prompt_tokens
        self._letters = 0
        self._waiting: deque[TokenLogprob] = deque()
        self.interrupted = self._ended = False

    def __call__(self, input_ids: Tensor, scores: object, **_: object) -> Tensor:
        tokens = input_ids[0, self._seen :].tolist()
        self._seen = input_ids.shape[1]
        for token in tokens:
            self._add(token)
        self.interrupted = self.interrupted or self._interrupted()
        done = self._holder.stopped or self.interrupted
        return torch.full((1,), done, dtype=torch.bool, device=input_ids.device)

    def _add(self, token: int) -> None:
        if token in self._ends:
            self._ended = True
            return
        if self._recorder is not None:
            self._waiting.append(self._recorder.record(token, self._letters))
        self._grow(self._detokeniser.feed(token))

    def _grow(self, text: str) -> None:
        self._letters += len(text)
        shown = self._holder.feed(text)
        self._give(shown, self._holder.released)

    def _give(self, text: str, before: int) -> None:
        """Show `text`, and the tokens that begin in front of letter `before`."""
        tokens = []
        while self._waiting and self._waiting[0].offset < before:
            tokens.append(self._waiting.popleft())
        if text or tokens:
            self._show(text, tuple(tokens))

    def finish(self) -> Finish:
        """The generation is over: show what was held back, and say why it ended."""
        if not self._holder.stopped:
            self._grow(self._detokeniser.flush())
        if not self._holder.stopped:
            self._give(self._holder.flush(), self._letters + 1)
        return "stop" if self._ended or self._holder.stopped else "length"
