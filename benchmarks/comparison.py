"""From raw runs to the figures that are compared, and the rows of the table."""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from model_bytes import Bounds
from report import gigabytes, seconds, with_bound
from sides import Result

Row = tuple[str, str, str, str]
# Rows of an embedding that stays mapped, and code that is loaded late.
IDLE_READ_BYTES = 10**6


@dataclass(frozen=True)
class Summary:
    """Medians over the repeats; peaks are the largest seen. `read` counts disk bytes, not cache hits."""

    name: str
    threads: int
    repeats: int
    new_tokens: int
    load_s: float
    prefill_s: float
    token_s: float
    token_min_s: float
    token_max_s: float
    load_read_bytes: float
    prefill_read_bytes: float
    token_read_bytes: float
    cgroup_peak_bytes: int | None
    rss_anon_peak_bytes: int
    rss_peak_bytes: int
    offload_folder_bytes: int
    first_token: int
    decoding: dict[str, Any] | None
    report: dict[str, Any] | None

    @property
    def load_and_prefill_s(self) -> float:
        return self.load_s + self.prefill_s

    def time_to_tokens_s(self, new_tokens: int) -> float:
        """From the start of loading; beyond the tokens really made this goes on at the median pace."""
        return self.load_and_prefill_s + (new_tokens - 1) * self.token_s


def summarise(results: Sequence[Result]) -> Summary | None:
    runs = [result.figures for result in results if result.figures]
    if not runs:
        return None

    def median(phase: str, figure: str) -> float:
        return statistics.median(run[phase][figure] for run in runs)

    side = results[0].side
    token_s = [pause_s for run in runs for pause_s in run["token_s"]]
    peaks = [r.outcome.cgroup_peak_bytes for r in results if r.outcome.cgroup_peak_bytes is not None]
    return Summary(
        name=side.name,
        threads=side.threads,
        repeats=len(runs),
        new_tokens=side.new_tokens,
        load_s=median("load", "s"),
        prefill_s=median("prefill", "s"),
        token_s=statistics.median(token_s),
        token_min_s=min(token_s),
        token_max_s=max(token_s),
        load_read_bytes=median("load", "read_bytes"),
        prefill_read_bytes=median("prefill", "read_bytes"),
        token_read_bytes=median("decode", "read_bytes") / (side.new_tokens - 1),
        cgroup_peak_bytes=max(peaks, default=None),
        rss_anon_peak_bytes=max(r.outcome.rss_anon_peak_bytes for r in results),
        rss_peak_bytes=max(run["rss_peak_bytes"] for run in runs),
        offload_folder_bytes=max(run["offload_folder_bytes"] for run in runs),
        first_token=runs[0]["tokens"][0],
        decoding=runs[0]["decoding"],
        report=runs[0]["report"],
    )


@dataclass(frozen=True)
class Comparison:
    ours: Summary | None
    rival: Summary | None
    our_bounds: Bounds
    rival_bounds: Bounds
    disk_bytes_per_s: float
    new_tokens: int

    def row(
        self,
        title: str,
        value: Callable[[Summary], float | None],
        show: Callable[[float | None], str],
        bound: Callable[[Bounds], float] | None = None,
    ) -> Row:
        cells, values = [], []
        for summary, bounds in ((self.ours, self.our_bounds), (self.rival, self.rival_bounds)):
            found = value(summary) if summary else None
            values.append(found)
            shown = with_bound(found, bound(bounds)) if bound and found else show(found)
            cells.append(shown if summary else "-")
        ours, rival = values
        ratio = f"{rival / ours:.2f}" if ours and rival else "-"
        return title, cells[0], cells[1], ratio

    def disk_rate(self, summary: Summary) -> str:
        rate = (summary.load_read_bytes + summary.prefill_read_bytes) / summary.load_and_prefill_s
        return f"{rate / 1e9:.2f} GB/s ({rate / self.disk_bytes_per_s:.0%} of the ceiling)"

    def decode_rate(self, summary: Summary) -> str:
        """The weights a token reads, of ours as they lie in memory, and how fast."""
        if summary.decoding is None:
            return "-"
        token_bytes = summary.decoding["token_bytes"]
        return f"{gigabytes(token_bytes)} at {token_bytes / summary.token_s / 1e9:.1f} GB/s"

    def text_row(self, title: str, show: Callable[[Summary], str]) -> Row:
        cells = [show(summary) if summary else "-" for summary in (self.ours, self.rival)]
        return title, cells[0], cells[1], ""

    def rows(self) -> list[Row]:
        n = self.new_tokens
        return [
            self.text_row("setting", lambda s: f"{s.name}; {s.threads} threads, {s.repeats} runs"),
            self.row("load", lambda s: s.load_s, seconds),
            self.row("first token after load", lambda s: s.prefill_s, seconds),
            self.row("load + first token", lambda s: s.load_and_prefill_s, seconds, lambda b: b.load_and_prefill_s),
            self.text_row("weights read per token", self.decode_rate),
            self.row("per token, median", lambda s: s.token_s, seconds, lambda b: b.token_s),
            self.text_row("per token, spread", lambda s: f"{seconds(s.token_min_s)} to {seconds(s.token_max_s)}"),
            self.row(f"load to token {n}", lambda s: s.time_to_tokens_s(n), seconds),
            self.text_row("tokens really made", lambda s: str(s.new_tokens)),
            self.row("disk read, load", lambda s: s.load_read_bytes, gigabytes),
            self.row("disk read, prompt", lambda s: s.prefill_read_bytes, gigabytes),
            self.row("disk read, per further token", lambda s: s.token_read_bytes, gigabytes),
            self.text_row("disk rate, load + prompt", self.disk_rate),
            self.row("peak memory, cgroup (with page cache)", lambda s: s.cgroup_peak_bytes, gigabytes),
            self.row("peak anonymous memory (sampled)", lambda s: s.rss_anon_peak_bytes, gigabytes),
            self.row("peak resident set (VmHWM)", lambda s: s.rss_peak_bytes, gigabytes),
            self.text_row("second copy on disk", lambda s: gigabytes(s.offload_folder_bytes)),
        ]

    def first_token_equal(self) -> bool | None:
        """Both sides pass the prompt through the full weights, so the first token must agree."""
        if not self.ours or not self.rival:
            return None
        return self.ours.first_token == self.rival.first_token

    def checks(self, cap_bytes: int) -> dict[str, bool]:
        """What our side promises."""
        if not self.ours or not self.ours.report:
            return {}
        return {
            "no weights fetched while decoding": self.ours.report["decode_streamed_bytes"] == 0,
            "disk read while decoding below 1 MB a token": self.ours.token_read_bytes < IDLE_READ_BYTES,
            "anonymous memory inside the cap": self.ours.rss_anon_peak_bytes <= cap_bytes,
            "ledger inside the budget": self.ours.report["peak_device_bytes"] <= self.ours.report["budget_bytes"],
        }

    @property
    def token_ratio(self) -> float | None:
        return self.rival.token_s / self.ours.token_s if self.ours and self.rival else None

    def record(self) -> dict[str, Any]:
        return asdict(self) | {"first_token_equal": self.first_token_equal(), "token_ratio": self.token_ratio}
