"""What the server says of itself: series and log lines."""

import json
import logging
import sys

import pytest
from latentd.v1 import bundle_pb2, model_pb2
from latentd_server import logs
from latentd_server.metrics import Metrics
from prometheus_client import CollectorRegistry


@pytest.fixture
def metrics() -> Metrics:
    return Metrics()


def value(registry: CollectorRegistry, name: str, **labels: str) -> float | None:
    return registry.get_sample_value(name, labels)


def test_names_follow_the_units(metrics: Metrics) -> None:
    """Ours start with latentd_; counters end in _total, and times are histograms in _seconds."""
    ours = [family for family in metrics.registry.collect() if not family.name.startswith(("process_", "python_"))]
    assert len(ours) > 12
    for family in ours:
        assert family.name.startswith("latentd_")
        assert ("duration" in family.name) == family.name.endswith("_seconds")
        assert family.type == "histogram" or not family.name.endswith("_seconds")
        assert family.documentation.endswith(".")


def test_a_batch_counts_live_rows_and_padding_apart(metrics: Metrics) -> None:
    """The bucket's rows are live rows and padding together; only live ones are evaluations."""
    for live in (5, 8):
        metrics.batch_ran("m@1", bundle_pb2.Network.ROLE_DECODER, live, 8, 0.01)
    labels = {"model": "m@1", "graph": "decoder"}
    assert value(metrics.registry, "latentd_evaluations_total", **labels) == 13
    assert value(metrics.registry, "latentd_padding_rows_total", **labels) == 3
    assert value(metrics.registry, "latentd_batch_rows_count", **labels) == 2
    assert value(metrics.registry, "latentd_batch_rows_sum", **labels) == 13
    assert value(metrics.registry, "latentd_batch_duration_seconds_sum", **labels) == pytest.approx(0.02)


def test_gauges_are_read_when_somebody_scrapes(metrics: Metrics) -> None:
    """The engine is asked for its backlog and its depth each time."""
    backlog = [3]
    metrics.watch(lambda: backlog[0], lambda: 1, lambda: 0)
    assert value(metrics.registry, "latentd_backlog_evaluations") == 3
    backlog[0] = 9
    assert value(metrics.registry, "latentd_backlog_evaluations") == 9


def test_a_model_is_in_one_state(metrics: Metrics) -> None:
    """The state it left is 0 again."""
    metrics.model_state("m@1", model_pb2.Model.STATE_LOADING)
    metrics.model_state("m@1", model_pb2.Model.STATE_ACTIVE)
    states = {
        sample.labels["state"]: sample.value
        for family in metrics.registry.collect()
        if family.name == "latentd_model_state"
        for sample in family.samples
    }
    assert states == {"UNLOADED": 0, "LOADING": 0, "ACTIVE": 1, "DRAINING": 0, "FAILED": 0}


def record(**fields: object) -> logging.LogRecord:
    made = logging.LogRecord("latentd.calls", logging.INFO, "x.py", 1, "call %s", ("ended",), None)
    made.fields = fields
    return made


def test_json_lines_are_json() -> None:
    """One object, one line, whatever a caller called itself."""
    text = logs.JsonFormatter().format(record(caller='"\n\u2028', queue_s=0.1234567, seed=None))
    assert "\n" not in text
    line = json.loads(text)
    assert (line["message"], line["level"], line["logger"]) == ("call ended", "INFO", "latentd.calls")
    assert (line["caller"], line["queue_s"], line["seed"]) == ('"\n\u2028', 0.123457, None)
    assert line["time"].endswith("Z")


def test_text_lines_leave_out_what_is_empty() -> None:
    """Fields are `key=value`; zero is a value, empty is not."""
    text = logs.TextFormatter().format(record(code="OK", reason="", seed=None, samples=0))
    assert text.endswith("call ended code=OK samples=0")


@pytest.mark.parametrize("formatter", [logs.JsonFormatter(), logs.TextFormatter()])
def test_a_stack_is_logged_with_its_failure(formatter: logging.Formatter) -> None:
    """Both forms carry it."""
    try:
        raise ValueError("the cause")
    except ValueError:
        made = logging.LogRecord("latentd", logging.ERROR, "x.py", 1, "failed", (), sys.exc_info())
    text = formatter.format(made)
    assert "the cause" in text
    assert "Traceback" in text
