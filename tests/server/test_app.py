"""The whole server in this process: ports, health, HTTP, reflection, and what happens when models are bad."""

import asyncio
import contextlib
import http.client
import json
import socket
import struct
import threading
import urllib.error
import urllib.request
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from bundles import write_all, write_gan, write_vae
from doors import until
from grpc import aio
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from latentd.v1 import generation_service_pb2 as pb
from latentd.v1 import generation_service_pb2_grpc, model_pb2, model_service_pb2, model_service_pb2_grpc
from latentd_server.app import BindError, Serving, serving
from latentd_server.config import Config
from latentd_server.health import Health
from latentd_server.ports import why_not_bound
from latentd_server.runtime import Device

Status = health_pb2.HealthCheckResponse
State = model_pb2.Model


def config(root: Path, **fields: Any) -> Config:
    local = "127.0.0.1:0"
    return Config(
        models=root, **({"listen": local, "http": local, "health": local, "threads": 1, "max_batch_rows": 4} | fields)
    )


@pytest.fixture
async def running(tmp_path: Path) -> AsyncIterator[Serving]:
    async with serving(config(write_all(tmp_path)), Device("cpu")) as running:
        await until(lambda: not running.health.why_not_serving)
        yield running


async def check(address: str, name: str = "") -> Any:
    """What health Check says of a name."""
    async with aio.insecure_channel(address) as channel:
        request = health_pb2.HealthCheckRequest(service=name)
        return (await health_pb2_grpc.HealthStub(channel).Check(request)).status


async def fetch(running: Serving, path: str) -> tuple[int, str, str]:
    """Status, type and body of an HTTP resource."""

    def get() -> tuple[int, str, str]:
        try:
            with urllib.request.urlopen(f"http://{running.addresses['http']}{path}", timeout=10) as response:
                return response.status, response.headers["Content-Type"], response.read().decode()
        except urllib.error.HTTPError as error:
            with error:
                return error.code, error.headers["Content-Type"], error.read().decode()

    return await asyncio.to_thread(get)


@pytest.mark.parametrize("name", ["", "tiny-vae", "tiny-vae@1", "tiny-gan", "tiny-diffusion@1"])
async def test_a_loaded_server_serves_under_every_name(name: str, running: Serving) -> None:
    """Overall, by NAME and by NAME@VERSION, on the main port and on the health port."""
    for port in ("grpc", "health"):
        assert await check(running.addresses[port], name) == Status.SERVING


async def test_an_unknown_name_is_not_found(running: Serving) -> None:
    """As grpc.health.v1 says."""
    with pytest.raises(aio.AioRpcError) as caught:
        await check(running.addresses["grpc"], "nobody")
    assert caught.value.code() is grpc.StatusCode.NOT_FOUND


async def test_the_health_port_has_health_only(running: Serving) -> None:
    """It is open to probes without credentials, so it offers nothing else."""
    async with aio.insecure_channel(running.addresses["health"]) as channel:
        with pytest.raises(aio.AioRpcError) as caught:
            await model_service_pb2_grpc.ModelServiceStub(channel).ListModels(model_service_pb2.ListModelsRequest())
    assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED


async def test_health_follows_models_from_loading_to_drain() -> None:
    """NOT_SERVING until all are loaded, then as the models are, and NOT_SERVING for good once draining."""
    health = Health()
    await health.begin()
    server = aio.server()
    health_pb2_grpc.add_HealthServicer_to_server(health.servicer, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    telling = asyncio.create_task(health.run())
    async with aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        overall = stub.Watch(health_pb2.HealthCheckRequest())
        late = stub.Watch(health_pb2.HealthCheckRequest(service="a"))
        assert (await overall.read()).status == Status.NOT_SERVING
        assert (await late.read()).status == Status.SERVICE_UNKNOWN
        assert health.why_not_serving == "loading models"
        health.model_changed("a@1", State.STATE_LOADING)
        assert (await late.read()).status == Status.NOT_SERVING
        health.model_changed("a@1", State.STATE_ACTIVE)
        assert (await late.read()).status == Status.SERVING
        assert health.why_not_serving == "loading models"
        health.model_changed("b@1", State.STATE_FAILED)
        health.all_loaded()
        assert (await overall.read()).status == Status.SERVING
        health.model_changed("a@2", State.STATE_LOADING)  # a@1 still answers for a
        health.model_changed("a@1", State.STATE_DRAINING)
        assert (await late.read()).status == Status.NOT_SERVING
        assert (await overall.read()).status == Status.NOT_SERVING
        assert health.why_not_serving == "no model is active; failed to load: b@1"
        health.model_changed("a@2", State.STATE_ACTIVE)
        assert (await late.read()).status == Status.SERVING
        assert (await overall.read()).status == Status.SERVING
        health.drain()
        assert (await late.read()).status == Status.NOT_SERVING
        assert (await overall.read()).status == Status.NOT_SERVING
        assert health.why_not_serving == "draining"
    telling.cancel()
    await server.stop(0)


async def test_healthz_and_metrics_over_http(running: Serving) -> None:
    """200 and a status while serving; the exposition names models and build."""
    assert await fetch(running, "/healthz") == (200, "application/json", '{"status": "serving"}\n')
    status, kind, text = await fetch(running, "/metrics")
    assert status == 200
    assert kind.startswith("text/plain; version=")
    assert 'latentd_model_state{model="tiny-vae@1",state="ACTIVE"} 1.0' in text
    assert 'latentd_build_info{device="cpu",version="' in text
    assert "process_resident_memory_bytes" in text
    assert (await fetch(running, "/"))[0] == 404


async def test_a_client_that_hangs_up_leaves_no_stack(running: Serving, capfd: pytest.CaptureFixture[str]) -> None:
    """A scrape that is cut off half-way prints nothing, and the next one is answered."""
    host, _, port = running.addresses["http"].rpartition(":")
    with socket.create_connection((host, int(port))) as cut_off:
        cut_off.sendall(b"GE")
        await asyncio.sleep(0.05)  # so that a thread waits for the rest of the line
        cut_off.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # close by a reset
    assert (await fetch(running, "/healthz"))[0] == 200
    await until(lambda: not any("process_request_thread" in thread.name for thread in threading.enumerate()))
    assert capfd.readouterr().err == ""


async def test_a_probe_may_ask_by_head(running: Serving) -> None:
    """HEAD gives the status and the length that GET would, and no body."""

    def head() -> tuple[int, str | None, bytes]:
        connection = http.client.HTTPConnection(running.addresses["http"], timeout=10)
        with contextlib.closing(connection):
            connection.request("HEAD", "/healthz")
            answer = connection.getresponse()
            return answer.status, answer.getheader("Content-Length"), answer.read()

    assert await asyncio.to_thread(head) == (200, str(len('{"status": "serving"}\n')), b"")


async def test_healthz_says_why_not(tmp_path: Path) -> None:
    """503 with a reason while no model can be served."""
    async with serving(config(tmp_path), Device("cpu")) as running:
        await until(lambda: "loading" not in running.health.why_not_serving)
        status, _, body = await fetch(running, "/healthz")
    assert status == 503
    assert json.loads(body) == {"status": "not serving", "reason": "no model is active"}


async def test_one_bad_bundle_takes_no_other_down(tmp_path: Path) -> None:
    """The good model serves, the bad one is shown with its reason, and the server counts as serving."""
    write_gan(tmp_path)
    (write_vae(tmp_path) / "encoder.onnx").write_bytes(b"")
    async with serving(config(tmp_path), Device("cpu")) as running:
        await until(lambda: not running.health.why_not_serving)
        address = running.addresses["grpc"]
        assert await check(address) == Status.SERVING
        assert await check(address, "tiny-gan") == Status.SERVING
        assert await check(address, "tiny-vae") == Status.NOT_SERVING
        async with aio.insecure_channel(address) as channel:
            models = model_service_pb2_grpc.ModelServiceStub(channel)
            listed = (await models.ListModels(model_service_pb2.ListModelsRequest())).models
            assert [(model.name, model.state) for model in listed] == [
                ("tiny-gan@1", State.STATE_ACTIVE),
                ("tiny-vae@1", State.STATE_FAILED),
            ]
            assert "encoder.onnx" in listed[1].failure_reason
            stub = generation_service_pb2_grpc.GenerationServiceStub(channel)
            with pytest.raises(aio.AioRpcError) as caught:
                await stub.Sample(pb.SampleRequest(model="tiny-vae")).read()
            assert caught.value.code() is grpc.StatusCode.FAILED_PRECONDITION


async def test_reflection_lists_what_is_served(running: Serving) -> None:
    """Tools find the services and their messages without a .proto file."""
    async with aio.insecure_channel(running.addresses["grpc"]) as channel:
        stub = reflection_pb2_grpc.ServerReflectionStub(channel)
        call = stub.ServerReflectionInfo(iter([reflection_pb2.ServerReflectionRequest(list_services="")]))
        response = await call.read()
    assert {service.name for service in response.list_services_response.service} == {
        "latentd.v1.GenerationService",
        "latentd.v1.ModelService",
        "grpc.health.v1.Health",
        "grpc.reflection.v1alpha.ServerReflection",
    }


@pytest.mark.parametrize("port", ["listen", "http", "health"])
async def test_a_port_in_use_is_said_plainly(port: str, running: Serving, tmp_path: Path) -> None:
    """No second server shares a port in silence; what was opened is closed again."""
    taken = running.addresses["grpc" if port == "listen" else port]
    with pytest.raises(BindError, match=rf"cannot listen on {taken} \(.*\): Address already in use"):
        async with serving(config(tmp_path, **{port: taken}), Device("cpu")):
            pass


NOWHERE = [("192.0.2.1", "Cannot assign requested address"), ("no-such-host.invalid", "Name or service not known")]


@pytest.mark.parametrize(("host", "why"), NOWHERE, ids=["another machine's address", "a name of nothing"])
@pytest.mark.parametrize("port", ["listen", "http", "health"])
async def test_an_address_that_is_not_ours_is_said_plainly(port: str, host: str, why: str, tmp_path: Path) -> None:
    """Where no port would do, nobody is sent looking for who uses it."""
    with pytest.raises(BindError) as caught:
        async with serving(config(tmp_path, **{port: f"{host}:8500"}), Device("cpu")):
            pass
    name = "grpc" if port == "listen" else port
    assert str(caught.value).startswith(f"cannot listen on {host}:8500 ({name}): ")
    assert why in str(caught.value) or "resolution" in str(caught.value)  # without a resolver, that is what is wrong


def test_a_port_that_is_free_again_is_not_called_taken() -> None:
    """Whoever held it may have let go between gRPC's try and the question why."""
    assert "nothing wrong" in why_not_bound("127.0.0.1:0")
    assert "nothing wrong" in why_not_bound("localhost:0")


async def test_leaving_drains(tmp_path: Path) -> None:
    """What was accepted when the drain began is answered whole; nobody is cut off."""
    running = serving(config(write_all(tmp_path)), Device("cpu"))
    served = await running.__aenter__()
    await until(lambda: not served.health.why_not_serving)
    async with aio.insecure_channel(served.addresses["grpc"]) as channel:
        stub = generation_service_pb2_grpc.GenerationServiceStub(channel)
        walk = pb.DiffusionOptions(step_count=50)
        call = stub.Sample(pb.SampleRequest(model="tiny-diffusion", sample_count=64, diffusion=walk))
        await call.read()
        watch = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest())
        assert (await watch.read()).status == Status.SERVING
        leaving = asyncio.create_task(running.__aexit__(None, None, None))
        assert (await watch.read()).status == Status.NOT_SERVING
        with pytest.raises(aio.AioRpcError) as caught:
            await stub.Sample(pb.SampleRequest(model="tiny-vae")).read()
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
        assert "draining" in caught.value.details()
        seen: list[int] = []
        while (response := await call.read()) is not aio.EOF:
            seen += response.result.sample_indices
        assert sorted(seen) == list(range(64))
        assert await call.code() is grpc.StatusCode.OK
        await asyncio.wait_for(leaving, 30)


@pytest.mark.parametrize(("max_streams", "count"), [(16, 400), (10_000, 2500)])
async def test_a_burst_of_calls_on_one_connection_is_answered(max_streams: int, count: int, tmp_path: Path) -> None:
    """More calls than may be under way, or than gRPC would let wait, are neither cut off nor forgotten."""
    async with serving(config(write_all(tmp_path), max_streams=max_streams), Device("cpu")) as running:
        await until(lambda: not running.health.why_not_serving)
        async with aio.insecure_channel(running.addresses["grpc"]) as channel:
            models = model_service_pb2_grpc.ModelServiceStub(channel)
            request = model_service_pb2.GetModelRequest(name="tiny-gan")
            answers = await asyncio.gather(*(models.GetModel(request) for _ in range(count)))
    assert {answer.model.name for answer in answers} == {"tiny-gan@1"}
