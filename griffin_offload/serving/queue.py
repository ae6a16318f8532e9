"""A request on its way through the worker, and what comes back from there."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

from griffin_offload.engine.report import RunReport
from griffin_offload.serving.answer_parts import Call, Kind
from griffin_offload.serving.api_errors import ApiError
from griffin_offload.serving.logprobs import TokenLogprob
from griffin_offload.serving.requests import Request

Finish = Literal["stop", "length", "tool_calls"]


@dataclass(frozen=True)
class Piece:
    """More of the answer `choice`."""

    choice: int
    text: str
    tokens: tuple[TokenLogprob, ...] = ()
    kind: Kind = "content"
    call: Call | None = None
    """In the place of text."""
    generated: int = 0
    """Tokens of all the request's answers that were counted before it was shown."""


@dataclass(frozen=True)
class Progress:
    """A streamed pass has come so far."""

    layers_done: int
    layers: int


@dataclass(frozen=True)
class Finished:
    """The answer `choice` is complete."""

    choice: int
    reason: Finish


@dataclass(frozen=True)
class Done:
    """All answers are complete."""

    figures: "Figures"


@dataclass(frozen=True)
class Failed:
    """Nothing more will come."""

    failure: ApiError


Event = Piece | Progress | Finished | Done | Failed


@dataclass
class Figures:
    """What a request took, all its answers together."""

    prompt_tokens: int = 0
    cached_tokens: int = 0
    """Tokens of the prompts that did not have to be computed."""
    completion_tokens: int = 0
    streamed_bytes: int = 0
    reports: list[RunReport] = field(default_factory=list)
    kept_by_layer: list[float] | None = None
    """Share of the last answer's activation in the neurons that were resident, layer by layer; None where it is not
    known."""

    def add(self, report: RunReport, *, first: bool) -> None:
        """Another answer; a prompt counts once, with its `first`."""
        if first:
            self.prompt_tokens += report.prompt_tokens + report.cached_prompt_tokens
            self.cached_tokens += report.cached_prompt_tokens
        self.completion_tokens += report.generated_tokens
        self.streamed_bytes += report.prefill_streamed_bytes + report.decode_streamed_bytes
        self.reports.append(report)


class Job:
    """One request with its prompts [tokens], each to be answered `request.n` times with up to `max_tokens`.

    `deliver` is called on the worker's thread. `cancelled` is set by whoever waits for the answer.
    """

    def __init__(
        self, request: Request, prompts: list[list[int]], max_tokens: list[int], deliver: Callable[[Event], None]
    ) -> None:
        self.request, self.prompts, self.max_tokens, self.deliver = request, prompts, max_tokens, deliver
        self.cancelled = False
        self.arrived = time.monotonic()
        self.first_token_s: float | None = None
        """From the arrival."""
        self.tokens = 0
        """Generated so far."""
        self.figures = Figures()

    def token(self) -> None:
        """A token was generated."""
        self.tokens += 1
        if self.first_token_s is None:
            self.first_token_s = time.monotonic() - self.arrived
