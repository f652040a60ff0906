"""ModelService and AdminService: what this server holds, and changing it."""

from __future__ import annotations

import base64
from collections.abc import Awaitable
from typing import Protocol

from latentd.names import ModelReference, parse_reference
from latentd.v1 import (
    admin_service_pb2,
    admin_service_pb2_grpc,
    model_pb2,
    model_service_pb2,
    model_service_pb2_grpc,
)

from latentd_server.accounts import Account
from latentd_server.exchange import Door
from latentd_server.failures import FieldsInvalidError, Violation
from latentd_server.handling import Answer, Context, guarded, peer_of


class ModelService(model_service_pb2_grpc.ModelServiceServicer):
    """The read-only catalogue."""

    DEFAULT_PAGE_SIZE = 50
    MAX_PAGE_SIZE = 500

    def __init__(self, door: Door) -> None:
        self._door = door

    async def GetModel(
        self, request: model_service_pb2.GetModelRequest, context: Context
    ) -> model_service_pb2.GetModelResponse:
        """One model, whatever its state."""

        async def serve() -> model_service_pb2.GetModelResponse:
            try:
                model = self._door.registry.model(request.name)
            except ValueError as error:
                raise FieldsInvalidError([Violation("name", str(error))]) from error
            return model_service_pb2.GetModelResponse(model=model)

        return await _accounted(self._door, "GetModel", serve(), context)

    async def ListModels(
        self, request: model_service_pb2.ListModelsRequest, context: Context
    ) -> model_service_pb2.ListModelsResponse:
        """One page. A token names the last model of the page before it, so pages hold while models come and go."""

        async def serve() -> model_service_pb2.ListModelsResponse:
            after = _read_page(request)
            models = self._door.registry.models()
            if after is not None:
                models = [model for model in models if _order(parse_reference(model.name)) > after]
            size = min(request.page_size or self.DEFAULT_PAGE_SIZE, self.MAX_PAGE_SIZE)
            token = _page_token(models[size - 1].name) if len(models) > size else ""
            return model_service_pb2.ListModelsResponse(models=models[:size], next_page_token=token)

        return await _accounted(self._door, "ListModels", serve(), context)


class Loader(Protocol):
    """What the admin service needs of the registry."""

    async def load(self, reference: str) -> model_pb2.Model:
        """Load a model."""

    async def unload(self, reference: str) -> model_pb2.Model:
        """Unload a model."""


class AdminService(admin_service_pb2_grpc.AdminServiceServicer):
    """Changes what the server holds; on a port of its own."""

    def __init__(self, door: Door, registry: Loader) -> None:
        self._door = door
        self._registry = registry

    async def LoadModel(
        self, request: admin_service_pb2.LoadModelRequest, context: Context
    ) -> admin_service_pb2.LoadModelResponse:
        """Returns when the model is ACTIVE or FAILED; goes on loading if the caller gives up."""

        async def serve() -> admin_service_pb2.LoadModelResponse:
            _read_reference(request.name)
            return admin_service_pb2.LoadModelResponse(model=await self._registry.load(request.name))

        return await _accounted(self._door, "LoadModel", serve(), context)

    async def UnloadModel(
        self, request: admin_service_pb2.UnloadModelRequest, context: Context
    ) -> admin_service_pb2.UnloadModelResponse:
        """Returns when the model is gone."""

        async def serve() -> admin_service_pb2.UnloadModelResponse:
            if not _read_reference(request.name).version:
                raise FieldsInvalidError([Violation("name", "must be NAME@VERSION, so that no other version is meant")])
            return admin_service_pb2.UnloadModelResponse(model=await self._registry.unload(request.name))

        return await _accounted(self._door, "UnloadModel", serve(), context)


async def _accounted(door: Door, method: str, work: Awaitable[Answer], context: Context) -> Answer:
    peer = peer_of(context)
    account = Account(door.metrics, door.clock, peer, method)
    return await guarded(work, account.close, context, peer)


def _read_reference(name: str) -> ModelReference:
    try:
        return parse_reference(name)
    except ValueError as error:
        raise FieldsInvalidError([Violation("name", str(error))]) from error


def _order(reference: ModelReference) -> tuple[str, int]:
    """By name, then newest version first."""
    return reference.name, -reference.version


def _page_token(name: str) -> str:
    return base64.urlsafe_b64encode(name.encode()).decode()


def _read_page(request: model_service_pb2.ListModelsRequest) -> tuple[str, int] | None:
    """Where the page before ended; None for the first page."""
    violations = []
    after = None
    if request.page_size < 0:
        violations.append(Violation("page_size", f"must not be negative; got {request.page_size}"))
    if request.page_token:
        try:
            after = _order(parse_reference(base64.urlsafe_b64decode(request.page_token).decode()))
        except ValueError:
            violations.append(Violation("page_token", "must be a next_page_token of this server, or empty"))
    if violations:
        raise FieldsInvalidError(violations)
    return after
