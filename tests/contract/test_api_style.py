"""Rules for the API's shape that buf's linter does not know, checked on the descriptors of every file."""

import importlib
import pkgutil
from collections.abc import Iterator

import latentd.v1
import pytest
from google.protobuf import descriptor_pb2, descriptor_pool, text_format
from google.protobuf.descriptor import Descriptor, EnumDescriptor, FieldDescriptor, FileDescriptor

FILES: list[FileDescriptor] = [
    importlib.import_module(f"latentd.v1.{module.name}").DESCRIPTOR
    for module in pkgutil.iter_modules(latentd.v1.__path__)
    if module.name.endswith("_pb2")
]

UNSIGNED = {
    FieldDescriptor.TYPE_UINT32,
    FieldDescriptor.TYPE_UINT64,
    FieldDescriptor.TYPE_FIXED32,
    FieldDescriptor.TYPE_FIXED64,
}
UNITS_OF_TIME = ("_s", "_ms", "_us", "_ns", "_seconds", "_millis")


def messages(file: FileDescriptor) -> Iterator[Descriptor]:
    """Every message of a file, nested ones included; map entries are the compiler's, not ours."""
    waiting = list(file.message_types_by_name.values())
    while waiting:
        message = waiting.pop()
        waiting += message.nested_types
        if not message.GetOptions().map_entry:
            yield message


def enums(file: FileDescriptor) -> Iterator[EnumDescriptor]:
    """Every enum of a file, nested ones included."""
    yield from file.enum_types_by_name.values()
    for message in messages(file):
        yield from message.enum_types


def field_violations(field: FieldDescriptor) -> Iterator[str]:
    """What is wrong with one field."""
    if field.type in UNSIGNED:
        yield f"{field.full_name} is unsigned, which Java and JavaScript do not have"
    if field.type == FieldDescriptor.TYPE_FLOAT:
        yield f"{field.full_name} is a float; numbers outside tensors are double, so that nothing is rounded twice"
    if field.name.endswith(UNITS_OF_TIME):
        yield f"{field.full_name} counts time in a number; use google.protobuf.Duration"
    if field.name.endswith("_count") and field.type != FieldDescriptor.TYPE_INT32:
        yield f"{field.full_name} is a count and not int32"
    kind = field.message_type.full_name if field.message_type else ""
    if kind == "google.protobuf.Duration" and not field.name.endswith(("duration", "timeout")):
        yield f"{field.full_name} is a Duration and its name does not say so"
    if kind == "google.protobuf.Timestamp" and not field.name.endswith("_time"):
        yield f"{field.full_name} is a Timestamp and is not named *_time"


def gaps(message: Descriptor) -> list[int]:
    """Field numbers below the highest that are neither in use nor reserved."""
    definition = descriptor_pb2.DescriptorProto()
    message.CopyToProto(definition)
    taken = {field.number for field in message.fields}
    for reserved in definition.reserved_range:
        taken |= set(range(reserved.start, reserved.end))
    return sorted(set(range(1, max(taken, default=0))) - taken)


def violations(files: list[FileDescriptor]) -> Iterator[str]:
    """Everything in these files that breaks a rule."""
    used: dict[str, str] = {}
    for file in files:
        for message in messages(file):
            if missing := gaps(message):
                yield f"{message.full_name} skips field numbers {missing} without reserving them"
            for field in message.fields:
                yield from field_violations(field)
        for enum in enums(file):
            zero = enum.values_by_number.get(0)
            if zero is None or not zero.name.endswith("_UNSPECIFIED"):
                yield f"{enum.full_name} has no value *_UNSPECIFIED = 0"
        for service in file.services_by_name.values():
            for method in service.methods:
                for message, suffix in ((method.input_type, "Request"), (method.output_type, "Response")):
                    if message.name != f"{method.name}{suffix}":
                        yield f"{method.full_name} exchanges {message.name}, not {method.name}{suffix}"
                    if used.setdefault(message.full_name, method.full_name) != method.full_name:
                        yield f"{message.full_name} belongs to {used[message.full_name]} and to {method.full_name}"
                safe = method.GetOptions().idempotency_level
                if not method.client_streaming and safe == descriptor_pb2.MethodOptions.IDEMPOTENCY_UNKNOWN:
                    yield f"{method.full_name} does not say whether it may be retried (idempotency_level)"


def test_the_api_follows_its_rules() -> None:
    """No enum without UNSPECIFIED, no unsigned number, no shared request, no untyped time, in any file of the API."""
    assert len(FILES) >= 6
    assert list(violations(FILES)) == []


def message_with(field: str) -> str:
    """A message with one field, in the text form of descriptors."""
    return f'message_type {{ name: "M" field {{ {field} }} }}'


GET = 'message_type { name: "GetRequest" } message_type { name: "GetResponse" }'
GETTER = 'method { name: "Get" input_type: ".planted.GetRequest" output_type: ".planted.GetResponse" }'

PLANTED = [
    ("n is unsigned", message_with('name: "n" number: 1 type: TYPE_UINT64')),
    ("n is a float", message_with('name: "n" number: 1 type: TYPE_FLOAT')),
    ("use google.protobuf.Duration", message_with('name: "wait_ms" number: 1 type: TYPE_INT64')),
    ("is a count", message_with('name: "step_count" number: 1 type: TYPE_INT64')),
    (
        "is a Duration",
        message_with('name: "wait" number: 1 type: TYPE_MESSAGE type_name: ".google.protobuf.Duration"'),
    ),
    (
        "is a Timestamp",
        message_with('name: "born" number: 1 type: TYPE_MESSAGE type_name: ".google.protobuf.Timestamp"'),
    ),
    ("skips field numbers [1]", message_with('name: "n" number: 2 type: TYPE_INT64')),
    (
        "N.n is unsigned",
        'message_type { name: "M" nested_type { name: "N" field { name: "n" number: 1 type: TYPE_FIXED32 } } }',
    ),
    ("E has no value", 'message_type { name: "M" enum_type { name: "E" value { name: "E_FIRST" number: 0 } } }'),
    ("GetRequest, not ListRequest", f'{GET} service {{ name: "S" {GETTER.replace("Get", "List", 1)} }}'),
    ("belongs to", f'{GET} service {{ name: "S" {GETTER} }} service {{ name: "T" {GETTER} }}'),
    ("may be retried", f'{GET} service {{ name: "S" {GETTER} }}'),
]


@pytest.mark.parametrize(("complaint", "planted"), PLANTED, ids=[complaint for complaint, _ in PLANTED])
def test_a_planted_violation_is_found(complaint: str, planted: str) -> None:
    """Each rule catches the file that breaks it."""
    file = text_format.Parse(planted, descriptor_pb2.FileDescriptorProto())
    file.name, file.package, file.syntax = "planted.proto", "planted", "proto3"
    file.dependency.extend(["google/protobuf/duration.proto", "google/protobuf/timestamp.proto"])
    pool = descriptor_pool.DescriptorPool()
    for dependency in file.dependency:
        known = descriptor_pb2.FileDescriptorProto()
        descriptor_pool.Default().FindFileByName(dependency).CopyToProto(known)
        pool.Add(known)
    pool.Add(file)
    assert any(complaint in found for found in violations([pool.FindFileByName("planted.proto")]))
