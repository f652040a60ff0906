"""What readers that have stopped may take of the server's memory, by the formula of docs/operations.md."""

import time
from pathlib import Path
from typing import Any

import grpc
from latentd.v1 import generation_service_pb2 as pb
from latentd.v1 import generation_service_pb2_grpc
from lone import lone_server

STREAMS = 64
SAMPLES = 12_000
OUTBOX_BYTES = 256 * 1024
AHEAD_BYTES = 256 * 1024
"""What gRPC may hold for one of these clients, whose windows stay at 64 KiB, its connection included."""
SAMPLE_BYTES = 24
"""Of each sample of an accepted request."""
SLACK_BYTES = 16 * 2**20
"""What any load brings: code that is loaded when first used, arenas of threads."""


def test_stalled_streams_take_no_more_memory_than_the_formula_says(models_root: Path, tmp_path: Path) -> None:
    """64 readers stop, each with far more to come than is kept for it: their lanes sit out, an honest caller is served,
    and what the server holds for each is its request, the outbox, what gRPC runs ahead, and no more.
    """
    flags = ("--reader-timeout", "0", "--max-samples", str(SAMPLES))
    log = tmp_path / "server.log"
    with (
        lone_server(models_root, log, OUTBOX_BYTES, *flags) as server,
        grpc.insecure_channel(server.grpc) as channel,
    ):
        honest: Any = generation_service_pb2_grpc.GenerationServiceStub(channel)
        small = pb.SampleRequest(model="tiny-vae", sample_count=200, seed=1)
        want = [message.result for message in honest.Sample(small)][1:]
        before = server.resident_bytes
        endless = pb.SampleRequest(model="tiny-vae", sample_count=SAMPLES)
        options = [("grpc.http2.bdp_probe", 0), ("grpc.use_local_subchannel_pool", 1)]
        channels = [grpc.insecure_channel(server.grpc, options=options) for _ in range(STREAMS)]
        calls = []
        for index, each in enumerate(channels):
            stub: Any = generation_service_pb2_grpc.GenerationServiceStub(each)
            asked = iter([pb.StreamRequest(id=1, sample=endless)])
            calls.append(stub.Stream(asked) if index % 2 else stub.Sample(endless))
            next(calls[-1])
        seen = -1.0
        while (now := server.evaluations) != seen:  # until nothing is done for them any more
            seen = now
            time.sleep(0.3)
        assert seen < STREAMS * SAMPLES / 2, "their lanes sit out"
        held = server.resident_bytes - before
        assert held < STREAMS * (SAMPLES * SAMPLE_BYTES + OUTBOX_BYTES + AHEAD_BYTES) + SLACK_BYTES, (
            f"{held / 2**20:.0f} MiB, {seen / STREAMS:.0f} samples each"
        )
        got = [message.result for message in honest.Sample(small)][1:]
        assert b"".join(r.samples.data for r in got) == b"".join(r.samples.data for r in want)
        for each in channels:
            each.close()
