"""Makes what the tests of this folder share importable beside them, and the tiny bundles a fixture."""

import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))


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
