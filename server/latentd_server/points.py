"""Named points in a job's course, where a test may hold the engine so that a race always falls the same way."""

from collections.abc import Sequence

from latentd_server.scheduler import Arrival, Batch, Entry


class Points:
    """Told by the engine's own thread, which goes on when a call returns. Here they do nothing; tests override them.

    They are named by what has happened to a job, not by where in the engine that is.
    """

    def queued(self, entry: Entry) -> None:
        """A job is on the books and has not ridden."""

    def evaluating(self, batch: Batch) -> None:
        """A batch sets off: its lanes take their evaluation now, and who leaves has it wasted."""

    def evaluated(self, arrivals: Sequence[Arrival]) -> None:
        """A batch's lanes have taken their evaluation, and nobody has been told."""
