"""The tensor codec: what goes in comes out, and what contradicts itself is refused with the path of the field."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from latentd import tensor
from latentd.v1 import tensor_pb2
from numpy.typing import NDArray

FLOAT32 = tensor_pb2.DATA_TYPE_FLOAT32
SHAPES = hnp.array_shapes(min_dims=0, max_dims=5, min_side=0, max_side=4)
ARRAYS = st.sampled_from(sorted(tensor.DTYPES.values(), key=str)).flatmap(lambda dtype: hnp.arrays(dtype, SHAPES))
NATIVE_TYPES = hnp.arrays(
    st.sampled_from([np.dtype(f"{order}{kind}") for order in "<>" for kind in ("f4", "f2", "i8")]), SHAPES
)


@given(ARRAYS)
def test_round_trip_keeps_every_byte(array: NDArray) -> None:
    """Any array of a supported type comes back with its type, shape and bytes, NaN payloads included."""
    message = tensor_pb2.Tensor.FromString(tensor.encode(array).SerializeToString())
    back = tensor.decode(message)
    assert back.dtype == array.dtype
    assert back.shape == array.shape
    assert back.tobytes() == array.tobytes()


@given(NATIVE_TYPES)
def test_the_wire_is_little_endian_whatever_the_memory_is(array: NDArray) -> None:
    """A big-endian array travels as the same numbers, least significant byte first."""
    wire = tensor.encode(array).data
    assert wire == array.astype(array.dtype.newbyteorder("<")).tobytes()


def test_known_bytes() -> None:
    """The layout is row-major, unpadded and without a header, so other languages can write it."""
    message = tensor.encode(np.array([[1, 2], [3, -1]], np.int64))
    assert message.data_type == tensor_pb2.DATA_TYPE_INT64
    assert list(message.shape) == [2, 2]
    assert message.data.hex() == "010000000000000002000000000000000300000000000000ffffffffffffffff"


@given(hnp.arrays(np.float32, hnp.array_shapes(min_dims=2, max_dims=4)), st.randoms(use_true_random=False))
def test_memory_layout_does_not_matter(array: NDArray, random) -> None:
    """Transposed and strided views travel as what they show."""
    axes = list(range(array.ndim))
    random.shuffle(axes)
    view = array.transpose(axes)[::-1, ::2]
    np.testing.assert_array_equal(tensor.decode(tensor.encode(view)), view)


def test_a_decoded_array_is_read_only() -> None:
    """Decoding shares the message's bytes, so nobody may write to them."""
    array = tensor.decode(tensor.encode(np.zeros(3, np.float32)))
    with pytest.raises(ValueError, match="read-only"):
        array[0] = 1


@given(ARRAYS, st.integers(min_value=-9, max_value=9).filter(bool))
def test_a_wrong_byte_count_is_refused(array: NDArray, change: int) -> None:
    """Bytes too few or too many are refused, naming the field, both counts and the shape."""
    message = tensor.encode(array)
    data = message.data[:change] if change < 0 else message.data + bytes(change)
    if len(data) == array.nbytes:
        return  # nothing to cut from an empty array
    message.data = data
    with pytest.raises(tensor.TensorError) as caught:
        tensor.decode(message, "samples")
    assert caught.value.path == "samples.data"
    assert f"must hold {array.nbytes} bytes" in caught.value.description
    assert caught.value.description.endswith(f"got {len(data)}")


@pytest.mark.parametrize(
    ("message", "path", "said"),
    [
        (tensor_pb2.Tensor(), "x.data_type", "one of FLOAT32, FLOAT16, UINT8, INT64"),
        (tensor_pb2.Tensor(data_type=99), "x.data_type", "got 99"),  # type: ignore[arg-type]  # a newer peer's type
        (tensor_pb2.Tensor(data_type=FLOAT32, shape=[2, -3], data=bytes(24)), "x.shape[1]", "got -3"),
        (tensor_pb2.Tensor(data_type=FLOAT32, shape=[-2, -3], data=bytes(24)), "x.shape[0]", "got -2"),
        (tensor_pb2.Tensor(data_type=FLOAT32, shape=[2**62, 2**62]), "x.shape", "overflows"),
        (tensor_pb2.Tensor(data_type=FLOAT32, shape=[2**29]), "x.shape", "at most 2147483647"),
        (tensor_pb2.Tensor(data_type=FLOAT32, shape=[0, 2**31, 2**31]), "x.shape", "overflows"),
        (tensor_pb2.Tensor(data_type=FLOAT32, shape=[1] * 33, data=bytes(4)), "x.shape", "at most 32 axes, got 33"),
        (tensor_pb2.Tensor(data_type=FLOAT32, data=b""), "x.data", "must hold 4 bytes for shape []"),
    ],
)
def test_a_contradiction_is_refused_with_its_path(message: tensor_pb2.Tensor, path: str, said: str) -> None:
    """Unknown types, negative, overflowing and too many extents are refused before any memory is taken."""
    with pytest.raises(tensor.TensorError) as caught:
        tensor.decode(message, "x")
    assert caught.value.path == path
    assert said in caught.value.description


@pytest.mark.parametrize("dtype", ["f8", "i4", "u2", "c8", "?", "U3", "O"])
def test_an_array_without_a_place_on_the_wire_is_refused(dtype: str) -> None:
    """The codec never converts: a type the wire does not have is an error that lists those it has."""
    with pytest.raises(tensor.TensorError, match="none of FLOAT32, FLOAT16, UINT8, INT64") as caught:
        tensor.encode(np.zeros(2, dtype), "start.samples")
    assert caught.value.path == "start.samples"


def test_an_array_too_large_for_a_message_is_refused() -> None:
    """2 GiB do not fit in a protobuf message; the array (here a broadcast view of 4 bytes) is refused uncopied."""
    huge = np.broadcast_to(np.float32(0), (2**29,))
    with pytest.raises(tensor.TensorError, match="spans 2147483648 bytes"):
        tensor.encode(huge)


@given(
    st.builds(
        tensor_pb2.Tensor,
        data_type=st.integers(0, 6),
        shape=st.lists(st.integers(-(2**63), 2**63 - 1) | st.integers(-1, 4), max_size=5),
        data=st.binary(max_size=64),
    )
)
def test_any_message_is_decoded_or_refused(message: tensor_pb2.Tensor) -> None:
    """No tensor off the wire, however wrong, raises anything but a TensorError whose path is inside it."""
    try:
        outcome = tensor.decode(message, "t").nbytes
    except tensor.TensorError as error:
        outcome = error.path.partition(".")[0]
    assert outcome in (len(message.data), "t")
