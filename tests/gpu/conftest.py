"""A GPU, or the reason why there is none to test with; and the server's tiny bundles."""

import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
from latentd_server.runtime import CudaSettings, Device, DeviceError, choose_device

sys.path.append(str(Path(__file__).parents[1] / "server"))


def pytest_collection_modifyitems(items: Sequence[pytest.Item]) -> None:
    """Everything in this folder needs a GPU."""
    here = Path(__file__).parent
    for item in items:
        if here in item.path.parents:
            item.add_marker(pytest.mark.gpu)


@pytest.fixture(scope="session")
def device() -> Device:
    """The first GPU."""
    try:
        return choose_device("cuda:0", CudaSettings())
    except DeviceError as error:
        pytest.skip(f"no GPU to test with: {error}")


@pytest.fixture(scope="session")
def models_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A models directory with a tiny bundle of each family."""
    from bundles import write_all

    return write_all(tmp_path_factory.mktemp("tiny-models"))
