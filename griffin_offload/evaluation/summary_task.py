"""The functions of the task files for summaries (`tasks/`): their documents and their scores."""

from pathlib import Path
from typing import Any

from datasets import Dataset
from rouge_score.rouge_scorer import RougeScorer

from griffin_offload.errors import UsageError
from griffin_offload.evaluation.task_index import json_lines

_METRICS = ("rouge1", "rouge2", "rougeL")
_END = "###"


def documents(task: str, data: dict[str, str] | None = None, **_: Any) -> dict[str, Dataset]:
    """Rows of the user's jsonl file for `task`: `article`, the whole 1-shot prompt, and `summary_gt`, the reference."""
    path = (data or {}).get(task)
    if path is None:
        raise UsageError(f"task {task} reads its prompts from a file: give --data {task}=FILE.jsonl")
    rows = list(json_lines(Path(path)))
    for number, row in enumerate(rows, start=1):
        if not (isinstance(row, dict) and all(isinstance(row.get(key), str) for key in ("article", "summary_gt"))):
            raise UsageError(f"{path}, document {number} lacks a text article or summary_gt")
    if not rows:
        raise UsageError(f"{path} holds no documents")
    return {"test": Dataset.from_list([{key: row[key] for key in ("article", "summary_gt")} for row in rows])}


def rouge(document: dict[str, Any], results: list[str]) -> dict[str, float]:
    """F1 of ROUGE-1, 2 and L, in percent, of what is before "###"; an empty summary scores 0."""
    summary = results[0].split(_END)[0].strip()
    if not summary:
        return dict.fromkeys(_METRICS, 0.0)
    scores = RougeScorer(list(_METRICS), use_stemmer=False).score(document["summary_gt"], summary)
    return {name: 100 * scores[name].fmeasure for name in _METRICS}
