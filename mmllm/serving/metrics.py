"""What Prometheus asks for, at `/metrics`."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from prometheus_client import CollectorRegistry, Counter, Histogram, ProcessCollector, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector
from starlette.types import Scope

from mmllm.serving.served import ServedModel

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
ROUTES = (
    "/v1/chat/completions", "/v1/completions", "/v1/audio/transcriptions", "/v1/audio/speech", "/v1/embeddings",
    "/v1/models", "/health", "/metrics",
)  # fmt: skip
"""Whatever else is asked for is counted as one, so that clients can't make names."""
_FIRST_BUCKETS = (0.01, 0.025, 0.05, 0.1, 0.15, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
_SECONDS_BUCKETS = (0.01, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)


class Metrics:
    """Counts of one server.

    Args:
        models: whose engines are looked at when they are asked for.
    """

    def __init__(self, models: Sequence[ServedModel]) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        self.registry.register(_Engines(models))
        self._answers = Counter(
            "mmllm_requests", "Answers by route and status; 0: the client had gone.", ["route", "status"],
            registry=self.registry,
        )  # fmt: skip
        self._seconds = Histogram(
            "mmllm_request_seconds", "From a request to the end of its answer.", ["route"],
            buckets=_SECONDS_BUCKETS, registry=self.registry,
        )  # fmt: skip
        self._first = Histogram(
            "mmllm_time_to_first_token_seconds", "From a request to its first token or sound.", ["model"],
            buckets=_FIRST_BUCKETS, registry=self.registry,
        )  # fmt: skip
        self._sound = Counter("mmllm_spoken_seconds", "Sound that was made.", ["model"], registry=self.registry)
        self._gone = Counter(
            "mmllm_clients_gone", "Answers that were ended since nobody listened.", registry=self.registry
        )

    def note_answer(self, scope: Scope, status: int, seconds: float) -> None:
        """Counts an answer."""
        path = scope["path"]
        route = path if path in ROUTES else "/v1/models" if path.startswith("/v1/models/") else "other"
        self._answers.labels(route, str(status)).inc()
        self._seconds.labels(route).observe(seconds)

    def note_first(self, model: str, seconds: float) -> None:
        """Notes how long a first token, or sound, took."""
        self._first.labels(model).observe(seconds)

    def note_sound(self, model: str, seconds: float) -> None:
        """Counts sound that was made."""
        self._sound.labels(model).inc(seconds)

    def note_gone(self) -> None:
        """Counts a client that went before its answer had ended."""
        self._gone.inc()

    def text(self) -> bytes:
        """All of it."""
        return generate_latest(self.registry)


class _Engines(Collector):
    """What engines count, read when it is asked for."""

    def __init__(self, models: Sequence[ServedModel]) -> None:
        self._models = models

    def collect(self) -> Iterable[Metric]:
        gauges = {
            "waiting": GaugeMetricFamily("mmllm_rows_waiting", "Rows that have not begun.", labels=["model"]),
            "running": GaugeMetricFamily("mmllm_rows_running", "Rows that are answered.", labels=["model"]),
            "admitted": GaugeMetricFamily(
                "mmllm_rows_admitted", "Rows of all requests that were let in.", labels=["model"]
            ),
        }
        counts = {
            name: CounterMetricFamily(f"mmllm_{name}", about, labels=["model"])
            for name, about in (
                ("rows", "Rows that were begun."),
                ("rows_failed", "Rows that ended with an error."),
                ("rows_cancelled", "Rows that were ended before their end."),
                ("prompt_tokens", "Tokens of prompts."),
                ("cached_tokens", "Of these, tokens that the prefix cache had."),
                ("generated_tokens", "Tokens of text and frames of speech."),
                ("steps", "Steps of the engine."),
                ("preemptions", "Rows that had to wait for memory."),
            )
        }
        for served in self._models:
            engine, name = served.engine, [served.name]
            gauges["waiting"].add_metric(name, engine.num_waiting)
            gauges["running"].add_metric(name, engine.num_running)
            gauges["admitted"].add_metric(name, served.admission.num_rows)
            done = engine.counts
            for metric, value in zip(
                counts.values(),
                (
                    done.requests, done.errors, done.cancelled, done.prompt_tokens, done.cached_tokens,
                    done.new_tokens, done.steps, done.preemptions,
                ),
                strict=True,
            ):  # fmt: skip
                metric.add_metric(name, value)
        return [*gauges.values(), *counts.values()]
