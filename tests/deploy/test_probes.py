"""What the manifests ask of a running server, asked of its own health service and HTTP port."""

import asyncio
import shutil
import urllib.request
from collections.abc import AsyncIterator

import pytest
from grpc import aio
from grpc_health.v1 import health_pb2, health_pb2_grpc
from latentd.v1 import model_pb2
from latentd_server.health import Health
from latentd_server.http import HttpServer
from manifests import of_kind, render

pytestmark = pytest.mark.skipif(shutil.which("kubectl") is None, reason="rendering needs kubectl")

SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


@pytest.fixture
async def health() -> AsyncIterator[Health]:
    """The server's health, kept up to date."""
    health = Health()
    await health.begin()
    watching = asyncio.create_task(health.run())
    yield health
    watching.cancel()
    await asyncio.gather(watching, return_exceptions=True)


@pytest.fixture
async def kubelet(health: Health) -> AsyncIterator[health_pb2_grpc.HealthStub]:
    """A client of that health over a port of its own."""
    server = aio.server()
    health_pb2_grpc.add_HealthServicer_to_server(health.servicer, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    async with aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        yield health_pb2_grpc.HealthStub(channel)
    await server.stop(0)


def asked(kind: str) -> health_pb2.HealthCheckRequest:
    """What the probe of this kind asks."""
    [deployment] = of_kind(render("base"), "Deployment")
    [container] = deployment["spec"]["template"]["spec"]["containers"]
    return health_pb2.HealthCheckRequest(service=container[kind]["grpc"].get("service", ""))


async def test_the_probes_follow_a_servers_life(health: Health, kubelet: health_pb2_grpc.HealthStub) -> None:
    """Loading and draining pods are alive but not ready; a pod is started and ready once a model is active."""
    watch = kubelet.Watch(asked("readinessProbe"))
    alive, started = asked("livenessProbe"), asked("startupProbe")
    assert (await watch.read()).status == NOT_SERVING
    assert (await kubelet.Check(started)).status == NOT_SERVING
    assert (await kubelet.Check(alive)).status == SERVING

    health.model_changed("digits-vae@1", model_pb2.Model.STATE_ACTIVE)
    health.all_loaded()
    assert (await watch.read()).status == SERVING
    assert (await kubelet.Check(started)).status == SERVING

    health.drain()
    assert (await watch.read()).status == NOT_SERVING
    assert (await kubelet.Check(alive)).status == SERVING
    watch.cancel()


def test_prometheus_is_sent_where_the_metrics_are() -> None:
    """The PodMonitor's path is answered by the server's HTTP port."""
    [monitor] = of_kind(render("base"), "PodMonitor")
    [endpoint] = monitor["spec"]["podMetricsEndpoints"]
    server = HttpServer("127.0.0.1", 0, exposition=lambda: b"latentd_up 1\n", health=lambda: "")
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{server.port}{endpoint['path']}", timeout=10) as answer:
            assert answer.read() == b"latentd_up 1\n"
    finally:
        server.close()
