"""Laws of the contract, through real gRPC and real networks: the same numbers by every road, alone and in a crowd."""

import random
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bundles import SHAPE, write_diffusion
from doors import servables
from google.protobuf.json_format import MessageToJson, Parse
from hypothesis import given, settings
from hypothesis import strategies as st
from latentd import tensor
from latentd.digest import bundle_digest
from latentd.names import BUNDLE_FILE, SAMPLERS
from latentd.v1 import bundle_pb2
from latentd.v1 import generation_service_pb2 as pb
from latentd_server import noise
from latentd_server.noise import Purpose
from live import Live, gathered

D, V, G = "tiny-diffusion", "tiny-vae", "tiny-gan"


@pytest.fixture(scope="module")
def live(models_root: Path, call_length: str) -> Iterator[Live]:
    del call_length  # set before it starts
    running = Live(models_root, max_batch_rows=8)
    yield running
    running.stop()


def walk(sampler: str = "ddim", steps: int = 5, **fields: Any) -> pb.DiffusionOptions:
    return pb.DiffusionOptions(sampler=sampler, step_count=steps, **fields)


def image(seed: int = 0, count: int = 1) -> Any:
    return np.random.default_rng(seed).uniform(-1, 1, (count, *SHAPE)).astype(np.float32)


ROADS = [
    pb.SampleRequest(model=V, seed=3),
    pb.SampleRequest(model=V, seed=3, output_mode=pb.OUTPUT_MODE_DRAW, temperature=0.5),
    pb.SampleRequest(model=G, seed=3),
    pb.SampleRequest(model=D, seed=3, diffusion=walk("ddpm")),
    pb.SampleRequest(model=D, seed=3, diffusion=walk("euler-ancestral", guidance_scale=3)),
    pb.SampleRequest(model=D, seed=3, diffusion=walk("dpmpp-2m", start=pb.StartPoint(samples=tensor.encode(image())))),
]


@pytest.mark.parametrize("request_", ROADS)
def test_n_samples_in_one_request_are_n_requests(request_: pb.SampleRequest, live: Live) -> None:
    """Sample i depends on (seed, i) alone: asked for together, apart, or from the middle."""
    together = pb.SampleRequest()
    together.CopyFrom(request_)
    together.sample_count = 11  # more than a batch holds
    apart = []
    for index in range(11):
        one = pb.SampleRequest()
        one.CopyFrom(request_)
        one.first_sample_index = index
        apart.append(live.sample(one))
    assert live.sample(together) == b"".join(apart)
    assert len(set(apart)) == 11


@pytest.mark.parametrize("request_", ROADS)
def test_a_resolved_request_reproduces_its_samples(request_: pb.SampleRequest, live: Live) -> None:
    """Sent again, it resolves to itself and gives the same bytes; the seed may have been the server's."""
    request = pb.SampleRequest()
    request.CopyFrom(request_)
    request.ClearField("seed")
    responses = list(live.stub.Sample(request, timeout=60))
    again = pb.SampleRequest()
    again.CopyFrom(responses[0].accepted.resolved_request)
    if request.diffusion.HasField("start"):
        again.diffusion.start.samples.CopyFrom(request.diffusion.start.samples)
    repeated = list(live.stub.Sample(again, timeout=60))
    assert repeated[0].accepted.resolved_request == responses[0].accepted.resolved_request
    assert repeated[0].accepted.determinism_class == responses[0].accepted.determinism_class
    assert gathered(repeated) == gathered(responses)


def test_two_requests_without_a_seed_differ(live: Live) -> None:
    """The server draws a fresh one for each."""
    assert live.sample(pb.SampleRequest(model=V)) != live.sample(pb.SampleRequest(model=V))


@pytest.mark.parametrize("request_", ROADS)
def test_stream_gives_the_bytes_of_the_call(request_: pb.SampleRequest, live: Live) -> None:
    """The same request under an id of a stream is the same answer."""
    answers = live.stream(pb.StreamRequest(id=4, sample=request_))[4]
    assert gathered(answer.sample for answer in answers) == live.sample(request_)


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("guidance", [1.0, 2.5])
def test_a_loop_that_follows_its_schedule_is_sample(sampler: str, guidance: float, live: Live) -> None:
    """Client-driven or not, the bytes are equal, for every sampler, with and without guidance."""
    request = pb.SampleRequest(model=D, seed=8, sample_count=3, diffusion=walk(sampler, guidance_scale=guidance))
    states = live.loop(request)
    responses = live.stub.Sample(request, timeout=60)
    samples = {i: s for r in responses for i, s in zip(r.result.sample_indices, _rows(r.result), strict=True)}
    assert states.tobytes() == b"".join(samples[index].tobytes() for index in range(3))


def _rows(result: pb.SampleResult) -> Any:
    return tensor.decode(result.samples) if result.HasField("samples") else []


def test_a_loop_from_a_start_point_is_image_to_image(live: Live) -> None:
    """The loop opens at the level that strength says."""
    start = pb.StartPoint(samples=tensor.encode(image(count=2)), strength=0.5)
    request = pb.SampleRequest(model=D, seed=8, sample_count=2, diffusion=walk("ddpm", 8, start=start))
    opened = live.stream(pb.StreamRequest(id=1, open_denoise=request))[1][0].loop
    assert len(opened.remaining_timesteps) == 4
    stepped = pb.StreamRequest(id=1, take_step=pb.TakeStep(state_requested=True))
    answers = live.stream(pb.StreamRequest(id=1, open_denoise=request), *[stepped] * 4)[1]
    state = tensor.decode(answers[-1].loop.step.next_samples)
    samples = next(r.result for r in live.stub.Sample(request) if r.HasField("result"))
    assert tensor.decode(samples.samples).tobytes() == state.tobytes()


@pytest.mark.parametrize("eta", [0.0, 0.7])
@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_denoise_steps_by_hand_are_sample(eta: float, guidance: float, live: Live, models_root: Path) -> None:
    """A DDIM walk of DenoiseStep calls, with eta and step_index, ends in the bytes of Sample."""
    condition = pb.Condition(class_label=2)
    options = walk(eta=eta, guidance_scale=guidance)
    request = pb.SampleRequest(model=D, seed=6, sample_count=2, condition=condition, diffusion=options)
    schedule = servables(models_root)[D].schedule
    assert schedule is not None
    timesteps = [*schedule.spaced_timesteps(5), -1]
    drawn = noise.normals(noise.runs(Purpose.START, 6, range(2)), 16)
    x = np.float32(schedule.level(timesteps[0])[1]) * drawn.reshape(2, *SHAPE)
    for index, (current, following) in enumerate(pairwise(timesteps)):
        response = live.stub.DenoiseStep(
            pb.DenoiseStepRequest(
                model=D,
                noisy_samples=tensor.encode(x),
                timesteps=[current],
                next_timesteps=[following],
                condition=condition,
                guidance_scale=guidance,
                eta=eta,
                seed=6,
                step_index=index,
            )
        )
        x = tensor.decode(response.next_samples)
    result = next(r.result for r in live.stub.Sample(request) if r.HasField("result"))
    assert tensor.decode(result.samples).tobytes() == x.tobytes()


@pytest.mark.parametrize("model", [V, G])
def test_decoding_a_samples_latents_gives_the_sample(model: str, live: Live) -> None:
    """Sample is a prior draw, decoded for the label it was drawn for."""
    request = pb.SampleRequest(model=model, seed=1, sample_count=4)
    result = next(r.result for r in live.stub.Sample(request) if r.HasField("result"))
    condition = pb.Condition(class_labels=result.class_labels)
    decoded = live.stub.Decode(pb.DecodeRequest(model=model, latents=result.latents, condition=condition))
    assert decoded.samples == result.samples


def test_decode_of_pure_noise_is_sample(live: Live) -> None:
    """DDIM from a given x_T is the road Sample takes from its own."""
    drawn = noise.normals(noise.runs(Purpose.START, 2, range(3)), 16)
    options = walk("ddim", 7)
    level = np.float32(np.sin(100 / 101 * np.pi / 2))
    latents = tensor.encode(level * drawn.reshape(3, *SHAPE))
    decoded = live.stub.Decode(pb.DecodeRequest(model=D, latents=latents, seed=2, diffusion=options))
    request = pb.SampleRequest(model=D, seed=2, sample_count=3, diffusion=options)
    result = next(r.result for r in live.stub.Sample(request) if r.HasField("result"))
    assert decoded.samples == result.samples


def test_encode_then_decode_comes_back_the_closer_the_more_steps(tmp_path: Path) -> None:
    """DDIM inversion is undone by DDIM, up to an error that falls with the number of steps."""
    unclipped(write_diffusion(tmp_path))
    live = Live(tmp_path)
    x0 = image(count=4)
    fields: dict[str, Any] = {"model": D, "condition": pb.Condition(class_label=1)}
    errors = []
    for count in (5, 20, 100):
        options = walk("", count)
        encoded = live.stub.Encode(pb.EncodeRequest(**fields, samples=tensor.encode(x0), diffusion=options))
        decoded = live.stub.Decode(pb.DecodeRequest(**fields, latents=encoded.latents, diffusion=options))
        errors.append(float(np.abs(tensor.decode(decoded.samples) - x0).mean()))
    live.stop()
    assert errors[0] > 2 * errors[1] > 4 * errors[2], errors


def unclipped(directory: Path) -> None:
    """Clipping throws information away, so what it touches cannot come back."""
    path = directory / BUNDLE_FILE
    bundle = Parse(path.read_text(), bundle_pb2.Bundle())
    bundle.model.diffusion.clip_denoised = False
    bundle.model.digest = bundle_digest(bundle)
    path.write_text(MessageToJson(bundle))


def test_no_label_is_the_unconditional_network_of_guidance(live: Live) -> None:
    """DenoiseStep without a label gives what a guidance scale of 0 leaves of any label."""
    fields: dict[str, Any] = {"model": D, "noisy_samples": tensor.encode(image(count=2)), "timesteps": [30]}
    unlabelled = live.stub.DenoiseStep(pb.DenoiseStepRequest(**fields))
    condition = pb.Condition(class_label=1)
    guided = live.stub.DenoiseStep(pb.DenoiseStepRequest(**fields, condition=condition, guidance_scale=0))
    np.testing.assert_allclose(
        tensor.decode(guided.noise_estimates), tensor.decode(unlabelled.noise_estimates), rtol=1e-6
    )
    labelled = live.stub.DenoiseStep(pb.DenoiseStepRequest(**fields, condition=condition))
    assert labelled.noise_estimates != unlabelled.noise_estimates


def test_a_score_without_a_label_sums_over_labels(live: Live) -> None:
    """Ln sum_y p(y) exp(score given y), from the scores given each label with the same draws."""
    fields: dict[str, Any] = {"model": V, "samples": tensor.encode(image(count=3)), "seed": 4, "draw_count": 5}
    summed = live.stub.Score(pb.ScoreRequest(**fields)).values
    given_label = [
        live.stub.Score(pb.ScoreRequest(**fields, condition=pb.Condition(class_label=y))).values for y in range(3)
    ]
    want = np.log(np.array([0.5, 0.25, 0.25]) @ np.exp(np.array(given_label)))
    np.testing.assert_allclose(summed, want, rtol=1e-6)


def test_previews_are_estimates_under_way(live: Live) -> None:
    """Every second step of four, for every sample, in the type that was asked for."""
    request = pb.SampleRequest(
        model=D, sample_count=2, output_data_type=3, diffusion=walk("ddim", 4, preview_interval_steps=1)
    )
    responses = list(live.stub.Sample(request))
    assert responses[0].HasField("accepted")
    previews = [response.preview for response in responses if response.HasField("preview")]
    assert all(preview.total_step_count == 4 for preview in previews)
    assert all(1 <= preview.completed_step_count <= 3 for preview in previews)
    assert all(preview.estimates.data_type == 3 for preview in previews)


steps = st.builds(
    lambda sampler, count, guidance, previews, label, many, seed: pb.SampleRequest(
        model=D,
        seed=seed,
        sample_count=many,
        condition=None if label is None else pb.Condition(class_label=label),
        diffusion=walk(sampler, count, guidance_scale=guidance, preview_interval_steps=previews),
    ),
    st.sampled_from(SAMPLERS),
    st.integers(1, 12),
    st.sampled_from([None, 1.0, 0.0, 4.0]),
    st.integers(0, 2),
    st.sampled_from([None, 0, 2]),
    st.integers(1, 11),
    st.integers(0, 5),
)
one_shots = st.builds(
    lambda model, many, seed, mode: pb.SampleRequest(
        model=model, seed=seed, sample_count=many, output_mode=mode if model == V else 0
    ),
    st.sampled_from([V, G]),
    st.integers(1, 11),
    st.integers(0, 5),
    st.sampled_from([1, 2]),
)
crowds = st.lists(st.one_of(steps, one_shots), min_size=2, max_size=10)


@settings(deadline=None, max_examples=25)
@given(crowd=crowds, order=st.randoms(use_true_random=False))
def test_a_requests_bytes_are_equal_alone_and_in_any_crowd(
    crowd: list[pb.SampleRequest], order: random.Random, live: Live
) -> None:
    """Whatever rides along, joins, leaves or is cancelled: alone, on one stream or on many calls, the same bytes."""
    alone = [live.sample(request) for request in crowd]
    wire = [pb.StreamRequest(id=index, sample=request) for index, request in enumerate(crowd)]
    order.shuffle(wire)
    doomed = pb.SampleRequest(model=D, seed=9, sample_count=20, diffusion=walk("heun", 30, guidance_scale=2))
    for place in range(0, len(wire), 3):
        wire.insert(place, pb.StreamRequest(id=1000 + place, sample=doomed))
    wire += [pb.StreamRequest(id=1000 + place, cancel=pb.Cancel()) for place in range(0, len(crowd), 3)]
    others = [live.stub.Sample(request, timeout=60) for request in crowd]
    answers = live.stream(*wire)
    for index, want in enumerate(alone):
        assert gathered(answer.sample for answer in answers[index]) == want
    for call, want in zip(others, alone, strict=True):
        assert gathered(call) == want
