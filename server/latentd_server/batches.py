"""Whether the bytes of a `StreamRequest` hold more small requests than should be parsed. Pure.

Parsed, an empty request takes some thirty times its two bytes, so a message within the limit of bytes might take
gigabytes. What is counted here is the wire format of protobuf (https://protobuf.dev/programming-guides/encoding),
one level of it, and only of messages that are large.
"""

from collections.abc import Iterator

from latentd.v1 import generation_service_pb2

LOOKED_AT_BYTES = 256 * 2**10
"""Messages up to here are parsed as they are: they take 8 MiB at most."""
MOST_REQUESTS = 16_384
"""In a batch of more bytes than that."""
_MOST_FIELDS = 64
"""Of a request; those of its type have a handful, and repeated ones replace each other."""

_BATCH = generation_service_pb2.StreamRequest.BATCH_FIELD_NUMBER
_REQUESTS = generation_service_pb2.StreamRequestBatch.REQUESTS_FIELD_NUMBER
_VARINT, _EIGHT_BYTES, _BYTES, _FOUR_BYTES = 0, 1, 2, 5


def problem(data: bytes) -> str | None:
    """What is wrong with a large `StreamRequest`, or None. Bytes that are no message are left to the parser."""
    if len(data) <= LOOKED_AT_BYTES:
        return None
    count = 0
    for fields, (number, start, stop) in enumerate(_fields(data, 0, len(data))):
        if fields >= _MOST_FIELDS:
            return f"must have at most {_MOST_FIELDS} fields"
        if number != _BATCH:
            continue
        for kind, first, last in _fields(data, start, stop):
            count += kind == _REQUESTS
            if count > MOST_REQUESTS:
                return f"must hold at most {MOST_REQUESTS} requests, in a message of more than {LOOKED_AT_BYTES} bytes"
            for own, (inner, _, _) in enumerate(_fields(data, first, last)):
                if inner == _BATCH or own >= _MOST_FIELDS:
                    return f"must hold requests of at most {_MOST_FIELDS} fields, none of which is a batch"
    return None


def _fields(data: bytes, position: int, stop: int) -> Iterator[tuple[int, int, int]]:
    """Fields of a message: number, and from where to where its value goes. Ends where the bytes make no sense."""
    while position < stop:
        tag, position = _varint(data, position, stop)
        kind, start = tag & 7, position
        if kind == _VARINT:
            _, position = _varint(data, position, stop)
        elif kind == _BYTES:
            length, start = _varint(data, position, stop)
            position = start + length
        elif kind in (_EIGHT_BYTES, _FOUR_BYTES):
            position += 8 if kind == _EIGHT_BYTES else 4
        else:
            return
        if position > stop:
            return
        yield tag >> 3, start, position


def _varint(data: bytes, position: int, stop: int) -> tuple[int, int]:
    """A number and where it ends, which is beyond `stop` where there is none."""
    value = 0
    for index in range(position, min(stop, position + 10)):
        value |= (data[index] & 0x7F) << 7 * (index - position)
        if data[index] < 0x80:
            return value, index + 1
    return value, stop + 1
