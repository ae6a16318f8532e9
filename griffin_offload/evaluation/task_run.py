"""Tasks evaluated one after another, each for the full model and every variant; results as lm-eval gives them."""

import json
import random
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from importlib.metadata import version
from typing import Any

import numpy as np
import torch
from lm_eval.defaults import DEFAULT_OTHER_SEED, DEFAULT_RANDOM_SEED
from lm_eval.evaluator import evaluate
from lm_eval.utils import handle_non_serializable

from griffin_offload.config import TasksConfig
from griffin_offload.errors import GriffinError, UsageError, one_line
from griffin_offload.evaluation.harness import GriffinLM
from griffin_offload.evaluation.processes import Processes
from griffin_offload.evaluation.quiet import quiet_harness
from griffin_offload.evaluation.task_index import Tasks
from griffin_offload.runtime.prefill import Progress

Results = dict[str, Any]
"""What lm-eval writes for one model: results, configs, versions, n-shot, higher_is_better, n-samples, config, ..."""
BarOf = Callable[[str], AbstractContextManager[Progress]]
"""From a title to a progress bar."""

# Filled task by task; "groups" is absent where there are none.
_BY_TASK = ("results", "groups", "group_subtasks", "configs", "versions", "n-shot", "higher_is_better", "n-samples")


class TaskRun:
    """Evaluates tasks with one model; `results` has an entry for the full model and each variant, in this order, and
    only in the first process."""

    def __init__(self, model: GriffinLM, config: TasksConfig, processes: Processes, bar: BarOf) -> None:
        self._model, self._config, self._processes, self._bar = model, config, processes, bar
        self.results: list[Results] = [
            {name: {} for name in _BY_TASK if name != "groups"} | self._about(row)
            for row in range(len(model.variants) + 1 if processes.first else 0)
        ]
        self.failures: dict[str, GriffinError] = {}

    def add(self, name: str, tasks: Tasks) -> bool:
        """Evaluate a task, or a group; whether that went well, else `failures` says why. Of several processes, one
        that fails while they evaluate ends with the error, because the others would wait for it."""
        try:
            loaded = self._loaded(name, tasks)
        except GriffinError as error:
            self.failures[name] = error
            loaded = None
        if not self._processes.all_agree(loaded is not None) or loaded is None:
            self.failures.setdefault(name, GriffinError(f"task {name} could not be loaded by another process"))
            return False
        try:
            self._evaluate(name, loaded)
        except GriffinError as error:
            if self._processes.size > 1:
                raise
            self.failures[name] = error
        self._model.forget()
        return name not in self.failures

    def _loaded(self, name: str, tasks: Tasks) -> dict[str, Any]:
        with quiet_harness():
            loaded = tasks.load(name)
            for task in loaded["tasks"].values():
                self._check_size(task)
                own = task.get_config("num_fewshot")  # 0 there means that shots make no sense, as in lm-eval
                if own is None or (own != 0 and self._config.num_fewshot is not None):
                    task.set_config(key="num_fewshot", value=self._config.num_fewshot or 0)
        return loaded

    def _check_size(self, task: Any) -> None:
        documents = min(len(task.eval_docs), self._config.limit or len(task.eval_docs))
        if documents < self._processes.size:
            raise UsageError(
                f"task {task.task_name} has {documents} documents for {self._processes.size} processes: start fewer"
            )

    def _evaluate(self, name: str, loaded: dict[str, Any]) -> None:
        found = []
        for row in range(len(self._model.variants) + 1):
            self._model.row = row
            with self._bar(f"{name}, {self._label(row)}") as self._model.progress, quiet_harness():
                found.append(self._evaluated(name, loaded))
        for total, own in zip(self.results, found, strict=False):  # other processes than the first have no results
            for key in _BY_TASK:
                if key in own:
                    total.setdefault(key, {}).update(_as_json(own[key]))

    def _evaluated(self, name: str, loaded: dict[str, Any]) -> Results:
        """One row: lm-eval's own evaluation, with the seeds it takes by default, so that rows see equal requests."""
        random.seed(DEFAULT_RANDOM_SEED)
        np.random.seed(DEFAULT_OTHER_SEED)
        torch.manual_seed(DEFAULT_OTHER_SEED)
        for task in loaded["tasks"].values():
            task.set_fewshot_seed(seed=DEFAULT_OTHER_SEED)
            if self._processes.size > 1 and hasattr(task, "sampler"):
                task.sampler.sample = _OwnDraws(type(task.sampler).sample.__get__(task.sampler), self._processes)
        try:
            found = evaluate(
                lm=self._model,
                task_dict=loaded,
                limit=self._config.limit,
                bootstrap_iters=self._config.bootstrap_iters,
                log_samples=False,
            )
        except (GriffinError, OSError, MemoryError):
            raise
        except Exception as error:  # tasks are YAML and Python of many authors
            raise GriffinError(f"task {name} failed: {type(error).__name__}: {one_line(error)}") from error
        return found or {}

    def _label(self, row: int) -> str:
        return label(self._model.model_args(row))

    def _about(self, row: int) -> Results:
        config = self._config
        return {
            "config": {
                "model": "griffin",
                "model_args": self._model.model_args(row),
                "num_fewshot": config.num_fewshot,
                "limit": config.limit,
                "bootstrap_iters": config.bootstrap_iters,
                "processes": self._processes.size,
                "random_seed": DEFAULT_RANDOM_SEED,
                "numpy_seed": DEFAULT_OTHER_SEED,
                "torch_seed": DEFAULT_OTHER_SEED,
                "fewshot_seed": DEFAULT_OTHER_SEED,
            },
            "date": time.time(),
            "lm_eval_version": version("lm_eval"),
            "transformers_version": version("transformers"),
            "max_length": self._model.max_length,
        }


def label(model_args: dict[str, Any]) -> str:
    """ "full", or selection and density."""
    return f"{model_args['selection']} {model_args['density']:g}" if "selection" in model_args else "full"


class _OwnDraws:
    """Few-shot examples of one process: those that one process alone would draw for the same documents.

    Documents go to the processes in turn and every one takes a draw, so the draws of the others' are skipped.
    """

    def __init__(self, sample: Callable[..., Sequence[Any]], processes: Processes) -> None:
        self._sample, self._skipped, self._others = sample, processes.rank, processes.size - 1

    def __call__(self, *args: Any, **kwargs: Any) -> Sequence[Any]:
        for _ in range(self._skipped):
            self._sample(*args, **kwargs)
        self._skipped = self._others
        return self._sample(*args, **kwargs)


def _as_json(found: Any) -> Any:
    """Plain values; what is no number (NaN) is None, because JSON has none."""
    return json.loads(json.dumps(found, default=handle_non_serializable), parse_constant=lambda _: None)
