"""`griffin-offload eval tasks`: tasks of lm-evaluation-harness, the full model beside every variant."""

import argparse
import contextlib
import json
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from griffin_offload.cli.eval import add_measuring_options, add_variant_options, columns, variants_of
from griffin_offload.cli.options import add_memory_options, add_model_option, model_of, quiet_libraries
from griffin_offload.cli.terminal import Bar
from griffin_offload.config import BosRule, EvalMode
from griffin_offload.errors import GriffinError, UsageError
from griffin_offload.evaluation.config import TasksConfig

if TYPE_CHECKING:
    from griffin_offload.engine.layer_pass import Progress
    from griffin_offload.evaluation.distributed import Processes
    from griffin_offload.evaluation.lm_eval_tasks import Results, TaskRun, Tasks

_DEFAULTS = TasksConfig()
_MEMORY = ("max_gpu_mem", "max_cpu_mem", "device", "offload", "dtype", "seed", "threads", "offline")


def add_parser(kinds: Any) -> None:
    """Add this kind to the parser of `eval`."""
    tasks = kinds.add_parser(
        "tasks",
        help="tasks of lm-evaluation-harness, against the full model",
        epilog="example: griffin-offload eval tasks -m ./model --tasks hellaswag,piqa",
    )
    add = tasks.add_argument
    add("--tasks", required=True, metavar="NAME[,NAME...]", help="hellaswag,piqa,..., groups, or YAML files")
    add("--include-path", type=Path, metavar="DIR", help="more task YAML files")
    add("--data", action="append", default=[], metavar="TASK=FILE", help="jsonl of griffin_xsum, griffin_cnn_dailymail")
    add("--mode", choices=get_args(EvalMode), default=_DEFAULTS.mode, help="tokens of answers that lack neurons")
    add("--num-fewshot", type=int, default=_DEFAULTS.num_fewshot, metavar="N", help="default: the task's")
    add("--limit", type=int, default=_DEFAULTS.limit, metavar="N", help="documents per task")
    add("--max-length", type=int, default=_DEFAULTS.max_length, metavar="TOKENS", help="default: the model's context")
    add(
        "--bos", choices=get_args(BosRule), default=_DEFAULTS.bos, help="first token: Gemma's alone, or the tokenizer's"
    )
    add_variant_options(tasks, _DEFAULTS.densities, _DEFAULTS.selection)
    add("--output", type=Path, metavar="FILE", help="JSON: a list of lm-eval's results, the full model's first")
    add_measuring_options(tasks)
    add_model_option(tasks, json="print one JSON list instead of a table")
    add_memory_options(tasks)
    tasks.set_defaults(command=evaluate_tasks)


def evaluate_tasks(arguments: argparse.Namespace) -> int:
    """A table of all tasks and variants on stdout, or a JSON list; results of finished tasks are kept."""
    names, config, data = _names(arguments), _config(arguments), _data(arguments)
    variants = variants_of(arguments)
    if find_spec("lm_eval") is None:
        raise GriffinError('eval tasks needs lm-evaluation-harness: pip install "griffin-offload[eval]"')
    if arguments.output is not None and not arguments.output.absolute().parent.is_dir():
        raise UsageError(f"no directory {arguments.output.absolute().parent} to write {arguments.output.name} to")
    quiet_libraries()
    if arguments.offline:
        _go_offline()
    from griffin_offload.evaluation.distributed import Processes
    from griffin_offload.evaluation.lm_eval_model import GriffinLM
    from griffin_offload.evaluation.lm_eval_tasks import TaskRun, Tasks, quiet_harness

    settings = {name: getattr(arguments, name) for name in ("mode", "bos", "max_length", *_MEMORY)}
    with quiet_harness():
        tasks = Tasks(names, arguments.include_path, data)
        processes = Processes.launched()
        model = GriffinLM(model_of(arguments), variants=variants, processes=processes, **settings)
    run = TaskRun(model, config, processes, _bars(arguments, processes))
    try:
        _add_all(run, names, tasks, arguments.output, processes)
    finally:
        model.close()
    if processes.first and len(run.failures) < len(names):
        print(json.dumps(run.results) if arguments.json else "\n".join(_lines(run.results)))
    processes.end()
    _raise_failures(run, names)
    return 0


def _add_all(run: "TaskRun", names: list[str], tasks: "Tasks", output: Path | None, processes: "Processes") -> None:
    from griffin_offload.checkpoint.files import write_text

    for name in names:
        if run.add(name, tasks) and output is not None and processes.first:
            write_text(output, json.dumps(run.results, indent=2))


def _raise_failures(run: "TaskRun", names: list[str]) -> None:
    if not run.failures:
        return
    if len(names) == 1:
        raise run.failures[names[0]]
    listed = "; ".join(str(error) for error in run.failures.values())
    raise GriffinError(f"{len(run.failures)} of {len(names)} tasks failed: {listed}")


def _names(arguments: argparse.Namespace) -> list[str]:
    names = [name.strip() for name in arguments.tasks.split(",")]
    if not all(names) or len(set(names)) < len(names):
        raise UsageError(f"cannot read the tasks {arguments.tasks!r}: different names separated by commas")
    return names


def _config(arguments: argparse.Namespace) -> TasksConfig:
    for name, least in (("limit", 1), ("max_length", 2), ("num_fewshot", 0)):
        value = getattr(arguments, name)
        if value is not None and value < least:
            raise UsageError(f"--{name.replace('_', '-')} is {value}: at least {least}")
    return TasksConfig(num_fewshot=arguments.num_fewshot, limit=arguments.limit)


def _data(arguments: argparse.Namespace) -> dict[str, str]:
    pairs = [pair.partition("=") for pair in arguments.data]
    if not all(name and path for name, _, path in pairs):
        raise UsageError("--data takes TASK=FILE, as in --data griffin_xsum=xsum.jsonl")
    return {name: path for name, _, path in pairs}


def _go_offline() -> None:
    """For data sets; the model has its own way. Both libraries read the environment when they are imported."""
    import datasets.config
    import huggingface_hub.constants

    huggingface_hub.constants.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = True


def _bars(arguments: argparse.Namespace, processes: "Processes") -> Any:
    @contextlib.contextmanager
    def bar(title: str) -> "Iterator[Progress]":
        with Bar(title, quiet=arguments.quiet or not processes.first) as shown:
            yield shown.step

    return bar


def _lines(results: "list[Results]") -> list[str]:
    from griffin_offload.evaluation.lm_eval_tasks import label

    heads = ("task", "metric", *(label(run["config"]["model_args"]) for run in results))
    cells = []
    for task, full in results[0]["results"].items():
        for metric in (key for key in full if "," in key and "_stderr," not in key):
            cells.append((task, metric.removesuffix(",none"), *_values(task, metric, results)))
    return [*columns(heads, cells), "in brackets: relative to full"]


def _values(task: str, metric: str, results: "list[Results]") -> Iterator[str]:
    """A cell per model: the full one's value with its standard error, the others' relative to it."""
    full, *others = (run["results"][task][metric] for run in results)
    error = results[0]["results"][task].get(metric.replace(",", "_stderr,", 1))
    yield _number(full) + (f" ±{_number(error)}" if isinstance(error, float) else "")
    for value in others:
        share = f" ({value / full:.2f})" if isinstance(value, int | float) and full else ""
        yield _number(value) + share


def _number(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, int | float) else "-"
