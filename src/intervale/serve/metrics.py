"""What the server counts, in Prometheus' text format. Each app has counters of its own."""

from __future__ import annotations

from collections.abc import Iterable

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily, Metric

from intervale.engine.api import Desk

_SECONDS = (0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)


class _Busy:
    """The desk's load, read when somebody asks."""

    def __init__(self, desk: Desk) -> None:
        self.desk = desk

    def collect(self) -> Iterable[Metric]:
        load = self.desk.load()
        yield GaugeMetricFamily("intervale_active", "Requests being answered.", load.active)
        yield GaugeMetricFamily("intervale_queue", "Requests waiting.", load.waiting)
        yield GaugeMetricFamily("intervale_queue_limit", "Requests that may wait.", load.room)


class Metrics:
    """The counters of one app."""

    def __init__(self, desk: Desk) -> None:
        self.registry = CollectorRegistry()
        self.registry.register(_Busy(desk))

        def count(name: str, about: str, labels: tuple[str, ...] = ()) -> Counter:
            return Counter(name, about, labels, registry=self.registry)

        self.requests = count(
            "intervale_requests",
            "Chat requests by model and outcome.",
            (
                "model",
                "outcome",
            ),
        )
        self.refused = count("intervale_refused", "Requests refused, by code.", ("code",))
        self.cancelled = count("intervale_cancelled", "Answers that the client left.")
        self.prompt_tokens = count("intervale_prompt_tokens", "Tokens of prompts.", ("model",))
        self.reused_tokens = count("intervale_reused_tokens", "Tokens of prompts that came from an earlier turn.", ("model",))
        self.tokens = count("intervale_tokens", "Tokens of answers.", ("model",))
        self.ttft = Histogram(
            "intervale_ttft_seconds", "From the request to the first token.", ["model"], buckets=_SECONDS, registry=self.registry
        )
        self.seconds = Histogram("intervale_request_seconds", "Of a whole answer.", ["model"], buckets=_SECONDS, registry=self.registry)

    def text(self) -> bytes:
        """All of it, as Prometheus reads it."""
        return generate_latest(self.registry)
