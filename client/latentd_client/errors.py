"""Every way a call can fail, as exceptions; read from `google.rpc.Status`. Imports no gRPC.

One class for each `ErrorInfo.reason` of latentd, and for the codes that come without one (a proxy, a broken
connection). Callers that only ask "try again later?" catch `ServerUnavailable`; the library has then already tried.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

from google.protobuf import any_pb2
from google.protobuf.message import DecodeError, Message
from google.rpc import error_details_pb2, status_pb2
from latentd.reasons import DOMAIN, Reason


class Code(IntEnum):
    """gRPC status codes, by the numbers of the wire."""

    OK = 0
    CANCELLED = 1
    UNKNOWN = 2
    INVALID_ARGUMENT = 3
    DEADLINE_EXCEEDED = 4
    NOT_FOUND = 5
    ALREADY_EXISTS = 6
    PERMISSION_DENIED = 7
    RESOURCE_EXHAUSTED = 8
    FAILED_PRECONDITION = 9
    ABORTED = 10
    OUT_OF_RANGE = 11
    UNIMPLEMENTED = 12
    INTERNAL = 13
    UNAVAILABLE = 14
    DATA_LOSS = 15
    UNAUTHENTICATED = 16


class LatentdError(Exception):
    """Base of every error of a call.

    Attributes:
        code: the gRPC status code.
        reason: `ErrorInfo.reason`; a member of `latentd.reasons.Reason` where this client knows it, else the text.
        metadata: `ErrorInfo.metadata`.
        details: the messages of `google.rpc.Status.details`, unpacked where their type is known.
        retry_after_s: when the server suggests to try again, in seconds; None if it does not.
        request_id: the `x-request-id` the call carried; the server's log has it too.
    """

    default_code = Code.UNKNOWN

    def __init__(
        self,
        message: str = "",
        *,
        code: Code | None = None,
        reason: Reason | str | None = None,
        metadata: Mapping[str, str] | None = None,
        details: Sequence[Message] = (),
        retry_after_s: float | None = None,
        request_id: str | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.code = self.default_code if code is None else code
        self.reason = reason
        self.metadata = dict(metadata or {})
        self.details = tuple(details)
        self.retry_after_s = retry_after_s
        self.request_id = request_id

    @property
    def retryable(self) -> bool:
        """Whether the same call may succeed later, unchanged.

        INTERNAL counts when nothing in it is latentd's: proxies reset streams with it when their upstream goes away.
        """
        return self.code is Code.UNAVAILABLE or (self.code is Code.INTERNAL and self.reason is None)


@dataclass(frozen=True, slots=True)
class Violation:
    """One field that is wrong: its path as protobuf writes it, and what is allowed there."""

    path: str
    description: str


class FieldsInvalid(LatentdError, ValueError):
    """The request contradicts the API or the model. `violations` lists everything that is wrong."""

    default_code = Code.INVALID_ARGUMENT

    @property
    def violations(self) -> tuple[Violation, ...]:
        """Every offending field."""
        return tuple(
            Violation(violation.field, violation.description)
            for detail in self.details
            if isinstance(detail, error_details_pb2.BadRequest)
            for violation in detail.field_violations
        )


class ModelNotFound(LatentdError):
    """The server has no model of that name or version."""

    default_code = Code.NOT_FOUND


class MethodUnsupported(LatentdError):
    """The model exists but does not answer this method."""

    default_code = Code.FAILED_PRECONDITION


class ModelFailed(LatentdError):
    """The server has the model but could not load it."""

    default_code = Code.FAILED_PRECONDITION


class ModelInUse(LatentdError):
    """The server keeps the model, since others lean on it."""

    default_code = Code.FAILED_PRECONDITION


class QuotaExceeded(LatentdError):
    """This caller has used up what it may use."""

    default_code = Code.RESOURCE_EXHAUSTED


class ReaderTooSlow(LatentdError):
    """Much was there to be read, and this client read nothing of it for longer than the server allows."""

    default_code = Code.RESOURCE_EXHAUSTED


class MessageTooLarge(LatentdError):
    """A message was larger than one end accepts, or another limit of the transport was reached."""

    default_code = Code.RESOURCE_EXHAUSTED


class ServerUnavailable(LatentdError):
    """The server cannot be reached, or refuses for now. The call may be made again as it is."""

    default_code = Code.UNAVAILABLE


class ModelLoading(ServerUnavailable):
    """The model is being loaded."""


class Overloaded(ServerUnavailable):
    """The server's backlog is full."""


class Draining(ServerUnavailable):
    """The server is shutting down and takes nothing new."""


class DeadlineExceeded(LatentdError, TimeoutError):
    """The timeout passed before the answer came."""

    default_code = Code.DEADLINE_EXCEEDED


class DeadlineUnreachable(DeadlineExceeded):
    """The server refused at the door: it could not have answered in time."""


class Cancelled(LatentdError):
    """The call was given up, here (`close`) or on the way."""

    default_code = Code.CANCELLED


class RuntimeFailure(LatentdError):
    """The network failed on this request's rows."""

    default_code = Code.INTERNAL


class Unauthenticated(LatentdError):
    """The server wants credentials, or does not trust these."""

    default_code = Code.UNAUTHENTICATED


class PermissionDenied(LatentdError):
    """This caller may not do this."""

    default_code = Code.PERMISSION_DENIED


class ProtocolError(LatentdError):
    """The answer contradicts the contract."""

    default_code = Code.INTERNAL

    @property
    def retryable(self) -> bool:
        """Never: the server means what it says."""
        return False


class DeterminismChanged(LatentdError):
    """A denoising loop lost its server, and the one that took over promises other bytes; start the loop anew."""

    default_code = Code.ABORTED


class ClientClosed(RuntimeError):
    """The client was used after `close`."""


class ClientForked(RuntimeError):
    """The client was used in a child of the process that made it. gRPC channels do not survive fork."""


BY_REASON: Mapping[Reason, type[LatentdError]] = {
    Reason.FIELD_INVALID: FieldsInvalid,
    Reason.MODEL_NOT_FOUND: ModelNotFound,
    Reason.METHOD_UNSUPPORTED: MethodUnsupported,
    Reason.MODEL_LOADING: ModelLoading,
    Reason.MODEL_FAILED: ModelFailed,
    Reason.MODEL_IN_USE: ModelInUse,
    Reason.OVERLOADED: Overloaded,
    Reason.DRAINING: Draining,
    Reason.QUOTA_EXCEEDED: QuotaExceeded,
    Reason.READER_TOO_SLOW: ReaderTooSlow,
    Reason.DEADLINE_UNREACHABLE: DeadlineUnreachable,
    Reason.DEADLINE_EXCEEDED: DeadlineExceeded,
    Reason.CANCELLED: Cancelled,
    Reason.RUNTIME_FAILURE: RuntimeFailure,
}
"""The class of every reason; the first place to look."""

BY_CODE: Mapping[Code, type[LatentdError]] = {
    Code.INVALID_ARGUMENT: FieldsInvalid,
    Code.RESOURCE_EXHAUSTED: MessageTooLarge,
    Code.UNAVAILABLE: ServerUnavailable,
    Code.DEADLINE_EXCEEDED: DeadlineExceeded,
    Code.CANCELLED: Cancelled,
    Code.UNAUTHENTICATED: Unauthenticated,
    Code.PERMISSION_DENIED: PermissionDenied,
}
"""The class of a code that comes without a reason of latentd; any other code is a plain `LatentdError`."""

_DETAIL_TYPES: tuple[type[Message], ...] = (
    error_details_pb2.ErrorInfo,
    error_details_pb2.BadRequest,
    error_details_pb2.RetryInfo,
    error_details_pb2.QuotaFailure,
    error_details_pb2.ResourceInfo,
    error_details_pb2.PreconditionFailure,
)


def from_status(
    code: int,
    message: str,
    details: Iterable[any_pb2.Any] = (),
    *,
    pushback_s: float | None = None,
    request_id: str | None = None,
) -> LatentdError:
    """The exception for a status: by reason, else by code.

    Args:
        code: a gRPC status code; numbers this client does not know count as UNKNOWN, as gRPC demands.
        message: for developers.
        details: `google.rpc.Status.details`.
        pushback_s: what `grpc-retry-pushback-ms` said; `RetryInfo` wins over it.
        request_id: what the call carried as `x-request-id`.
    """
    known_code = Code(code) if Code.OK <= code <= Code.UNAUTHENTICATED else Code.UNKNOWN
    unpacked = tuple(_unpack(detail) for detail in details)
    info = next((d for d in unpacked if isinstance(d, error_details_pb2.ErrorInfo) and d.domain == DOMAIN), None)
    retry = next((d for d in unpacked if isinstance(d, error_details_pb2.RetryInfo)), None)

    reason: Reason | str | None = None
    kind = BY_CODE.get(known_code, LatentdError)
    if info is not None:
        reason = info.reason
        if info.reason in Reason.__members__:
            reason = Reason[info.reason]
            kind = BY_REASON[reason]
    return kind(
        message,
        code=known_code,
        reason=reason,
        metadata=info.metadata if info is not None else None,
        details=unpacked,
        retry_after_s=retry.retry_delay.ToTimedelta().total_seconds() if retry is not None else pushback_s,
        request_id=request_id,
    )


def read_details(status_bytes: bytes | None) -> Sequence[any_pb2.Any]:
    """The details in a `grpc-status-details-bin` trailer; none if it is absent or not a `google.rpc.Status`."""
    status = status_pb2.Status()
    try:
        status.ParseFromString(status_bytes or b"")
    except DecodeError:  # a proxy's own trailer; code and message still stand
        return ()
    return tuple(status.details)


def invalid(violations: Sequence[Violation]) -> FieldsInvalid:
    """What the server would say of these fields; for values that do not even fit into a request."""
    detail = error_details_pb2.BadRequest(
        field_violations=[
            error_details_pb2.BadRequest.FieldViolation(field=violation.path, description=violation.description)
            for violation in violations
        ]
    )
    message = "; ".join(f"{violation.path}: {violation.description}" for violation in violations)
    return FieldsInvalid(message, reason=Reason.FIELD_INVALID, details=[detail])


def _unpack(detail: any_pb2.Any) -> Message:
    for detail_type in _DETAIL_TYPES:
        message: Any = detail_type()
        if detail.Is(message.DESCRIPTOR):
            try:
                detail.Unpack(message)
            except DecodeError:
                return detail
            return message  # type: ignore[no-any-return]  # Unpack wants a Message, isinstance checks its type
    return detail
