"""Bytes that must not change unnoticed: what exact networks give, on every machine and after every upgrade.

Networks of float32 give other last bits on other processors. Those of `exact_bundles.py` do not, so what is pinned here
is everything around a network: noise, schedules, samplers, guidance, wiring and the step graph. `dpmpp-2m` and its like
take logarithms of the schedule in float64; a C library that rounds one of them otherwise is as good as never seen
through the rounding to float32.
"""

import hashlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from bundles import SHAPE
from exact_bundles import HIDDEN, write_exact_diffusion, write_exact_vae
from latentd import tensor
from latentd.names import SAMPLERS
from latentd.v1 import generation_service_pb2 as pb
from latentd_server.determinism import ARITHMETIC_VERSION
from live import Live, gathered

GOLDEN_VERSION = 2
"""Of `ARITHMETIC_VERSION`, that the bytes below belong to."""

GOLDEN = {
    "ddim": "f8abc9fb5b7d4ad0",
    "ddpm": "8823fbf1af913a9b",
    "dpmpp-2m": "1aa325b0055b8547",
    "dpmpp-2m-sde": "62974372bce317b3",
    "euler": "4397369015b8f79f",
    "euler-ancestral": "8823fbf1af913a9b",  # of which ddpm is the case with eta = 1
    "heun": "6c5dbe6461cb2d27",
    "guided ddpm": "94f2c5ac8028e9c8",
    "guided heun": "5088f8a0d1c54391",
    "ddim with eta": "053d92f25341573b",
    "image to image": "a0e9b1dd846e97d7",
    "explicit timesteps": "5caeba49bd9ef149",
    "vae mean": "8010b62173d1814f",
    "vae draw": "253f5e0d9652051e",
    "vae encode": "b8a386b5b8a26dd0",
}

D, V = "exact-diffusion", "exact-vae"


def walk(sampler: str, **fields: Any) -> pb.SampleRequest:
    options = pb.DiffusionOptions(sampler=sampler, step_count=7, **fields)
    return pb.SampleRequest(model=D, seed=7, sample_count=3, diffusion=options)


def image() -> Any:
    return tensor.encode((np.arange(16, dtype=np.float32).reshape(1, *SHAPE) - 8) / 8)


REQUESTS = {
    **{sampler: walk(sampler) for sampler in SAMPLERS},
    "guided ddpm": walk("ddpm", guidance_scale=2.5),
    "guided heun": walk("heun", guidance_scale=-0.5),
    "ddim with eta": walk("ddim", eta=0.3),
    "image to image": walk("ddpm", start=pb.StartPoint(samples=image(), strength=0.6)),
    "explicit timesteps": pb.SampleRequest(
        model=D, seed=1, diffusion=pb.DiffusionOptions(sampler="euler-ancestral", timesteps=[90, 55, 54, 10, 0])
    ),
    "vae mean": pb.SampleRequest(model=V, seed=2, sample_count=4, temperature=0.75),
    "vae draw": pb.SampleRequest(model=V, seed=2, sample_count=4, output_mode=pb.OUTPUT_MODE_DRAW),
    "vae encode": pb.EncodeRequest(model=V, samples=image()),
}


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    root = tmp_path_factory.mktemp("exact")
    write_exact_diffusion(root)
    write_exact_diffusion(root, np.random.default_rng(0).permutation(HIDDEN), "shuffled-diffusion")
    write_exact_vae(root)
    running = Live(root, max_batch_rows=8)
    yield running
    running.stop()


def digest(request: Any, live: Live) -> str:
    if isinstance(request, pb.EncodeRequest):
        response = live.stub.Encode(request)
        data = response.normal.mean.data + response.normal.log_variance.data
    else:
        data = gathered(live.stub.Sample(request, timeout=60))
    return hashlib.sha256(data).hexdigest()[:16]


def test_bytes_are_those_of_the_release_before(live: Live) -> None:
    """Noise, samplers, guidance, start points, draws and encoders, to the last bit."""
    found = {name: digest(request, live) for name, request in REQUESTS.items()}
    changed = sorted(name for name in found if found[name] != GOLDEN.get(name))
    advice = (
        "Equal requests would give other bytes than before. If that is meant: raise determinism.ARITHMETIC_VERSION, so "
        "that no client takes the new bytes for the old, and put the new digests and GOLDEN_VERSION here"
    )
    assert not changed, f"{changed}: {advice}; now {found}"
    assert set(GOLDEN) == set(found)
    assert GOLDEN_VERSION == ARITHMETIC_VERSION, "the version was raised, so something must have changed; what?"


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_exact_networks_compute_the_same_in_any_order(sampler: str, live: Live) -> None:
    """Hidden units in another order change the order of every sum, and not a bit; that is why these bytes can be
    pinned.
    """
    shuffled = walk(sampler)
    shuffled.model = "shuffled-diffusion"
    assert digest(walk(sampler), live) == digest(shuffled, live)
