"""What one process of `real_models.py` does: the stock model's own figures, or those of one variant of it.

W windows, P prompt tokens, G scored tokens, V vocabulary. Of a window P tokens pass as a prompt of a user does, and
the further ones as tokens of an answer, but that the text says which they are, so that a few can pass together. All G
scored predictions come from the residents, by the kernels for few rows; the prompt's own is left out.
"""

import lzma
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from griffin_offload import GriffinModel
from griffin_offload.cli.options import quiet_libraries
from griffin_offload.engine.calibration_text import CALIBRATION_TEXT
from griffin_offload.errors import one_line
from griffin_offload.evaluation.samples import SEPARATOR, first_tokens, take_windows, tokenize
from griffin_offload.planner.tiers import bits_of, expected_error

TOGETHER = 8
"""Tokens of a text that pass at once: as many as the kernels for few rows take of every format."""


@dataclass(frozen=True)
class Windows:
    """How many windows of which size."""

    count: int
    prompt_tokens: int
    scored_tokens: int

    @property
    def tokens(self) -> int:
        """Of a window: the prompt, the token that it predicts, and the scored ones."""
        return self.prompt_tokens + 1 + self.scored_tokens


@dataclass(frozen=True)
class Stock:
    """Of the model by stock transformers, in float32: its weights have 16 bits, and nothing else is rounded."""

    perplexity: dict[str, float]
    """By text."""
    half_kl: dict[str, float]
    """KL(float32 || the same by stock transformers in 16 bit) by text, where it was asked for."""


@dataclass(frozen=True)
class Score:
    """Of one text, against the stock model in float32; a list has a mean for every window. KL in nats per token."""

    window_nll: list[float]
    window_kl: list[float]
    top1_agreement: float

    @property
    def perplexity(self) -> float:
        return math.exp(statistics.mean(self.window_nll))

    @property
    def kl(self) -> float:
        return statistics.mean(self.window_kl)

    @property
    def kl_error(self) -> float:
        """Standard error over the windows."""
        return statistics.stdev(self.window_kl) / math.sqrt(len(self.window_kl)) if len(self.window_kl) > 1 else 0.0


@dataclass(frozen=True)
class Measured:
    """Of one variant."""

    scores: dict[str, Score]
    """By text."""
    resident_bytes: int
    chosen: str
    """Precision and density, by the planner, or whose numbers the FFs have."""
    ff_bits: float
    """Resident bits per weight of the FFs, those left out included."""
    expected_error: float | None
    """Of the FFs, by the planner: squared and relative; None of experts and of llama.cpp's codecs."""


@dataclass(frozen=True)
class Variant:
    """One way to keep a model."""

    name: str
    options: dict[str, Any]
    """Arguments of `from_pretrained`."""
    copy: str | None = None
    """Quantised to this once by `convert`; else, for each prompt anew."""
    codec: str | None = None
    """Of llama.cpp, by which the FFs are rounded instead; all else is as the options say."""

    @classmethod
    def of(cls, precision: str, density: float, *, converted: bool = False) -> "Variant":
        plain = precision == "none"
        way = "" if plain else ", converted" if converted else ", on the way"
        options = {"quantize": precision, "density": density}
        return cls(("16 bit" if plain else precision) + way, options, precision if converted else None)


@torch.inference_mode()
def measure_stock(
    folder: Path, texts: Mapping[str, Sequence[str]], windows: Windows, threads: int, out: Path, *, rounding: bool
) -> Stock:
    """Windows of every text (its documents) and the stock model's float32 logits for them, written to `out`; `rounding`
    asks for 16 bit, too."""
    quiet_libraries()
    torch.set_num_threads(threads)
    tokenizer, config = AutoTokenizer.from_pretrained(folder), AutoConfig.from_pretrained(folder)
    exact = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    halves = AutoModelForCausalLM.from_pretrained(folder, dtype=config.dtype) if rounding else None
    first, kept = first_tokens(config, tokenizer), {}
    perplexity, half_kl = {}, {}
    for name, documents in texts.items():
        cut = take_windows(tokenize(list(documents), tokenizer), windows.tokens, windows.count, "even", first)
        logits = torch.empty(len(cut), windows.scored_tokens, config.get_text_config().vocab_size)
        nll, kl = [], []
        for own, ids in zip(logits, cut, strict=True):
            own.copy_(exact(ids[None, :-1], logits_to_keep=len(own)).logits[0])
            log_probs = own.log_softmax(-1)
            nll.append(mean_nll(log_probs, ids))
            if halves is not None:
                rounded = halves(ids[None, :-1], logits_to_keep=len(own)).logits[0].float()
                kl.append(divergence(log_probs, rounded.log_softmax(-1)))
        kept[name] = {"ids": torch.stack(cut), "logits": logits}
        perplexity[name] = math.exp(statistics.mean(nll))
        half_kl |= {name: statistics.mean(kl)} if rounding else {}
    torch.save(kept, out)
    return Stock(perplexity, half_kl)


def mean_nll(log_probs: Tensor, ids: Tensor) -> float:
    """Of the last tokens of a window, [G, V]."""
    return -log_probs.gather(-1, ids[-len(log_probs) :, None]).double().mean().item()


def divergence(reference: Tensor, log_probs: Tensor) -> float:
    """KL(reference || log_probs) of [G, V], nats per token."""
    return (reference.exp() * (reference - log_probs)).double().sum(-1).mean().item()


@torch.inference_mode()
def write_importance(folder: Path, out: Path, threads: int) -> None:
    """The mean squares of what goes into each matrix of the FFs, by its name, over the text that int4 is calibrated
    with, in as many pieces."""
    quiet_libraries()
    torch.set_num_threads(threads)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    first = first_tokens(model.config, tokenizer)
    pieces = take_windows(tokenize([CALIBRATION_TEXT], tokenizer), 128, 16, "even", first)
    found: dict[str, Tensor] = {}

    def add(name: str, given: tuple[Tensor, ...]) -> None:
        found[name] = found.get(name, 0) + given[0].square().mean((0, 1)) / len(pieces)

    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and ".mlp." in name:
            module.register_forward_pre_hook(lambda _, given, name=name: add(name, given))
    for ids in pieces:
        model.model(ids[None])
    numpy.savez(out, **{name: squares.numpy() for name, squares in found.items()})


class FloatLinear(nn.Module):
    """A matrix of float32, whatever the type of its inputs."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x.float(), self.weight).to(x.dtype)


def put_numbers(model: nn.Module, folder: Path) -> int:
    """Those of `folder`, NAME.npy, in the places of the matrices of these names; how many weights that were."""
    count = 0
    for path in folder.glob("*.npy"):
        owner, _, name = path.stem.rpartition(".")
        numbers = torch.from_numpy(numpy.load(path))
        setattr(model.get_submodule(owner), name, FloatLinear(numbers))
        count += numbers.numel()
    return count


@torch.no_grad()
def measure_variant(
    folder: Path,
    variant: Variant,
    reference: Path,
    windows: Windows,
    threads: int,
    numbers: tuple[Path, float] | None = None,
) -> Measured | str:
    """Figures of `folder`, a checkpoint that is converted already if the variant is; or why there are none. With
    `numbers` these are the FFs', of so many bits a weight."""
    quiet_libraries()
    try:
        options = {"device": "cpu", "ctx_size": max(windows.tokens, 256), "threads": threads, **variant.options}
        with GriffinModel.from_pretrained(folder, **options) as model:
            plan, shape = model.plan, model.engine.shape
            size, bits, error = model.resident_bytes, bits_of(shape, plan.counts), expected_error(shape, plan.counts)
            chosen = f"{plan.in_words}, density {plan.density:.2f}"
            if numbers:
                count = put_numbers(model.model, numbers[0])
                size += round((numbers[1] - bits) * count / 8)
                bits, error, chosen = numbers[1], None, "FFs by llama.cpp's codec"
            kept = torch.load(reference, mmap=True)
            scores = {name: score(model, of["ids"], of["logits"]) for name, of in kept.items()}
            return Measured(scores, size, chosen, bits, error)
    except Exception as error:  # a row of the page says so
        return f"{type(error).__name__}: {one_line(error)}"


def score(model: GriffinModel, windows: Tensor, reference: Tensor) -> Score:
    """`windows` [W, P + 1 + G], `reference` logits [W, G, V]."""
    nll, kl, agreement = [], [], []
    for ids, stock in zip(windows, reference, strict=True):
        own = forced_logits(model, ids, len(stock)).log_softmax(-1)
        stock_log_probs = stock.float().log_softmax(-1)
        nll.append(mean_nll(own, ids))
        kl.append(divergence(stock_log_probs, own))
        agreement.append((stock_log_probs.argmax(-1) == own.argmax(-1)).double().mean().item())
    return Score(nll, kl, statistics.mean(agreement))


def forced_logits(model: GriffinModel, ids: Tensor, scored_tokens: int) -> Tensor:
    """float32 [G, V]: what the residents predict of a window [P + 1 + G], each token behind those of the text."""
    stock, layers = model.model, model.engine.loaded.layers
    prompt, answer = ids[: -scored_tokens - 1], ids[-scored_tokens - 1 : -1]
    cache = stock(input_ids=prompt[None], use_cache=True, logits_to_keep=1).past_key_values
    fetched, found = layers.fetched_bytes, []
    for part in answer.split(TOGETHER):
        found.append(stock(input_ids=part[None], past_key_values=cache, use_cache=True).logits[0])
    if layers.fetched_bytes != fetched:
        raise RuntimeError(f"decoding fetched {layers.fetched_bytes - fetched} bytes")
    return torch.cat(found).float()


def documents_of(path: Path, characters: int | None = None) -> list[str]:
    """Of a UTF-8 text, plain or .xz, or of its start."""
    with lzma.open(path) if path.suffix == ".xz" else path.open("rb") as file:
        pieces = [piece.strip() for piece in file.read().decode()[:characters].split(SEPARATOR)]
    return [piece for piece in pieces if piece]
