"""What has been measured so far, in one JSON file, so that a table that takes an hour survives an interruption."""

import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

from report import provenance
from sides import Result


class Journal:
    """One model and one set of settings; results measured under others are refused, not mixed in."""

    def __init__(self, path: Path, model: dict[str, Any], settings: dict[str, Any]) -> None:
        self.path = path
        self.content: dict[str, Any] = {"model": model, "settings": settings, "copies": {}, "runs": {}}
        if path.exists():
            found = json.loads(path.read_text())
            if (found["model"], found["settings"]) != (model, json.loads(json.dumps(settings))):
                raise SystemExit(f"error: {path.name} holds another model or {found['settings']}: choose another --out")
            self.content = found

    def save(self) -> None:
        """Whole or not at all."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        partial = self.path.with_suffix(".partial")
        partial.write_text(json.dumps(self.content, indent=2) + "\n")
        os.replace(partial, self.path)

    @property
    def runs(self) -> dict[str, dict[str, Any]]:
        """By '12GiB ours-int8'."""
        return self.content["runs"]  # type: ignore[no-any-return]

    def add_copy(self, name: str, stored_bytes: int, seconds: float | None) -> None:
        """How long it took stays known when it is found again."""
        known = self.content["copies"].get(name, {})
        self.content["copies"][name] = {"stored_bytes": stored_bytes, "seconds": seconds or known.get("seconds")}
        self.save()

    def add_run(self, key: str, copy: str, result: Result, trials: list[Result], arguments: list[str]) -> None:
        self.runs[key] = provenance("peers", arguments) | as_record(result) | {"copy": copy}
        self.runs[key]["trials"] = [{"name": trial.side.name, **pace(trial)} for trial in trials]
        self.save()


def pace(result: Result) -> dict[str, Any]:
    return {"token_s": result.token_s} if result.figures else {"failure": result.failure}


def as_record(result: Result) -> dict[str, Any]:
    """Options and raw output are left out: they name folders of this machine."""
    outcome = {key: value for key, value in asdict(result.outcome).items() if key != "stdout"}
    return {
        "name": result.side.name,
        "threads": result.side.threads,
        "new_tokens": result.side.new_tokens,
        "failure": None if result.figures else result.failure,
        "figures": result.figures,
    } | outcome
