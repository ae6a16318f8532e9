"""Every default of `eval` and `inspect`, once: the command line reads them from here."""

from dataclasses import dataclass

from griffin_offload.config import BosRule, EvalMode, SelectionMethod, WindowStart


@dataclass(frozen=True)
class EvalConfig:
    """What `griffin-offload eval ppl` measures when not told otherwise."""

    prompt_tokens: int = 128
    generate_tokens: int = 128
    densities: tuple[float, ...] = (0.75, 0.5, 0.25)
    selection: SelectionMethod = "topk"
    windows: int = 16
    window_start: WindowStart = "even"


@dataclass(frozen=True)
class TasksConfig:
    """What `griffin-offload eval tasks` measures when not told otherwise."""

    mode: EvalMode = "gen"
    """Which tokens of a log-likelihood pass through chosen neurons: docs/evaluation.md."""
    densities: tuple[float, ...] = (0.5,)
    selection: SelectionMethod = "topk"
    bos: BosRule = "paper"
    """A BOS token in front of every text: for Gemma alone, as in the paper, or as the tokenizer does by default."""
    num_fewshot: int | None = None
    """None: what the task says, else 0."""
    limit: int | None = None
    """Documents per task; None: all."""
    max_length: int | None = None
    """Tokens that a request is cut to, on the left; None: the model's context."""
    bootstrap_iters: int = 1000
    """Resamples for standard errors of metrics that are not means; lm-eval's own number, 100000, takes minutes."""


@dataclass(frozen=True)
class SummariesConfig:
    """What `griffin-offload eval summaries` measures when not told otherwise: the reference's settings."""

    samples: int = 1000
    max_new_tokens: int = 128
    temperature: float = 0.3
    top_p: float = 1.0
    seed: int = 42
    end: str = "###"
    """A summary is cut there; where it does not occur nothing is cut."""
    densities: tuple[float, ...] = (1.0, 0.5)
    selection: SelectionMethod = "topk"


@dataclass(frozen=True)
class LatencyConfig:
    """What `griffin-offload eval latency` measures when not told otherwise: the paper's table 3."""

    sizes: tuple[tuple[int, int], ...] = ((2048, 128), (2048, 2048))
    """Tokens of the prompt, tokens generated."""
    densities: tuple[float, ...] = (0.5, 0.25)
    selections: tuple[SelectionMethod, ...] = ("magnitude", "topk")
    repeats: int = 3


@dataclass(frozen=True)
class InspectConfig:
    """What `griffin-offload inspect` looks at when not told otherwise."""

    figures: tuple[str, ...] = ("flocking", "jaccard", "inputs", "statistic", "sparsity", "lengths")
    layers: int = 4
    """Layers that heatmaps show, spread evenly."""
    windows: int = 16
    tokens: int = 512
    """Of a window in flocking, jaccard, inputs and statistic; heatmaps show all of them."""
    features: int = 512
    """The first ones of a layer, that heatmaps show."""
    prompt_tokens: tuple[int, ...] = (16, 32, 64, 128, 256, 512)
    generate_tokens: tuple[int, ...] = (32, 64, 128, 256)
    jaccard_densities: tuple[float, ...] = (0.1, 0.25, 0.5, 0.75)
    sparsity_densities: tuple[float, ...] = (0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1)
    lengths_densities: tuple[float, ...] = (0.5,)
    sparsity_selections: tuple[SelectionMethod, ...] = ("topk", "magnitude", "random")
    lengths_selections: tuple[SelectionMethod, ...] = ("topk",)
    prompt_densities: tuple[float, ...] = (0.1, 0.2, 0.25, 0.3, 0.4, 0.5, 0.6, 0.7, 0.75, 0.8, 0.9)
    """Of the loss on one prompt."""
