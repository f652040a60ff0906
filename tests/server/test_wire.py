"""Messages that are put together from pieces are those that protobuf would write."""

import pytest
from latentd.v1 import generation_service_pb2 as pb
from latentd.v1 import tensor_pb2
from latentd_server import wire
from latentd_server.wire import Written


@pytest.mark.parametrize("length", [0, 1, 127, 128, 16_383, 16_384, 2_097_152])
def test_a_field_of_any_length_is_read_as_it_was_written(length: int) -> None:
    """Lengths take one byte more at every seventh bit."""
    data = bytes(length)
    pieces = wire.inside(tensor_pb2.Tensor.DATA_FIELD_NUMBER, Written([data]))
    assert b"".join(pieces) == tensor_pb2.Tensor(data=data).SerializeToString() or not length
    assert tensor_pb2.Tensor.FromString(b"".join(pieces)).data == data


def test_a_message_can_be_put_inside_another_again_and_again() -> None:
    """Three levels deep, beside what the outer ones say themselves."""
    tensor = tensor_pb2.Tensor(data_type=1, shape=[2], data=bytes(200))
    decode = Written(wire.inside(pb.DecodeResponse.SAMPLES_FIELD_NUMBER, wire.written(tensor)))
    around = pb.StreamResponse(id=7, final=True).SerializeToString()
    whole = Written([around, *wire.inside(pb.StreamResponse.DECODE_FIELD_NUMBER, decode)])
    said = pb.StreamResponse(id=7, final=True, decode=pb.DecodeResponse(samples=tensor))
    assert whole.SerializeToString() == said.SerializeToString()
    assert whole.ByteSize() == said.ByteSize() == whole.size
    assert wire.written(whole) is whole
