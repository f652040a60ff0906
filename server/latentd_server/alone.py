"""One call a lane, for graphs whose rows see each other: slower, and the same bytes whatever else is asked for."""

from collections.abc import Sequence

import numpy as np

from latentd_server.runners import Outcome, Runner
from latentd_server.scheduler import Cohort, Segment


class Alone:
    """Runs every lane of a batch in a call to itself. Fulfils `runners.Runner`."""

    def __init__(self, runner: Runner) -> None:
        self._runner = runner
        # By job, lane and evaluation. Lanes that were done when another failed must not take their step again.
        self._done: dict[tuple[int, int, int], Outcome] = {}

    def padded(self, rows: int) -> int:
        """No call is padded."""
        return rows

    def forget(self, job_id: int) -> None:
        """Drop what is kept for a job."""
        self._done = {key: outcome for key, outcome in self._done.items() if key[0] != job_id}
        self._runner.forget(job_id)

    def run(self, segments: Sequence[Segment]) -> list[Outcome]:
        """Evaluate the segments lane by lane; what is done is forgotten once all of them are."""
        outcomes = [self._run(segment) for segment in segments]
        for segment in segments:
            for key in _keys(segment):
                del self._done[key]
        return outcomes

    def _run(self, segment: Segment) -> Outcome:
        keys = _keys(segment)
        for key in keys:
            if key not in self._done:
                lane = Cohort(key[1], key[1] + 1, segment.cohort.position)
                rider = Segment(segment.entry, lane, 1, segment.entry.rows_per_lane)
                [self._done[key]] = self._runner.run([rider])
        return _together([self._done[key] for key in keys])


def _keys(segment: Segment) -> list[tuple[int, int, int]]:
    cohort = segment.cohort
    return [(segment.entry.job_id, lane, cohort.position) for lane in range(cohort.start, cohort.stop)]


def _together(outcomes: Sequence[Outcome]) -> Outcome:
    """One outcome for lanes that went one by one; they stand at one evaluation, so all show the same things."""
    previews = [outcome.preview for outcome in outcomes if outcome.preview is not None]
    outputs = [outcome.outputs for outcome in outcomes if outcome.outputs is not None]
    return Outcome(
        preview=np.concatenate(previews) if previews else None,
        outputs={name: np.concatenate([each[name] for each in outputs]) for name in outputs[0]} if outputs else None,
    )
