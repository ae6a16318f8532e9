"""Perplexity of generation: what pruning by the prompt costs on the text that follows it (paper, figure 5),
what the residents of a plan cost, and how this and other metrics compare with the full model's (figure 4)."""

import json
import math
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from griffin_offload.checkpoint.files import read_text
from griffin_offload.engine.generation import LogitsObserver
from griffin_offload.engine.layer_pass import Progress
from griffin_offload.engine.model import GriffinModel
from griffin_offload.errors import GriffinError, UsageError, one_line, why_unusable
from griffin_offload.evaluation.samples import Sample, Scores, compare, scores_of
from griffin_offload.evaluation.simulation import Simulated, simulate
from griffin_offload.method.variants import Variant
from griffin_offload.planner.tiers import bits_of, expected_error, expected_kl, is_quantised


@dataclass(frozen=True)
class Row:
    """One variant on all windows of one size; field names are those of `eval ppl --json`."""

    selection: str
    density: float
    prompt_tokens: int
    generate_tokens: int
    windows: int
    ppl_full: float
    ppl: float
    kl: float
    """KL(full || variant), nats per token."""
    top1: float
    """Share of tokens at which both have the same first choice."""
    activation_kept: float

    @property
    def increase(self) -> float:
        """Of the perplexity, over the full model's."""
        return self.ppl / self.ppl_full - 1

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def measure(
    model: GriffinModel,
    windows: Sequence[Tensor],
    prompt_tokens: int,
    variants: Sequence[Variant],
    progress: Progress | None = None,
) -> list[Row]:
    """A row per variant; `windows` are ids [P + G] of one size. `progress` is called with (layers done, in all)."""
    samples = [Sample.generation(ids[:prompt_tokens], ids[prompt_tokens:]) for ids in windows]
    simulated = simulate(model, samples, variants, progress=progress)
    return rows_of(simulated, variants, prompt_tokens)


def rows_of(
    simulated: Sequence[Simulated], variants: Sequence[Variant], prompt_tokens: int, tokens: int | None = None
) -> list[Row]:
    """A row per variant, of the first `tokens` scored tokens of every sample; None: of all."""
    full = [sample.full.first(tokens) if tokens else sample.full for sample in simulated]
    columns = zip(*(sample.variants for sample in simulated), strict=True)
    rows = []
    for variant, column in zip(variants, columns, strict=True):
        scores = [score.first(tokens) for score in column] if tokens else column
        rows.append(
            Row(
                selection=variant.selection,
                density=variant.density,
                prompt_tokens=prompt_tokens,
                generate_tokens=full[0].log_probs.numel(),
                windows=len(full),
                ppl_full=_perplexity(full),
                ppl=_perplexity(scores),
                kl=_mean([float(score.kl.mean()) for score in scores]),
                top1=_mean([float(score.agrees.float().mean()) for score in scores]),
                activation_kept=_mean([score.activation_kept for score in scores]),
            )
        )
    return rows


def of_all(parts: Sequence[Sequence[Row]]) -> list[Row]:
    """Rows of all windows, of which each of `parts` has measured some, or none, by the same variants."""

    def mean(rows: Sequence[Row], value: Callable[[Row], float]) -> float:
        return math.fsum(row.windows * value(row) for row in rows) / sum(row.windows for row in rows)

    return [
        replace(
            rows[0],
            windows=sum(row.windows for row in rows),
            ppl_full=math.exp(mean(rows, lambda row: math.log(row.ppl_full))),
            ppl=math.exp(mean(rows, lambda row: math.log(row.ppl))),
            kl=mean(rows, lambda row: row.kl),
            top1=mean(rows, lambda row: row.top1),
            activation_kept=mean(rows, lambda row: row.activation_kept),
        )
        for rows in zip(*(part for part in parts if part), strict=True)
    ]


def _perplexity(scores: Sequence[Scores]) -> float:
    return math.exp(-_mean([float(score.log_probs.double().mean()) for score in scores]))


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


# What a plan costs: its own residents, KV cache and kernels answer, each token behind those of the text.


@dataclass(frozen=True)
class PlannedRow(Row):
    """The residents of a plan in the place of a variant."""

    precision: str
    """In words."""
    ff_bits: float | None
    """Resident bits per weight of the FFs, scales and what is left out included; None where there are none."""
    kv_bits: int
    resident_bytes: int
    expected_kl: float | None
    """What the planner expects, to one digit; None for mixtures of experts, and where there is no feed-forward."""


class FullModel:
    """What the full `model` predicts of `windows`, ids [P + G] of one size: scores, and log-probabilities float32
    [W, G, V] in a temporary file, as those of large vocabularies are more than memory may hold. To be closed."""

    def __init__(
        self, model: GriffinModel, windows: Sequence[Tensor], prompt_tokens: int, progress: Progress | None = None
    ) -> None:
        self.prompt_tokens, self.vocab_size = prompt_tokens, model.vocab_size
        self._windows, self._tokens = windows, windows[0].numel() - prompt_tokens
        self._file = tempfile.TemporaryFile(prefix="griffin-offload-")  # noqa: SIM115  # its life is ours
        samples = [Sample.generation(ids[:prompt_tokens], ids[prompt_tokens:]) for ids in windows]
        try:
            self._full = [found.full for found in simulate(model, samples, (), seen=self._keep, progress=progress)]
        except BaseException:
            self.close()
            raise

    def _keep(self, window: int, token: int, log_probs: Tensor) -> None:
        try:
            self._seek(window, token)
            self._file.write(log_probs.contiguous().cpu().numpy().data)
            self._file.flush()
        except OSError as error:
            size = len(self._windows) * self._tokens * self.vocab_size * 4
            raise GriffinError(
                f"{tempfile.gettempdir()} has no room for {size} bytes of predictions ({one_line(error)}): fewer "
                "--windows, or another directory in TMPDIR"
            ) from error

    def _seek(self, window: int, token: int) -> None:
        self._file.seek((window * self._tokens + token) * self.vocab_size * 4)

    def _log_probs(self, window: int, token: int) -> Tensor:
        """[1, V]"""
        self._seek(window, token)
        read = bytearray(self._file.read(self.vocab_size * 4))
        return torch.frombuffer(read, dtype=torch.float32)[None]

    def against(self, model: GriffinModel, progress: Progress | None = None) -> list[Row]:
        """A row: the windows as answers of `model`, a token at a time, by what `generate` does."""
        if model.vocab_size != self.vocab_size:
            raise UsageError(
                f"the reference predicts {self.vocab_size} tokens and the model {model.vocab_size}: they are no copies "
                "of one model"
            )
        found = []
        for window, (ids, full) in enumerate(zip(self._windows, self._full, strict=True)):
            found.append(Simulated(full, (self._answer(model, window, ids),)))
            if progress is not None:
                progress(window + 1, len(self._windows))
        plan, shape = model.plan, model.engine.shape
        config, error = model.engine.loaded.layers.config, expected_error(shape, plan.counts)
        (row,) = rows_of(found, [Variant(plan.density, config.selection)], self.prompt_tokens)
        return [
            PlannedRow(
                **vars(row),
                precision=plan.in_words,
                ff_bits=bits_of(shape, plan.counts) if shape.with_neurons else None,
                kv_bits=plan.kv_bits,
                resident_bytes=model.resident_bytes,
                expected_kl=None if error is None else expected_kl(error, quantised=is_quantised(shape)),
            )
        ]

    def _answer(self, model: GriffinModel, window: int, ids: Tensor) -> Scores:
        prompt, answer = ids[: self.prompt_tokens], ids[self.prompt_tokens :]
        teacher = _Teacher(answer.to(model.device), lambda token: self._log_probs(window, token).to(model.device))
        said = model.generate(
            prompt[None],
            attention_mask=prompt.new_ones(1, prompt.numel()),
            max_new_tokens=answer.numel(),
            logits_processor=[teacher],
            lookup=False,
            do_sample=False,
            num_beams=1,
            num_return_sequences=1,
            return_dict_in_generate=False,
            temperature=None,
            top_p=None,
            top_k=None,
            min_p=None,
            eos_token_id=None,
            stop_strings=None,
        )
        assert torch.equal(said[0].cpu(), ids), "nothing else chooses tokens"
        assert model.last_report is not None
        return scores_of(teacher.found, model.last_report.activation_kept)

    def close(self) -> None:
        """Give back the file."""
        self._file.close()


class _Teacher(LogitsObserver):
    """Has a text be generated, `answer` [G], and holds what the model predicted against `full`, by token."""

    def __init__(self, answer: Tensor, full: Callable[[int], Tensor]) -> None:
        self._answer, self._full = answer, full
        self.found: list[tuple[Tensor, ...]] = []

    def observe(self, logits: Tensor) -> None:
        token = len(self.found)
        own = logits.float().log_softmax(-1)
        self.found.append(compare(self._full(token), own, self._answer[token : token + 1]))

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        said = torch.full_like(scores, -math.inf)
        said[:, self._answer[len(self.found) - 1]] = 0
        return said


# Perplexity against the lengths of prompt and generation (paper, figure 5).


def measure_lengths(
    model: GriffinModel,
    windows: Sequence[Tensor],
    prompts: Sequence[int],
    generates: Sequence[int],
    variants: Sequence[Variant],
    *,
    first: Sequence[int] = (),
    progress: Progress | None = None,
) -> list[Row]:
    """A row per prompt length, generation length and variant, in this order.

    `windows` are ids of max(prompts) + max(generates) tokens, `first` what every prompt begins with, counted in it.
    The prompt is what stands right before the generated part, so the same tokens are scored behind prompts of every
    length: what differs between rows is the length alone. Shorter generations are the beginnings of the longest, which
    tokens behind them do not change.
    """
    split, longest = max(prompts), max(generates)
    begin = torch.tensor(list(first), dtype=torch.long, device="cpu")
    samples = [
        Sample.generation(torch.cat([begin, ids[split - prompt + len(first) : split]]), ids[split : split + longest])
        for prompt in prompts
        for ids in windows
    ]
    simulated = simulate(model, samples, variants, progress=progress)
    rows = []
    for place, prompt in enumerate(prompts):
        own = simulated[place * len(windows) : (place + 1) * len(windows)]
        for tokens in generates:
            rows += rows_of(own, variants, prompt, tokens)
    return rows


# Metrics relative to the full model's, from what the measuring commands wrote (paper, figure 4).


# Metrics of lm-eval, in the order of preference where a task has several; the paper's come first.
_METRICS = ("acc", "f1", "f1_abstractive", "rouge1", "rouge2", "rougeL", "em", "exact_match", "acc_norm")


@dataclass(frozen=True)
class Point:
    """One metric under one variant."""

    metric: str
    selection: str
    density: float
    value: float
    full: float
    lower_is_better: bool = False

    @property
    def relative(self) -> float:
        """1 is the full model; less is worse."""
        return self.full / self.value if self.lower_is_better else self.value / self.full

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {"sparsity": round(1 - self.density, 6), "relative": self.relative}


def points_of_rows(rows: Sequence[Row]) -> list[Point]:
    """Perplexities: relative is the full model's over the variant's."""
    return [Point("1 / perplexity", row.selection, row.density, row.ppl, row.ppl_full, True) for row in rows]


def read_points(path: Path) -> list[Point]:
    """Points of a file that `eval ppl --json` or `eval tasks --output` wrote; UsageError for any other."""
    try:
        rows = json.loads(read_text(path))
    except (OSError, ValueError) as error:  # ValueError: neither UTF-8 nor JSON
        raise UsageError(f"cannot read the rows {path}: {why_unusable(path, error)}") from error
    try:
        points = list(_of_tasks(rows) if "results" in rows[0] else _of_perplexity(rows))
    except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
        raise UsageError(f"{path} is not what eval ppl --json or eval tasks --output write: {error!r}") from error
    if not points:
        raise UsageError(f"{path} has no row with a density")
    return points


def _of_perplexity(rows: list[dict[str, Any]]) -> Iterator[Point]:
    sizes = {(row["prompt_tokens"], row["generate_tokens"]) for row in rows}
    for row in rows:
        size = f", {row['prompt_tokens']} + {row['generate_tokens']}" if len(sizes) > 1 else ""
        values = float(row["density"]), float(row["ppl"]), float(row["ppl_full"])
        yield Point(f"1 / perplexity{size}", str(row["selection"]), *values, lower_is_better=True)


def _of_tasks(runs: list[dict[str, Any]]) -> Iterator[Point]:
    """The full model's run comes first. A task at which it scores 0 has nothing to lose."""
    full, *variants = runs
    for task, found in full["results"].items():
        key = _metric_of(found)
        if key is None or not found[key]:
            continue
        for run in variants:
            made = run["config"]["model_args"]
            value = float(run["results"][task][key])
            name = f"{task} {key.partition(',')[0]}"
            yield Point(name, str(made["selection"]), float(made["density"]), value, float(found[key]))


def _metric_of(found: dict[str, Any]) -> str | None:
    """The key of a task's metric, `metric,filter` in lm-eval."""
    keys = [key for key in found if "," in key and "_stderr," not in key and isinstance(found[key], int | float)]
    for metric in _METRICS:
        for key in keys:
            if key.startswith(f"{metric},"):
                return key
    return None
