"""Tasks evaluated one after another, each for the full model and every variant; results as lm-eval gives them."""

import contextlib
import difflib
import io
import json
import logging
import os
import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import datasets
import lm_eval.api.task
import numpy as np
import torch
import tqdm
from lm_eval.defaults import DEFAULT_OTHER_SEED, DEFAULT_RANDOM_SEED
from lm_eval.evaluator import evaluate
from lm_eval.tasks import TaskManager
from lm_eval.tasks._index import Kind
from lm_eval.tasks._yaml_loader import load_yaml
from lm_eval.utils import handle_non_serializable

from griffin_offload.engine.layer_pass import Progress
from griffin_offload.errors import GriffinError, UsageError, one_line
from griffin_offload.evaluation.config import TasksConfig
from griffin_offload.evaluation.distributed import Processes
from griffin_offload.evaluation.lm_eval_model import GriffinLM
from griffin_offload.evaluation.samples import json_lines

# Silence of lm-eval and its libraries: what concerns users is said by us, on their stderr.


_LOGGERS = ("lm_eval", "datasets", "huggingface_hub", "filelock", "absl")


class _NoBar(tqdm.tqdm):  # type: ignore[misc]
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs | {"disable": True})


@contextlib.contextmanager
def quiet_harness() -> Iterator[None]:
    """Inside, lm-eval logs, prints and draws nothing, and its bootstrap starts no processes."""
    loggers = [logging.getLogger(name) for name in _LOGGERS]
    levels, bars = [logger.level for logger in loggers], (tqdm.tqdm, lm_eval.api.task.tqdm)
    forking = os.environ.get("DISABLE_MULTIPROC")
    datasets.disable_progress_bars()
    try:
        for logger in loggers:
            logger.setLevel(logging.CRITICAL)
        tqdm.tqdm = lm_eval.api.task.tqdm = _NoBar
        os.environ["DISABLE_MULTIPROC"] = "1"
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
        tqdm.tqdm, lm_eval.api.task.tqdm = bars
        if forking is None:
            del os.environ["DISABLE_MULTIPROC"]
        datasets.enable_progress_bars()


# Tasks of lm-evaluation-harness by name: its own, ours, and those of the user's YAML files.


OWN_TASKS = Path(__file__).parent / "tasks"
_NEAR_MATCHES = 5


class Tasks:
    """Where `names` are found; `include` is a directory of YAML files, `data` the files of tasks that ask for one."""

    def __init__(self, names: Sequence[str], include: Path | None, data: Mapping[str, str]) -> None:
        if include is not None and not include.is_dir():
            raise UsageError(f"no directory {include}: --include-path takes one with task YAML files")
        self._include = include
        places = [str(place) for place in (OWN_TASKS, include) if place is not None]
        options: dict[str, Any] = {"include_path": places, "metadata": {"data": dict(data)} if data else None}
        self._manager = TaskManager(include_defaults=False, **options)
        if not all(self._is_near(name) for name in names):  # reading the harness's own takes seconds
            self._manager = TaskManager(**options)
        for name in names:
            self._check(name)
        for name in data:
            if name not in names:
                raise UsageError(f"data is given for {name!r}, which is none of the tasks {', '.join(names)}")

    def load(self, name: str) -> dict[str, Any]:
        """The task, or the tasks of a group or tag, with their documents. UsageError for data that cannot be read."""
        try:
            return self._manager.load([name])  # type: ignore[no-any-return]
        except GriffinError:
            raise
        except Exception as error:  # datasets, YAML files and their functions raise errors of many libraries
            raise self._explained(name, error) from error

    def _is_near(self, name: str) -> bool:
        """Whether no task of the harness itself is needed."""
        entry = self._manager.task_index.get(name)
        return Path(name).is_file() or (entry is not None and entry.kind in (Kind.TASK, Kind.PY_TASK))

    def _check(self, name: str) -> None:
        if name in self._manager.task_index or Path(name).is_file():
            return
        found = difflib.get_close_matches(name, self._manager.all_tasks, _NEAR_MATCHES, 0.6)
        near = f"did you mean {', '.join(found)}?" if found else "give a task of lm-eval or add --include-path"
        broken = "".join(f"; {line}" for line in self._broken_files())
        raise UsageError(f"no task {name!r}: {near}{broken}")

    def _broken_files(self) -> Iterator[str]:
        """The user's YAML files that the harness passed over."""
        for path in sorted(self._include.rglob("*.yaml")) if self._include is not None else ():
            try:
                load_yaml(path, resolve_func=False)
            except Exception as error:  # of the YAML parser, or a ValueError
                yield f"{path} cannot be read: {one_line(error)}"

    def _explained(self, name: str, error: Exception) -> GriffinError:
        config = self._config(name)
        for path in _data_files(config.get("dataset_kwargs")):
            check_lines(path)
        dataset = config.get("dataset_path")
        if isinstance(error, ConnectionError):
            return GriffinError(
                f"task {name} needs the data set {dataset}, neither cached nor reachable: run once with a "
                "connection and without --offline, or give a YAML with local data (--include-path)"
            )
        return UsageError(f"task {name} cannot be loaded: {type(error).__name__}: {one_line(error)}")

    def _config(self, name: str) -> dict[str, Any]:
        entry = self._manager.task_index.get(name)
        path = Path(name) if entry is None else entry.yaml_path
        try:
            return {} if path is None else load_yaml(path, resolve_func=False)
        except Exception:  # the error to be explained is the same one
            return {}


def _data_files(settings: Any) -> Iterator[Path]:
    """Local JSON files among a data set's arguments."""
    given = settings.get("data_files") if isinstance(settings, dict) else None
    values = given.values() if isinstance(given, dict) else [given]
    for value in values:
        for name in value if isinstance(value, list) else [value]:
            if isinstance(name, str) and name.endswith((".jsonl", ".json")):
                yield Path(name)


def check_lines(path: Path) -> None:
    """UsageError, with its number, for the first line that is not JSON, and for a file that cannot be read. A .json
    file may also be one value over many lines."""
    for _ in json_lines(path, whole=path.suffix == ".json"):
        pass


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
