"""The reverse chain of a diffusion model in numpy: DDPM, DDIM and DPM-Solver++(2M), for checks and evaluation.

x_t = alpha_t x0 + sigma_t eps. With eta 0 this is DDIM (Song et al., 2020, arXiv 2010.02502, eq. 12), with eta 1
it is DDPM's ancestral sampling with the posterior variance (Ho et al., 2020, arXiv 2006.11239, eq. 7). At order 2
the step of DDIM is made with x0 extrapolated along log(alpha / sigma) from the last two estimates, which is
DPM-Solver++(2M) (Lu et al., 2022, arXiv 2211.01095, algorithm 2), its first and last step at order 1.
"""

import itertools
from collections.abc import Callable

import numpy as np
from latentd.v1 import model_pb2
from numpy.typing import NDArray

Floats = NDArray[np.float32]
Denoise = Callable[[Floats, NDArray[np.int64]], Floats]
"""(x_t [n, C, H, W] f32, t [n] i64) to the network's prediction [n, C, H, W] f32."""


def trailing_timesteps(timestep_count: int, step_count: int) -> NDArray[np.int64]:
    """`step_count` timesteps, noisiest first, evenly spread, the first being the last the network knows.

    Raises:
        ValueError: more steps than timesteps, or none.
    """
    if not 1 <= step_count <= timestep_count:
        raise ValueError(f"step_count must be 1 to {timestep_count}, got {step_count}")
    spacing = timestep_count / step_count
    return np.round(timestep_count - spacing * np.arange(step_count)).astype(np.int64) - 1


def walk(
    denoise: Denoise,
    spec: model_pb2.DiffusionSpec,
    x: Floats,
    step_count: int,
    *,
    eta: float,
    order: int = 1,
    clip: tuple[float, float],
    generator: np.random.Generator,
) -> Floats:
    """Walk from pure noise `x` [n, C, H, W] f32 to data.

    Args:
        denoise: The network.
        spec: The schedule, what the network predicts, and whether x0 is clipped.
        x: z ~ N(0, I); scaled to sigma_T here.
        step_count: Evaluations of the network.
        eta: Fresh noise per step, 0 (DDIM) to 1 (DDPM).
        order: Of the solver, 1 or 2.
        clip: Smallest and largest value of a clean sample.
        generator: Draws the fresh noise, [n, C, H, W] f32 a step; not used when eta is 0.
    """
    alphas = np.append(spec.alphas, 1.0)  # index -1 is clean data
    sigmas = np.append(spec.sigmas, 0.0)
    timesteps = np.append(trailing_timesteps(len(spec.alphas), step_count), -1)
    x = _scaled(sigmas[timesteps[0]], x)
    previous: tuple[Floats, float] | None = None  # the last x0 and the log signal-to-noise ratio it was made at
    for t, t_next in itertools.pairwise(timesteps):
        alpha, sigma, alpha_next, sigma_next = alphas[t], sigmas[t], alphas[t_next], sigmas[t_next]
        prediction = denoise(x, np.full(len(x), t, np.int64))
        x0 = _x0(x, prediction, alpha, sigma, spec.prediction)
        if spec.clip_denoised:
            x0 = x0.clip(*clip)
        log_ratio = np.log(alpha / sigma) if alpha > 0 else -np.inf  # a schedule may begin at noise alone
        estimate = x0
        if order == 2 and previous is not None and sigma_next > 0:
            last_x0, last_log_ratio = previous
            progress = (np.log(alpha_next / sigma_next) - log_ratio) / (log_ratio - last_log_ratio)
            x0 = x0 + _scaled(progress / 2, x0 - last_x0)
        previous = estimate, log_ratio
        eps = _scaled(1 / sigma, x - _scaled(alpha, x0))
        # Standard deviation of q(x_next | x_t, x0): sigma_next / sigma_t times that of q(x_t | x_next).
        step_noise = eta * sigma_next / sigma * np.sqrt(max(0.0, sigma**2 - (alpha / alpha_next * sigma_next) ** 2))
        direction = np.sqrt(max(0.0, sigma_next**2 - step_noise**2))
        x = _scaled(alpha_next, x0) + _scaled(direction, eps)
        if step_noise > 0:
            x += _scaled(step_noise, generator.standard_normal(x.shape, np.float32))
    return x


def _x0(x: Floats, prediction: Floats, alpha: float, sigma: float, kind: int) -> Floats:
    if kind == model_pb2.DiffusionSpec.PREDICTION_SAMPLE:
        return prediction
    if kind == model_pb2.DiffusionSpec.PREDICTION_V:
        return _scaled(alpha, x) - _scaled(sigma, prediction)
    return _scaled(1 / alpha, x - _scaled(sigma, prediction))


def _scaled(factor: float, x: Floats) -> Floats:
    """Float64 coefficients, float32 state, as in a server."""
    scaled: Floats = np.multiply(x, np.float32(factor))
    return scaled
