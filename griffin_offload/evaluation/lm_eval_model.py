"""`GriffinLM`: lm-evaluation-harness's view of a model, of which the full one and several variants can be asked.

Requests are encoded by lm-eval's own `HFLM`. Log-likelihoods come from the simulation, for all variants at once;
generations from the runtime, one request at a time, because samples of a batch would share experts.
"""

import hashlib
import math
import warnings
from array import array
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from lm_eval.api.instance import Instance
from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from griffin_offload.checkpoint.base import Checkpoint
from griffin_offload.checkpoint.registry import open_checkpoint
from griffin_offload.config import MIN_AUTO_CTX, BosRule, EvalMode, SelectionMethod
from griffin_offload.engine.layer_pass import Progress
from griffin_offload.engine.model import GriffinModel
from griffin_offload.engine.spec import by_residents_alone
from griffin_offload.errors import DoesNotFit
from griffin_offload.evaluation.config import TasksConfig
from griffin_offload.evaluation.distributed import Processes
from griffin_offload.evaluation.samples import Sample, Scores
from griffin_offload.evaluation.simulation import Simulated, simulate
from griffin_offload.method.variants import Variant

# Log-likelihoods of continuations under the full model and several variants, computed once for all of them.


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


# The one model an evaluation has loaded at a time: to stream all layers for a simulation, or to generate.


class ModelSlot:
    """Loads what is asked for, and gives back the memory of what was loaded before. `options` are `LoadConfig`'s."""

    def __init__(self, checkpoint: Checkpoint, options: dict[str, Any]) -> None:
        self._checkpoint = checkpoint
        self._options = options | {"quantize": checkpoint.precision.name}
        self.model: GriffinModel | None = None
        self._purpose: Variant | None = None

    def streaming(self) -> GriffinModel:
        """A model without resident neurons. Its plan's context does not matter: a simulation has no KV cache."""
        ctx_tokens = min(MIN_AUTO_CTX, getattr(self._checkpoint.config, "max_position_embeddings", MIN_AUTO_CTX))
        if self.model is None or self._purpose is not None:
            self._load(None, ctx_tokens, ctx_tokens, density=0.0, always_stream=True)
        assert self.model is not None
        return self.model

    def generating(self, variant: Variant, prompt_tokens: int, ctx_tokens: int) -> GriffinModel:
        """A model with the neurons of `variant` resident, for prompts and answers of these lengths. The full model,
        where it does not fit, answers in exact mode."""
        plan = self.model.plan if self.model is not None and self._purpose == variant else None
        if plan is None or plan.context_tokens < ctx_tokens or plan.prompt_tokens < prompt_tokens:
            kept = self._options | {"density": variant.density, "selection": variant.selection}
            if variant.density < 1:
                kept = by_residents_alone(self._checkpoint, kept)
            try:
                self._load(variant, prompt_tokens, ctx_tokens, **kept)
            except DoesNotFit:
                if variant.density < 1:
                    raise
                self._load(variant, prompt_tokens, ctx_tokens, exact=True)
        assert self.model is not None
        return self.model

    def close(self) -> None:
        """Give back the memory."""
        if self.model is not None:
            self.model.close()
        self.model = None

    def _load(self, purpose: Variant | None, prompt_tokens: int, ctx_tokens: int, **kept: Any) -> None:
        self.close()
        options = self._options | kept | {"prompt_tokens": prompt_tokens, "ctx_size": ctx_tokens}
        self.model = GriffinModel.from_pretrained(self._checkpoint.path, **options)
        self._purpose = purpose


class Standin:
    """What lm-eval asks of a transformers model, before any is loaded."""

    device = torch.device("cpu")
    """Where requests are made; the runtime moves them."""

    def __init__(self, checkpoint: Checkpoint, generate: Callable[..., Any]) -> None:
        self.config, self.dtype, self.generate = checkpoint.config, checkpoint.dtype, generate
        self.name_or_path = str(checkpoint.directory)


Tokens = list[int]


@register_model("griffin")
class GriffinLM(HFLM):  # type: ignore[misc]
    """One checkpoint under several variants; `row` says which one answers, 0 being the full model.

    As lm-eval's model "griffin" it has one variant, of `density` and `selection`. `options` are those of `LoadConfig`
    that concern memory, device and seed. Batch sizes are lm-eval's and have no effect: passes are sized by the budget.
    """

    def __init__(
        self,
        pretrained: str | Path,
        *,
        mode: EvalMode = TasksConfig.mode,
        density: float = TasksConfig.densities[0],
        selection: SelectionMethod = TasksConfig.selection,
        variants: Sequence[Variant] | None = None,
        bos: BosRule = TasksConfig.bos,
        max_length: int | None = TasksConfig.max_length,
        processes: Processes | None = None,
        batch_size: Any = None,
        max_batch_size: Any = None,
        **options: Any,
    ) -> None:
        processes = processes or Processes.launched()
        checkpoint = open_checkpoint(pretrained, offline=options.get("offline", False))
        tokenizer = checkpoint.tokenizer()  # fails with an error of ours
        self.variants = [Variant(density, selection)] if variants is None else list(variants)
        self.row = 1
        self._mode, self._bos = mode, bos
        self.progress: Progress | None = None
        self._options = {name: value for name, value in options.items() if value is not None}
        self.slot = ModelSlot(checkpoint, processes.share(options))
        self._likelihoods = Likelihoods(mode, self._simulate)
        gemma = checkpoint.config.model_type.startswith("gemma")
        super().__init__(
            pretrained=Standin(checkpoint, self._generate),
            backend="causal",
            # Given a directory, lm-eval loads it by `add_bos_token`, which an object is not told.
            tokenizer=str(checkpoint.directory) if checkpoint.path == checkpoint.directory else tokenizer,
            add_bos_token=None if bos == "tokenizer" else gemma,
            max_length=max_length,
        )
        self._rank, self._world_size, self.accelerator = processes.rank, processes.size, processes.accelerator

    @property
    def model(self) -> Standin:
        """Answers HFLM's own questions, without a model being loaded."""
        return self._model  # type: ignore[no-any-return]

    def model_args(self, row: int) -> dict[str, Any]:
        """What lm-eval's model "griffin" is called with to be one row, for the record."""
        shared = {"pretrained": self.model.name_or_path, "mode": self._mode, "bos": self._bos, **self._options}
        if row == 0:
            return shared | {"density": 1.0}
        variant = self.variants[row - 1]
        return shared | {"density": variant.density, "selection": variant.selection}

    def close(self) -> None:
        """Give the model's memory back."""
        self.slot.close()

    def forget(self) -> None:
        """Drop log-likelihoods that were kept for other rows."""
        self._likelihoods.forget()

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = True) -> list[LikelihoodResult]:
        """(log-likelihood, greedy) of every continuation; the bar is `progress`."""
        return super().loglikelihood(requests, disable_tqdm=True)  # type: ignore[no-any-return]

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = True) -> list[float]:
        """Of whole texts, in HFLM's windows: each is a request whose context is the one token before it."""
        windows = [self._windows(*request.args) for request in requests]
        answers = iter(self._loglikelihood_tokens([("", *window) for text in windows for window in text]))
        return [math.fsum(next(answers).log_likelihood for _ in text) for text in windows]

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = True) -> list[str]:
        """Continuations by the runtime, loaded at the density of `row` for the longest request."""
        lengths = [self._lengths(*request.args) for request in requests]
        self._prompt_tokens = max(prompt for prompt, _ in lengths)
        self._ctx_tokens = max(prompt + new for prompt, new in lengths)
        self._generations, self._generated = len(requests), 0
        return super().generate_until(requests, disable_tqdm=True)  # type: ignore[no-any-return]

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, Tokens, Tokens]], disable_tqdm: bool = True, override_bs: int | None = None
    ) -> list[LikelihoodResult]:
        """Of (anything, context, continuation), cut on the left to the model's context as HFLM does."""
        found = []
        for _, context, continuation in requests:
            ids = (context + continuation)[-(self.max_length + 1) :]
            found.append(LikelihoodRequest(ids, len(ids) - len(continuation)))
        return self._likelihoods.of(found, self.row)

    def _simulate(self, samples: list[Sample]) -> list[Simulated]:
        return simulate(self.slot.streaming(), samples, self.variants, progress=self.progress)

    def _generate(self, **arguments: Any) -> Any:
        variant = Variant(1.0) if self.row == 0 else self.variants[self.row - 1]
        output = self.slot.generating(variant, self._prompt_tokens, self._ctx_tokens).generate(**arguments)
        self._generated += 1
        if self.progress is not None:
            self.progress(self._generated, self._generations)
        return output

    def _windows(self, text: str) -> list[tuple[Tokens, Tokens]]:
        pieces = get_rolling_token_windows(
            token_list=self.tok_encode(text),
            prefix_token=self.prefix_token_id,
            max_seq_len=self.max_length,
            context_len=1,
        )
        return [make_disjoint_window(piece) for piece in pieces]

    def _lengths(self, context: str, settings: dict[str, Any]) -> tuple[int, int]:
        """(prompt tokens, new tokens) of one request, cut as HFLM does."""
        new = normalize_gen_kwargs(settings, self.max_gen_toks)["max_gen_toks"]
        return max(min(len(self.tok_encode(context)), self.max_length - new), 1), new
