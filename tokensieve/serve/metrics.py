"""The figures at `/metrics`, in Prometheus' format. Each application has a registry of its own."""

from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from tokensieve.engine import Service

FIRST_TOKEN_BUCKETS = (0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100)  # seconds
NEXT_TOKEN_BUCKETS = (0.003, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 3)


class LoadCollector(Collector):
    """The engine's load, read when the figures are asked for."""

    def __init__(self, service: Service):
        self._service = service

    def collect(self) -> Iterator[Metric]:
        load = self._service.load
        yield GaugeMetricFamily("tokensieve_running", "Answers that are being made.", load.running)
        yield GaugeMetricFamily("tokensieve_waiting", "Answers that wait for their turn, or for pages.", load.waiting)
        yield GaugeMetricFamily("tokensieve_pages", "Pages of the cache, 64 tokens each.", load.pages)
        yield GaugeMetricFamily("tokensieve_pages_used", "Pages in use.", load.pages_used)
        yield CounterMetricFamily("tokensieve_preemptions", "Answers that gave their pages back.", load.preempted)


class Metrics:
    def __init__(self, service: Service):
        self.registry = CollectorRegistry()
        self.registry.register(LoadCollector(service))

        def count(name: str, text: str, *labels: str) -> Counter:
            return Counter(f"tokensieve_{name}", text, labels, registry=self.registry)

        def seconds(name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
            name = f"tokensieve_{name}_seconds"
            return Histogram(name, text, ("model",), buckets=buckets, registry=self.registry)

        self.requests = count("requests", "Requests answered.", "route", "status", "finish")
        self.prompt_tokens = count("prompt_tokens", "Tokens of prompts.", "model")
        self.cached_tokens = count("cached_tokens", "Tokens of prompts found in the cache.", "model")
        self.completion_tokens = count("completion_tokens", "Tokens of answers.", "model")
        first = "From a tokenized prompt to its answer's first token."
        self.first_token = seconds("first_token", first, FIRST_TOKEN_BUCKETS)
        self.next_token = seconds("next_token", "Between two tokens of an answer.", NEXT_TOKEN_BUCKETS)

    def page(self) -> bytes:
        return generate_latest(self.registry)
