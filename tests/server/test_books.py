"""The check that runs after every test of a server: it must find what it is there for."""

import books
import pytest
from latentd_server.metrics import Metrics

GAUGES = ("backlog_evaluations", "queue_depth", "lanes_held")


def test_a_request_that_began_and_did_not_end_is_found() -> None:
    """By the gauge, and by the counters alone; once it has ended the books balance."""
    metrics = Metrics()
    metrics.request_began("Sample")
    assert books.unsettled(metrics.exposition().decode()) == [
        "latentd_requests_in_flight{'method': 'Sample'} is 1",
        "1 requests of Sample began and 0 ended",
    ]
    metrics.request_ended("Sample", "m@1", "OK", 0.1)
    books.must_rest(lambda: metrics.exposition().decode())


def test_a_request_that_ended_twice_is_found() -> None:
    """By the gauge, which falls below zero, and by the counters."""
    metrics = Metrics()
    metrics.request_began("Decode")
    for code in ("OK", "CANCELLED"):
        metrics.request_ended("Decode", "m@1", code, 0.1)
    assert "1 requests of Decode began and 2 ended" in books.unsettled(metrics.exposition().decode())


@pytest.mark.parametrize("gauge", GAUGES)
def test_an_engine_that_holds_something_is_found(gauge: str) -> None:
    """Its backlog, its depth and its lanes are gauges that must come to zero; models that are active are no matter."""
    metrics = Metrics()
    metrics.model_state("m@1", 3)
    metrics.running("1.0", "cpu")
    metrics.watch(*(lambda name=name: name == gauge for name in GAUGES))
    with pytest.raises(AssertionError, match=f"does not come to rest: latentd_{gauge} is 1$"):
        books.must_rest(lambda: metrics.exposition().decode(), patience_s=0)
