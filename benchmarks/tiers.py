"""Quality at equal bytes of the feed-forwards: fewer bits, fewer neurons, or tiers of bits by neuron.

    python benchmarks/tiers.py --text wikitext2=wikitext2_valid.txt.xz --text books=books_valid.txt.xz
    python benchmarks/tiers.py --only smollm2 --windows 4

Two small trained models from the package index (real_checkpoints.py), residual channels permuted, so that no grid of
the file that their numbers come from flatters a format. Each variant answers behind prompts as for a user, in a process
of its own, and is held against the 16-bit model by stock transformers.
"""

import argparse
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from real_checkpoints import SOURCES, NotFetched, default_models, fetched, write_permuted
from real_models import DEFAULT_TEXT, ROOT, in_own_process, named_text
from real_variants import Score, Windows, documents_of, measure_stock, score
from report import markdown_table, origin_lines, provenance, write

from griffin_offload import GriffinModel
from griffin_offload.cli.options import quiet_libraries
from griffin_offload.errors import GriffinError, one_line
from griffin_offload.planner.tiers import bits_of, expected_error

BITS = (4.0, 3.5, 3.0, 2.5)


@dataclass(frozen=True)
class Way:
    """One way to keep the FFs."""

    name: str
    options: dict[str, Any]
    """Arguments of `from_pretrained`."""


def ways(bits: Sequence[float]) -> list[Way]:
    """Tiers of so many bits, fewer bits, fewer neurons."""
    return [
        *(Way(f"tiers, {one:g}", {"quantize": "tiers", "bits": one}) for one in bits),
        *(Way(f"all in {name}", {"quantize": name, "density": 1.0}) for name in ("int4", "int3", "int2")),
        *(Way(f"{density:g} of int4", {"quantize": "int4", "density": density}) for density in (0.75, 0.5)),
    ]


@dataclass(frozen=True)
class Found:
    """Of one way."""

    scores: dict[str, Score]
    """By text."""
    ff_bits: float
    """Resident bits per weight of the FFs, those left out included."""
    expected_error: float
    resident_bytes: int
    tiers: dict[str, int]


@dataclass
class Section:
    """A model; figures as far as they came."""

    title: str
    permuted_kl: float = 0.0
    rows: list[tuple[str, Found | str]] = field(default_factory=list)
    failure: str | None = None


@torch.no_grad()
def measure(folder: Path, options: dict[str, Any], reference: Path, windows: Windows, threads: int) -> Found | str:
    """Figures, or why there are none."""
    quiet_libraries()
    try:
        kept = torch.load(reference, mmap=True)
        own = {"device": "cpu", "ctx_size": max(windows.tokens, 256), "threads": threads, **options}
        with GriffinModel.from_pretrained(folder, **own) as model:
            scores = {name: score(model, of["ids"], of["logits"]) for name, of in kept.items()}
            shape, plan = model.engine.shape, model.plan
            error = expected_error(shape, plan.counts)
            assert error is not None, "no mixture of experts"
            return Found(scores, bits_of(shape, plan.counts), error, model.resident_bytes, plan.tiers)
    except Exception as error:  # a row of the page says so
        return f"{type(error).__name__}: {one_line(error)}"


def measure_model(section: Section, folder: Path, args: argparse.Namespace, step: Callable[[], object]) -> None:
    windows = Windows(args.windows, args.prompt_tokens, args.scored_tokens)
    texts = {name: documents_of(path) for name, path in args.text.items()}
    with TemporaryDirectory() as name:
        permuted, reference = Path(name) / "permuted", Path(name) / "reference.pt"
        section.permuted_kl = write_permuted(folder, permuted)
        in_own_process(measure_stock, permuted, texts, windows, args.threads, reference)
        for way in ways(args.bits):
            start = time.perf_counter()
            found = in_own_process(measure, permuted, way.options, reference, windows, args.threads)
            section.rows.append((way.name, found))
            said = found if isinstance(found, str) else ", ".join(f"KL {s.kl:.4f}" for s in found.scores.values())
            print(f"{section.title}, {way.name}: {said} ({time.perf_counter() - start:.0f} s)", file=sys.stderr)
            step()


def page(record: dict[str, Any], sections: Sequence[Section], args: argparse.Namespace) -> str:
    lines = [
        f"{args.windows} windows of each text, {args.prompt_tokens} tokens of prompt and {args.scored_tokens} scored, "
        "a few at a time behind the text's own",
        "KL(16 bit by stock transformers || variant), nats per token, ± its standard error over the windows; top-1: "
        "share of tokens at which both have the same first choice",
        "bits: resident ones per weight of the FFs, scales and what is left out included; error: what the planner "
        "expects of FFs, squared and relative; attention is in the format of the most bits, of tiers int4",
        "Residual channels are permuted: the same function, without the grid that the files' numbers lie on",
    ]
    parts = ["# Tiers", origin_lines(record), "\n".join(f"- {line}" for line in lines)]
    for section in sections:
        parts += [f"## {section.title}", f"The same function as before: KL {section.permuted_kl:.1e} in float32."]
        if section.rows:
            heads = [
                "FFs",
                "bits",
                "error",
                "resident",
                *(f"{what}, {t}" for t in args.text for what in ("KL", "top-1")),
            ]
            parts.append(markdown_table([heads, *(row(name, found, len(heads)) for name, found in section.rows)]))
        parts += [f"**Not measured: {section.failure}**"] if section.failure else []
    return "\n\n".join(parts)


def row(name: str, found: Found | str, columns: int) -> list[str]:
    if isinstance(found, str):
        return [name, f"failed: {found}".replace("|", "/"), *[""] * (columns - 2)]
    scores = [
        text for s in found.scores.values() for text in (f"{s.kl:.3f} ± {s.kl_error:.3f}", f"{s.top1_agreement:.3f}")
    ]
    size = f"{found.resident_bytes / 1e6:.1f} MB"
    return [name, f"{found.ff_bits:.2f}", f"{found.expected_error:.4f}", size, *scores]


def parse_arguments(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--models", type=Path, default=default_models(), help="where models are kept, and fetched to if absent")
    add("--text", action="append", metavar="NAME=FILE", help="UTF-8, .txt or .txt.xz (default: a children's book)")
    add("--only", choices=tuple(SOURCES), action="append", help="one of the models")
    add("--bits", type=lambda text: [float(bits) for bits in text.split(",")], default=BITS, help="of tiers")
    add("--windows", type=int, default=24, help="of each text, spread evenly")
    add("--prompt-tokens", type=int, default=256)
    add("--scored-tokens", type=int, default=112)
    add("--threads", type=int, default=len(os.sched_getaffinity(0)))
    add("--out", type=Path, default=ROOT / "benchmarks" / "results")
    add("--name", default="tiers", help="of the result files")
    args = parser.parse_args(arguments)
    args.text = dict(map(named_text, args.text or [f"books_kids={DEFAULT_TEXT}"]))
    args.only = args.only or list(SOURCES)
    return args


def main(arguments: Sequence[str]) -> int:
    args = parse_arguments(arguments)
    origin = provenance("tiers.py", arguments)
    sections: list[Section] = []

    def publish() -> None:
        record = origin | {"sections": [asdict(section) for section in sections]}
        write(args.out, args.name, page(record, sections, args), record)

    for name in args.only:
        section = Section(SOURCES[name].title)
        sections.append(section)
        try:
            measure_model(section, fetched(SOURCES[name], args.models), args, publish)
        except (NotFetched, ValueError, OSError, GriffinError) as error:
            section.failure = f"{type(error).__name__}: {error}"
        publish()
    print((args.out / f"{args.name}.md").read_text())
    return 1 if any(s.failure or any(isinstance(found, str) for _, found in s.rows) for s in sections) else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
