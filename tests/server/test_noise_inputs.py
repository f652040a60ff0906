"""Noise that graphs are fed: several inputs of it in one graph, and latents with a uniform prior."""

from collections.abc import Iterator
from typing import Any

import grpc
import numpy as np
import pytest
from bundles import SHAPE, write_echo
from latentd import tensor
from latentd.v1 import generation_service_pb2 as pb
from latentd_server import noise
from latentd_server.noise import Purpose, word
from live import Live

MODEL, SEED, COUNT = "tiny-echo", 11, 400
Array = np.ndarray[Any, Any]


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    root = tmp_path_factory.mktemp("echo")
    write_echo(root)
    running = Live(root, max_batch_rows=8)
    yield running
    running.stop()


def drawn(draw: Any, purpose: Purpose, stream: int, count: int = COUNT) -> Array:
    """Four elements for each of `count` samples of the seed."""
    return draw(noise.runs(word(purpose, stream), SEED, range(count)), 4)


def sampled(live: Live, count: int = COUNT, first: int = 0) -> tuple[Array, Array]:
    """Samples, [count, 16], and the latents they were decoded from, [count, 4], in order."""
    request = pb.SampleRequest(model=MODEL, seed=SEED, sample_count=count, first_sample_index=first)
    samples, latents = np.zeros((count, 16), np.float32), np.zeros((count, 4), np.float32)
    for response in live.stub.Sample(request, timeout=60):
        rows = list(response.result.sample_indices)
        if rows:
            samples[rows] = tensor.decode(response.result.samples).reshape(-1, 16)
            latents[rows] = tensor.decode(response.result.latents)
    return samples, latents


def test_each_noise_input_has_its_own_stream(live: Live) -> None:
    """The k-th noise input of a graph, of either kind, is fed stream k; no two of them are related."""
    samples, _ = sampled(live)
    expected = (
        drawn(noise.uniforms, Purpose.START, 0),
        drawn(noise.uniforms, Purpose.OUTPUT, 0),
        drawn(noise.normals, Purpose.OUTPUT, 1),
        drawn(noise.uniforms, Purpose.OUTPUT, 2),
    )
    assert samples.tobytes() == np.concatenate(expected, axis=1).tobytes()
    correlations = np.corrcoef(samples, rowvar=False) - np.eye(16)
    assert np.abs(correlations).max() < 4.5 / np.sqrt(COUNT)


def test_a_range_of_0_to_1_means_a_uniform_prior(live: Live) -> None:
    """Latents come from U[0, 1), are reported as they were fed, and depend on (seed, sample) alone."""
    samples, latents = sampled(live)
    assert latents.tobytes() == samples[:, :4].tobytes()
    assert latents.min() >= 0
    assert latents.max() < 1
    assert abs(latents.mean() - 0.5) < 0.03
    assert sampled(live, 5, first=7)[0].tobytes() == samples[7:12].tobytes()


def test_a_uniform_prior_has_no_temperature(live: Live) -> None:
    """A temperature other than 1 is refused by name; 1, which is what unset resolves to, is not."""
    request = pb.SampleRequest(model=MODEL, seed=SEED, temperature=0.5)
    with pytest.raises(grpc.RpcError) as refused:
        list(live.stub.Sample(request, timeout=60))
    assert refused.value.code() == grpc.StatusCode.INVALID_ARGUMENT
    assert "come from U[0, 1), which has no scale" in refused.value.details()
    request.temperature = 1.0
    assert list(live.stub.Sample(request, timeout=60))


def test_a_posterior_draw_is_independent_of_the_noise_that_fed_the_encoder(live: Live) -> None:
    """The encoder answers its own noise as probabilities; units are then on as often as those say, not never."""
    images = tensor.encode(np.zeros((COUNT, *SHAPE), np.float32))
    answer = live.stub.Encode(pb.EncodeRequest(model=MODEL, samples=images, seed=SEED), timeout=60)
    probability = tensor.decode(answer.bernoulli.probability)
    assert probability.tobytes() == drawn(noise.uniforms, Purpose.POSTERIOR, 0).tobytes()
    units = tensor.decode(answer.latents)
    expected = (drawn(noise.uniforms, Purpose.POSTERIOR, 1) < probability).astype(np.float32)
    assert units.tobytes() == expected.tobytes()
    assert abs(units.mean() - probability.mean()) < 0.05
