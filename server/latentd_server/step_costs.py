"""What network calls were measured to cost, and how fast work drains. Pure: time is an argument."""

import math
from dataclasses import dataclass, field

_FRESH_S = 5.0
"""How long a measurement may refuse anybody. One slow call might else refuse all who would be measured anew."""
WINDOW_S = 2.0
"""Time over which rates are taken, by exponential decay."""
_NEWEST = 0.1  # weight of the newest call in the running mean
_SURPRISE = 2.0  # one call moves the mean as if it had taken this many times the mean at most
_FORGETTING = 1.01  # the fastest call is believed to be slower by this at every other call
_LATE = 0.02  # share of jobs that may take longer than foreseen, the margin counted
_STEP = 0.05  # of a margin, at most
_LEAST_MARGIN, _FIRST_MARGIN, _MOST_MARGIN = 1.05, 1.1, 2.0
_MARGIN_LASTS_S = 20.0
_ONE_CAUSE_S = 0.01
"""Jobs that are late so soon after one another were held up by the same thing."""
_TRUSTED = 2  # calls of a size before its fastest is a bound


@dataclass(slots=True)
class _Size:
    """Calls of one size."""

    typical_s: float
    fastest_s: float
    timed_s: float
    calls: int = 1


@dataclass(slots=True)
class StepCosts:
    """Calls of one graph, by how many rows they had, padding included."""

    sizes: dict[int, _Size] = field(default_factory=dict)
    timed_s: float = -math.inf  # when a call was last timed

    def timed(self, size: int, seconds: float, now_s: float) -> None:
        """Learn what a call took."""
        self.timed_s = now_s
        known = self.sizes.get(size)
        if known is None:
            self.sizes[size] = _Size(seconds, seconds, now_s)
            return
        known.typical_s += _NEWEST * (min(seconds, _SURPRISE * known.typical_s) - known.typical_s)
        known.fastest_s = min(seconds, _FORGETTING * known.fastest_s)
        known.timed_s = now_s
        known.calls += 1

    def is_fresh(self, now_s: float) -> bool:
        """Whether a call was timed lately."""
        return now_s - self.timed_s < _FRESH_S

    def typical(self, rows: float) -> float:
        """What a call of so many rows takes, in seconds; 0 if none was ever timed."""
        below = max((size for size in self.sizes if size < rows), default=None)
        above = min((size for size in self.sizes if size >= rows), default=None)
        if above is not None and (below is None or above - rows < 1):
            return self.sizes[above].typical_s
        if below is None:
            return 0.0
        low_s = self.sizes[below].typical_s
        if above is None:
            return low_s * rows / below
        return low_s + (self.sizes[above].typical_s - low_s) * (rows - below) / (above - below)

    def least(self, rows: float, now_s: float) -> float:
        """What a call of so many rows takes at least, in seconds, by fresh measurements; 0 if there are none.

        Fewer rows are never slower, and half the rows are never faster than half the time.
        """
        return max(
            (
                known.fastest_s * min(1.0, rows / size)
                for size, known in self.sizes.items()
                if known.calls >= _TRUSTED and now_s - known.timed_s < _FRESH_S
            ),
            default=0.0,
        )


@dataclass(slots=True)
class Decaying:
    """A sum that forgets as time goes on, by a clock of its owner's."""

    value: float = 0.0
    at_s: float = 0.0

    def read(self, at_s: float) -> float:
        """The sum now."""
        return self.value * math.exp((self.at_s - at_s) / WINDOW_S)

    def add(self, amount: float, at_s: float) -> None:
        """Add to it."""
        self.value, self.at_s = self.read(at_s) + amount, at_s


@dataclass(slots=True)
class Margin:
    """How many times as long as foreseen jobs take, but for a few in a hundred: what estimates are multiplied by.

    A quantile followed by steps, up at what was late and down at what was not, in the proportion that balances there
    (stochastic approximation; Robbins and Monro, Ann. Math. Statist. 22(3), 1951). It is forgotten with time, or a
    margin that lets nobody in could never be found too wide.
    """

    value: float = _FIRST_MARGIN  # at `at_s`
    at_s: float = 0.0
    _raised_s: float = -math.inf

    def read(self, now_s: float) -> float:
        """The margin now."""
        return _FIRST_MARGIN + (self.value - _FIRST_MARGIN) * math.exp((self.at_s - now_s) / _MARGIN_LASTS_S)

    def saw(self, now_s: float, *, late: bool) -> None:
        """Learn whether a job took longer than foreseen, with the margin."""
        if late and now_s - self._raised_s < _ONE_CAUSE_S:
            return
        if late:
            self._raised_s = now_s
        step = 1 + _STEP * (1 - _LATE) if late else 1 - _STEP * _LATE
        self.value = min(_MOST_MARGIN, max(_LEAST_MARGIN, self.read(now_s) * step))
        self.at_s = now_s


@dataclass(slots=True)
class DrainRates:
    """Evaluations that a second of the device brings, together and by model, in the mix of late."""

    device_s: float = 0.0  # all time the device was seen at work
    busy: Decaying = field(default_factory=Decaying)
    rows: dict[str, Decaying] = field(default_factory=dict)  # by model; "" is all together

    def ran(self, model: str, rows: int, seconds: float) -> None:
        """Learn of a batch."""
        self.device_s += seconds
        self.busy.add(seconds, self.device_s)
        for name in ("", model):
            self.rows.setdefault(name, Decaying()).add(rows, self.device_s)

    def per_s(self, model: str = "") -> float:
        """Evaluations a second, of one model or of all; 0 if nothing is known."""
        busy_s = self.busy.read(self.device_s)
        return self.rows[model].read(self.device_s) / busy_s if busy_s > 0 and model in self.rows else 0.0
