"""Minutes of clients that crash, give up or stop reading: `make soak`. LATENTD_SOAK_SECONDS says how long."""

import os
import random
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import books
import grpc
import pytest
from latentd.v1 import generation_service_pb2 as pb
from latentd.v1 import generation_service_pb2_grpc
from live import gathered
from lone import lone_server
from victims import CALL_WAYS, STREAM_WAYS, VICTIMS, Client, D

SECONDS = float(os.environ.get("LATENTD_SOAK_SECONDS", "180"))
OUTBOX_BYTES = 256 * 1024
GROWTH_BYTES = 32 * 2**20
"""What the heap may still settle by after the first round."""

pytestmark = pytest.mark.soak


@contextmanager
def slow_reader(target: str) -> Iterator[None]:
    """A stream that asks for much, reads a little and hangs up in the middle."""
    with grpc.insecure_channel(target, options=[("grpc.use_local_subchannel_pool", 1)]) as channel:
        stub: Any = generation_service_pb2_grpc.GenerationServiceStub(channel)
        call = stub.Sample(pb.SampleRequest(model="tiny-vae", sample_count=1024))
        next(call)
        yield


def crash(target: str, luck: random.Random) -> None:
    """One client of any kind gives up in any way, at any moment."""
    victim = luck.choice(list(VICTIMS.values()))
    way = luck.choice(STREAM_WAYS if victim.in_stream else CALL_WAYS)
    client = Client(target, victim, way, luck.uniform(0.001, 0.05))
    time.sleep(luck.uniform(0, 0.02))  # anywhere in its course: nothing is decided by it
    client.give_up()
    client.close()


def test_nothing_grows_while_clients_come_and_crash(models_root: Path, tmp_path: Path) -> None:
    """Round after round the honest bytes stay, the books balance, and memory and open files stay where they were."""
    luck = random.Random(0)
    request = pb.SampleRequest(model=D, seed=1, sample_count=3, diffusion=pb.DiffusionOptions(step_count=8))
    with (
        lone_server(models_root, tmp_path / "server.log", OUTBOX_BYTES, "--reader-timeout", "2") as server,
        grpc.insecure_channel(server.grpc) as channel,
    ):
        honest: Any = generation_service_pb2_grpc.GenerationServiceStub(channel)
        want = gathered(honest.Sample(request, timeout=60))
        end_s, levels = time.monotonic() + SECONDS, []
        while not levels or time.monotonic() < end_s:
            for _ in range(40):
                with slow_reader(server.grpc):
                    crash(server.grpc, luck)
                assert gathered(honest.Sample(request, timeout=60)) == want
            books.must_rest(lambda: books.scrape(server.http), patience_s=60)
            levels.append((server.resident_bytes, server.open_files))
            assert levels[-1][0] < levels[0][0] + GROWTH_BYTES, levels
            assert levels[-1][1] <= levels[0][1] + 4, levels
