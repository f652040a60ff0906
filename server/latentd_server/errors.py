"""The one table: why a call failed -> google.rpc.Status, as gRPC trailers and as a `StreamError`.

Every status carries one `ErrorInfo` (reason, domain, metadata) and at most one further detail. gRPC clients
take at most 8 KiB of metadata, so what callers sent is quoted clipped and violations that do not fit are counted.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass, field

import grpc
from google.protobuf.any_pb2 import Any
from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import Message
from google.rpc import error_details_pb2, status_pb2
from latentd.names import PUSHBACK_KEY
from latentd.reasons import DOMAIN, Reason
from latentd.v1 import generation_service_pb2

from latentd_server import failures

STATUS_KEY = "grpc-status-details-bin"
"""Trailing metadata that holds the serialized google.rpc.Status."""

_MESSAGE_LIMIT = 1000  # characters; the message travels twice, once percent-encoded
_VIOLATIONS_LIMIT_BYTES = 3000
_QUOTE_LIMIT = 200

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _Row:
    """One row of the table: what one kind of failure looks like on the wire."""

    code: grpc.StatusCode
    reason: Reason
    metadata: dict[str, str] = field(default_factory=dict)
    detail: Message | None = None
    message: str | None = None  # in place of the failure's own


def _fields_invalid(error: failures.FieldsInvalidError) -> _Row:
    request = error_details_pb2.BadRequest()
    size = 0
    for violation in error.violations:
        size += len(violation.path.encode()) + len(violation.description.encode())
        if size > _VIOLATIONS_LIMIT_BYTES and request.field_violations:
            break
        request.field_violations.add(field=_clip(violation.path), description=violation.description)
    listed = len(request.field_violations)
    more = f"; and {len(error.violations) - listed} more" if listed < len(error.violations) else ""
    message = "; ".join(f"{v.field}: {v.description}" if v.field else v.description for v in request.field_violations)
    return _Row(
        grpc.StatusCode.INVALID_ARGUMENT,
        Reason.FIELD_INVALID,
        {"violation_count": str(len(error.violations))},
        request,
        message[: _MESSAGE_LIMIT - len(more)] + more,
    )


def _model_not_found(error: failures.ModelNotFoundError) -> _Row:
    name = _clip(error.reference)
    info = error_details_pb2.ResourceInfo(resource_type="latentd.v1.Model", resource_name=name)
    return _Row(grpc.StatusCode.NOT_FOUND, Reason.MODEL_NOT_FOUND, {"model": name}, info)


def _method_unsupported(error: failures.MethodUnsupportedError) -> _Row:
    failure = error_details_pb2.PreconditionFailure()
    failure.violations.add(type="METHOD", subject=error.model, description=_clip(str(error)))
    metadata = {"model": error.model, "method": error.method, "supported_methods": ",".join(error.supported)}
    return _Row(grpc.StatusCode.FAILED_PRECONDITION, Reason.METHOD_UNSUPPORTED, metadata, failure)


def _model_loading(error: failures.ModelLoadingError) -> _Row:
    metadata = {"model": error.model}
    return _Row(grpc.StatusCode.UNAVAILABLE, Reason.MODEL_LOADING, metadata, _retry(error.retry_after_s))


def _model_failed(error: failures.ModelFailedError) -> _Row:
    return _Row(grpc.StatusCode.FAILED_PRECONDITION, Reason.MODEL_FAILED, {"model": error.model})


def _model_in_use(error: failures.ModelInUseError) -> _Row:
    return _Row(grpc.StatusCode.FAILED_PRECONDITION, Reason.MODEL_IN_USE, {"model": error.model})


def _overloaded(error: failures.OverloadedError) -> _Row:
    return _Row(grpc.StatusCode.UNAVAILABLE, Reason.OVERLOADED, detail=_retry(error.retry_after_s))


def _draining(error: failures.DrainingError) -> _Row:
    return _Row(grpc.StatusCode.UNAVAILABLE, Reason.DRAINING, detail=_retry(error.retry_after_s))


def _quota_exceeded(error: failures.QuotaExceededError) -> _Row:
    failure = error_details_pb2.QuotaFailure()
    failure.violations.add(subject=error.subject, description=error.description)
    return _Row(grpc.StatusCode.RESOURCE_EXHAUSTED, Reason.QUOTA_EXCEEDED, {"subject": error.subject}, failure)


def _reader_too_slow(error: failures.ReaderTooSlowError) -> _Row:
    metadata = {"timeout_seconds": f"{error.timeout_s:g}"}
    return _Row(grpc.StatusCode.RESOURCE_EXHAUSTED, Reason.READER_TOO_SLOW, metadata)


def _deadline_unreachable(error: failures.DeadlineUnreachableError) -> _Row:
    metadata = {} if error.estimate_s is None else {"estimate_seconds": f"{error.estimate_s:.3f}"}
    return _Row(grpc.StatusCode.DEADLINE_EXCEEDED, Reason.DEADLINE_UNREACHABLE, metadata)


def _deadline_exceeded(_: failures.DeadlineError) -> _Row:
    return _Row(grpc.StatusCode.DEADLINE_EXCEEDED, Reason.DEADLINE_EXCEEDED)


def _cancelled(_: failures.CancelledError) -> _Row:
    return _Row(grpc.StatusCode.CANCELLED, Reason.CANCELLED)


def _runtime_failure(error: failures.RuntimeFailureError) -> _Row:
    return _Row(grpc.StatusCode.INTERNAL, Reason.RUNTIME_FAILURE, {"model": error.model})


_TABLE: dict[type[failures.ServingError], Callable[..., _Row]] = {
    failures.FieldsInvalidError: _fields_invalid,
    failures.ModelNotFoundError: _model_not_found,
    failures.MethodUnsupportedError: _method_unsupported,
    failures.ModelLoadingError: _model_loading,
    failures.ModelFailedError: _model_failed,
    failures.ModelInUseError: _model_in_use,
    failures.OverloadedError: _overloaded,
    failures.DrainingError: _draining,
    failures.QuotaExceededError: _quota_exceeded,
    failures.ReaderTooSlowError: _reader_too_slow,
    failures.DeadlineUnreachableError: _deadline_unreachable,
    failures.DeadlineError: _deadline_exceeded,
    failures.CancelledError: _cancelled,
    failures.RuntimeFailureError: _runtime_failure,
}


@dataclass(frozen=True, slots=True)
class Refusal:
    """A failure in the terms of gRPC."""

    code: grpc.StatusCode
    reason: Reason
    status: status_pb2.Status
    retry_after_s: float | None

    @property
    def trailers(self) -> tuple[tuple[str, str | bytes], ...]:
        """Trailing metadata: the status and, where a retry helps, when gRPC's own retry machinery may try."""
        details = (STATUS_KEY, self.status.SerializeToString())
        if self.retry_after_s is None:
            return (details,)
        return (details, (PUSHBACK_KEY, str(round(self.retry_after_s * 1000))))

    @property
    def stream_error(self) -> generation_service_pb2.StreamError:
        """The same, for one id of a stream."""
        return generation_service_pb2.StreamError(
            code=self.status.code, message=self.status.message, details=self.status.details
        )


def refusal(error: BaseException) -> Refusal:
    """Look a failure up. One that is not in the table is ours: it is logged with its stack, and told without it."""
    to_row = next((_TABLE[kind] for kind in type(error).__mro__ if kind in _TABLE), None)
    if to_row is None:
        _log.error("unexpected failure", exc_info=error)
        row = _Row(
            grpc.StatusCode.INTERNAL,
            Reason.RUNTIME_FAILURE,
            message="internal error; the server's log has the details",
        )
    else:
        row = to_row(error)
    status = status_pb2.Status(
        code=row.code.value[0], message=row.message or _clip(str(error), _MESSAGE_LIMIT), details=_details(row)
    )
    return Refusal(row.code, row.reason, status, getattr(error, "retry_after_s", None))


def _details(row: _Row) -> list[Any]:
    info = error_details_pb2.ErrorInfo(reason=row.reason, domain=DOMAIN, metadata=row.metadata)
    packed = []
    for message in (info, row.detail):
        if message is not None:
            packed.append(Any())
            packed[-1].Pack(message)
    return packed


def _retry(after_s: float) -> error_details_pb2.RetryInfo:
    delay = Duration()
    delay.FromMilliseconds(round(after_s * 1000))
    return error_details_pb2.RetryInfo(retry_delay=delay)


def _clip(text: str, limit: int = _QUOTE_LIMIT) -> str:
    return text if len(text) <= limit else text[: limit - 3] + "..."
