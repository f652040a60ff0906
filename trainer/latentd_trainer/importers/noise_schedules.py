"""Noise schedules by the names that diffusers gives them, in float64.

linear              beta from start to end in equal steps                    (DDPM, arXiv 2006.11239, section 4)
scaled_linear       sqrt(beta) in equal steps                                (latent diffusion, arXiv 2112.10752)
squaredcos_cap_v2   abar_t = cos^2((t / T + .008) / 1.008 * pi / 2), beta at most .999   (arXiv 2102.09672, eq. 17)
"""

import math

import numpy as np
from latentd.v1 import model_pb2
from numpy.typing import NDArray

KINDS = ("linear", "scaled_linear", "squaredcos_cap_v2")


def betas(kind: str, timestep_count: int, start: float, end: float) -> NDArray[np.float64]:
    """beta_t for t = 0 .. T - 1, least noisy first ([T] f64); `start` and `end` are of no account to the cosine."""
    if kind == "linear":
        return np.linspace(start, end, timestep_count)
    if kind == "scaled_linear":
        roots: NDArray[np.float64] = np.linspace(start**0.5, end**0.5, timestep_count)
        return roots * roots
    edges: NDArray[np.float64] = (
        np.cos((np.arange(timestep_count + 1) / timestep_count + 0.008) / 1.008 * math.pi / 2) ** 2
    )
    capped: NDArray[np.float64] = np.minimum(1 - edges[1:] / edges[:-1], 0.999)
    return capped


def cumulative(betas: NDArray[np.float64]) -> NDArray[np.float64]:
    """abar_t, the product of all 1 - beta up to t ([T] f64)."""
    products: NDArray[np.float64] = np.multiply.accumulate(1 - betas)
    return products


def with_levels(spec: model_pb2.DiffusionSpec, abars: NDArray[np.float64]) -> model_pb2.DiffusionSpec:
    """The spec with alpha_t = sqrt(abar_t) and sigma_t = sqrt(1 - abar_t), from abar ([T] f64)."""
    spec.alphas[:] = np.sqrt(abars).tolist()
    spec.sigmas[:] = np.sqrt(1 - abars).tolist()
    return spec
