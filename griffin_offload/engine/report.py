"""What a run did, in figures."""

from dataclasses import asdict, dataclass, field, replace
from typing import Any

from griffin_offload.method.allocation import tier_shares
from griffin_offload.units import format_bytes


@dataclass(frozen=True)
class PrefillReport:
    """One streamed pass."""

    prompt_tokens: int
    seconds: float
    streamed_bytes: int
    wait_s: float
    """Seconds the computation waited for bytes."""
    select_s: float
    """Seconds of selecting and gathering (on CUDA: of launching them)."""
    activation_kept: float
    """Share of s^2 / S that the chosen neurons hold, mean over layers."""
    activation_kept_heldout: float | None
    """The same, chosen on the first 3/4 of the prompt and measured on the last 1/4; None: prompt too short."""
    statistic_s: float = 0.0
    """Seconds of summing the statistic (on CUDA: of launching that)."""

    def run_figures(self) -> dict[str, Any]:
        """The part of a run's report that this pass is."""
        return {
            "prefill_s": self.seconds,
            "prefill_streamed_bytes": self.streamed_bytes,
            "activation_kept": self.activation_kept,
            "activation_kept_heldout": self.activation_kept_heldout,
            "wait_s": self.wait_s,
            "select_s": self.select_s,
            "statistic_s": self.statistic_s,
        }


@dataclass
class GraphReport:
    """Resident forwards: replays of captured graphs, or of recorded steps, and those that ran kernel by kernel."""

    replayed: int = 0
    captured: int = 0
    """Graphs made in this run; those of earlier ones are replayed, too."""
    capture_s: float = 0.0
    kept_bytes: int = 0
    """Of what recorded steps write to."""
    eager: dict[str, int] = field(default_factory=dict)
    """Forwards that ran kernel by kernel, by reason."""

    def run_figures(self, *, captured: bool) -> dict[str, Any]:
        """As a `RunReport` has them: of graphs that are captured, or of steps that are recorded."""
        return {"graphs" if captured else "replays": self}

    def count(self, reason: str) -> None:
        """A forward ran kernel by kernel."""
        self.eager[reason] = self.eager.get(reason, 0) + 1

    def line(self) -> str:
        reasons = ", ".join(f"{count} kernel by kernel ({reason})" for reason, count in self.eager.items())
        made = f", {self.captured} captured in {self.capture_s:.2f} s" if self.captured else ""
        return f"graphs   {self.replayed} forwards replayed{made}" + (f"   {reasons}" if reasons else "")


@dataclass
class DraftReport:
    """Rounds of drafting and passing over the drafts."""

    verified: bool
    """Exact mode; else every draft is a token of the answer."""
    passes: int = 0
    drafted: int = 0
    accepted: int = 0
    """Drafts that became tokens of the answer."""
    tokens: int = 0
    """Tokens that the rounds gave, the full model's own included."""
    draft_s: float = 0.0
    pass_s: float = 0.0
    judged_by_position: list[int] = field(default_factory=list)
    """Drafts at each position of which all before were accepted."""
    accepted_by_position: list[int] = field(default_factory=list)

    def add_round(self, drafted: int, accepted: int, tokens: int, draft_s: float, pass_s: float) -> None:
        self.passes += 1
        self.drafted += drafted
        self.accepted += accepted
        self.tokens += tokens
        self.draft_s += draft_s
        self.pass_s += pass_s
        missing = max(min(tokens, drafted) - len(self.judged_by_position), 0)
        self.judged_by_position += [0] * missing
        self.accepted_by_position += [0] * missing
        for position in range(min(tokens, drafted)):
            self.judged_by_position[position] += 1
            self.accepted_by_position[position] += position < accepted

    @property
    def mean_accepted(self) -> float:
        """Accepted drafts per pass."""
        return self.accepted / self.passes if self.passes else 0.0

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {"mean_accepted": self.mean_accepted}


@dataclass
class LookupReport:
    """Drafts from the text itself."""

    forwards: int = 0
    """Over such drafts; in exact mode streamed passes."""
    drafted: int = 0
    accepted: int = 0

    def add(self, drafted: int, accepted: int) -> None:
        self.forwards += 1
        self.drafted += drafted
        self.accepted += accepted

    def line(self) -> str:
        """For people."""
        each = f"{self.accepted / self.forwards:.1f} of {self.drafted / self.forwards:.1f} drafts accepted"
        return f"lookup   {self.forwards} times the text itself was the draft, {each}"


@dataclass
class StructureReport:
    """What it took to hold an answer to its structure."""

    kind: str
    complete: bool = False
    """Whether the answer is a whole one; not if it ended by its length or a stop string before."""
    over: bool = False
    """Whether nothing could have followed it."""
    compile_s: float = 0.0
    masks: int = 0
    """Computed, one for every token; and for drafts."""
    mask_s: float = 0.0
    wait_s: float = 0.0
    """What of that the model waited for: it computes the next scores meanwhile."""

    def line(self) -> str:
        """For people."""
        each_ms = 1000 * self.mask_s / max(self.masks, 1)
        whole = "complete" if self.complete else "NOT complete: the answer ended too early"
        return f"{self.kind}  {whole}   {each_ms:.2f} ms per mask, {1000 * self.wait_s:.0f} ms of all waited for"


@dataclass(frozen=True)
class ExpertReport:
    """What became of the experts that tokens were sent to while they were decoded."""

    resident: int
    """On the device, in all layers, when the answer was over."""
    hits: int
    """Experts of a layer and a forward that were on the device."""
    misses: int
    """Those that were read, whoever computed them."""
    routing_kept: float
    """Share of the prompt's routing weights that went to the experts that it chose, mean over layers."""
    choices: int = 0
    redirected: int = 0
    """Of the routers' `choices`, those that a resident expert stood in for."""
    guessed: int = 0
    """Of the misses, those that were being read before the router had chosen them."""
    wrong_bytes: int = 0
    """Read by guesses that nobody needed."""
    by_host: int = 0
    """Of the misses, those that the CPU computed for the device."""
    host_bytes: int = 0
    """Read for it, as files hold them; none of them went to the device, and none is among streamed ones."""

    def since(self, before: "ExpertReport | None") -> "ExpertReport":
        """With what was counted after `before`."""
        if before is None:
            return self
        counts = ("hits", "misses", "choices", "redirected", "guessed", "wrong_bytes", "by_host", "host_bytes")
        return replace(self, **{name: getattr(self, name) - getattr(before, name) for name in counts})

    @property
    def hit_rate(self) -> float:
        asked = self.hits + self.misses
        return self.hits / asked if asked else 1.0

    @property
    def redirected_share(self) -> float:
        return self.redirected / self.choices if self.choices else 0.0

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {"hit_rate": self.hit_rate, "redirected_share": self.redirected_share}

    def line(self) -> str:
        """For people."""
        found = f"{self.hit_rate:.1%} of {self.hits + self.misses} on the device"
        if self.choices:
            found = f"{self.redirected_share:.1%} of {self.choices} choices redirected"
        if self.by_host:
            found += f", {self.by_host} computed by the CPU ({format_bytes(self.host_bytes)})"
        return f"experts  {self.resident} resident   {found}   routing kept {self.routing_kept:.2f}"


@dataclass(frozen=True)
class RunReport:
    """One `generate`: field names are those of `griffin-offload run --json`."""

    prompt_tokens: int
    """Tokens that passed; with a context, those that it did not know."""
    cached_prompt_tokens: int
    """Tokens of the prompt that its context knew."""
    generated_tokens: int
    load_s: float
    prefill_s: float
    decode_s: float
    prefill_streamed_bytes: int
    decode_streamed_bytes: int
    decode_embedding_bytes: int
    resident_bytes: int
    peak_device_bytes: int
    budget_bytes: int
    peak_host_bytes: int
    host_growth_bytes: int
    density: float
    precision: str
    """Of the resident matrices: a format, tiers, or the precision of the computation."""
    tiers: dict[str, int]
    """FF neurons of all layers by format; empty where there is one."""
    parts: dict[str, int]
    """Resident bytes by part."""
    parts_16bit: dict[str, int]
    """The same without quantisation."""
    activation_kept: float
    activation_kept_heldout: float | None
    wait_s: float
    select_s: float
    statistic_s: float
    drafting: DraftReport | None = None
    """In exact mode, and with refresh: the passes between tokens of the answer."""
    experts: ExpertReport | None = None
    """None where FFs are dense, or all experts are resident."""
    graphs: GraphReport | None = None
    """None where there are none to capture: the device is not CUDA."""
    replays: GraphReport | None = None
    """On the CPU: forwards by recorded steps, and those with all of Python."""
    structure: StructureReport | None = None
    """None where none was asked for."""
    lookup: LookupReport | None = None
    """None where the text was not searched for drafts."""

    @property
    def decode_streamed_bytes_per_token(self) -> float:
        """Weight bytes streamed after prefill, per generated token."""
        return self.decode_streamed_bytes / self.generated_tokens if self.generated_tokens else 0.0

    @property
    def prefill_tokens_per_s(self) -> float:
        return self.prompt_tokens / self.prefill_s if self.prefill_s else 0.0

    @property
    def decode_tokens_per_s(self) -> float:
        """Tokens after the first (which prefill gives) per second of decode."""
        return max(self.generated_tokens - 1, 0) / self.decode_s if self.decode_s else 0.0

    def broken_promises(self, host_overhead_bytes: int | None) -> list[str]:
        """Where a measured peak went past what was allowed. The process's growth is judged when an overhead beside
        the budget is given: for models that are large against the interpreter, on the CPU."""
        peaks = {"the ledger": (self.peak_device_bytes, self.budget_bytes)}
        if host_overhead_bytes is not None:
            peaks["the process's growth"] = (self.host_growth_bytes, self.budget_bytes + host_overhead_bytes)
        return [
            f"{name} reached {peak} bytes, {allowed} were allowed"
            for name, (peak, allowed) in peaks.items()
            if peak > allowed
        ]

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {
            "prefill_tokens_per_s": self.prefill_tokens_per_s,
            "decode_tokens_per_s": self.decode_tokens_per_s,
            "decode_streamed_bytes_per_token": self.decode_streamed_bytes_per_token,
            "drafting": self.drafting.to_json() if self.drafting else None,
            "experts": self.experts.to_json() if self.experts else None,
        }

    def _unquantised(self) -> str:
        unquantised = sum(self.parts_16bit.values())
        return f" ({format_bytes(unquantised)} unquantised)" if unquantised != sum(self.parts.values()) else ""

    def _in_words(self) -> str:
        return tier_shares(self.precision, self.tiers, self.density) if self.tiers else self.precision

    def _draft_lines(self) -> list[str]:
        drafting = self.drafting
        if drafting is None or not drafting.passes:
            return []
        each = drafting.tokens / drafting.passes
        name, kept = "refresh", ""
        if drafting.verified:
            name, kept = (
                "verify ",
                f", {drafting.mean_accepted:.1f} of {drafting.drafted / drafting.passes:.1f} drafts accepted",
            )
        streamed = format_bytes(self.decode_streamed_bytes_per_token)
        return [f"{name}  {drafting.passes} passes, {each:.1f} tok each{kept}   streamed {streamed} per token"]

    def lines(self, device: str) -> list[str]:
        """The closing block for people."""
        held_out = self.activation_kept_heldout
        kept = f"{self.activation_kept:.2f}" if held_out is None else f"{held_out:.2f} held out"
        streamed = format_bytes(self.prefill_streamed_bytes)
        cached = f" (and {self.cached_prompt_tokens} kept)" if self.cached_prompt_tokens else ""
        if self.prefill_streamed_bytes and self.prefill_s:
            streamed += f" at {format_bytes(self.prefill_streamed_bytes / self.prefill_s)}/s"
        return [
            f"prefill  {self.prompt_tokens} tok{cached}  {self.prefill_s:.2f} s ({self.prefill_tokens_per_s:.0f} tok/s)"
            f"   streamed {streamed}",
            f"decode   {self.generated_tokens} tok  {self.decode_s:.2f} s ({self.decode_tokens_per_s:.1f} tok/s)   "
            f"streamed {format_bytes(self.decode_streamed_bytes)}   density {self.density:.2f}, "
            f"activation kept {kept}",
            *self._draft_lines(),
            *([] if self.experts is None else [self.experts.line()]),
            *([] if self.graphs is None else [self.graphs.line()]),
            *([self.lookup.line()] if self.lookup is not None and self.lookup.forwards else []),
            *([] if self.structure is None else [self.structure.line()]),
            f"resident {format_bytes(self.resident_bytes)} {self._in_words()}{self._unquantised()}   peak {device} "
            f"{format_bytes(self.peak_device_bytes)} of {format_bytes(self.budget_bytes)}   "
            f"RAM {format_bytes(self.peak_host_bytes)} (process)",
        ]
