"""What one loaded model tells on a device: replays of its graph, copies that a profiler sees, exact mode's pace."""

import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import StoppingCriteria, StoppingCriteriaList
from worker import simulate

from griffin_offload import GriffinModel
from griffin_offload.evaluation.speed import run_fixed, warm_up

Row = dict[str, Any]
_REPLAYS, _PROFILED_TOKENS, _COPIED_BYTES = 20, 16, 2**28
# Places, positions and flags of a token; no weight is so small.
_HOST_BYTES_PER_TOKEN = 4096
_ACCEPTANCE, _DRAFTS = 0.8, 8


def measure_model(folder: Path, device: str, budget: str, prompt_tokens: int) -> Row:
    """At density .5 in the stored precision, as exact mode wants it."""
    options = {"device": device, "max_gpu_mem": budget, "density": 0.5, "quantize": "none", "offload": "ram"}
    sizes = {"prompt_tokens": prompt_tokens, "ctx_size": prompt_tokens + 2 * _PROFILED_TOKENS}
    exact = {"exact": True, "keep_prompts": True, "draft_tokens": _DRAFTS}
    with GriffinModel.from_pretrained(folder, **options, **sizes, **exact) as model:
        vocabulary = model.engine.shape.vocab_size
        prompt = torch.randint(3, vocabulary, (prompt_tokens,), generator=torch.Generator().manual_seed(0))
        return replays(model, prompt) | {"traffic": traffic(model, prompt), "exact": drafted(model, prompt)}


def replays(model: GriffinModel, prompt: Tensor) -> Row:
    """Seconds of one replay of the graph captured last, beside the rate of a copy on the device. A replay reads the
    weights without embeddings; the answer is over, so it may write where it likes."""
    warm_up(model, prompt, _PROFILED_TOKENS)
    run_fixed(model, prompt, _PROFILED_TOKENS)
    rate, captured = copy_rate(model.device), model.engine.graphs
    used = [c for of_cache in captured._captured.values() for c in of_cache.values()] if captured else []
    used = sorted((found for found in used if found.replay is not None), key=lambda found: found.used)
    if not used:
        return {"device_copy_bytes_per_s": rate, "replay_s": None, "replay_share_of_memory": None}
    replay_s = timed(used[-1].replay, _REPLAYS, model.device)
    share = model.plan.decoded_bytes / replay_s / rate
    return {"device_copy_bytes_per_s": rate, "replay_s": replay_s, "replay_share_of_memory": share}


def copy_rate(device: torch.device) -> float:
    """Bytes read and written per second by a copy on the device."""
    source, target = (torch.ones(_COPIED_BYTES, dtype=torch.uint8, device=device) for _ in range(2))
    return 2 * _COPIED_BYTES / timed(lambda: target.copy_(source), _REPLAYS, device)


def timed(work: Callable[[], object], repeats: int, device: torch.device) -> float:
    """Mean seconds; launched one behind the other, so that only the device is timed where there is one."""
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    for _ in range(repeats):
        work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return (time.perf_counter() - start) / repeats


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


def traffic(model: GriffinModel, prompt: Tensor) -> Row:
    """Bytes that a profiler sees going to the device while tokens are generated, and what may: rows of embeddings
    that stay on the host, and a few numbers per token."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    if model.device.type == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    profiler = torch.profiler.profile(activities=activities)
    stopping = StoppingCriteriaList([_StartAfterPrompt(profiler, model.device)])
    generate(model, prompt, _PROFILED_TOKENS, exact=False, stopping_criteria=stopping)
    profiler.stop()
    copies, kernels = _traced(profiler)
    rows_bytes = model.last_report.decode_embedding_bytes
    return {
        "host_to_device_bytes": sum(copies),
        "allowed_bytes": rows_bytes + _HOST_BYTES_PER_TOKEN * _PROFILED_TOKENS,
        "kernels_seen": kernels,
    }


def _traced(profiler: Any) -> tuple[list[int], int]:
    """Bytes of every copy to the device, and the number of kernels: without any, the trace saw nothing."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    copies = [int(e["args"]["bytes"]) for e in events if str(e.get("name", "")).startswith("Memcpy HtoD")]
    return copies, sum(e.get("cat") == "kernel" for e in events)


def drafted(model: GriffinModel, prompt: Tensor) -> Row:
    """Exact mode: random weights accept nothing, so acceptance is drawn; all the rest is real."""
    simulate(_ACCEPTANCE)
    generate(model, prompt, _PROFILED_TOKENS, draft_tokens=_DRAFTS)
    report = model.last_report.to_json()
    drafting = report["drafting"]
    return {
        "acceptance": _ACCEPTANCE,
        "drafts": _DRAFTS,
        "tokens_per_pass": drafting["tokens"] / drafting["passes"],
        "token_s": (drafting["draft_s"] + drafting["pass_s"]) / drafting["tokens"],
        "streamed_bytes_per_token": report["decode_streamed_bytes"] / drafting["tokens"],
    }


def generate(model: GriffinModel, prompt: Tensor, new_tokens: int, **options: Any) -> None:
    lengths = {"max_new_tokens": new_tokens, "min_new_tokens": new_tokens}
    model.generate(prompt[None], **lengths, do_sample=False, eos_token_id=None, **options)
