"""Every Prometheus series of the server. Times are histograms in seconds, events are `_total` counters.

Thread-safe: the engine's device thread and the event loop both write here. What is counted for every request and every
network call is in `tallies.py`.
"""

from collections.abc import Callable
from typing import Any, TypeVar

from latentd.v1 import bundle_pb2, model_pb2
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.gc_collector import GCCollector
from prometheus_client.platform_collector import PlatformCollector
from prometheus_client.process_collector import ProcessCollector

from latentd_server.tallies import BatchTallies, RequestTallies

Series = TypeVar("Series", Counter, Gauge, Histogram)

_GRAPHS = {role: name.removeprefix("ROLE_").lower() for name, role in bundle_pb2.Network.Role.items()}


class Metrics:
    """The series of one server. Model labels are canonical names, or empty where no model was found."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        self._known: dict[tuple[object, ...], Any] = {}
        ProcessCollector(registry=registry)
        PlatformCollector(registry=registry)
        GCCollector(registry=registry)

        self._tallies = RequestTallies()
        self._batches = BatchTallies()
        registry.register(self._tallies)
        registry.register(self._batches)
        self._refusals = Counter(
            "latentd_refusals", "Requests refused before any work was done for them.", ["reason"], registry=registry
        )

        self._wasted = Counter(
            "latentd_wasted_evaluations",
            "Evaluations spent on samples that were cancelled, expired or failed.",
            registry=registry,
        )
        self._waited = Histogram(
            "latentd_device_wait_duration_seconds",
            "Waits in which no batch was begun, since the event loop was behind with results of others.",
            registry=registry,
        )
        self._self_checks = Counter(
            "latentd_self_checks",
            "Answered samples that were made again alone: match, mismatch, or failed.",
            ["model", "result"],
            registry=registry,
        )
        self._self_check_evaluations = Counter(
            "latentd_self_check_evaluations",
            "Network evaluations of self-checks; they are in no other series.",
            ["model", "graph"],
            registry=registry,
        )
        self._backlog = Gauge("latentd_backlog_evaluations", "Evaluations accepted and not yet run.", registry=registry)
        self._queue_depth = Gauge("latentd_queue_depth", "Jobs accepted and unfinished.", registry=registry)
        self._lanes_held = Gauge(
            "latentd_lanes_held", "Samples under way whose state the device keeps.", registry=registry
        )
        self._model_state = Gauge(
            "latentd_model_state", "1 for the state a model is in, else 0.", ["model", "state"], registry=registry
        )
        self._build = Gauge(
            "latentd_build_info", "Always 1; what is running.", ["version", "device"], registry=registry
        )

    def exposition(self) -> bytes:
        """Everything, in the Prometheus text format."""
        return generate_latest(self.registry)

    def running(self, version: str, device: str) -> None:
        """Say what runs, and on what device."""
        self._build.labels(version, device).set(1)

    def watch(
        self, backlog: Callable[[], float], queue_depth: Callable[[], float], lanes_held: Callable[[], float]
    ) -> None:
        """Read these gauges from the engine whenever somebody scrapes."""
        self._backlog.set_function(backlog)
        self._queue_depth.set_function(queue_depth)
        self._lanes_held.set_function(lanes_held)

    def request_began(self, method: str) -> None:
        """Count a request in. This and the next three are the event loop's own."""
        self._tallies.began(method)

    def request_ended(self, method: str, model: str, code: str, seconds: float) -> None:
        """Count a request out, with the name of its gRPC code."""
        self._tallies.ended(method, model, code, seconds)

    def request_cost(self, method: str, model: str, queue_s: float, compute_s: float) -> None:
        """Record what an answered request cost."""
        self._tallies.cost(method, model, queue_s, compute_s)

    def samples_answered(self, model: str, count: int) -> None:
        """Count samples, or rows of a tensor, that were answered."""
        self._tallies.answered(model, count)

    def refused(self, reason: str) -> None:
        """Count a refusal, by `ErrorInfo.reason`."""
        self._refusals.labels(reason).inc()

    def batch_ran(
        self, model: str, role: bundle_pb2.Network.Role.ValueType, live_rows: int, padded_rows: int, seconds: float
    ) -> None:
        """Record one network call of `live_rows` rows, padded up to `padded_rows` rows. For one thread at a time."""
        self._batches.ran(model, _GRAPHS[role], live_rows, padded_rows, seconds)

    def evaluations_wasted(self, count: int) -> None:
        """Count evaluations whose result nobody will get."""
        self._wasted.inc(count)

    def waited_for_loop(self, seconds: float) -> None:
        """Record that the device waited for the event loop."""
        self._waited.observe(seconds)

    def self_checked(self, model: str, result: str) -> None:
        """Count a self-check: `match`, `mismatch` or `failed`."""
        self._series(self._self_checks, model, result).inc()

    def self_check_evaluated(self, model: str, role: bundle_pb2.Network.Role.ValueType, rows: int) -> None:
        """Count evaluations that a self-check took."""
        self._series(self._self_check_evaluations, model, _GRAPHS[role]).inc(rows)

    def model_state(self, model: str, state: model_pb2.Model.State.ValueType) -> None:
        """Record the state a model is in now."""
        for value in model_pb2.Model.State.values():
            if value != model_pb2.Model.STATE_UNSPECIFIED:
                name = model_pb2.Model.State.Name(value).removeprefix("STATE_")
                self._model_state.labels(model, name).set(value == state)

    def _series(self, metric: Series, *labels: str) -> Series:
        """One series of a metric. Kept here, because the library's own look-up takes longer than the counting."""
        key = (id(metric), *labels)
        found = self._known.get(key)
        if found is None:
            found = self._known[key] = metric.labels(*labels)
        return found
