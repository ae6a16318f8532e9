"""Quality at equal bytes of the feed-forwards: fewer bits, fewer neurons, or tiers of bits by neuron.

    python benchmarks/tiers.py --text wikitext2=wikitext2_valid.txt.xz --text books=books_valid.txt.xz
    python benchmarks/tiers.py --only smollm2 --windows 4
    python benchmarks/tiers.py --budgets 0.4,0.5,0.7,1 --name budgets
    python benchmarks/tiers.py --gather

Two small trained models from the package index (real_checkpoints.py), residual channels permuted, so that no grid of
the file that their numbers come from flatters a format. Each variant answers behind prompts as for a user, in a process
of its own, and is held against the 16-bit model by stock transformers. `--gather` times what a prompt does with the
neurons of one layer in 13B's shapes: making them of what is stored, on one thread. `--budgets` asks the planner
instead, for budgets that are these shares of the 16-bit weights' bytes.
"""

import argparse
import math
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
from transformers import LlamaConfig

from griffin_offload import GriffinModel
from griffin_offload.blocks.layouts import build_on_meta
from griffin_offload.blocks.sizes import model_shape
from griffin_offload.cli.options import quiet_libraries
from griffin_offload.errors import GriffinError, one_line
from griffin_offload.formats import FLOATS, Format, every, get
from griffin_offload.planner.tiers import bits_of, expected_error, tiers_within

BITS = (4.0, 3.5, 3.0, 2.5, 2.2)
FORMATS = ("int8", "int4", "int3", "int2")


@dataclass(frozen=True)
class Way:
    """One way to keep the FFs."""

    name: str
    options: dict[str, Any]
    """Arguments of `from_pretrained`."""


def ways(bits: Sequence[float], formats: Sequence[str]) -> list[Way]:
    """For each number of bits tiers, layers, and as many neurons of int4 as take no fewer bytes; all neurons in
    `formats`."""
    mixed = ("tiers", "layers")
    asked = [
        (*(Way(f"{name}, {one:g}", {"quantize": name, "bits": one}) for name in mixed), _pruned(one))
        for one in sorted(bits, reverse=True)
    ]
    return [*(_whole(name) for name in formats), *(way for own in asked for way in own)]


def budgets(folder: Path, shares: Sequence[float]) -> list[Way]:
    """What the planner makes of each."""
    weights = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    sizes = [(share, round(share * weights)) for share in sorted(shares, reverse=True)]
    # The forwards that are measured have transformers' own cache, of 16 bits.
    return [Way(f"{share:g} ({size / 1e6:.0f} MB)", {"max_gpu_mem": size, "kv_bits": 16}) for share, size in sizes]


def _whole(name: str) -> Way:
    return Way(f"all in {name}", {"quantize": name, "density": 1.0})


def _pruned(bits: float) -> Way:
    """What an int4 of 4.5 bits and its scales keeps."""
    density = min(math.ceil(bits / 4.52 * 50) / 50, 1.0)
    return Way(f"{density:g} of int4", {"quantize": "int4", "density": density})


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
    chosen: str
    """By the planner."""


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
            chosen = f"{plan.in_words}, density {plan.density:.2f}"
            return Found(scores, bits_of(shape, plan.counts), error, model.resident_bytes, plan.tiers, chosen)
    except Exception as error:  # a row of the page says so
        return f"{type(error).__name__}: {one_line(error)}"


def measure_model(section: Section, folder: Path, args: argparse.Namespace, step: Callable[[], object]) -> None:
    windows = Windows(args.windows, args.prompt_tokens, args.scored_tokens)
    texts = {name: documents_of(path) for name, path in args.text.items()}
    with TemporaryDirectory() as name:
        permuted, reference = Path(name) / "permuted", Path(name) / "reference.pt"
        section.permuted_kl = write_permuted(folder, permuted)
        in_own_process(measure_stock, permuted, texts, windows, args.threads, reference)
        asked = budgets(permuted, args.budgets) if args.budgets else ways(args.bits, args.formats)
        for way in asked:
            start = time.perf_counter()
            found = in_own_process(measure, permuted, way.options, reference, windows, args.threads)
            section.rows.append((way.name, found))
            said = found if isinstance(found, str) else ", ".join(f"KL {s.kl:.4f}" for s in found.scores.values())
            print(f"{section.title}, {way.name}: {said} ({time.perf_counter() - start:.0f} s)", file=sys.stderr)
            step()


HIDDEN, NEURONS = 5120, 13824


@torch.no_grad()
def gather_seconds(bits: float) -> dict[str, float]:
    """Processor time of one thread for a layer's neurons in tiers of so many bits, by the format that is stored: the
    less of two."""
    torch.set_num_threads(1)
    tiers = [format for format in every() if format.is_tier]
    meta = build_on_meta(
        LlamaConfig(hidden_size=HIDDEN, intermediate_size=NEURONS, num_hidden_layers=1), torch.bfloat16
    )
    counts = tiers_within(model_shape(meta, tiers[0], levels=tiers), bits)[0]
    order = torch.randperm(NEURONS, generator=torch.Generator().manual_seed(0))[: sum(counts)]
    chosen = [part.sort().values for part in order.split(counts)]
    weight = torch.randn(NEURONS, HIDDEN).bfloat16()
    return {
        stored.name: sum(
            _seconds(stored, matrix, tiers, chosen, is_down=is_down) * times
            for matrix, is_down, times in ((weight, False, 2), (weight.t().contiguous(), True, 1))
        )
        for stored in (FLOATS, get("int8"), get("int4"), get("tiers"))
    }


def _seconds(
    stored: Format, matrix: torch.Tensor, tiers: Sequence[Format], chosen: Sequence[torch.Tensor], *, is_down: bool
) -> float:
    full = {"weight": matrix} if stored.is_plain else stored.quantize(matrix, matrix.dtype, is_down=is_down)
    layout, importance = stored.stored(is_down=is_down), None if is_down else torch.ones(HIDDEN)
    outs = []
    for format, own in zip(tiers, chosen, strict=True):
        sizes = (HIDDEN, -(-own.numel() // 64) * 64) if is_down else (own.numel(), HIDDEN)
        specs = format.resident(is_down=is_down).specs(*sizes, is_down=is_down)
        outs.append({name: torch.zeros(shape, dtype=kind or matrix.dtype) for name, (shape, kind) in specs.items()})
    seconds = []
    for _ in range(2):
        start = time.process_time()
        for format, own, out in zip(tiers, chosen, outs, strict=True):
            format.gather(full, layout, own, out, is_down=is_down, importance=importance)
        seconds.append(time.process_time() - start)
    return min(seconds)


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
    name = f"{name}: {found.chosen}" if "MB" in name else name
    return [name, f"{found.ff_bits:.2f}", f"{found.expected_error:.4f}", size, *scores]


def parse_arguments(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--models", type=Path, default=default_models(), help="where models are kept, and fetched to if absent")
    add("--text", action="append", metavar="NAME=FILE", help="UTF-8, .txt or .txt.xz (default: a children's book)")
    add("--only", choices=tuple(SOURCES), action="append", help="one of the models")
    add("--bits", type=lambda text: [float(bits) for bits in text.split(",")], default=BITS, help="of tiers")
    add("--budgets", type=lambda text: [float(share) for share in text.split(",")], help="shares of the 16-bit bytes")
    add("--gather", action="store_true", help="only time what a prompt does with a layer's neurons")
    add("--formats", type=lambda text: text.split(","), default=FORMATS, help="of all neurons")
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
    if args.gather:
        for name, seconds in gather_seconds(3.0).items():
            print(f"{name}: {seconds:.2f} s a layer, {3 * HIDDEN * NEURONS / seconds / 1e6:.0f} million weights/s")
        return 0
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
