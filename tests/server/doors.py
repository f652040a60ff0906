"""The front of the server on a loopback port, over the engine a test gives it."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from grpc import aio
from latentd.names import parse_reference
from latentd.v1 import (
    generation_service_pb2,
    generation_service_pb2_grpc,
    model_pb2,
    model_service_pb2,
    model_service_pb2_grpc,
)
from latentd_server.bundle import read
from latentd_server.catalogue import ModelService
from latentd_server.exchange import Door
from latentd_server.failures import ModelNotFoundError
from latentd_server.handling import register
from latentd_server.job import Servable
from latentd_server.metrics import Metrics
from latentd_server.plans import Limits
from latentd_server.rpc import GenerationService


def servables(root: Path) -> dict[str, Servable]:
    """Every bundle under `root`, by name without version; nothing is loaded."""
    found = {}
    for directory in sorted(root.glob("*/*")):
        stored = read(directory)
        found[directory.parent.name] = Servable(stored.message, stored.schedule, "test-class")
    return found


class StaticRegistry:
    """Fulfils `latentd_server.exchange.Registry`."""

    def __init__(self, held: dict[str, Servable]) -> None:
        self._held = dict(held)
        self.refusal: Exception | None = None  # raised by `get`

    def get(self, reference: str) -> Servable:
        name = parse_reference(reference).name
        if self.refusal is not None:
            raise self.refusal
        if name not in self._held:
            raise ModelNotFoundError(reference, sorted(self._held))
        return self._held[name]

    def exchange(self, name: str, servable: Servable) -> None:
        """Another bundle takes a model's place."""
        self._held[name] = servable

    def model(self, reference: str) -> model_pb2.Model:
        return self.get(reference).model

    def models(self) -> list[model_pb2.Model]:
        return [held.model for held in self._held.values()]


async def until(condition: Callable[[], Any]) -> None:
    """Wait for something another task brings about."""
    async with asyncio.timeout(10):
        while not condition():  # noqa: ASYNC110  # what is waited for knows nothing of this test
            await asyncio.sleep(0.001)


@dataclass
class Front:
    """A front at work, and a client's ends of it."""

    door: Door
    service: GenerationService
    address: str
    channel: aio.Channel
    stub: Any  # of GenerationService
    models: Any  # stub of ModelService

    @property
    def metrics(self) -> str:
        """The exposition."""
        return self.door.metrics.exposition().decode()


@contextlib.asynccontextmanager
async def front(engine: Any, registry: Any, limits: Limits | None = None) -> AsyncIterator[Front]:
    """Serve on a loopback port."""
    door = Door(engine, registry, Metrics(), limits or Limits(), time.monotonic, lambda: 77)
    service = GenerationService(door)
    server = aio.server()
    register(server, generation_service_pb2.DESCRIPTOR.services_by_name["GenerationService"], service)
    register(server, model_service_pb2.DESCRIPTOR.services_by_name["ModelService"], ModelService(door))
    address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    await server.start()
    options = [("grpc.max_receive_message_length", -1)]
    async with aio.insecure_channel(address, options=options) as channel:
        stub = generation_service_pb2_grpc.GenerationServiceStub(channel)
        models = model_service_pb2_grpc.ModelServiceStub(channel)
        yield Front(door, service, address, channel, stub, models)
    await server.stop(0)
