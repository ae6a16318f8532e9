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
    "beside ceilings before and behind, and between tokens",
    "read until the first",
    "read per further token",
    "peak anonymous",
    "tokens",
    "as the full model's",
)
REFERENCES = ("mmap", "accelerate", "airllm", "ollm")  # all weights, in the checkpoint's own precision


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
            f"- peers: {', '.join(sorted(self.packages()))}",
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
        return [
            run["name"],
            gigabytes(stored_bytes),
            seconds(first_s(run)),
            seconds(pace_s(run)),
            f"{pace_s(run) / ours_s:.2f}x" if ours_s else "-",
            self.best(run, stored_bytes),
            self.beside(run, stored_bytes),
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

    def beside(self, run: Run, stored_bytes: int) -> str:
        """Ours against the ceilings of its own precision just before and just behind it: how many times the bound of
        the first token, and which share of the one-row rate; and of what the kernels reach between its tokens."""
        found = run.get("ceilings")
        if not found:
            return "-"
        first = self.times_of_bound(run, first_s(run))
        if "exact" in run["name"]:
            return f"{first}, -"
        needed_bytes = bounds.token_bytes(run, self.model, stored_bytes)
        shares = sorted(needed_bytes / ceilings["memory_bytes_per_s"] / pace_s(run) for ceilings in found)
        alone = statistics.median(run["figures"]["products_bytes_per_s"])
        shares.append(needed_bytes / alone / pace_s(run))
        return "{}, {:.0%} to {:.0%}, {:.0%}".format(first, *shares)

    def notes(self, cap: str) -> Iterator[str]:
        for key, run in self.runs.items():
            if split_key(key)[0] == cap:
                if not run["figures"]:
                    yield f"- {run['name']}: did not finish: {run['failure']}"
                elif is_ours(run) and "imports_s" in run["figures"]:
                    yield f"- {run['name']}: {self.from_start(run)}"
                yield from (f"- trial: {trial['name']}: {outcome(trial)}" for trial in run["trials"])
                if run["limit_bytes"] is None:
                    yield f"- **{run['name']} ran without a cap: no memory cgroup could be made**"
        yield from self.faster(cap)

    def from_start(self, run: Run) -> str:
        whole_s = first_s(run) + run["figures"]["imports_s"]
        times = self.times_of_bound(run, whole_s)
        return f"first token {seconds(whole_s)} after the start of its process, imports included: {times} its bound"

    def times_of_bound(self, run: Run, taken_s: float) -> str:
        """Of the first token, by the ceilings of the run's own precision just before and just behind it."""
        stored_bytes, tokens = self.content["copies"][run["copy"]]["stored_bytes"], self.settings["prompt_tokens"]
        found = [bounds.first_token_s(ceilings, self.model, tokens, stored_bytes) for ceilings in run["ceilings"]]
        return " to ".join(f"{taken_s / bound_s:.2f}x" for bound_s in sorted(found, reverse=True))

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
        cached = max((run["cached_before_bytes"] for run in self.runs.values()), default=0)
        yield f"- still in the page cache before a run, at most: {gigabytes(cached)}"


def is_ours(run: Run) -> bool:
    return str(run["name"]).startswith("griffin-offload")


def outcome(trial: dict[str, Any]) -> str:
    return f"{seconds(trial['token_s'])} per token" if "token_s" in trial else str(trial["failure"])
