"""What only a GPU can show: that calls are recorded, that state stays on the device, and what it does to bytes."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from latentd.v1 import bundle_pb2
from latentd_server import samplers
from latentd_server.bundle import read
from latentd_server.certificate_cache import CertificateCache
from latentd_server.determinism import is_promise
from latentd_server.job import CallJob, Noise, Start, StepJob
from latentd_server.loading import LoadedModel, Terms, load
from latentd_server.noise import Purpose
from latentd_server.runners import Outcome, Runner, evaluate
from latentd_server.runtime import NO_CAPTURE, Device
from latentd_server.scheduler import Cohort, Scheduler, Segment
from latentd_server.step_runner import StepRunner

MAX_ROWS = 8
DENOISER = ("tiny-diffusion@1", bundle_pb2.Network.ROLE_DENOISER)
DECODER = ("tiny-vae@1", bundle_pb2.Network.ROLE_DECODER)


def loaded(root: Path, name: str, device: Device) -> LoadedModel:
    """A model on a device, warm, as it is when it is served."""
    model = load(root / name / "1", Terms(device, 1, MAX_ROWS, True, CertificateCache(None)))
    for runner in model.runners.values():
        runner.warm()
    return model


@pytest.fixture(scope="module")
def diffusion(models_root: Path, device: Device) -> LoadedModel:
    return loaded(models_root, "tiny-diffusion", device)


@pytest.fixture
def steps(diffusion: LoadedModel) -> Iterator[Runner]:
    """The denoiser's runner, with no lane left behind."""
    runner = diffusion.runners[DENOISER]
    yield runner
    for job_id in range(20):
        runner.forget(job_id)


@pytest.fixture
def jobs(models_root: Path) -> list[StepJob]:
    """Unlike requests, each of five steps."""
    schedule = read(models_root / "tiny-diffusion" / "1").schedule
    assert schedule is not None
    timesteps = schedule.spaced_timesteps(5)
    wanted: list[dict[str, Any]] = [
        {"sampler": "ddpm"},
        {"sampler": "ddim", "guidance_scale": 2.0},
        {"sampler": "dpmpp-2m", "history_wanted": True},
        {"sampler": "euler-ancestral", "preview_interval": 2, "estimates_wanted": True},
    ]
    return [
        StepJob(
            model=DENOISER[0],
            lane_count=1,
            tables=(samplers.descent(schedule, fields.pop("sampler"), timesteps),),
            start=Start(noise_scale=schedule.level(timesteps[0])[1]),
            seed=seed,
            sample_indices=np.zeros(1, np.int64),
            labels=np.array([seed % 3]),
            **fields,
        )
        for seed, fields in enumerate(wanted)
    ]


def segment(job_id: int, job: StepJob | CallJob, position: int = 0) -> Segment:
    entry = Scheduler(MAX_ROWS).add(job_id, job, "test", 0.0)
    return Segment(entry, Cohort(0, job.lane_count, position), job.lane_count, job.lane_count * job.rows_per_lane)


def walked(runner: Runner, jobs: Sequence[StepJob]) -> list[list[Outcome]]:
    """What jobs that ride together have to show, call by call."""
    outcomes = [
        evaluate(runner, [segment(number, job, position) for number, job in enumerate(jobs)]) for position in range(5)
    ]
    for number in range(len(jobs)):
        runner.forget(number)
    return outcomes


def arrays(outcomes: Sequence[Sequence[Outcome]], number: int) -> list[np.ndarray]:
    """Everything one of them has to show."""
    shown = []
    for call in outcomes:
        outcome = call[number]
        shown += [] if outcome.preview is None else [outcome.preview]
        shown += [array for _, array in sorted((outcome.outputs or {}).items())]
    return shown


def test_every_size_is_recorded(steps: Runner) -> None:
    """The tiny denoiser has no operator that keeps its calls from being CUDA graphs."""
    assert isinstance(steps, StepRunner)
    assert steps._graph.captures
    assert all(held.capture != NO_CAPTURE for held in steps._on_device.values())


def test_bytes_are_promised_and_kept(diffusion: LoadedModel, steps: Runner, jobs: list[StepJob]) -> None:
    """The class promises equal bytes, and a request gives them alone and in company."""
    assert is_promise(diffusion.servable.determinism_class)
    together = walked(steps, jobs)
    for number, job in enumerate(jobs):
        alone = arrays(walked(steps, [job]), 0)
        assert [array.tobytes() for array in arrays(together, number)] == [array.tobytes() for array in alone]


def test_the_gpu_agrees_with_the_cpu(models_root: Path, steps: Runner, jobs: list[StepJob]) -> None:
    """Samples, estimates, history and previews are the CPU's, to rounding."""
    on_cpu = loaded(models_root, "tiny-diffusion", Device("cpu")).runners[DENOISER]
    ours, theirs = walked(steps, jobs), walked(on_cpu, jobs)
    for number in range(len(jobs)):
        for one, other in zip(arrays(ours, number), arrays(theirs, number), strict=True):
            np.testing.assert_allclose(one, other, atol=1e-4)


def test_recorded_calls_give_the_bytes_of_others(
    models_root: Path, device: Device, steps: Runner, jobs: list[StepJob]
) -> None:
    """Without CUDA graphs the same kernels run, and give the same."""
    without = replace(device, cuda=replace(device.cuda, graphs=False))
    plain = loaded(models_root, "tiny-diffusion", without).runners[DENOISER]
    ours, theirs = walked(steps, jobs), walked(plain, jobs)
    for number in range(len(jobs)):
        for one, other in zip(arrays(ours, number), arrays(theirs, number), strict=True):
            assert one.tobytes() == other.tobytes()


def test_lanes_keep_their_state_when_the_pool_moves(steps: Runner, jobs: list[StepJob]) -> None:
    """Calls are recorded anew for the larger pool, and no lane takes a step more or less for it."""
    assert isinstance(steps, StepRunner)
    alone = [array.tobytes() for array in arrays(walked(steps, jobs[:1]), 0)]
    shown: list[list[Outcome]] = []
    before = steps._pool.capacity
    for position in range(5):
        shown.append(evaluate(steps, [segment(0, jobs[0], position)]))
        steps._pool.grow(steps._pool.capacity + 1)
    assert steps._pool.capacity > 8 * before
    assert [array.tobytes() for array in arrays(shown, 0)] == alone
    assert steps._on_device[steps.padded(1)].capture != NO_CAPTURE


def test_calls_may_overlap(steps: Runner, jobs: list[StepJob]) -> None:
    """Preparing the next call while one runs, and finishing one after the next was run, changes no byte."""
    alone = walked(steps, jobs)
    following: Any = steps.prepare([segment(number, job) for number, job in enumerate(jobs)])
    flown: list[tuple[Any, Any]] = []
    shown = []
    for position in range(1, 6):
        call = following
        if position < 5:
            following = steps.prepare([segment(number, job, position) for number, job in enumerate(jobs)])
        flown.append((call, steps.run(call)))
        if len(flown) > 1:
            shown.append(steps.finish(*flown.pop(0)))
    shown.append(steps.finish(*flown.pop()))
    for number in range(len(jobs)):
        assert [each.tobytes() for each in arrays(shown, number)] == [each.tobytes() for each in arrays(alone, number)]


def test_a_failed_call_leaves_every_lane_where_it_was(steps: Runner, jobs: list[StepJob]) -> None:
    """A call that is never run, as when another one fails before it, moves nobody."""
    alone = [array.tobytes() for array in arrays(walked(steps, jobs[:1]), 0)]
    shown = []
    for position in range(5):
        steps.prepare([segment(0, jobs[0], position)])
        shown.append(evaluate(steps, [segment(0, jobs[0], position)]))
    assert [array.tobytes() for array in arrays(shown, 0)] == alone


def test_single_calls_are_those_of_the_cpu(models_root: Path, device: Device) -> None:
    """A decoder's rows go up and its answers come down."""
    job = CallJob(
        model=DECODER[0],
        role=DECODER[1],
        lane_count=3,
        feeds={"z": Noise(Purpose.START), "y": np.arange(3), "u": Noise(Purpose.OUTPUT, uniform=True, stream=1)},
        outputs=("sample", "z"),
        seed=0,
        sample_indices=np.arange(3),
        draw_indices=np.zeros(3, np.int64),
    )
    ours, theirs = (
        evaluate(loaded(models_root, "tiny-vae", each).runners[DECODER], [segment(0, job)])[0].outputs
        for each in (device, Device("cpu"))
    )
    assert ours is not None
    assert theirs is not None
    np.testing.assert_allclose(ours["sample"], theirs["sample"], atol=1e-4)
    assert ours["z"].tobytes() == theirs["z"].tobytes()
