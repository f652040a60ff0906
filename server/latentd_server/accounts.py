"""The account of one request: what it cost and how it ended, for the metrics and for one line of the log."""

from collections.abc import Callable
from dataclasses import dataclass

from latentd.reasons import Reason

from latentd_server import logs, respond
from latentd_server.job import Cost
from latentd_server.metrics import Metrics

_REFUSALS = {
    Reason.OVERLOADED,
    Reason.DRAINING,
    Reason.MODEL_LOADING,
    Reason.QUOTA_EXCEEDED,
    Reason.DEADLINE_UNREACHABLE,
}
"""Reasons that say something of the server, not of the request."""


@dataclass(frozen=True, slots=True)
class Peer:
    """Who calls."""

    caller: str
    request_id: str
    priority: str = ""  # as its metadata name it, which may be nonsense


class Account:
    """Open from a request's arrival to its last message."""

    def __init__(self, metrics: Metrics, clock: Callable[[], float], peer: Peer, method: str) -> None:
        self.method = method
        self.model = ""  # canonical, once it is known
        self.seed: int | None = None
        self.samples = 0
        self.cost = Cost(queue_s=float("inf"))
        self._metrics = metrics
        self._clock = clock
        self._peer = peer
        self._began = clock()
        self._closed = False
        metrics.request_began(method)

    def close(self, code: str, reason: str = "") -> None:
        """Say how it ended, with the name of the gRPC code; only the first time counts."""
        if self._closed:
            return
        self._closed = True
        total_s = self._clock() - self._began
        queue_s = self.cost.queue_s if self.cost.batches else 0.0
        self._metrics.request_ended(self.method, self.model, code, total_s)
        if self.cost.batches:
            self._metrics.request_cost(self.method, self.model, queue_s, self.cost.compute_s)
        if self.samples:
            self._metrics.samples_answered(self.model, self.samples)
        if reason in _REFUSALS:
            self._metrics.refused(reason)
        logs.event(
            logs.calls,
            "call",
            method=self.method,
            model=self.model,
            code=code,
            reason=reason,
            samples=self.samples,
            evaluations=self.cost.evaluations,
            queue_s=queue_s,
            compute_s=self.cost.compute_s,
            mean_batch=respond.mean_batch(self.cost),
            total_s=total_s,
            caller=self._peer.caller,
            request_id=self._peer.request_id,
            seed=self.seed,
        )
