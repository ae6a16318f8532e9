"""Who takes part: what each reads, where it runs, and with which options."""

import sys
from dataclasses import dataclass, replace
from pathlib import Path

from peers.environments import interpreter
from sides import BENCHMARKS, Side

LLAMA, MAPPED = "llama-", "-mapped"
OURS = {
    "ours": ("unasked", "auto"),
    "ours-16bit": ("16 bit", "none"),
    "ours-int8": ("int8", "int8"),
    "ours-int4": ("int4", "int4"),
    "ours-exact": ("int8, exact mode", "int8"),
}
FULL = {
    "mmap": "transformers, mapped weights",
    "accelerate": "accelerate disk offload",
    "airllm": "AirLLM",
    "ollm": "oLLM",
}
OLLM_SHARE = 0.9  # of what ours may use: the rest is for its reading buffers


@dataclass(frozen=True)
class Settings:
    """What all sides share. `cap_bytes` is the cgroup's limit, `budget_bytes` what our runtime may use of it."""

    threads: int
    density: float
    acceptance: float | None
    draft_tokens: int | None
    environments: Path
    split: Path
    """AirLLM's own copy."""
    cap_bytes: int = 0
    budget_bytes: int = 0

    def within(self, cap_bytes: int, overhead_bytes: int) -> "Settings":
        return replace(self, cap_bytes=cap_bytes, budget_bytes=cap_bytes - overhead_bytes)


def is_known(key: str) -> bool:
    return key in OURS or key in FULL or key.startswith(LLAMA)


def gguf_type(key: str) -> str:
    """'llama-q4_k_m-mapped' reads Q4_K_M."""
    return key.removeprefix(LLAMA).removesuffix(MAPPED).upper()


def copy_of(key: str) -> str:
    """What must be made before this side can run: '16bit' is the checkpoint itself."""
    if key in OURS:
        return {"none": "16bit", "auto": "16bit"}.get(OURS[key][1], OURS[key][1])
    if key == "airllm":
        return "split"
    return "16bit" if key in FULL else f"gguf-{gguf_type(key)}"


def environment_of(key: str) -> str | None:
    """The peer's own; None where it runs in ours."""
    if key in ("airllm", "ollm"):
        return key
    return "llama" if key.startswith(LLAMA) else None


def our_side(key: str, settings: Settings, new_tokens: int) -> Side:
    title, precision = OURS[key]
    density = "auto" if precision == "auto" else f"{settings.density:g}"
    options = ["--budget", str(settings.budget_bytes), "--density", density, "--quantize", precision]
    name = f"griffin-offload, {title}" + ("" if precision == "auto" else f", density {density}")
    if key == "ours-exact":
        options += ["--exact"]
        if settings.acceptance is not None:
            options += ["--acceptance", str(settings.acceptance)]
            name += f", acceptance simulated ({settings.acceptance:.0%})"
        if settings.draft_tokens:
            options += ["--draft-tokens", str(settings.draft_tokens)]
    return Side(name, here("ours"), settings.threads, new_tokens, tuple(options))


def here(worker: str) -> tuple[str, ...]:
    return sys.executable, str(BENCHMARKS / "worker.py"), worker


def accelerate(share: float, copied: bool, settings: Settings, new_tokens: int, scratch: Path) -> Side:
    """The full model with a share of the cap in RAM, whose weights are mapped or copied."""
    options = ("--ram-share", str(int(share * settings.cap_bytes)), "--scratch", str(scratch))
    name = f"accelerate, {share:.0%} of the cap in RAM" + (", share copied" if copied else "")
    options += ("--copy-share",) if copied else ()
    return Side(name, here("accelerate"), settings.threads, new_tokens, options)


def side(key: str, settings: Settings, new_tokens: int) -> Side:
    """All but accelerate, whose best setting is found by trials."""
    if key in OURS:
        return our_side(key, settings, new_tokens)
    environment = environment_of(key)
    if environment is None:
        return Side(FULL[key], here(key), settings.threads, new_tokens)
    program = (str(interpreter(settings.environments, environment)), "-m", f"peers.worker_{environment}")
    if key == "airllm":
        return Side(FULL[key], program, settings.threads, new_tokens, ("--scratch", str(settings.split)))
    if key == "ollm":
        share = ("--ram-share", str(int(OLLM_SHARE * settings.budget_bytes)))
        return Side(FULL[key], program, settings.threads, new_tokens, share)
    mapped = ("--mapped",) if key.endswith(MAPPED) else ()
    name = f"llama.cpp, {gguf_type(key)}" + (", mapped" if mapped else "")
    options = ("--file", f"{gguf_type(key)}.gguf", *mapped)
    return Side(name, (*program, "side"), settings.threads, new_tokens, options)


def reads_everything(key: str) -> bool:
    """Every weight for every token, from the disk where memory does not hold it: few tokens tell its pace."""
    return key in FULL
