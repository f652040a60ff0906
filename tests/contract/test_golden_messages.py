"""Messages written down once must mean the same for ever.

`golden/NAME.txtpb` says what `golden/NAME.binpb` holds. protoc wrote the bytes, not the Python runtime:

    protoc -I protos --encode=latentd.v1.Bundle latentd/v1/bundle.proto < bundle.txtpb > bundle.binpb

New files may be added; an old one that no longer passes means that the contract broke.
"""

from pathlib import Path

import pytest
from google.protobuf import descriptor_pool, json_format, message_factory, text_format
from google.protobuf.message import Message
from google.protobuf.unknown_fields import UnknownFieldSet
from latentd.v1 import bundle_pb2, generation_service_pb2

TEXTS = sorted((Path(__file__).parent / "golden").glob("*.txtpb"))
FILES = (bundle_pb2.DESCRIPTOR, generation_service_pb2.DESCRIPTOR)  # loading them makes the messages known


def message_class(text: str) -> type[Message]:
    """The class of the message that the header of a golden text names."""
    name = text.split("# proto-message: ")[1].splitlines()[0]
    return message_factory.GetMessageClass(descriptor_pool.Default().FindMessageTypeByName(name))


@pytest.mark.parametrize("path", TEXTS, ids=lambda path: path.stem)
def test_old_bytes_mean_what_they_meant(path: Path) -> None:
    """The bytes parse to the message of the text, with no field unknown, and are written again as they were."""
    text, data = path.read_text(), path.with_suffix(".binpb").read_bytes()
    message = message_class(text).FromString(data)
    assert message == text_format.Parse(text, message_class(text)())
    assert len(UnknownFieldSet(message)) == 0
    assert message.SerializeToString(deterministic=True) == data


@pytest.mark.parametrize("path", TEXTS, ids=lambda path: path.stem)
def test_json_carries_every_message(path: Path) -> None:
    """JSON, the form of `bundle.json`, loses nothing of it."""
    text = path.read_text()
    message = text_format.Parse(text, message_class(text)())
    assert json_format.Parse(json_format.MessageToJson(message), message_class(text)()) == message


def test_there_are_golden_messages() -> None:
    """Every text has its bytes and every bytes their text, so that no file is forgotten."""
    assert len(TEXTS) >= 7
    assert {path.stem for path in TEXTS} == {path.stem for path in TEXTS[0].parent.glob("*.binpb")}
