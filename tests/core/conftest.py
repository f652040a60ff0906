"""Schedules that papers use, and the step graph's arithmetic in float64."""

from collections.abc import Callable, Iterable, Sequence

import numpy as np
import pytest
from latentd.v1 import model_pb2
from latentd_server.samplers import COLUMNS, Table
from latentd_server.schedules import Schedule
from latentd_server.solvers import Evaluation
from numpy.typing import NDArray

Array = NDArray[np.float64]
Network = Callable[[Array, int], Array]

PREDICTIONS = {
    "epsilon": model_pb2.DiffusionSpec.PREDICTION_EPSILON,
    "v_prediction": model_pb2.DiffusionSpec.PREDICTION_V,
    "sample": model_pb2.DiffusionSpec.PREDICTION_SAMPLE,
}


def betas_of(kind: str, count: int) -> Array:
    """DDPM's linear schedule, stretched to `count` timesteps, or Nichol and Dhariwal's cosine; [count] f64."""
    if kind == "linear":
        return np.linspace(1e-4, 0.02, count) * (1000 / count)
    t = np.arange(count + 1) / count
    products = np.cos((t + 0.008) / 1.008 * np.pi / 2) ** 2
    return np.minimum(1 - products[1:] / products[:-1], 0.999)


def schedule_of(
    kind: str = "linear", prediction: str = "epsilon", clip: tuple[float, float] | None = None, count: int = 1000
) -> Schedule:
    """The variance-preserving schedule of these betas."""
    products = np.cumprod(1 - betas_of(kind, count))
    return Schedule(np.sqrt(products), np.sqrt(1 - products), PREDICTIONS[prediction], clip)


def walk_of(
    steps: Table | Iterable[Evaluation], network: Network, x: Array, noise: Sequence[Array] | None = None
) -> list[Array]:
    """States x after each evaluation, as the step graph computes it but in float64. Evaluation i draws noise[i]."""
    if isinstance(steps, Table):
        timesteps, rows = steps.timesteps.tolist(), steps.coefficients.astype(np.float64)
    else:
        evaluations = list(steps)
        timesteps, rows = [e.timestep for e in evaluations], np.array([e.row for e in evaluations])
    h, states = np.zeros_like(x), []
    for index, (timestep, row) in enumerate(zip(timesteps, rows, strict=True)):
        k = dict(zip(COLUMNS, row, strict=True))
        m = network(x, timestep)
        z = 0.0 if noise is None else noise[index]
        x0 = np.clip(k["px"] * x + k["pm"] * m, k["lo"], k["hi"])
        x, h = (
            k["a"] * x + k["b"] * x0 + k["c"] * h + k["d"] * m + k["s"] * z,
            k["e"] * x + k["f"] * x0 + k["g"] * h,
        )
        states.append(x)
    return states


@pytest.fixture(scope="session")
def make_betas() -> Callable[..., Array]:
    """See `betas_of`."""
    return betas_of


@pytest.fixture(scope="session")
def make_schedule() -> Callable[..., Schedule]:
    """See `schedule_of`."""
    return schedule_of


@pytest.fixture(scope="session")
def walk() -> Callable[..., list[Array]]:
    """See `walk_of`."""
    return walk_of
