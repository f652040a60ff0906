"""Fixtures of the client's tests: a server that fails on demand, and all clients behind one synchronous face."""

import asyncio
import inspect
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from latentd_client import AsyncClient, Client, Retries

sys.path.insert(0, str(Path(__file__).parent))  # test folders are no packages; this makes fake_server importable

from fake_server import FakeServer

QUICK = Retries(initial_backoff_s=0.01, max_backoff_s=0.01)
"""Retries that do not keep a test waiting."""


@pytest.fixture
def server() -> Iterator[FakeServer]:
    """A fake server on a free port."""
    running = FakeServer().start()
    yield running
    running.stop()


async def _awaited(awaitable: Any) -> Any:
    return await awaitable


class Blocking:
    """An `AsyncClient` with the synchronous client's face, so that one scenario runs through both."""

    def __init__(self, **arguments: Any) -> None:
        self._runner = asyncio.Runner()
        try:
            self._client = self._runner.run(self._made(**arguments))
        except ValueError:
            self._runner.close()
            raise

    @staticmethod
    async def _made(**arguments: Any) -> AsyncClient:
        return AsyncClient(**arguments)

    def __getattr__(self, name: str) -> Callable[..., Any]:
        attribute = getattr(self._client, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            outcome = attribute(*args, **kwargs)
            if inspect.isasyncgen(outcome):
                return self._iterate(outcome)
            if inspect.isawaitable(outcome):
                return self._runner.run(_awaited(outcome))
            return BlockingLoop(self._runner, outcome)

        return call

    def _iterate(self, events: Any) -> Iterator[Any]:
        try:
            while True:
                try:
                    yield self._runner.run(_awaited(anext(events)))
                except StopAsyncIteration:
                    return
        finally:
            self._runner.run(events.aclose())

    def shut(self) -> None:
        self._runner.run(self._client.close())
        self._runner.close()


class BlockingLoop:
    """An `AsyncDenoiseLoop` with the synchronous one's face."""

    def __init__(self, runner: asyncio.Runner, loop: Any) -> None:
        self._runner = runner
        self._loop = loop

    def __enter__(self) -> "BlockingLoop":
        self._runner.run(self._loop.__aenter__())
        return self

    def __exit__(self, *error: Any) -> None:
        self._runner.run(self._loop.__aexit__(*error))

    def __iter__(self) -> Iterator[Any]:
        while not self._loop.finished:
            yield self.step()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loop, name)

    def step(self, **changes: Any) -> Any:
        return self._runner.run(self._loop.step(**changes))


@pytest.fixture(params=["sync", "aio", "multiplexed"])
def connect(request: pytest.FixtureRequest, server: FakeServer) -> Iterator[Callable[..., Any]]:
    """Makes clients of the fake server; every test that uses it runs with all kinds."""
    made: list[Any] = []

    def make(**arguments: Any) -> Any:
        arguments = {"target": server.target, "retries": QUICK, "timeout": 30.0} | arguments
        if request.param == "multiplexed":
            arguments["multiplexed"] = True
        client = Client(**arguments) if request.param == "sync" else Blocking(**arguments)
        made.append(client)
        return client

    yield make
    for client in made:
        client.shut() if isinstance(client, Blocking) else client.close()


@pytest.fixture
def client(connect: Callable[..., Any]) -> Any:
    """A client of the fake server, of all kinds."""
    return connect()
