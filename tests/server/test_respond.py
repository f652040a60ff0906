"""What came of a job becomes the answer: element types, groups, posterior draws, reduced scores, costs."""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from bundles import LATENT, SHAPE
from latentd import tensor
from latentd.v1 import generation_service_pb2 as pb
from latentd.v1 import tensor_pb2
from latentd_server import noise, resolve, respond
from latentd_server.job import Cost, Finished, Preview
from latentd_server.noise import Purpose
from latentd_server.plans import Encoding, Limits, OutputForm, Sampling, Scoring
from latentd_server.respond import Gathered

LIMITS = Limits()
D, V = "tiny-diffusion", "tiny-vae"
UINT8 = OutputForm(tensor_pb2.DATA_TYPE_UINT8, -1.0, 1.0)
COST = Cost(queue_s=0.25, compute_s=1.5, evaluations=12, batches=4, rows=10)


def gathered(**outputs: Any) -> Gathered:
    """The outputs of a job that finished all at once."""
    count = len(next(iter(outputs.values())))
    whole = Gathered(count)
    whole.add(Finished(np.arange(count), outputs, COST, last=True))
    return whole


def images(count: int = 2) -> tensor_pb2.Tensor:
    return tensor.encode(np.zeros((count, *SHAPE), np.float32))


def test_uint8_maps_the_range_to_0_to_255_half_to_even() -> None:
    """The ends meet 0 and 255, halves go to the even neighbour, what is outside is clipped, NaN is the middle."""
    halves = np.array([0.5, 1.5, 2.5], np.float32)
    form = OutputForm(tensor_pb2.DATA_TYPE_UINT8, 0.0, 255.0)
    assert respond.convert(halves, form).tolist() == [0, 2, 2]
    ends = np.array([-1, 1, -7, 7, 0], np.float32)
    assert respond.convert(ends, UINT8).tolist() == [0, 255, 0, 255, 128]


def test_uint8_there_and_back_is_the_identity() -> None:
    """Pixels read as UINT8 and written as UINT8 are the same pixels."""
    pixels = np.arange(256, dtype=np.uint8)
    values = pixels.astype(np.float32) * np.float32(2 / 255) + np.float32(-1)
    assert respond.convert(values, UINT8).tolist() == pixels.tolist()


def test_float16_beyond_its_range_is_infinite() -> None:
    """A value that float16 cannot hold is not an error of the server."""
    form = OutputForm(tensor_pb2.DATA_TYPE_FLOAT16, -1.0, 1.0)
    converted = respond.convert(np.array([1e6, 0.1], np.float32), form)
    assert converted.dtype == np.float16
    assert converted.tolist() == [math.inf, float(np.float16(0.1))]


def parsed(plan: Sampling, event: Finished) -> list[pb.SampleResponse]:
    """The results as a client reads them."""
    found = []
    for count, response in respond.results(plan, event):
        found.append(pb.SampleResponse.FromString(response.SerializeToString()))
        assert count == len(found[-1].result.sample_indices)
        assert response.ByteSize() == len(response.SerializeToString())
    return found


def test_results_travel_in_messages_of_about_a_mebibyte(held: dict[str, Any]) -> None:
    """Lanes that finish together are grouped, and big groups are split; each sample is sent once."""
    count = 40
    plan = resolve.sample(pb.SampleRequest(sample_count=count), held[V], 0, LIMITS)
    samples = np.zeros((count, 256, 256), np.float32)
    latents = np.zeros((count, LATENT), np.float32)
    cost = replace(COST, evaluations=count)
    event = Finished(np.arange(count), {"sample": samples, "z": latents}, cost, last=True)
    messages = parsed(plan, event)
    assert [len(message.result.sample_indices) for message in messages] == [3] * 13 + [1]
    sent = [index for message in messages for index in message.result.sample_indices]
    assert sent == list(range(count))
    assert plan.labels is not None
    assert [label for m in messages for label in m.result.class_labels] == plan.labels.tolist()
    assert all(message.result.latents.shape[1:] == [LATENT] for message in messages)
    assert [m.result.stats.evaluation_count for m in messages] == [3] * 13 + [1], "evaluations are told once"


@pytest.mark.parametrize(
    "lanes", [range(1), range(300), range(2, 5), (1, 0), (0, 2, 1), (0, 0), range(1025)], ids=lambda each: str(each)
)
def test_results_are_written_as_protobuf_writes_them(held: dict[str, Any], lanes: Sequence[int]) -> None:
    """Whatever lanes finish together: the bytes are those of the message that says the same."""
    plan = resolve.sample(pb.SampleRequest(sample_count=max(lanes) + 1), held[V], 0, Limits(max_samples=2000))
    samples = np.random.default_rng(0).standard_normal((len(lanes), 3), np.float32)
    latents = samples[:, :2] + 1
    event = Finished(np.array(lanes), {"sample": samples, "z": latents}, replace(COST, evaluations=9), last=True)
    [(_, response)] = respond.results(plan, event)
    said = pb.SampleResponse()
    said.result.sample_indices.extend(lanes)
    tensor.pack(samples, said.result.samples)
    tensor.pack(latents, said.result.latents)
    assert plan.labels is not None
    said.result.class_labels.extend(plan.labels[list(lanes)].tolist())
    respond.tell(replace(COST, evaluations=9), said.result.stats)
    assert response.SerializeToString() == said.SerializeToString()


def test_diffusion_results_carry_no_latents(held: dict[str, Any]) -> None:
    """There are none: the noise a walk began with is in the seed."""
    plan = resolve.sample(pb.SampleRequest(), held[D], 0, LIMITS)
    event = Finished(np.arange(1), {"sample": np.zeros((1, *SHAPE), np.float32)}, COST, last=True)
    (message,) = parsed(plan, event)
    assert not message.result.HasField("latents")
    assert len(message.result.class_labels) == 1


def test_a_preview_says_how_far_its_samples_are(held: dict[str, Any]) -> None:
    """Indices, steps done, steps in all, and estimates in the type that was asked for."""
    plan = resolve.sample(pb.SampleRequest(sample_count=2, output_data_type=3), held[D], 0, LIMITS)
    look = Preview(np.array([1]), 4, 10, np.ones((1, *SHAPE), np.float32))
    preview = respond.preview(plan, look, pb.SampleResponse()).preview
    assert (list(preview.sample_indices), preview.completed_step_count, preview.total_step_count) == ([1], 4, 10)
    assert tensor.decode(preview.estimates).tolist() == np.full((1, *SHAPE), 255).tolist()


def test_the_cost_of_a_response() -> None:
    """Durations, evaluations, and the mean batch over the batches."""
    stats, nothing = pb.ExecutionStats(), pb.ExecutionStats()
    respond.tell(COST, stats)
    respond.tell(Cost(), nothing)
    assert stats.queue_duration.ToTimedelta().total_seconds() == 0.25
    assert stats.compute_duration.ToTimedelta().total_seconds() == 1.5
    assert (stats.evaluation_count, stats.mean_batch_size) == (12, 2.5)
    assert nothing.mean_batch_size == 0


def test_lanes_are_put_in_order_as_they_finish() -> None:
    """Whatever order groups of lanes finish in, row i of the answer is lane i; costs add up."""
    whole = Gathered(3)
    whole.add(Finished(np.array([2, 0]), {"y": np.array([2.0, 0.0])}, COST, last=False))
    whole.add(Finished(np.array([1]), {"y": np.array([1.0])}, Cost(0.1, 1.0, 3, 1, 2), last=True))
    assert whole.outputs["y"].tolist() == [0, 1, 2]
    assert (whole.cost.queue_s, whole.cost.compute_s, whole.cost.evaluations) == (0.1, 2.5, 15)


def encoding(held: dict[str, Any], seed: int | None) -> Encoding:
    plan = resolve.encode(pb.EncodeRequest(samples=images(), seed=seed), held[V], LIMITS)
    assert isinstance(plan, Encoding)
    return plan


def test_an_encoder_answers_with_its_posterior_and_the_mean(held: dict[str, Any]) -> None:
    """Without a seed the latents are the mean."""
    mean = np.arange(2 * LATENT, dtype=np.float32).reshape(2, LATENT)
    response = respond.encoded(encoding(held, None), gathered(mean=mean, log_variance=mean / 7), pb.EncodeResponse())
    assert tensor.decode(response.latents).tolist() == mean.tolist()
    assert tensor.decode(response.normal.mean).tolist() == mean.tolist()
    assert tensor.decode(response.normal.log_variance).tolist() == (mean / 7).tolist()


def test_a_posterior_draw_is_mean_plus_deviation_times_noise(held: dict[str, Any]) -> None:
    """Row i draws by (seed, i): mean + exp(log variance / 2) z."""
    mean = np.ones((2, LATENT), np.float32)
    log_variance = np.full((2, LATENT), math.log(4), np.float32)
    response = respond.encoded(encoding(held, 9), gathered(mean=mean, log_variance=log_variance), pb.EncodeResponse())
    z = noise.normals(noise.runs(Purpose.POSTERIOR, 9, range(2)), LATENT)
    np.testing.assert_allclose(tensor.decode(response.latents), 1 + 2 * z, rtol=1e-6)


def test_bernoulli_units_are_drawn_or_given_as_probabilities(held: dict[str, Any]) -> None:
    """A draw is 0 or 1 and follows the probabilities; without a seed the latents are the probabilities."""
    job = encoding(held, 1).job
    probability = np.tile(np.array([0.0, 0.3, 1.0], np.float32), (4000, 1))
    plan = Encoding(job, "p", bernoulli=True, seed=1)
    drawn = tensor.decode(respond.encoded(plan, gathered(p=probability), pb.EncodeResponse()).latents)
    assert set(np.unique(drawn)) == {0.0, 1.0}
    np.testing.assert_allclose(drawn.mean(axis=0), [0, 0.3, 1], atol=0.03)
    response = respond.encoded(Encoding(job, "p", bernoulli=True), gathered(p=probability), pb.EncodeResponse())
    assert tensor.decode(response.latents).tolist() == probability.tolist()
    assert response.WhichOneof("posterior") == "bernoulli"


def test_a_class_posterior_is_drawn_as_one_hot(held: dict[str, Any]) -> None:
    """A draw names one class, never one of probability zero, in proportion to the probabilities."""
    probability = np.tile(np.array([0.0, 0.25, 0.75, 0.0], np.float32), (4000, 1))
    plan = Encoding(encoding(held, 1).job, "p", categorical=True, seed=1)
    response = respond.encoded(plan, gathered(p=probability), pb.EncodeResponse())
    drawn = tensor.decode(response.latents)
    assert drawn.sum(axis=1).tolist() == [1] * 4000
    np.testing.assert_allclose(drawn.mean(axis=0), [0, 0.25, 0.75, 0], atol=0.03)
    assert response.WhichOneof("posterior") == "categorical"


def test_classes_beside_latents_are_told_apart_from_the_posterior_of_these(held: dict[str, Any]) -> None:
    """Latents and their posterior are what they are without classes; these are in a field of their own."""
    job, classes = encoding(held, None).job, np.array([[0.25, 0.75]], np.float32)
    outputs = {"mean": np.ones((1, LATENT), np.float32), "log_variance": np.zeros((1, LATENT), np.float32)}
    for log_variance, kind in (("log_variance", "normal"), (None, None)):
        plan = Encoding(job, "mean", log_variance)
        alone = respond.encoded(plan, gathered(**outputs), pb.EncodeResponse())
        beside = respond.encoded(replace(plan, classes="p"), gathered(**outputs, p=classes), pb.EncodeResponse())
        assert tensor.decode(beside.class_posterior.probability).tolist() == classes.tolist()
        assert beside.WhichOneof("posterior") == kind
        beside.ClearField("class_posterior")
        assert beside == alone


def test_the_forward_process_is_alpha_x0_plus_sigma_noise(held: dict[str, Any]) -> None:
    """q(x_t | x0) is drawn by (seed, row) without the network."""
    x0 = np.random.default_rng(0).standard_normal((3, *SHAPE)).astype(np.float32)
    request = pb.EncodeRequest(samples=tensor.encode(x0), forward_timestep=40, seed=5)
    plan = resolve.encode(request, held[D], LIMITS)
    latents = tensor.decode(respond.diffused(plan, pb.EncodeResponse()).latents)  # type: ignore[arg-type]
    alpha, sigma = held[D].schedule.level(40)
    z = noise.normals(noise.runs(Purpose.FORWARD, 5, range(3)), 16).reshape(x0.shape)
    np.testing.assert_allclose(latents, alpha * x0 + sigma * z, rtol=1e-5, atol=1e-6)


def scoring(held: dict[str, Any], **fields: Any) -> Scoring:
    return resolve.score(pb.ScoreRequest(samples=images(2), **fields), held[V], LIMITS)


def test_draws_of_a_bound_combine_as_log_mean_exp_and_classes_by_their_prior(held: dict[str, Any]) -> None:
    """The score is ln sum_y p(y) (1/K) sum_k exp(value): IWAE-K inside a class, the law of total probability across."""
    values = np.random.default_rng(0).normal(-80, 3, (2, 3, 4)).astype(np.float32)
    plan = scoring(held, draw_count=4)
    response = respond.scored(plan, gathered(bound=values.reshape(-1)), pb.ScoreResponse())
    with np.errstate(under="ignore"):
        want = np.log((np.array([0.5, 0.25, 0.25]) * np.exp(values.astype(np.float64)).mean(axis=2)).sum(axis=1))
    np.testing.assert_allclose(response.values, want, rtol=1e-9)
    assert response.type == pb.ScoreResponse.TYPE_EVIDENCE_LOWER_BOUND


def test_a_score_of_minus_infinity_stays_one(held: dict[str, Any]) -> None:
    """A sample that no class can make has probability zero, without a warning or a NaN."""
    response = respond.scored(
        scoring(held, draw_count=1), gathered(bound=np.full(6, -np.inf, np.float32)), pb.ScoreResponse()
    )
    assert list(response.values) == [-math.inf, -math.inf]


def test_extreme_bounds_do_not_overflow(held: dict[str, Any]) -> None:
    """The sums are shifted by their largest term."""
    condition = pb.Condition(class_label=0)
    plan = scoring(held, draw_count=2, condition=condition)
    response = respond.scored(plan, gathered(bound=np.array([-5e3, -5e3, 5e3, 5e3], np.float32)), pb.ScoreResponse())
    np.testing.assert_allclose(response.values, [-5e3, 5e3])


@pytest.mark.parametrize("labels", [[0, 1], [2, 2]])
def test_a_critics_opinion_is_passed_on(labels: list[int], held: dict[str, Any]) -> None:
    """P(real) is no likelihood: nothing is summed."""
    request = pb.ScoreRequest(samples=images(2), condition=pb.Condition(class_labels=labels))
    plan = resolve.score(request, held["tiny-gan"], LIMITS)
    response = respond.scored(plan, gathered(real=np.array([0.25, 0.75], np.float32)), pb.ScoreResponse())
    assert list(response.values) == [0.25, 0.75]
    assert response.type == pb.ScoreResponse.TYPE_REAL_PROBABILITY
