"""`griffin-offload eval`: what pruning costs, measured on texts."""

import argparse
import json
import sys
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from griffin_offload.cli.options import add_memory_options, add_model_option, model_of, quiet_libraries
from griffin_offload.config import EvalConfig, LoadConfig, SelectionMethod, WindowStart
from griffin_offload.errors import UsageError

if TYPE_CHECKING:
    from torch import Tensor

    from griffin_offload.evaluation.perplexity import Row
    from griffin_offload.method.variant import Variant
    from griffin_offload.runtime.model import GriffinModel
    from griffin_offload.weights.checkpoint import Checkpoint

_DEFAULTS = EvalConfig()


def add_parser(commands: Any) -> None:
    """Add the command and its kinds to the main parser."""
    parser = commands.add_parser("eval", help="measure what pruning costs")
    kinds = parser.add_subparsers(title="kinds", metavar="KIND", required=True)
    ppl = kinds.add_parser("ppl", help="perplexity of the text behind a prompt, against the full model's")
    ppl.add_argument("--text", type=Path, required=True, metavar="FILE", help="UTF-8, documents between <|endoftext|>")
    ppl.add_argument("--prompt-tokens", type=_numbers, default=[_DEFAULTS.prompt_tokens], metavar="P[,P...]")
    ppl.add_argument("--generate-tokens", type=_numbers, default=[_DEFAULTS.generate_tokens], metavar="G[,G...]")
    ppl.add_argument("--density", default=",".join(map(str, _DEFAULTS.densities)), metavar="D[,D...]")
    methods = ", ".join(get_args(SelectionMethod))
    ppl.add_argument("--selection", default=_DEFAULTS.selection, metavar="S[,S...]", help=f"of {methods}")
    ppl.add_argument("--windows", type=int, default=_DEFAULTS.windows, metavar="N")
    ppl.add_argument("--window-start", choices=get_args(WindowStart), default=_DEFAULTS.window_start)
    ppl.add_argument("--seed", type=int, default=LoadConfig.seed, help="of selections that draw")
    ppl.add_argument("--threads", type=int, metavar="N", help="threads that compute on the CPU")
    ppl.add_argument("-q", "--quiet", action="store_true", help="no progress bar")
    add_model_option(ppl)
    add_memory_options(ppl)
    ppl.set_defaults(command=perplexity)


def perplexity(arguments: argparse.Namespace) -> int:
    """A table of all variants and sizes on stdout, or a JSON list."""
    prompts, generates = arguments.prompt_tokens, arguments.generate_tokens
    if min(*prompts, *generates, arguments.windows, 1) < 1:
        raise UsageError("--prompt-tokens, --generate-tokens and --windows are 1 or more")
    variants = _variants(arguments)
    quiet_libraries()
    from griffin_offload.evaluation.perplexity import measure
    from griffin_offload.weights.checkpoint import open_checkpoint

    checkpoint = open_checkpoint(model_of(arguments), offline=arguments.offline)
    sizes = _windows(arguments, checkpoint)  # before the model is loaded, which may take long
    model = _load(arguments, checkpoint, max(prompts) + max(generates))
    rows: list[Row] = []
    for (p, g), windows in sizes.items():
        with _Bar(f"{p} + {g} tokens", quiet=arguments.quiet) as bar:
            rows += measure(model, windows, p, variants, bar.step)
    print(json.dumps([row.to_json() for row in rows]) if arguments.json else "\n".join(_lines(rows)))
    return 0


def _windows(arguments: argparse.Namespace, checkpoint: "Checkpoint") -> "dict[tuple[int, int], list[Tensor]]":
    """Windows of every size (prompt, generated)."""
    from griffin_offload.evaluation.windows import first_tokens, read_documents, take_windows, tokenize
    from griffin_offload.weights.checkpoint import load_tokenizer

    texts = read_documents(arguments.text)
    tokenizer = load_tokenizer(checkpoint.directory)
    documents, first = tokenize(texts, tokenizer), first_tokens(checkpoint.config, tokenizer)
    return {
        (p, g): take_windows(documents, p + g, arguments.windows, arguments.window_start, first)
        for p, g in product(arguments.prompt_tokens, arguments.generate_tokens)
    }


def _load(arguments: argparse.Namespace, checkpoint: "Checkpoint", ctx_tokens: int) -> "GriffinModel":
    """Every layer passes in full, so no neuron need stay: the budget is for layers on their way and activations."""
    from griffin_offload.runtime.model import GriffinModel

    names = ("max_gpu_mem", "max_cpu_mem", "device", "offload", "dtype", "seed", "threads", "offline")
    options = {name: getattr(arguments, name) for name in names}
    options |= {"quantize": checkpoint.precision, "density": 0.0, "always_stream": True}
    return GriffinModel.from_pretrained(checkpoint.directory, **options, ctx_size=ctx_tokens, prompt_tokens=ctx_tokens)


def _variants(arguments: argparse.Namespace) -> "list[Variant]":
    methods = arguments.selection.split(",")
    unknown = [method for method in methods if method not in get_args(SelectionMethod)]
    if unknown:
        raise UsageError(f"no selection {unknown[0]!r}: choose of {', '.join(get_args(SelectionMethod))}")
    try:
        densities = [float(part) for part in arguments.density.split(",")]
    except ValueError:
        raise UsageError(f"cannot read the densities {arguments.density!r}: numbers from 0 to 1, 0.75,0.5") from None
    from griffin_offload.method.variant import Variant

    return [Variant(density, method) for method, density in product(methods, densities)]


def _numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def _lines(rows: "list[Row]") -> list[str]:
    heads = ("selection", "density", "prompt", "generate", "ppl full", "ppl", "increase", "KL", "top-1", "kept")
    cells = [
        (
            row.selection,
            f"{row.density:g}",
            str(row.prompt_tokens),
            str(row.generate_tokens),
            f"{row.ppl_full:.2f}",
            f"{row.ppl:.2f}",
            f"{row.increase:+.1%}",
            f"{row.kl:.3f}",
            f"{row.top1:.3f}",
            f"{row.activation_kept:.3f}",
        )
        for row in rows
    ]
    widths = [max(len(line[i]) for line in (heads, *cells)) for i in range(len(heads))]
    table = [
        "  ".join([line[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(line[1:], widths[1:], strict=True))])
        for line in (heads, *cells)
    ]
    return [*table, f"{rows[0].windows} windows"]


class _Bar:
    """Layers of all passes over the windows of one size, on stderr if that is a terminal."""

    def __init__(self, size: str, *, quiet: bool) -> None:
        from tqdm import tqdm

        self._bar = tqdm(desc=size, unit="layer", leave=False, disable=quiet or None, file=sys.stderr)

    def step(self, done: int, layers: int) -> None:
        """So many layers are done, of so many."""
        self._bar.total = layers
        self._bar.update(done - self._bar.n)

    def __enter__(self) -> "_Bar":
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()
