"""A conversation: messages, and the context in which each new turn streams only its own tokens."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import GenerationConfig, StoppingCriteria, StoppingCriteriaList

from griffin_offload.checkpoint.tokenizer import encode, encode_messages, thinking_switches
from griffin_offload.config import ChatConfig, Overflow
from griffin_offload.engine.arguments import ONE_ANSWER
from griffin_offload.engine.generation import Finish, StopStrings, cut, end_tokens, ends_of, finish_of
from griffin_offload.engine.layer_pass import Progress
from griffin_offload.engine.report import RunReport
from griffin_offload.errors import SavedContextError, UsageError
from griffin_offload.kv_cache.kv_cache import why_not_back
from griffin_offload.kv_cache.sequence import Context
from griffin_offload.kv_cache.sequence_file import read_notes
from griffin_offload.planner.plan import Plan
from griffin_offload.transformers_api import StockModel, Tokenizer

Message = dict[str, str]


class ChatModel(Protocol):
    """What a conversation needs of its model: of a `GriffinModel`."""

    progress: Progress | None

    def generate(self, inputs: Tensor | None = None, *, context: Context | None = None, **kwargs: Any) -> Any: ...

    def new_context(self) -> Context: ...

    def save_context(self, context: Context, path: str | Path, notes: dict[str, object] | None = None) -> None: ...

    def load_context(self, path: str | Path, context: Context | None = None) -> tuple[Context, dict[str, Any]]: ...

    @property
    def tokenizer(self) -> Tokenizer: ...

    @property
    def generation_config(self) -> GenerationConfig: ...

    @property
    def model(self) -> StockModel: ...

    @property
    def plan(self) -> Plan: ...

    @property
    def vocab_size(self) -> int: ...

    @property
    def keeps_contexts(self) -> bool: ...

    @property
    def resident_bytes(self) -> int: ...

    @property
    def last_report(self) -> RunReport | None: ...


@dataclass(frozen=True)
class Reply:
    """One answer."""

    text: str
    report: RunReport
    dropped_messages: int
    """Oldest messages that were dropped to make room."""
    finish: Finish
    most_tokens: int
    """What the answer could have had: `max_new_tokens`, or what the context had left."""
    shortened: bool
    """Whether that was less."""


class ChatSession:
    """A conversation with a model that was loaded with `keep_prompts=True`; make one with `chat_session`.

    Every turn streams the weights once, over its own tokens alone; the statistic grows with the conversation. Where a
    model's past cannot be gone on from (`GriffinModel.keeps_contexts`), every turn reads all of it again. Without a
    chat template (or with `raw`) texts are put one after the other, a space between them. An answer has
    `max_new_tokens` at most, or what the context has left. When that is nothing, `overflow` says whether `send` fails
    or the oldest turns are dropped, which streams the rest once more, until `max_new_tokens` or a quarter of the
    context are free. An answer ends in front of any of `stop_strings`. `thinking` turns a template's switch for it.
    """

    def __init__(
        self,
        model: ChatModel,
        *,
        system: str | None = None,
        raw: bool = False,
        overflow: Overflow = ChatConfig.on_overflow,
        seed: int = 0,
        thinking: bool | None = None,
        **generation: Any,
    ) -> None:
        self.model, self.overflow, self._seed, self._generation = model, overflow, seed, generation
        self.templated = model.tokenizer.chat_template is not None and not raw
        if system is not None and not self.templated:
            raise UsageError("a system message needs a chat template: this model has none, or raw turned it off")
        if thinking is not None and not self.templated:
            raise UsageError("thinking needs a chat template: this model has none, or raw turned it off")
        if thinking is not None:
            thinking_switches(model.tokenizer)
        self._thinking = thinking
        self._system: list[Message] = [{"role": "system", "content": system}] if system is not None else []
        self.messages: list[Message] = list(self._system)
        self.context = model.new_context() if model.keeps_contexts else None
        """None where every turn reads the whole conversation."""
        self.used_tokens = 0
        """Of the context, by the conversation so far."""
        self._end_tokens = end_tokens(model.tokenizer, model.generation_config, model.vocab_size, chat=self.templated)

    @property
    def turns(self) -> int:
        """Answers so far."""
        return sum(message["role"] == "assistant" for message in self.messages)

    def send(
        self, text: str, *, streamer: object = None, interrupted: Callable[[], bool] | None = None, **generation: Any
    ) -> Reply:
        """The answer to `text`. `interrupted` is asked after every token and ends the answer, which then stays as far
        as it came. UsageError when the context is full, and any error of `generate`; the conversation is then as it
        was before."""
        if not text.strip():
            raise UsageError("the message is empty")
        arguments = {"max_new_tokens": ChatConfig.max_new_tokens, **self._generation, **generation}
        wanted, stops = arguments["max_new_tokens"], _strings(arguments.pop("stop_strings", None))
        messages = [*self.messages, {"role": "user", "content": text}]
        messages, dropped, ids = self._fitting(messages, wanted)
        most = arguments["max_new_tokens"] = min(wanted, self.model.plan.context_tokens - ids.shape[1])
        torch.manual_seed(self._seed + self.turns)  # so that a conversation that was saved goes on in the same way
        interrupt, stop = Interrupted(interrupted), StopStrings(self.model.tokenizer, stops, ids.shape[1])
        criteria = StoppingCriteriaList([*(arguments.pop("stopping_criteria", None) or []), interrupt, stop])
        if arguments.get("generation_config") is None and self._end_tokens:
            arguments.setdefault("eos_token_id", self._end_tokens)
        arguments |= {"stopping_criteria": criteria, "streamer": streamer, **ONE_ANSWER}
        output = self.model.generate(ids, context=self.context, **arguments)
        answer = output[0, ids.shape[1] :]
        reply = cut(self._decoded(answer), stops)
        self.messages = [*messages, {"role": "assistant", "content": reply}]
        self.used_tokens = output.shape[1] if self.context is None else len(self.context.tokens)
        report = self.model.last_report
        assert report is not None, "a generate that ended well has a report"
        ends = ends_of(self.model.generation_config, arguments)
        stopped = stop.happened or (report.structure is not None and report.structure.over)
        finish = "interrupted" if interrupt.happened else finish_of(answer, most, ends, stopped=stopped)
        return Reply(reply, report, dropped, finish, most, shortened=most < wanted)

    def undo(self) -> bool:
        """Take the last question and its answer back; False when there is none."""
        if not self.turns:
            return False
        self.messages = self.messages[:-2]
        return True

    def reset(self) -> None:
        """Begin anew: no messages but the system's, no statistic."""
        self.messages, self.used_tokens = list(self._system), 0
        if self.context is not None:
            self.context.clear()

    def save(self, path: str | Path) -> None:
        """Write the conversation, KV cache included, to a file; see `GriffinModel.save_context`."""
        if not self.messages:
            raise UsageError("nothing to save: the conversation is empty")
        if self.context is None:
            raise UsageError(f"nothing to save: {why_not_back(self.model.model.config)}")
        if not self.context.tokens:  # layers with a window cannot always take an interrupted pass back
            raise UsageError("nothing to save: the last turn was interrupted, finish one first")
        self.model.save_context(self.context, path, {"messages": self.messages, "templated": self.templated})

    def load(self, path: str | Path) -> None:
        """Go on with a saved conversation; see `GriffinModel.load_context`. On failure this one is as it was."""
        messages, templated = _conversation(read_notes(Path(path)), path)
        context, _ = self.model.load_context(path, self.context)
        self.used_tokens = len(context.tokens)
        self.messages, self.templated = messages, templated
        self._system = [message for message in messages[:1] if message["role"] == "system"]

    def _fitting(self, messages: list[Message], new_tokens: int) -> tuple[list[Message], int, Tensor]:
        """The messages that fit the context with an answer, how many were dropped, and their ids [1, T]."""
        room, dropped = self.model.plan.context_tokens, 0
        while True:
            ids, oldest = self.prompt_ids(messages), len(self._system)
            left, droppable = room - ids.shape[1], self.overflow == "drop" and len(messages) - oldest >= 3
            if left >= (min(new_tokens, room // 4) if droppable else 1):
                return messages, dropped, ids
            if not droppable:
                what = "conversation" if len(messages) - oldest > 1 else "message"
                raise UsageError(
                    f"the {what} is {ids.shape[1]} tokens, the context is {room} and has to hold an answer, too: "
                    "shorten it, begin anew (reset), or raise --ctx-size"
                )
            messages = messages[:oldest] + messages[oldest + 2 :]
            dropped += 2

    def prompt_ids(self, messages: list[Message]) -> Tensor:
        tokenizer = self.model.tokenizer
        if not self.templated:
            text = _joined([message["content"] for message in messages])
            ids = encode(tokenizer, text)
        else:
            ids = encode_messages(tokenizer, messages, thinking=self._thinking)
        if not ids:
            raise UsageError(
                "the tokenizer makes no token of the message: its files or its chat template are incomplete"
            )
        return torch.tensor([ids], dtype=torch.long, device="cpu")

    def _decoded(self, answer: Tensor) -> str:
        text: str = self.model.tokenizer.decode(
            answer, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )  # as it is streamed
        return text


def _strings(given: str | Sequence[str] | None) -> tuple[str, ...]:
    return (given,) if isinstance(given, str) else tuple(given or ())


def _joined(texts: list[str]) -> str:
    """Texts one after the other, with a space where there is none between two of them."""
    joined = ""
    for text in texts:
        apart = not joined or not text or joined[-1].isspace() or text[0].isspace()
        joined += text if apart else f" {text}"
    return joined


class Interrupted(StoppingCriteria):  # type: ignore[misc]
    """Ends an answer when its caller says so."""

    def __init__(self, asked: Callable[[], bool] | None) -> None:
        self._asked, self.happened = asked, False

    def __call__(self, input_ids: Tensor, scores: object, **_: Any) -> Tensor:
        self.happened = self.happened or (self._asked is not None and self._asked())
        return torch.full((input_ids.shape[0],), self.happened, dtype=torch.bool, device=input_ids.device)


def _conversation(notes: dict[str, object], path: str | Path) -> tuple[list[Message], bool]:
    """(messages, templated) of a saved conversation's notes."""
    messages, templated = notes.get("messages"), notes.get("templated")
    if not isinstance(messages, list) or not isinstance(templated, bool):
        raise SavedContextError(f"{path} is a saved prompt and no conversation: use it with run --prompt-cache")
    for message in messages:
        if not isinstance(message, dict) or set(message) != {"role", "content"} or not _texts(message):
            raise SavedContextError(f"{path} is damaged: its messages cannot be read")
    return messages, templated


def _texts(message: dict[str, object]) -> bool:
    return all(isinstance(value, str) for value in message.values())
