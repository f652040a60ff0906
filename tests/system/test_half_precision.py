"""A bundle in half precision, from the trainer to the server's runners."""

from datetime import UTC, datetime

import numpy as np
import pytest
import torch
from latentd.v1 import bundle_pb2
from latentd_server import samplers
from latentd_server.certificate_cache import CertificateCache
from latentd_server.determinism import is_promise
from latentd_server.job import Start, StepJob
from latentd_server.loading import LoadedModel, Terms, load
from latentd_server.runners import evaluate
from latentd_server.runtime import Device
from latentd_server.scheduler import Cohort, Scheduler, Segment
from latentd_trainer import parity
from latentd_trainer.checkpoint import RunRecord, build_family
from latentd_trainer.data import load as load_data
from latentd_trainer.export import write_bundle
from latentd_trainer.parity import Precision


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[Precision, LoadedModel]:
    """A small diffusion model with random weights, loaded as both precisions."""
    root = tmp_path_factory.mktemp("models")
    settings = {"width": 8}
    info = load_data("digits").info
    spec = build_family("diffusion", settings, info, seed=0).serving_spec()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in (each for graph in spec.graphs for each in graph.module.parameters()):
            parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    record = RunRecord("diffusion", settings, "digits", info, 0, "fp32", 1, 1, {})
    time = datetime(2026, 1, 2, tzinfo=UTC)
    terms = Terms(Device("cpu"), 1, 8, True, CertificateCache(None))
    precisions: tuple[Precision, ...] = ("fp32", "fp16")
    return {
        each: load(write_bundle(spec, record, time, models=root, name=f"tiny-{each}", precision=each), terms)
        for each in precisions
    }


def sample(model: LoadedModel, lanes: range) -> np.ndarray:
    """DDIM samples, ten steps, of these numbers under one seed."""
    (runner,) = model.runners.values()
    schedule = model.servable.schedule
    assert schedule is not None
    timesteps = schedule.spaced_timesteps(10)
    job = StepJob(
        model=model.servable.model.name,
        lane_count=len(lanes),
        tables=(samplers.descent(schedule, "ddim", timesteps),),
        start=Start(noise_scale=schedule.level(timesteps[0])[1]),
        seed=7,
        sample_indices=np.array(lanes),
        labels=np.array(lanes) % 10,
    )
    entry = Scheduler(8).add(1, job, "test", 0.0)
    for position in range(10):
        (outcome,) = evaluate(runner, [Segment(entry, Cohort(0, len(lanes), position), len(lanes), len(lanes))])
    assert outcome.outputs is not None
    runner.forget(1)
    return outcome.outputs["sample"]


def test_a_half_precision_bundle_is_served_like_any_other(models: dict[Precision, LoadedModel]) -> None:
    """It is certified, its samples are float32, equal alone and in company, and near those of full precision."""
    half, whole = models["fp16"], models["fp32"]
    assert is_promise(half.servable.determinism_class)
    assert half.servable.network(bundle_pb2.Network.ROLE_DENOISER) is not None
    together = sample(half, range(8))
    assert together.dtype == np.float32
    for lane in (0, 5):
        assert sample(half, range(lane, lane + 1)).tobytes() == together[lane : lane + 1].tobytes()
    difference = np.abs(together - sample(whole, range(8))).max()
    assert 0 < difference <= parity.TOLERANCES["fp16"].chain
