"""Quality and speed of trained models: 16 bit and int8 to int2 x {1, .75, .5}, converted and quantised on the way.

    python benchmarks/real_models.py --text wikitext2=wikitext2_valid.txt.xz --text books=books_valid.txt.xz
    python benchmarks/real_models.py --only smollm2 --quick
    python benchmarks/real_models.py --dir MODEL --text TEXT    # a 16-bit checkpoint of one's own
    python benchmarks/real_models.py --bits 4,3.5,3,2.5,2.2     # tiers of bits, beside as many bytes of int4 neurons
    python benchmarks/real_models.py --budgets 0.4,0.5,0.7,1    # what the planner makes of shares of the 16-bit bytes
    python benchmarks/real_models.py --bits 4,3,2.5 --codecs Q4_K,Q3_K,IQ2_S --llama-cpp ENV/bin/python

Two small models come from the package index, by name and version (real_checkpoints.py). Everything is held against the
same weights by stock transformers in float32: in 16 bit that itself differs from it. Every variant has a process of its
own, so that one that dies is a row, too. With `--bits` or `--budgets` quality alone is measured, and of permuted
channels and neurons, so that no grid of the file that the numbers come from flatters a format. With `--codecs` copies
stand beside llama.cpp's codecs on the same rows: attention is ours in both, in int4.
"""

import argparse
import math
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, field
from itertools import product, zip_longest
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from real_checkpoints import SOURCES, NotFetched, Source, default_models, fetched, write_permuted
from real_variants import (
    ANSWER_TOKENS,
    EXACT_DENSITY,
    EXACT_TOKENS,
    EXACT_WINDOWS,
    QUESTIONS,
    SPEED_TOKENS,
    TOGETHER,
    Measured,
    Stock,
    Variant,
    Windows,
    documents_of,
    measure_stock,
    measure_variant,
    rounded_by,
)
from report import markdown_table, origin_lines, provenance, write
from sides import in_own_process

from griffin_offload.engine.convert import convert
from griffin_offload.errors import GriffinError

ROOT = Path(__file__).parents[1]
DEFAULT_TEXT = ROOT / "tests" / "data" / "books_kids.txt"
DENSITIES = (1.0, 0.75, 0.5)
QUANTISED = ("int8", "int4", "int3", "int2")
# What rounding in another order may do to a dense 16-bit model, in nats per token.
SAME_KL = 0.005
# Of a neuron in int4 with its scales.
INT4_BITS = 4.52


@dataclass
class Section:
    """A model, as it is stored or permuted; figures as far as they came."""

    title: str
    packages: tuple[str, ...]
    permuted_kl: float | None
    """Of the function in float32 before and after permuting; None: not permuted."""
    stock: Stock | None = None
    rows: list[tuple[Variant, Measured | str]] = field(default_factory=list)
    codecs: list[dict[str, Any]] = field(default_factory=list)
    """What llama.cpp's codecs did to the FFs."""
    failure: str | None = None
    """Why the model could not be measured at all."""

    def runtime_equals_transformers(self) -> bool | None:
        """Whether nothing left out and nothing quantised is the stock model; None: not measured."""
        for variant, found in self.rows:
            if variant == Variant.of("none", 1.0):
                return not isinstance(found, str) and max(s.kl for s in found.scores.values()) < SAME_KL
        return None


def parse_arguments(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--models",
        type=Path,
        default=default_models(),
        help="where models are kept, and fetched to if absent (default: $GRIFFIN_REAL_MODELS, else the user's cache)",
    )
    parser.add_argument(
        "--text",
        action="append",
        metavar="NAME=FILE",
        help="UTF-8, .txt or .txt.xz; several can be given (default: a children's book, public domain)",
    )
    parser.add_argument("--dir", type=Path, action="append", help="a 16-bit checkpoint, in place of those of the index")
    parser.add_argument("--only", choices=tuple(SOURCES), action="append", help="one of the models")
    parser.add_argument("--quick", action="store_true", help="4 windows, as stored, density 1, one repeat")
    parser.add_argument("--windows", type=int, default=16, help="of each text, spread evenly")
    parser.add_argument("--prompt-tokens", type=int, default=256)
    parser.add_argument("--scored-tokens", type=int, default=128)
    parser.add_argument("--formats", type=words, default=QUANTISED, help="quantised ones")
    parser.add_argument("--densities", type=numbers, default=DENSITIES)
    parser.add_argument("--bits", type=numbers, metavar="B[,B...]", help="of tiers and of layers, a weight of the FFs")
    parser.add_argument("--codecs", type=words, default=[], help="of llama.cpp, beside --bits, then of copies")
    parser.add_argument("--llama-cpp", metavar="PYTHON", help="of an environment with xllamacpp, gguf and numpy")
    parser.add_argument("--budgets", type=numbers, metavar="S[,S...]", help="shares of the 16-bit bytes")
    parser.add_argument("--repeats", type=int, default=5, help="timed generations, after one that is not")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--name", help="of the result files (default: real_models, and what part of it this is)")
    args = parser.parse_args(arguments)
    if args.quick:
        args.windows, args.densities, args.repeats = min(args.windows, 4), [1.0], 1
    if min(args.windows, args.prompt_tokens, args.scored_tokens, args.repeats, args.threads) < 1:
        parser.error("windows, tokens, repeats and threads are 1 or more")
    if not set(args.formats) <= set(QUANTISED):
        parser.error(f"formats are {', '.join(QUANTISED)}")
    if not all(0 < density <= 1 for density in args.densities):
        parser.error("densities are above 0 and at most 1")
    if bool(args.codecs) != bool(args.llama_cpp) or (args.codecs and not args.bits):
        parser.error("--codecs are run by --llama-cpp, beside --bits")
    if args.bits or args.budgets:
        args.repeats = 0
    part = [*(["bits"] if args.bits else []), *(["budgets"] if args.budgets else [])]
    part += [*(args.only or []), *(path.name for path in args.dir or []), *(["quick"] if args.quick else [])]
    args.name = args.name or "-".join(["real_models", *part])
    args.only = args.only or ([] if args.dir else list(SOURCES))
    args.text = dict(map(named_text, args.text or [f"books_kids={DEFAULT_TEXT}"]))
    missing = [str(path) for path in args.text.values() if not path.is_file()]
    if missing:
        parser.error(f"no such text: {', '.join(missing)}")
    return args


def words(text: str) -> list[str]:
    return text.split(",")


def numbers(text: str) -> list[float]:
    return [float(number) for number in text.split(",")]


def named_text(option: str) -> tuple[str, Path]:
    name, equals, file = option.rpartition("=")
    return (name, Path(file)) if equals else (Path(file).name.partition(".")[0], Path(file))


def measure_section(
    section: Section, folder: Path, scratch: Path, args: argparse.Namespace, step: Callable[[], object]
) -> None:
    """All variants of one checkpoint; `step` is called after each."""
    windows = Windows(args.windows, args.prompt_tokens, args.scored_tokens)
    texts = {name: documents_of(path) for name, path in args.text.items()}
    reference = scratch / "reference.pt"
    section.stock = in_own_process(measure_stock, folder, texts, windows, args.threads, reference)
    variants = variants_of(args, folder, permuted=section.permuted_kl is not None)
    needed = dict.fromkeys(variant.copy for variant in variants if variant.copy)
    there = {precision: folder.with_name(f"{folder.name}-{precision}") for precision in needed}
    copies = {precision: path if path.exists() else scratch / precision for precision, path in there.items()}
    refused = {precision: converted(folder, path, precision) for precision, path in copies.items()}
    for variant in variants:
        start = time.perf_counter()
        found = refused.get(variant.copy or "")
        if found is None:
            source = copies[variant.copy] if variant.copy else folder
            by_codec = (
                rounded_by(variant.codec, folder, scratch, args.llama_cpp, args.threads, section.codecs)
                if variant.codec
                else None
            )
            found = by_codec if isinstance(by_codec, str) else None
            found = found or measured(source, variant, reference, windows, args.threads, args.repeats, by_codec)
        section.rows.append((variant, found))
        said = found if isinstance(found, str) else ", ".join(f"KL {s.kl:.4f}" for s in found.scores.values())
        print(
            f"{section.title}, {variant.name}, {density_of(variant)}: {said} ({time.perf_counter() - start:.0f} s)",
            file=sys.stderr,
        )
        step()


def variants_of(args: argparse.Namespace, folder: Path, *, permuted: bool) -> list[Variant]:
    """By the arguments. For each number of bits tiers, layers, and as many int4 neurons as take no fewer bytes; the
    forwards that are measured have transformers' own cache, of 16 bits. Codecs of llama.cpp had all their time once, so
    beside them stand copies."""
    if args.codecs:
        int4: dict[str, Any] = {"options": {"quantize": "tiers", "bits": "auto"}, "copy": "tiers"}
        tiers, layers = (
            [Variant(f"{kind}, {bits:g}", {"quantize": kind, "bits": bits}, "tiers") for bits in args.bits]
            for kind in ("tiers", "layers")
        )
        codecs = [Variant(codec, **int4, codec=codec) for codec in args.codecs]
        in_turns = (each for pair in zip_longest(tiers, codecs) for each in pair if each is not None)
        of_int4 = Variant("int4 of its own copy", {"quantize": "int4", "density": 1.0}, "int4")
        return [Variant("int4", **int4), of_int4, *in_turns, *layers]
    if args.bits:
        found = [Variant(f"all in {name}", {"quantize": name, "density": 1.0}) for name in args.formats]
        for bits in sorted(args.bits, reverse=True):
            found += [Variant(f"{kind}, {bits:g}", {"quantize": kind, "bits": bits}) for kind in ("tiers", "layers")]
            share = min(math.ceil(bits / INT4_BITS * 50) / 50, 1.0)
            found.append(Variant(f"{share:g} of int4", {"quantize": "int4", "density": share}))
        return found
    if args.budgets:
        weights = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
        sizes = [(share, round(share * weights)) for share in sorted(args.budgets, reverse=True)]
        return [
            Variant(f"{share:g} ({size / 1e6:.0f} MB)", {"max_gpu_mem": size, "kv_bits": 16}) for share, size in sizes
        ]
    ways = [("none", False), *product(args.formats, (True, False))]
    densities = [1.0] if permuted else args.densities
    return [Variant.of(precision, density, converted=once) for density, (precision, once) in product(densities, ways)]


def density_of(variant: Variant) -> str:
    return f"{variant.options['density']:g}" if "density" in variant.options else ""


def converted(folder: Path, copy: Path, precision: str) -> str | None:
    """None, or why there is no copy."""
    try:
        if not copy.exists():
            convert(folder, copy, precision)
    except GriffinError as error:
        return f"{type(error).__name__}: {error}"
    return None


def measured(*arguments: Any) -> Measured | str:
    try:
        return in_own_process(measure_variant, *arguments)
    except BrokenProcessPool:
        return "the process died"


def measure_model(
    source: Source, args: argparse.Namespace, sections: list[Section], step: Callable[[], object]
) -> None:
    """As stored, and, unless it is to be quick, permuted; bits and budgets of the latter alone."""
    for permuted in (True,) if not args.repeats else (False,) if args.quick else (False, True):
        section = Section(source.title + (", channels and neurons permuted" if permuted else ""), source.packages, None)
        sections.append(section)
        measure_folder(section, lambda: fetched(source, args.models), args, step, permuted=permuted)


def measure_folder(
    section: Section,
    folder_of: Callable[[], Path],
    args: argparse.Namespace,
    step: Callable[[], object],
    *,
    permuted: bool = False,
) -> None:
    """One checkpoint; why it cannot be measured is told in the section."""
    with TemporaryDirectory() as name:
        scratch = Path(name)
        try:
            folder = folder_of()
            if permuted:
                stored, folder = folder, scratch / "permuted"
                section.permuted_kl = in_own_process(write_permuted, stored, folder)
            measure_section(section, folder, scratch, args, step)
        except (NotFetched, ValueError, OSError, GriffinError, BrokenProcessPool) as error:
            section.failure = f"{type(error).__name__}: {error}"
            print(f"{section.title}: {section.failure}", file=sys.stderr)
            step()


def page(record: dict[str, Any], sections: Sequence[Section], args: argparse.Namespace) -> str:
    parts = ["# Trained models", origin_lines(record), *notes(args)]
    for section in sections:
        packages = [f"`{'`, `'.join(section.packages)}`"] if section.packages else []
        parts += [f"## {section.title}", *packages, *section_lines(section)]
    return "\n\n".join(parts)


def notes(args: argparse.Namespace) -> list[str]:
    """What the columns are."""
    lines = [
        f"{args.windows} windows of each text, {args.prompt_tokens} tokens of prompt and {args.scored_tokens} scored, "
        f"{TOGETHER} at a time behind the text's own: measured are the residents, by the kernels for few rows",
        "KL(float32 by stock transformers, of the same 16-bit weights || variant), nats per token, ± its standard "
        "error over the windows; top-1: share of tokens at which both have the same first choice",
        f"tokens/s: median of {args.repeats} answers of {SPEED_TOKENS} tokens, {args.threads} threads; ceiling: the "
        "fastest rate at which one row times matrices beyond the caches reads here, over what a token reads",
        "bits: resident ones per weight of the FFs, scales and what is left out included; error: what the planner "
        "expects of FFs, squared and relative",
        f"exact: tokens that a verifying pass gives, {EXACT_WINDOWS} prompts of the first text, {EXACT_TOKENS} tokens "
        f"each; what is stored drafts at density {EXACT_DENSITY:g}, on the way fewer bits draft for 16",
        "permuted: SmolLM2's numbers lie on a 4-bit grid along the inputs, which flatters int4; the same function "
        "with its channels and neurons in another order has no such grid",
    ]
    if args.codecs:
        lines += [
            "tiers, layers and int4: a copy of `convert --quantize tiers`; codecs: the FFs of the same copy made of "
            "floats that ggml's own quantisers (xllamacpp) rounded, weighed by mean squares of inputs over the text "
            "that the copy was calibrated with. Attention is int4 in all rows, head and embeddings int8",
            "rows of no whole blocks of 256 numbers: llama.cpp gives such matrices another type, of 4.5 bits or more. "
            "Here they are filled up with zeros, or joined without gaps, each matrix by what errs less; counted are "
            "the codec's own bits, without what fills up",
        ]
    return ["\n".join(f"- {line}" for line in lines)]


def section_lines(section: Section) -> list[str]:
    found = []
    if section.permuted_kl is not None:
        found.append(f"The same function as before: KL {section.permuted_kl:.1e} in float32.")
    if section.stock:
        perplexity = ", ".join(f"{name} {value:.2f}" for name, value in section.stock.perplexity.items())
        rounding = ", ".join(f"{name} {value:.4f}" for name, value in section.stock.half_kl.items())
        same = {None: "not measured", True: "yes", False: "no"}[section.runtime_equals_transformers()]
        found.append(
            f"Stock transformers in float32: perplexity {perplexity}; in 16 bit KL {rounding}. The runtime at density "
            f"1 in 16 bit equals it: {same}."
        )
        shown = section.rows
        if section.codecs:
            shown = sorted(shown, key=lambda of: math.inf if isinstance(of[1], str) else -of[1].ff_bits)
        found.append(markdown_table([head(section.stock), *(row(*of, section.stock) for of in shown)]))
        found += answers_lines(section)
    if section.codecs:
        heads = ["codec", "bits", "squared error of inputs' products, relative", "matrices by how their rows lay"]
        told = [
            [done["codec"], f"{done['bits']:.4g}", f"{done['error']:.4f}", ", ".join(f"{n} {way}" for way, n in ways)]
            for done in section.codecs
            for ways in [done["ways"].items()]
        ]
        found.append(markdown_table([heads, *told]))
    return [*found, *([f"**Not measured: {section.failure}**"] if section.failure else [])]


def head(stock: Stock) -> list[str]:
    texts = [f"{what}, {name}" for name in stock.perplexity for what in ("perplexity", "KL", "top-1")]
    return ["variant", "density", "resident", "bits (error)", *texts, "tokens/s", "ceiling", "exact"]


def row(variant: Variant, found: Measured | str, stock: Stock) -> list[str]:
    first = [variant.name, density_of(variant)]
    if isinstance(found, str):
        return [*first, f"failed: {found}".replace("|", "/"), *[""] * (len(head(stock)) - 3)]
    if not first[1]:
        first = [f"{variant.name}: {found.chosen}", ""]
    scores = [
        text
        for s in found.scores.values()
        for text in (f"{s.perplexity:.2f}", f"{s.kl:.4f} ± {s.kl_error:.4f}", f"{s.top1_agreement:.3f}")
    ]
    error = "" if found.expected_error is None else f" ({found.expected_error:.4f})"
    ceiling, exact = f"{stock.bytes_per_s / found.token_bytes:.1f}", found.tokens_per_pass
    speed = [f"{statistics.median(found.tokens_per_s):.1f}", ceiling] if found.tokens_per_s else ["", ""]
    size = [f"{found.resident_bytes / 1e6:.1f} MB", f"{found.ff_bits:.2f}{error}"]
    return [*first, *size, *scores, *speed, "" if exact is None else f"{exact:.2f}"]


def answers_lines(section: Section) -> list[str]:
    """A table for every question, of all variants that answered."""
    answered = [(v, m.answers) for v, m in section.rows if not isinstance(m, str) and m.answers]
    if not answered:
        return []
    heads = ["variant", "density", *QUESTIONS]
    rows = [
        [v.name, density_of(v), *(" ".join(text.split()).replace("|", "/") for text in texts)] for v, texts in answered
    ]
    return [f"Greedy answers in the chat template, at most {ANSWER_TOKENS} tokens:", markdown_table([heads, *rows])]


def main(arguments: Sequence[str]) -> int:
    args = parse_arguments(arguments)
    origin = provenance("real_models.py", arguments)
    sections: list[Section] = []

    def publish() -> None:
        record = origin | {"sections": [asdict(section) for section in sections]}
        write(args.out, args.name, page(record, sections, args), record)

    for folder in args.dir or []:
        sections.append(Section(folder.name, (), None))
        measure_folder(sections[-1], lambda folder=folder: folder, args, publish)
    for name in args.only:
        measure_model(SOURCES[name], args, sections, publish)
    print((args.out / f"{args.name}.md").read_text())
    failed = any(s.failure or any(isinstance(found, str) for _, found in s.rows) for s in sections)
    return 1 if failed or any(s.runtime_equals_transformers() is False for s in sections) else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
