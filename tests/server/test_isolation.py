"""One bad row: whatever a neighbour in the batch is made of, and wherever its call fails, a request's bytes stay."""

import asyncio
import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bundles import LATENT, SHAPE
from latentd import tensor
from latentd.v1 import bundle_pb2
from latentd.v1 import generation_service_pb2 as pb
from latentd_server import loops, resolve
from latentd_server.failures import RuntimeFailureError
from latentd_server.job import Event, Failed, Finished, Job, Noise, Servable, Start, StepJob
from latentd_server.plans import Limits
from latentd_server.points import Points
from latentd_server.runners import Outcome, Runner
from latentd_server.scheduler import Batch
from live import Live

D, V, G = "tiny-diffusion", "tiny-vae", "tiny-gan"
BAD = 666
"""The seed of the row that harms."""


class Company(Points):
    """Which seeds rode together."""

    def __init__(self) -> None:
        self.batches: list[set[int]] = []

    def evaluating(self, batch: Batch) -> None:
        self.batches.append({segment.entry.job.seed for segment in batch.segments})


class Bench:
    """A server, and jobs that are submitted behind its door: what no door lets in is what is tried here."""

    def __init__(self, live: Live, company: Company) -> None:
        self._live, self.company = live, company
        self.engine = live.serving.engine

    def servable(self, name: str) -> Servable:
        return self._live.serving.door.registry.get(name)

    def together(self, *jobs: Job) -> list[bytes | BaseException]:
        """What each job gives, as bytes; they are submitted in one turn, so they ride in one batch."""
        return self._live.call(self._together(jobs))

    async def _together(self, jobs: Sequence[Job]) -> list[bytes | BaseException]:
        futures = [asyncio.get_running_loop().create_future() for _ in jobs]
        for job, future in zip(jobs, futures, strict=True):
            self.engine.submit(job, caller=f"caller-{job.seed}", deadline=None, sink=_Sink(future))
        return await asyncio.gather(*futures, return_exceptions=True)

    @contextlib.contextmanager
    def sabotage(self, job: Job, phase: str) -> Iterator[None]:
        """Let the calls of a job's graph fail in a phase while the bad row is among them."""
        key = (job.model, getattr(job, "role", bundle_pb2.Network.ROLE_DENOISER))
        runner = self.engine._runners[key]
        self._attach({key: Saboteur(runner, phase)})
        yield
        self._attach({key: runner})

    def _attach(self, runners: dict[Any, Any]) -> None:
        async def attach() -> None:
            self.engine.attach(runners)

        self._live.call(attach())


class _Sink:
    def __init__(self, future: "asyncio.Future[bytes]") -> None:
        self._future, self._rows = future, dict[int, bytes]()

    def __call__(self, event: Event) -> None:
        if isinstance(event, Failed):
            self._future.set_exception(event.error)
        elif isinstance(event, Finished):
            for row, lane in enumerate(event.lanes):
                self._rows[int(lane)] = b"".join(event.outputs[name][row].tobytes() for name in sorted(event.outputs))
            if event.last:
                self._future.set_result(b"".join(self._rows[lane] for lane in sorted(self._rows)))


@pytest.fixture(scope="module")
def bench(models_root: Path, call_length: str) -> Iterator[Bench]:
    del call_length  # asked for, so that it holds before the engine is made
    company = Company()
    live = Live(models_root, company, max_batch_rows=16, self_check_interval=0)
    yield Bench(live, company)
    live.stop()


def images(count: int = 2) -> Any:
    return tensor.encode(np.random.default_rng(9).uniform(-1, 1, (count, *SHAPE)).astype(np.float32))


def latents(count: int = 2) -> Any:
    return tensor.encode(np.random.default_rng(8).standard_normal((count, LATENT)).astype(np.float32))


def sampling(model: str, bench: Bench, seed: int, **walk: Any) -> Job:
    options = pb.DiffusionOptions(step_count=5, **walk) if walk else None
    request = pb.SampleRequest(model=model, seed=seed, sample_count=2, diffusion=options)
    return resolve.sample(request, bench.servable(model), seed, Limits()).job


def loop_step(bench: Bench, seed: int) -> Job:
    """The second step of a loop that keeps history."""
    request = pb.SampleRequest(
        model=D, seed=seed, sample_count=2, diffusion=pb.DiffusionOptions(sampler="dpmpp-2m", step_count=5)
    )
    loop, position = resolve.open_loop(request, bench.servable(D), seed, Limits())
    first = loops.take_step(pb.TakeStep(), loop, position)
    state = np.random.default_rng(seed).standard_normal((2, *SHAPE)).astype(np.float32)
    position = loops.stepped(position, first, state, state / 2)
    return loops.take_step(pb.TakeStep(), loop, position).job


KINDS: dict[str, Any] = {
    "ddpm": lambda bench, seed: sampling(D, bench, seed, sampler="ddpm"),
    "guided": lambda bench, seed: sampling(D, bench, seed, sampler="euler-ancestral", guidance_scale=3.0),
    "heun": lambda bench, seed: sampling(D, bench, seed, sampler="heun", guidance_scale=2.0),
    "history": lambda bench, seed: sampling(D, bench, seed, sampler="dpmpp-2m-sde"),
    "loop": loop_step,
    "denoise": lambda bench, seed: (
        resolve.denoise_step(
            pb.DenoiseStepRequest(model=D, noisy_samples=images(), timesteps=[50], next_timesteps=[40], seed=seed),
            bench.servable(D),
            Limits(),
        ).job
    ),
    "vae sample": lambda bench, seed: sampling(V, bench, seed),
    "gan sample": lambda bench, seed: sampling(G, bench, seed),
    "vae decode": lambda bench, seed: (
        resolve.decode(pb.DecodeRequest(model=V, latents=latents(), seed=seed), bench.servable(V), Limits()).job
    ),
    "vae encode": lambda bench, seed: (
        resolve.encode(pb.EncodeRequest(model=V, samples=images(), seed=seed), bench.servable(V), Limits()).job  # type: ignore[union-attr]
    ),
    "vae score": lambda bench, seed: (
        resolve.score(pb.ScoreRequest(model=V, samples=images(), seed=seed), bench.servable(V), Limits()).job
    ),
    "gan score": lambda bench, seed: (
        resolve.score(
            pb.ScoreRequest(model=G, samples=images(), condition=pb.Condition(class_label=1), seed=seed),
            bench.servable(G),
            Limits(),
        ).job
    ),
}
WALKS = ("ddpm", "guided", "heun", "history", "loop", "denoise")


def spoiled(job: Job, value: float) -> Job:
    """The same, with every number that goes into the network replaced."""
    if isinstance(job, StepJob):
        state = np.full((job.lane_count, *SHAPE), value, np.float32)
        return replace(job, seed=BAD, start=Start(noise_scale=0.0, values=state, history=state))
    feeds = {}
    for name, feed in job.feeds.items():
        if isinstance(feed, Noise):
            feeds[name] = replace(feed, scale=value)
        else:
            rows = feed[:]
            feeds[name] = np.full_like(rows, value) if rows.dtype == np.float32 else rows
    return replace(job, seed=BAD, feeds=feeds)


@pytest.mark.parametrize("value", [np.nan, np.inf, 3e38])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")  # what the bad row is made of overflows
def test_a_bad_row_leaks_into_no_neighbour(kind: str, value: float, bench: Bench) -> None:
    """NaN, infinity and what overflows stay where they are, in every family and in every kind of walk."""
    neighbours = [KINDS[kind](bench, seed) for seed in (1, 2)]
    if kind in WALKS:
        neighbours += [KINDS[other](bench, 10 + seed) for seed, other in enumerate(WALKS) if other != kind][:3]
    alone = [bench.together(job)[0] for job in neighbours]
    bench.company.batches.clear()
    bad = [spoiled(job, value) for job in neighbours[: 1 if kind in WALKS else 2]]
    middle = len(neighbours) // 2
    got = bench.together(*neighbours[:middle], *bad, *neighbours[middle:])
    assert got[:middle] + got[middle + len(bad) :] == alone
    assert all(isinstance(answer, bytes) for answer in alone)
    riders = bench.company.batches[0]
    assert BAD in riders
    assert len(riders) > 2, "they rode together"


class Saboteur:
    """A runner that fails in one of its phases whenever the bad row is in the call."""

    def __init__(self, inner: Runner, phase: str) -> None:
        self._inner, self._phase = inner, phase

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def _fail(self, phase: str, segments: Sequence[Any]) -> None:
        if phase == self._phase and any(segment.entry.job.seed == BAD for segment in segments):
            raise RuntimeError(f"{phase} of /secret/path failed")

    def prepare(self, segments: Sequence[Any]) -> Any:
        self._fail("prepare", segments)
        return self._inner.prepare(segments), list(segments)

    def run(self, prepared: Any) -> Any:
        self._fail("run", prepared[1])
        return self._inner.run(prepared[0])

    def finish(self, prepared: Any, results: Any) -> list[Outcome]:
        self._fail("finish", prepared[1])
        return self._inner.finish(prepared[0], results)


@pytest.mark.parametrize("phase", ["prepare", "run", "finish"])
@pytest.mark.parametrize("kind", ["ddpm", "heun", "loop", "vae decode"])
def test_a_call_that_fails_fails_nobody_but_its_culprit(kind: str, phase: str, bench: Bench) -> None:
    """Before and in the network's call, rows are run again alone. Once the call is over its lanes have moved, and there
    is no way back: then all of the call fail rather than take a step twice, and those that come after keep their bytes.
    """
    neighbours = [KINDS[kind](bench, seed) for seed in (1, 2, 3)]
    alone = [bench.together(job)[0] for job in neighbours]
    bad = replace(neighbours[0], seed=BAD)
    bench.company.batches.clear()
    with bench.sabotage(bad, phase):
        *got, culprit = bench.together(*neighbours, bad)
    assert bench.company.batches[0] == {1, 2, 3, BAD}
    assert isinstance(culprit, RuntimeFailureError)
    assert "secret" not in str(culprit), "no internals reach the caller"
    if phase == "finish":
        assert [type(failure) for failure in got] == [RuntimeFailureError] * 3
    else:
        assert got == alone
    assert bench.together(*neighbours) == alone
