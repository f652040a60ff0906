"""Inpainting: known pixels are put in before every step, and come out as they went in."""

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from bundles import SHAPE, TIMESTEPS
from latentd import tensor
from latentd.v1 import generation_service_pb2 as pb
from latentd_server import step_graph
from latentd_server.noise import Purpose, normals, runs
from latentd_server.runtime import CompiledGraph, Device
from latentd_server.state_pool import StatePool
from live import Live
from victims import SEED, D

COUNT, STEPS = 3, 6
RNG = np.random.default_rng(11)
IMAGES = RNG.uniform(-1, 1, (COUNT, *SHAPE)).astype(np.float32)
MASKS = RNG.integers(0, 2, (COUNT, *SHAPE)).astype(np.uint8)
SAMPLERS = {
    "ddim": {"eta": 0.5},
    "ddpm": {},
    "dpmpp-2m": {},
    "dpmpp-2m-sde": {},
    "euler": {},
    "euler-ancestral": {},
    "heun": {},
}


@pytest.fixture(scope="module")
def live(models_root: Path, call_length: str) -> Iterator[Live]:
    del call_length  # set before it starts
    running = Live(models_root, max_batch_rows=16, self_check_interval=0)
    yield running
    running.stop()


def known(images: np.ndarray = IMAGES, masks: np.ndarray = MASKS) -> pb.KnownPixels:
    return pb.KnownPixels(samples=tensor.encode(images), mask=tensor.encode(masks))


def asked(pixels: pb.KnownPixels | None = None, count: int = COUNT, **walk: Any) -> pb.SampleRequest:
    options = pb.DiffusionOptions(**{"sampler": "ddim", "step_count": STEPS} | walk)
    if pixels is not None:
        options.known.CopyFrom(pixels)
    condition = pb.Condition(class_label=1)
    return pb.SampleRequest(model=D, seed=SEED, sample_count=count, condition=condition, diffusion=options)


def images_of(live: Live, request: pb.SampleRequest) -> np.ndarray:
    """[n, C, H, W], in order."""
    found: dict[int, np.ndarray] = {}
    for response in live.stub.Sample(request, timeout=60):
        if response.HasField("result"):
            found |= dict(zip(response.result.sample_indices, tensor.decode(response.result.samples), strict=True))
    return np.stack([found[index] for index in range(len(found))])


def draws(purpose: Purpose, step: int) -> np.ndarray:
    rows = normals(runs(purpose, SEED, range(COUNT), [step] * COUNT), int(np.prod(SHAPE)))
    return rows.reshape(COUNT, *SHAPE)


def level(timestep: int) -> tuple[np.float32, np.float32]:
    angle = (timestep + 1) / (TIMESTEPS + 1) * np.pi / 2
    return np.float32(np.cos(angle)), np.float32(np.sin(angle))


def by_hand(live: Live, request: pb.SampleRequest) -> np.ndarray:
    """The same walk as a client-driven loop, whose every step is given a state with the known part in it."""
    request.diffusion.ClearField("known")
    evaluations = 2 if request.diffusion.sampler == "heun" else 1
    state = None
    opened = live.stream(pb.StreamRequest(id=1, open_denoise=request))[1][0].loop
    timesteps = [opened.timestep, *opened.remaining_timesteps]
    # Each step is given a state made of the answer to the one before, so that it cannot be asked for ahead.
    gate = _Requests([pb.StreamRequest(id=1, open_denoise=request)])
    answers = live.stub.Stream(iter(gate), timeout=60)
    next(answers)
    for step, timestep in enumerate(timesteps[:-1]):
        alpha, sigma = level(timestep)
        state = sigma * draws(Purpose.START, 0) if state is None else state
        noised = alpha * IMAGES + sigma * draws(Purpose.KNOWN, evaluations * step)
        put = pb.TakeStep(noisy_samples=tensor.encode(np.where(MASKS == 1, noised, state)), state_requested=True)
        gate.send(pb.StreamRequest(id=1, take_step=put))
        state = tensor.decode(next(answers).loop.step.next_samples)
    gate.close()
    assert state is not None
    return np.where(MASKS == 1, IMAGES, state)


class _Requests:
    """An iterator of requests that is fed."""

    def __init__(self, first: list[pb.StreamRequest]) -> None:
        self._waiting: list[pb.StreamRequest | None] = list(first)
        self._change = threading.Condition()

    def send(self, request: pb.StreamRequest | None) -> None:
        with self._change:
            self._waiting.append(request)
            self._change.notify()

    def close(self) -> None:
        self.send(None)

    def __iter__(self) -> Iterator[pb.StreamRequest]:
        while True:
            with self._change:
                self._change.wait_for(lambda: self._waiting, 60)
                request = self._waiting.pop(0)
            if request is None:
                return
            yield request


@pytest.mark.parametrize("guidance", [1.0, 2.5])
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_it_is_the_walk_with_the_known_part_put_in(live: Live, sampler: str, guidance: float) -> None:
    """Byte for byte what a client gets that puts q(x_t | known) into every state by itself."""
    request = asked(known(), sampler=sampler, guidance_scale=guidance, **SAMPLERS[sampler])
    images = images_of(live, request)
    assert np.array_equal(images[MASKS == 1], IMAGES[MASKS == 1])
    assert images.tobytes() == by_hand(live, request).tobytes()
    assert images.tobytes() != images_of(live, request).tobytes()  # `by_hand` took the known pixels away


def test_known_pixels_are_exact_in_bytes_too(live: Live) -> None:
    """As UINT8 in and out they are the very bytes, with one mask for all channels and samples."""
    pixels = RNG.integers(0, 256, (1, *SHAPE)).astype(np.uint8)
    mask = np.zeros((1, 1, *SHAPE[1:]), np.float32)
    mask[..., :2] = 1
    request = asked(known(pixels, mask))
    request.output_data_type = 3
    images = images_of(live, request)
    assert np.array_equal(images[..., :2], np.repeat(pixels, COUNT, 0)[..., :2])
    assert len(np.unique(images[..., 2:])) > 3


def test_nobody_else_notices(live: Live) -> None:
    """In a crowd of walks with and without known pixels each has its bytes of alone; n samples are n requests."""
    crowd = [asked(known(), sampler=sampler, **more) for sampler, more in SAMPLERS.items()]
    crowd += [asked(sampler=sampler, step_count=9, **more) for sampler, more in SAMPLERS.items()]
    crowd += [asked(known(), start=pb.StartPoint(samples=tensor.encode(IMAGES[::-1].copy()), strength=0.6))]
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
    whole = images_of(live, crowd[1])
    for index in range(COUNT):
        one = asked(known(IMAGES[index : index + 1], MASKS[index : index + 1]), count=1, sampler="ddpm")
        one.first_sample_index = index
        assert images_of(live, one)[0].tobytes() == whole[index].tobytes()


def test_previews_show_what_is_known(live: Live) -> None:
    """Every estimate has the known pixels in their place, and the request is echoed without them."""
    request = asked(known(), preview_interval_steps=1, step_count=40)
    looks = 0
    for response in live.stub.Sample(request, timeout=60):
        if response.HasField("accepted"):
            assert not response.accepted.resolved_request.diffusion.HasField("known")
        if response.HasField("preview"):
            estimates, rows = tensor.decode(response.preview.estimates), list(response.preview.sample_indices)
            assert np.array_equal(estimates[MASKS[rows] == 1], IMAGES[rows][MASKS[rows] == 1])
            looks += 1
    assert looks


def test_a_call_that_fails_may_be_made_again(live: Live, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is known is written anew before the second attempt, and the bytes are those of an undisturbed walk."""
    request = asked(known(), sampler="ddpm")
    before = live.sample(request)
    blend, failures = StatePool.blend, []

    def fail_once(self: StatePool, *rows: Any) -> None:
        blend(self, *rows)
        if len(failures) < 3:
            failures.append(rows)
            raise RuntimeError("no such luck")

    monkeypatch.setattr(StatePool, "blend", fail_once)
    with pytest.raises(grpc.RpcError):  # twice in a row is a failure
        live.sample(request)
    assert live.sample(request) == before
    assert len(failures) == 3


WRONG = {
    "mask shape": (known(masks=MASKS[:, :, :2]), "diffusion.known.mask.shape", "must be [1 or 3, 1, 4, 4]"),
    "mask count": (known(masks=MASKS[:2]), "diffusion.known.mask.shape", "must be [1 or 3, 1, 4, 4]"),
    "mask values": (known(masks=MASKS * 2), "diffusion.known.mask.data", "must be 0 or 1 everywhere"),
    "mask type": (known(masks=MASKS.astype(np.int64)), "diffusion.known.mask.data_type", "must be UINT8"),
    "no mask": (pb.KnownPixels(samples=tensor.encode(IMAGES)), "diffusion.known.mask", ""),
    "samples": (known(IMAGES[:2]), "diffusion.known.samples.shape", "must hold 1 sample, or 3"),
    "not finite": (known(IMAGES * np.float32(np.inf)), "diffusion.known.samples.data", "must be finite"),
}


@pytest.mark.parametrize(("pixels", "path", "text"), WRONG.values(), ids=WRONG)
def test_wrong_pixels_are_refused(live: Live, pixels: pb.KnownPixels, path: str, text: str) -> None:
    """Shape, number, type and values of both tensors, with what is allowed."""
    with pytest.raises(grpc.RpcError) as caught:
        live.sample(asked(pixels))
    assert path in caught.value.details()
    assert text in caught.value.details()


def test_all_violations_come_at_once(live: Live) -> None:
    """A bad mask, bad pixels and a bad step count are told together."""
    with pytest.raises(grpc.RpcError) as caught:
        live.sample(asked(known(IMAGES[:2], MASKS * 3), step_count=-1))
    for path in ("diffusion.known.samples.shape", "diffusion.known.mask.data", "diffusion.step_count"):
        assert path in caught.value.details()


def test_only_sample_is_given_known_pixels(live: Live) -> None:
    """Encode, Decode and loops refuse them and say why."""
    options = pb.DiffusionOptions(known=known())
    image = tensor.encode(IMAGES)
    with pytest.raises(grpc.RpcError, match=r"diffusion\.known"):
        live.stub.Encode(pb.EncodeRequest(model=D, samples=image, diffusion=options))
    with pytest.raises(grpc.RpcError, match=r"diffusion\.known"):
        live.stub.Decode(pb.DecodeRequest(model=D, latents=image, diffusion=options))
    (answer,) = live.stream(pb.StreamRequest(id=1, open_denoise=asked(known())))[1]
    assert "who drives a loop" in answer.error.message


def test_the_graph_that_puts_them_in_only_selects() -> None:
    """On a device with memory of its own a graph puts the known part in: bits as they are, NaN and -0 among them."""
    device = Device("cpu")
    rows = RNG.standard_normal((4, *SHAPE)).astype(np.float32)
    rows[0, 0, 0], rows[1, 0, 1] = np.nan, -0.0
    values = RNG.standard_normal((2, *SHAPE)).astype(np.float32)
    values[0, 0, 2] = -0.0
    mask = MASKS[:2].astype(bool)
    pools = [StatePool(device, SHAPE, 4, through_graphs=through) for through in (True, False)]
    for pool in pools:
        pool.write(np.arange(1, 5), rows, rows)
        pool.blend(np.array([2, 4]), mask, values)
    graph, host = (pool.memory.arrays["x"].tobytes() for pool in pools)
    assert graph == host
    assert np.frombuffer(graph, np.float32).reshape(-1, *SHAPE)[2][mask[0]].tobytes() == values[0][mask[0]].tobytes()
    assert pools[0].memory.arrays["h"].tobytes() == pools[1].memory.arrays["h"].tobytes()
    assert CompiledGraph(step_graph.build_blender(SHAPE), device, 1, capture=False).inputs
