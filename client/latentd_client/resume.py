"""A request for samples that survives broken streams. Pure: what to ask next, given what has arrived.

Sample i depends on (seed, i) alone, and the seed is in the request. So when a stream breaks, what is missing is asked
for anew, one contiguous range a stream, nothing is computed twice, and the caller sees each sample once.
What comes after a break must promise the same bytes (`determinism_class`); if it does not:

* a caller who is handed samples as they arrive is told by a second `Accepted`;
* a caller who waits for all of them gets all of them from one class: those of the earlier class are asked for again.
"""

from collections.abc import Sequence
from typing import TypeVar

import numpy as np
from latentd import tensor
from latentd.v1 import generation_service_pb2 as pb
from numpy.typing import NDArray

from latentd_client import messages
from latentd_client.errors import ProtocolError, ServerUnavailable
from latentd_client.model import Model
from latentd_client.results import Accepted, Event, Preview, Samples, Stats

_Scalar = TypeVar("_Scalar", bound=np.generic)


class SampleRun:
    """One call of Sample, over as many streams as it takes.

    A shell sends `next_request()`, gives every message of the stream to `receive()`, and starts over while not `done`.

    Args:
        request: the whole request; `seed` and `sample_count` set.
        model: what is asked.

    Attributes:
        one_class: whether all samples must come from one determinism class; the shell that gathers them sets it.
    """

    def __init__(self, request: pb.SampleRequest, model: Model) -> None:
        self.request = request
        self.model = model
        self.one_class = False
        self.accepted: Accepted | None = None
        self.progress = 0  # most samples that were ever there at once
        self._offset = 0  # the current stream was asked for samples _offset <= i < _stop of the whole request
        self._stop = request.sample_count
        self._arrived = np.zeros(0, bool)  # by sample; allocated when the server has agreed to the count
        self._previewed_steps = np.zeros(0, np.int64)

    def __repr__(self) -> str:
        return f"<SampleRun of {self.request.model}: {self._arrived.sum()} of {self.request.sample_count} samples>"

    @property
    def done(self) -> bool:
        """Whether nothing is left to ask for."""
        return self.accepted is not None and bool(self._arrived.all())

    def next_request(self) -> pb.SampleRequest:
        """What to send on a fresh stream."""
        missing = np.flatnonzero(~self._arrived)
        if self.accepted is None or len(missing) == 0:
            self._offset, self._stop = 0, self.request.sample_count
            return self.request
        self._offset = int(missing[0])
        gaps = np.flatnonzero(np.diff(missing) > 1)
        self._stop = int(missing[gaps[0] if len(gaps) else -1]) + 1
        return part_of(self.accepted.resolved_request, self._offset, self._stop)

    def receive(self, response: pb.SampleResponse) -> list[Event]:
        """What a message means to the caller.

        Raises:
            ProtocolError: the message contradicts the contract.
        """
        match response.WhichOneof("event"):
            case "accepted":
                return self._receive_accepted(response.accepted)
            case "preview":
                return self._receive_preview(response.preview)
            case "result":
                return self._receive_result(response.result)
        return []  # an event of a newer server

    def shortfall(self) -> ServerUnavailable | None:
        """What is wrong with a stream that ended well; None if it brought all that it was asked for."""
        missing = self._stop - self._offset - int(self._arrived[self._offset : self._stop].sum())
        return ServerUnavailable(f"the server ended the stream with {missing} samples missing") if missing else None

    def _receive_accepted(self, message: pb.SampleAccepted) -> list[Event]:
        before = self.accepted
        if before is not None and before.determinism_class == message.determinism_class:
            return []
        if before is None:
            resolved = pb.SampleRequest()
            resolved.CopyFrom(message.resolved_request)
            if self.request.diffusion.HasField("start"):
                resolved.diffusion.start.samples.CopyFrom(self.request.diffusion.start.samples)
            if self.request.diffusion.HasField("known"):
                resolved.diffusion.known.CopyFrom(self.request.diffusion.known)
        else:
            resolved = before.resolved_request  # this message answers a part; the whole was resolved before
        if before is None or self.one_class:
            self._arrived = np.zeros(self.request.sample_count, bool)
        self._previewed_steps = np.zeros(self.request.sample_count, np.int64)
        self.accepted = Accepted(
            model=resolved.model,
            seed=resolved.seed,
            determinism_class=message.determinism_class,
            queue_depth=message.queue_depth,
            resolved_request=resolved,
        )
        return [self.accepted]

    def _receive_preview(self, message: pb.SamplePreview) -> list[Event]:
        if self.accepted is None:
            raise ProtocolError("the server sent a preview before `accepted`")
        indices = self._indices(message.sample_indices)
        estimates = messages.read_array(message.estimates, "preview.estimates")
        self._check_rows(indices, len(estimates), "preview.estimates")
        fresh = ~self._arrived[indices] & (self._previewed_steps[indices] < message.completed_step_count)
        if not fresh.any():
            return []
        self._previewed_steps[indices[fresh]] = message.completed_step_count
        estimates = _rows(estimates, fresh)
        return [
            Preview(
                array=estimates,
                value_range=messages.state_range(estimates, self.model),
                indices=indices[fresh],
                completed_steps=message.completed_step_count,
                total_steps=message.total_step_count,
            )
        ]

    def _receive_result(self, message: pb.SampleResult) -> list[Event]:
        if self.accepted is None:
            raise ProtocolError("the server sent a result before `accepted`")
        indices = self._indices(message.sample_indices)
        array = messages.read_array(message.samples, "result.samples")
        latents = messages.read_optional(message, "latents")
        labels = np.array(message.class_labels, np.int64) if message.class_labels else None
        self._check_rows(indices, len(array), "result.samples")
        for name, column in (("latents", latents), ("class_labels", labels)):
            if column is not None:
                self._check_rows(indices, len(column), f"result.{name}")

        fresh = ~self._arrived[indices]
        if not fresh.any():
            return []
        self._arrived[indices] = True
        self.progress = max(self.progress, int(self._arrived.sum()))
        array = _rows(array, fresh)
        return [
            Samples(
                array=array,
                value_range=messages.value_range(array, self.model, self.request.output_mode),
                indices=indices[fresh],
                labels=None if labels is None else _rows(labels, fresh),
                latents=None if latents is None else _rows(latents, fresh),
                seed=self.accepted.seed,
                model=self.accepted.model,
                determinism_class=self.accepted.determinism_class,
                resolved_request=self.accepted.resolved_request,
                stats=messages.read_stats(message.stats),
            )
        ]

    def _indices(self, sample_indices: Sequence[int]) -> NDArray[np.int64]:
        indices = np.array(sample_indices, np.int64) + self._offset
        if len(indices) and not self._offset <= indices.min() <= indices.max() < self._stop:
            raise ProtocolError(f"the server sent samples {list(sample_indices)}, which nobody asked for")
        if len(np.unique(indices)) != len(indices):
            raise ProtocolError(f"the server sent samples {list(sample_indices)}, some of them twice in one message")
        return indices

    def _check_rows(self, indices: NDArray[np.int64], rows: int, path: str) -> None:
        if rows != len(indices):
            raise ProtocolError(f"the server sent {rows} rows in {path} for {len(indices)} samples")


def part_of(request: pb.SampleRequest, first: int, stop: int) -> pb.SampleRequest:
    """The request for samples `first` <= i < `stop` of a request, with the bytes they have in the whole."""
    part = pb.SampleRequest()
    part.CopyFrom(request)
    part.first_sample_index = request.first_sample_index + first
    part.sample_count = stop - first
    if len(request.condition.class_labels) == request.sample_count:
        del part.condition.class_labels[:]
        part.condition.class_labels.extend(request.condition.class_labels[first:stop])
    walk = part.diffusion
    for given in (walk.start.samples, walk.known.samples, walk.known.mask):
        if given.shape and given.shape[0] == request.sample_count:
            given.CopyFrom(tensor.encode(tensor.decode(given)[first:stop]))
    return part


def assemble(parts: Sequence[Samples], count: int) -> Samples:
    """All samples of a request, in order, from the parts they arrived in; later parts win.

    Args:
        parts: at least one; together they cover 0 <= i < `count`.
        count: samples of the request.
    """
    last = parts[-1]
    source = np.zeros(count, np.int64)  # row of the concatenation that holds each sample
    row = 0
    for part in parts:
        source[part.indices] = np.arange(row, row + len(part))
        row += len(part)
    labels = [part.labels for part in parts if part.labels is not None]
    latents = [part.latents for part in parts if part.latents is not None]
    return Samples(
        array=np.concatenate([part.array for part in parts])[source],
        value_range=last.value_range,
        indices=np.arange(count),
        labels=np.concatenate(labels)[source] if len(labels) == len(parts) else None,
        latents=np.concatenate(latents)[source] if len(latents) == len(parts) else None,
        seed=last.seed,
        model=last.model,
        determinism_class=last.determinism_class,
        resolved_request=last.resolved_request,
        stats=Stats.of_parts([part.stats for part in parts]),
    )


def _rows(array: NDArray[_Scalar], mask: NDArray[np.bool_]) -> NDArray[_Scalar]:
    return array if mask.all() else array[mask]
