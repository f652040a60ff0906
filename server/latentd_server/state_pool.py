"""Where lanes under way have their x and h: one slot each, on the device, from their first evaluation to their last.

A lane that sits out stays where it is. The host owns the numbering, the device the values. The pool doubles when it
is full and does not shrink; a lane takes twice the bytes of a float32 sample.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from latentd_server import step_graph
from latentd_server.runtime import Array, BoundGraph, CompiledGraph, Device, Memory

PADDING = 0
"""The slot that a call's spare rows read and write. Nobody owns it."""


class Slots:
    """Numbers of slots. Used by one thread at a time, the one that prepares and finishes calls."""

    def __init__(self) -> None:
        self._free: list[int] = []
        self.count = PADDING + 1  # that were ever in use, the padding's among them

    @property
    def taken(self) -> int:
        """How many somebody owns."""
        return self.count - len(self._free) - 1

    def take(self) -> int:
        """A slot that nobody owns; the last one freed is the first one taken."""
        if self._free:
            return self._free.pop()
        self.count += 1
        return self.count - 1

    def free(self, slot: int) -> None:
        """Give a slot back."""
        self._free.append(slot)


class StatePool:
    """The values of all slots: `memory.arrays` "x" and "h", [P, *S] f32. Used by the device's thread only."""

    def __init__(
        self, device: Device, shape: tuple[int, ...], lanes: int, *, through_graphs: bool | None = None
    ) -> None:
        """Make room for so many lanes.

        Args:
            device: Where the values live.
            shape: S, of one sample.
            lanes: Room to begin with.
            through_graphs: Whether rows are moved by graphs on the device or by the host, which is faster where the
                device's memory is the host's. By default as the device needs it.
        """
        self._device = device
        self._shape = shape
        self._through_graphs = device.has_memory if through_graphs is None else through_graphs
        self.memory = self._room(lanes + 1)
        self.memory.up()
        if self._through_graphs:
            self._writer = CompiledGraph(step_graph.build_writer(shape), device, 1, capture=False)
            self._reader = CompiledGraph(step_graph.build_reader(shape), device, 1, capture=False)
            self._blender: CompiledGraph | None = None  # compiled when somebody needs it

    @property
    def capacity(self) -> int:
        """Slots there is room for, the padding's among them."""
        return self.memory.layout["x"][0][0]

    def grow(self, slots: int) -> None:
        """Make room for at least so many slots, twice as many as before or more. Values keep their slots; the memory is
        another one, and the old one stays as it is for whoever still reads it.
        """
        if slots <= self.capacity:
            return
        old, self.memory = self.memory, self._room(max(slots, 2 * self.capacity))
        self.memory.up()
        if self._through_graphs:
            self._write_from(old, np.arange(old.layout["x"][0][0]), {"x": "x_rows", "h": "h_rows"})
        else:
            for name, values in old.arrays.items():
                self.memory.arrays[name][: len(values)] = values

    def write(self, slots: NDArray[np.int64], x: Array, h: Array) -> None:
        """Put rows [n, *S] f32 into slots [n] i64."""
        if not self._through_graphs:
            self.memory.arrays["x"][slots] = x
            self.memory.arrays["h"][slots] = h
            return
        rows = Memory(self._device, {"x_rows": (x.shape, x.dtype), "h_rows": (h.shape, h.dtype)})
        rows.arrays["x_rows"][:], rows.arrays["h_rows"][:] = x, h
        rows.up()
        self._write_from(rows, slots, {"x_rows": "x_rows", "h_rows": "h_rows"})

    def blend(self, slots: NDArray[np.int64], mask: Array, values: Array) -> None:
        """Put parts of rows into the x of slots [n] i64: where `mask` [n, *S] bool says so, `values` [n, *S] f32."""
        if not self._through_graphs:
            x = self.memory.arrays["x"]
            x[slots] = np.where(mask, values, x[slots])
            return
        if self._blender is None:
            self._blender = CompiledGraph(step_graph.build_blender(self._shape), self._device, 1, capture=False)
        layout = {"chosen": (mask.shape, np.dtype(np.int64)), "values": (values.shape, values.dtype)}
        rows = Memory(self._device, layout)
        rows.arrays["chosen"][:], rows.arrays["values"][:] = mask, values
        rows.up()
        bound = self._blender.bind()
        self._number(bound, "slot", slots)
        bound.read(rows)
        bound.read(self.memory, {"x": "x"})  # and nothing of h
        bound.write(self.memory, {"x": step_graph.STATE["x"]})
        bound.run()

    def read(self, memory: Memory, name: str, rows: Sequence[int]) -> Array:
        """Copy rows out of this pool's memory or another: [k, *S] f32."""
        if not self._through_graphs:
            taken: Array = memory.arrays[name][rows]
            return taken
        bound = self._reader.bind()
        self._number(bound, "rows", np.array(rows, np.int64))
        bound.read(memory, {name: "values"})
        out = Memory(self._device, {"taken": ((len(rows), *self._shape), np.dtype(np.float32))})
        bound.write(out)
        bound.run()
        out.down()
        return out.arrays["taken"]

    def _room(self, slots: int) -> Memory:
        values = ((slots, *self._shape), np.dtype(np.float32))
        return Memory(self._device, dict.fromkeys(step_graph.STATE, values))

    def _write_from(self, rows: Memory, slots: NDArray[np.int64], names: dict[str, str]) -> None:
        bound = self._writer.bind()
        self._number(bound, "slot", slots)
        bound.read(rows, names)
        bound.read(self.memory)
        bound.write(self.memory, step_graph.STATE)
        bound.run()

    def _number(self, bound: BoundGraph, name: str, numbers: NDArray[np.int64]) -> None:
        memory = Memory(self._device, {name: (numbers.shape, numbers.dtype)})
        memory.arrays[name][:] = numbers
        memory.up()
        bound.read(memory)
