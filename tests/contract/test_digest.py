"""The digest of a bundle: everything that can change a served byte, and nothing else."""

import hashlib
from collections.abc import Iterator

import pytest
from google.protobuf import json_format, text_format
from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.message import Message
from latentd.digest import bundle_digest
from latentd.v1 import bundle_pb2

NOT_IDENTITY = {"model.card", "model.digest", "model.state", "model.failure_reason", "model.determinism"}
"""What a digest leaves out: words for people, itself, and what the server fills in."""


def fill(message: Message, depth: int = 0) -> Message:
    """Set every field of `message`, and of those inside it, to something other than its default."""
    for number, field in enumerate(message.DESCRIPTOR.fields, start=2 + depth):
        if field.message_type and field.message_type.GetOptions().map_entry:
            getattr(message, field.name)["metric"] = float(number)
        elif field.message_type:
            inner = getattr(message, field.name)
            fill(inner.add() if field.is_repeated else inner, depth + 1)
        elif field.is_repeated:
            getattr(message, field.name).append(value(field, number))
        else:
            setattr(message, field.name, value(field, number))
    return message


def value(field: FieldDescriptor, number: int) -> object:
    """A value of the field's type that differs from its default and, for another `number`, from itself."""
    match field.cpp_type:
        case FieldDescriptor.CPPTYPE_STRING:
            return f"text {number}"
        case FieldDescriptor.CPPTYPE_DOUBLE:
            return number / 8
        case FieldDescriptor.CPPTYPE_BOOL:
            return number % 2 == 0
        case FieldDescriptor.CPPTYPE_ENUM:
            return 1 + number % (len(field.enum_type.values) - 1)
        case _:
            return number


def leaves(descriptor: Descriptor, path: str = "") -> Iterator[str]:
    """Paths of all fields below `descriptor` that hold no message of ours; a card counts as one."""
    for field in descriptor.fields:
        inner = path + field.name
        if field.message_type and inner not in NOT_IDENTITY:
            yield from leaves(field.message_type, f"{inner}.")
        else:
            yield inner


def change(bundle: bundle_pb2.Bundle, path: str) -> None:
    """Give the field at `path`, in the first item of repeated messages, another value."""
    *parents, name = path.split(".")
    message: Message = bundle
    for parent in parents:
        inner = getattr(message, parent)
        message = inner[0] if message.DESCRIPTOR.fields_by_name[parent].is_repeated else inner
    field = message.DESCRIPTOR.fields_by_name[name]
    if field.message_type or field.is_repeated:
        message.ClearField(name)
    elif field.cpp_type == FieldDescriptor.CPPTYPE_BOOL:
        setattr(message, name, not getattr(message, name))
    elif field.cpp_type == FieldDescriptor.CPPTYPE_ENUM:
        setattr(message, name, 0)
    else:
        setattr(message, name, value(field, 99))


@pytest.fixture
def bundle() -> bundle_pb2.Bundle:
    """A bundle in which every field there is is set."""
    full = bundle_pb2.Bundle()
    fill(full)
    return full


@pytest.mark.parametrize("path", sorted(set(leaves(bundle_pb2.Bundle.DESCRIPTOR)) - NOT_IDENTITY))
def test_every_field_that_can_change_a_byte_changes_the_digest(bundle: bundle_pb2.Bundle, path: str) -> None:
    """Each field of a bundle but those left out on purpose is part of its identity, new ones included."""
    before = bundle_digest(bundle)
    change(bundle, path)
    assert bundle_digest(bundle) != before


@pytest.mark.parametrize("path", sorted(NOT_IDENTITY))
def test_what_describes_a_bundle_does_not_change_its_digest(bundle: bundle_pb2.Bundle, path: str) -> None:
    """Evaluation results, the digest itself and the server's own fields leave the identity alone."""
    before = bundle_digest(bundle)
    change(bundle, path)
    assert bundle_digest(bundle) == before


def test_the_order_of_lists_is_part_of_the_identity(bundle: bundle_pb2.Bundle) -> None:
    """Class names in another order mean other labels, so another digest."""
    bundle.model.class_names[:] = ["zero", "one"]
    before = bundle_digest(bundle)
    bundle.model.class_names[:] = ["one", "zero"]
    assert bundle_digest(bundle) != before


def test_the_digest_survives_the_trip_through_bundle_json(bundle: bundle_pb2.Bundle) -> None:
    """Writing a bundle as JSON or text and reading it back keeps the digest, to the last bit of every number."""
    bundle.model.diffusion.alphas[:] = [0.1 + 0.2, 1 / 3, 1e-300]
    before = bundle_digest(bundle)
    assert bundle_digest(json_format.Parse(json_format.MessageToJson(bundle), bundle_pb2.Bundle())) == before
    assert bundle_digest(text_format.Parse(text_format.MessageToString(bundle), bundle_pb2.Bundle())) == before


def test_the_digest_does_not_touch_the_bundle(bundle: bundle_pb2.Bundle) -> None:
    """Computing a digest changes nothing in the message it is computed from."""
    before = bundle.SerializeToString(deterministic=True)
    bundle_digest(bundle)
    assert bundle.SerializeToString(deterministic=True) == before


def test_a_known_digest() -> None:
    """The recipe is pinned (sha256 of compact JSON with sorted keys): another would disown every published model."""
    network = bundle_pb2.Network(role=bundle_pb2.Network.ROLE_DECODER, file="decoder.onnx", sha256="0" * 64)
    bundle = bundle_pb2.Bundle(format_version=1, networks=[network])
    bundle.model.name = "tiny@1"
    text = (
        '{"formatVersion":1,"model":{"name":"tiny@1"},'
        f'"networks":[{{"file":"decoder.onnx","role":"ROLE_DECODER","sha256":"{"0" * 64}"}}]}}'
    )
    assert bundle_digest(bundle) == "sha256:" + hashlib.sha256(text.encode()).hexdigest()
