"""What is counted for every single request and call, in plain numbers that become Prometheus families on a scrape.

The Prometheus library takes a lock and several calls for each count, and a request has nine. With small networks that
is a seventh of what the event loop spends on a request. These numbers have one writer at a time, the event loop's
thread or the device's, and need no lock; a scrape from another thread may find a request half counted, as it may find
one half done.
"""

from bisect import bisect_left
from collections.abc import Iterable, Iterator, Sequence
from itertools import accumulate

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString

REQUEST_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
BATCH_SECONDS = (0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5)
BATCH_ROWS = (1, 2, 4, 8, 12, 16, 20, 24, 28, 32, 48, 64, 128, 256, 512, 1024)


class Spread:
    """How values are spread over buckets, and their sum."""

    __slots__ = ("_bounds", "counts", "total")

    def __init__(self, bounds: Sequence[float]) -> None:
        self._bounds = bounds
        self.counts = [0] * (len(bounds) + 1)  # each bucket on its own; the last is what is above all bounds
        self.total = 0.0

    def observe(self, value: float) -> None:
        """Count a value."""
        self.counts[bisect_left(self._bounds, value)] += 1
        self.total += value

    def cumulative(self) -> list[tuple[str, float]]:
        """Upper bounds as Prometheus writes them, and the values up to each."""
        bounds = [*map(floatToGoString, self._bounds), "+Inf"]
        return list(zip(bounds, map(float, accumulate(self.counts)), strict=True))


class _Spreads:
    """A histogram by two labels."""

    def __init__(self, name: str, help_text: str, labels: tuple[str, str], bounds: Sequence[float]) -> None:
        self._name = name
        self._help = help_text
        self._labels = labels
        self._bounds = bounds
        self.by_labels: dict[tuple[str, str], Spread] = {}

    def observe(self, labels: tuple[str, str], value: float) -> None:
        spread = self.by_labels.get(labels)
        if spread is None:
            spread = self.by_labels[labels] = Spread(self._bounds)
        spread.observe(value)

    def family(self) -> HistogramMetricFamily:
        family = HistogramMetricFamily(self._name, self._help, labels=self._labels)
        for labels, spread in list(self.by_labels.items()):
            family.add_metric(labels, buckets=spread.cumulative(), sum_value=spread.total)
        return family


def _request_spreads(name: str, help_text: str) -> _Spreads:
    return _Spreads(name, help_text, ("method", "model"), REQUEST_SECONDS)


class RequestTallies(Collector):
    """Requests begun and ended, how long they took and what they cost. Model labels are empty where none was found."""

    def __init__(self) -> None:
        self._began: dict[tuple[str], int] = {}
        self._ended: dict[tuple[str, str, str], int] = {}
        self._samples: dict[tuple[str], int] = {}
        self._duration = _request_spreads(
            "latentd_request_duration_seconds", "From a request's arrival to its last message."
        )
        self._queue = _request_spreads("latentd_queue_duration_seconds", "From admission to the first batch.")
        self._compute = _request_spreads(
            "latentd_compute_duration_seconds", "Durations of the batches a request rode in, summed."
        )

    def began(self, method: str) -> None:
        """Count a request in."""
        self._began[method,] = self._began.get((method,), 0) + 1

    def ended(self, method: str, model: str, code: str, seconds: float) -> None:
        """Count a request out, with the name of its gRPC code."""
        key = method, model, code
        self._ended[key] = self._ended.get(key, 0) + 1
        self._duration.observe((method, model), seconds)

    def cost(self, method: str, model: str, queue_s: float, compute_s: float) -> None:
        """Record what an answered request cost."""
        self._queue.observe((method, model), queue_s)
        self._compute.observe((method, model), compute_s)

    def answered(self, model: str, count: int) -> None:
        """Count samples, or rows of a tensor, that were answered."""
        self._samples[model,] = self._samples.get((model,), 0) + count

    def collect(self) -> Iterator[Metric]:
        """Everything, as Prometheus families."""
        ended = list(self._ended.items())  # before those that began, or more might have ended than begun
        under_way = dict(self._began)
        began = list(under_way.items())
        for (method, _, _), count in ended:
            under_way[method,] = under_way.get((method,), 0) - count
        yield _counters(
            "latentd_requests_started", "Requests that arrived; each is counted as finished once.", ["method"], began
        )
        yield _counters("latentd_requests", "Finished requests.", ["method", "model", "code"], ended)
        in_flight = GaugeMetricFamily("latentd_requests_in_flight", "Requests under way.", labels=["method"])
        for labels, count in under_way.items():
            in_flight.add_metric(labels, count)
        yield in_flight
        yield from (spreads.family() for spreads in (self._duration, self._queue, self._compute))
        yield _counters(
            "latentd_samples", "Samples, or rows of a tensor, answered.", ["model"], list(self._samples.items())
        )


class BatchTallies(Collector):
    """Network calls: their rows, their padding and how long they took, by model and graph."""

    def __init__(self) -> None:
        labels = ("model", "graph")
        self._rows = _Spreads(
            "latentd_batch_rows", "Live rows of a network call, padding not counted.", labels, BATCH_ROWS
        )
        self._duration = _Spreads(
            "latentd_batch_duration_seconds", "Duration of a network call.", labels, BATCH_SECONDS
        )
        self._padding: dict[tuple[str, str], int] = {}

    def ran(self, model: str, graph: str, live_rows: int, padded_rows: int, seconds: float) -> None:
        """Count one call of `live_rows` rows that was padded up to `padded_rows` rows in all."""
        labels = model, graph
        self._rows.observe(labels, live_rows)
        self._duration.observe(labels, seconds)
        self._padding[labels] = self._padding.get(labels, 0) + padded_rows - live_rows

    def collect(self) -> Iterator[Metric]:
        """Everything, as Prometheus families."""
        yield self._rows.family()
        yield self._duration.family()
        labels = ("model", "graph")
        padding = list(self._padding.items())
        yield _counters("latentd_padding_rows", "Rows of network calls that were padding.", labels, padding)
        evaluations = [(graph, spread.total) for graph, spread in list(self._rows.by_labels.items())]
        yield _counters("latentd_evaluations", "Network evaluations: live rows of network calls.", labels, evaluations)


def _counters(
    name: str, help_text: str, labels: Sequence[str], counts: Iterable[tuple[Sequence[str], float]]
) -> CounterMetricFamily:
    family = CounterMetricFamily(name, help_text, labels=labels)
    for values, count in counts:
        family.add_metric(values, count)
    return family
