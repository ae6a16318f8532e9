"""The functions of the task files for summaries (`tasks/`): their documents and their scores."""

from pathlib import Path
from typing import Any

from datasets import Dataset

from griffin_offload.errors import UsageError
from griffin_offload.evaluation.config import SummariesConfig
from griffin_offload.evaluation.rouge import rouge as summary_scores
from griffin_offload.evaluation.samples import json_lines


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
    """Scores of one summary, in percent."""
    return summary_scores(results[0], document["summary_gt"], SummariesConfig.end)
