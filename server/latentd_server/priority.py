"""Priorities: three classes that share a device by weight. Pure."""

from enum import IntEnum

from latentd.names import PRIORITIES, PRIORITY_KEY
from latentd.v1 import generation_service_pb2

from latentd_server.failures import FieldsInvalidError, Violation


class Priority(IntEnum):
    """The classes, by the numbers they have on the wire."""

    HIGH = generation_service_pb2.PRIORITY_HIGH
    NORMAL = generation_service_pb2.PRIORITY_NORMAL
    LOW = generation_service_pb2.PRIORITY_LOW

    @property
    def weight(self) -> int:
        """Its part of what is contended: of the device's time, and of the rows of a batch."""
        return _WEIGHTS[self]


_WEIGHTS = {Priority.HIGH: 16, Priority.NORMAL: 4, Priority.LOW: 1}


def of_metadata(text: str) -> Priority:
    """The class that a call's metadata names; NORMAL if they name none.

    Raises:
        FieldsInvalidError: there is no such class.
    """
    if not text:
        return Priority.NORMAL
    if text not in PRIORITIES:
        raise FieldsInvalidError(
            [Violation(PRIORITY_KEY, f"must be one of {', '.join(PRIORITIES)}; got {text[:64]!r}")]
        )
    return Priority[text.upper()]


def of_field(value: int) -> Priority | None:
    """The class in a message's field; None if it holds none.

    Raises:
        FieldsInvalidError: this version knows no such class.
    """
    if value == generation_service_pb2.PRIORITY_UNSPECIFIED:
        return None
    if value not in _WEIGHTS:
        allowed = ", ".join(f"PRIORITY_{priority.name}" for priority in Priority)
        raise FieldsInvalidError([Violation("priority", f"must be one of {allowed}; got {value}")])
    return Priority(value)
