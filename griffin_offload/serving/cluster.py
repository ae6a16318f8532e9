"""A batch over the machines of a Ray cluster: actors of Ray Data, each with a model within a budget of its own.

An actor that dies is started again by Ray, and the requests that it had are asked again; the answers go to the process
that started the batch, which keeps the first one of each request.
"""

import contextlib
import json
import logging
import math
import os
import pickle
import socket
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from griffin_offload.config import ServeConfig
from griffin_offload.errors import GriffinError, UsageError, one_line
from griffin_offload.serving.batch import Answers, Batch, Work
from griffin_offload.serving.queue import Figures
from griffin_offload.units import format_bytes, parse_size

# Requests that an actor is given at once: enough to decode together, few enough that little is asked again.
_REQUESTS_OF_A_TASK = 8
# In the column of statuses: the model of this actor cannot answer, the body says why.
_NO_MODEL = -1
_CONNECT_S = 10.0

Row = dict[str, Any]


@dataclass(frozen=True)
class Resources:
    """What Ray keeps for one actor."""

    cpus: float
    gpus: int
    memory: int
    """Bytes of the machine's memory; 0 where the budget is a GPU's."""

    def on(self, machine: Mapping[str, float]) -> int:
        """How many actors find room on a machine with these resources."""
        wanted = {"CPU": self.cpus, "GPU": self.gpus, "memory": self.memory}
        return min(math.floor(machine.get(name, 0) / each + 1e-6) for name, each in wanted.items() if each)

    def __str__(self) -> str:
        parts = [f"{self.cpus:g} CPU{'' if self.cpus == 1 else 's'}", *(["1 GPU"] if self.gpus else [])]
        return " and ".join([*parts, *([format_bytes(self.memory)] if self.memory else [])])


def resources_for(options: Mapping[str, Any], workers: int, machines: Sequence[Mapping[str, float]]) -> Resources:
    """What an actor with these options of `LoadConfig` needs where `workers` share the machines."""
    cpus, gpus = (sum(machine.get(name, 0) for machine in machines) for name in ("CPU", "GPU"))
    threads = options["threads"] or min(1.0, cpus / workers)
    if options["device"] in ("cuda", "xpu") or (options["device"] == "auto" and gpus >= workers):
        return Resources(threads, 1, 0)
    budget = options["max_gpu_mem"]
    if isinstance(budget, str) and (budget == "auto" or budget.endswith("%")):
        raise UsageError(
            f"--max-gpu-mem {budget} is a share of one machine's free memory, which workers on a cluster would all "
            "take: give each worker's budget, as in --max-gpu-mem 12GB"
        )
    return Resources(threads, 0, parse_size(budget))


class Answerer:
    """One actor: the model, loaded once, and the requests of one call together. Ray Data calls it with a table of
    works (pickled) and takes a table of what was answered."""

    def __init__(self, directory: str, options: Mapping[str, object], served: str) -> None:
        self._failure: GriffinError | None = None
        try:
            self._batch = Batch(Path(directory), options, served, ServeConfig())
        except GriffinError as error:  # said with the first requests: an actor that fails to start is started for ever
            self._failure = error

    def __call__(self, table: Mapping[str, Sequence[bytes]]) -> dict[str, list[Any]]:
        works: list[Work] = [pickle.loads(work) for work in table["work"]]
        collected = _Collected()
        if self._failure is None:
            try:
                self._batch.run(works, collected, collected.count)
            except GriffinError as error:
                self._failure = error
        if self._failure is not None:
            collected.add("", _NO_MODEL, {"error": one_line(self._failure), "exit_code": self._failure.exit_code})
        return collected.table()


class _Collected(Answers):
    """Answers on their way to the process that asked."""

    def __init__(self) -> None:
        self._rows: list[Row] = []
        self._tokens = 0

    def add(self, custom_id: str, status: int, body: dict[str, object]) -> None:
        self._rows.append({"custom_id": custom_id, "status": status, "body": json.dumps(body), "tokens": 0})

    def count(self, figures: Figures) -> None:
        """Of the answer that was added last."""
        self._rows[-1]["tokens"] = figures.completion_tokens

    def table(self) -> dict[str, list[Any]]:
        return {name: [row[name] for row in self._rows] for name in ("custom_id", "status", "body", "tokens")}


@contextlib.contextmanager
def connected(address: str) -> Iterator[list[dict[str, float]]]:
    """What each machine of the cluster has; "auto" is the one that runs here, or one of this machine that ends again.
    UsageError where Ray is not installed or there is no cluster."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # Ray would tell its makers about this run
    # It warns as of an error of how Ray Data itself gives an actor its arguments.
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    try:
        import ray
        import ray.data
    except ImportError as error:
        raise UsageError(f"--ray needs {error.name}: pip install 'griffin-offload[cluster]'") from error
    try:
        _reach(address)
        ray.init(
            None if address == "auto" else address,
            include_dashboard=False,
            log_to_driver=False,
            logging_level=logging.ERROR,
        )
    except (OSError, ValueError, RuntimeError) as error:
        raise UsageError(f"cannot reach a Ray cluster at {address}: {one_line(error)}") from error
    try:
        ray.data.DataContext.get_current().enable_progress_bars = False
        logging.getLogger("ray.data").setLevel(logging.ERROR)
        yield [node["Resources"] for node in ray.nodes() if node["Alive"]]
    finally:
        ray.shutdown()


def _reach(address: str) -> None:
    """OSError if nothing listens at HOST:PORT: Ray would try for minutes."""
    host, colon, port = address.removeprefix("ray://").rpartition(":")
    if colon and port.isdecimal():
        socket.create_connection((host, int(port)), _CONNECT_S).close()


def answer(
    works: Sequence[Work],
    model: tuple[str, Mapping[str, object], str],
    workers: int,
    machines: Sequence[Mapping[str, float]],
) -> Iterator[tuple[str, int, dict[str, Any], int]]:
    """custom_id, status, body and generated tokens of each request, in the order in which they are answered.

    `model` is what an `Answerer` is made of: the directory, which every machine can read, options of `LoadConfig`, and
    its name. UsageError where the machines have no room for that many workers; GriffinError where a worker's model
    cannot answer.
    """
    import ray.data

    needed = resources_for(model[1], workers, machines)
    room = sum(needed.on(machine) for machine in machines)
    if room < workers:
        asked = f"{workers} workers need {needed} each" if workers > 1 else f"1 worker needs {needed}"
        machine = "1 machine" if len(machines) == 1 else f"{len(machines)} machines"
        raise UsageError(
            f"{asked}, and the cluster ({machine}) has room for {room}: give a smaller "
            f"{'--workers' if room else '--max-gpu-mem'}"
        )
    of_a_task = max(1, min(_REQUESTS_OF_A_TASK, len(works) // workers))
    rows = [{"work": pickle.dumps(work)} for work in works]
    answered = ray.data.from_items(rows, override_num_blocks=math.ceil(len(rows) / of_a_task)).map_batches(
        Answerer,
        fn_constructor_args=model,
        batch_size=None,  # a block: requests that follow each other
        compute=ray.data.ActorPoolStrategy(size=workers),
        num_cpus=needed.cpus,
        num_gpus=needed.gpus,
        memory=needed.memory,
    )
    for row in answered.iter_rows():
        body = json.loads(row["body"])
        if row["status"] == _NO_MODEL:
            error = GriffinError(f"a worker stopped: {body['error']}")
            error.exit_code = body["exit_code"]
            raise error
        yield row["custom_id"], row["status"], body, row["tokens"]
