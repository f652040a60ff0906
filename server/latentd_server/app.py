"""Wires the rooms together: ports, services, health, and an orderly end."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import gc
import logging
import os
import platform
import signal
import struct
import time
from collections.abc import AsyncIterator, Coroutine, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import prometheus_client
import uvloop
from grpc import aio
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection, reflection_pb2_grpc
from latentd import __version__
from latentd.v1 import admin_service_pb2, generation_service_pb2, model_service_pb2

from latentd_server import logs
from latentd_server.catalogue import AdminService, ModelService
from latentd_server.certificate_cache import open_cache
from latentd_server.config import Config
from latentd_server.engine import Engine
from latentd_server.exchange import Door
from latentd_server.handling import UnregisteredMethods, register
from latentd_server.health import Health
from latentd_server.http import HttpServer
from latentd_server.metrics import Metrics
from latentd_server.models import Registry
from latentd_server.plans import Limits
from latentd_server.points import Points
from latentd_server.ports import why_not_bound
from latentd_server.rpc import GenerationService
from latentd_server.runtime import CudaSettings, Device, choose_device, default_threads

LINGER_SECONDS = 0.5
"""How long a draining server refuses calls in words (UNAVAILABLE, DRAINING) before it closes its port, after which
calls that are on their way would be cancelled without one."""

USUAL_ROWS, WIDEST_ROWS = 64, 1024
"""Of a batch, unless the settings say otherwise; the second of networks that are small enough (ADR 38)."""
_MOST_PENDING_CALLS = 1_000_000

_SEEDS_AT_ONCE = 512

_MALLOPT_TRIM_THRESHOLD, _MALLOPT_MMAP_THRESHOLD = -1, -3

log = logging.getLogger("latentd")


class BindError(Exception):
    """A port cannot be opened."""


class EngineError(Exception):
    """The engine is gone; only a new process helps."""


class Shutdown:
    """The first SIGTERM or SIGINT asks for an orderly end; the second ends the process at once."""

    def __init__(self) -> None:
        self.asked = asyncio.Event()
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._heard, number)

    def _heard(self, number: signal.Signals) -> None:
        if self.asked.is_set():
            log.error("second %s: stopping at once", number.name)
            logging.shutdown()
            os._exit(128 + number)
        log.info("%s: draining", number.name)
        self.asked.set()


def run(config: Config) -> None:
    """Serve until told to stop.

    Raises:
        BindError: a port cannot be opened.
        DeviceError: the device that was asked for cannot be used.
        EngineError: the engine failed.
    """
    _tune_malloc()
    prometheus_client.disable_created_metrics()  # type: ignore[no-untyped-call]  # the library leaves it untyped
    device = choose_device(config.device, _cuda_settings(config))
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(_serve_until_told(config, device))


async def _serve_until_told(config: Config, device: Device) -> None:
    shutdown = Shutdown()  # before models load, which may take long
    async with serving(config, device) as running:
        ends = [asyncio.create_task(event.wait()) for event in (shutdown.asked, running.engine.broken)]
        await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
        for end in ends:
            end.cancel()
    if running.engine.broken.is_set():
        raise EngineError("the device thread failed, so nothing can be served; the log has the details")
    log.info("stopped")


@dataclass(frozen=True)
class Serving:
    """A server at work."""

    addresses: dict[str, str]  # HOST:PORT as bound, of "grpc", "http", and "health" and "admin" where there are such
    door: Door
    engine: Engine
    health: Health
    service: GenerationService


@contextlib.asynccontextmanager
async def serving(config: Config, device: Device, points: Points | None = None) -> AsyncIterator[Serving]:
    """Open the ports, load the models, serve; on leaving, drain. `points` is for tests that hold the engine.

    Raises:
        BindError: a port cannot be opened.
    """
    metrics = Metrics()
    metrics.running(__version__, str(device))
    max_rows = config.max_batch_rows or USUAL_ROWS
    engine = Engine(
        metrics,
        max_rows=max_rows,
        max_backlog=config.max_backlog,
        max_model_backlog=config.max_model_backlog,
        max_caller_backlog=config.max_caller_backlog,
        caller_weights=config.caller_weights,
        self_check_interval_s=config.self_check_interval,
        points=points,
    )
    metrics.watch(lambda: engine.backlog, lambda: engine.queue_depth, lambda: engine.lanes_held)
    threads = config.threads or default_threads()
    registry = Registry(
        config.models,
        engine,
        device,
        threads=threads,
        max_rows=max_rows,
        strict=config.determinism == "strict",
        cache=open_cache(config.cache, os.environ),
        grace_s=config.drain_seconds,
        max_samples=config.max_samples,
        widest_rows=0 if config.max_batch_rows else WIDEST_ROWS,
    )
    health = Health()
    registry.subscribe(health.model_changed)
    registry.subscribe(metrics.model_state)
    door = Door(engine, registry, metrics, _limits(config), time.monotonic, partial(next, _fresh_seeds()))
    service = GenerationService(door)
    async with contextlib.AsyncExitStack() as stack:
        stack.push_async_callback(engine.close)
        http = stack.enter_context(_http(config.http, metrics, health))
        await health.begin()
        servers = {"grpc": (config.listen, _main_server(config, door, service))}
        if config.health:
            servers["health"] = (config.health, _new_server(config))
        if config.admin:
            servers["admin"] = (config.admin, _admin_server(config, door, registry))
        addresses = {"http": http}
        for name, (address, server) in servers.items():
            health_pb2_grpc.add_HealthServicer_to_server(health.servicer, UnregisteredMethods(server))
            addresses[name] = _bind(server, address, name)
        registry.discover()
        for _, server in servers.values():
            await server.start()
        about = {"device": str(device), "provider": device.provider, "device_reason": device.reason, "threads": threads}
        logs.event(log, "listening", **addresses, **about, version=__version__)
        stack.enter_context(_background(health.run()))
        stack.enter_context(_background(_load(registry, health, config)))
        try:
            yield Serving(addresses, door, engine, health, service)
        finally:
            await _drain(config.drain_seconds, health, engine, service)
            # What is still open now is health watchers, or work that was given up.
            await asyncio.gather(*(server.stop(0) for _, server in servers.values()))


async def _load(registry: Registry, health: Health, config: Config) -> None:
    await registry.load_all()
    _tune_collector()
    _return_memory()
    health.all_loaded()
    if why_not := health.why_not_serving:
        log.error("not serving: %s (models are looked for in %s)", why_not, config.models)
    else:
        log.info("ready")


async def _drain(seconds: float, health: Health, engine: Engine, service: GenerationService) -> None:
    """Refuse new work and finish what was accepted."""
    began = time.monotonic()
    health.drain()
    engine.drain()
    try:
        async with asyncio.timeout(seconds):
            await engine.drained()
            await service.finish()
    except TimeoutError:
        log.warning("%d jobs are given up after %g s", engine.queue_depth, seconds)
    await asyncio.sleep(max(0.0, LINGER_SECONDS - (time.monotonic() - began)))


def _cuda_settings(config: Config) -> CudaSettings:
    return CudaSettings(
        tf32=config.tf32 == "on",
        graphs=config.cuda_graphs == "on",
        memory_mib=config.gpu_memory_mib,
        arena=config.gpu_arena,
    )


def _limits(config: Config) -> Limits:
    return Limits(
        max_samples=config.max_samples,
        max_steps=config.max_steps,
        max_evaluations=config.max_backlog,
        max_open_ids=config.max_stream_requests,
        reader_timeout_s=config.reader_timeout,
    )


@contextlib.contextmanager
def _http(address: str, metrics: Metrics, health: Health) -> Iterator[str]:
    host, _, port = address.rpartition(":")
    try:
        http = HttpServer(host.strip("[]"), int(port), metrics.exposition, lambda: health.why_not_serving)
    except OSError as error:
        raise BindError(f"cannot listen on {address} (http): {error.strerror}") from error
    try:
        yield f"{host}:{http.port}"
    finally:
        http.close()


@contextlib.contextmanager
def _background(work: Coroutine[Any, Any, None]) -> Iterator[None]:
    task = asyncio.create_task(work)
    task.add_done_callback(_say_if_it_failed)
    try:
        yield
    finally:
        task.cancel()


def _say_if_it_failed(task: asyncio.Task[None]) -> None:
    if not task.cancelled() and (error := task.exception()) is not None:
        log.error("a task of the server failed", exc_info=error)


def _main_server(config: Config, door: Door, service: GenerationService) -> aio.Server:
    server = _new_server(config)
    register(server, generation_service_pb2.DESCRIPTOR.services_by_name["GenerationService"], service)
    register(server, model_service_pb2.DESCRIPTOR.services_by_name["ModelService"], ModelService(door))
    _reflect(server, generation_service_pb2, model_service_pb2)
    return server


def _admin_server(config: Config, door: Door, registry: Registry) -> aio.Server:
    server = _new_server(config)
    register(server, admin_service_pb2.DESCRIPTOR.services_by_name["AdminService"], AdminService(door, registry))
    _reflect(server, admin_service_pb2)
    return server


def _new_server(config: Config) -> aio.Server:
    return aio.server(
        options=[
            ("grpc.so_reuseport", 0),  # or a second server would share the port without a word
            ("grpc.max_receive_message_length", config.max_message_mib * 2**20),
            ("grpc.max_send_message_length", -1),
            ("grpc.max_concurrent_streams", config.max_streams),
            # Calls beyond that wait at the client, and those beyond the next wait here. Otherwise gRPC cuts both off,
            # as UNAVAILABLE and as CANCELLED, without a word in the log; refusing work is the engine's to do.
            ("grpc.http.overload_protection", 0),
            ("grpc.server.max_pending_requests", _MOST_PENDING_CALLS),
            ("grpc.server.max_pending_requests_hard_limit", _MOST_PENDING_CALLS),
            # Clients whose calls wait in silence may ping this often without being cut off.
            ("grpc.http2.min_ping_interval_without_data_ms", 5_000),
            ("grpc.keepalive_permit_without_calls", 1),
            # A client that vanished without a word frees its lanes within this long.
            ("grpc.keepalive_time_ms", 60_000),
            ("grpc.keepalive_timeout_ms", 20_000),
        ]
    )


def _bind(server: aio.Server, address: str, name: str) -> str:
    try:
        port = server.add_insecure_port(address)
    except RuntimeError as error:
        raise BindError(f"cannot listen on {address} ({name}): {why_not_bound(address)}") from error
    return f"{address.rpartition(':')[0]}:{port}"


def _reflect(server: aio.Server, *modules: Any) -> None:
    services = [
        service.full_name
        for module in (*modules, health_pb2)
        for service in module.DESCRIPTOR.services_by_name.values()
    ]
    servicer = reflection.aio.ReflectionServicer([*services, reflection.SERVICE_NAME])
    reflection_pb2_grpc.add_ServerReflectionServicer_to_server(servicer, UnregisteredMethods(server))


def _fresh_seeds() -> Iterator[int]:
    """Numbers of 63 bits from the system's generator, some at a time: to ask it takes ten microseconds."""
    while True:
        for (number,) in struct.iter_unpack("<q", os.urandom(8 * _SEEDS_AT_ONCE)):
            yield number & 2**63 - 1


def _return_memory() -> None:
    """Give back what loading took and freed, which glibc would keep for the size of messages to come."""
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(0)


def _tune_collector() -> None:
    """Let the garbage collector pass over what stays, and look at what comes and goes less often.

    Requests leave next to no cycles behind, and looking for them took some eight per cent of a small request. Broken
    calls do leave some, with what waited for their readers: looking ten times as rarely as here let memory grow by
    120 KB for each client that crashed.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(2_000, 10, 10)


def _tune_malloc() -> None:
    """Keep big buffers on the heap: glibc maps and unmaps those over 128 KiB, which doubles the cost of big messages.

    Both thresholds, since setting one freezes the other at its start value.
    """
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        libc.mallopt(_MALLOPT_MMAP_THRESHOLD, 32 * 2**20)
        libc.mallopt(_MALLOPT_TRIM_THRESHOLD, 512 * 2**20)
