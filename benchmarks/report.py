"""The record of one comparison: where it ran, the table, and the two files."""

import importlib.metadata
import json
import os
import platform
import re
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

PACKAGES = ("torch", "transformers", "accelerate", "safetensors", "griffin-offload")
PATH_OPTIONS = (
    *("--dir", "--out", "--text", "--envs", "--prompt-ids", "--models"),
    *("--gguf", "--beside", "--llama-cpp"),
)


def hardware() -> dict[str, Any]:
    """Processor, cores and RAM; nothing that names the machine."""
    model = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.M)
    total = re.search(r"^MemTotal:\s+(\d+) kB$", Path("/proc/meminfo").read_text(), re.M)
    return {
        "cpu": model[1] if model else platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "ram_bytes": int(total[1]) * 1024 if total else None,
        "kernel": platform.release().split("-")[0],
    }


def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found


def command_line(script: str, arguments: Sequence[str]) -> str:
    """The command as it can be published: files and folders by their last name only."""
    words = ["python", f"benchmarks/{script}"]
    previous = ""
    for argument in arguments:
        option, equals, value = argument.partition("=")
        if previous in PATH_OPTIONS:
            words.append(Path(argument).name)
        elif equals and option in PATH_OPTIONS:
            words.append(f"{option}={Path(value).name}")
        else:
            words.append(argument)
        previous = argument
    return " ".join(words)


def provenance(script: str, arguments: Sequence[str]) -> dict[str, Any]:
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": command_line(script, arguments),
        "hardware": hardware(),
        "versions": versions(),
    }


def origin_lines(record: dict[str, Any]) -> str:
    """Where and how a record came about, for the head of its page."""
    origin = {key: record[key] for key in ("date", "command", "hardware", "versions")}
    return "\n".join(
        f"- {key}: `{value if isinstance(value, str) else json.dumps(value)}`" for key, value in origin.items()
    )


def gigabytes(size_bytes: float | None) -> str:
    return "unknown" if size_bytes is None else f"{size_bytes / 1e9:.2f} GB"


def seconds(value_s: float | None) -> str:
    return "-" if value_s is None else f"{value_s:.0f} s" if value_s >= 100 else f"{value_s:.3g} s"


def markdown_table(rows: Sequence[Sequence[str]]) -> str:
    """The first row is the header."""
    lines = [rows[0], ["---"] * len(rows[0]), *rows[1:]]
    return "\n".join("| " + " | ".join(row) + " |" for row in lines)


def write(folder: Path, name: str, markdown: str, record: dict[str, Any]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.md").write_text(markdown + "\n")
    (folder / f"{name}.json").write_text(json.dumps(record, indent=2) + "\n")


def publish(folder: Path | None, name: str, title: str, body: str, record: dict[str, Any]) -> None:
    """How a script ends: its tables, the two files where it is told a folder, and JSON in the last line."""
    print(body, end="\n\n")
    if folder is not None:
        write(folder, name, f"# {title}\n\n{origin_lines(record)}\n\n{body}", record)
    print(json.dumps(record))
