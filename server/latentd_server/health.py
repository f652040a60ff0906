"""grpc.health.v1 for the server ("") and for every model, by NAME@VERSION and by NAME.

`latentd.liveness` is SERVING while the event loop answers: a server that loads, drains or has no model is alive.
"""

from __future__ import annotations

import asyncio

from grpc_health.v1 import health, health_pb2
from latentd.names import parse_reference
from latentd.v1 import model_pb2

Status = health_pb2.HealthCheckResponse
State = model_pb2.Model.State

LIVENESS = "latentd.liveness"
"""What a liveness probe asks for; the dot keeps it apart from every model's name."""


class Health:
    """Keeps the health service in step with the registry. Belongs to the event loop."""

    def __init__(self) -> None:
        self.servicer = health.aio.HealthServicer()
        self._states: dict[str, State.ValueType] = {}
        self._loaded = False
        self._draining = False
        self._told: dict[str, int] = {"": Status.NOT_SERVING}
        self._changes: asyncio.Queue[tuple[str, int]] = asyncio.Queue()

    @property
    def why_not_serving(self) -> str:
        """Why "" is not SERVING; empty if it is."""
        if self._draining:
            return "draining"
        if not self._loaded:
            return "loading models"
        broken = sorted(name for name, state in self._states.items() if state == model_pb2.Model.STATE_FAILED)
        if model_pb2.Model.STATE_ACTIVE not in self._states.values():
            return f"no model is active; failed to load: {', '.join(broken)}" if broken else "no model is active"
        return ""

    async def begin(self) -> None:
        """Say that the server lives and that nothing serves yet; before the port is open."""
        await self.servicer.set(LIVENESS, Status.SERVING)
        await self.servicer.set("", Status.NOT_SERVING)

    async def run(self) -> None:
        """Pass changes on to the watchers, in order, until cancelled."""
        while True:
            name, status = await self._changes.get()
            await self.servicer.set(name, status)

    def model_changed(self, name: str, state: State.ValueType) -> None:
        """Hear from the registry; `name` is canonical."""
        self._states[name] = state
        self._publish()

    def all_loaded(self) -> None:
        """Every model found at start has been loaded, or has failed to."""
        self._loaded = True
        self._publish()

    def drain(self) -> None:
        """Everything is NOT_SERVING from now on."""
        self._draining = True
        self._publish()

    def _publish(self) -> None:
        serving = {"": self.why_not_serving == ""}
        for name, state in self._states.items():
            active = state == model_pb2.Model.STATE_ACTIVE and not self._draining
            serving[name] = active
            short = parse_reference(name).name
            serving[short] = serving.get(short, False) or active
        for name, good in serving.items():
            status = Status.SERVING if good else Status.NOT_SERVING
            if self._told.get(name) != status:
                self._told[name] = status
                self._changes.put_nowait((name, status))
