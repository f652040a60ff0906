"""A server with no `--max-batch-rows`: small networks that answer in one call have far wider batches than others."""

import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import grpc
import pytest
from bundles import write_gan
from latentd.v1 import (
    admin_service_pb2,
    admin_service_pb2_grpc,
    bundle_pb2,
    model_service_pb2,
    model_service_pb2_grpc,
)
from latentd.v1 import generation_service_pb2 as pb
from latentd_server import engine
from latentd_server.app import USUAL_ROWS, WIDEST_ROWS
from latentd_server.scheduler import Batch, GraphKey
from live import Live, gathered
from parking import Parking

COUNT = 256
SOME = (0, 1, 63, 64, 65, 128, 255)
"""Samples that are looked at one by one."""


class Watching(Parking):
    """Notes the batches that set off."""

    def __init__(self) -> None:
        super().__init__()
        self._batches: list[tuple[GraphKey, int]] = []

    def evaluating(self, batch: Batch) -> None:
        self._batches.append((batch.key, batch.rows))
        super().evaluating(batch)

    def rows(self) -> list[int]:
        """Rows of the batches since this was asked last, all of one graph."""
        batches, self._batches = self._batches, []
        assert len({key for key, _ in batches}) == 1
        return [rows for _, rows in batches]


@pytest.fixture(scope="module")
def watching() -> Watching:
    return Watching()


@pytest.fixture(scope="module")
def live(models_root: Path, watching: Watching) -> Iterator[Live]:
    with pytest.MonkeyPatch.context() as patch:
        # No call is long enough to plan the next batch beside it: what waits is there when a held one goes on.
        patch.setattr(engine, "SHORTEST_S", 1e9)
        running = Live(models_root, watching, admin="127.0.0.1:0", self_check_interval=0)
        yield running
        running.stop()


def sampling(model: str, count: int = COUNT, **fields: Any) -> pb.SampleRequest:
    return pb.SampleRequest(model=model, seed=5, sample_count=count, **fields)


def one_of(request: pb.SampleRequest, sample: int, count: int = 1) -> pb.SampleRequest:
    """The same request for a part of its samples."""
    part = pb.SampleRequest()
    part.CopyFrom(request)
    part.sample_count, part.first_sample_index = count, sample
    return part


SINGLE_CALLS = {
    "vae": sampling("tiny-vae"),
    "vae, drawn, with a label": sampling(
        "tiny-vae", condition=pb.Condition(class_label=2), output_mode=pb.OUTPUT_MODE_DRAW
    ),
    "gan": sampling("tiny-gan"),
}


def until(condition: Callable[[], bool]) -> None:
    """Wait for what the server does by itself."""
    give_up_s = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < give_up_s
        time.sleep(0.002)


@pytest.mark.parametrize("name", SINGLE_CALLS)
def test_many_samples_ride_in_one_batch_with_the_bytes_of_lone_ones(name: str, live: Live, watching: Watching) -> None:
    """Four usual batches are one; its caller is told so; each sample is what it is alone, and in a part of the rest."""
    request = SINGLE_CALLS[name]
    answers = list(live.stub.Sample(request, timeout=60))
    assert watching.rows() == [COUNT]
    stats = [answer.result.stats for answer in answers if answer.HasField("result")]
    assert {each.mean_batch_size for each in stats} == {COUNT}
    assert sum(each.evaluation_count for each in stats) == COUNT
    together = gathered(answers)
    size = len(together) // COUNT
    samples = [together[size * k : size * (k + 1)] for k in range(COUNT)]
    assert len(set(samples)) == COUNT
    for k in SOME:
        assert live.sample(one_of(request, k)) == samples[k]
    assert watching.rows() == [1] * len(SOME)
    assert live.sample(one_of(request, 50, 150)) == b"".join(samples[50:200])
    assert watching.rows() == [150]


def all_at_once(live: Live, watching: Watching, requests: Sequence[pb.SampleRequest]) -> list[bytes]:
    """What requests of one model get that all wait for the device, which a call of one row keeps busy until then."""
    stop = watching.hold(99, 0)
    held = live.stub.Sample(pb.SampleRequest(model=requests[0].model, seed=99), timeout=60)
    assert stop.arrived.wait(30)
    calls = [live.stub.Sample(request, timeout=60) for request in requests]
    until(lambda: live.unfinished == 1 + len(requests))
    live.settle()
    watching.clear()
    together = [gathered(call) for call in calls]
    gathered(held)
    return together


def test_more_than_the_widest_takes_another_batch(live: Live, watching: Watching) -> None:
    """A full batch holds as many rows as ever one does."""
    requests = [sampling("tiny-gan", 900, first_sample_index=900 * part) for part in range(2)]
    together = all_at_once(live, watching, requests)
    assert watching.rows() == [1, WIDEST_ROWS, 1800 - WIDEST_ROWS]
    assert together == [live.sample(request) for request in requests]
    assert watching.rows() == [900, 900]


def test_small_requests_of_many_share_one_wide_batch(live: Live, watching: Watching) -> None:
    """A hundred that wait while the device is busy go together, with the bytes that they have alone."""
    requests = [one_of(SINGLE_CALLS["vae"], k) for k in range(100)]
    together = all_at_once(live, watching, requests)
    assert watching.rows() == [1, 100]
    assert b"".join(together) == live.sample(one_of(SINGLE_CALLS["vae"], 0, 100))
    assert watching.rows() == [100]


def test_walks_have_the_usual_batches(live: Live, watching: Watching) -> None:
    """However small their network is, guided or not; and each sample is what it is alone."""
    for guidance_scale, rows in ((1.0, 1), (2.0, 2)):
        walk = pb.DiffusionOptions(sampler="ddpm", step_count=2, guidance_scale=guidance_scale)
        request = sampling("tiny-diffusion", condition=pb.Condition(class_label=1), diffusion=walk)
        together = live.sample(request)
        ridden = watching.rows()
        assert max(ridden) == USUAL_ROWS
        assert sum(ridden) == 2 * rows * COUNT
        size = len(together) // COUNT
        for k in SOME:
            assert live.sample(one_of(request, k)) == together[size * k : size * (k + 1)]
        assert watching.rows() == [rows] * 2 * len(SOME)


def test_a_model_that_comes_back_has_its_wide_batches_and_its_bytes(live: Live, watching: Watching) -> None:
    """Unloaded and loaded again, both at the device and at the door; GetModel names the sizes."""
    request = SINGLE_CALLS["gan"]
    before = live.sample(request)
    watching.rows()
    key = "tiny-gan@1", bundle_pb2.Network.ROLE_DECODER
    models = model_service_pb2_grpc.ModelServiceStub(live.channel)
    with grpc.insecure_channel(live.serving.addresses["admin"]) as channel:
        admin = admin_service_pb2_grpc.AdminServiceStub(channel)
        admin.UnloadModel(admin_service_pb2.UnloadModelRequest(name="tiny-gan@1"), timeout=60)
        until(lambda: live.serving.engine._admission.batch_rows.of(key) == USUAL_ROWS)
        admin.LoadModel(admin_service_pb2.LoadModelRequest(name="tiny-gan@1"), timeout=60)
    assert live.serving.engine._admission.batch_rows.of(key) == WIDEST_ROWS
    assert live.sample(request) == before
    assert watching.rows() == [COUNT]
    said = models.GetModel(model_service_pb2.GetModelRequest(name="tiny-gan")).model.determinism
    assert {max(graph.batch_sizes) for graph in said.graphs} == {WIDEST_ROWS}


def test_a_number_that_is_given_holds_for_all(tmp_path: Path, live: Live) -> None:
    """Small networks too, even where it is the one that others have anyway; bytes are the same."""
    watching = Watching()
    running = Live(write_gan(tmp_path).parents[1], watching, max_batch_rows=USUAL_ROWS, self_check_interval=0)
    try:
        given = running.sample(SINGLE_CALLS["gan"])
    finally:
        running.stop()
    assert watching.rows() == [USUAL_ROWS] * (COUNT // USUAL_ROWS)
    assert given == live.sample(SINGLE_CALLS["gan"])
