"""A walk over another model's latents: decoded, and encoded, by that model in one call."""

import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from bundles import SHAPE, write_gan, write_vae
from latent_bundles import SCALES, SHIFTS, write_latent_diffusion
from latentd import tensor
from latentd.names import BUNDLE_FILE
from latentd.v1 import generation_service_pb2 as pb
from latentd.v1 import model_pb2
from latentd_server import call_runner
from latentd_server.failures import ModelInUseError
from live import Live
from parking import QUEUED, REPLYING, Parking

L, PLAIN, VAE = "tiny-latents", "tiny-plain", "tiny-vae"
MEAN, DRAW, LATENT = pb.OUTPUT_MODE_MEAN, pb.OUTPUT_MODE_DRAW, pb.OUTPUT_MODE_LATENT
SCALE, SHIFT = np.array(SCALES, np.float32), np.array(SHIFTS, np.float32)
IMAGES = np.random.default_rng(5).uniform(-1, 1, (3, *SHAPE)).astype(np.float32)


@pytest.fixture(scope="module")
def parking() -> Parking:
    return Parking()


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory, parking: Parking, call_length: str) -> Iterator[Live]:
    """A server with the VAE, diffusion over its latents, and the same diffusion without it."""
    del call_length  # set before it starts
    root = tmp_path_factory.mktemp("latent-models")
    write_vae(root)
    write_latent_diffusion(root)
    write_latent_diffusion(root, PLAIN, joined=False)
    running = Live(root, parking, max_batch_rows=16, self_check_interval=0)
    yield running
    running.stop()


@pytest.fixture(autouse=True)
def _let_go(parking: Parking) -> Iterator[None]:
    yield
    parking.clear()


def request(model: str = L, **fields: Any) -> pb.SampleRequest:
    return pb.SampleRequest(**{"model": model, "seed": 3, "sample_count": 5} | fields)


def answers(live: Live, asked: pb.SampleRequest) -> tuple[np.ndarray, np.ndarray | None, list[int]]:
    """Samples, latents and labels in order."""
    found: dict[int, tuple[Any, ...]] = {}
    for response in live.stub.Sample(asked, timeout=60):
        result = response.result
        samples = tensor.decode(result.samples) if result.HasField("samples") else ()
        latents = tensor.decode(result.latents) if result.HasField("latents") else None
        for row, index in enumerate(result.sample_indices):
            found[index] = samples[row], None if latents is None else latents[row], result.class_labels[row]
    samples, latents, labels = zip(*(found[index] for index in range(len(found))), strict=True)
    return np.stack(samples), None if latents[0] is None else np.stack(latents), list(labels)


def decoded(live: Live, latents: np.ndarray, labels: list[int], **fields: Any) -> np.ndarray:
    """What the VAE itself makes of latents."""
    condition = pb.Condition(class_labels=labels)
    asked = pb.DecodeRequest(model=VAE, latents=tensor.encode(latents), condition=condition, **fields)
    return tensor.decode(live.stub.Decode(asked, timeout=60).samples)


WALKS = {
    "default": pb.DiffusionOptions(),
    "stochastic": pb.DiffusionOptions(sampler="dpmpp-2m-sde", step_count=7),
    "guided": pb.DiffusionOptions(sampler="heun", step_count=4, guidance_scale=2.5),
}


@pytest.mark.parametrize("mode", [MEAN, DRAW])
@pytest.mark.parametrize("walk", WALKS.values(), ids=WALKS)
def test_one_call_is_the_walk_and_then_the_decoder(live: Live, walk: pb.DiffusionOptions, mode: int) -> None:
    """Samples are, byte for byte, what the decoder makes of scale * x + shift, x being what the walk alone gives."""
    states, _, labels = answers(live, request(PLAIN, diffusion=walk))
    codes = SCALE * states + SHIFT
    images, latents, same_labels = answers(live, request(diffusion=walk, output_mode=mode))
    assert same_labels == labels
    assert latents is not None
    assert latents.tobytes() == codes.tobytes()
    expected = decoded(live, codes, labels, output_mode=mode, seed=3)
    assert images.tobytes() == expected.tobytes()


def test_the_latents_themselves_can_be_asked_for(live: Live) -> None:
    """OUTPUT_MODE_LATENT gives what the walk gives without a decoder, and costs no decode."""
    states, _, labels = answers(live, request(PLAIN))
    latents, none, same_labels = answers(live, request(output_mode=LATENT))
    assert (latents.tobytes(), same_labels, none) == (states.tobytes(), labels, None)
    stats = [each.result.stats for each in live.stub.Sample(request(output_mode=LATENT), timeout=60)]
    assert sum(each.evaluation_count for each in stats) == 5 * 10
    stats = [each.result.stats for each in live.stub.Sample(request(), timeout=60)]
    assert sum(each.evaluation_count for each in stats) == 5 * (10 + 1)


def test_samples_do_not_depend_on_how_they_are_asked_for(live: Live) -> None:
    """N samples are n requests of one, and UINT8 is the rounded image."""
    images, latents, _ = answers(live, request())
    assert latents is not None
    for index in range(5):
        one, its_latents, _ = answers(live, request(sample_count=1, first_sample_index=index))
        assert its_latents is not None
        assert one[0].tobytes() + its_latents[0].tobytes() == images[index].tobytes() + latents[index].tobytes()
    pixels, _, _ = answers(live, request(output_data_type=3))
    assert np.array_equal(pixels, np.clip(np.rint((images + 1) * np.float32(127.5)), 0, 255).astype(np.uint8))


def test_bytes_are_the_same_in_a_crowd(live: Live) -> None:
    """Walks of unlike length, start points and decodes of others, all at once: each as if it were alone."""
    start = pb.StartPoint(samples=tensor.encode(IMAGES[:1]), strength=0.7)
    crowd = [
        request(seed=seed, sample_count=1 + seed % 4, output_mode=(MEAN, DRAW, LATENT)[seed % 3], diffusion=walk)
        for seed, walk in enumerate(list(WALKS.values()) * 4)
    ]
    crowd += [request(seed=90 + i, diffusion=pb.DiffusionOptions(step_count=3 + i, start=start)) for i in range(4)]
    crowd += [request(VAE, seed=70 + i) for i in range(4)]
    alone = [live.sample(each) for each in crowd]
    together: list[bytes] = [b""] * len(crowd)

    def ask(index: int) -> None:
        together[index] = live.sample(crowd[index])

    threads = [threading.Thread(target=ask, args=(index,)) for index in range(len(crowd))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert together == alone


def test_an_image_to_start_from_is_encoded(live: Live) -> None:
    """Image-to-image starts from the posterior's mean, brought to the walk's scale."""
    walk = {"sampler": "ddim", "step_count": 10}
    mean = tensor.decode(live.stub.Encode(pb.EncodeRequest(model=VAE, samples=tensor.encode(IMAGES))).normal.mean)
    states = (1 / SCALE) * mean + (-SHIFT / SCALE)
    begun = pb.StartPoint(samples=tensor.encode(states), strength=0.4)
    asked = request(PLAIN, sample_count=3, diffusion=pb.DiffusionOptions(start=begun, **walk))
    expected, _, labels = answers(live, asked)
    begun = pb.StartPoint(samples=tensor.encode(IMAGES), strength=0.4)
    asked = request(sample_count=3, diffusion=pb.DiffusionOptions(start=begun, **walk))
    images, latents, _ = answers(live, asked)
    assert latents is not None
    np.testing.assert_array_equal(latents, SCALE * expected + SHIFT)
    np.testing.assert_array_equal(images, decoded(live, latents, labels))
    one = pb.StartPoint(samples=tensor.encode(IMAGES[1:2]), strength=0.4)
    shared, _, _ = answers(live, request(sample_count=3, diffusion=pb.DiffusionOptions(start=one, **walk)))
    assert shared[1].tobytes() == images[1].tobytes()


def test_encode_and_decode_are_about_images(live: Live) -> None:
    """Encode inverts what the encoder gives, Decode decodes what the walk from x_T gives."""
    condition = pb.Condition(class_labels=[0, 1, 2])
    mean = tensor.decode(live.stub.Encode(pb.EncodeRequest(model=VAE, samples=tensor.encode(IMAGES))).normal.mean)
    states = tensor.encode((1 / SCALE) * mean + (-SHIFT / SCALE))
    asked = pb.EncodeRequest(model=PLAIN, samples=states, condition=condition)
    expected = live.stub.Encode(asked, timeout=60).latents
    noises = live.stub.Encode(pb.EncodeRequest(model=L, samples=tensor.encode(IMAGES), condition=condition)).latents
    assert noises == expected
    plain = live.stub.Decode(pb.DecodeRequest(model=PLAIN, latents=noises, condition=condition)).samples
    codes = SCALE * tensor.decode(plain) + SHIFT
    back = live.stub.Decode(pb.DecodeRequest(model=L, latents=noises, condition=condition))
    assert tensor.decode(back.samples).tobytes() == decoded(live, codes, [0, 1, 2]).tobytes()
    assert back.stats.evaluation_count == 3 * 11
    undecoded = pb.DecodeRequest(model=L, latents=noises, condition=condition, output_mode=LATENT)
    assert live.stub.Decode(undecoded).samples == plain


def test_what_is_inside_the_walk_is_latents(live: Live) -> None:
    """Previews, DenoiseStep and loops have the shape and the bytes that they have without a decoder."""
    asked = request(sample_count=1, output_data_type=3, diffusion=pb.DiffusionOptions(preview_interval_steps=1))
    looks = [tensor.decode(each.preview.estimates) for each in live.stub.Sample(asked) if each.HasField("preview")]
    assert {(look.shape, str(look.dtype)) for look in looks} <= {((1, 3), "float32")}
    step = pb.DenoiseStepRequest(noisy_samples=tensor.encode(SHIFT[None]), timesteps=[50], next_timesteps=[40])
    step.model = PLAIN
    expected = live.stub.DenoiseStep(step)
    step.model = L
    assert live.stub.DenoiseStep(step).next_samples == expected.next_samples
    states, _, _ = answers(live, request(output_mode=LATENT))
    assert live.loop(request()).tobytes() == states.tobytes()


def violations(live: Live, call: Any, asked: Any) -> str:
    with pytest.raises(grpc.RpcError) as caught:
        list(call(asked)) if call is live.stub.Sample else call(asked)
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    return caught.value.details()


def test_what_latents_cannot_be_asked_is_refused(live: Live) -> None:
    """Pixels of latents, diffusing images, and latents of models that have none or end in images."""
    assert "latents are no pixels" in violations(
        live, live.stub.Sample, request(output_mode=LATENT, output_data_type=3)
    )
    assert "output_mode" in violations(live, live.stub.Sample, request(PLAIN, output_mode=LATENT))
    assert "output_mode" in violations(live, live.stub.Sample, request(VAE, output_mode=LATENT))
    forward = pb.EncodeRequest(model=L, samples=tensor.encode(IMAGES), forward_timestep=3, seed=1)
    assert "forward_timestep" in violations(live, live.stub.Encode, forward)
    started = request(diffusion=pb.DiffusionOptions(start=pb.StartPoint(samples=tensor.encode(IMAGES[:1]))))
    for asked, path in ((started, "diffusion.start"), (request(output_mode=DRAW), "output_mode")):
        (answer,) = live.stream(pb.StreamRequest(id=1, open_denoise=asked))[1]
        assert path in answer.error.message


def test_everything_wrong_is_told_at_once(live: Live) -> None:
    """What is wrong with the decode is told beside what is wrong with the walk; a draw wants a seed here too."""
    steps = pb.DiffusionOptions(step_count=-1)
    pixels = request(output_mode=LATENT, output_data_type=3, diffusion=steps)
    asked = [(live.stub.Sample, pixels, "output_data_type"), (live.stub.Sample, request(output_mode=7), "output_mode")]
    asked[1][1].diffusion.CopyFrom(steps)
    noises = tensor.encode(np.zeros((1, 3), np.float32))
    draw = pb.DecodeRequest(model=L, latents=noises, output_mode=DRAW, diffusion=steps)
    for call, wrong, path in (*asked, (live.stub.Decode, draw, "seed")):
        told = violations(live, call, wrong)
        assert path in told
        assert "diffusion.step_count" in told


@pytest.mark.parametrize("way", ["cancel", "deadline"])
@pytest.mark.parametrize("place", [0, REPLYING])
def test_who_leaves_while_its_samples_are_decoded_leaves_nothing(
    live: Live, parking: Parking, way: str, place: Any
) -> None:
    """Given up during the decode or right after it: no lane, no job and no backlog stay, and neighbours are served."""
    neighbour = request(seed=8)
    alone = live.sample(neighbour)
    walk = parking.hold(31, 9)  # the last evaluation of the walk
    call = live.stub.Sample(request(seed=31), timeout=3 if way == "deadline" else 60)
    assert walk.arrived.wait(30)
    stop = parking.hold(31, place)  # of the decode
    walk.leave.set()
    assert stop.arrived.wait(30)
    beside = threading.Thread(target=lambda: found.append(live.sample(neighbour)))
    found: list[bytes] = []
    beside.start()
    if way == "cancel":
        call.cancel()
    with pytest.raises((grpc.RpcError, grpc.FutureCancelledError)) as caught:
        list(call)
    if way == "deadline":
        assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    live.settle()
    stop.leave.set()
    beside.join()
    assert found == [alone]
    engine = live.serving.engine
    live.settle()
    assert (live.unfinished, engine.backlog, engine.lanes_held) == (0, 0, 0)
    assert not engine._courses


def test_a_decoder_that_fails_fails_its_own_requests_only(live: Live, monkeypatch: pytest.MonkeyPatch) -> None:
    """RUNTIME_FAILURE names the decoder; the books are clean, and the walk's model goes on."""
    run = call_runner.CallRunner.run

    def fail(self: Any, prepared: Any) -> Any:
        if any(job.seed == 41 for job in prepared.jobs):
            raise RuntimeError("no such luck")
        return run(self, prepared)

    before = live.sample(request(seed=42))
    monkeypatch.setattr(call_runner.CallRunner, "run", fail)
    with pytest.raises(grpc.RpcError) as caught:
        live.sample(request(seed=41))
    assert caught.value.code() is grpc.StatusCode.INTERNAL
    assert "tiny-vae@1" in caught.value.details()
    assert live.sample(request(seed=42)) == before
    live.settle()
    assert (live.unfinished, live.serving.engine.backlog) == (0, 0)


def test_the_door_counts_the_decode(live: Live, parking: Parking) -> None:
    """A request's decodes are in the backlog from the start."""
    stop = parking.hold(51, 0)
    call = live.stub.Sample(request(seed=51), timeout=60)
    assert stop.arrived.wait(30)
    assert live.serving.engine.backlog == 5 * (10 + 1)
    stop.leave.set()
    assert sum(len(each.result.sample_indices) for each in call) == 5


def test_a_paused_request_waits_with_its_decodes(live: Live, parking: Parking) -> None:
    """Lanes that finish their walk while their reader stands still are not decoded until it reads again."""
    engine = live.serving.engine
    last = parking.hold(61, 9)  # the last evaluation of the walk
    call = live.stub.Sample(request(seed=61), timeout=60)
    assert last.arrived.wait(30)
    (job_id,) = engine._sinks
    live.call(asked_of(engine.pause, job_id))
    live.settle()
    decode = parking.hold(61, QUEUED)
    last.leave.set()
    assert decode.arrived.wait(30)
    decode.leave.set()
    live.sample(request(seed=62))  # others are served meanwhile
    assert (live.unfinished, engine.backlog) == (1, 5)
    live.call(asked_of(engine.resume, job_id))
    assert sum(len(each.result.sample_indices) for each in call) == 5


async def asked_of(method: Callable[[int], None], job_id: int) -> None:
    """A call of the engine, on the event loop."""
    method(job_id)


def test_its_class_covers_both_models(live: Live) -> None:
    """GetModel tells one class of its own, which is neither the walk's nor the decoder's."""
    ours = live.serving.door.registry.get(L)
    names = {ours.determinism_class, live.serving.door.registry.get(VAE).determinism_class}
    assert len(names) == 2
    assert ours.determinism_class.startswith("certified-cpu-")
    assert "decoded by tiny-vae@1" in ours.model.determinism.explanation
    assert next(iter(live.stub.Sample(request()))).accepted.determinism_class == ours.determinism_class


def test_a_decoder_in_use_stays(live: Live) -> None:
    """It is not unloaded under its model; after the model it is, and both come back in order."""
    registry = live.serving.door.registry
    before = live.sample(request())
    with pytest.raises(ModelInUseError, match="tiny-latents@1"):
        live.call(registry.unload("tiny-vae@1"))
    assert live.sample(request()) == before
    live.call(registry.unload("tiny-latents@1"))
    live.call(registry.unload("tiny-vae@1"))
    failed = live.call(registry.load(L))
    assert failed.state == model_pb2.Model.STATE_FAILED
    assert "tiny-vae@1, which is not served" in failed.failure_reason
    live.call(registry.load(VAE))
    assert live.call(registry.load(L)).state == model_pb2.Model.STATE_ACTIVE
    assert live.sample(request()) == before


def test_a_decoder_that_does_not_fit_is_named(tmp_path: Path) -> None:
    """Every mismatch with the decoder, and every flaw of the space itself, keeps the model from being served."""
    write_vae(tmp_path)
    write_gan(tmp_path)
    digest = "sha256:" + "0" * 64
    write_latent_diffusion(tmp_path, "other-digest", digest=digest)
    write_latent_diffusion(tmp_path, "other-shape", latent=4, scales=(), shifts=())
    write_latent_diffusion(tmp_path, "other-classes", classes=("a", "b"))
    write_latent_diffusion(tmp_path, "no-encoder", "tiny-gan@1")
    write_latent_diffusion(tmp_path, "nobody", "absent@1", digest="")
    write_latent_diffusion(tmp_path, "flawed", "tiny-vae", digest="", scales=(0.0, 1.0), methods=[1, 5])
    running = Live(tmp_path, self_check_interval=0)
    try:
        reasons = {model.name: model.failure_reason for model in running.serving.door.registry.models()}
    finally:
        running.stop()
    assert reasons.pop("tiny-vae@1") == reasons.pop("tiny-gan@1") == ""
    for name, text in {
        "other-digest": f"made for another tiny-vae@1: digest {digest}",
        "other-shape": "latents have the shape [4], those of tiny-vae@1 [3]",
        "other-classes": "on the same ones",
        "no-encoder": "Encode needs an encoder, and tiny-gan@1 has none",
        "nobody": "latents of absent@1, which is not served",
    }.items():
        assert text in reasons.pop(f"{name}@1")
    flawed = reasons.pop("flawed@1")
    for text in ("decoder must be NAME@VERSION", "scales must hold", "scales must not be 0", "no Score"):
        assert text in flawed
    assert not reasons
    assert (tmp_path / "flawed" / "1" / BUNDLE_FILE).exists()
