"""One row of the GPU table: a loaded model, a prompt, an answer; seconds, bytes, memory, and what the graph reaches."""

import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import StoppingCriteria, StoppingCriteriaList

from griffin_offload import GriffinModel
from griffin_offload.evaluation.speed import run_fixed, warm_up

_REPLAYS = 20
_PROFILED_TOKENS = 16
# Places, positions and flags of a token; no weight is so small.
_HOST_BYTES_PER_TOKEN = 4096


class Again:
    """In place of CUDA graphs where there are none: "replaying" computes again. Shows the flow, not the speed."""

    def warm_up(self, function: Callable[[], None]) -> None:
        function()

    def record(self, function: Callable[[], None]) -> Callable[[], None]:
        return function


def prompt_of(model: GriffinModel, tokens: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(3, model.engine.shape.vocab_size, (tokens,), generator=generator)


def measure(model: GriffinModel, prompt_tokens: int, new_tokens: int, rates: dict[str, Any]) -> dict[str, Any]:
    """A warm-up that captures, then one run; `rates` are the ceilings."""
    prompt = prompt_of(model, prompt_tokens)
    warm_up(model, prompt, new_tokens)
    report = run_fixed(model, prompt, new_tokens)
    token_s = report.decode_s / max(new_tokens - 1, 1)
    streamed_rate = report.prefill_streamed_bytes / report.prefill_s
    replay_s, read_bytes = time_replay(model)
    graphs = report.to_json()["graphs"]
    return {
        "prompt_tokens": prompt_tokens,
        "new_tokens": new_tokens,
        "density": model.plan.density,
        "precision": model.plan.precision,
        "budget_bytes": model.plan.budget_bytes,
        "planned_peak_bytes": model.plan.peak_bytes,
        "peak_device_bytes": report.peak_device_bytes,
        "used_device_bytes": used_bytes(model.device),
        "resident_bytes": model.resident_bytes,
        "embeddings": model.plan.embeddings,
        "offload": model.offload,
        "load_s": report.load_s,
        "prefill_s": report.prefill_s,
        "wait_s": report.wait_s,
        "streamed_bytes": report.prefill_streamed_bytes,
        "streamed_bytes_per_s": streamed_rate,
        "streamed_share_of_pinned": share(streamed_rate, rates.get("copy_pinned_bytes_per_s")),
        "decode_streamed_bytes": report.decode_streamed_bytes,
        "token_s": token_s,
        "replay_s": replay_s,
        "replay_bytes": read_bytes,
        "replay_share_of_memory": share(read_bytes / replay_s if replay_s else None, rates.get("memory_bytes_per_s")),
        "graphs": graphs,
    }


def share(value: float | None, ceiling: float | None) -> float | None:
    return None if value is None or not ceiling else value / ceiling


def used_bytes(device: torch.device) -> int | None:
    """What the whole device has given away, this process being the only one."""
    if device.type != "cuda":
        return None
    free, total = torch.cuda.mem_get_info(device)
    return total - free


def time_replay(model: GriffinModel) -> tuple[float | None, int]:
    """Seconds of one replay of the capture that was used last, and the bytes it has to read: weights without
    embeddings, and keys and values of its whole bucket. The answer is over, so it may write where it likes."""
    used = [
        (found, cache)
        for cache, of_cache in model.engine.graphs._captured.items()
        for found in of_cache.values()
        if found.replay is not None
    ]
    if not used:
        return None, 0
    found, cache = max(used, key=lambda pair: pair[0].used)
    kinds = found.step._kinds
    token_bytes = model.engine.shape.kv_width * model.engine.shape.item_bytes  # kv_bits is 16 here
    kv_bytes = cache.batch * token_bytes * sum(kinds[layer.window].tokens for layer in cache.layers)
    found.replay()
    seconds = timed(found.replay, _REPLAYS, model.device)
    return seconds, model.plan.decoded_bytes + kv_bytes


def timed(work: Callable[[], object], repeats: int, device: torch.device) -> float:
    """Mean seconds; launched one behind the other, so that only the device is timed where there is one."""
    if device.type != "cuda":
        start = time.perf_counter()
        for _ in range(repeats):
            work()
        return (time.perf_counter() - start) / repeats
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for _ in range(repeats):
        work()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1000 / repeats


class _StartAfterPrompt(StoppingCriteria):
    """Starts a profiler when the prompt has given the first token; never stops a generation."""

    def __init__(self, profiler: Any, device: torch.device) -> None:
        self._profiler, self._device, self._started = profiler, device, False

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        if not self._started:
            if self._device.type == "cuda":
                torch.cuda.synchronize(self._device)
            self._profiler.start()
            self._started = True
        return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)


def host_to_device_bytes(model: GriffinModel, prompt_tokens: int) -> dict[str, Any]:
    """Bytes that a profiler sees going to the device while tokens are generated, and what may: rows of embeddings
    that stay on the host, and a few numbers per token."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    if model.device.type == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    profiler = torch.profiler.profile(activities=activities)
    model.generate(
        prompt_of(model, prompt_tokens)[None],
        max_new_tokens=_PROFILED_TOKENS,
        min_new_tokens=_PROFILED_TOKENS,
        do_sample=False,
        stopping_criteria=StoppingCriteriaList([_StartAfterPrompt(profiler, model.device)]),
    )
    profiler.stop()
    copies, kernels = _traced(profiler)
    rows_bytes = model.last_report.decode_embedding_bytes
    return {
        "tokens": _PROFILED_TOKENS - 1,
        "copies": len(copies),
        "host_to_device_bytes": sum(copies),
        "embedding_rows_bytes": rows_bytes,
        "allowed_bytes": rows_bytes + _HOST_BYTES_PER_TOKEN * _PROFILED_TOKENS,
        "kernels_seen": kernels,
        "graphs": model.last_report.to_json()["graphs"],
    }


def _traced(profiler: Any) -> tuple[list[int], int]:
    """Bytes of every copy to the device, and the number of kernels: without any, the trace saw nothing."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    copies = [int(e["args"]["bytes"]) for e in events if str(e.get("name", "")).startswith("Memcpy HtoD")]
    return copies, sum(e.get("cat") == "kernel" for e in events)
