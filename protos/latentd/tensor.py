"""`Tensor` <-> `numpy.ndarray`: the only codec, used at both ends of the wire.

Elements travel raw: row-major, little-endian, no padding, no header.
"""

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from latentd.v1 import tensor_pb2

DTYPES: "dict[tensor_pb2.DataType.ValueType, np.dtype[Any]]" = {
    tensor_pb2.DATA_TYPE_FLOAT32: np.dtype("<f4"),
    tensor_pb2.DATA_TYPE_FLOAT16: np.dtype("<f2"),
    tensor_pb2.DATA_TYPE_UINT8: np.dtype("u1"),
    tensor_pb2.DATA_TYPE_INT64: np.dtype("<i8"),
}
"""Every element type of the wire and the numpy type it is."""

_DATA_TYPES = {dtype: data_type for data_type, dtype in DTYPES.items()}
_MAX_RANK = 32
_MAX_BYTES = 2**31 - 1  # a protobuf message cannot hold more


class TensorError(ValueError):
    """A `Tensor` that contradicts itself, or an array that no `Tensor` can hold.

    `path` names the offending field, e.g. `samples.shape[1]`; `description` says what is allowed.
    """

    def __init__(self, path: str, description: str) -> None:
        super().__init__(f"{path}: {description}")
        self.path = path
        self.description = description


def encode(array: NDArray[Any], path: str = "tensor") -> tensor_pb2.Tensor:
    """Pack an array of any supported type and layout.

    Raises:
        TensorError: the element type has no place in `DataType`, or the array is over 2 GiB.
    """
    tensor = tensor_pb2.Tensor()
    pack(array, tensor, path)
    return tensor


def pack(array: NDArray[Any], into: tensor_pb2.Tensor, path: str = "tensor") -> None:
    """As `encode`, into an empty `Tensor` where it stands in its message, which spares a copy.

    Raises:
        TensorError: as `encode`.
    """
    dtype = describe(array.dtype, array.shape, into, path)
    into.data = array.astype(dtype, copy=False).tobytes()


def describe(
    dtype: "np.dtype[Any]", shape: tuple[int, ...], into: tensor_pb2.Tensor, path: str = "tensor"
) -> "np.dtype[Any]":
    """Fill in all of an empty `Tensor` but its data: the bytes of such an array, as the type that is returned.

    Raises:
        TensorError: as `encode`.
    """
    given = dtype
    data_type = _DATA_TYPES.get(dtype)
    if data_type is None:  # or in the other byte order
        dtype = dtype.newbyteorder("<")
        data_type = _DATA_TYPES.get(dtype)
    if data_type is None:
        raise TensorError(path, f"element type {given} is none of {_allowed()}")
    if (span := _span(shape, dtype)) > _MAX_BYTES:
        raise TensorError(path, f"spans {span} bytes; a message holds at most {_MAX_BYTES}")
    into.data_type = data_type
    into.shape.extend(shape)
    return dtype


def decode(tensor: tensor_pb2.Tensor, path: str = "tensor") -> NDArray[Any]:
    """Unpack a `Tensor` into a read-only array that shares its bytes.

    Raises:
        TensorError: unknown type, negative or overflowing shape, or a byte count that does not match.
    """
    dtype = DTYPES.get(tensor.data_type)
    if dtype is None:
        raise TensorError(f"{path}.data_type", f"must be one of {_allowed()}, got {tensor.data_type}")
    shape = tuple(tensor.shape)
    if len(shape) > _MAX_RANK:
        raise TensorError(f"{path}.shape", f"must have at most {_MAX_RANK} axes, got {len(shape)}")
    if shape and min(shape) < 0:
        axis = next(axis for axis, extent in enumerate(shape) if extent < 0)
        raise TensorError(f"{path}.shape[{axis}]", f"must not be negative, got {shape[axis]}")
    expected = math.prod(shape) * dtype.itemsize
    if (span := expected or _span(shape, dtype)) > _MAX_BYTES:
        raise TensorError(
            f"{path}.shape", f"{list(shape)} of {dtype.name} overflows: {span} bytes, at most {_MAX_BYTES}"
        )
    data = tensor.data  # each access of a bytes field copies it
    if len(data) != expected:
        raise TensorError(
            f"{path}.data",
            f"must hold {expected} bytes for shape {list(shape)} of {dtype.name}, got {len(data)}",
        )
    return np.frombuffer(data, dtype).reshape(shape)


def _span(shape: tuple[int, ...], dtype: "np.dtype[Any]") -> int:
    """Bytes of an array, its empty axes counted as 1: numpy bounds the extents of empty arrays too."""
    return math.prod(max(extent, 1) for extent in shape) * dtype.itemsize


def _allowed() -> str:
    names = (tensor_pb2.DataType.Name(data_type) for data_type in DTYPES)
    return ", ".join(name.removeprefix("DATA_TYPE_") for name in names)
