"""Checks of request fields. Pure. Every violation is collected, so that the caller hears of all of them at once."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import numpy as np
from google.protobuf.message import Message
from latentd import tensor as codec
from latentd.v1 import generation_service_pb2, tensor_pb2
from numpy.typing import NDArray

from latentd_server.failures import FieldsInvalidError, Violation
from latentd_server.plans import OutputForm, Range
from latentd_server.sizes import Size, text
from latentd_server.wiring import Graph, Source, Wiring

Condition = generation_service_pb2.Condition

MAX_INT32 = 2**31 - 1

_MOST_LISTED = 64
"""Violations that one list of values may add; the rest are counted, since a message may bring millions."""

_PIXELS = tensor_pb2.DATA_TYPE_UINT8
_FLOATS = (tensor_pb2.DATA_TYPE_FLOAT32, tensor_pb2.DATA_TYPE_FLOAT16)


def has_label(condition: Condition) -> bool:
    """Whether a class label is given, in either way."""
    return condition.HasField("class_label") or len(condition.class_labels) > 0


def quoted(text: str, limit: int = 60) -> str:
    """A caller's text, safe to repeat in an error: ASCII, and short."""
    return ascii(text if len(text) <= limit else text[:limit] + "...")


@dataclass(slots=True)
class Fields:
    """The violations found so far in one request. Checks return None where they found one."""

    violations: list[Violation] = field(default_factory=list)

    def reject(self, path: str, description: str) -> None:
        """Note a violation."""
        self.violations.append(Violation(path, description))

    def check(self) -> None:
        """Stop here if anything was wrong.

        Raises:
            FieldsInvalidError: lists every violation.
        """
        if self.violations:
            raise self.error()

    def error(self) -> FieldsInvalidError:
        """What `check` raises."""
        return FieldsInvalidError(self.violations)

    def integer(self, value: int, path: str, low: int, high: int, default: int | None = None) -> int | None:
        """An integer from `low` to `high`; 0 stands for `default` where there is one."""
        if default is not None and value == 0:
            return default
        if low <= value <= high:
            return value
        zero = "" if default is None or low <= 0 else f", or 0 for {default}"
        self.reject(path, f"must be from {low} to {high}{zero}; got {value}")
        return None

    def integers(self, values: Sequence[int], path: str, low: int, high: int) -> NDArray[np.int64]:
        """A list of integers from `low` to `high`, [n] i64; returned whether or not they all are."""
        array = np.array(values, np.int64)
        wrong = np.flatnonzero((array < low) | (array > high))
        for index in wrong[:_MOST_LISTED].tolist():
            self.integer(int(array[index]), f"{path}[{index}]", low, high)
        if len(wrong) > _MOST_LISTED:
            self.reject(path, f"{len(wrong) - _MOST_LISTED} more values are not from {low} to {high}")
        return array

    def number(self, value: float, path: str, low: float, high: float) -> float | None:
        """A finite number from `low` to `high`."""
        if low <= value <= high:
            return value
        self.reject(path, f"must be a number from {low:g} to {high:g}; got {value:g}")
        return None

    def absent(self, message: Message, names: Sequence[str], prefix: str, why: str) -> None:
        """Fields of `message` that mean nothing here must not be set."""
        for descriptor, _ in message.ListFields():
            if descriptor.name in names:
                self.reject(prefix + descriptor.name, f"must be unset: {why}")

    def rows(
        self,
        tensor: tensor_pb2.Tensor,
        path: str,
        item: Range,
        max_rows: int,
        *,
        is_sample: bool,
        or_of: Iterable[Size] = (),
    ) -> NDArray[np.float32] | None:
        """A tensor of rows, each of the item's shape, as [n, *shape] f32 in the model's own range.

        Samples may come as UINT8, 0..255 meaning the model's value range; latents may not. `or_of` are heights and
        widths that would have done as well, for the refusal.
        """
        if not tensor.ByteSize():
            self.reject(path, "must be set")
            return None
        try:
            array = codec.decode(tensor, path)
        except codec.TensorError as error:
            self.reject(error.path, error.description)
            return None
        pixels = tensor.data_type == _PIXELS
        if not (tensor.data_type in _FLOATS or (pixels and is_sample and item.bounded)):
            allowed = "FLOAT32 or FLOAT16"
            if is_sample and item.bounded:
                allowed = f"FLOAT32, FLOAT16, or UINT8 whose 0..255 mean {item.low:g}..{item.high:g}"
            self.reject(f"{path}.data_type", f"must be {allowed}; got {_name(tensor_pb2.DataType, tensor.data_type)}")
            return None
        shape = array.shape
        if shape[1:] != item.shape or not shape or not 1 <= shape[0] <= max_rows:
            expected = ", ".join(["n", *map(str, item.shape)])
            if len(shape) != len(item.shape) + 1 or shape[1:] != item.shape:
                others = ", ".join(map(text, or_of))
                sized = f", or of height and width {others}" if others else ""
                self.reject(f"{path}.shape", f"must be [{expected}]{sized}; got {list(shape)}")
            else:
                self.reject(f"{path}.shape", f"must be [{expected}] with n from 1 to {max_rows}; got n = {shape[0]}")
            return None
        if pixels:
            return array.astype(np.float32) * np.float32((item.high - item.low) / 255) + np.float32(item.low)
        if 0 in np.isfinite(array).tobytes():  # small arrays: in a fifth of the time of `all`
            bad = np.argwhere(~np.isfinite(array))
            self.reject(
                f"{path}.data",
                f"must be finite; {len(bad)} of {array.size} are NaN or infinite, first {bad[0].tolist()}",
            )
            return None
        return array.astype(np.float32, copy=False)

    def labels(self, condition: Condition, count: int | None, wiring: Wiring, graph: Graph) -> NDArray[np.int64] | None:
        """The label of each of `count` rows, [n] i64; None if none were given (or if they are wrong).

        A `count` of None, when it is itself wrong, leaves the number of labels unchecked.
        """
        one, many = condition.HasField("class_label"), len(condition.class_labels)
        if not one and not many:
            return None
        if not (wiring.class_count and graph.takes_label):
            self.absent(condition, ("class_label", "class_labels"), "condition.", "this network takes no class label")
            return None
        if one and many:
            self.reject("condition.class_labels", "must be empty where class_label is set")
            return None
        if one:
            label = self.integer(condition.class_label, "condition.class_label", 0, wiring.class_count - 1)
            return None if label is None or count is None else np.full(count, label, np.int64)
        if count is not None and many != count:
            self.reject("condition.class_labels", f"must hold {count} labels, one for each row; got {many}")
        return self.integers(condition.class_labels, "condition.class_labels", 0, wiring.class_count - 1)

    def codes(self, condition: Condition, count: int | None, graph: Graph) -> NDArray[np.float32] | None:
        """The continuous codes, the same for every row, [n, k] f32; None if the graph takes none."""
        entry = graph.input(Source.SOURCE_CODES)
        if entry is None:
            if condition.codes:
                self.absent(condition, ("codes",), "condition.", "this network takes no continuous codes")
            return None
        wanted = math.prod(entry.shape)
        if len(condition.codes) != wanted:
            self.reject("condition.codes", f"must hold {wanted} values; got {len(condition.codes)}")
            return None
        for index, value in enumerate(condition.codes):
            self.number(value, f"condition.codes[{index}]", -1e6, 1e6)
        row = np.array(condition.codes, np.float32).reshape(1, *entry.shape)
        return np.repeat(row, count or 0, axis=0)

    def form(self, data_type: tensor_pb2.DataType.ValueType, wiring: Wiring) -> OutputForm:
        """How samples are to leave."""
        item = wiring.sample
        form = _form(data_type or item.data_type, item)
        if form.data_type == _PIXELS and not item.bounded:
            self.reject("output_data_type", "must not be UINT8: this model declares no value range to map to 0..255")
        elif form.data_type not in (*_FLOATS, _PIXELS):
            got = _name(tensor_pb2.DataType, data_type)
            self.reject("output_data_type", f"must be unset, FLOAT32, FLOAT16 or UINT8; got {got}")
        return form


@lru_cache(maxsize=1024)
def _form(data_type: tensor_pb2.DataType.ValueType, item: Range) -> OutputForm:
    return OutputForm(data_type, item.low, item.high)


def _name(enum: Any, value: int) -> str:
    return enum.Name(value) if value in enum.values() else str(value)
