"""Samples of several sizes from one network: how each is asked for, and that none sees another."""

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import onnxruntime as ort
import pytest
from bundles import SHAPE, TIMESTEPS, write_diffusion, write_vae
from doors import until
from google.protobuf.json_format import MessageToJson, Parse
from latentd import tensor
from latentd.digest import bundle_digest
from latentd.names import BUNDLE_FILE
from latentd.v1 import bundle_pb2, model_pb2
from latentd.v1 import generation_service_pb2 as pb
from latentd_server import bundle, sizes
from latentd_server.bundle import BundleError
from live import Live, gathered
from parking import Parking
from sized_bundles import NAME, OTHERS, write_sized

Images = np.ndarray[Any, np.dtype[np.float32]]
DEFAULT = SHAPE[1:]
EVERY = (DEFAULT, *OTHERS)
WIDE = OTHERS[0]
STEPS = 4


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of three sizes and one of a single size."""
    directory = tmp_path_factory.mktemp("sizes")
    write_sized(directory)
    write_diffusion(directory)
    write_vae(directory)
    return directory


@pytest.fixture(scope="module")
def parking() -> Parking:
    return Parking()


@pytest.fixture(scope="module")
def live(root: Path, parking: Parking) -> Iterator[Live]:
    running = Live(root, parking, max_batch_rows=8, self_check_interval=0)
    yield running
    running.stop()


def size_of(size: tuple[int, int]) -> model_pb2.Size:
    return model_pb2.Size(height=size[0], width=size[1])


def asked(size: tuple[int, int] | None, seed: int = 7, count: int = 2, **fields: Any) -> pb.SampleRequest:
    """A guided walk with fresh noise."""
    options = fields.pop("diffusion", None) or pb.DiffusionOptions(sampler="ddpm", step_count=STEPS, guidance_scale=2)
    return pb.SampleRequest(
        model=fields.pop("model", NAME),
        seed=seed,
        sample_count=count,
        condition=pb.Condition(class_label=1),
        diffusion=options,
        size=None if size is None else size_of(size),
        **fields,
    )


def images(responses: Any) -> Images:
    """The samples of a request, in order."""
    found = {}
    for response in responses:
        result = response.result
        if response.HasField("result"):
            found |= dict(zip(result.sample_indices, tensor.decode(result.samples), strict=True))
    return np.stack([found[index] for index in sorted(found)])


def refused(live: Live, method: str, request: Any) -> str:
    """What is said against a request."""
    ask = getattr(live.stub, method)
    with pytest.raises(grpc.RpcError) as caught:
        list(ask(request, timeout=60)) if method == "Sample" else ask(request, timeout=60)
    assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT
    return str(caught.value.details())


@pytest.mark.parametrize("size", EVERY, ids=map(sizes.text, EVERY))
def test_samples_have_the_size_that_was_asked_for(size: tuple[int, int], live: Live, parking: Parking) -> None:
    """The accepted request says it, previews and results have it, and sent again it gives the same bytes."""
    options = pb.DiffusionOptions(sampler="ddpm", step_count=STEPS, preview_interval_steps=1)
    stop = parking.hold(95, STEPS - 1)
    call = live.stub.Sample(asked(size, seed=95, diffusion=options), timeout=60)
    resolved = next(call).accepted.resolved_request
    assert resolved.size == size_of(size)
    assert tuple(next(call).preview.estimates.shape) == (2, 1, *size)
    stop.leave.set()
    made = images(call)
    assert made.shape == (2, 1, *size)
    again = images(live.stub.Sample(resolved, timeout=60))
    assert again.tobytes() == made.tobytes()


def test_no_size_is_the_default(live: Live) -> None:
    """A request without a size is that of `sample_spec`, and is resolved to it; other models say nothing of sizes."""
    [accepted, *rest] = list(live.stub.Sample(asked(None), timeout=60))
    assert accepted.accepted.resolved_request.size == size_of(DEFAULT)
    assert images(rest).tobytes() == images(live.stub.Sample(asked(DEFAULT), timeout=60)).tobytes()
    [accepted, *_] = list(live.stub.Sample(asked(None, model="tiny-diffusion"), timeout=60))
    assert not accepted.accepted.resolved_request.HasField("size")
    [accepted, *_] = list(live.stub.Sample(asked(DEFAULT, model="tiny-diffusion"), timeout=60))
    assert accepted.accepted.resolved_request.size == size_of(DEFAULT)


def test_bytes_do_not_depend_on_the_crowd(live: Live, parking: Parking) -> None:
    """What a request of each size gets alone it gets among requests of every size, all of them accepted at once."""
    alone = {(size, seed): live.sample(asked(size, seed)) for size in EVERY for seed in (7, 8)}
    stop = parking.hold(99, 0)
    blocker = live.stub.Sample(asked(None, seed=99), timeout=60)
    assert stop.arrived.wait(60)
    crowd = {(size, seed): live.stub.Sample(asked(size, seed), timeout=60) for size in EVERY for seed in (7, 8)}
    for call in crowd.values():  # accepted: they are among the engine's jobs now
        next(call)
    live.settle()
    assert live.unfinished == 1 + len(crowd)
    stop.leave.set()
    assert {key: gathered(call) for key, call in crowd.items()} == alone
    gathered(blocker)


def test_sizes_step_in_turn(live: Live, parking: Parking) -> None:
    """While a long walk of one size is under way, a short one of another size is begun and finished."""
    walk = pb.DiffusionOptions(sampler="ddim", step_count=TIMESTEPS)
    stop = parking.hold(98, 3)
    long = live.stub.Sample(asked(WIDE, seed=98, diffusion=walk), timeout=60)
    assert stop.arrived.wait(60)
    late = parking.hold(98, TIMESTEPS - 1)
    short = live.stub.Sample(asked(None, seed=97), timeout=60)
    next(short)
    live.settle()
    time.sleep(0.5)  # the walk pays for being held: the short one may take so much of the device's time in its stead
    stop.leave.set()
    assert late.arrived.wait(60)
    assert images(short).shape == (2, 1, *DEFAULT)
    late.leave.set()
    assert images(long).shape == (2, 1, *WIDE)


@pytest.mark.parametrize("size", OTHERS, ids=map(sizes.text, OTHERS))
def test_a_loop_is_the_network_run_by_hand(size: tuple[int, int], live: Live, root: Path) -> None:
    """Every step of a client-driven loop gives what ONNX Runtime gives for the bundle's own file at that size."""
    session = ort.InferenceSession(root / NAME / "1" / "denoiser.onnx", providers=["CPUExecutionProvider"])
    options = pb.DiffusionOptions(sampler="ddim", step_count=STEPS)
    request = asked(size, diffusion=options)
    step = pb.StreamRequest(id=1, take_step=pb.TakeStep(state_requested=True))
    state = np.random.default_rng(1).standard_normal((2, 1, *size)).astype(np.float32)
    first = pb.StreamRequest(id=1, take_step=pb.TakeStep(state_requested=True, noisy_samples=tensor.encode(state)))
    answers = live.stream(pb.StreamRequest(id=1, open_denoise=request), first, *[step] * (STEPS - 1))[1]
    assert answers[0].loop.accepted.resolved_request.size == size_of(size)
    timesteps = [answers[0].loop.timestep, *(each.loop.timestep for each in answers[1:])]
    for answer, timestep, following in zip(answers[1:], timesteps[:-1], timesteps[1:], strict=True):
        feeds = {"x": state, "t": np.full(2, timestep), "y": np.full(2, 1)}
        (v,) = session.run(None, feeds)
        angle, next_angle = ((t + 1) / (TIMESTEPS + 1) * np.pi / 2 for t in (timestep, following))
        x0 = np.clip(np.cos(angle) * state - np.sin(angle) * v, -1, 1)
        eps = np.sin(angle) * state + np.cos(angle) * v
        np.testing.assert_allclose(tensor.decode(answer.loop.step.denoised_samples), x0, atol=1e-5)
        state = tensor.decode(answer.loop.step.next_samples)
        np.testing.assert_allclose(state, np.cos(next_angle) * x0 + np.sin(next_angle) * eps, atol=1e-5)
    sampled = images(live.stub.Sample(request, timeout=60))
    assert live.loop(request).tobytes() == sampled.tobytes()


def test_tensors_are_taken_by_their_size(live: Live) -> None:
    """Encode, Decode, DenoiseStep, Score, start points and known pixels go by the size of what they are given."""
    given = np.random.default_rng(2).uniform(-1, 1, (2, 1, *WIDE)).astype(np.float32)
    sent, label = tensor.encode(given), pb.Condition(class_label=1)
    steps = pb.DiffusionOptions(step_count=STEPS)
    latents = live.stub.Encode(pb.EncodeRequest(model=NAME, samples=sent, condition=label, diffusion=steps)).latents
    assert tuple(latents.shape) == given.shape
    back = live.stub.Decode(pb.DecodeRequest(model=NAME, latents=latents, condition=label, diffusion=steps))
    assert tuple(back.samples.shape) == given.shape
    step = live.stub.DenoiseStep(
        pb.DenoiseStepRequest(model=NAME, noisy_samples=sent, timesteps=[50], next_timesteps=[20], condition=label)
    )
    assert tuple(step.next_samples.shape) == given.shape
    noised = live.stub.Encode(pb.EncodeRequest(model=NAME, samples=sent, forward_timestep=5, seed=1))
    assert tuple(noised.latents.shape) == given.shape
    assert len(live.stub.Score(pb.ScoreRequest(model=NAME, samples=sent, timestep_count=3)).values) == 2
    mask = np.zeros((1, 1, *WIDE), np.uint8)
    mask[..., :2] = 1
    known = pb.KnownPixels(samples=sent, mask=tensor.encode(mask))
    options = pb.DiffusionOptions(step_count=STEPS, start=pb.StartPoint(samples=sent), known=known)
    made = images(live.stub.Sample(asked(WIDE, diffusion=options), timeout=60))
    np.testing.assert_array_equal(made[..., :2], given[..., :2])
    assert (made[..., 2:] != given[..., 2:]).any()


def test_refusals_name_the_sizes(live: Live) -> None:
    """A size that is not listed is refused with those that are; so are tensors, and parts of unlike size."""
    said = refused(live, "Sample", asked((5, 5)))
    assert "size: must be unset or one of 4x4, 6x8, 8x4; got 5x5" in said
    assert "must be unset or one of 4x4; got 6x8" in refused(live, "Sample", asked(WIDE, model="tiny-diffusion"))
    odd = tensor.encode(np.zeros((1, 1, 5, 5), np.float32))
    for method, request in {
        "Encode": pb.EncodeRequest(model=NAME, samples=odd),
        "Decode": pb.DecodeRequest(model=NAME, latents=odd),
        "DenoiseStep": pb.DenoiseStepRequest(model=NAME, noisy_samples=odd, timesteps=[3]),
        "Score": pb.ScoreRequest(model=NAME, samples=odd),
    }.items():
        assert "must be [n, 1, 4, 4], or of height and width 6x8, 8x4; got [1, 1, 5, 5]" in refused(
            live, method, request
        )
    start = pb.DiffusionOptions(start=pb.StartPoint(samples=tensor.encode(np.zeros((1, *SHAPE), np.float32))))
    said = refused(live, "Sample", asked(WIDE, diffusion=start))
    assert "diffusion.start.samples.shape: must be [n, 1, 6, 8]; got [1, 1, 4, 4]" in said


def test_a_one_shot_model_takes_its_own_size_alone(live: Live) -> None:
    """A VAE may be asked for the size that it makes."""
    request = pb.SampleRequest(model="tiny-vae", seed=1, size=size_of(DEFAULT))
    assert images(live.stub.Sample(request, timeout=60)).shape == (1, *SHAPE)
    request.size.CopyFrom(size_of(WIDE))
    assert "must be unset or one of 4x4" in refused(live, "Sample", request)


def test_every_size_is_tried_and_told(live: Live) -> None:
    """GetModel lists the sizes and what is promised at each; the metrics speak of one model with one graph."""
    live.sample(asked(WIDE))
    model = live.serving.door.registry.model(NAME)
    assert sizes.listed(model) == list(OTHERS)
    told = [(graph.sample_size.height, graph.sample_size.width) for graph in model.determinism.graphs]
    assert told == [(0, 0), *OTHERS]
    batched = model_pb2.ModelDeterminism.PROMISE_BATCHED
    assert all(graph.promise == batched and len(graph.batch_sizes) > 0 for graph in model.determinism.graphs)
    exposition = live.serving.door.metrics.exposition().decode()
    series = {line.split("{")[1].split("}")[0] for line in exposition.splitlines() if "evaluations_total{" in line}
    assert {text for text in series if NAME in text} == {f'graph="denoiser",model="{NAME}@1"'}


def test_unloading_takes_every_size(root: Path) -> None:
    """A walk of another size is finished first; then no graph is left. Loaded anew it gives the same bytes."""
    parking = Parking()
    running = Live(root, parking, max_batch_rows=8)
    try:
        before = running.sample(asked(WIDE, seed=96))
        stop = parking.hold(96, 1)
        call = running.stub.Sample(asked(WIDE, seed=96), timeout=60)
        assert stop.arrived.wait(60)
        registry = running.serving.door.registry

        async def unload() -> None:
            stop.leave.set()
            await registry.unload(f"{NAME}@1")

        running.call(unload())
        assert gathered(call) == before
        runners = running.serving.engine._runners
        running.call(until(lambda: not [key for key in runners if key[0] == f"{NAME}@1"]))
        loaded = running.call(registry.load(NAME))
        assert loaded.state == model_pb2.Model.STATE_ACTIVE
        assert running.sample(asked(WIDE, seed=96)) == before
    finally:
        running.stop()


def test_samples_of_other_sizes_check_themselves(root: Path) -> None:
    """While idle the server makes one again, alone, and finds the same bytes; told under the model of all sizes."""
    running = Live(root, max_batch_rows=8, self_check_interval=0.001)
    wanted = f'latentd_self_checks_total{{model="{NAME}@1",result="match"}} '
    try:
        running.sample(asked(WIDE))
        running.call(until(lambda: wanted in running.serving.door.metrics.exposition().decode()))
        assert 'result="mismatch"' not in running.serving.door.metrics.exposition().decode()
    finally:
        running.stop()


def test_rows_that_see_each_other_ride_alone_at_every_size(tmp_path: Path) -> None:
    """The certificate of a network that mixes rows holds lanes apart at the other sizes too: bytes stay equal."""
    write_sized(tmp_path, leaky=True)
    running = Live(tmp_path, max_batch_rows=8, self_check_interval=0)
    try:
        graphs = running.serving.door.registry.model(NAME).determinism.graphs
        assert {graph.promise for graph in graphs} == {model_pb2.ModelDeterminism.PROMISE_ALONE}
        two, one = images(running.stub.Sample(asked(WIDE))), images(running.stub.Sample(asked(WIDE, count=1)))
        assert two[0].tobytes() == one[0].tobytes()
    finally:
        running.stop()


def problems_of(directory: Path) -> str:
    with pytest.raises(BundleError) as caught:
        bundle.read(directory)
    return str(caught.value)


def test_a_graph_must_leave_height_and_width_open(tmp_path: Path) -> None:
    """Listed sizes need open axes, and open axes need listed sizes."""
    said = problems_of(write_sized(tmp_path, "fixed", open_axes=False))
    assert "input 'x' is of shape [1, 4, 4] alone, and model.sample_sizes lists other sizes" in said
    assert "output 'prediction' is of shape [1, 4, 4] alone" in said
    assert "has shape [1, 'height', 'width']" in problems_of(write_sized(tmp_path, "unlisted", sizes=()))


def test_a_bundle_must_list_sensible_sizes(tmp_path: Path) -> None:
    """Sizes are positive, differ from each other and from the default, and belong to a diffusion model."""
    said = problems_of(write_sized(tmp_path, sizes=((6, 8), (6, 8), DEFAULT, (0, 4))))
    assert "6x8 is listed twice" in said
    assert "4x4 is listed twice, or is that of sample_spec" in said
    assert "0x4 must have a positive height and width" in said
    directory = write_vae(tmp_path)
    message = Parse((directory / BUNDLE_FILE).read_text(), bundle_pb2.Bundle())
    message.model.sample_sizes.add(height=8, width=8)
    message.model.digest = bundle_digest(message)
    (directory / BUNDLE_FILE).write_text(MessageToJson(message))
    assert json.loads((directory / BUNDLE_FILE).read_text())["model"]["sampleSizes"]
    said = problems_of(directory)
    assert "only a diffusion model over samples can have other sizes" in said
    assert "a model of several sizes can have no graph beside its denoiser" in said
