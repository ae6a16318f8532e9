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
    full_model,
    load_streamed,
    loading_options,
    numbers,
    variants_of,
)
from griffin_offload.cli.options import (
    add_bits_option,
    add_memory_options,
    add_model_option,
    model_of,
    parse_density,
    quiet_libraries,
)
from griffin_offload.cli.terminal import Bar
from griffin_offload.config import FORMAT_NAMES, MIXED, LoadConfig, WindowStart
from griffin_offload.errors import UsageError
from griffin_offload.evaluation.config import EvalConfig
from griffin_offload.units import format_bytes

if TYPE_CHECKING:
    from torch import Tensor

    from griffin_offload.checkpoint.base import Checkpoint
    from griffin_offload.evaluation.distributed import Processes
    from griffin_offload.evaluation.perplexity import Row

_DEFAULTS = EvalConfig()
_PLANNED = ("auto", *MIXED)
_OF_PLAN = ("bits", "ctx_size", "reference")


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
    ppl.set_defaults(density=None)  # a plan has its own
    ppl.add_argument("--windows", type=int, default=_DEFAULTS.windows, metavar="N", help="of the text")
    starts = "spread over the text, or where documents begin"
    ppl.add_argument("--window-start", choices=get_args(WindowStart), default=_DEFAULTS.window_start, help=starts)
    ppl.add_argument(
        "--quantize",
        choices=(*FORMAT_NAMES, *_PLANNED),
        help="measure what convert makes of the checkpoint, in a temporary directory (default: as it is stored); "
        f"{', '.join(_PLANNED)}: what run plans by this word, and answers as run does, against the model as it is "
        "stored",
    )
    add_bits_option(ppl.add_argument, default=None)
    add("--ctx-size", type=int, metavar="TOKENS", help=f"of a plan ({', '.join(_PLANNED)}; default: a window's)")
    add("--reference", metavar="MODEL", help="compare a plan with this one, such as the original of a copy")
    add_measuring_options(ppl)
    add_model_option(ppl, json="print one JSON list instead of a table")
    add_memory_options(ppl)
    ppl.set_defaults(command=perplexity)


def perplexity(arguments: argparse.Namespace) -> int:
    """A table of all variants and sizes on stdout, or a JSON list."""
    prompts, generates = arguments.prompt_tokens, arguments.generate_tokens
    if min(*prompts, *generates, arguments.windows, 1) < 1:
        raise UsageError("--prompt-tokens, --generate-tokens and --windows are 1 or more")
    planned = arguments.quantize in _PLANNED
    given = [name for name in _OF_PLAN if getattr(arguments, name) is not None]
    if given and not planned:
        raise UsageError(f"--{given[0].replace('_', '-')} is of a plan: add --quantize {' or '.join(_PLANNED)}")
    chosen = arguments.density is not None
    if not chosen:
        arguments.density = LoadConfig.density if planned else ",".join(map(str, _DEFAULTS.densities))
    variants, options = ([], _plan_options(arguments)) if planned else (variants_of(arguments), {})
    quiet_libraries()
    from griffin_offload.checkpoint.registry import open_checkpoint
    from griffin_offload.evaluation.distributed import Processes
    from griffin_offload.evaluation.perplexity import measure, of_all

    stored = open_checkpoint(model_of(arguments), offline=arguments.offline)
    sizes = _windows(arguments, stored)  # before the model is loaded, which may take long
    processes = Processes.launched()
    sizes = {size: windows[processes.rank :: processes.size] for size, windows in sizes.items()}
    rows: list[Row] = []
    if planned:
        rows += _of_plan(arguments, stored, processes.share(options), sizes, processes)
    else:
        with (
            _in_precision(stored, arguments) as checkpoint,
            load_streamed(arguments, checkpoint, max(prompts) + max(generates), processes) as model,
        ):
            if not chosen and not model.engine.shape.with_neurons:
                variants = full_model()
            for (p, g), own in sizes.items():
                with _bar(f"{p} + {g} tokens", arguments, processes) as bar:
                    rows += of_all(processes.gather(measure(model, own, p, variants, bar.step) if own else []))
    if processes.first:
        print(json.dumps([row.to_json() for row in rows]) if arguments.json else "\n".join(_lines(rows)))
    processes.end()
    return 0


def _bar(title: str, arguments: argparse.Namespace, processes: "Processes") -> Bar:
    return Bar(title, quiet=arguments.quiet or not processes.first)


def _plan_options(arguments: argparse.Namespace) -> dict[str, Any]:
    """Fields of `LoadConfig` with which `run` plans; UsageError where it would have none."""
    longest = max(arguments.prompt_tokens) + max(arguments.generate_tokens)
    options = loading_options(arguments) | {"quantize": arguments.quantize, "selection": arguments.selection}
    options |= {"density": parse_density(arguments.density), "bits": arguments.bits or LoadConfig.bits}
    options |= {"ctx_size": arguments.ctx_size or longest, "prompt_tokens": max(arguments.prompt_tokens)}
    LoadConfig(**options)  # a bad flag is reported before any file is looked at
    if options["ctx_size"] < longest:
        raise UsageError(f"--ctx-size is {arguments.ctx_size}: a window has {longest} tokens")
    return options


def _of_plan(
    arguments: argparse.Namespace,
    stored: "Checkpoint",
    options: dict[str, Any],
    sizes: "dict[tuple[int, int], list[Tensor]]",
    processes: "Processes",
) -> "Iterator[Row]":
    """A row for every size; one of the two models is loaded after the other."""
    from griffin_offload.checkpoint.registry import open_checkpoint
    from griffin_offload.engine.model import GriffinModel
    from griffin_offload.engine.spec import examine_checkpoint, plan_for
    from griffin_offload.evaluation.perplexity import FullModel, of_all

    plan_for(examine_checkpoint(stored, LoadConfig(**options)))  # what does not fit is said at once
    reference = open_checkpoint(arguments.reference, offline=arguments.offline) if arguments.reference else stored
    full: dict[tuple[int, int], FullModel] = {}
    with contextlib.ExitStack() as files:
        with load_streamed(arguments, reference, max(map(sum, sizes)), processes) as model:
            for (p, g), own in sizes.items():
                with _bar(f"{p} + {g} tokens, all of the model", arguments, processes) as bar:
                    if own:
                        full[p, g] = files.enter_context(contextlib.closing(FullModel(model, own, p, bar.step)))
        with GriffinModel.from_pretrained(stored.path, **options) as model:
            for p, g in sizes:
                with _bar(f"{p} + {g} tokens", arguments, processes) as bar:
                    own_rows = full[p, g].against(model, bar.step) if (p, g) in full else []
                    yield from of_all(processes.gather(own_rows))


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
    return [*columns(heads, cells), f"{rows[0].windows} windows", *_plan_lines(rows[0])]


def _plan_lines(row: "Row") -> list[str]:
    """What a plan is, and what KL it was expected to have; none of a variant."""
    from griffin_offload.evaluation.perplexity import PlannedRow

    if not isinstance(row, PlannedRow):
        return []
    bits = "" if row.ff_bits is None else f"{row.ff_bits:.2f} bits a weight of the FFs, "
    sizes = f"{bits}{format_bytes(row.resident_bytes)} resident"
    expected = [] if row.expected_kl is None else [f"expected KL about {row.expected_kl:g}"]
    return [f"{row.precision}: {sizes}, KV cache in {row.kv_bits} bits", *expected]
