"""gRPC calls at a tenth of a gRPC client's CPU time, for loads that share their cores with the server they measure.

Just enough of HTTP/2 (RFC 9113) for calls that send one message and hear of their end: headers are written beforehand,
and the server is told to keep no table of headers (RFC 7541), so that those of its answers are literals.
"""

import asyncio
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from typing import cast

_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
_DATA, _HEADERS, _RESET, _SETTINGS, _PING, _GO_AWAY, _WINDOW = 0, 1, 3, 4, 6, 7, 8
_END_STREAM, _END_HEADERS, _ACK = 1, 4, 1
_TABLE_SIZE, _INITIAL_WINDOW = 1, 4
_MOST = 2**31 - 1
_POST, _HTTP, _PATH, _AUTHORITY = 3, 6, 4, 1  # in HPACK's static table
_STATIC_NAMES = 61


@dataclass(frozen=True)
class End:
    """How a call ended: the trailers that gRPC names, which are all plain text."""

    status: int
    message: str = ""
    pushback_s: float | None = None


def header_block(path: str, authority: str, headers: Iterable[tuple[str, str]]) -> bytes:
    """The headers of a call, in HPACK without a table and without Huffman codes."""
    block = bytes([0x80 | _POST, 0x80 | _HTTP])
    for name, value in ((_PATH, path), (_AUTHORITY, authority)):
        block += bytes([name]) + _text(value)
    for key, value in (("content-type", "application/grpc"), ("te", "trailers"), *headers):
        block += b"\0" + _text(key) + _text(value)
    return block


def _text(value: str) -> bytes:
    if len(value) >= 127:
        raise ValueError(f"headers of this client are shorter than 127 bytes; got {value!r}")
    return bytes([len(value)]) + value.encode()


def message(data: bytes) -> bytes:
    """A message as gRPC frames it."""
    return struct.pack(">BI", 0, len(data)) + data


def _frame(kind: int, flags: int, stream: int, payload: bytes = b"") -> bytes:
    return struct.pack(">IBI", len(payload) << 8 | kind, flags, stream) + payload


class Connection(asyncio.Protocol):
    """One connection; `call` as often as the server's limit on streams allows."""

    def __init__(self) -> None:
        self._buffer = bytearray()
        self._next = 1
        self._calls: dict[int, asyncio.Future[End]] = {}
        self._unacknowledged = 0  # bytes of data

    @classmethod
    async def open(cls, target: str) -> "Connection":
        """Connect to HOST:PORT."""
        host, _, port = target.rpartition(":")
        _, connection = await asyncio.get_running_loop().create_connection(cls, host, int(port))
        return connection

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Say hello."""
        self._transport = cast(asyncio.Transport, transport)
        settings = struct.pack(">HIHI", _TABLE_SIZE, 0, _INITIAL_WINDOW, _MOST)
        window = _frame(_WINDOW, 0, 0, struct.pack(">I", _MOST - 65535))
        self._transport.write(_PREFACE + _frame(_SETTINGS, 0, 0, settings) + window)

    def call(self, headers: bytes, body: bytes) -> "asyncio.Future[End]":
        """One call: a header block and a framed message."""
        stream, self._next = self._next, self._next + 2
        end = self._calls[stream] = asyncio.get_running_loop().create_future()
        self._transport.write(
            _frame(_HEADERS, _END_HEADERS, stream, headers) + _frame(_DATA, _END_STREAM, stream, body)
        )
        return end

    def close(self) -> None:
        """Hang up."""
        self._transport.close()

    def connection_lost(self, error: Exception | None) -> None:
        """What is under way has failed."""
        for stream in list(self._calls):
            self._end(stream, End(14, "the connection was lost"))

    def data_received(self, data: bytes) -> None:
        """Take in whole frames."""
        self._buffer += data
        position = 0
        while len(self._buffer) - position >= 9:
            first, flags, stream = struct.unpack_from(">IBI", self._buffer, position)
            stop = position + 9 + (first >> 8)
            if len(self._buffer) < stop:
                break
            self._take(first & 0xFF, flags, stream, bytes(self._buffer[position + 9 : stop]))
            position = stop
        del self._buffer[:position]

    def _take(self, kind: int, flags: int, stream: int, payload: bytes) -> None:
        if kind == _DATA:
            self._unacknowledged += len(payload)
            if self._unacknowledged > 2**20:
                self._transport.write(_frame(_WINDOW, 0, 0, struct.pack(">I", self._unacknowledged)))
                self._unacknowledged = 0
        elif kind == _HEADERS:
            if not flags & _END_HEADERS:
                raise RuntimeError("this client reads headers of one frame only, and the server sent more")
            if flags & _END_STREAM:
                self._end(stream, _read_end(payload))
        elif kind == _RESET:
            self._end(stream, End(1, "reset"))
        elif kind == _SETTINGS and not flags & _ACK:
            self._transport.write(_frame(_SETTINGS, _ACK, 0))
        elif kind == _PING and not flags & _ACK:
            self._transport.write(_frame(_PING, _ACK, 0, payload))
        elif kind == _GO_AWAY:
            self._transport.close()

    def _end(self, stream: int, end: End) -> None:
        call = self._calls.pop(stream, None)
        if call is not None and not call.done():
            call.set_result(end)


def _read_end(block: bytes) -> End:
    headers = dict(_literals(block))
    pushback = headers.get(b"grpc-retry-pushback-ms")
    return End(
        int(headers.get(b"grpc-status", b"2")),
        headers.get(b"grpc-message", b"").decode(),
        None if pushback is None else int(pushback) / 1e3,
    )


def _literals(block: bytes) -> Iterable[tuple[bytes, bytes]]:
    """Headers whose names are literals, which those of gRPC are; Huffman codes are left as they are."""
    position = 0
    while position < len(block):
        first = block[position]
        if first & 0x80:  # wholly from the static table
            _, position = _integer(block, position, 7)
            continue
        if first & 0xE0 == 0x20:  # a size of the table, which is 0
            _, position = _integer(block, position, 5)
            continue
        index, position = _integer(block, position, 6 if first & 0x40 else 4)
        name = b""
        if not index:
            name, position = _string(block, position)
        elif index > _STATIC_NAMES:
            raise ValueError("the server keeps a table of headers, though it was told not to")
        value, position = _string(block, position)
        if name:
            yield name, value


def _string(block: bytes, position: int) -> tuple[bytes, int]:
    length, position = _integer(block, position, 7)
    return block[position : position + length], position + length


def _integer(block: bytes, position: int, bits: int) -> tuple[int, int]:
    most = (1 << bits) - 1
    value = block[position] & most
    position += 1
    if value < most:
        return value, position
    shift = 0
    while True:
        byte = block[position]
        position += 1
        value += (byte & 0x7F) << shift
        shift += 7
        if not byte & 0x80:
            return value, position
