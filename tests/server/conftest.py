"""Makes what the tests of this folder share importable, the tiny bundles a fixture, and watches the books."""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar
from weakref import WeakSet

import pytest

sys.path.insert(0, str(Path(__file__).parent))

import books
import doors
from latentd_server import app, engine
from latentd_server.metrics import Metrics


@pytest.fixture(scope="session")
def models_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A models directory with a tiny bundle of each family."""
    from bundles import write_all

    return write_all(tmp_path_factory.mktemp("tiny-models"))


@pytest.fixture(scope="session")
def held(models_root: Path) -> dict[str, Any]:
    """The same, as `Servable`s by name."""
    from doors import servables

    return servables(models_root)


class _Kept(Metrics):
    """Remembered while the test runs that its server was started in, and for as long as that server lives."""

    fresh: ClassVar[list[Metrics]] = []
    alive: ClassVar[WeakSet[Metrics]] = WeakSet()

    def __init__(self) -> None:
        super().__init__()
        self.fresh.append(self)
        self.alive.add(self)


@pytest.fixture(scope="session", autouse=True)
def _kept() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        for module in (app, doors):
            patch.setattr(module, "Metrics", _Kept)
        yield


@pytest.fixture(autouse=True)
def _every_server_comes_to_rest(_kept: None) -> Iterator[None]:
    """After every test, on every server of this process: each request ended in one counter, and all gauges are zero."""
    yield
    for metrics in list(_Kept.alive):
        books.must_rest(lambda metrics=metrics: metrics.exposition().decode())
    _Kept.fresh.clear()


@pytest.fixture(scope="module", params=["short-calls", "long-calls"])
def call_length(request: pytest.FixtureRequest) -> Iterator[str]:
    """Tiny networks' calls are too short to do host work beside them; here with them, and as if they were not."""
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "long-calls":
            patch.setattr(engine, "WORTH_HIDING", 0.0)
            patch.setattr(engine, "SHORTEST_S", 0.0)
        yield request.param
