"""What one process of `real_models.py` does: the stock model's own figures, or those of one variant of it.

W windows, P prompt tokens, G scored tokens, V vocabulary. Of a window P tokens pass as a prompt of a user does, and
the further ones as tokens of an answer, but that the text says which they are, so that a few can pass together. All G
scored predictions come from the residents, by the kernels for few rows; the prompt's own is left out.
"""

import json
import lzma
import math
import shutil
import statistics
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy
import torch
from sides import environment, in_own_process
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from griffin_offload import GriffinModel
from griffin_offload.checkpoint.tokenizer import encode_messages
from griffin_offload.cli.options import quiet_libraries
from griffin_offload.devices.registry import CpuDevice
from griffin_offload.engine.calibration_text import CALIBRATION_TEXT
from griffin_offload.errors import one_line
from griffin_offload.evaluation.ceilings import decode_bytes_per_s
from griffin_offload.evaluation.samples import SEPARATOR, first_tokens, take_windows, tokenize
from griffin_offload.evaluation.speed import run_fixed
from griffin_offload.formats import every
from griffin_offload.planner.tiers import bits_of, expected_error

QUESTIONS = (
    "What is the capital of France?",
    "How many days are in a week?",
    "Name three colours of a rainbow.",
)
TOGETHER = 8
"""Tokens of a text that pass at once: as many as the kernels for few rows take of every format."""
ANSWER_TOKENS = 48
SPEED_TOKENS = 64
EXACT_DENSITY, EXACT_WINDOWS, EXACT_TOKENS = 0.5, 4, 64


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
    """KL(float32 || the same by stock transformers in 16 bit) by text."""
    bytes_per_s: float
    """The fastest that one row is multiplied here by matrices of the model's FF that no cache holds, any precision."""


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
    token_bytes: int
    """Weights that one token reads: the residents without an embedding that is only looked up."""
    tokens_per_s: list[float]
    """One for each repeat."""
    answers: list[str]
    tokens_per_pass: float | None
    """Of exact mode; None: not measured."""
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
    drafts: bool = False
    """Whether it is a way to draft in exact mode that is measured: half of the neurons as they are stored, or neurons
    in fewer bits for those of a 16-bit checkpoint."""
    codec: str | None = None
    """Of llama.cpp, by which the FFs are rounded instead; all else is as the options say."""

    @classmethod
    def of(cls, precision: str, density: float, *, converted: bool = False) -> "Variant":
        plain = precision == "none"
        way = "" if plain else ", converted" if converted else ", on the way"
        drafts = density == EXACT_DENSITY if plain or converted else precision in ("int8", "int4")
        options = {"quantize": precision, "density": density}
        return cls(("16 bit" if plain else precision) + way, options, precision if converted else None, drafts)


@torch.inference_mode()
def measure_stock(folder: Path, texts: Mapping[str, Sequence[str]], windows: Windows, threads: int, out: Path) -> Stock:
    """Windows of every text (its documents) and the stock model's float32 logits for them, written to `out`."""
    quiet_libraries()
    torch.set_num_threads(threads)
    tokenizer, config = AutoTokenizer.from_pretrained(folder), AutoConfig.from_pretrained(folder)
    exact, halves = (AutoModelForCausalLM.from_pretrained(folder, dtype=of) for of in (torch.float32, config.dtype))
    first, kept = first_tokens(config, tokenizer), {}
    perplexity, half_kl = {}, {}
    for name, documents in texts.items():
        cut = take_windows(tokenize(list(documents), tokenizer), windows.tokens, windows.count, "even", first)
        logits = torch.empty(len(cut), windows.scored_tokens, config.get_text_config().vocab_size)
        nll, kl = [], []
        for own, ids in zip(logits, cut, strict=True):
            same, rounded = (m(ids[None, :-1], logits_to_keep=len(own)).logits[0].float() for m in (exact, halves))
            own.copy_(same)
            nll.append(mean_nll(same.log_softmax(-1), ids))
            kl.append(divergence(same.log_softmax(-1), rounded.log_softmax(-1)))
        kept[name] = {"ids": torch.stack(cut), "logits": logits}
        perplexity[name], half_kl[name] = math.exp(statistics.mean(nll)), statistics.mean(kl)
    torch.save(kept, out)
    rates = [
        decode_bytes_per_s(p, config.hidden_size, config.intermediate_size, config.dtype, CpuDevice.current(), threads)
        for p in every()
    ]
    return Stock(perplexity, half_kl, max(rate for rate in rates if rate))


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


def rounded_by(
    codec: str, folder: Path, scratch: Path, python: str, threads: int, told: list[dict[str, Any]]
) -> tuple[Path, float] | str:
    """Where the FFs' numbers are as llama.cpp's codec makes them, and its bits a weight, or why they are not. `python`
    is of an environment with xllamacpp; `told` gets what was done."""
    importance, out = scratch / "importance.npz", scratch / "codec"
    if not importance.exists():
        in_own_process(write_importance, folder, importance, threads)
    shutil.rmtree(out, ignore_errors=True)
    command = [python, "-m", "peers.worker_codecs", str(folder), str(importance), codec, str(out)]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True)
    if done.returncode:
        return done.stderr.strip().rpartition("\n")[2]
    told.append({"codec": codec, **json.loads(done.stdout)})
    return out, told[-1]["bits"]


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
    repeats: int,
    numbers: tuple[Path, float] | None = None,
) -> Measured | str:
    """Figures of `folder`, a checkpoint that is converted already if the variant is; or why there are none. Without
    `repeats` quality alone. With `numbers` these are the FFs', of so many bits a weight."""
    quiet_libraries()
    try:
        kept = torch.load(reference, mmap=True)
        prompts = next(iter(kept.values()))["ids"][:, : windows.prompt_tokens]
        sizes = {"ctx_size": max(windows.tokens, windows.prompt_tokens + SPEED_TOKENS, 256), "threads": threads}
        options = {"device": "cpu", **sizes, **variant.options}
        with GriffinModel.from_pretrained(folder, **options) as model:
            plan, shape = model.plan, model.engine.shape
            planned = (f"{plan.in_words}, density {plan.density:.2f}", bits_of(shape, plan.counts))
            error = expected_error(shape, plan.counts)
            resident = model.resident_bytes
            if numbers:
                count = put_numbers(model.model, numbers[0])
                resident += round(count * (numbers[1] - planned[1]) / 8)
                planned, error = ("FFs by llama.cpp's codec", numbers[1]), None
            scores = {name: score(model, of["ids"], of["logits"]) for name, of in kept.items()}
            asked = range(repeats + 1 if repeats else 0)
            speeds = [run_fixed(model, prompts[0], SPEED_TOKENS).decode_tokens_per_s for _ in asked]
            found = (scores, resident, bytes_of_a_token(model), speeds[1:], answers(model) if asked else [])
        exact = tokens_per_pass(folder, prompts[:EXACT_WINDOWS], options) if variant.drafts and repeats else None
        return Measured(*found, exact, *planned, error)
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


def generate(model: GriffinModel, prompt: Tensor, new_tokens: int, **options: Any) -> Any:
    """Greedily behind `prompt` [P], whatever the checkpoint's defaults are."""
    greedy = {"do_sample": False, "num_beams": 1, "temperature": None, "top_p": None, "top_k": None}
    return model.generate(prompt[None], max_new_tokens=new_tokens, **greedy, **options)


def answers(model: GriffinModel) -> list[str]:
    """To the questions; none of a model without a chat template."""
    if model.tokenizer.chat_template is None:
        return []
    found = []
    for question in QUESTIONS:
        ids = torch.tensor(encode_messages(model.tokenizer, [{"role": "user", "content": question}]))
        answer = generate(model, ids, ANSWER_TOKENS)[0, len(ids) :]
        found.append(model.tokenizer.decode(answer, skip_special_tokens=True).strip())
    return found


def bytes_of_a_token(model: GriffinModel) -> int:
    embedding, head = model.model.get_input_embeddings(), model.model.get_output_embeddings()
    looked_up = model.plan.embeddings == "device" and head.weight is not embedding.weight
    return model.resident_bytes - looked_up * embedding.weight.nbytes


def tokens_per_pass(folder: Path, prompts: Tensor, options: dict[str, Any]) -> float:
    """Tokens that a verifying pass of exact mode gives, of all prompts [W, P] together."""
    tokens = passes = 0
    with GriffinModel.from_pretrained(folder, exact=True, **options) as model:
        for prompt in prompts:
            generate(model, prompt, EXACT_TOKENS, eos_token_id=None)
            drafting = model.last_report.drafting
            tokens, passes = tokens + drafting.tokens, passes + drafting.passes
    return tokens / passes


def documents_of(path: Path, characters: int | None = None) -> list[str]:
    """Of a UTF-8 text, plain or .xz, or of its start."""
    with lzma.open(path) if path.suffix == ".xz" else path.open("rb") as file:
        pieces = [piece.strip() for piece in file.read().decode()[:characters].split(SEPARATOR)]
    return [piece for piece in pieces if piece]
