"""Requests become the jobs they mean, and say so: defaults, labels, noise, tables."""

from collections.abc import Mapping
from dataclasses import fields, is_dataclass, replace
from typing import Any

import numpy as np
import pytest
from bundles import LATENT, SHAPE
from google.protobuf.message import Message
from hypothesis import given, settings
from hypothesis import strategies as st
from latentd import tensor
from latentd.names import SAMPLERS
from latentd.v1 import bundle_pb2, tensor_pb2
from latentd.v1 import generation_service_pb2 as pb
from latentd_server import loops, noise, resolve
from latentd_server.admission import Work
from latentd_server.failures import FieldsInvalidError
from latentd_server.job import CallJob, Noise, Repeated, StepJob
from latentd_server.noise import Purpose
from latentd_server.plans import Diffusing, Encoding, Limits

LIMITS = Limits()
D, V, G = "tiny-diffusion", "tiny-vae", "tiny-gan"


def images(count: int = 2, dtype: Any = np.float32) -> tensor_pb2.Tensor:
    return tensor.encode(np.arange(count * 16).reshape(count, *SHAPE).astype(dtype))


conditions = st.one_of(
    st.none(),
    st.builds(lambda label: pb.Condition(class_label=label), st.integers(0, 2)),
)
walks = st.builds(
    lambda sampler, steps, eta, guidance, previews, strength: pb.DiffusionOptions(
        sampler=sampler,
        step_count=steps,
        eta=eta if sampler in ("ddim", "euler-ancestral") else None,
        guidance_scale=guidance,
        preview_interval_steps=previews,
        start=None if strength is None else pb.StartPoint(samples=images(1), strength=strength),
    ),
    st.sampled_from(["", *SAMPLERS]),
    st.integers(0, 100),
    st.one_of(st.none(), st.floats(0, 1)),
    st.one_of(st.none(), st.floats(-5, 5)),
    st.integers(0, 5),
    st.one_of(st.none(), st.floats(0.01, 1)),
)
requests = st.one_of(
    st.builds(
        lambda count, seed, condition, walk, dtype, first: (
            D,
            pb.SampleRequest(
                sample_count=count,
                seed=seed,
                condition=condition,
                diffusion=walk,
                output_data_type=dtype,
                first_sample_index=first,
            ),
        ),
        st.integers(0, 5),
        st.one_of(st.none(), st.integers(-(2**63), 2**63 - 1)),
        conditions,
        st.one_of(st.none(), walks),
        st.integers(0, 3),
        st.integers(0, 2**31 - 10),
    ),
    st.builds(
        lambda name, count, seed, condition, temperature, mode: (
            name,
            pb.SampleRequest(
                sample_count=count,
                seed=seed,
                condition=condition,
                temperature=temperature,
                output_mode=mode if name == V else 0,
            ),
        ),
        st.sampled_from([V, G]),
        st.integers(0, 5),
        st.one_of(st.none(), st.integers(-(2**63), 2**63 - 1)),
        conditions,
        st.one_of(st.none(), st.floats(0, 3)),
        st.integers(0, 2),
    ),
)


@settings(deadline=None, max_examples=150)
@given(case=requests)
def test_resolving_a_resolved_request_changes_nothing(case: tuple[str, Any], held: dict[str, Any]) -> None:
    """`resolved_request`, sent again with its start point, resolves to itself and to the same job."""
    name, request = case
    first = resolve.sample(request, held[name], 12345, LIMITS)
    again = pb.SampleRequest()
    again.CopyFrom(first.resolved_request)
    if request.diffusion.HasField("start"):
        again.diffusion.start.samples.CopyFrom(request.diffusion.start.samples)
    second = resolve.sample(again, held[name], 999, LIMITS)
    assert second.resolved_request == first.resolved_request
    assert second.job.seed == first.job.seed
    assert second.job.sample_indices.tolist() == first.job.sample_indices.tolist()
    if isinstance(first.job, StepJob):
        assert isinstance(second.job, StepJob)
        assert second.job.tables[0] is first.job.tables[0]
        assert second.job.labels.tolist() == first.job.labels.tolist()
        assert second.job.guidance_scale == first.job.guidance_scale


def plain(value: Any) -> Any:
    """What can be compared of plans, all the way down."""
    if is_dataclass(value) and not isinstance(value, type):
        return type(value), [plain(getattr(value, each.name)) for each in fields(value)]
    if isinstance(value, np.ndarray):
        return value.dtype, value.shape, value.tobytes()
    if isinstance(value, Message):
        return value.SerializeToString(deterministic=True)
    if isinstance(value, Mapping):
        return [(key, plain(each)) for key, each in value.items()]
    return [plain(each) for each in value] if isinstance(value, tuple) else value


@settings(deadline=None, max_examples=150)
@given(case=requests, seeds=st.lists(st.integers(-(2**63), 2**63 - 1), min_size=1, max_size=2), promise=st.booleans())
def test_a_plan_that_was_kept_is_the_plan_that_would_be_made(
    case: tuple[str, Any], seeds: list[int], promise: bool, held: dict[str, Any]
) -> None:
    """Requests that differ in their seed alone, or have none, resolve as if none had come before; so do those whose
    labels are drawn, and those of models that promise nothing.
    """
    name, request = case
    servable = held[name] if promise else replace(held[name], promise=False)
    request.ClearField("seed")
    for fresh in (5, 6):
        kept = resolve.sample(request, servable, fresh, LIMITS)
        assert plain(kept) == plain(resolve._sample(request, servable, fresh, LIMITS))
    for seed in seeds:
        request.seed = seed
        kept = resolve.sample(request, servable, 7, LIMITS)
        assert plain(kept) == plain(resolve._sample(request, servable, 7, LIMITS))
        assert request.seed == seed


LABEL = pb.Condition(class_label=1)
NOT_KEPT = {
    "many samples": (V, pb.SampleRequest(sample_count=1025, condition=LABEL)),
    "many bytes": (
        D,
        pb.SampleRequest(
            sample_count=9,
            condition=LABEL,
            diffusion=pb.DiffusionOptions(start=pb.StartPoint(samples=images(9), strength=0.5)),
        ),
    ),
    "samples further on": (V, pb.SampleRequest(sample_count=4, first_sample_index=4, condition=LABEL)),
    "labels to be drawn": (V, pb.SampleRequest(sample_count=4)),
}


@pytest.mark.parametrize("why", NOT_KEPT)
def test_plans_are_kept_where_that_pays(why: str, held: dict[str, Any]) -> None:
    """Those that others will want, and small ones: clients could fill the server with large ones."""
    name, request = NOT_KEPT[why]
    limits = Limits(max_samples=2000)
    cached = resolve._sample_of_any_seed
    cached.cache_clear()
    resolve.sample(request, held[name], 0, limits)
    for servable in (replace(held[V], promise=False), replace(held[V], decoder=held[V])):
        resolve.sample(pb.SampleRequest(sample_count=4, condition=LABEL), servable, 0, limits)
    assert cached.cache_info()[:2] == (0, 0)
    for seed in range(3):
        plan = resolve.sample(pb.SampleRequest(sample_count=1024, seed=seed, condition=LABEL), held[V], 0, limits)
        assert plan.job.seed == plan.resolved_request.seed == seed
        assert not plan.job.sample_indices.flags.writeable
    assert cached.cache_info()[:2] == (2, 1)


@settings(deadline=None, max_examples=100)
@given(case=requests)
def test_what_a_request_takes_at_least_is_told_beforehand(case: tuple[str, Any], held: dict[str, Any]) -> None:
    """No valid request is refused for more than its job would take; nearly all of it is known where steps are given."""
    name, request = case
    job = resolve.sample(request, held[name], 1, LIMITS).job
    least, takes = resolve.least_evaluations(request, LIMITS), job.lane_count * job.evaluations_per_lane
    assert job.lane_count <= least <= takes or request.diffusion.HasField("start")
    if request.diffusion.step_count and request.diffusion.sampler == "ddim" and job.rows_per_lane == 1:
        assert least == takes or request.diffusion.HasField("start")
    work, own = resolve.least_work(request, held[name], LIMITS), Work.of(job)
    assert (work is None) == (name != D)
    if work is not None:
        assert work.key == own.key
        assert least <= work.evaluations <= own.evaluations
        assert work.steps <= own.steps
        assert work.rows <= own.rows


def test_every_default_is_filled_in(held: dict[str, Any]) -> None:
    """`resolved_request` leaves nothing to this server's defaults."""
    plan = resolve.sample(pb.SampleRequest(model=D), held[D], 5, LIMITS)
    assert plan.resolved_request == pb.SampleRequest(
        model="tiny-diffusion@1",
        sample_count=1,
        seed=5,
        output_data_type=tensor_pb2.DATA_TYPE_FLOAT32,
        output_mode=pb.OUTPUT_MODE_MEAN,
        diffusion=pb.DiffusionOptions(sampler="ddim", step_count=10, eta=0, guidance_scale=1),
    )
    plan = resolve.sample(pb.SampleRequest(model=V), held[V], 5, LIMITS)
    assert plan.resolved_request.temperature == 1
    assert not plan.resolved_request.HasField("diffusion")


def test_labels_are_drawn_by_seed_and_sample(held: dict[str, Any]) -> None:
    """Sample i's label depends on (seed, i) alone, and follows p(label)."""
    together = resolve.sample(pb.SampleRequest(sample_count=1000, seed=3), held[D], 0, LIMITS)
    apart = resolve.sample(pb.SampleRequest(sample_count=10, seed=3, first_sample_index=500), held[D], 0, LIMITS)
    assert together.labels is not None
    assert apart.labels is not None
    assert together.labels[500:510].tolist() == apart.labels.tolist()
    shares = np.bincount(together.labels, minlength=3) / 1000
    np.testing.assert_allclose(shares, [0.5, 0.25, 0.25], atol=0.06)


def test_latents_are_drawn_from_the_prior_at_its_temperature(held: dict[str, Any]) -> None:
    """A one-shot sample is a decoder fed with a scaled prior draw and, for a draw, with output noise."""
    plan = resolve.sample(
        pb.SampleRequest(seed=1, temperature=0.5, output_mode=pb.OUTPUT_MODE_DRAW), held[V], 0, LIMITS
    )
    assert isinstance(plan.job, CallJob)
    assert plan.job.feeds["z"] == Noise(Purpose.START, scale=0.5)
    assert plan.job.feeds["u"] == Noise(Purpose.OUTPUT, uniform=True)
    assert plan.job.outputs == ("draw", "z")


def test_the_mean_of_a_decoder_takes_no_noise(held: dict[str, Any]) -> None:
    """Noise that only a draw would use is not drawn for the mean."""
    latents = tensor.encode(np.zeros((2, LATENT), np.float32))
    plan = resolve.decode(pb.DecodeRequest(latents=latents), held[V], LIMITS)
    assert isinstance(plan.job, CallJob)
    assert isinstance(plan.job.feeds["u"], np.ndarray)
    assert not plan.job.feeds["u"].any()
    assert plan.samples == "sample"


@pytest.mark.parametrize(
    ("dtype", "low", "high"), [(np.float32, 0.0, 31.0), (np.float16, 0.0, 31.0), (np.uint8, -1.0, 31 / 255 * 2 - 1)]
)
def test_samples_arrive_as_float32_in_the_models_range(
    dtype: Any, low: float, high: float, held: dict[str, Any]
) -> None:
    """float16 is widened; 0..255 of UINT8 become the model's -1..1."""
    plan = resolve.encode(pb.EncodeRequest(samples=images(dtype=dtype)), held[V], LIMITS)
    assert isinstance(plan.job, CallJob)
    fed = plan.job.feeds["x"]
    assert isinstance(fed, np.ndarray)
    assert fed.dtype == np.float32
    np.testing.assert_allclose([fed.min(), fed.max()], [low, high], rtol=1e-6)


def test_an_encoder_may_tell_classes_beside_latents(held: dict[str, Any]) -> None:
    """Latents count as such whatever else is told: their mean, with a log variance or without; classes ride along."""
    bundle = bundle_pb2.Bundle()
    bundle.CopyFrom(held[V].bundle)
    encoder = next(network for network in bundle.networks if network.role == bundle_pb2.Network.ROLE_ENCODER)
    mean, log_variance = (output.name for output in encoder.outputs)
    encoder.outputs.add(name="p", meaning=bundle_pb2.NetworkOutput.MEANING_CLASS_PROBABILITY)
    plan = resolve.encode(pb.EncodeRequest(samples=images(), seed=1), replace(held[V], bundle=bundle), LIMITS)
    assert isinstance(plan, Encoding)
    assert (plan.latents, plan.log_variance, plan.classes, plan.categorical) == (mean, log_variance, "p", False)
    assert plan.job.outputs == (mean, log_variance, "p")
    del encoder.outputs[1]
    plan = resolve.encode(pb.EncodeRequest(samples=images()), replace(held[V], bundle=bundle), LIMITS)
    assert isinstance(plan, Encoding)
    assert (plan.latents, plan.log_variance, plan.classes, plan.categorical) == (mean, None, "p", False)
    with pytest.raises(FieldsInvalidError, match="seed"):  # there is no posterior of latents to draw from
        resolve.encode(pb.EncodeRequest(samples=images(), seed=1), replace(held[V], bundle=bundle), LIMITS)


def test_image_to_image_starts_inside_the_schedule(held: dict[str, Any]) -> None:
    """x_s = alpha_s img + sigma_s z at the first of the timesteps that strength leaves."""
    options = pb.DiffusionOptions(step_count=10, start=pb.StartPoint(samples=images(1), strength=0.3))
    plan = resolve.sample(pb.SampleRequest(sample_count=2, diffusion=options), held[D], 0, LIMITS)
    job = plan.job
    assert isinstance(job, StepJob)
    assert len(job.tables[0].timesteps) == 3
    alpha, sigma = held[D].schedule.level(int(job.tables[0].timesteps[0]))
    assert (job.start.scale, job.start.noise_scale) == (alpha, sigma)
    assert job.start.values is not None
    assert not plan.resolved_request.diffusion.start.HasField("samples")


def test_encode_without_a_label_uses_the_unconditional_network(held: dict[str, Any]) -> None:
    """Inversion and DenoiseStep never invent a label."""
    encoding = resolve.encode(pb.EncodeRequest(samples=images()), held[D], LIMITS)
    stepping = resolve.denoise_step(pb.DenoiseStepRequest(noisy_samples=images(), timesteps=[5]), held[D], LIMITS)
    for plan in (encoding, stepping):
        assert not isinstance(plan, Diffusing)
        assert isinstance(plan.job, StepJob)
        assert plan.job.labels.tolist() == [-1, -1]


def test_decode_draws_labels_as_sample_does(held: dict[str, Any]) -> None:
    """Row i's label comes from p(label) by (seed, i), an unset seed counting as 0."""
    plan = resolve.decode(pb.DecodeRequest(latents=images(20)), held[D], LIMITS)
    assert isinstance(plan.job, StepJob)
    cumulative = np.cumsum([0.5, 0.25, 0.25])
    assert plan.job.labels.tolist() == noise.labels(0, np.arange(20), cumulative).tolist()


def test_decode_is_deterministic_ddim_whatever_the_models_default(held: dict[str, Any]) -> None:
    """The default walk of Decode adds no noise."""
    plan = resolve.decode(pb.DecodeRequest(latents=images()), held[D], LIMITS)
    assert isinstance(plan.job, StepJob)
    assert not plan.job.tables[0].stochastic.any()
    assert plan.job.start.noise_scale == 0


def test_unguided_rows_pay_for_one_network_call(held: dict[str, Any]) -> None:
    """A guidance scale of 1, given or not, takes one row a lane; any other takes two."""
    for scale, rows in ((None, 1), (1.0, 1), (0.0, 2), (4.0, 2)):
        options = pb.DiffusionOptions(guidance_scale=scale)
        plan = resolve.sample(pb.SampleRequest(diffusion=options), held[D], 0, LIMITS)
        assert plan.job.rows_per_lane == rows


def test_rows_of_a_step_may_stand_at_different_timesteps(held: dict[str, Any]) -> None:
    """Each row gets a table of its own; equal rows share one."""
    request = pb.DenoiseStepRequest(noisy_samples=images(3), timesteps=[9, 8, 7], next_timesteps=[-1])
    plan = resolve.denoise_step(request, held[D], LIMITS)
    assert [int(table.timesteps[0]) for table in plan.job.tables] == [9, 8, 7]
    request = pb.DenoiseStepRequest(noisy_samples=images(3), timesteps=[9])
    plan = resolve.denoise_step(request, held[D], LIMITS)
    assert len(plan.job.tables) == 1
    assert not plan.stepped


def test_score_runs_over_rows_classes_and_draws(held: dict[str, Any]) -> None:
    """Without a label every class is scored with the same draws; noise differs by row and draw alone."""
    plan = resolve.score(pb.ScoreRequest(samples=images(2), draw_count=4, seed=8), held[V], LIMITS)
    job = plan.job
    assert job.lane_count == 2 * 3 * 4
    assert isinstance(job.feeds["y"], np.ndarray)
    assert job.feeds["y"].tolist() == ([0] * 4 + [1] * 4 + [2] * 4) * 2
    assert isinstance(job.feeds["x"], Repeated)  # rows are copied when they ride, not for a request at the door
    rows = np.arange(32, dtype=np.float32).reshape(2, *SHAPE)
    np.testing.assert_array_equal(job.feeds["x"][:], np.repeat(rows, 12, axis=0))
    np.testing.assert_array_equal(job.feeds["x"][11:14], rows[[0, 1, 1]])
    assert job.sample_indices.tolist() == [0] * 12 + [1] * 12
    assert job.draw_indices.tolist() == [0, 1, 2, 3] * 6
    np.testing.assert_allclose(np.exp(plan.log_prior), [0.5, 0.25, 0.25])
    labelled = pb.ScoreRequest(samples=images(2), condition=pb.Condition(class_label=1))
    assert resolve.score(labelled, held[V], LIMITS).job.lane_count == 2 * 16


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_loop_takes_the_rows_that_sample_would(sampler: str, held: dict[str, Any]) -> None:
    """The tables of a loop's steps, one behind the other, are the table of Sample."""
    request = pb.SampleRequest(seed=1, diffusion=pb.DiffusionOptions(sampler=sampler, step_count=6))
    whole = resolve.sample(request, held[D], 0, LIMITS).job
    assert isinstance(whole, StepJob)
    loop, position = resolve.open_loop(request, held[D], 0, LIMITS)
    rows, timesteps, first_steps = [], [], []
    while position.remaining:
        step = loops.take_step(pb.TakeStep(), loop, position)
        rows.append(step.job.tables[0].coefficients)
        timesteps += step.job.tables[0].timesteps.tolist()
        first_steps.append(step.job.first_step_index)
        position = loops.stepped(position, step, np.zeros((1, *SHAPE)), np.zeros((1, *SHAPE)))
    assert np.concatenate(rows).tobytes() == whole.tables[0].coefficients.tobytes()
    assert timesteps == whole.tables[0].timesteps.tolist()
    assert first_steps == np.cumsum([0, *(len(row) for row in rows[:-1])]).tolist()
    assert position.current == -1


def test_a_loop_may_leave_its_schedule(held: dict[str, Any]) -> None:
    """A step to a timestep of the caller's own drops what it jumps over."""
    request = pb.SampleRequest(diffusion=pb.DiffusionOptions(timesteps=[90, 60, 30]))
    loop, position = resolve.open_loop(request, held[D], 0, LIMITS)
    assert (position.current, position.remaining) == (90, (60, 30, -1))
    step = loops.take_step(pb.TakeStep(next_timestep=45), loop, position)
    position = loops.stepped(position, step, np.zeros((1, *SHAPE)), np.zeros((1, *SHAPE)))
    assert (position.previous, position.current, position.remaining) == (90, 45, (30, -1))
