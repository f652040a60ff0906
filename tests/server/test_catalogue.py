"""ModelService and AdminService."""

import base64
from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest
from bundles import write_vae
from doors import Front, StaticRegistry, front
from grpc import aio
from latentd.v1 import admin_service_pb2, admin_service_pb2_grpc, model_pb2
from latentd.v1 import model_service_pb2 as pb
from latentd_server.app import serving
from latentd_server.config import Config
from latentd_server.runtime import Device
from manual_engine import ManualEngine


class Shelf(StaticRegistry):
    """A registry of models that are names and nothing else, in its own order: by name, newest version first."""

    def __init__(self, *names: str) -> None:
        super().__init__({})
        self.names = list(names)

    def models(self) -> list[model_pb2.Model]:
        return [model_pb2.Model(name=name) for name in self.names]


@pytest.fixture
def shelf() -> Shelf:
    return Shelf("a@10", "a@9", "a@1", "b@2", "c@1")


@pytest.fixture
async def served(shelf: Shelf) -> AsyncIterator[Front]:
    async with front(ManualEngine(), shelf) as running:
        yield running


async def pages(served: Front, size: int) -> list[list[str]]:
    """Names page by page."""
    found: list[list[str]] = []
    token = ""
    while True:
        response = await served.models.ListModels(pb.ListModelsRequest(page_size=size, page_token=token))
        found.append([model.name for model in response.models])
        token = response.next_page_token
        if not token:
            return found


@pytest.mark.parametrize("size", [1, 2, 3, 5, 6])
async def test_pages_hold_every_model_once_in_order(size: int, served: Front, shelf: Shelf) -> None:
    """Whatever the page size; the last page has no token, and is never empty."""
    found = await pages(served, size)
    assert [name for page in found for name in page] == shelf.names
    assert all(len(page) == size for page in found[:-1])
    assert found[-1]


async def test_pages_default_to_50_and_end_at_500(served: Front, shelf: Shelf) -> None:
    """0 means 50; more than 500 means 500."""
    shelf.names = [f"m{i:04d}@1" for i in range(1001)]
    assert {len(page) for page in (await pages(served, 0))[:-1]} == {50}
    assert [len(page) for page in await pages(served, 10_000)] == [500, 500, 1]


async def test_a_page_goes_on_where_the_one_before_ended_though_models_come_and_go(served: Front, shelf: Shelf) -> None:
    """A token names a place in the order, not a number of models."""
    first = await served.models.ListModels(pb.ListModelsRequest(page_size=2))
    shelf.names = ["a@11", "a@10", "a@1", "b@2", "c@1"]  # the last of the page is gone, and one came before it
    second = await served.models.ListModels(pb.ListModelsRequest(page_size=2, page_token=first.next_page_token))
    assert [model.name for model in second.models] == ["a@1", "b@2"]


@pytest.mark.parametrize("token", ["x", "%%%", "é", base64.urlsafe_b64encode(b"Not A Name").decode()])
async def test_a_token_of_somebody_elses_making_is_a_wrong_field(token: str, served: Front) -> None:
    """Both wrong fields are named."""
    with pytest.raises(aio.AioRpcError) as caught:
        await served.models.ListModels(pb.ListModelsRequest(page_size=-1, page_token=token))
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert "page_size: must not be negative; got -1" in caught.value.details()
    assert "page_token: must be a next_page_token" in caught.value.details()


@pytest.mark.parametrize(("name", "code"), [("Bad Name", "INVALID_ARGUMENT"), ("nobody", "NOT_FOUND")])
async def test_get_model_tells_malformed_from_unknown(name: str, code: str, served: Front) -> None:
    """As every method does."""
    with pytest.raises(aio.AioRpcError) as caught:
        await served.models.GetModel(pb.GetModelRequest(name=name))
    assert caught.value.code().name == code


class Administered:
    """A whole server with an admin port, over a models directory the test fills."""

    def __init__(self, root: Any, serving: Any) -> None:
        self.root = root
        self._channels = [aio.insecure_channel(serving.addresses[name]) for name in ("admin", "grpc")]
        self.admin = admin_service_pb2_grpc.AdminServiceStub(self._channels[0])
        self.models = front_models(self._channels[1])

    async def close(self) -> None:
        for channel in self._channels:
            await channel.close()


def front_models(channel: aio.Channel) -> Any:
    from latentd.v1 import model_service_pb2_grpc

    return model_service_pb2_grpc.ModelServiceStub(channel)


@pytest.fixture
async def administered(tmp_path: Any) -> AsyncIterator[Administered]:
    write_vae(tmp_path)
    local = "127.0.0.1:0"
    config = Config(models=tmp_path, listen=local, http=local, admin=local, threads=1, max_batch_rows=4)
    async with serving(config, Device("cpu")) as running:
        administered = Administered(tmp_path, running)
        yield administered
        await administered.close()


async def test_models_come_and_go_through_the_admin_port(administered: Administered) -> None:
    """Load the newest on disk, unload one version; doing either twice changes nothing."""
    write_vae(administered.root, version=2, seed=9)
    for _ in range(2):
        loaded = await administered.admin.LoadModel(admin_service_pb2.LoadModelRequest(name="tiny-vae"))
        assert (loaded.model.name, loaded.model.state) == ("tiny-vae@2", model_pb2.Model.STATE_ACTIVE)
    newest = await administered.models.GetModel(pb.GetModelRequest(name="tiny-vae"))
    assert newest.model.name == "tiny-vae@2"
    for _ in range(2):
        request = admin_service_pb2.UnloadModelRequest(name="tiny-vae@2")
        unloaded = await administered.admin.UnloadModel(request)
        assert unloaded.model.state == model_pb2.Model.STATE_UNLOADED
    newest = await administered.models.GetModel(pb.GetModelRequest(name="tiny-vae"))
    assert newest.model.name == "tiny-vae@1"


async def test_a_bundle_that_cannot_be_loaded_is_shown_as_failed(administered: Administered) -> None:
    """LoadModel answers with the state and the reason."""
    directory = write_vae(administered.root, version=3)
    (directory / "decoder.onnx").write_bytes(b"not a model")
    loaded = await administered.admin.LoadModel(admin_service_pb2.LoadModelRequest(name="tiny-vae@3"))
    assert loaded.model.state == model_pb2.Model.STATE_FAILED
    assert "decoder.onnx" in loaded.model.failure_reason


@pytest.mark.parametrize(
    ("method", "request_", "code", "part"),
    [
        ("LoadModel", admin_service_pb2.LoadModelRequest(name="../etc"), "INVALID_ARGUMENT", "name: must be NAME"),
        ("LoadModel", admin_service_pb2.LoadModelRequest(name="nobody"), "NOT_FOUND", "no model 'nobody'"),
        ("UnloadModel", admin_service_pb2.UnloadModelRequest(name="tiny-vae"), "INVALID_ARGUMENT", "NAME@VERSION"),
        ("UnloadModel", admin_service_pb2.UnloadModelRequest(name="nobody@1"), "NOT_FOUND", "no model"),
    ],
)
async def test_admin_calls_are_checked(
    method: str, request_: Any, code: str, part: str, administered: Administered
) -> None:
    """Malformed and unknown names are told apart; unloading needs a version."""
    with pytest.raises(aio.AioRpcError) as caught:
        await getattr(administered.admin, method)(request_)
    assert caught.value.code().name == code
    assert part in caught.value.details()
