"""Guidance within an interval of timesteps: the bytes it gives, the evaluations it saves, what is refused."""

from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bundles import SHAPE, TIMESTEPS
from latentd import tensor
from latentd.names import SAMPLERS
from latentd.v1 import generation_service_pb2 as pb
from latentd_server import noise, resolve
from latentd_server.failures import FieldsInvalidError
from latentd_server.job import StepJob
from latentd_server.noise import Purpose
from latentd_server.plans import Decoding, Encoding, Limits
from live import Live, gathered

D = "tiny-diffusion"
LANES, STEPS, SCALE = 3, 10, 2.5
EVERYTHING, NOTHING = (0, TIMESTEPS - 1), (20, 28)  # ten steps visit 9, 19 ... 99
MIDDLE = (30, 69)  # four of them
LABEL = pb.Condition(class_label=1)


@pytest.fixture(scope="module")
def live(models_root: Path) -> Iterator[Live]:
    running = Live(models_root, max_batch_rows=8)
    yield running
    running.stop()


def walk(interval: tuple[int, int] | None, scale: float = SCALE, sampler: str = "ddpm") -> pb.DiffusionOptions:
    options = pb.DiffusionOptions(sampler=sampler, step_count=STEPS, guidance_scale=scale)
    if interval:
        options.guidance_interval.min_timestep, options.guidance_interval.max_timestep = interval
    return options


def asked(options: pb.DiffusionOptions, count: int = LANES) -> pb.SampleRequest:
    return pb.SampleRequest(model=D, seed=6, sample_count=count, condition=LABEL, diffusion=options)


def cost(live: Live, options: pb.DiffusionOptions) -> tuple[bytes, int]:
    """The samples of a walk, and how many evaluations they took."""
    responses = list(live.stub.Sample(asked(options), timeout=60))
    return gathered(responses), sum(response.result.stats.evaluation_count for response in responses)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_an_interval_of_everything_is_none_and_one_of_nothing_is_no_guidance(sampler: str, live: Live) -> None:
    """By every sampler, in bytes and in evaluations; what lies between costs what lies between."""
    whole, unguided = cost(live, walk(None, sampler=sampler)), cost(live, walk(None, 1.0, sampler))
    assert cost(live, walk(EVERYTHING, sampler=sampler)) == whole
    assert cost(live, walk(NOTHING, sampler=sampler)) == unguided
    samples, evaluations = cost(live, walk(MIDDLE, sampler=sampler))
    assert unguided[1] < evaluations < whole[1] == 2 * unguided[1]
    assert samples not in (whole[0], unguided[0])


def test_only_steps_inside_take_two_rows(live: Live) -> None:
    """Ten steps, four of them guided: fourteen evaluations a sample."""
    assert cost(live, walk(MIDDLE))[1] == LANES * (STEPS + 4)


@pytest.mark.parametrize("sampler", ["ddim", "heun", "dpmpp-2m-sde"])
def test_a_loop_is_guided_where_sample_is(sampler: str, live: Live) -> None:
    """Step by step the bytes are those of Sample."""
    options = walk(MIDDLE, sampler=sampler)
    responses = live.stub.Sample(asked(options, 1), timeout=60)
    sample = next(tensor.decode(r.result.samples) for r in responses if r.HasField("result"))
    assert live.loop(asked(options, 1)).tobytes() == sample.tobytes()


def test_steps_by_hand_with_the_scale_of_each_are_sample(live: Live, held: dict[str, Any]) -> None:
    """DenoiseStep, at the scale inside and at 1 outside, ends in the bytes of Sample."""
    schedule = held[D].schedule
    timesteps = [*schedule.spaced_timesteps(STEPS), -1]
    drawn = noise.normals(noise.runs(Purpose.START, 6, [0]), 16)
    x = np.float32(schedule.level(timesteps[0])[1]) * drawn.reshape(1, *SHAPE)
    for current, following in pairwise(timesteps):
        step = pb.DenoiseStepRequest(
            model=D,
            noisy_samples=tensor.encode(x),
            timesteps=[current],
            next_timesteps=[following],
            condition=LABEL,
            guidance_scale=SCALE if MIDDLE[0] <= current <= MIDDLE[1] else 1.0,
        )
        x = tensor.decode(live.stub.DenoiseStep(step).next_samples)
    responses = live.stub.Sample(asked(walk(MIDDLE, sampler="ddim"), 1))
    assert next(tensor.decode(r.result.samples) for r in responses if r.HasField("result")).tobytes() == x.tobytes()


def test_a_resolved_request_carries_the_interval(live: Live) -> None:
    """With both ends filled in; sent again it resolves to itself and gives the same bytes."""
    request = asked(walk(None))
    request.diffusion.guidance_interval.min_timestep = 50
    responses = list(live.stub.Sample(request, timeout=60))
    resolved = responses[0].accepted.resolved_request
    assert resolved.diffusion.guidance_interval == pb.GuidanceInterval(min_timestep=50, max_timestep=TIMESTEPS - 1)
    again = list(live.stub.Sample(resolved, timeout=60))
    assert again[0].accepted.resolved_request == resolved
    assert gathered(again) == gathered(responses)


def test_encode_and_decode_are_guided_within_an_interval_too(held: dict[str, Any]) -> None:
    """Up and down, by the timestep that the network is told."""
    images = tensor.encode(np.zeros((1, *SHAPE), np.float32))
    options = walk(MIDDLE, sampler="ddim")
    up = resolve.encode(pb.EncodeRequest(samples=images, condition=LABEL, diffusion=options), held[D], Limits())
    down = resolve.decode(pb.DecodeRequest(latents=images, condition=LABEL, diffusion=options), held[D], Limits())
    assert isinstance(up, Encoding)
    assert isinstance(down, Decoding)
    for job in (up.job, down.job):
        assert isinstance(job, StepJob)
        assert job.evaluations_per_lane == STEPS + 4
        inside = (job.tables[0].timesteps >= MIDDLE[0]) & (job.tables[0].timesteps <= MIDDLE[1])
        assert job.rows_by_evaluation == (1 + inside).tolist()


def test_a_scale_of_one_may_have_an_interval_and_costs_nothing_for_it(held: dict[str, Any]) -> None:
    """So that a sweep over scales needs no exception."""
    plan = resolve.sample(asked(walk(MIDDLE, 1.0)), held[D], 0, Limits())
    assert plan.job.evaluations_per_lane == STEPS
    assert plan.job.rows_per_lane == 1


@pytest.mark.parametrize(
    ("scale", "interval", "path", "part"),
    [
        (None, pb.GuidanceInterval(), "", "must be unset where guidance_scale is"),
        (2.0, pb.GuidanceInterval(min_timestep=-1), ".min_timestep", "must be from 0 to 99; got -1"),
        (2.0, pb.GuidanceInterval(max_timestep=100), ".max_timestep", "must be from 0 to 99; got 100"),
        (2.0, pb.GuidanceInterval(min_timestep=9, max_timestep=8), "", "at most max_timestep; got 9 and 8"),
    ],
)
def test_what_is_no_interval_is_refused(
    scale: float | None, interval: pb.GuidanceInterval, path: str, part: str, held: dict[str, Any]
) -> None:
    """By name, saying what is allowed, and with everything else that is wrong."""
    options = pb.DiffusionOptions(guidance_scale=scale, guidance_interval=interval, step_count=-1)
    with pytest.raises(FieldsInvalidError) as caught:
        resolve.sample(pb.SampleRequest(diffusion=options), held[D], 0, Limits())
    found = {violation.path: violation.description for violation in caught.value.violations}
    assert part in found[f"diffusion.guidance_interval{path}"]
    assert "diffusion.step_count" in found
