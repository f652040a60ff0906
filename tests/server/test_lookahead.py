"""What happens to a call's jobs, and to the models, while the call is on the device and a second thread looks ahead."""

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from bundles import write_all
from latentd.v1 import bundle_pb2
from latentd_server import engine as engine_module
from latentd_server.alone import Alone
from latentd_server.runners import Outcome
from latentd_server.step_runner import StepRunner
from test_engine import Bench

KEY = ("tiny-diffusion@1", bundle_pb2.Network.ROLE_DENOISER)


@pytest.fixture
async def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Bench]:
    """With calls that are all taken to be long."""
    monkeypatch.setattr(engine_module, "WORTH_HIDING", 0.0)
    monkeypatch.setattr(engine_module, "SHORTEST_S", 0.0)
    bench = await Bench.start(write_all(tmp_path))
    yield bench
    await bench.engine.drained()
    await bench.engine.close()


class Held:
    """A runner one of whose calls lasts until the lookahead has done what the event loop was made to ask for."""

    def __init__(self, bench: Bench, number: int, ask: Callable[[], None], *, fails: bool = False) -> None:
        self.inner = bench.engine._runners[KEY]
        assert isinstance(self.inner, StepRunner)
        self._loop = asyncio.get_running_loop()
        self._number, self._ask, self._fails = number, ask, fails
        self._calls = 0
        self._told, self.done = threading.Event(), threading.Event()
        self.gone: set[int] = set()  # jobs that were forgotten
        self.ghosts: set[int] = set()  # and rode after that
        self._lookahead = bench.engine._lookahead
        self._lookahead.until_over = self._until_over  # type: ignore[method-assign]

    def _until_over(self, seconds: float) -> None:
        del seconds
        while not (self._lookahead._over.is_set() or self._told.is_set()):
            self._told.wait(0.001)

    def _ask_and_tell(self) -> None:
        self._ask()
        self._loop.call_soon(self._told.set)  # behind the hand-over

    def warm(self) -> None:
        self.done.set()

    def prepare(self, segments: Sequence[Any]) -> Any:
        self.ghosts |= self.gone & {segment.entry.job_id for segment in segments}
        return self.inner.prepare(segments)

    def run(self, prepared: Any) -> Any:
        self._calls += 1
        if self._calls == self._number:
            self._loop.call_soon_threadsafe(self._ask_and_tell)
            assert self.done.wait(10)
            if self._fails:
                raise RuntimeError("a call that fails once")
        return self.inner.run(prepared)

    def finish(self, prepared: Any, results: Any) -> list[Outcome]:
        return self.inner.finish(prepared, results)

    @property
    def held(self) -> int:
        return self.inner.held

    def padded(self, rows: int) -> int:
        return self.inner.padded(rows)

    def forget(self, job_id: int) -> None:
        self.inner.forget(job_id)
        self.gone.add(job_id)
        self.done.set()


@pytest.mark.parametrize("alone", [False, True], ids=["a call that fails", "lanes that ride alone"])
async def test_who_leaves_during_a_call_is_not_run_again(bench: Bench, alone: bool) -> None:
    """Its slots are another's by then, or nobody's: to run it anew would write into another lane and keep its state."""
    want = await bench.result(bench.steps("dpmpp-2m", 8, seed=5))
    # The victim's calls are the second and third of every batch, and it has left when its second is about to be made.
    held = Held(bench, 9 if alone else 3, lambda: bench.engine.cancel(victim), fails=not alone)
    bench.engine._runners[KEY] = Alone(held) if alone else held
    victim = bench.engine.submit(
        bench.steps("dpmpp-2m", 8, lanes=2, seed=9), caller="test", deadline=None, sink=lambda event: None
    )
    assert await bench.result(bench.steps("dpmpp-2m", 8, seed=5)) == want
    await bench.engine.drained()
    assert held.gone
    assert not held.ghosts
    assert isinstance(held.inner, StepRunner)
    assert not held.inner._walks
    assert bench.engine.lanes_held == 0
    assert bench.engine.backlog == 0


async def test_a_model_that_comes_during_the_last_call_is_taken_over_at_once(bench: Bench) -> None:
    """Not when somebody asks for something the next time; nor does it come back if it is let go before."""
    newcomer, brief = ("newcomer@1", KEY[1]), ("brief@1", KEY[1])

    def ask() -> None:
        bench.engine.attach({newcomer: held})
        bench.engine.attach({brief: held})
        bench.engine.detach("brief@1")
        loop.call_later(0.05, held.done.set)  # the lookahead has them by then, or else there is nothing to see

    loop = asyncio.get_running_loop()
    held = Held(bench, 4, ask)
    bench.engine._runners[KEY] = held
    await bench.result(bench.steps("ddim", 4))
    async with asyncio.timeout(10):
        while newcomer not in bench.engine._runners:  # noqa: ASYNC110  # the device's thread knows nothing of this test
            await asyncio.sleep(0.001)
    assert brief not in bench.engine._runners


async def test_a_call_that_fails_says_nothing_of_how_long_calls_take(bench: Bench) -> None:
    """Or calls would be taken for short ones, beside which nothing is worth doing, for hundreds of calls to come."""
    await bench.result(bench.steps("ddim", 4))
    known = dict(bench.engine._fastest_s)
    runner = bench.engine._runners[KEY]
    held = Held(bench, 1, lambda: held.done.set(), fails=True)
    held.inner = runner
    bench.engine._runners[KEY] = held
    await bench.result(bench.steps("ddim", 1))
    assert bench.engine._fastest_s == known
