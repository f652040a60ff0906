"""The pure core: slerp, retry decisions, base imports, types."""

import json
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from latentd.v1 import generation_service_pb2 as pb
from latentd.v1 import model_pb2
from latentd_client import Retries
from latentd_client.errors import Draining, FieldsInvalid, Overloaded, ServerUnavailable
from latentd_client.interpolation import slerp
from latentd_client.model import Model, enum_name
from latentd_client.retries import Attempts, Throttle


def test_slerp_keeps_ends_and_length() -> None:
    """The ends are exact to rounding, and between vectors of one length every stop has that length."""
    generator = np.random.default_rng(0)
    a, b = generator.standard_normal((2, 3, 4))
    b *= np.linalg.norm(a) / np.linalg.norm(b)
    path = slerp(a, b, np.linspace(0, 1, 7))
    assert (path.shape, path.dtype) == ((7, 3, 4), np.float32)
    np.testing.assert_allclose(path[[0, -1]], [a, b], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(np.linalg.norm(path.reshape(7, -1), axis=1), np.linalg.norm(a), rtol=1e-5)


def test_slerp_moves_at_constant_speed() -> None:
    """Neighbouring stops are equal angles apart."""
    path = slerp(np.array([2.0, 0.0]), np.array([0.0, 2.0]), np.linspace(0, 1, 10))
    angles = np.arctan2(path[:, 1], path[:, 0])
    np.testing.assert_allclose(np.diff(angles), np.pi / 18, rtol=1e-5)


@pytest.mark.parametrize("end", [[3.0, 0.0], [-1.0, 0.0], [0.0, 0.0]])
def test_slerp_goes_straight_where_there_is_no_great_circle(end: list[float]) -> None:
    """Vectors along one line, opposite ones and zero are joined by that line, without NaN."""
    path = slerp(np.array([1.0, 0.0]), np.array(end), np.array([0.0, 0.5, 1.0]))
    np.testing.assert_allclose(path[:, 0], [1.0, (1 + end[0]) / 2, end[0]])


def test_the_wait_grows_and_is_capped() -> None:
    """Each fruitless attempt doubles the wait up to the cap, spread by a fifth; the server's hint wins if longer."""
    attempts = Attempts(Retries(max_attempts=9, initial_backoff_s=1.0, max_backoff_s=5.0), Throttle())
    error = ServerUnavailable("no")
    waits = [attempts.delay_s(error, progress=0, remaining_s=99.0, chance=0.5) for _ in range(5)]
    assert waits == [1.0, 2.0, 4.0, 5.0, 5.0]
    assert attempts.delay_s(error, progress=0, remaining_s=99.0, chance=0.0) == 4.0
    assert attempts.delay_s(Overloaded(retry_after_s=20.0), progress=0, remaining_s=99.0, chance=0.5) == 20.0


def test_progress_starts_the_count_anew() -> None:
    """Only attempts in a row that bring nothing count; a stream may break as often as it likes while it gets on."""
    attempts = Attempts(Retries(max_attempts=2), Throttle())
    for progress in range(1, 20):
        attempts.delay_s(Draining(), progress=progress, remaining_s=99.0, chance=0.5)
    with pytest.raises(Draining):
        attempts.delay_s(Draining(), progress=19, remaining_s=99.0, chance=0.5)


def test_no_wait_reaches_the_deadline() -> None:
    """A wait that would end at or after the deadline raises the failure itself, which says more than a timeout."""
    with pytest.raises(Overloaded):
        Attempts(Retries(), Throttle()).delay_s(Overloaded(retry_after_s=5.0), progress=0, remaining_s=5.0, chance=0)


def test_what_cannot_be_cured_is_raised() -> None:
    """An error that is not retryable is not waited for."""
    with pytest.raises(FieldsInvalid):
        Attempts(Retries(), Throttle()).delay_s(FieldsInvalid(), progress=5, remaining_s=99.0, chance=0)


def test_wrong_requests_do_not_use_up_the_retries_of_others() -> None:
    """After a hundred refusals that no retry cures, a server that is down for a moment is still tried again."""
    throttle = Throttle()
    for _ in range(100):
        with pytest.raises(FieldsInvalid):
            Attempts(Retries(), throttle).delay_s(FieldsInvalid(), progress=0, remaining_s=99.0, chance=0)
    assert Attempts(Retries(), throttle).delay_s(Draining(), progress=0, remaining_s=99.0, chance=0) > 0


@given(st.lists(st.booleans(), max_size=400))
def test_the_throttle_bounds_retries(outcomes: list[bool]) -> None:
    """With f failures and s successes, at most 50 + s / 10 failures were allowed a retry."""
    throttle = Throttle()
    allowed = successes = 0
    for success in outcomes:
        if success:
            throttle.succeeded()
            successes += 1
        else:
            throttle.failed()
            allowed += throttle.open
        assert 0 <= throttle.tokens <= 100
        assert allowed <= 50 + successes / 10


def test_the_service_config_retries_unary_calls_alone() -> None:
    """GRPC retries UNAVAILABLE of unary methods, at most 5 times, throttled; streams have an entry without policy."""
    config = json.loads(Retries(max_attempts=9).service_config())
    streams, unary = config["methodConfig"]
    assert "retryPolicy" not in streams
    assert {name["method"] for name in streams["name"]} == {"Sample", "Stream"}
    assert unary["retryPolicy"]["maxAttempts"] == 5
    assert unary["retryPolicy"]["retryableStatusCodes"] == ["UNAVAILABLE"]
    assert config["retryThrottling"] == {"maxTokens": 100, "tokenRatio": 0.1}
    assert "retryPolicy" not in json.loads(Retries(max_attempts=1).service_config())["methodConfig"][1]


def test_every_streaming_method_is_left_to_the_library() -> None:
    """A streaming RPC added to the contract must be added to the service config too."""
    service = pb.DESCRIPTOR.services_by_name["GenerationService"]
    streaming = {method.name for method in service.methods if method.server_streaming}
    streams = json.loads(Retries().service_config())["methodConfig"][0]["name"]
    assert streaming == {name["method"] for name in streams}


def test_values_of_newer_servers_read_unknown() -> None:
    """An enum value this client does not know is named by its number, not an error."""
    assert enum_name(model_pb2.Model.Family, 99, "FAMILY_") == "unknown-99"
    assert enum_name(model_pb2.Model.Family, model_pb2.Model.FAMILY_INFO_GAN, "FAMILY_") == "info-gan"
    assert Model(model_pb2.Model(methods=[1, 77])).methods == {"sample", "unknown-77"}  # type: ignore[list-item]  # newer


def run_python(program: str) -> str:
    """What a program prints in a fresh interpreter."""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_the_library_needs_its_base_install_alone() -> None:
    """Importing it loads grpc, protobuf and numpy, and nothing that is an extra."""
    program = (
        "import sys, latentd_client;"
        "print(sorted({name.split('.')[0] for name in sys.modules} & "
        "{'PIL', 'typer', 'rich', 'click', 'torch', 'onnxruntime', 'latentd_server', 'latentd_trainer'}))"
    )
    assert run_python(program) == "[]"
