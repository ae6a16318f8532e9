"""Quality and speed at equal bytes: {16 bit, int8, int4} x {dense, .75, .5, .25} of one 16-bit checkpoint.

    python benchmarks/equal_bytes.py --dir MODEL --text TEXT --out OUT
    python benchmarks/equal_bytes.py --dir RANDOM --speed-only

Every variant is loaded alone, quantised on the fly, and again in every round, so that a busy moment of the machine
falls on all. The ceilings of decoding come first, then the table, the same variants ordered by their bytes, and JSON
in the last line. The reference is the stock transformers model.
"""

import argparse
import gc
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from itertools import product
from pathlib import Path
from typing import Any

import torch
from ceilings import PRECISIONS
from measured import measure_rates
from model_bytes import ModelBytes
from quality import Windows, measure_quality, perplexity, reference_log_probs, take_windows
from report import markdown_table, origin_lines, provenance, write
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging as transformers_logging
from variants import NAMES, Variant, by_bytes, rows

from griffin_offload import GriffinModel

DENSITIES = (1.0, 0.75, 0.5, 0.25)
# What rounding to bfloat16 in another order may do to predictions, in nats.
TOLERATED_KL = 0.01


def parse_arguments(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dir", type=Path, required=True, help="a 16-bit checkpoint")
    parser.add_argument("--text", type=Path, help="UTF-8, documents separated by lines of <|endoftext|>")
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--generate-tokens", type=int, default=128, help="predicted tokens of a window")
    parser.add_argument("--windows", type=int, default=23)
    parser.add_argument("--kernel-windows", type=int, default=2, help="windows also predicted token by token")
    parser.add_argument("--speed-tokens", type=int, default=64, help="tokens of one timed generation")
    parser.add_argument("--repeats", type=int, default=3, help="timed generations of a load, after one that is not")
    parser.add_argument("--rounds", type=int, default=1, help="of all variants; quality is measured in the first")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--speed-only", action="store_true", help="random weights: no columns of quality")
    parser.add_argument("--name", help="of the result files; the directory's and the text's when not given")
    parser.add_argument("--out", type=Path, help="folder for the table and the JSON record")
    args = parser.parse_args(arguments)
    if (args.text is None) != args.speed_only:
        parser.error("give either --text or --speed-only")
    if min(args.speed_tokens, args.generate_tokens) < 2 or args.kernel_windows < 1:
        parser.error("at least 2 tokens and 1 window")
    args.name = args.name or "-".join([args.dir.name] + ([args.text.stem] if args.text else []))
    return args


def load_variant(args: argparse.Namespace, precision: str, density: float) -> GriffinModel:
    context_tokens = args.prompt_tokens + max(args.generate_tokens + 1, args.speed_tokens)
    return GriffinModel.from_pretrained(
        args.dir,
        device="cpu",
        quantize=precision,
        density=density,
        ctx_size=context_tokens,
        prompt_tokens=args.prompt_tokens,
        threads=args.threads,
    )


def tokens_per_s(model: GriffinModel, prompt: torch.Tensor, new_tokens: int, repeats: int) -> list[float]:
    """Greedy; the first generation warms up and is left out. Zero bytes may be fetched while decoding."""
    rates = []
    for _ in range(repeats + 1):
        model.generate(prompt, max_new_tokens=new_tokens, min_new_tokens=new_tokens, do_sample=False)
        report = model.last_report
        if report.decode_streamed_bytes:
            raise SystemExit(f"error: decoding fetched {report.decode_streamed_bytes} bytes")
        rates.append(report.decode_tokens_per_s)
    return rates[1:]


def measure_variant(
    args: argparse.Namespace, precision: str, density: float, windows: Windows | None, reference: torch.Tensor | None
) -> Variant:
    gc.collect()  # a model's forward refers to its owner, so the last one may still be there
    with load_variant(args, precision, density) as model:
        vocabulary = model.model.config.vocab_size
        random = torch.randint(3, vocabulary, (1, args.prompt_tokens), generator=torch.Generator().manual_seed(0))
        prompt = random if windows is None else windows.ids[:1, : args.prompt_tokens]
        embedding, head = model.model.get_input_embeddings(), model.model.get_output_embeddings()
        looked_up = model.plan.embeddings == "device" and head.weight is not embedding.weight
        found = Variant(
            precision=precision,
            density=density,
            resident_bytes=model.resident_bytes,
            token_bytes=model.resident_bytes - looked_up * embedding.weight.nbytes,
            tokens_per_s=tokens_per_s(model, prompt, args.speed_tokens, args.repeats),
            quality=None,
        )
        if reference is not None:
            found = replace(found, quality=measure_quality(model.model, windows, reference, args.kernel_windows))
    print(f"{found.name}: {found.speed:.3g} tokens/s", file=sys.stderr, flush=True)
    return found


def checks(variants: Sequence[Variant], stock_perplexity: float | None) -> dict[str, bool]:
    """Whether the outputs can be believed."""
    found = {}
    scored = [v.quality for v in variants if v.quality]
    if scored and stock_perplexity:
        found["dense 16 bit equals stock transformers"] = scored[0].kl < TOLERATED_KL
        found["token by token equals at once"] = max(quality.kernel_kl for quality in scored) < TOLERATED_KL
    found["no bytes fetched while decoding"] = True  # or tokens_per_s had stopped
    return found


def notes(args: argparse.Namespace, variants: Sequence[Variant], stock_perplexity: float | None) -> list[str]:
    lines = [
        f"tokens/s: greedy, {args.speed_tokens} tokens after {args.prompt_tokens}, {args.threads} threads, median of "
        f"{args.rounds} x {args.repeats}, each load warmed up; GB/s: weights that a token reads, times tokens/s",
    ]
    scored = [v.quality for v in variants if v.quality]
    if scored and stock_perplexity:
        lines += [
            f"{args.windows} windows of {args.prompt_tokens} + {args.generate_tokens} tokens, teacher-forced: the "
            "prompt is streamed, all scored predictions are made by the residents",
            f"stock transformers, 16 bit: perplexity {stock_perplexity:.3f}; KL is against it, so the first row's "
            f"{scored[0].kl:.1e} is what rounding in another order does",
            "token by token (decode kernel) against all at once (block path): perplexity changes by at most "
            f"{max(abs(q.kernel_perplexity_change) for q in scored):.2%}, KL at most "
            f"{max(q.kernel_kl for q in scored):.1e}, on {args.kernel_windows} windows",
            "by precision alone: against 16 bit at the same density, with the standard error over the windows",
            "dense variants hold everything, so their prompt passes through the quantised residents, too; pruned ones "
            "pass it through the stored 16-bit FF blocks",
        ]
    return [f"- {line}" for line in lines]


def main(arguments: Sequence[str]) -> int:
    args = parse_arguments(arguments)
    transformers_logging.set_verbosity_error()
    torch.set_num_threads(args.threads)
    model = ModelBytes.of(args.dir)
    ceilings = {p: measure_rates(model, args.prompt_tokens, [args.threads], p)[0] for p in PRECISIONS}
    stated = "Ceilings, the kernels alone on matrices of its FF, GB/s: " + ", ".join(
        f"{NAMES[p]} {rates.best_gemv / 1e9:.1f}" for p, rates in ceilings.items()
    )
    print(f"{model.name}: {model.total_bytes / 1e6:.4g} MB. {stated}", end="\n\n", flush=True)

    windows = reference = stock_perplexity = None
    with torch.inference_mode():
        if args.text:
            windows, reference = read_reference(args)
            stock_perplexity = perplexity(reference, windows.targets)
        variants = [measure_variant(args, *which, windows, reference) for which in product(PRECISIONS, DENSITIES)]
        for _ in range(1, args.rounds):
            for variant in variants:
                again = measure_variant(args, variant.precision, variant.density, windows, None)
                variant.tokens_per_s.extend(again.tokens_per_s)
    checked = checks(variants, stock_perplexity)
    text = [markdown_table(rows(variants)), "By bytes:", markdown_table(by_bytes(variants))]
    text += ["\n".join(notes(args, variants, stock_perplexity))]
    text += ["\n".join(f"- check: {name}: {passed}" for name, passed in checked.items())]
    print("\n\n".join(text), end="\n\n")
    record: dict[str, Any] = provenance("equal_bytes.py", arguments) | {
        "model": asdict(model),
        "ceilings": {p: asdict(rates) for p, rates in ceilings.items()},
        "stock_perplexity": stock_perplexity,
        "variants": [asdict(v) for v in variants],
        "checks": checked,
    }
    if args.out:
        write(args.out, f"equal_bytes-{args.name}", "\n\n".join([origin_lines(record), stated, *text]), record)
    print(json.dumps(record))
    return 0 if all(checked.values()) else 1


def read_reference(args: argparse.Namespace) -> tuple[Windows, torch.Tensor]:
    """Windows and the stock model's log-probabilities on them."""
    tokenizer = AutoTokenizer.from_pretrained(args.dir)
    windows = take_windows(args.text, tokenizer, args.windows, args.prompt_tokens, args.generate_tokens)
    stock = AutoModelForCausalLM.from_pretrained(args.dir, dtype="auto")
    return windows, reference_log_probs(stock, windows)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
