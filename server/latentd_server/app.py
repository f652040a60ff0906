"""Wires the rooms together: ports, services, health, and an orderly end."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import logging
import os
import platform
import secrets
import signal
import time
from collections.abc import Iterator
from typing import Any

import prometheus_client
import uvloop
from grpc import aio
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection
from latentd import __version__
from latentd.v1 import (
    admin_service_pb2,
    admin_service_pb2_grpc,
    generation_service_pb2,
    generation_service_pb2_grpc,
    model_service_pb2,
    model_service_pb2_grpc,
)

from latentd_server import logs
from latentd_server.catalogue import AdminService, ModelService
from latentd_server.config import Config
from latentd_server.engine import Engine
from latentd_server.exchange import Door
from latentd_server.health import Health
from latentd_server.http import HttpServer
from latentd_server.metrics import Metrics
from latentd_server.models import Registry
from latentd_server.plans import Limits
from latentd_server.rpc import GenerationService
from latentd_server.runtime import Device, choose_device, default_threads

LINGER_SECONDS = 0.5
"""How long a draining server refuses calls in words (UNAVAILABLE, DRAINING) before it closes its port, after which
calls that are on their way would be cancelled without one."""

_MALLOPT_TRIM_THRESHOLD, _MALLOPT_MMAP_THRESHOLD = -1, -3

log = logging.getLogger("latentd")


class BindError(Exception):
    """A port cannot be opened."""


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
    """
    _tune_malloc()
    prometheus_client.disable_created_metrics()  # type: ignore[no-untyped-call]  # the library leaves it untyped
    device = choose_device(config.device)
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(Server(config, device).serve())


class Server:
    """One server process. Made outside the event loop, lives inside it."""

    def __init__(self, config: Config, device: Device) -> None:
        self._config = config
        self._device = device

    async def serve(self) -> None:
        """Open the ports, load the models, serve, drain."""
        shutdown = Shutdown()
        config = self._config
        self._metrics = Metrics()
        self._metrics.running(__version__, str(self._device))
        self._engine = Engine(self._metrics, max_rows=config.max_batch_rows, max_backlog=config.max_backlog)
        self._metrics.watch(lambda: self._engine.backlog, lambda: self._engine.queue_depth)
        threads = config.threads or default_threads()
        self._registry = Registry(
            config.models, self._engine, self._device, threads=threads, max_rows=config.max_batch_rows
        )
        self._health = Health()
        self._registry.subscribe(self._health.model_changed)
        self._registry.subscribe(self._metrics.model_state)
        self._door = Door(
            engine=self._engine,
            registry=self._registry,
            metrics=self._metrics,
            limits=Limits(
                max_samples=config.max_samples,
                max_steps=config.max_steps,
                max_evaluations=config.max_backlog,
                max_open_ids=config.max_stream_requests,
            ),
            clock=time.monotonic,
            fresh_seed=lambda: secrets.randbits(63),
        )
        self._service = GenerationService(self._door)
        with self._open_http() as http:
            servers = await self._open_grpc(http, threads)
            watching = asyncio.create_task(self._health.run())
            loading = asyncio.create_task(self._load())
            await shutdown.asked.wait()
            await self._drain(servers)
            for task in (loading, watching):
                task.cancel()
            await asyncio.gather(loading, watching, return_exceptions=True)
            await self._engine.close()
        log.info("stopped")

    async def _load(self) -> None:
        await self._registry.load_all()
        self._health.all_loaded()
        if why_not := self._health.why_not_serving:
            log.error("not serving: %s (models are looked for in %s)", why_not, self._config.models)
        else:
            log.info("ready")

    @contextlib.contextmanager
    def _open_http(self) -> Iterator[HttpServer]:
        host, _, port = self._config.http.rpartition(":")
        try:
            http = HttpServer(
                host.strip("[]"), int(port), self._metrics.exposition, lambda: self._health.why_not_serving
            )
        except OSError as error:
            raise BindError(f"cannot listen on {self._config.http} (http): {error.strerror}") from error
        try:
            yield http
        finally:
            http.close()

    async def _open_grpc(self, http: HttpServer, threads: int) -> list[aio.Server]:
        config = self._config
        await self._health.begin()
        ports = {"listen": self._main_server(), "health": self._new_server()}
        if config.admin:
            ports["admin"] = self._new_server()
            admin_service_pb2_grpc.add_AdminServiceServicer_to_server(
                AdminService(self._door, self._registry), ports["admin"]
            )
            _reflect(ports["admin"], admin_service_pb2)
        bound = {"http": f"{config.http.rpartition(':')[0]}:{http.port}"}
        servers = []
        for name, server in ports.items():
            address = getattr(config, name)
            if not address:
                continue
            health_pb2_grpc.add_HealthServicer_to_server(self._health.servicer, server)
            bound["grpc" if name == "listen" else name] = _bind(server, address, name)
            servers.append(server)
        for server in servers:
            await server.start()
        logs.event(
            log,
            "listening",
            **bound,
            version=__version__,
            device=str(self._device),
            provider=self._device.provider,
            device_reason=self._device.reason,
            threads=threads,
        )
        return servers

    def _main_server(self) -> aio.Server:
        server = self._new_server()
        generation_service_pb2_grpc.add_GenerationServiceServicer_to_server(self._service, server)
        model_service_pb2_grpc.add_ModelServiceServicer_to_server(ModelService(self._door), server)
        _reflect(server, generation_service_pb2, model_service_pb2)
        return server

    def _new_server(self) -> aio.Server:
        config = self._config
        return aio.server(
            options=[
                ("grpc.so_reuseport", 0),  # or a second server would share the port without a word
                ("grpc.max_receive_message_length", config.max_message_mib * 2**20),
                ("grpc.max_send_message_length", -1),
                ("grpc.max_concurrent_streams", config.max_streams),
                # Clients whose calls wait in silence may ping this often without being cut off.
                ("grpc.http2.min_ping_interval_without_data_ms", 5_000),
                ("grpc.keepalive_permit_without_calls", 1),
                # A client that vanished without a word frees its lanes within this long.
                ("grpc.keepalive_time_ms", 60_000),
                ("grpc.keepalive_timeout_ms", 20_000),
            ]
        )

    async def _drain(self, servers: list[aio.Server]) -> None:
        """Refuse new work, finish what was accepted, and only then close the ports."""
        began = time.monotonic()
        self._health.drain()
        self._engine.drain()
        try:
            async with asyncio.timeout(self._config.drain_seconds):
                await self._engine.drained()
                await self._service.finish()
        except TimeoutError:
            log.warning("%d jobs are given up after %g s", self._engine.queue_depth, self._config.drain_seconds)
        await asyncio.sleep(max(0.0, LINGER_SECONDS - (time.monotonic() - began)))
        # What is still open now is health watchers, or work that was given up.
        await asyncio.gather(*(server.stop(0) for server in servers))


def _bind(server: aio.Server, address: str, name: str) -> str:
    try:
        port = server.add_insecure_port(address)
    except RuntimeError as error:
        raise BindError(f"cannot listen on {address} ({name}): is the port in use?") from error
    return f"{address.rpartition(':')[0]}:{port}"


def _reflect(server: aio.Server, *modules: Any) -> None:
    services = [
        service.full_name
        for module in (*modules, health_pb2)
        for service in module.DESCRIPTOR.services_by_name.values()
    ]
    reflection.enable_server_reflection([*services, reflection.SERVICE_NAME], server)


def _tune_malloc() -> None:
    """Keep big buffers on the heap: glibc maps and unmaps those over 128 KiB, which doubles the cost of big messages.

    Both thresholds, since setting one freezes the other at its start value.
    """
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        libc.mallopt(_MALLOPT_MMAP_THRESHOLD, 32 * 2**20)
        libc.mallopt(_MALLOPT_TRIM_THRESHOLD, 512 * 2**20)
