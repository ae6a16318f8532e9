"""Write a multiple-choice task from a text: which of three continuations belongs to the beginning of a story?

    python examples/story_choices.py --text TEXT --dir DIR
    griffin-offload eval tasks --include-path DIR --tasks story_choices --mode class --density 0.75,0.5

TEXT is UTF-8 with documents separated by <|endoftext|> (`.xz` is read as it is). An item is the beginning of a
document and what follows it; the wrong choices are pieces of two other documents. DIR gets the items as jsonl and the
task's YAML. The same seed writes the same files.
"""

import argparse
import json
import lzma
import random
from pathlib import Path
from typing import Any

SEPARATOR = "<|endoftext|>"
YAML = """task: story_choices
dataset_path: json
dataset_kwargs:
  data_files:
    test: {items}
test_split: test
output_type: multiple_choice
doc_to_text: beginning
doc_to_choice: choices
doc_to_target: answer
metric_list:
  - metric: acc
  - metric: acc_norm
metadata:
  version: 1.0
"""


def read_documents(path: Path) -> list[list[str]]:
    """The words of every document."""
    raw = path.read_bytes()
    text = (lzma.decompress(raw) if path.suffix == ".xz" else raw).decode("utf-8")
    return [document.split() for document in text.split(SEPARATOR)]


def make_items(documents: list[list[str]], begin: int, follow: int, count: int, seed: int) -> list[dict[str, Any]]:
    """`count` items of `begin` words and choices of `follow` words, from documents taken in turn at new places."""
    draw = random.Random(seed)
    usable = [words for words in documents if len(words) >= begin + 2 * follow]
    if len(usable) < 3:
        raise SystemExit(f"{len(usable)} documents have {begin + 2 * follow} words, 3 are needed")
    items = []
    for number in range(count):
        place = number % len(usable)
        words = usable[place]
        start = draw.randrange(len(words) - begin - follow + 1) if number >= len(usable) else 0
        others = draw.sample([other for i, other in enumerate(usable) if i != place], 2)
        choices = [words[start + begin : start + begin + follow]]
        choices += [other[(at := draw.randrange(1, len(other) - follow)) : at + follow] for other in others]
        order = draw.sample(range(3), 3)
        texts = [" ".join(choices[i]) for i in order]
        items.append({"beginning": " ".join(words[start : start + begin]), "choices": texts, "answer": order.index(0)})
    return items


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--dir", type=Path, required=True)
    parser.add_argument("--items", type=int, default=100)
    parser.add_argument("--begin", type=int, default=40, help="words of the beginning")
    parser.add_argument("--follow", type=int, default=12, help="words of each choice")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    items = make_items(read_documents(given.text), given.begin, given.follow, given.items, given.seed)
    given.dir.mkdir(parents=True, exist_ok=True)
    path = given.dir.absolute() / "story_choices.jsonl"
    path.write_text("".join(json.dumps(item) + "\n" for item in items), encoding="utf-8")
    (given.dir / "story_choices.yaml").write_text(YAML.format(items=json.dumps(str(path))), encoding="utf-8")
    print(f"{len(items)} items in {given.dir}")


if __name__ == "__main__":
    main()
