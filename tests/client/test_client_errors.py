"""Every way a call fails becomes its own exception, with everything the server said."""

import pickle
from typing import Any

import grpc
import latentd_client
import numpy as np
import pytest
from fake_server import SHAPE, FakeServer, Fault, info, packed, retry_after
from google.protobuf import any_pb2, empty_pb2
from google.rpc import error_details_pb2
from latentd.reasons import Reason
from latentd.v1 import generation_service_pb2 as pb
from latentd_client import errors
from latentd_client.errors import BY_CODE, BY_REASON, Code, LatentdError, Violation

# The table of DESIGN section 9: what the server sends for each reason.
CODES = {
    Reason.FIELD_INVALID: grpc.StatusCode.INVALID_ARGUMENT,
    Reason.MODEL_NOT_FOUND: grpc.StatusCode.NOT_FOUND,
    Reason.METHOD_UNSUPPORTED: grpc.StatusCode.FAILED_PRECONDITION,
    Reason.MODEL_LOADING: grpc.StatusCode.UNAVAILABLE,
    Reason.MODEL_FAILED: grpc.StatusCode.FAILED_PRECONDITION,
    Reason.MODEL_IN_USE: grpc.StatusCode.FAILED_PRECONDITION,
    Reason.OVERLOADED: grpc.StatusCode.UNAVAILABLE,
    Reason.DRAINING: grpc.StatusCode.UNAVAILABLE,
    Reason.QUOTA_EXCEEDED: grpc.StatusCode.RESOURCE_EXHAUSTED,
    Reason.READER_TOO_SLOW: grpc.StatusCode.RESOURCE_EXHAUSTED,
    Reason.DEADLINE_UNREACHABLE: grpc.StatusCode.DEADLINE_EXCEEDED,
    Reason.DEADLINE_EXCEEDED: grpc.StatusCode.DEADLINE_EXCEEDED,
    Reason.CANCELLED: grpc.StatusCode.CANCELLED,
    Reason.RUNTIME_FAILURE: grpc.StatusCode.INTERNAL,
}


def test_every_reason_has_its_own_exception() -> None:
    """No reason of the contract is without a class, and no two share one."""
    assert set(BY_REASON) == set(Reason) == set(CODES)
    assert len(set(BY_REASON.values())) == len(Reason)


def test_every_exception_is_public() -> None:
    """Callers can name each exception without reaching into modules."""
    for kind in {*BY_REASON.values(), *BY_CODE.values()}:
        assert getattr(latentd_client, kind.__name__) is kind


@pytest.mark.parametrize("reason", Reason)
@pytest.mark.parametrize("rpc", ["Sample", "Encode"])
def test_a_reason_becomes_its_exception(client: Any, server: FakeServer, rpc: str, reason: Reason) -> None:
    """A refused stream and a refused unary call raise the reason's class, with code, metadata and request id."""
    server.fail(rpc, *[Fault(code=CODES[reason], message="why", details=[info(reason, model="toy@1")])] * 5)
    with pytest.raises(BY_REASON[reason]) as caught:
        client.sample("toy") if rpc == "Sample" else client.encode("toy", np.zeros(SHAPE))
    error = caught.value
    assert type(error) is BY_REASON[reason]
    assert error.reason is reason
    assert error.code == CODES[reason].value[0]
    assert error.message == "why"
    assert error.metadata == {"model": "toy@1"}
    assert error.request_id in [seen.metadata["x-request-id"] for seen in server.seen if seen.rpc == rpc]


@pytest.mark.parametrize("connect", ["sync", "aio"], indirect=True)  # what a shared stream carries, gRPC did not raise
@pytest.mark.parametrize("rpc", ["Sample", "Encode"])
def test_the_cause_is_grpcs(client: Any, server: FakeServer, rpc: str) -> None:
    """Whoever needs more finds gRPC's own error behind ours."""
    server.fail(rpc, Fault(code=grpc.StatusCode.NOT_FOUND))
    with pytest.raises(latentd_client.LatentdError) as caught:
        client.sample("toy") if rpc == "Sample" else client.encode("toy", np.zeros(SHAPE))
    assert isinstance(caught.value.__cause__, grpc.RpcError)


@pytest.mark.parametrize("code", [code for code in Code if code is not Code.OK])
def test_a_code_without_a_reason_becomes_an_exception(code: Code) -> None:
    """What proxies and gRPC itself send, without details, is still told apart where the code allows."""
    error = errors.from_status(code, "no details")
    assert type(error) is BY_CODE.get(code, LatentdError)
    assert error.code is code
    assert error.reason is None


def test_an_unknown_code_counts_as_unknown() -> None:
    """A number that no gRPC version defines reads UNKNOWN."""
    assert errors.from_status(99, "what").code is Code.UNKNOWN


def test_a_reason_of_a_newer_server_falls_back_on_the_code() -> None:
    """A reason this client does not know keeps its text, and the code chooses the class."""
    error = errors.from_status(14, "no", packed([info("DEVICE_LOST")]))
    assert type(error) is errors.ServerUnavailable
    assert error.reason == "DEVICE_LOST"
    assert error.retryable


def test_a_reason_of_another_domain_is_not_ours() -> None:
    """A gateway's own ErrorInfo does not pass for latentd's."""
    foreign = error_details_pb2.ErrorInfo(reason="QUOTA_EXCEEDED", domain="gateway.example")
    error = errors.from_status(8, "slow down", packed([foreign]))
    assert type(error) is errors.MessageTooLarge
    assert error.reason is None
    assert error.details == (foreign,)


def test_violations_are_all_there(client: Any, server: FakeServer) -> None:
    """Every field violation of BadRequest is readable, in order, and the error is a ValueError."""
    bad = error_details_pb2.BadRequest(
        field_violations=[
            error_details_pb2.BadRequest.FieldViolation(field="sample_count", description="at most 1024"),
            error_details_pb2.BadRequest.FieldViolation(field="diffusion.eta", description="in [0, 1]"),
        ]
    )
    server.fail("Sample", Fault(code=grpc.StatusCode.INVALID_ARGUMENT, details=[info(Reason.FIELD_INVALID), bad]))
    with pytest.raises(ValueError, match="a fault") as caught:
        client.sample("toy")
    assert caught.value.violations == (
        Violation("sample_count", "at most 1024"),
        Violation("diffusion.eta", "in [0, 1]"),
    )


@pytest.mark.parametrize(
    ("details", "trailers", "seconds"),
    [
        ([info(Reason.OVERLOADED), retry_after(0.25)], [("grpc-retry-pushback-ms", "900")], 0.25),
        ([info(Reason.OVERLOADED)], [("grpc-retry-pushback-ms", "50")], 0.05),
        ([info(Reason.OVERLOADED)], [("grpc-retry-pushback-ms", "-1")], None),
        ([info(Reason.OVERLOADED)], [], None),
    ],
)
def test_the_hint_when_to_retry_is_kept(
    connect: Any, server: FakeServer, details: Any, trailers: Any, seconds: float | None
) -> None:
    """RetryInfo wins, then gRPC's pushback; a pushback that forbids retries is no time."""
    server.fail("Sample", Fault(details=details, trailers=trailers))
    with pytest.raises(errors.Overloaded) as caught:
        connect(retries=latentd_client.Retries(max_attempts=1)).sample("toy")
    assert caught.value.retry_after_s == seconds


def test_a_mangled_trailer_costs_only_the_details() -> None:
    """Bytes that are no google.rpc.Status leave code and message to stand."""
    assert errors.read_details(b"\xff\xff\xff") == ()
    assert errors.read_details(None) == ()


def test_details_of_unknown_or_broken_type_are_kept_as_they_came() -> None:
    """A detail this client cannot read is handed on packed."""
    unknown = packed([empty_pb2.Empty()])[0]
    broken = any_pb2.Any(type_url="type.googleapis.com/google.rpc.ErrorInfo", value=b"\xff")
    assert errors.from_status(13, "x", [unknown, broken]).details == (unknown, broken)


def test_only_what_is_safe_and_useful_is_retryable() -> None:
    """UNAVAILABLE, and INTERNAL from a proxy, may be repeated; nothing else."""
    retryable = {reason for reason, kind in BY_REASON.items() if kind(code=None, reason=reason).retryable}
    assert retryable == {Reason.MODEL_LOADING, Reason.OVERLOADED, Reason.DRAINING}
    assert {code for code in Code if errors.from_status(code, "").retryable} == {Code.UNAVAILABLE, Code.INTERNAL}
    assert all(isinstance(BY_REASON[reason](), errors.ServerUnavailable) for reason in retryable)


def test_errors_survive_pickling() -> None:
    """An error crosses process boundaries, as pools of workers need, with all it carries."""
    error = errors.invalid([Violation("n", "at least 1")])
    error.request_id = "abc"
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is errors.FieldsInvalid
    assert (str(again), again.violations, again.request_id) == (str(error), error.violations, "abc")


def test_an_error_inside_a_stream_reads_like_any_other(client: Any, server: FakeServer) -> None:
    """A StreamError becomes the exception its unary call would raise."""
    with client.denoise_loop("toy-diffusion") as loop, pytest.raises(errors.FieldsInvalid) as caught:
        loop.step(next_timestep=8)
    assert caught.value.reason is Reason.FIELD_INVALID


def test_values_that_fit_into_no_request_are_all_named_here(client: Any, server: FakeServer) -> None:
    """What the wire cannot hold is refused before anything is sent, every field at once, as the server would."""
    with pytest.raises(errors.FieldsInvalid) as caught:
        client.sample(
            "toy",
            0,
            seed=2**64,
            label=[1, 2**70],
            temperature=float("nan"),
            steps=2**40,
            eta="much",
            start=np.zeros((1, 2), complex),
            dtype=np.complex64,
            output="best",
        )
    paths = [violation.path for violation in caught.value.violations]
    assert sorted(paths) == [
        "condition.class_labels[1]",
        "diffusion.eta",
        "diffusion.start.samples",
        "diffusion.step_count",
        "output_data_type",
        "output_mode",
        "sample_count",
        "seed",
        "temperature",
    ]
    assert caught.value.reason is Reason.FIELD_INVALID
    assert server.requests("Sample") == []
    with pytest.raises(errors.FieldsInvalid, match=r"seed: must be an integer, got 1\.5"):
        client.sample("toy", seed=1.5)


def test_an_answer_that_contradicts_itself_is_a_protocol_error(client: Any, server: FakeServer) -> None:
    """A tensor whose bytes do not fit its shape is not handed to the caller."""
    server.Score = lambda request, context: pb.ScoreResponse()  # type: ignore[method-assign]  # a broken server
    server.Decode = lambda request, context: pb.DecodeResponse()  # type: ignore[method-assign]  # a broken server
    server.stop()
    server.start()
    with pytest.raises(errors.ProtocolError, match="bad tensor"):
        client.decode("toy", np.zeros((1, 3)), label=1)
