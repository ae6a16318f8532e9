"""Drafts from the text, beside decoding without: tokens per second on texts that repeat their prompt and on such that
do not.

    python benchmarks/lookup.py --dir SMOLLM2 --quantize int4 --out OUT

`--dir` is a trained checkpoint with a chat template (benchmarks/real_checkpoints.py makes SmolLM2-135M-Instruct). Every
prompt is answered greedily with and without, in turn, in one process; of each the fastest of `--rounds` counts, so that
a busy moment falls on both. Answers have to be the same. The ceiling is the mean number of tokens per forward. The last
line is JSON.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from report import markdown_table, provenance, publish

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


class FirstToken:
    """A streamer that notes the processor's time at the prompt, at the first token of the answer, and further on."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, _: torch.Tensor) -> None:
        self.times.append(time.process_time())

    def end(self) -> None:
        pass


def measured(model: GriffinModel, kind: str, name: str, text: str, args: argparse.Namespace) -> dict[str, Any]:
    """Tokens per second of processor time: others' work on a busy machine is not counted."""
    chat = [{"role": "user", "content": text}]
    ids = model.tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=True, return_tensors="pt")
    ids = ids["input_ids"]
    sampling: dict[str, Any] = {
        "do_sample": False,
        "max_new_tokens": args.tokens,
        "attention_mask": torch.ones_like(ids),
    }
    best: dict[bool | None, float] = {None: 0.0, False: 0.0}
    answers: dict[bool | None, torch.Tensor] = {}
    per_forward = 1.0
    for lookup in (None, False) * args.rounds:
        streamer = FirstToken()
        answers[lookup] = model.generate(ids, lookup=lookup, streamer=streamer, **sampling)
        tokens, report = answers[lookup].shape[1] - ids.shape[1] - 1, model.last_report
        best[lookup] = max(best[lookup], max(tokens, 1) / (time.process_time() - streamer.times[1]))
        if report is not None and report.lookup is not None:
            per_forward = tokens / max(tokens - report.lookup.accepted, 1)
    found = {"kind": kind, "name": name, "tokens": tokens + 1, "tokens_per_s": best[None], "without": best[False]}
    found |= {"gain": best[None] / best[False], "tokens_per_forward": per_forward}
    return found | {"same": torch.equal(answers[None], answers[False])}


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--dir", type=Path, required=True)
    parser.add_argument("--quantize", default="none")
    parser.add_argument("--tokens", type=int, default=96, help="of an answer, at most")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--prompts", type=int, default=10, help="of each kind")
    parser.add_argument("--out", type=Path, help="folder for the record")
    args = parser.parse_args(arguments)
    options: dict[str, Any] = {"device": "cpu", "max_gpu_mem": "2GB", "density": 1.0, "ctx_size": 1024}
    with GriffinModel.from_pretrained(args.dir, quantize=args.quantize, threads=args.threads, **options) as model:
        rows = [
            measured(model, kind, name, text, args)
            for kind, prompts in (("repeats", REPEATING), ("other", OTHER))
            for name, text in list(prompts.items())[: args.prompts]
        ]
    heads = ["kind", "name", "tokens", "tokens_per_s", "without", "gain", "tokens_per_forward", "same"]
    cells = [[f"{row[key]:.2f}" if isinstance(row[key], float) else str(row[key]) for key in heads] for row in rows]
    kinds = {kind: [row["gain"] for row in rows if row["kind"] == kind] for kind in ("repeats", "other")}
    figures = {
        "precision": args.quantize,
        "gain_mean": {kind: statistics.geometric_mean(gains) for kind, gains in kinds.items()},
        "gain_least": {kind: min(gains) for kind, gains in kinds.items()},
        "rows": rows,
    }
    record = provenance("lookup.py", arguments) | figures
    publish(args.out, f"lookup-{args.dir.name}", "Drafts from the text", markdown_table([heads, *cells]), record)
    return 0 if all(row["same"] for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
