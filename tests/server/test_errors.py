"""The table of failures: one row, one test."""

import logging

import grpc
import pytest
from google.protobuf.message import Message
from google.rpc import error_details_pb2, status_pb2
from latentd.names import PUSHBACK_KEY
from latentd.reasons import DOMAIN, Reason
from latentd_server import errors, failures
from latentd_server.failures import Violation

Code = grpc.StatusCode


def details(refusal: errors.Refusal) -> dict[str, Message]:
    """The details by message name."""
    kinds = (
        error_details_pb2.ErrorInfo,
        error_details_pb2.BadRequest,
        error_details_pb2.ResourceInfo,
        error_details_pb2.PreconditionFailure,
        error_details_pb2.RetryInfo,
        error_details_pb2.QuotaFailure,
    )
    found: dict[str, Message] = {}
    for packed in refusal.status.details:
        kind = next(kind for kind in kinds if packed.Is(kind.DESCRIPTOR))
        message = kind()
        packed.Unpack(message)
        assert kind.DESCRIPTOR.name not in found, "a detail type occurs at most once"
        found[kind.DESCRIPTOR.name] = message
    return found


ROWS = [
    (
        failures.FieldsInvalidError([Violation("a.b[2]", "must be 1")]),
        Code.INVALID_ARGUMENT,
        "FIELD_INVALID",
        "BadRequest",
    ),
    (failures.ModelNotFoundError("x@1", ["y@1"]), Code.NOT_FOUND, "MODEL_NOT_FOUND", "ResourceInfo"),
    (
        failures.MethodUnsupportedError("x@1", "Score", ["Sample"]),
        Code.FAILED_PRECONDITION,
        "METHOD_UNSUPPORTED",
        "PreconditionFailure",
    ),
    (failures.ModelLoadingError("x@1"), Code.UNAVAILABLE, "MODEL_LOADING", "RetryInfo"),
    (failures.ModelFailedError("x@1", "bad digest"), Code.FAILED_PRECONDITION, "MODEL_FAILED", None),
    (failures.ModelInUseError("x@1", ["y@1"]), Code.FAILED_PRECONDITION, "MODEL_IN_USE", None),
    (failures.OverloadedError(9, 9, 0.5), Code.UNAVAILABLE, "OVERLOADED", "RetryInfo"),
    (failures.DrainingError(), Code.UNAVAILABLE, "DRAINING", "RetryInfo"),
    (failures.QuotaExceededError("stream", "full"), Code.RESOURCE_EXHAUSTED, "QUOTA_EXCEEDED", "QuotaFailure"),
    (failures.ReaderTooSlowError(30), Code.RESOURCE_EXHAUSTED, "READER_TOO_SLOW", None),
    (failures.DeadlineUnreachableError("too late", 2.5), Code.DEADLINE_EXCEEDED, "DEADLINE_UNREACHABLE", None),
    (failures.DeadlineError(), Code.DEADLINE_EXCEEDED, "DEADLINE_EXCEEDED", None),
    (failures.CancelledError(), Code.CANCELLED, "CANCELLED", None),
    (failures.RuntimeFailureError("x@1"), Code.INTERNAL, "RUNTIME_FAILURE", None),
    (failures.ModelUnloadedError("x@1", 60), Code.UNAVAILABLE, "DRAINING", "RetryInfo"),
]


@pytest.mark.parametrize(("failure", "code", "reason", "detail"), ROWS, ids=[row[2] for row in ROWS])
def test_a_failure_has_one_code_one_reason_and_one_detail(
    failure: failures.ServingError, code: grpc.StatusCode, reason: str, detail: str | None
) -> None:
    """Every row: the code, always one ErrorInfo of our domain, and the detail that goes with it."""
    refusal = errors.refusal(failure)
    assert refusal.code is code
    assert refusal.status.code == code.value[0]
    found = details(refusal)
    info = found.pop("ErrorInfo")
    assert isinstance(info, error_details_pb2.ErrorInfo)
    assert (info.reason, info.domain) == (reason, DOMAIN)
    assert list(found) == ([detail] if detail else [])
    trailers = dict(refusal.trailers)
    assert status_pb2.Status.FromString(trailers[errors.STATUS_KEY]) == refusal.status  # type: ignore[arg-type]
    error = refusal.stream_error
    assert (error.code, error.message, list(error.details)) == (
        refusal.status.code,
        refusal.status.message,
        list(refusal.status.details),
    )


def test_every_reason_and_every_failure_has_a_row() -> None:
    """No failure and no reason of the contract is missing from the table."""
    assert {row[2] for row in ROWS} == {reason.value for reason in Reason}

    def below(kind: type) -> set[type]:
        return {found for child in kind.__subclasses__() for found in {child, *below(child)}}

    assert {type(row[0]) for row in ROWS} == below(failures.ServingError)


@pytest.mark.parametrize(("failure", "code", "reason", "detail"), ROWS, ids=[row[2] for row in ROWS])
def test_exactly_the_unavailable_tell_when_to_retry(
    failure: failures.ServingError, code: grpc.StatusCode, reason: str, detail: str | None
) -> None:
    """RetryInfo for programs and the pushback trailer for gRPC agree; what is not retryable has neither."""
    refusal = errors.refusal(failure)
    trailers = dict(refusal.trailers)
    assert (PUSHBACK_KEY in trailers) == (code is Code.UNAVAILABLE)
    if code is Code.UNAVAILABLE:
        info = details(refusal)["RetryInfo"]
        assert isinstance(info, error_details_pb2.RetryInfo)
        assert int(trailers[PUSHBACK_KEY]) == info.retry_delay.ToMilliseconds() > 0


def test_the_details_say_what_programs_need() -> None:
    """Violations by path, the model that is missing, the methods there are, the estimate."""
    bad = details(errors.refusal(ROWS[0][0]))["BadRequest"]
    assert isinstance(bad, error_details_pb2.BadRequest)
    assert [(v.field, v.description) for v in bad.field_violations] == [("a.b[2]", "must be 1")]
    resource = details(errors.refusal(ROWS[1][0]))["ResourceInfo"]
    assert isinstance(resource, error_details_pb2.ResourceInfo)
    assert resource.resource_name == "x@1"
    by_reason = {row[2]: row[0] for row in ROWS}
    for reason, key, value in (
        ("METHOD_UNSUPPORTED", "supported_methods", "Sample"),
        ("READER_TOO_SLOW", "timeout_seconds", "30"),
        ("DEADLINE_UNREACHABLE", "estimate_seconds", "2.500"),
    ):
        info = details(errors.refusal(by_reason[reason]))["ErrorInfo"]
        assert isinstance(info, error_details_pb2.ErrorInfo)
        assert info.metadata[key] == value


def test_many_violations_fit_into_metadata_and_the_rest_is_counted() -> None:
    """A thousand wrong labels do not break gRPC's limit of 8 KiB of metadata; the count is told."""
    many = [Violation(f"condition.class_labels[{i}]", f"must be from 0 to 9; got {i}") for i in range(1000)]
    refusal = errors.refusal(failures.FieldsInvalidError(many))
    size = sum(len(key) + len(value) for key, value in refusal.trailers) + 3 * len(refusal.status.message)
    assert size < 8000
    bad = details(refusal)["BadRequest"]
    assert isinstance(bad, error_details_pb2.BadRequest)
    assert len(bad.field_violations) > 30
    assert f"and {1000 - len(bad.field_violations)} more" in refusal.status.message
    info = details(refusal)["ErrorInfo"]
    assert isinstance(info, error_details_pb2.ErrorInfo)
    assert info.metadata["violation_count"] == "1000"


def test_an_unexpected_failure_is_told_without_its_text_and_logged_with_its_stack(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Callers see no path and no stack of ours; the log has both."""
    with caplog.at_level(logging.ERROR):
        try:
            raise KeyError("/secret/path")
        except KeyError as error:
            refusal = errors.refusal(error)
    assert refusal.code is Code.INTERNAL
    assert "secret" not in str(refusal.status)
    assert "/secret/path" in caplog.text
    assert "Traceback" in caplog.text


def test_a_violation_of_the_message_as_a_whole_has_no_path() -> None:
    """What is wrong with no field in particular is said without a colon before it."""
    refusal = errors.refusal(failures.FieldsInvalidError([Violation("", "its bytes cannot be read")]))
    assert refusal.status.message == "its bytes cannot be read"
