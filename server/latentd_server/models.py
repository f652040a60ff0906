"""What this server holds: every bundle found, and its way LOADING -> ACTIVE -> DRAINING -> UNLOADED, or FAILED.

All methods belong to the event loop's thread; loading itself goes on elsewhere.
"""

import asyncio
import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from latentd.names import ModelReference, parse_reference
from latentd.v1 import model_pb2

from latentd_server.bundle import BundleError, find, named_decoder
from latentd_server.certificate_cache import CertificateCache
from latentd_server.engine import Engine
from latentd_server.failures import (
    ModelFailedError,
    ModelInUseError,
    ModelLoadingError,
    ModelNotFoundError,
    ModelUnloadedError,
)
from latentd_server.job import Servable
from latentd_server.loading import Terms, load
from latentd_server.runtime import Device

log = logging.getLogger(__name__)

Listener = Callable[[str, "model_pb2.Model.State.ValueType"], None]
"""Told the canonical name and the new state whenever a model changes state."""


@dataclass(slots=True, eq=False)
class _Held:
    """One version of a model on this server."""

    reference: ModelReference
    directory: Path
    state: "model_pb2.Model.State.ValueType" = model_pb2.Model.STATE_UNLOADED
    servable: Servable | None = None
    failure: str = ""
    change: asyncio.Lock | None = None  # held while it is being loaded or unloaded

    def describe(self) -> model_pb2.Model:
        """The model as ModelService returns it."""
        model = model_pb2.Model(name=str(self.reference))
        if self.servable is not None:
            model.CopyFrom(self.servable.model)
        model.state = self.state
        model.failure_reason = self.failure
        return model


class Registry:
    """The models of one server."""

    def __init__(
        self,
        root: Path,
        engine: Engine,
        device: Device,
        *,
        threads: int,
        max_rows: int,
        strict: bool = True,
        cache: CertificateCache | None = None,
        grace_s: float = 60.0,
        max_samples: int = 1024,
        widest_rows: int = 0,
    ) -> None:
        """`grace_s` is how long requests that were accepted may take once their model is to be unloaded; `max_samples`
        is the most that one request may ask for; `widest_rows` the largest batch of graphs so small that it is a short
        call, where that is more than `max_rows`.
        """
        self._grace_s = grace_s
        self._root = root
        self._engine = engine
        self._terms = Terms(
            device, threads, max_rows, strict, cache or CertificateCache(None), max_samples, widest_rows
        )
        self._held: dict[ModelReference, _Held] = {}
        self._listeners: list[Listener] = []
        self._answering: dict[str, Servable] = {}  # by reference, as `get` found them since the last change of state

    def subscribe(self, listener: Listener) -> None:
        """Hear of every change of state from now on."""
        self._listeners.append(listener)

    def models(self) -> list[model_pb2.Model]:
        """Every model, whatever its state: by name, then newest version first."""
        ordered = sorted(self._held.values(), key=lambda held: (held.reference.name, -held.reference.version))
        return [held.describe() for held in ordered]

    def model(self, reference: str) -> model_pb2.Model:
        """One model, whatever its state; without a version, the newest active one, else the newest.

        Raises:
            ValueError: the reference is malformed.
            ModelNotFoundError: there is no such model.
        """
        return self._find(reference).describe()

    def get(self, reference: str) -> Servable:
        """A model that answers requests.

        Raises:
            ValueError: the reference is malformed.
            ModelNotFoundError: there is no such model, or it is not loaded.
            ModelLoadingError: it is on its way.
            ModelFailedError: it could not be loaded.
        """
        if (known := self._answering.get(reference)) is not None:
            return known
        held = self._find(reference)
        if held.state == model_pb2.Model.STATE_ACTIVE and held.servable is not None:
            self._answering[reference] = held.servable
            return held.servable
        if held.state == model_pb2.Model.STATE_LOADING:
            raise ModelLoadingError(str(held.reference))
        if held.state == model_pb2.Model.STATE_FAILED:
            raise ModelFailedError(str(held.reference), held.failure)
        raise ModelNotFoundError(reference, self._active())

    def discover(self) -> None:
        """Note every bundle under the models directory as LOADING, so that nobody is told that it does not exist."""
        for reference, directory in find(self._root):
            if reference not in self._held:
                held = self._held[reference] = _Held(reference, directory)
                self._change(held, model_pb2.Model.STATE_LOADING)

    async def load_all(self) -> None:
        """Load every bundle under the models directory, one after another; a bad one is marked FAILED. Those that
        lean on others come after them.
        """
        self.discover()
        leaning = await asyncio.to_thread(
            lambda: {held.reference for held in list(self._held.values()) if named_decoder(held.directory)}
        )
        for held in sorted(self._held.values(), key=lambda held: held.reference in leaning):
            await self._load(held)

    async def load(self, reference: str) -> model_pb2.Model:
        """Load one model; without a version, the newest on disk. Loading an active model changes nothing.

        Raises:
            ValueError: the reference is malformed.
            ModelNotFoundError: there is no such bundle on disk.
        """
        wanted = parse_reference(reference)
        on_disk = {
            found: directory
            for found, directory in find(self._root)
            if found.name == wanted.name and wanted.version in (0, found.version)
        }
        if not on_disk:
            raise ModelNotFoundError(reference, self._active())
        newest = max(on_disk)
        held = self._held.setdefault(newest, _Held(newest, on_disk[newest]))
        # A caller who gives up must not leave a model half loaded.
        await asyncio.shield(self._load(held))
        return held.describe()

    async def unload(self, reference: str) -> model_pb2.Model:
        """Stop admitting, finish what was admitted, free the graphs. Unloading an unloaded model changes nothing.

        What is not finished in time, for a reader that has stopped or for want of it, is given up.

        Raises:
            ValueError: the reference is malformed.
            ModelNotFoundError: there is no such model.
            ModelInUseError: it decodes the samples of a model that is served.
        """
        held = self._find(reference)
        await asyncio.shield(self._unload(held))
        return held.describe()

    async def _load(self, held: _Held) -> None:
        held.change = held.change or asyncio.Lock()
        async with held.change:
            if held.state == model_pb2.Model.STATE_ACTIVE:
                return
            held.failure = ""
            self._change(held, model_pb2.Model.STATE_LOADING)
            try:
                loaded = await asyncio.to_thread(load, held.directory, self._terms, self._served())
                needed = loaded.servable.decoder
                if needed is not None and self._served().get(needed.model.name) is not needed:
                    raise BundleError([f"{needed.model.name} was unloaded meanwhile, which decodes its samples"])
            except Exception as error:
                if not isinstance(error, BundleError):
                    log.exception("%s could not be loaded", held.reference)
                held.failure = str(error) if isinstance(error, BundleError) else f"{type(error).__name__} while loading"
                log.error("%s is not served: %s", held.reference, held.failure)
                self._change(held, model_pb2.Model.STATE_FAILED)
                return
            self._engine.attach(
                loaded.runners, promise=loaded.checkable, state_lanes=loaded.state_lanes, wide=loaded.wide
            )
            held.servable = loaded.servable
            self._change(held, model_pb2.Model.STATE_ACTIVE)

    async def _unload(self, held: _Held) -> None:
        held.change = held.change or asyncio.Lock()
        async with held.change:
            users = [str(other.reference) for other in self._held.values() if _leans(other, held)]
            if users:
                raise ModelInUseError(str(held.reference), sorted(users))
            if held.state == model_pb2.Model.STATE_ACTIVE:
                self._change(held, model_pb2.Model.STATE_DRAINING)
                await self._finish(str(held.reference))
                self._engine.detach(str(held.reference))
            held.servable = None
            self._change(held, model_pb2.Model.STATE_UNLOADED)

    async def _finish(self, model: str) -> None:
        try:
            async with asyncio.timeout(self._grace_s):
                await self._engine.finished(model)
        except TimeoutError:
            count = self._engine.give_up(model, ModelUnloadedError(model, self._grace_s))
            log.warning("%s is unloaded; %d requests were not finished in %g s", model, count, self._grace_s)

    def _find(self, reference: str) -> _Held:
        wanted = parse_reference(reference)
        matches = [
            held
            for held in self._held.values()
            if held.reference.name == wanted.name and wanted.version in (0, held.reference.version)
        ]
        if not matches:
            raise ModelNotFoundError(reference, self._active())
        return max(matches, key=lambda held: (held.state == model_pb2.Model.STATE_ACTIVE, held.reference.version))

    def _served(self) -> dict[str, Servable]:
        """The models that answer, by canonical name."""
        return {
            str(held.reference): held.servable
            for held in self._held.values()
            if held.state == model_pb2.Model.STATE_ACTIVE and held.servable is not None
        }

    def _active(self) -> list[str]:
        return [model.name for model in self.models() if model.state == model_pb2.Model.STATE_ACTIVE]

    def _change(self, held: _Held, state: "model_pb2.Model.State.ValueType") -> None:
        held.state = state
        self._answering.clear()
        for listener in self._listeners:
            listener(str(held.reference), state)


def _leans(model: _Held, other: _Held) -> bool:
    """Whether a model that is loaded has its samples decoded by the other."""
    servable = model.servable
    return servable is not None and servable.decoder is not None and servable.decoder is other.servable
