"""Tasks of lm-evaluation-harness by name: its own, ours, and those of the user's YAML files."""

import difflib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from lm_eval.tasks import TaskManager
from lm_eval.tasks._index import Kind
from lm_eval.tasks._yaml_loader import load_yaml

from griffin_offload.errors import GriffinError, UsageError, one_line

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


def json_lines(path: Path, *, whole: bool = False) -> Iterator[Any]:
    """The values of a jsonl file, blank lines left out; with `whole`, the file's one value where it is one."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:  # ValueError: not UTF-8
        raise UsageError(f"cannot read {path}: {one_line(error)}") from error
    if whole:
        try:
            yield json.loads(text)
            return
        except ValueError:
            pass
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            try:
                yield json.loads(line)
            except ValueError as error:
                raise UsageError(f"{path}, line {number} is not JSON: {one_line(error)}") from error
