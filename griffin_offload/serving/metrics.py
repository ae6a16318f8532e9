"""Figures of a running server: for Prometheus, in a registry of its own, and of the model in its hands."""

from typing import Any, Protocol

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from griffin_offload.devices.memory import Ledger, anonymous_bytes
from griffin_offload.serving.queue import Job

_SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
_RATES = (0.5, 1, 2, 5, 10, 20, 50, 100, 200, 500)
_SHARES = (0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.95, 0.98, 1.0)


class _Contexts(Protocol):
    @property
    def limit_bytes(self) -> int: ...
    @property
    def nbytes(self) -> int: ...
    def __len__(self) -> int: ...


class HeldModel(Protocol):
    """Of the model in the worker's hands, what there are figures of."""

    def figures(self) -> dict[str, Any]: ...
    @property
    def budget_bytes(self) -> int: ...
    @property
    def host_budget_bytes(self) -> int: ...
    @property
    def ledger(self) -> Ledger: ...
    @property
    def sessions(self) -> _Contexts | None: ...


class Metrics:
    """Updated by the worker and by the routes; the client library makes that safe."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        options: Any = {"namespace": "griffin_offload", "registry": self.registry}
        self.requests = Counter("requests", "Requests by endpoint and outcome", ("endpoint", "outcome"), **options)
        self.queue_depth = Gauge("queue_depth", "Requests that wait for the model", **options)
        self.running = Gauge("running_requests", "Requests that are being answered", **options)
        self.first_token = Histogram(
            "time_to_first_token_seconds", "From a request's arrival, waiting included", buckets=_SECONDS, **options
        )
        self.rate = Histogram("decode_tokens_per_second", "Of an answer", buckets=_RATES, **options)
        self.prompt_tokens = Counter("prompt_tokens", "Tokens of prompts", ("source",), **options)
        self.generated_tokens = Counter("generated_tokens", "Tokens of answers", **options)
        self.streamed = Counter("streamed_bytes", "Weight bytes streamed", ("phase",), **options)
        self.device_peak = Gauge("device_peak_bytes", "Highest since the start, against the budget", **options)
        self._peak_bytes = 0
        self.device_budget = Gauge("device_budget_bytes", "What may be used", **options)
        self.host = Gauge("host_bytes", "Anonymous memory of the process", **options)
        self.host.set_function(anonymous_bytes)
        self.host_growth = Gauge(
            "host_growth_bytes", "Anonymous memory at its peak above what it was before the last load", **options
        )
        self.host_budget = Gauge(
            "host_budget_bytes", "What the ledger (on CPUs) or offloaded weights may use of it; 0: no limit", **options
        )
        self.kept = Histogram(
            "activation_kept", "Share of a prompt's activation in the neurons kept", buckets=_SHARES, **options
        )
        self.sessions = Gauge("sessions", "Conversations kept", **options)
        self.session_bytes = Gauge("session_bytes", "Memory of conversations kept", **options)
        self.session_limit = Gauge("session_limit_bytes", "What they may take beside the one in use", **options)
        self.model_loaded = Gauge("model_loaded", "1 while the model is in memory", **options)
        self.loads = Gauge("model_loads", "How often the model was loaded", **options)
        self.model: dict[str, Any] = {}
        """What the model's plan is, and what of it is on the device, when it was last in use; replaced, not changed."""

    def text(self) -> bytes:
        """In Prometheus's text format."""
        return generate_latest(self.registry)

    def loaded(self, held: HeldModel, loads: int) -> None:
        self.model = held.figures()
        self.device_budget.set(held.budget_bytes)
        self.host_budget.set(held.host_budget_bytes)
        self.model_loaded.set(1)
        self.loads.set(loads)
        if held.sessions is not None:
            self.session_limit.set(held.sessions.limit_bytes)

    def unloaded(self) -> None:
        for gauge in (self.model_loaded, self.sessions, self.session_bytes):
            gauge.set(0)

    def finished(self, job: Job, held: HeldModel | None, loads: int) -> None:
        """A job left the worker, whatever became of it."""
        if held is None:
            self.unloaded()
            return
        self.loaded(held, loads)
        figures = job.figures
        if job.first_token_s is not None:
            self.first_token.observe(job.first_token_s)
        self.prompt_tokens.labels("computed").inc(figures.prompt_tokens - figures.cached_tokens)
        self.prompt_tokens.labels("kept").inc(figures.cached_tokens)
        self.generated_tokens.inc(job.tokens)  # also of answers that nobody waited for
        peaks = [report.peak_device_bytes for report in figures.reports]
        ledger = held.ledger  # knows of answers, too, that were given up
        self._peak_bytes = max(self._peak_bytes, ledger.peak_bytes, *peaks)
        self.device_peak.set(self._peak_bytes)
        self.host_growth.set(ledger.host_growth_bytes)
        for report in figures.reports:
            self.streamed.labels("prefill").inc(report.prefill_streamed_bytes)
            self.streamed.labels("decode").inc(report.decode_streamed_bytes)
            if report.generated_tokens > 1:
                self.rate.observe(report.decode_tokens_per_s)
        if figures.reports:
            self.kept.observe(figures.reports[0].activation_kept)
        if held.sessions is not None:
            self.sessions.set(len(held.sessions))
            self.session_bytes.set(held.sessions.nbytes)
