"""Drafts from the text, beside decoding without: tokens per second on texts that repeat their prompt and on such that
do not.

    python benchmarks/lookup.py --dir SMOLLM2 --quantize int4 --out OUT

`--dir` is a trained checkpoint with a chat template (benchmarks/real_checkpoints.py makes SmolLM2-135M-Instruct). Every
prompt is answered greedily with and without, in turn, in one process; of each the fastest of `--rounds` counts, so that
a busy moment falls on both. Answers have to be the same. The ceiling is the mean number of tokens per forward. The last
line is JSON.
"""

import argparse
import json
import math
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from report import provenance

from griffin_offload import GriffinModel

PLACES = (
    "The library opens at nine in the morning and closes at six in the evening. Members may borrow ten books for three "
    "weeks. Children need a card of their own, which a parent signs. Lost books are paid for at their shop price."
)
NOTES = (
    "The meeting began at ten. Maria presented the budget for the coming year. The committee agreed to repair the roof "
    "before winter. Tom will ask three companies for offers. The next meeting is on the fourth of May."
)
CODE = '''def area(width, height):
    """The area of a rectangle."""
    return width * height


def volume(width, height, depth):
    """The volume of a box."""
    return area(width, height) * depth


def describe(width, height, depth):
    """A line about a box."""
    return f"{width} x {height} x {depth}: {volume(width, height, depth)}"
'''
LIST = "apples 3.20\nbread 2.10\nbutter 1.95\ncheese 4.80\neggs 2.75\nflour 1.10\nmilk 0.95\nrice 1.60"
REPEATING = {
    "copy": f"Repeat the following text word for word:\n\n{PLACES}",
    "rewrite": f"Rewrite this text, but change 'nine' to 'eight' and keep all other words:\n\n{PLACES}",
    "quote": f"Quote every sentence of these notes in a list:\n\n{NOTES}",
    "summary": f"Summarise these notes in the words of the notes:\n\n{NOTES}",
    "minutes": f"Write these notes again as minutes, with all sentences:\n\n{NOTES}",
    "rename": f"Repeat this code, and rename depth to length:\n\n{CODE}",
    "comment": f"Write this code again with a comment above each function:\n\n{CODE}",
    "fix": f"Here is a program. Print it again without any change:\n\n{CODE}",
    "csv": f"Write this list again, with a comma in place of each space:\n\n{LIST}",
    "sort": f"Write this list again:\n\n{LIST}",
}
OTHER = {
    "sky": "Why is the sky blue?",
    "story": "Tell a story about a lighthouse keeper and a storm.",
    "poem": "Write a poem about autumn leaves.",
    "letter": "Write a letter to a friend about a journey to the mountains.",
    "name": "Invent ten names for a small bakery, and explain each.",
    "history": "How did people tell the time before there were clocks?",
    "advice": "How do I learn to play the guitar?",
    "recipe": "How do I cook lentil soup?",
    "dialogue": "Write a dialogue between the sun and the moon.",
    "science": "Explain how a bicycle stays upright.",
}


@dataclass(frozen=True)
class Row:
    kind: str
    name: str
    tokens: int
    tokens_per_s: float
    without: float
    tokens_per_forward: float
    same: bool

    @property
    def gain(self) -> float:
        return self.tokens_per_s / self.without


def answered(model: GriffinModel, ids: torch.Tensor, tokens: int, lookup: bool | None) -> tuple[torch.Tensor, float]:
    """The answer, and its tokens per second of processor time: others' work on a busy machine is not counted."""
    sampling: dict[str, Any] = {"do_sample": False, "max_new_tokens": tokens, "attention_mask": torch.ones_like(ids)}
    start = time.process_time()
    prefilled: list[float] = []
    streamer = _FirstToken(prefilled)
    found = model.generate(ids, lookup=lookup, streamer=streamer, **sampling)
    seconds = time.process_time() - (prefilled[0] if prefilled else start)
    return found, max(found.shape[1] - ids.shape[1] - 1, 1) / seconds


class _FirstToken:
    """A streamer that notes when the first token of the answer came."""

    def __init__(self, came: list[float]) -> None:
        self._came, self._calls = came, 0

    def put(self, value: torch.Tensor) -> None:
        self._calls += 1
        if self._calls == 2:  # the prompt is the first
            self._came.append(time.process_time())

    def end(self) -> None:
        pass


def measured(model: GriffinModel, kind: str, name: str, text: str, args: argparse.Namespace) -> Row:
    chat = [{"role": "user", "content": text}]
    ids = model.tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=True, return_tensors="pt")
    ids = ids["input_ids"]
    best: dict[bool | None, float] = {None: 0.0, False: 0.0}
    found: dict[bool | None, torch.Tensor] = {}
    per_forward = 1.0
    for _ in range(args.rounds):
        for lookup in (None, False):
            found[lookup], rate = answered(model, ids, args.tokens, lookup)
            best[lookup] = max(best[lookup], rate)
            report = model.last_report
            assert report is not None
            if report.lookup is not None:
                tokens = report.generated_tokens - 1
                per_forward = tokens / max(tokens - report.lookup.accepted, 1)
    same = torch.equal(found[None], found[False])
    return Row(kind, name, found[None].shape[1] - ids.shape[1], best[None], best[False], per_forward, same)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--dir", type=Path, required=True)
    parser.add_argument("--quantize", default="none")
    parser.add_argument("--tokens", type=int, default=96, help="of an answer, at most")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--prompts", type=int, default=10, help="of each kind")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    rows: list[Row] = []
    options: dict[str, Any] = {"device": "cpu", "max_gpu_mem": "2GB", "density": 1.0, "ctx_size": 1024}
    with GriffinModel.from_pretrained(args.dir, quantize=args.quantize, threads=args.threads, **options) as model:
        for kind, prompts in (("repeats", REPEATING), ("other", OTHER)):
            for name, text in list(prompts.items())[: args.prompts]:
                rows.append(measured(model, kind, name, text, args))
                row = rows[-1]
                told = f"{row.tokens_per_s:6.1f} tok/s, {row.without:6.1f} without: {row.gain:.2f}x"
                print(
                    f"{kind:8} {name:9} {row.tokens:3} tok  {told}, {row.tokens_per_forward:.2f} a forward", flush=True
                )
    kinds = {kind: [row.gain for row in rows if row.kind == kind] for kind in ("repeats", "other")}
    figures = {
        "precision": args.quantize,
        "gain_mean": {kind: math.exp(sum(map(math.log, gains)) / len(gains)) for kind, gains in kinds.items()},
        "gain_least": {kind: min(gains) for kind, gains in kinds.items()},
        "same_answers": sum(row.same for row in rows),
        "answers": len(rows),
    }
    if args.out is not None:
        args.out.write_text(
            json.dumps(
                figures | {"rows": [asdict(row) for row in rows], **provenance("lookup.py", sys.argv[1:])}, indent=1
            )
        )
    print(json.dumps(figures))
    return 0 if figures["same_answers"] == len(rows) else 1


if __name__ == "__main__":
    sys.exit(main())
