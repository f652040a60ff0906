"""Any message whatever: the server answers with a result or says what is wrong, and is never at fault itself."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from bundles import LATENT, SHAPE
from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass
from hypothesis import given, settings
from hypothesis import strategies as st
from latentd import tensor
from latentd.v1 import generation_service_pb2 as pb
from latentd.v1 import tensor_pb2
from live import Live

# gRPC codes that mean "you" or "not now"; INTERNAL and UNKNOWN would mean "us".
BLAMELESS = {3, 4, 5, 8, 9, 14}


@pytest.fixture(scope="module")
def live(models_root: Path) -> Iterator[Live]:
    running = Live(models_root, max_batch_rows=8, max_samples=6, max_steps=20, max_backlog=2_000)
    yield running
    running.stop()


integers = st.one_of(st.integers(-2, 12), st.sampled_from([99, 100, 2**31 - 1, -(2**31)]))
wide = st.one_of(integers, st.sampled_from([2**63 - 1, -(2**63)]))
doubles = st.one_of(st.floats(0, 1), st.floats(), st.sampled_from([0.0, 1.0, -0.0]))
texts = st.one_of(
    st.sampled_from(["ddim", "ddpm", "heun", "dpmpp-2m-sde", "plms", "\U0001f600" * 3]), st.text(max_size=8)
)
models = st.one_of(
    st.sampled_from(["tiny-vae", "tiny-gan", "tiny-diffusion", "tiny-vae@1"]),
    st.sampled_from(["", "nobody", "tiny-vae@9", "../x", "\U0001f600"]),
)
shapes = st.one_of(
    st.builds(lambda count, item: (count, *item), st.integers(0, 7), st.sampled_from([SHAPE, (LATENT,)])),
    st.lists(st.integers(0, 5), max_size=5).map(tuple),
)
arrays = st.builds(
    lambda shape, dtype, fill: tensor.encode(np.full(shape, fill).astype(dtype)),
    shapes,
    st.sampled_from([np.float32, np.float32, np.float16, np.uint8, np.int64]),
    st.sampled_from([0, 1, 3]),
)
floats = st.builds(
    lambda shape, fill: tensor.encode(np.full(shape, fill, np.float32)),
    shapes,
    st.sampled_from([np.nan, np.inf, 3e38, -0.0, 0.5]),
)
broken = st.builds(tensor_pb2.Tensor, data_type=integers, shape=st.lists(wide, max_size=4), data=st.binary(max_size=70))
tensors = st.one_of(arrays, arrays, floats, broken)


def messages(descriptor: Descriptor) -> st.SearchStrategy[Message]:
    """Messages of a type with any of its fields set to anything."""
    if descriptor.full_name == "latentd.v1.Tensor":
        return tensors
    fields = {
        field.name: (st.lists(values(field), max_size=4) if field.is_repeated else values(field))
        for field in descriptor.fields
    }
    required = {name: fields.pop(name) for name in ("model",) if name in fields}
    return st.fixed_dictionaries(required, optional=fields).map(lambda set_: GetMessageClass(descriptor)(**set_))


def values(field: FieldDescriptor) -> st.SearchStrategy[Any]:
    """Values of one field."""
    if field.name == "model":
        return models
    if field.message_type is not None:
        return messages(field.message_type)
    return {
        FieldDescriptor.TYPE_INT32: integers,
        FieldDescriptor.TYPE_INT64: wide,
        FieldDescriptor.TYPE_DOUBLE: doubles,
        FieldDescriptor.TYPE_STRING: texts,
        FieldDescriptor.TYPE_ENUM: integers,
        FieldDescriptor.TYPE_BOOL: st.booleans(),
        FieldDescriptor.TYPE_BYTES: st.binary(max_size=16),
    }[field.type]


STREAM = pb.StreamRequest.DESCRIPTOR
KINDS = [field for field in STREAM.oneofs_by_name["request"].fields if field.name not in ("cancel", "batch")]


def requests(field: FieldDescriptor) -> st.SearchStrategy[pb.StreamRequest]:
    """Requests of one kind, some of which share an id."""
    assert field.message_type is not None
    return st.builds(
        lambda request_id, message: pb.StreamRequest(id=request_id, **{field.name: message}),
        st.integers(0, 4),
        messages(field.message_type),
    )


@settings(deadline=None, max_examples=250)
@given(batch=st.lists(st.one_of([requests(field) for field in KINDS]), min_size=1, max_size=8), together=st.booleans())
def test_no_message_makes_the_server_fail(batch: list[pb.StreamRequest], together: bool, live: Live) -> None:
    """Every error is one of the caller's, with a reason; every id ends; the engine holds nothing afterwards.

    Whether the requests come one by one or several in a message.
    """
    wire = [pb.StreamRequest(batch=pb.StreamRequestBatch(requests=batch))] if together else batch
    answers = live.stream(*wire)
    for request in batch:
        responses = answers[request.id]
        assert responses[-1].final
        for response in responses:
            if response.HasField("error"):
                blamed = response.error.code in BLAMELESS or "closed its side" in response.error.message
                assert blamed, (request, response)
                assert len(response.error.details) >= 1
    assert live.unfinished == 0


CUT = pb.DecodeRequest(model="tiny-vae").SerializeToString()[:-1]


def outcome(live: Live, method: str, data: bytes) -> tuple[grpc.StatusCode, str]:
    """Send bytes as the request; how the call ended."""
    path = f"/latentd.v1.GenerationService/{method}"
    if method == "Stream":
        call = live.channel.stream_stream(path)(iter([data]), timeout=10)
    else:
        call = live.channel.unary_stream(path)(data, timeout=10)
    with contextlib.suppress(grpc.RpcError):
        list(call)
    return call.code(), call.details()


@settings(deadline=None, max_examples=60)
@given(junk=st.one_of(st.binary(max_size=100), st.just(CUT)), method=st.sampled_from(["Decode", "Score", "Stream"]))
def test_bytes_that_are_no_message_are_a_wrong_request(junk: bytes, method: str, live: Live) -> None:
    """They end their own call as a caller's fault, whatever they are."""
    assert outcome(live, method, junk)[0].value[0] in {0, *BLAMELESS}
    assert live.unfinished == 0


@pytest.mark.parametrize(("method", "kind"), [("Decode", "DecodeRequest"), ("Stream", "StreamRequest")])
def test_a_cut_message_is_named(method: str, kind: str, live: Live, caplog: pytest.LogCaptureFixture) -> None:
    """The error says which message was due, and the log holds no stack."""
    code, details = outcome(live, method, CUT)
    assert code is grpc.StatusCode.INVALID_ARGUMENT
    assert f"no latentd.v1.{kind}" in details
    assert not [record for record in caplog.records if record.levelname == "ERROR"]
