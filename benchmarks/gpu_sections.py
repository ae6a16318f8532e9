"""The sections of gpu.py, each run in a process of its own: rows of figures on stdout, one JSON object a line."""

import contextlib
import gc
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from exact_streaming import CALIBRATION_TOKENS, forecast_s, generate, mean_pass_s, measured_s, realised, simulate
from gpu_row import Again, host_to_device_bytes, measure, prompt_of, timed
from make_checkpoint import SHAPES, make_checkpoint
from shared_layers import load_repeated
from transformers.utils import logging as transformers_logging

from griffin_offload import GriffinModel
from griffin_offload.devices.registry import choose_device
from griffin_offload.errors import DoesNotFit
from griffin_offload.evaluation.ceilings import decode_bytes_per_s, host_copy_rate

Row = dict[str, Any]
_COPIED_BYTES = {"full": 2**30, "tiny": 2**22}
_REPEATS = 10


@dataclass(frozen=True)
class Case:
    """A model's shape in a budget, at several densities and lengths."""

    shape: str
    budget: str
    densities: tuple[Any, ...] = (1.0, 0.5, 0.25)
    quantize: str = "auto"
    lengths: tuple[tuple[int, int], ...] = ((2048, 128),)
    repeated: tuple[int, int] | None = None
    """(layers in the checkpoint, layers of the model that shares them on the host)."""


CASES = {
    "7b": (Case("llama-2-7b", "8GB"), Case("llama-2-7b", "24GB", quantize="none")),
    "13b": (
        Case("llama-2-13b", "12GB"),
        Case("llama-2-13b", "24GB", (0.5, 0.25), "none"),
        # The paper's table 3, and what density gains against a model that is resident as a whole.
        Case("llama-2-13b", "80%", quantize="none"),
        Case("llama-2-13b", "80%", (1.0, 0.5), "none", ((2048, 2048),)),
    ),
    "70b": (Case("llama-2-70b", "24GB", ("auto", 0.25), repeated=(4, 80)),),
}
# bf16 residents, as exact mode wants the stored precision.
EXACT = Case("llama-2-13b", "24GB", (0.5,), "none", ((128, 24),))
SCHEDULES = ((0.5, 4), (0.8, 8), (0.95, 16))
SECTIONS = ("tests", "ceilings", *CASES, "exact")


def scaled(case: Case, scale: str) -> Case:
    """The same flow with toys: every shape is the tiny one."""
    if scale == "full":
        return case
    return replace(case, shape="tiny", budget="200MB", lengths=((24, 20),), repeated=(4, 8) if case.repeated else None)


@dataclass(frozen=True)
class Setting:
    device: torch.device
    scale: str
    folder: Path
    ends_at: float
    """In `time.monotonic`: rows that would not be done by then are left out, and that is said."""
    rates: Row

    def path(self, case: Case) -> Path:
        """Of the case's checkpoint."""
        return self.folder / (case.shape + (f"-{case.repeated[0]}layers" if case.repeated else ""))


def emit(row: Row) -> None:
    print(json.dumps(row), flush=True)


def checkpoint(setting: Setting, case: Case) -> Path:
    """Of the case's shape, made when it is not there."""
    path = setting.path(case)
    if not path.exists():
        start = time.monotonic()
        make_checkpoint(path, case.shape, layers=case.repeated[0] if case.repeated else None)
        emit({"made": path.name, "seconds": time.monotonic() - start})
    return path


@contextlib.contextmanager
def loaded(setting: Setting, case: Case, density: Any, **more: Any) -> Iterator[GriffinModel]:
    prompt, new = max(case.lengths)
    options: Row = {"device": setting.device.type, "max_gpu_mem": case.budget, "density": density}
    options |= {"quantize": case.quantize, "prompt_tokens": prompt, "ctx_size": prompt + new} | more
    path = checkpoint(setting, case)
    if case.repeated:
        model = load_repeated(path, case.repeated[1], **options)
    else:
        model = GriffinModel.from_pretrained(path, offload="ram", **options)
    try:
        if setting.device.type != "cuda":
            model.engine.capture_with(Again())
        yield model
    finally:
        model.close()
        del model
        gc.collect()
        if setting.device.type == "cuda":
            torch.cuda.empty_cache()


def ceilings(setting: Setting) -> None:
    """Link, memory, and one row times matrices in every precision; gate and up apart and in one."""
    device, door = setting.device, choose_device(setting.device.type)
    hidden, neurons = SHAPES["llama-2-13b" if setting.scale == "full" else "tiny"][:2]
    copied = device_copy_rate(_COPIED_BYTES[setting.scale], device)
    dtype = torch.bfloat16
    gemv = {
        precision: decode_bytes_per_s(precision, hidden, neurons, dtype, door) for precision in ("none", "int8", "int4")
    }
    emit(
        {
            "is": named(device),
            "copy_pinned_bytes_per_s": host_copy_rate(door, pinned=True),
            "copy_pageable_bytes_per_s": host_copy_rate(door, pinned=False),
            "device_copy_bytes_per_s": copied,
            "gemv_bytes_per_s": gemv,
            "memory_bytes_per_s": max(copied, gemv["none"] or 0.0),
            "gate_up": gate_up(hidden, neurons, dtype, device),
        }
    )


def named(device: torch.device) -> Row:
    if device.type != "cuda":
        return {}
    properties = torch.cuda.get_device_properties(device)
    return {"device": properties.name, "device_bytes": properties.total_memory}


def device_copy_rate(nbytes: int, device: torch.device) -> float:
    """Bytes read and written per second by a copy on the device."""
    source, target = (torch.ones(nbytes, dtype=torch.uint8, device=device) for _ in range(2))
    return 2 * nbytes / timed(lambda: target.copy_(source), _REPEATS, device)


def gate_up(hidden: int, neurons: int, dtype: torch.dtype, device: torch.device) -> Row:
    """Seconds of one row times gate and up of half the neurons: two products, and one of both stacked."""
    # Several pairs: together larger than any cache.
    stacked = [torch.full((neurons, hidden), 0.01, dtype=dtype, device=device) for _ in range(8)]
    row = torch.ones(1, hidden, dtype=dtype, device=device)
    linear = torch.nn.functional.linear
    half = neurons // 2

    def apart() -> None:
        for both in stacked:
            linear(row, both[:half])
            linear(row, both[half:])

    def fused() -> None:
        for both in stacked:
            linear(row, both)

    found = {}
    for name, work in (("apart_s", apart), ("fused_s", fused)):
        work()
        found[name] = timed(_captured(work, device), _REPEATS, device) / len(stacked)
    return found


def _captured(work: Callable[[], None], device: torch.device) -> Callable[[], object]:
    """As decode runs it: without the launches' own time."""
    if device.type != "cuda":
        return work
    from griffin_offload.devices.cuda import CudaRecorder

    recorder = CudaRecorder(device)
    recorder.warm_up(work)
    return recorder.record(work)


def cases(setting: Setting, name: str) -> None:
    """A row for every budget, density and pair of lengths of one model; the traffic of decode at density .5."""
    longest = 0.0
    for case in cases_of(name, setting.scale):
        for density in case.densities:
            start = time.monotonic()
            about = asdict(case) | {"model": name, "asked_density": density}
            if setting.ends_at - start < longest:
                emit(about | {"left_out": "no time left"})
                continue
            try:
                _case(setting, case, density, about)
            except DoesNotFit as error:
                emit(about | {"does_not_fit": " ".join(str(error).split())})
            except Exception as error:  # a failure of one row is a figure, too
                emit(about | {"failure": f"{type(error).__name__}: {' '.join(str(error).split())[:500]}"})
            longest = max(longest, time.monotonic() - start)


def _case(setting: Setting, case: Case, density: Any, about: Row) -> None:
    with loaded(setting, case, density) as model:
        for prompt_tokens, new_tokens in case.lengths:
            row = measure(model, prompt_tokens, new_tokens, setting.rates)
            if density == 0.5:
                row["traffic"] = host_to_device_bytes(model, prompt_tokens)
            emit(about | row)


def exact(setting: Setting) -> None:
    """Exact mode with simulated acceptance: seconds and bytes per token, beside the forecast (exact_streaming.py)."""
    (case,) = cases_of("exact", setting.scale)
    prompt_tokens, new_tokens = case.lengths[0]
    most = max(drafts for _, drafts in SCHEDULES)
    with loaded(setting, case, case.densities[0], exact=True, keep_prompts=True, draft_tokens=most) as model:
        ids, context = prompt_of(model, prompt_tokens)[None], model.new_context()
        tokens = min(CALIBRATION_TOKENS, new_tokens)
        generate(model, ids, tokens, exact=False, context=context)  # captures
        plain = generate(model, ids, tokens, exact=False, context=context)
        draft_s = plain["decode_s"] / (tokens - 1)
        for acceptance, drafts in SCHEDULES:
            simulate(0.0)
            pass_s = mean_pass_s(generate(model, ids, 3, draft_tokens=drafts, context=context))
            simulate(acceptance)
            report = generate(model, ids, new_tokens, draft_tokens=drafts, context=context)
            drafting = report["drafting"]
            emit(
                asdict(case)
                | {
                    "acceptance": acceptance,
                    "drawn": realised(report),
                    "drafts": drafts,
                    "tokens_per_pass": drafting["tokens"] / drafting["passes"],
                    "streamed_bytes_per_token": report["decode_streamed_bytes"] / drafting["tokens"],
                    "token_s": measured_s(report),
                    # A forecast divides by what is not accepted.
                    "forecast_s": forecast_s(min(realised(report), 1 - 1e-9), drafts, pass_s, draft_s),
                    "draft_s": draft_s,
                    "pass_s": pass_s,
                    "peak_device_bytes": report["peak_device_bytes"],
                    "budget_bytes": report["budget_bytes"],
                    "graphs": report["graphs"],
                }
            )


def cases_of(section: str, scale: str) -> list[Case]:
    """What a section loads."""
    found = (EXACT,) if section == "exact" else CASES.get(section, ())
    return [scaled(case, scale) for case in found]


def run_section(name: str, setting: Setting) -> None:
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    if setting.device.type != "cuda":
        torch.set_num_threads(1)  # toys: threads would only wait for each other
    if name == "ceilings":
        ceilings(setting)
    elif name == "exact":
        exact(setting)
    else:
        cases(setting, name)
