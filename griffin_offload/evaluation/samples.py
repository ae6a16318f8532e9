"""What is measured on: token sequences, which of their tokens choose neurons and which are predicted. And how: from
hidden states to log-probabilities of the scored tokens, and how far a variant is from the full model.

Logits exist for a few positions at a time. V vocabulary, G scored tokens.
"""

import contextlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig
from transformers.modeling_outputs import BaseModelOutputWithPastAndCrossAttentions

from griffin_offload.checkpoint.files import read_text
from griffin_offload.config import WindowStart
from griffin_offload.engine.model_interface import stock_forward
from griffin_offload.errors import UnsupportedModel, UsageError, one_line, why_unusable
from griffin_offload.transformers_api import StockModel, Tokenizer


@dataclass(frozen=True)
class Sample:
    """`ids` [N]. The first `prompt_tokens` pass the full model and choose neurons, those behind them pass through the
    chosen ones, and the last is only predicted. Log-probabilities are wanted of the tokens from `scored_from` on."""

    ids: Tensor
    prompt_tokens: int
    scored_from: int

    def __post_init__(self) -> None:
        if not 1 <= self.prompt_tokens < self.ids.numel():
            raise UsageError(f"a sample of {self.ids.numel()} tokens cannot have a prompt of {self.prompt_tokens}")
        if not 1 <= self.scored_from < self.ids.numel():
            raise UsageError(f"a sample of {self.ids.numel()} tokens cannot be scored from token {self.scored_from} on")

    @classmethod
    def generation(cls, prompt: Tensor, continuation: Tensor) -> "Sample":
        """What `generate` would do: the first token of `continuation` [G] is the full model's, the others are
        predicted through the neurons that `prompt` [P] chose."""
        _not_empty(prompt, continuation)
        return cls(torch.cat([prompt, continuation]).cpu(), prompt.numel(), prompt.numel())

    @classmethod
    def classification(cls, context: Tensor, continuation: Tensor) -> "Sample":
        """The paper's mode for a single forward ("class"): all input tokens but the last choose, and only the last one
        passes through the chosen neurons. All tokens of `continuation` are scored."""
        _not_empty(context, continuation)
        ids = torch.cat([context, continuation]).cpu()
        if ids.numel() < 3:
            raise UsageError("one context token and one to predict: there is none that could choose neurons, give 2")
        return cls(ids, ids.numel() - 2, context.numel())

    @classmethod
    def prompt_alone(cls, ids: Tensor) -> "Sample":
        """All of `ids` [T] are a prompt; the token behind them is nobody's business."""
        return cls(torch.cat([ids, ids[-1:]]).cpu(), ids.numel(), ids.numel())

    @classmethod
    def strict(cls, context: Tensor, continuation: Tensor) -> "Sample":
        """Every token of `continuation` is predicted through chosen neurons, the first one, too. So the last token of
        `context` is the first that passes through them, and those before it choose: what generation would do that
        streams the prompt without its last token and decodes from there."""
        _not_empty(context, continuation)
        if context.numel() < 2:
            raise UsageError("one context token passes through neurons that none is left to choose: give 2")
        return cls(torch.cat([context, continuation]).cpu(), context.numel() - 1, context.numel())

    @classmethod
    def dense(cls, context: Tensor, continuation: Tensor) -> "Sample":
        """The full model predicts every token of `continuation`, under every variant."""
        _not_empty(context, continuation)
        ids = torch.cat([context, continuation]).cpu()
        return cls(ids, ids.numel() - 1, context.numel())

    @property
    def input_tokens(self) -> int:
        return self.ids.numel() - 1

    @property
    def scored_tokens(self) -> int:
        return self.ids.numel() - self.scored_from


def _not_empty(prompt: Tensor, continuation: Tensor) -> None:
    if prompt.numel() < 1 or continuation.numel() < 1:
        raise UsageError(
            f"a prompt of {prompt.numel()} tokens and a continuation of {continuation.numel()}: at least 1"
        )


@dataclass(frozen=True)
class Batch:
    """Samples side by side, so that all prompts end at one column: padded on the left where a prompt is shorter.

    On the right a shorter continuation is filled up with tokens that nobody looks at: no token sees a later one.
    """

    samples: tuple[Sample, ...]
    ids: Tensor
    """[B, T]"""
    mask: Tensor
    """[B, T], 0 for padding on the left."""
    prompt_columns: int
    """Columns before which the prompts are."""

    @classmethod
    def of(cls, samples: Sequence[Sample]) -> "Batch":
        prompt = max(sample.prompt_tokens for sample in samples)
        rest = max(sample.input_tokens - sample.prompt_tokens for sample in samples)
        ids = torch.zeros(len(samples), prompt + rest, dtype=torch.long, device="cpu")
        mask = torch.zeros_like(ids)
        for row, sample in enumerate(samples):
            start = prompt - sample.prompt_tokens
            ids[row, start : start + sample.input_tokens] = sample.ids[:-1]
            mask[row, start:] = 1
        return cls(tuple(samples), ids, mask, prompt)

    @staticmethod
    def unpadded(samples: Sequence[Sample]) -> list[Sample]:
        """Those whose prompts are as long as the first one's, of a model to which padding counts as tokens."""
        return [sample for sample in samples if sample.prompt_tokens == samples[0].prompt_tokens]

    @property
    def padded(self) -> bool:
        return not bool(self.mask.all())

    @property
    def positions(self) -> Tensor:
        """[B, T], counted from each sample's first token; behind its last one the count stands still."""
        longest = torch.tensor([[sample.input_tokens] for sample in self.samples], dtype=torch.long, device="cpu")
        return (self.mask.cumsum(1) - 1).clamp(min=0).minimum(longest - 1)

    def scored_columns(self, row: int) -> slice:
        """The columns whose outputs predict the scored tokens of sample `row`."""
        sample = self.samples[row]
        first = self.prompt_columns - sample.prompt_tokens + sample.scored_from - 1
        return slice(first, first + sample.scored_tokens)


def columns_of(samples: Sequence[Sample]) -> int:
    """T of their batch."""
    prompt = max(sample.prompt_tokens for sample in samples)
    return prompt + max(sample.input_tokens - sample.prompt_tokens for sample in samples)


# Windows of a text: where prompts and their continuations are cut.


SEPARATOR = "<|endoftext|>"
"""Between the documents of a text file."""


def read_documents(path: Path) -> list[str]:
    """The documents of a text file; UsageError for a file that cannot be read."""
    try:
        text = read_text(path)
    except (OSError, ValueError) as error:  # ValueError: not UTF-8
        raise UsageError(f"cannot read the text {path}: {why_unusable(path, error)}") from error
    pieces = [piece.strip() for piece in text.split(SEPARATOR)]
    return [piece for piece in pieces if piece]


def tokenize(documents: list[str], tokenizer: Tokenizer) -> list[list[int]]:
    """Token ids of every document, without what a tokenizer puts around a text: windows are cut out of it."""
    return [tokenizer(document, add_special_tokens=False)["input_ids"] for document in documents]


def first_tokens(config: PretrainedConfig, tokenizer: Tokenizer) -> list[int]:
    """What every window starts with: the BOS token for Gemma, which is lost without it, nothing for others, as in the
    paper."""
    first = tokenizer.bos_token_id if config.model_type.startswith("gemma") else None
    return [] if first is None else [first]


def take_windows(
    documents: list[list[int]], tokens: int, count: int, start: WindowStart, first: Sequence[int] = ()
) -> list[Tensor]:
    """`count` windows of `tokens` ids: spread evenly over the text, or at the starts of documents. Each begins with
    `first`. UsageError, with the numbers, when the text is too short."""
    taken = _cut(documents, tokens - len(first), count, start)
    return [torch.cat([torch.tensor(first, dtype=torch.long, device="cpu"), ids]) for ids in taken]


def _cut(documents: list[list[int]], tokens: int, count: int, start: WindowStart) -> list[Tensor]:
    if start == "documents":
        found = [ids[:tokens] for ids in documents if len(ids) >= tokens][:count]
        if len(found) < count:
            raise UsageError(
                f"{len(found)} of {len(documents)} documents have {tokens} tokens, {count} windows were asked for: "
                "fewer --windows, shorter ones, or --window-start even"
            )
        return [torch.tensor(ids, dtype=torch.long, device="cpu") for ids in found]
    text = torch.tensor([token for ids in documents for token in ids], dtype=torch.long, device="cpu")
    if text.numel() < tokens:
        raise UsageError(f"the text has {text.numel()} tokens, a window {tokens}: a longer text or shorter windows")
    return [text[at : at + tokens] for at in _even_starts(text.numel() - tokens, count)]


def _even_starts(last: int, count: int) -> Iterator[int]:
    if last + 1 < count:
        raise UsageError(f"the text has {last + 1} places for a window, {count} were asked for: fewer --windows")
    yield from (round(number * last / max(count - 1, 1)) for number in range(count))


def json_lines(path: Path, *, whole: bool = False) -> Iterator[Any]:
    """The values of a jsonl file, blank lines left out; with `whole`, the file's one value where it is one."""
    try:
        text = read_text(path)
    except (OSError, ValueError) as error:  # ValueError: not UTF-8
        raise UsageError(f"cannot read {path}: {why_unusable(path, error)}") from error
    if whole:
        try:
            yield json.loads(text)
            return
        except ValueError:
            pass
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            try:
                value = json.loads(line)
                json.dumps(value, ensure_ascii=False).encode()  # an escape may be half of a letter
            except (ValueError, RecursionError) as error:
                raise UsageError(f"{path}, line {number} is not JSON: {one_line(error)}") from error
            yield value


@dataclass(frozen=True)
class Scores:
    """One sample under one variant, a number for each of its G scored tokens, in host memory."""

    log_probs: Tensor
    """float32, natural logarithm."""
    kl: Tensor
    """KL(full model || variant) of the prediction, in nats."""
    agrees: Tensor
    """bool: the most likely token is the full model's."""
    greedy: Tensor
    """bool: the token itself is the most likely one."""
    activation_kept: float
    """Share of s^2 / S that the chosen neurons hold, mean over layers."""

    def first(self, tokens: int) -> "Scores":
        """Of the first `tokens` scored tokens alone."""
        part = slice(tokens)
        return replace(
            self,
            log_probs=self.log_probs[part],
            kl=self.kl[part],
            agrees=self.agrees[part],
            greedy=self.greedy[part],
        )


def stack_of(model: StockModel, decoder: nn.ModuleList) -> nn.Module:
    """The module that runs the decoder layers, from token ids to the last norm."""
    for module in model.modules():
        if any(child is decoder for child in module.children()):
            return module
    raise UnsupportedModel("the decoder layers belong to no module of the model")


@dataclass
class _StackOutput(BaseModelOutputWithPastAndCrossAttentions):  # type: ignore[misc]
    """With all that the models around the stack read of it."""

    router_logits: Any = None
    cache_params: Any = None


@contextlib.contextmanager
def stock_head(model: StockModel, stack: nn.Module) -> Iterator[Callable[[Tensor], Tensor]]:
    """A function from hidden states [N, H] to the model's logits [N, V] inside the context.

    It is the stock forward with the stack's output given: head, scale and soft cap are the model's own.
    """
    given: list[Tensor] = []

    def output(*_: Any, **__: Any) -> _StackOutput:
        return _StackOutput(last_hidden_state=given[-1])

    def logits(hidden: Tensor) -> Tensor:
        given[:] = [hidden[:, None]]
        ids = torch.zeros(hidden.shape[0], 1, dtype=torch.long, device=hidden.device)
        found: Tensor = stock_forward(model)(input_ids=ids, use_cache=False).logits
        return found[:, 0]

    stack.forward = output
    try:
        yield logits
    finally:
        del stack.forward


def score_rows(
    head: Callable[[Tensor], Tensor],
    hidden: Tensor,
    targets: Tensor,
    kept: list[float],
    positions_at_once: int,
    seen: Callable[[int, Tensor], object] | None = None,
) -> list[Scores]:
    """Scores of one sample: `hidden` is [1 + variants, G, H], the full model first; `targets` [G]; `kept` of each.
    `seen` is shown the full model's log-probabilities [N, V] of some positions, and the first of these."""
    columns: list[list[tuple[Tensor, ...]]] = [[] for _ in hidden]
    for start in range(0, targets.numel(), positions_at_once):
        part = slice(start, start + positions_at_once)
        full = head(hidden[0, part]).float().log_softmax(-1)
        columns[0].append(compare(full, full, targets[part]))
        if seen is not None:
            seen(start, full)
        for row in range(1, hidden.shape[0]):
            own = head(hidden[row, part]).float().log_softmax(-1)
            columns[row].append(compare(full, own, targets[part]))
    return [scores_of(chunks, share) for chunks, share in zip(columns, kept, strict=True)]


def scores_of(chunks: Sequence[tuple[Tensor, ...]], activation_kept: float) -> Scores:
    """What was compared, some positions after others."""
    log_probs, kl, agrees, greedy = (torch.cat(parts) for parts in zip(*chunks, strict=True))
    return Scores(log_probs, kl, agrees, greedy, activation_kept)


def compare(full: Tensor, own: Tensor, targets: Tensor) -> tuple[Tensor, ...]:
    """(log-probabilities, KL, agreement, greedy) of a few positions; `full` and `own` are log-softmaxed [N, V]."""
    best = own.argmax(-1)
    kl = (
        torch.zeros(targets.numel(), dtype=torch.float32, device=own.device)
        if own is full
        else (full.exp() * (full - own)).sum(-1)
    )
    found = own.gather(-1, targets[:, None])[:, 0], kl, best == full.argmax(-1), best == targets
    return tuple(tensor.cpu() for tensor in found)
