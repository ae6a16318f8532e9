"""The page: one table for each cap, what failed, what was faster than ours, and whether outputs agree."""

import statistics
from collections.abc import Iterator, Sequence
from typing import Any

from peers import bounds
from peers.bounds import ModelBytes
from report import gigabytes, markdown_table, seconds

from griffin_offload.units import parse_size

Run = dict[str, Any]
HEADS = (
    "",
    "weights on disk",
    "load + first token",
    "per further token",
    "to ours",
    "at best: first, further",
    "read until the first",
    "read per further token",
    "peak anonymous",
    "tokens",
    "as the full model's",
)
REFERENCES = ("mmap", "accelerate")  # all weights, in the checkpoint's own precision


def first_s(run: Run) -> float:
    return float(run["figures"]["load"]["s"] + run["figures"]["prefill"]["s"])


def pace_s(run: Run) -> float:
    """Median; the mean where tokens come several at a time."""
    pauses = run["figures"]["token_s"]
    return float(statistics.mean(pauses) if "exact" in run["name"] else statistics.median(pauses))


def split_key(key: str) -> tuple[str, str]:
    cap, side = key.split()
    return cap, side


def reference(runs: dict[str, Run]) -> tuple[str, list[int]] | None:
    """The longest answer of the first side that computes all weights unchanged."""
    for wanted in REFERENCES:
        found = [run for key, run in runs.items() if split_key(key)[1] == wanted and run["figures"]]
        if found:
            run = max(found, key=lambda run: len(run["figures"]["tokens"]))
            return run["name"], run["figures"]["tokens"]
    return None


def agreement(run: Run, expected: Sequence[int] | None) -> str:
    """Equal tokens before the first other one, of as many as both made."""
    if not expected or "simulated" in run["name"]:
        return "-"
    pairs = list(zip(run["figures"]["tokens"], expected, strict=False))
    equal = next((index for index, (ours, theirs) in enumerate(pairs) if ours != theirs), len(pairs))
    return f"{equal} of {len(pairs)}"


class Page:
    def __init__(self, content: dict[str, Any]) -> None:
        self.content, self.runs = content, content["runs"]
        self.model = ModelBytes(**content["model"])
        self.settings = content["settings"]
        found = reference(self.runs)
        self.reference, self.expected = found or (None, None)

    def text(self) -> str:
        caps = sorted({split_key(key)[0] for key in self.runs}, key=parse_size)
        parts = [f"# Peers: {self.model.name}", self.origin()]
        if self.content.get("ceilings"):
            parts += bounds.statement(self.content["ceilings"], self.settings["threads"])
        for cap in caps:
            parts += [f"## Memory cap {cap}", self.table(cap), "\n".join(self.notes(cap))]
        parts.append("\n".join(self.footnotes()))
        return "\n\n".join(part for part in parts if part)

    def origin(self) -> str:
        runs = list(self.runs.values())
        dates = sorted(run["date"] for run in runs)
        lines = [
            f"- date: {dates[0]} to {dates[-1]}" if dates else "",
            *(f"- command: `{command}`" for command in dict.fromkeys(run["command"] for run in runs)),
            *(f"- hardware: `{hardware}`" for hardware in dict.fromkeys(str(run["hardware"]) for run in runs)),
            *(f"- versions: `{versions}`" for versions in dict.fromkeys(str(run["versions"]) for run in runs)),
            f"- software: {', '.join(sorted(self.packages()))}",
            f"- the checkpoint: {gigabytes(self.model.total_bytes)} in {8 * self.model.value_bytes} bit; prompt of "
            f"{self.settings['prompt_tokens']} tokens ({self.settings['prompt']}), greedy, each side cold, in a "
            f"process of its own and with free memory {self.settings.get('memory', 'as found')}",
        ]
        return "\n".join(filter(None, lines))

    def packages(self) -> set[str]:
        figures = [run["figures"] for run in self.runs.values() if run["figures"]]
        return {found["package"] for found in figures if "package" in found}

    def finished(self, cap: str) -> list[Run]:
        found = [run for key, run in self.runs.items() if split_key(key)[0] == cap and run["figures"]]
        return sorted(found, key=pace_s)

    def table(self, cap: str) -> str:
        finished = self.finished(cap)
        ours_s = min((pace_s(run) for run in finished if is_ours(run)), default=None)
        return markdown_table([HEADS, *(self.row(run, ours_s) for run in finished)])

    def row(self, run: Run, ours_s: float | None) -> list[str]:
        """`ours_s` is the pace of our fastest side in this cap."""
        figures = run["figures"]
        stored_bytes = self.content["copies"][run["copy"]]["stored_bytes"]
        tokens = len(figures["tokens"])
        read_bytes = figures["load"]["read_bytes"] + figures["prefill"]["read_bytes"]
        planned = f" ({figures['planned']})" if run["name"].endswith("unasked") else ""
        return [
            run["name"] + planned,
            gigabytes(stored_bytes),
            seconds(first_s(run)),
            seconds(pace_s(run)),
            f"{pace_s(run) / ours_s:.2f}x" if ours_s else "-",
            self.best(run, stored_bytes),
            gigabytes(read_bytes),
            gigabytes(figures["decode"]["read_bytes"] / (tokens - 1)),
            gigabytes(run["rss_anon_peak_bytes"]),
            str(tokens),
            agreement(run, self.expected),
        ]

    def best(self, run: Run, stored_bytes: int) -> str:
        """First token and further ones. Exact mode's own limit depends on what is accepted."""
        ceilings = self.content.get("ceilings")
        if not ceilings:
            return "-"
        first = bounds.first_token_s(ceilings, self.model, self.settings["prompt_tokens"], stored_bytes)
        if "exact" in run["name"]:
            return f"{seconds(first)}, -"
        needed_bytes = bounds.token_bytes(run, self.model, stored_bytes)
        return f"{seconds(first)}, {seconds(bounds.token_s(ceilings, needed_bytes, run['limit_bytes'] or 0))}"

    def notes(self, cap: str) -> Iterator[str]:
        for key, run in self.runs.items():
            if split_key(key)[0] == cap:
                if not run["figures"]:
                    yield f"- {run['name']}: did not finish: {run['failure']}"
                elif is_ours(run):
                    whole = seconds(first_s(run) + run["figures"]["imports_s"])
                    yield f"- {run['name']}: first token {whole} after the start of its process, imports included"
                yield from (f"- trial: {trial['name']}: {outcome(trial)}" for trial in run["trials"])
                if run["limit_bytes"] is None:
                    yield f"- **{run['name']} ran without a cap: no memory cgroup could be made**"
        yield from self.faster(cap)

    def faster(self, cap: str) -> Iterator[str]:
        """Peers that our fastest side of this cap does not beat."""
        ours = [run for run in self.finished(cap) if is_ours(run)]
        peers = [run for run in self.finished(cap) if not is_ours(run)]
        if not ours or not peers:
            return
        for title, figure in (("first token", first_s), ("further tokens", pace_s)):
            best, rival = min(ours, key=figure), min(peers, key=figure)
            ahead = [f"{peer['name']} ({seconds(figure(peer))})" for peer in peers if figure(peer) < figure(best)]
            if ahead:
                yield f"- {title}: faster than ours ({best['name']}, {seconds(figure(best))}): {', '.join(ahead)}"
            else:
                ratio = figure(rival) / figure(best)
                yield f"- {title}: {best['name']} is {ratio:.2f}x as fast as the fastest peer ({rival['name']})"

    def footnotes(self) -> Iterator[str]:
        for name, copy in self.content["copies"].items():
            if name != "16bit":
                made = "" if copy["seconds"] is None else f", made in {seconds(copy['seconds'])}, once"
                yield f"- copy {name}: {gigabytes(copy['stored_bytes'])}{made}"
        if self.reference:
            yield f"- tokens are compared with those of: {self.reference}"


def is_ours(run: Run) -> bool:
    return str(run["name"]).startswith("griffin-offload")


def outcome(trial: dict[str, Any]) -> str:
    return f"{seconds(trial['token_s'])} per token" if "token_s" in trial else str(trial["failure"])
