"""`griffin-offload eval summaries`: ROUGE of generated summaries."""

import argparse
import json
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from griffin_offload.cli.eval import (
    add_measuring_options,
    add_variant_options,
    columns,
    full_once,
    variant_name,
    variants_of,
)
from griffin_offload.cli.options import add_memory_options, add_model_option, model_of, quiet_libraries
from griffin_offload.errors import DoesNotFit, GriffinError, UsageError
from griffin_offload.evaluation.config import SummariesConfig

if TYPE_CHECKING:
    from griffin_offload.checkpoint.base import Checkpoint
    from griffin_offload.evaluation.summaries import Articles, Journal
    from griffin_offload.method.variants import Variant

_DEFAULTS = SummariesConfig()
_SHOWN = ("activation_kept_heldout", "seconds")
_MEMORY = ("max_gpu_mem", "max_cpu_mem", "device", "offload", "dtype", "threads", "offline")


def add_parser(kinds: Any) -> None:
    """Add this kind to the parser of `eval`."""
    parser = kinds.add_parser(
        "summaries",
        help="ROUGE of summaries of a jsonl file: XSum, CNN/DailyMail",
        epilog="example: griffin-offload eval summaries -m ./model --data xsum.jsonl",
    )
    add = parser.add_argument
    add("--data", type=Path, required=True, metavar="FILE", help="jsonl: article (the whole prompt), summary_gt")
    add("--samples", type=int, default=_DEFAULTS.samples, metavar="N", help="rows of the file, from its start")
    add("--output", type=Path, metavar="FILE", help="jsonl of finished summaries; the same command goes on with it")
    add("-n", "--max-new-tokens", type=int, default=_DEFAULTS.max_new_tokens, metavar="N", help="of a summary")
    add("--temperature", type=float, default=_DEFAULTS.temperature, help="0 is greedy")
    add("--top-p", type=float, default=_DEFAULTS.top_p, metavar="P", help="likeliest tokens")
    add("--end", default=_DEFAULTS.end, help="a summary is cut there")
    add_variant_options(parser, _DEFAULTS.densities, _DEFAULTS.selection)
    add_measuring_options(parser)
    parser.set_defaults(seed=_DEFAULTS.seed)
    add_model_option(parser, json="print one JSON list instead of a table")
    add_memory_options(parser)
    parser.set_defaults(command=evaluate_summaries)


def evaluate_summaries(arguments: argparse.Namespace) -> int:
    """A table of all variants on stdout, or a JSON list; finished summaries are kept in --output."""
    config, variants = _config(arguments), full_once(variants_of(arguments))
    if find_spec("rouge_score") is None:
        raise GriffinError('eval summaries needs rouge-score: pip install "griffin-offload[eval]"')
    quiet_libraries()
    from griffin_offload.checkpoint.registry import open_checkpoint
    from griffin_offload.evaluation.summaries import Journal

    checkpoint = open_checkpoint(model_of(arguments), offline=arguments.offline)
    articles = _articles(arguments, checkpoint, config)
    journal = Journal(arguments.output, _settings(arguments, checkpoint, config))
    refused: dict[Variant, str] = {}
    for variant in variants:
        try:
            _run(arguments, checkpoint, articles, journal, variant, config)
        except DoesNotFit as error:  # the others may
            refused[variant] = " ".join(str(error).split())
    results = [_result(journal, variant, articles) for variant in variants]
    if arguments.json:
        reasons = [{"does_not_fit": refused[variant]} if variant in refused else {} for variant in variants]
        print(json.dumps([result | reason for result, reason in zip(results, reasons, strict=True)]))
    else:
        print("\n".join(_lines(results)))
    for variant, reason in refused.items():
        print(f"griffin-offload: {variant_name(variant.selection, variant.density)}: {reason}", file=sys.stderr)
    return DoesNotFit.exit_code if refused else 0


def _config(arguments: argparse.Namespace) -> SummariesConfig:
    if arguments.samples < 1 or arguments.max_new_tokens < 1:
        raise UsageError("--samples and --max-new-tokens are 1 or more")
    if not 0 <= arguments.temperature < float("inf") or not 0 < arguments.top_p <= 1:
        raise UsageError("--temperature is 0 (greedy) or more, --top-p more than 0 and at most 1")
    names = ("samples", "max_new_tokens", "temperature", "top_p", "seed", "end")
    return SummariesConfig(**{name: getattr(arguments, name) for name in names})


def _articles(arguments: argparse.Namespace, checkpoint: "Checkpoint", config: SummariesConfig) -> "Articles":
    from griffin_offload.evaluation.samples import first_tokens
    from griffin_offload.evaluation.summaries import read_articles

    tokenizer = checkpoint.tokenizer()
    first = first_tokens(checkpoint.config, tokenizer)
    positions = getattr(checkpoint.config.get_text_config(), "max_position_embeddings", None) or 2**31
    if config.max_new_tokens >= positions:
        raise UsageError(
            f"--max-new-tokens is {config.max_new_tokens}, the model's context {positions}: no prompt is left"
        )

    def tokenize(text: str) -> list[int]:
        return [*first, *tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]]

    return read_articles(arguments.data, tokenize, config, positions - config.max_new_tokens)


def _settings(arguments: argparse.Namespace, checkpoint: "Checkpoint", config: SummariesConfig) -> dict[str, Any]:
    """What finished summaries depend on, besides their variant."""
    import hashlib

    from griffin_offload.devices.registry import choose_device

    names = ("max_new_tokens", "temperature", "top_p", "seed", "end")
    return {
        "model": checkpoint.fingerprint(),
        "data": hashlib.sha256(arguments.data.read_bytes()).hexdigest(),
        "device": choose_device(arguments.device).name,
        "dtype": arguments.dtype,
        **{name: getattr(config, name) for name in names},
    }


def _run(
    arguments: argparse.Namespace,
    checkpoint: "Checkpoint",
    articles: "Articles",
    journal: "Journal",
    variant: "Variant",
    config: SummariesConfig,
) -> None:
    """Summarise what is missing."""
    from tqdm import tqdm

    from griffin_offload.engine.model import GriffinModel
    from griffin_offload.engine.spec import by_residents_alone
    from griffin_offload.evaluation.summaries import means, missing, summarise

    wanted = missing(journal, variant, articles)
    if not wanted:
        return
    options = {name: getattr(arguments, name) for name in _MEMORY} | {"quantize": checkpoint.precision.option}
    options |= {"density": variant.density, "selection": variant.selection, "seed": config.seed}
    options |= {"prompt_tokens": articles.longest, "ctx_size": articles.longest + config.max_new_tokens}
    if variant.density < 1:
        options = by_residents_alone(checkpoint, options)
    done, every = len(articles.fitting) - len(wanted), len(articles.fitting)
    title = variant_name(variant.selection, variant.density)
    with (
        GriffinModel.from_pretrained(checkpoint.path, **options) as model,
        tqdm(total=every, initial=done, desc=title, disable=arguments.quiet or None, file=sys.stderr) as bar,
    ):
        for row in summarise(model, wanted, variant, config):
            journal.add(row)
            bar.update()
            scores = means(journal.of(variant, articles))
            bar.set_postfix({name: f"{scores[name]:.1f}" for name in ("rouge1", "rouge2", "rougeL")})


def _result(journal: "Journal", variant: "Variant", articles: "Articles") -> dict[str, Any]:
    from griffin_offload.evaluation.summaries import means

    rows = journal.of(variant, articles)
    head = {"selection": variant.selection, "density": variant.density}
    return {**head, "samples": len(rows), "skipped": articles.skipped, **means(rows)}


def _lines(results: list[dict[str, Any]]) -> list[str]:
    heads = ("neurons", "samples", "skipped", "ROUGE-1", "ROUGE-2", "ROUGE-L", "kept held out", "s/sample")
    cells = []
    for found in results:
        scores = [f"{found[name]:.2f}" if name in found else "-" for name in ("rouge1", "rouge2", "rougeL")]
        kept, seconds = (f"{found[name]:.3f}" if name in found else "-" for name in _SHOWN)
        counts = (str(found["samples"]), str(found["skipped"]))
        cells.append((variant_name(found["selection"], found["density"]), *counts, *scores, kept, seconds))
    return columns(heads, cells)
