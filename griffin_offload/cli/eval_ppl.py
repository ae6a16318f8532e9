"""`griffin-offload eval ppl`: perplexity of generation on a text."""

import argparse
import contextlib
import json
import tempfile
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from griffin_offload.cli.eval import (
    add_measuring_options,
    add_variant_options,
    columns,
    load_streamed,
    numbers,
    variants_of,
)
from griffin_offload.cli.options import add_memory_options, add_model_option, model_of, quiet_libraries
from griffin_offload.cli.progress import Bar
from griffin_offload.config import FORMAT_NAMES, WindowStart
from griffin_offload.errors import UsageError
from griffin_offload.evaluation.config import EvalConfig

if TYPE_CHECKING:
    from torch import Tensor

    from griffin_offload.checkpoint.base import Checkpoint
    from griffin_offload.evaluation.perplexity import Row

_DEFAULTS = EvalConfig()


def add_parser(kinds: Any) -> None:
    """Add this kind to the parser of `eval`."""
    ppl = kinds.add_parser(
        "ppl",
        help="perplexity of the text behind a prompt, against the full model's",
        epilog="example: griffin-offload eval ppl -m ./model --text mine.txt --density .75,.5",
    )
    ppl.add_argument("--text", type=Path, required=True, metavar="FILE", help="UTF-8, documents between <|endoftext|>")
    add = ppl.add_argument
    add("--prompt-tokens", type=numbers, default=[_DEFAULTS.prompt_tokens], metavar="P[,P...]", help="of the prompt")
    add("--generate-tokens", type=numbers, default=[_DEFAULTS.generate_tokens], metavar="G[,G...]", help="scored")
    add_variant_options(ppl, _DEFAULTS.densities, _DEFAULTS.selection)
    ppl.add_argument("--windows", type=int, default=_DEFAULTS.windows, metavar="N", help="of the text")
    starts = "spread over the text, or where documents begin"
    ppl.add_argument("--window-start", choices=get_args(WindowStart), default=_DEFAULTS.window_start, help=starts)
    ppl.add_argument(
        "--quantize",
        choices=FORMAT_NAMES,
        help="measure what convert makes of the checkpoint, in a temporary directory (default: as it is stored)",
    )
    add_measuring_options(ppl)
    add_model_option(ppl, json="print one JSON list instead of a table")
    add_memory_options(ppl)
    ppl.set_defaults(command=perplexity)


def perplexity(arguments: argparse.Namespace) -> int:
    """A table of all variants and sizes on stdout, or a JSON list."""
    prompts, generates = arguments.prompt_tokens, arguments.generate_tokens
    if min(*prompts, *generates, arguments.windows, 1) < 1:
        raise UsageError("--prompt-tokens, --generate-tokens and --windows are 1 or more")
    variants = variants_of(arguments)
    quiet_libraries()
    from griffin_offload.checkpoint.registry import open_checkpoint
    from griffin_offload.evaluation.distributed import Processes
    from griffin_offload.evaluation.perplexity import measure, of_all

    stored = open_checkpoint(model_of(arguments), offline=arguments.offline)
    sizes = _windows(arguments, stored)  # before the model is loaded, which may take long
    rows: list[Row] = []
    processes = Processes.launched()
    with (
        _in_precision(stored, arguments) as checkpoint,
        load_streamed(arguments, checkpoint, max(prompts) + max(generates), processes) as model,
    ):
        for (p, g), windows in sizes.items():
            own = windows[processes.rank :: processes.size]
            with Bar(f"{p} + {g} tokens", quiet=arguments.quiet or not processes.first) as bar:
                rows += of_all(processes.gather(measure(model, own, p, variants, bar.step) if own else []))
    if processes.first:
        print(json.dumps([row.to_json() for row in rows]) if arguments.json else "\n".join(_lines(rows)))
    processes.end()
    return 0


@contextlib.contextmanager
def _in_precision(checkpoint: "Checkpoint", arguments: argparse.Namespace) -> "Iterator[Checkpoint]":
    """The checkpoint as `convert` makes it for --quantize, in a temporary directory if it is not so already. UsageError
    where it was converted to something else."""
    from griffin_offload.checkpoint.registry import open_checkpoint
    from griffin_offload.engine.convert import convert

    if arguments.quantize in (None, checkpoint.precision.option):
        yield checkpoint
        return
    if not checkpoint.precision.is_plain:
        raise UsageError(
            f"--quantize {arguments.quantize} needs the original: {checkpoint.directory} was converted to "
            f"{checkpoint.precision} already"
        )
    with tempfile.TemporaryDirectory(prefix="griffin-offload-") as place:
        made = convert(checkpoint.path, Path(place) / "converted", arguments.quantize)
        yield open_checkpoint(made.directory)


def _windows(arguments: argparse.Namespace, checkpoint: "Checkpoint") -> "dict[tuple[int, int], list[Tensor]]":
    """Windows of every size (prompt, generated)."""
    from griffin_offload.evaluation.samples import first_tokens, read_documents, take_windows, tokenize

    texts = read_documents(arguments.text)
    tokenizer = checkpoint.tokenizer()
    documents, first = tokenize(texts, tokenizer), first_tokens(checkpoint.config, tokenizer)
    return {
        (p, g): take_windows(documents, p + g, arguments.windows, arguments.window_start, first)
        for p, g in product(arguments.prompt_tokens, arguments.generate_tokens)
    }


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
    return [*columns(heads, cells), f"{rows[0].windows} windows"]
