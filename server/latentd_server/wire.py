"""Messages as they travel, put together from pieces: large fields are not copied from one message into the next. Pure.

The format is protobuf's (https://protobuf.dev/programming-guides/encoding).
"""

from google.protobuf.message import Message

_BYTES = 2  # the wire type of strings of bytes, and so of messages inside others


class Written:
    """A message in pieces, which nobody has to join before it is sent."""

    __slots__ = ("pieces", "size")

    def __init__(self, pieces: list[bytes]) -> None:
        self.pieces = pieces
        self.size = sum(map(len, pieces))

    def SerializeToString(self) -> bytes:
        """Its bytes, as a message gives its own."""
        return b"".join(self.pieces)

    def ByteSize(self) -> int:
        """How many they are."""
        return self.size


def written(message: Message | Written) -> Written:
    """A message as it travels."""
    return message if isinstance(message, Written) else Written([message.SerializeToString()])


def inside(field: int, message: Written) -> list[bytes]:
    """The pieces of a field of that number which holds a message, or bytes."""
    return [opening(field, message.size), *message.pieces]


def opening(field: int, length: int) -> bytes:
    """What stands before the bytes of such a field.

    Raises:
        ValueError: its number takes more than a byte: it is above 15.
    """
    if not 0 < field < 16:
        raise ValueError(f"a field's number must be from 1 to 15 here; got {field}")
    started = bytearray((field << 3 | _BYTES,))
    while length > 0x7F:
        started.append(length & 0x7F | 0x80)
        length >>= 7
    started.append(length)
    return bytes(started)
