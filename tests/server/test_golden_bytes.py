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

GOLDEN_VERSION = 3
"""Of `ARITHMETIC_VERSION`, that the bytes below belong to."""

GOLDEN = {
    "ddim": "9c18620e1f96f301",
    "ddpm": "6c8fff72a075a602",
    "dpmpp-2m": "1e08246a6a2d2f18",
    "dpmpp-2m-sde": "d28e8948e1b8382f",
    "euler": "e07eaa521407f5d3",
    "euler-ancestral": "6c8fff72a075a602",  # of which ddpm is the case with eta = 1
    "heun": "036942ce7896a683",
    "guided ddpm": "ba375549dcfffa0a",
    "guided heun": "f6e54f1576a6328f",
    "ddim with eta": "15ead857b8da2133",
    "image to image": "c53d40ecf1fda02b",
    "explicit timesteps": "b7093c729aa5bbc1",
    "vae mean": "868db1239134b156",
    "vae draw": "0eafa7e8f9539d6e",
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
