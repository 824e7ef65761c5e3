"""Counters of the server, for Prometheus."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

_SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)
_TOKENS_PER_FORWARD = (1, 1.25, 1.5, 2, 2.5, 3, 4, 6, 8, 12, 16, 32)


class Metrics:
    """All metrics, in a registry of their own.

    Attributes:
        registry: What `/metrics` shows.
    """

    def __init__(self) -> None:
        self.registry = CollectorRegistry()

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(f"megatron_dlm_{name}", text, labels, registry=self.registry)

        def gauge(name: str, text: str) -> Gauge:
            return Gauge(f"megatron_dlm_{name}", text, registry=self.registry)

        def histogram(name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
            name = f"megatron_dlm_{name}"
            return Histogram(name, text, buckets=buckets, registry=self.registry)

        self.requests = counter("requests", "Requests by endpoint and status", "path", "status")
        self.waiting = gauge("waiting_responses", "Responses that wait for a slot")
        self.running = gauge("running_responses", "Responses in decoding")
        self.prompt_tokens = counter("prompt_tokens", "Tokens of prompts that were admitted")
        self.completion_tokens = counter("completion_tokens", "Tokens of finished responses")
        self.forwards = counter("forwards", "Forwards of the model, each of all running responses")
        self.forward_tokens = counter("forward_tokens", "Tokens that forwards held")
        self.forward_seconds = counter("forward_seconds", "Seconds that forwards took")
        self.response_forwards = counter(
            "response_forwards", "Forwards of finished responses, counted for each of them"
        )
        self.tokens_per_forward = histogram(
            "tokens_per_forward",
            "Tokens of a finished response for each of its forwards",
            _TOKENS_PER_FORWARD,
        )
        self.queue_seconds = histogram(
            "queue_seconds", "Seconds until a response is decoded", _SECONDS
        )
        self.first_text_seconds = histogram(
            "first_text_seconds", "Seconds until a response has its first text", _SECONDS
        )
        self.request_seconds = histogram(
            "request_seconds", "Seconds until a request is answered", _SECONDS
        )
