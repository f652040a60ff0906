"""`ErrorInfo.reason` values of latentd, one for each way a call can fail."""

from enum import StrEnum

DOMAIN = "latentd"
"""`ErrorInfo.domain` of every error this project sends."""


class Reason(StrEnum):
    """Why a call failed, for programs. The gRPC code says what to do about it in general."""

    FIELD_INVALID = "FIELD_INVALID"
    MODEL_NOT_FOUND = "MODEL_NOT_FOUND"
    METHOD_UNSUPPORTED = "METHOD_UNSUPPORTED"
    MODEL_LOADING = "MODEL_LOADING"
    MODEL_FAILED = "MODEL_FAILED"
    MODEL_IN_USE = "MODEL_IN_USE"
    OVERLOADED = "OVERLOADED"
    DRAINING = "DRAINING"
    QUOTA_EXCEEDED = "QUOTA_EXCEEDED"
    READER_TOO_SLOW = "READER_TOO_SLOW"
    DEADLINE_UNREACHABLE = "DEADLINE_UNREACHABLE"
    DEADLINE_EXCEEDED = "DEADLINE_EXCEEDED"
    CANCELLED = "CANCELLED"
    RUNTIME_FAILURE = "RUNTIME_FAILURE"
