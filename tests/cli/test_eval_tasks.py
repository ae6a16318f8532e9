"""`griffin-offload eval tasks`: on small local tasks (tests/evaluation/tasks), through the command line."""

import json
import shutil
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets.config
import lm_eval.evaluator
import lm_eval.tasks.manager
import pytest
from fork_server import ForkServer
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from marks import mostly_slow

from griffin_offload.cli.main import build_parser
from griffin_offload.evaluation.config import TasksConfig
from griffin_offload.evaluation.lm_eval_tasks import quiet_harness

TASKS = Path(__file__).parents[1] / "evaluation" / "tasks"
ALL = ("tiny_choices", "tiny_shots", "tiny_questions", "tiny_texts")


@pytest.fixture(autouse=True)
def _data_beside_the_tasks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Task files name their data from the working directory; the hub's flag is the process's."""
    monkeypatch.chdir(TASKS)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)


def _arguments(model: Path, tasks: str, *more: object) -> list[object]:
    memory = ["--device", "cpu", "--max-mem", "200MB", "--offline"]
    return ["eval", "tasks", "-m", model, *memory, "--include-path", TASKS, "--tasks", tasks, *more]


def _metrics(results: dict[str, Any]) -> dict[str, Any]:
    """Numbers, by task and metric; where there is no standard error lm-eval says "N/A"."""
    pairs = ((task, name, value) for task, own in results["results"].items() for name, value in own.items())
    return {f"{task} {name}": value for task, name, value in pairs if "," in name and value != "N/A"}


@pytest.fixture
def of_hflm(monkeypatch: pytest.MonkeyPatch) -> Callable[[Path], dict[str, Any]]:
    """lm-eval's own results of the dense model."""
    monkeypatch.setattr(lm_eval.evaluator, "add_env_info", lambda results: None)  # runs pip

    def evaluate(model: Path) -> dict[str, Any]:
        manager = TaskManager(include_defaults=False, include_path=str(TASKS))
        with quiet_harness():
            dense = HFLM(str(model), device="cpu", dtype="float32", add_bos_token=False)
            return lm_eval.simple_evaluate(dense, tasks=list(ALL), task_manager=manager, bootstrap_iters=1000)

    return evaluate


@pytest.mark.parametrize("mode", mostly_slow(("gen", "class", "strict"), 1))
@pytest.mark.filterwarnings("ignore:.* too few tokens")
def test_density_one_gives_hflms_numbers(cli, llama: Path, of_hflm, mode: str):
    expected = of_hflm(llama)
    outcome = cli(*_arguments(llama, ",".join(ALL), "--mode", mode, "--density", "1,0.25", "--json"))
    assert outcome.code == 0, outcome
    full, whole, pruned = outcome.json
    for same in (full, whole):
        for name, value in _metrics(expected).items():
            close = {"rel": 1e-5} if "tiny_texts" in name else {"abs": 0}
            assert _metrics(same)[name] == pytest.approx(value, **close), name
    changed = {name.split()[0] for name, value in _metrics(pruned).items() if value != _metrics(full)[name]}
    assert {"tiny_questions", "tiny_texts"} - ({"tiny_texts"} if mode == "strict" else set()) <= changed
    for key in ("versions", "n-shot", "higher_is_better", "n-samples", "group_subtasks"):
        assert full[key] == pruned[key] == expected[key]
    assert set(full["configs"]) == set(expected["configs"])
    assert full["config"]["model"] == "griffin"
    assert (
        pruned["config"]["model_args"] | {"density": 0.25, "selection": "topk", "mode": mode}
        == (pruned["config"]["model_args"])
    )


def test_the_table(cli, llama: Path):
    outcome = cli(*_arguments(llama, "tiny_choices", "--selection", "topk,random", "--limit", 4, "--num-fewshot", 0))
    assert (outcome.code, outcome.err) == (0, "")
    lines = [line.split() for line in outcome.out.splitlines()]
    assert lines[0] == ["task", "metric", "full", "topk", "0.5", "random", "0.5"]
    assert [line[:2] for line in lines[1:-1]] == [["tiny_choices", "acc"], ["tiny_choices", "acc_norm"]]


@pytest.mark.slow
def test_two_processes_split_the_requests_and_give_equal_results(forks: ForkServer, llama: Path, tmp_path: Path):
    """Few-shot examples, which are drawn, too. Every process writes how many requests it simulates and generates."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    offline = {"HF_HOME": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1"}
    found, counts = [], []
    for processes in (1, 2):
        output, log = tmp_path / f"{processes}.json", tmp_path / f"counts{processes}"
        command = _arguments(llama, ",".join(ALL), "--mode", "class", "--output", output)
        started = []
        for rank in map(str, range(processes)):  # as torchrun tells them
            told = {"RANK": rank, "LOCAL_RANK": rank, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
            told |= dict.fromkeys(("WORLD_SIZE", "LOCAL_WORLD_SIZE"), str(processes))
            started.append(forks.start("-c", _COUNTS + _STARTS, *command, **offline, **told, COUNTS=str(log)))
        for one in started:
            assert one.wait() == 0, one.err
        assert sum(one.out.count("in brackets") for one in started) == 1, "only one process prints"
        found.append([_metrics(results) for results in json.loads(output.read_text())])
        counts.append(_counted(log))
    for one, two in zip(*found, strict=True):
        assert two == pytest.approx(one, rel=1e-5, nan_ok=True)
    # 18 choices, with and without shots, 3 texts in one window each; 5 generations of 2 models, by two processes 3
    # and 3, because lm-eval repeats one where the other process has more.
    assert counts[0] == [(39, 10)]
    simulated, generated = zip(*counts[1], strict=True)
    assert (sum(simulated), generated) == (39, (6, 6))
    assert min(simulated) >= 15


def _counted(log: Path) -> list[tuple[int, int]]:
    """Of each process, both."""
    found: dict[str, tuple[int, int]] = {}
    for line in log.read_text().splitlines():
        process, simulated, generated = line.split()
        before = found.get(process, (0, 0))
        found[process] = before[0] + int(simulated), before[1] + int(generated)
    return sorted(found.values())


_COUNTS = """
import os, sys
def write(*counts):
    with open(os.environ["COUNTS"], "a") as log:
        print(os.getpid(), *counts, file=log)
class Finder:
    def find_spec(self, name, path=None, target=None):
        if name == "griffin_offload.evaluation.lm_eval_tasks":
            sys.meta_path.remove(self)
            from griffin_offload.evaluation import lm_eval_model as harness
            of_samples, generate = harness.simulate, harness.GriffinLM._generate
            def simulate(model, samples, *args, **kwargs):
                write(len(samples), 0)
                return of_samples(model, samples, *args, **kwargs)
            def generated(self, **kwargs):
                write(0, 1)
                return generate(self, **kwargs)
            harness.simulate, harness.GriffinLM._generate = simulate, generated
sys.meta_path.insert(0, Finder())
"""
_STARTS = """
import runpy
runpy.run_module("griffin_offload", run_name="__main__", alter_sys=True)
"""


def _write_task(directory: Path, name: str, **changes: Any) -> None:
    base = {"include": str(TASKS / "choices.yaml"), "task": name}
    (directory / f"{name}.yaml").write_text(json.dumps(base | changes))  # JSON is YAML


def test_bad_input(cli, llama: Path, tmp_path: Path):
    def refuses(code: int, words: str, tasks: str, *more: object) -> None:
        cli.refuses(code, words, *_arguments(llama, tasks, *more))

    refuses(2, "different names", "tiny_choices,tiny_choices")
    refuses(2, "--limit is 0", "tiny_choices", "--limit", 0)
    refuses(2, "no directory .*absent", "tiny_choices", "--include-path", tmp_path / "absent")
    refuses(2, "no directory .* to write o.json", "tiny_choices", "--output", tmp_path / "absent" / "o.json")
    refuses(2, "takes TASK=FILE", "tiny_choices", "--data", "x.jsonl")
    refuses(2, "none of the tasks", "tiny_choices", "--data", "other=x.jsonl")
    refuses(2, "give --data griffin_xsum=FILE", "griffin_xsum")
    refuses(2, "no selection 'best'", "tiny_choices", "--selection", "best")
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"text": "a", "choices": ["b", "c"], "answer": 0}\n\n{"text": "a\n')
    _write_task(tmp_path, "damaged", dataset_kwargs={"data_files": {"test": str(bad)}})
    _write_task(tmp_path, "absent", dataset_kwargs={"data_files": {"test": str(tmp_path / "absent.jsonl")}})
    _write_task(tmp_path, "no_column", doc_to_text="{{nothing}}")
    here = ("--include-path", tmp_path)
    refuses(2, "bad.jsonl, line 3 is not JSON", str(tmp_path / "damaged.yaml"))
    refuses(2, "cannot read .*absent.jsonl", "absent", *here)
    refuses(2, "no_column cannot be loaded.*nothing", "no_column", *here)
    refuses(2, "bad.jsonl, line 3", "griffin_xsum", "--data", f"griffin_xsum={bad}")
    bad.write_text('{"article": "a"}\n')
    refuses(2, "document 1 lacks", "griffin_xsum", "--data", f"griffin_xsum={bad}")
    cli.refuses_usage("required", "eval", "tasks")
    cli.refuses(2, "--mode: invalid choice", "eval", "tasks", "--tasks", "x", "--mode", "best")


def test_unknown_tasks(cli, llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """After a look through lm-eval's own tasks, of which one is enough here; a broken file of the user is named."""
    of_harness = tmp_path / "of_harness"
    shutil.copytree(Path(lm_eval.tasks.manager.__file__).parent / "hellaswag", of_harness / "hellaswag")
    monkeypatch.setattr(lm_eval.tasks.manager, "__file__", str(of_harness / "manager.py"))
    tmp_path = tmp_path / "own"
    tmp_path.mkdir()
    _write_task(tmp_path, "tiny_choices")
    (tmp_path / "broken.yaml").write_text("task: [tiny")
    words = "no task 'tiny_choises': did you mean tiny_choices.*broken.yaml cannot be read"
    cli.refuses(2, words, *_arguments(llama, "hellaswag,tiny_choises", "--include-path", tmp_path))


def test_a_data_set_that_is_not_there(cli, llama: Path, tmp_path: Path):
    _write_task(tmp_path, "of_the_hub", dataset_path="nobody/nothing", dataset_kwargs=None)
    words = "of_the_hub needs the data set nobody/nothing"
    cli.refuses(1, words, *_arguments(llama, "of_the_hub", "--include-path", tmp_path))


def test_what_finished_before_a_failure_is_kept(cli, llama: Path, tmp_path: Path):
    """A task that fails while it is loaded, one that fails while it is scored, and one after them."""
    (tmp_path / "faulty.py").write_text("def score(document, results):\n    raise KeyError('no such score')\n")
    (tmp_path / "faulty.yaml").write_text(
        f"include: {TASKS / 'questions.yaml'}\ntask: faulty\nprocess_results: !function faulty.score\n"
    )
    _write_task(tmp_path, "no_column", doc_to_text="{{nothing}}")
    output = tmp_path / "out.json"
    names = f"no_column,{TASKS / 'choices.yaml'},faulty"
    outcome = cli(*_arguments(llama, names, "--include-path", tmp_path, "--output", output, "--limit", 2))
    assert outcome.code == 1
    assert "2 of 3 tasks failed" in outcome.err
    assert "task faulty failed: KeyError: 'no such score'" in outcome.err
    assert "tiny_choices" in outcome.out
    assert [set(results["results"]) for results in json.loads(output.read_text())] == [{"tiny_choices"}] * 2


def test_summaries_from_a_file_of_prompts(cli, llama: Path, tmp_path: Path):
    rows = [{"article": "the cat sat\n###\non the", "summary_gt": "the mat and the river"}] * 2
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = ("--data", f"griffin_xsum={tmp_path / 'rows.jsonl'}")
    outcome = cli(*_arguments(llama, "griffin_xsum", *data, "--limit", 1, "--json"))
    assert outcome.code == 0, outcome
    for results in outcome.json:
        assert {"rouge1,none", "rouge2,none", "rougeL,none"} <= set(results["results"]["griffin_xsum"])
        settings = results["configs"]["griffin_xsum"]["generation_kwargs"]
        assert (settings["max_gen_toks"], settings["temperature"], settings["until"]) == (128, 0.3, ["###"])


def test_rouge_of_a_summary():
    from griffin_offload.evaluation.summaries import task_scores

    document = {"summary_gt": "the cat sat on the mat"}
    assert task_scores(document, [" the cat sat### on the mat"]) == pytest.approx(
        {"rouge1": 100 * 6 / 9, "rouge2": 100 * 4 / 7, "rougeL": 100 * 6 / 9}
    )
    assert set(task_scores(document, ["the cat sat on the mat"]).values()) == {100}
    assert set(task_scores(document, [" ### the"]).values()) == {0}


def test_without_the_extra(cli, llama: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("griffin_offload.cli.eval_tasks.find_spec", {"torch": object()}.get)
    cli.refuses(1, r'pip install "griffin-offload\[eval\]"', *_arguments(llama, "tiny_choices"))


def test_defaults_are_those_of_the_dataclass():
    parsed, config = build_parser().parse_args(["eval", "tasks", "--tasks", "x"]), TasksConfig()
    for name in ("mode", "selection", "bos", "num_fewshot", "limit", "max_length"):
        assert getattr(parsed, name) == getattr(config, name)
    assert [float(density) for density in parsed.density.split(",")] == list(config.densities)
