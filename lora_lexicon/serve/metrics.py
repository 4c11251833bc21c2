"""What a server counts, for Prometheus. Each server has a registry of its own."""

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from lora_lexicon.inference.engine import Definition

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)


class Metrics:
    """Counters that grow as the server works, and gauges that are set when they are asked for."""

    content_type = CONTENT_TYPE_LATEST

    def __init__(self) -> None:
        self._registry = own = CollectorRegistry()
        labels = ("method", "route")
        self._requests = Counter("lora_lexicon_requests", "Requests answered.", (*labels, "status"), registry=own)
        self._latency = Histogram(
            "lora_lexicon_request_seconds", "From a request to the end of its answer.", labels, buckets=SECONDS,
            registry=own,
        )  # fmt: skip
        self._tokens = Counter("lora_lexicon_tokens", "Tokens generated.", registry=own)
        self._definitions = Counter("lora_lexicon_definitions", "Definitions written.", ("domain",), registry=own)
        self._gauges = {
            name: Gauge(f"lora_lexicon_{name}", text, registry=own)
            for name, text in {
                "queued": "Definitions that wait.",
                "running": "Definitions being written.",
                "domains": "Domains that answer.",
                "memory_bytes": "Parameters and buffers of the model.",
                "expert_memory_bytes": "Adapters in memory, where they come on demand.",
            }.items()
        }
        self._totals = {
            name: Counter(f"lora_lexicon_{name}", text, registry=own)
            for name, text in {
                "expert_loads": "Adapters loaded on demand.",
                "expert_evictions": "Adapters that made room for others.",
            }.items()
        }
        self._before = dict.fromkeys(self._totals, 0)

    def request(self, method: str, route: str, status: int, seconds: float) -> None:
        """One request was answered; `route` is the pattern, not the path."""
        method = method if method in ("GET", "HEAD", "POST", "DELETE", "PUT", "PATCH", "OPTIONS") else "other"
        self._requests.labels(method, route, str(status)).inc()
        self._latency.labels(method, route).observe(seconds)

    def definition(self, answer: Definition) -> None:
        """One definition was written."""
        self._tokens.inc(answer.tokens)
        self._definitions.labels(answer.domain).inc()

    def text(self, **values: int) -> bytes:
        """All of them, in Prometheus's text format; `values` are those of the gauges, and totals so far."""
        for name, value in values.items():
            if name in self._gauges:
                self._gauges[name].set(value)
            else:
                self._totals[name].inc(value - self._before[name])
                self._before[name] = value
        return generate_latest(self._registry)
