"""One call a lane, for graphs whose rows see each other: slower, and the same bytes whatever else is asked for."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from latentd_server.runners import Outcome, Runner
from latentd_server.scheduler import Cohort, Segment

_Key = tuple[int, int, int]
"""Job, lane and evaluation."""
_Calls = list[list[tuple[_Key, Any]]]
"""By segment and lane: what the inner runner prepared."""


class Alone:
    """Runs every lane of a batch in a call to itself. Fulfils `runners.Runner`."""

    def __init__(self, runner: Runner) -> None:
        self._runner = runner
        # Calls that were made. Lanes that were done when another failed must not take their step again.
        self._done: dict[_Key, tuple[Any, Any]] = {}

    def warm(self) -> None:
        """See `runners.Runner`."""
        self._runner.warm()

    @property
    def held(self) -> int:
        """Lanes whose state it keeps."""
        return self._runner.held

    def padded(self, rows: int) -> int:
        """No call is padded."""
        return rows

    def forget(self, job_id: int) -> None:
        """Drop what is kept for a job."""
        for key in list(self._done):
            if key[0] == job_id:
                self._done.pop(key, None)
        self._runner.forget(job_id)

    def prepare(self, segments: Sequence[Segment]) -> _Calls:
        """A call for every lane."""
        return [[(key, self._runner.prepare([rider])) for key, rider in _riders(segment)] for segment in segments]

    def run(self, prepared: _Calls) -> dict[_Key, tuple[Any, Any]]:
        """Make the calls one by one; those that were made before another one failed are not made again."""
        results: dict[_Key, tuple[Any, Any]] = {}
        for riders in prepared:
            for key, call in riders:
                made = self._done.get(key)  # once, for its job may be forgotten meanwhile
                if made is None:
                    made = self._done[key] = call, self._runner.run(call)
                results[key] = made
        return results

    def finish(self, prepared: _Calls, results: dict[_Key, tuple[Any, Any]]) -> list[Outcome]:
        """One outcome a segment; what is done is forgotten with it."""
        for key in results:
            self._done.pop(key, None)
        return [_together([self._runner.finish(*results[key])[0] for key, _ in riders]) for riders in prepared]


def _riders(segment: Segment) -> list[tuple[_Key, Segment]]:
    """A segment for each lane."""
    entry = segment.entry
    return [
        (
            (entry.job_id, lane, segment.position),
            Segment(entry, Cohort(lane, lane + 1, segment.position), 1, segment.rows_per_lane),
        )
        for lane in range(segment.start, segment.start + segment.count)
    ]


def _together(outcomes: Sequence[Outcome]) -> Outcome:
    """One outcome for lanes that went one by one; they stand at one evaluation, so all show the same things."""
    previews = [outcome.preview for outcome in outcomes if outcome.preview is not None]
    outputs = [outcome.outputs for outcome in outcomes if outcome.outputs is not None]
    return Outcome(
        preview=np.concatenate(previews) if previews else None,
        outputs={name: np.concatenate([each[name] for each in outputs]) for name in outputs[0]} if outputs else None,
    )
