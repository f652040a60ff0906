"""What evaluates batches of one graph: the phases of a call, and what a call gives.

    prepared = runner.prepare(segments)         host work; may go on while the call before is on the device
    results  = runner.run(prepared)             the call, on the device's thread
    outcomes = runner.finish(prepared, results) host work; may go on while the call after is on the device

`call_runner.py` and `step_runner.py` hold the two kinds there are.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from numpy.typing import NDArray

from latentd_server.scheduler import Segment

Array = NDArray[Any]


@dataclass(frozen=True, slots=True)
class Outcome:
    """What one evaluation gave a segment: a look at lanes under way, or what finished lanes are."""

    preview: Array | None = None  # [k, *S] f32, the estimate of x0
    outputs: Mapping[str, Array] | None = None  # [k, ...], set on the last evaluation


class Runner(Protocol):
    """Evaluates batches of one graph.

    `prepare`, `finish` and `forget` are called by one thread at a time; `warm` and `run` by the device's thread. Calls
    are run in the order in which they were prepared, and each is finished before the second one after it is run. What
    `prepare` and `run` give is the runner's own: the engine hands it on.

    A `run` that fails leaves every lane where it was, and need not be finished: its segments may be prepared anew, one
    by one, with the positions they have. When `finish` fails the lanes have taken their step and cannot be told of it.
    """

    def warm(self) -> None:
        """Do at leisure what the first calls would otherwise do: record CUDA graphs."""

    def prepare(self, segments: Sequence[Segment]) -> Any:
        """Make a call ready. What the segments say is read now and not later."""

    def run(self, prepared: Any) -> Any:
        """Make the call; blocks, releasing the interpreter lock."""

    def finish(self, prepared: Any, results: Any) -> list[Outcome]:
        """One outcome a segment, in order. That of a job which was forgotten since means nothing."""

    @property
    def held(self) -> int:
        """Lanes whose state it keeps; may be asked from any thread."""

    def padded(self, rows: int) -> int:
        """Rows of the call, padding counted, that so many live rows need."""

    def forget(self, job_id: int) -> None:
        """Drop what is kept for a job. Calls with its lanes may still be under way."""


def evaluate(runner: Runner, segments: Sequence[Segment]) -> list[Outcome]:
    """All phases of a call, one after another."""
    prepared = runner.prepare(segments)
    return runner.finish(prepared, runner.run(prepared))
