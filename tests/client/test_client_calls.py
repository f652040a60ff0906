"""Every method against a fake server, through the synchronous and the asynchronous client alike."""

import inspect
from typing import Any

import grpc
import numpy as np
import pytest
from fake_server import LATENT_SHAPE, SHAPE, TIMESTEPS, FakeServer, Fault, info, toy_normal, toy_sample
from latentd import tensor
from latentd.reasons import Reason
from latentd.v1 import generation_service_pb2 as pb
from latentd_client import Accepted, AsyncClient, Client, FieldsInvalid, Preview, Samples, messages
from latentd_client.errors import BY_REASON


def expected(n: int, seed: int = 7, **fields: Any) -> np.ndarray[Any, Any]:
    """The toy samples of a request."""
    request = pb.SampleRequest(model="toy", sample_count=n, seed=seed, **fields)
    return np.stack([toy_sample(request, i)[0] for i in range(n)])


def test_sample_returns_all_samples_in_order_with_what_made_them(client: Any) -> None:
    """A result has the samples by index, their labels and latents, the seed, the model and the promise's boundary."""
    samples = client.sample("toy", 5, seed=7)
    np.testing.assert_array_equal(samples.array, expected(5))
    np.testing.assert_array_equal(samples.labels, [7, 8, 9, 0, 1])
    np.testing.assert_array_equal(samples.latents, np.stack([toy_normal(7, i, LATENT_SHAPE) for i in range(5)]))
    assert (samples.seed, samples.model, samples.determinism_class) == (7, "toy@1", "class-a")
    assert samples.value_range == (-1.0, 1.0)
    assert samples.stats.evaluations == 20
    assert samples.stats.mean_batch_size == 2.0
    assert len(samples) == 5


def test_a_seed_is_drawn_here_and_reported(client: Any, server: FakeServer) -> None:
    """Without a seed the request still carries one, so that a retry asks for the same samples."""
    first, second = client.sample("toy"), client.sample("toy")
    sent = [request.seed for request in server.requests("Sample")]
    assert sent == [first.seed, second.seed]
    assert first.seed != second.seed
    assert 0 <= first.seed < 2**53


def test_seed_zero_is_a_seed(client: Any, server: FakeServer) -> None:
    """Seed 0 is sent as 0, not replaced by a fresh one."""
    assert client.sample("toy", seed=0).seed == 0
    assert server.requests("Sample")[0].HasField("seed")


def test_labels_decide_the_count(client: Any, server: FakeServer) -> None:
    """A sequence of labels asks for as many samples; a single label serves all."""
    assert client.sample("toy", label=[3, 1, 4]).labels.tolist() == [3, 1, 4]
    assert client.sample("toy", label=np.array([2, 6])).labels.tolist() == [2, 6]
    assert client.sample("toy", 2, label=np.int64(9)).labels.tolist() == [9, 9]
    assert server.requests("Sample")[2].condition.class_label == 9


def test_nothing_said_is_nothing_sent(client: Any, server: FakeServer) -> None:
    """Options left out stay unset, so that the model's defaults hold and one-shot models see no diffusion options."""
    client.sample("toy", 1, seed=1)
    assert server.requests("Sample")[0] == pb.SampleRequest(
        model="toy", sample_count=1, seed=1, output_mode=pb.OUTPUT_MODE_MEAN
    )


def test_every_option_is_sent(client: Any, server: FakeServer) -> None:
    """Each argument of `sample` arrives in the field that it is about."""
    start = np.zeros((1, *SHAPE), np.float32)
    client.sample(
        "toy-diffusion",
        2,
        seed=3,
        label=4,
        codes=[0.5],
        temperature=0.7,
        sampler="ddpm",
        steps=4,
        guidance=2.5,
        guidance_interval=(2, 7),
        eta=0.25,
        start=start,
        strength=0.6,
        output="draw",
        dtype=np.uint8,
        first_index=10,
    )
    sent = server.requests("Sample")[0]
    assert sent.condition.class_label == 4
    assert list(sent.condition.codes) == [0.5]
    assert sent.temperature == 0.7
    assert (sent.diffusion.sampler, sent.diffusion.step_count) == ("ddpm", 4)
    assert (sent.diffusion.guidance_scale, sent.diffusion.eta) == (2.5, 0.25)
    assert sent.diffusion.guidance_interval == pb.GuidanceInterval(min_timestep=2, max_timestep=7)
    assert list(sent.diffusion.start.samples.shape) == [1, *SHAPE]
    assert sent.diffusion.start.strength == 0.6
    assert sent.output_mode == pb.OUTPUT_MODE_DRAW
    assert sent.first_sample_index == 10
    client.sample("toy-diffusion", timesteps=[9, 3, 0])
    assert list(server.requests("Sample")[1].diffusion.timesteps) == [9, 3, 0]


def test_bytes_span_0_to_255(client: Any) -> None:
    """UINT8 samples carry the range of bytes, so that pictures come out right."""
    samples = client.sample("toy", dtype="uint8")
    assert samples.array.dtype == np.uint8
    assert samples.value_range == (0.0, 255.0)


@pytest.mark.parametrize(
    ("dtype", "got"), [("int64", "int64"), (np.complex64, "complex64"), ("float31", "'float31'")], ids=str
)
def test_an_element_type_that_samples_cannot_have_is_refused(
    client: Any, server: FakeServer, dtype: Any, got: str
) -> None:
    """The message names what the server can send as samples, and no more; nothing is sent."""
    for call in (lambda: client.sample("toy", dtype=dtype), lambda: client.decode("toy", np.zeros(3), dtype=dtype)):
        with pytest.raises(FieldsInvalid) as caught:
            call()
        (violation,) = caught.value.violations
        assert violation.path == "output_data_type"
        assert violation.description == f"must be one of float32, float16, uint8, got {got}"
    assert server.requests("Sample") == server.requests("Decode") == []


def test_first_index_continues_a_request(client: Any) -> None:
    """Samples 2 and 3 of a seed are the same in one request as in two."""
    whole = client.sample("toy", 4, seed=7)
    tail = client.sample("toy", 2, seed=7, first_index=2)
    np.testing.assert_array_equal(whole.array[2:], tail.array)


def test_a_stream_tells_what_happens(client: Any) -> None:
    """`sample_stream` yields `Accepted`, then previews that advance, then every sample once."""
    events = list(client.sample_stream("toy-diffusion", 3, seed=7, previews=1))
    assert isinstance(events[0], Accepted)
    assert (events[0].model, events[0].queue_depth) == ("toy-diffusion@1", 2)
    previews = [event for event in events if isinstance(event, Preview)]
    assert [preview.completed_steps for preview in previews] == [1, 2, 3]
    assert all(preview.array.shape == (3, *SHAPE) for preview in previews)
    parts = [event for event in events if isinstance(event, Samples)]
    assert sorted(index for part in parts for index in part.indices) == [0, 1, 2]


def test_leaving_a_stream_gives_it_up(client: Any, server: FakeServer) -> None:
    """Closing the iterator cancels the call: the server is left with no open stream."""
    from fake_server import wait_until

    events = client.sample_stream("toy", 3000, seed=7)
    next(events)
    events.close()
    wait_until(lambda: server.open_streams == 0)


def test_a_result_can_be_drawn_again(client: Any, connect: Any) -> None:
    """`reproduce` sends the resolved request and gets equal bytes, with another client too."""
    start = np.ones(SHAPE, np.float32)
    samples = client.sample("toy-diffusion", 3, start=start)
    for again in (samples.reproduce(client), samples.reproduce(connect())):
        np.testing.assert_array_equal(again.array, samples.array)
        assert again.determinism_class == samples.determinism_class


def test_any_part_of_a_stream_reproduces_the_whole(client: Any) -> None:
    """A part holds the request of the whole."""
    parts = [event for event in client.sample_stream("toy", 3, seed=7) if isinstance(event, Samples)]
    np.testing.assert_array_equal(parts[-1].reproduce(client).array, expected(3))


def test_encode_returns_latents_and_their_posterior(client: Any, server: FakeServer) -> None:
    """The mean needs no seed; a draw carries the caller's."""
    samples = expected(2)
    encoded = client.encode("toy", samples, label=[1, 2])
    np.testing.assert_array_equal(encoded.latents, samples.reshape(2, -1)[:, :3])
    np.testing.assert_array_equal(encoded.mean, encoded.array)
    assert encoded.log_variance is not None
    assert encoded.probability is None
    assert encoded.seed is None
    assert list(server.requests("Encode")[0].condition.class_labels) == [1, 2]
    assert client.encode("toy", samples, seed=5).seed == 5
    assert server.requests("Encode")[1].seed == 5


def test_classes_told_beside_latents_are_read() -> None:
    """P(class | sample) beside latents leaves these and their posterior as they are; without it there is none."""
    response = pb.EncodeResponse(latents=tensor.encode(np.zeros((2, 3), np.float32)))
    response.normal.mean.CopyFrom(response.latents)
    response.normal.log_variance.CopyFrom(response.latents)
    assert messages.read_encoded(response, None).class_probability is None
    chances = np.array([[0.25, 0.75], [1, 0]], np.float32)
    response.class_posterior.probability.CopyFrom(tensor.encode(chances))
    encoded = messages.read_encoded(response, None)
    np.testing.assert_array_equal(encoded.class_probability, chances)
    np.testing.assert_array_equal(encoded.mean, np.zeros((2, 3)))
    assert encoded.probability is None


def test_the_forward_process_gets_a_seed(client: Any, server: FakeServer) -> None:
    """Noise of the forward process depends on a seed, drawn here if none is given."""
    encoded = client.encode("toy-diffusion", expected(1), forward_timestep=5)
    assert server.requests("Encode")[0].seed == encoded.seed
    assert server.requests("Encode")[0].forward_timestep == 5


def test_doubles_are_sent_as_single_precision(client: Any, server: FakeServer) -> None:
    """Lists and float64 arrays go as float32, which is all that models compute in."""
    client.encode("toy", np.zeros((1, *SHAPE)).tolist())
    assert server.requests("Encode")[0].samples.data == bytes(64)


def test_a_single_item_is_given_its_batch_axis(client: Any) -> None:
    """An array of the very shape of one sample, or one latent, is a batch of one."""
    assert client.encode("toy", np.zeros(SHAPE)).array.shape == (1, *LATENT_SHAPE)
    assert client.decode("toy", np.zeros(LATENT_SHAPE), label=1).array.shape == (1, *SHAPE)


def test_decode_maps_latents_to_samples(client: Any, server: FakeServer) -> None:
    """A mean with a label needs no seed; a draw, or a label to draw, gets one and reports it."""
    latents = np.ones((2, 3), np.float32)
    decoded = client.decode("toy", latents, label=3)
    np.testing.assert_array_equal(decoded.array.reshape(2, -1)[:, :3], latents)
    np.testing.assert_array_equal(decoded.latents, latents)
    assert decoded.seed is None
    assert not server.requests("Decode")[0].HasField("seed")
    assert client.decode("toy", latents, label=3, output="draw").seed == server.requests("Decode")[1].seed
    assert client.decode("toy", latents).seed == server.requests("Decode")[2].seed


def test_denoise_step_evaluates_once_and_steps_if_asked(client: Any, server: FakeServer) -> None:
    """Without a next timestep there is no state; timesteps may be one for all or one for each row."""
    noisy = np.ones((2, *SHAPE), np.float32)
    step = client.denoise_step("toy-diffusion", noisy, 9)
    np.testing.assert_array_equal(step.denoised, noisy / 2)
    np.testing.assert_array_equal(step.noise, noisy / 4)
    assert step.state is None
    step = client.denoise_step("toy-diffusion", noisy, [9, 6], [6, -1], eta=1.0, seed=4, step_index=2)
    np.testing.assert_array_equal(step.state, noisy * 0.75)
    sent = server.requests("DenoiseStep")[1]
    assert (list(sent.timesteps), list(sent.next_timesteps)) == ([9, 6], [6, -1])
    assert (sent.eta, sent.seed, sent.step_index) == (1.0, 4, 2)


def test_score_says_what_the_values_are(client: Any, server: FakeServer) -> None:
    """Scores come with their kind, and with seed 0 unless said otherwise, so that they compare."""
    samples = expected(3)
    scores = client.score("toy", samples, draws=8)
    np.testing.assert_allclose(scores.values, samples.reshape(3, -1).sum(axis=1), rtol=1e-6)
    assert scores.kind == "evidence-lower-bound"
    assert (server.requests("Score")[0].seed, server.requests("Score")[0].draw_count) == (0, 8)
    assert scores.bits_per_dimension is not None
    np.testing.assert_allclose(scores.bits_per_dimension, -scores.values / 16 / np.log(2))
    assert scores.terms is None


def test_an_interval_is_a_first_and_a_last_timestep(client: Any) -> None:
    """Anything else is refused here, with everything else that is wrong."""
    with pytest.raises(FieldsInvalid) as caught:
        client.sample("toy-diffusion", guidance=2, guidance_interval=(1, 2, 3), eta=float("nan"))
    assert {violation.path for violation in caught.value.violations} == {
        "diffusion.guidance_interval",
        "diffusion.eta",
    }


def test_models_pages_through_the_catalogue(client: Any, server: FakeServer) -> None:
    """All pages are fetched, and cards read in plain types."""
    models = client.models()
    assert [model.name for model in models] == ["toy@1", "toy-diffusion@1"]
    assert len(server.requests("ListModels")) == 2
    toy, diffusion = models
    assert (toy.family, toy.state) == ("vae", "active")
    assert toy.methods == {"sample", "encode", "decode", "score"}
    assert (toy.sample_shape, toy.latent_shape) == (SHAPE, LATENT_SHAPE)
    assert (diffusion.latent_shape, diffusion.samplers, diffusion.timestep_count) == (SHAPE, ("ddim", "ddpm"), 10)
    assert toy.metrics["frechet-ratio"] == 1.25


def test_model_asks_anew_every_time(client: Any, server: FakeServer) -> None:
    """`model` never answers from memory, for a model's state changes; other methods ask once."""
    client.model("toy")
    client.model("toy")
    client.sample("toy")
    client.sample("toy")
    assert len(server.requests("GetModel")) == 2


REFUSALS = [
    (Reason.FIELD_INVALID, grpc.StatusCode.INVALID_ARGUMENT),
    (Reason.MODEL_NOT_FOUND, grpc.StatusCode.NOT_FOUND),
]


@pytest.mark.parametrize(("reason", "code"), REFUSALS, ids=[reason for reason, _ in REFUSALS])
@pytest.mark.parametrize("rpc", ["Encode", "Sample", "Stream"])
def test_a_refusal_has_the_name_asked_for_anew(
    client: Any, server: FakeServer, rpc: str, reason: Reason, code: grpc.StatusCode
) -> None:
    """What a bare name stood for may be out of date, so that the next call meets the newer version's shapes."""

    def call(samples: Any) -> None:
        if rpc == "Encode":
            client.encode("toy-diffusion", samples)
        elif rpc == "Sample":
            client.sample("toy-diffusion", start=samples)
        else:
            with client.denoise_loop("toy-diffusion", start=samples):
                pass

    call(np.zeros(SHAPE))
    server.sample_shape, server.versions = (2, 2), 2
    server.fail(rpc, Fault(code=code, details=[info(reason)]))
    with pytest.raises(BY_REASON[reason]):
        call(np.zeros((2, 2)))
    server.seen.clear()
    call(np.zeros((1, 2, 2)) if rpc == "Encode" else np.zeros((1, *SHAPE)))
    assert [request.name for request in server.requests("GetModel")] == ["toy-diffusion"]
    server.seen.clear()
    client.encode("toy-diffusion", np.zeros((2, 2)))  # one item of the newer version's shape
    (sent,) = server.requests("Encode")
    assert list(sent.samples.shape) == [1, 2, 2]
    assert server.requests("GetModel") == []


def test_other_failures_are_no_reason_to_ask_anew(client: Any, server: FakeServer) -> None:
    """A call that failed for what it was, not for what the model is, leaves the memory alone."""
    client.encode("toy", np.zeros(SHAPE))
    server.fail("Encode", Fault(code=grpc.StatusCode.INTERNAL, details=[info(Reason.RUNTIME_FAILURE)]))
    with pytest.raises(BY_REASON[Reason.RUNTIME_FAILURE]):
        client.encode("toy", np.zeros(SHAPE))
    client.encode("toy", np.zeros(SHAPE))
    assert len(server.requests("GetModel")) == 1


def test_samples_are_read_as_the_version_that_made_them(client: Any, server: FakeServer) -> None:
    """When a newer version answers to a bare name, its value range goes with the samples, and is known from then on."""
    assert client.sample("toy").value_range == (-1.0, 1.0)
    server.value_limit, server.versions = 4.0, 2
    assert client.sample("toy").value_range == (-4.0, 4.0)
    assert client.decode("toy", np.zeros(3), label=1).value_range == (-4.0, 4.0)
    assert [request.name for request in server.requests("GetModel")] == ["toy", "toy@2"]


def test_a_loop_knows_the_version_that_takes_its_steps(client: Any, server: FakeServer) -> None:
    """A loop that a newer version opened has that version's value range."""
    client.sample("toy-diffusion")
    server.value_limit, server.versions = 4.0, 2
    with client.denoise_loop("toy-diffusion") as loop:
        assert loop.step().value_range == (-4.0, 4.0)


def test_interpolate_walks_between_seeds(client: Any) -> None:
    """The ends are the latents of the two seeds' first samples; the classes are theirs."""
    walk = client.interpolate("toy", 1, 2, 5)
    np.testing.assert_allclose(walk.latents[0], toy_normal(1, 0, LATENT_SHAPE), rtol=1e-5)
    np.testing.assert_allclose(walk.latents[-1], toy_normal(2, 0, LATENT_SHAPE), rtol=1e-5)
    assert walk.array.shape == (5, *SHAPE)


def test_interpolate_switches_class_half_way(client: Any, server: FakeServer) -> None:
    """Two seeds of different classes hand over in the middle; a label given holds throughout."""
    client.interpolate("toy", 1, 2, 5)
    assert list(server.requests("Decode")[0].condition.class_labels) == [1, 1, 1, 2, 2]
    client.interpolate("toy", 1, 2, 4, label=6)
    assert list(server.requests("Decode")[1].condition.class_labels) == [6, 6, 6, 6]


def test_interpolate_inverts_samples_of_a_diffusion_model(client: Any, server: FakeServer) -> None:
    """A diffusion model's seeds are sampled and inverted to noise; arrays of samples are inverted too."""
    walk = client.interpolate("toy-diffusion", 1, 2, 3, steps=4)
    assert len(server.requests("Encode")) == 2
    np.testing.assert_allclose(walk.latents[0], 2 * expected(1, seed=1)[0], rtol=1e-5)
    client.interpolate("toy-diffusion", np.zeros(SHAPE), np.ones((1, *SHAPE)), 3, given="sample", label=2)
    assert len(server.requests("Encode")) == 4


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"first": 1, "last": 2, "count": 1}, "count must be at least 2"),
        ({"first": np.zeros(4), "last": 2}, r"first: one latent of toy@1 has shape \(3,\), got \(4,\)"),
        ({"first": np.zeros(3), "last": np.ones(3)}, "say which one to walk in with label="),
    ],
)
def test_interpolate_refuses_what_makes_no_walk(client: Any, arguments: dict[str, Any], message: str) -> None:
    """Too few stops, an end of the wrong shape and an unknown class are named."""
    with pytest.raises(ValueError, match=message):
        client.interpolate("toy", **arguments)


def toy_states(seed: int, n: int = 2) -> list[np.ndarray[Any, Any]]:
    """The states of an unedited toy loop."""
    state = np.stack([toy_normal(seed, i, SHAPE) for i in range(n)])
    states = []
    for reached in (*TIMESTEPS[1:], -1):
        state = (state * 0.5 + reached).astype(np.float32)
        states.append(state)
    return states


def test_a_loop_follows_the_schedule(client: Any) -> None:
    """Iterating takes every step of the schedule and ends at clean data."""
    with client.denoise_loop("toy-diffusion", 2, seed=7) as loop:
        assert (loop.timestep, loop.remaining) == (9, (6, 3, 0, -1))
        assert (loop.accepted.model, loop.accepted.seed) == ("toy-diffusion@1", 7)
        steps = list(loop)
        assert loop.finished
    assert [step.timestep for step in steps] == [6, 3, 0, -1]
    for step, state in zip(steps, toy_states(7), strict=True):
        np.testing.assert_array_equal(step.state, state)
        np.testing.assert_array_equal(step.denoised, state / 2)


def test_a_loop_can_be_steered(client: Any) -> None:
    """The next timestep and the state can be replaced, from within the iteration or step by step."""
    with client.denoise_loop("toy-diffusion", 1, seed=7) as loop:
        step = loop.step(next_timestep=3)
        assert (step.timestep, loop.remaining) == (3, (0, -1))
        loop.override(state=np.zeros(SHAPE))
        np.testing.assert_array_equal(loop.step().state, np.zeros((1, *SHAPE)))
        loop.override(state=np.full((1, *SHAPE), 4.0))
        np.testing.assert_array_equal(loop.step().state, np.full((1, *SHAPE), 1.0))
        with pytest.raises(RuntimeError, match="clean data"):
            loop.step()


def test_a_refused_step_does_not_end_the_loop(client: Any) -> None:
    """A step the server refuses was not taken: the loop goes on from where it stood, with the same bytes."""
    with client.denoise_loop("toy-diffusion", 2, seed=7) as loop:
        loop.step()
        with pytest.raises(ValueError, match="must be one of the remaining"):
            loop.step(next_timestep=7)
        states = [step.state for step in loop]
    np.testing.assert_array_equal(np.stack(states), np.stack(toy_states(7)[1:]))


def test_a_loop_must_be_opened(client: Any) -> None:
    """A loop outside a `with` block says so."""
    with pytest.raises(RuntimeError, match="open the loop first"):
        client.denoise_loop("toy-diffusion").step()
    loop = client.denoise_loop("toy-diffusion")
    with loop:
        pass
    with pytest.raises(RuntimeError, match="opened once"), loop:
        pass


def test_no_steps_is_not_the_default(client: Any) -> None:
    """0 steps is refused, not taken for the wire's word for the model's default."""
    with pytest.raises(ValueError, match="must be at least 1, got 0"):
        client.sample("toy-diffusion", steps=0)


def test_the_two_clients_have_the_same_methods() -> None:
    """Every public name and every parameter is the same on both, but for one that needs an event loop."""

    def surface(kind: type) -> dict[str, list[str]]:
        public = {name: member for name, member in vars(kind).items() if not name.startswith("_")}
        return {name: list(inspect.signature(member).parameters) for name, member in public.items()}

    assert surface(Client) == surface(AsyncClient)
    asynchronous = list(inspect.signature(AsyncClient).parameters)
    asynchronous.remove("multiplexed")  # threads have no moment at which requests gather
    assert list(inspect.signature(Client).parameters) == asynchronous
