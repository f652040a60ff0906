import numpy as np
import pytest
import torch
from diffusers import DPMSolverMultistepScheduler
from latentd.v1 import model_pb2
from latentd_trainer import chains
from numpy.typing import NDArray

Prediction = model_pb2.DiffusionSpec
KINDS = (Prediction.PREDICTION_EPSILON, Prediction.PREDICTION_V, Prediction.PREDICTION_SAMPLE)
T = 200


def cosine(kind: int, clip: bool = False) -> model_pb2.DiffusionSpec:
    angles = (np.arange(T) + 1) / (T + 1) * np.pi / 2
    return model_pb2.DiffusionSpec(alphas=np.cos(angles), sigmas=np.sin(angles), prediction=kind, clip_denoised=clip)


def gaussian_denoiser(spec: model_pb2.DiffusionSpec, deviation: float) -> chains.Denoise:
    """The perfect network for data N(0, deviation^2): E[x0 | x_t] = alpha s^2 / (alpha^2 s^2 + sigma^2) x_t."""

    def denoise(x: chains.Floats, t: NDArray[np.int64]) -> chains.Floats:
        alpha, sigma = spec.alphas[t[0]], spec.sigmas[t[0]]
        x0 = alpha * deviation**2 / (alpha**2 * deviation**2 + sigma**2) * x
        eps = (x - alpha * x0) / sigma
        values = {KINDS[0]: eps, KINDS[1]: alpha * eps - sigma * x0, KINDS[2]: x0}[spec.prediction]
        return values.astype(np.float32)

    return denoise


def walk(spec: model_pb2.DiffusionSpec, denoise: chains.Denoise, steps: int, eta: float) -> NDArray[np.float32]:
    generator = np.random.default_rng(0)
    noise = generator.standard_normal((20_000, 1, 1, 1), np.float32)
    return chains.walk(denoise, spec, noise, steps, eta=eta, clip=(-1, 1), generator=generator)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_gaussian_data_come_back_with_their_deviation(kind: int, eta: float) -> None:
    """With the perfect network for N(0, 0.5^2), every prediction and every eta ends in that distribution."""
    spec = cosine(kind)
    samples = walk(spec, gaussian_denoiser(spec, 0.5), T, eta)
    assert samples.dtype == np.float32
    assert samples.std() == pytest.approx(0.5, rel=0.03)
    assert samples.mean() == pytest.approx(0, abs=0.015)


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_a_single_possible_image_is_found_in_any_number_of_steps(eta: float) -> None:
    """If the network always knows x0, the last step gives exactly it."""
    spec = cosine(Prediction.PREDICTION_SAMPLE)
    for steps in (1, 3, 50):
        samples = walk(spec, lambda x, t: np.full_like(x, 0.3), steps, eta)
        assert samples == pytest.approx(0.3, abs=1e-6)


def test_without_eta_nothing_is_drawn() -> None:
    """DDIM leaves the generator where it was."""
    spec = cosine(Prediction.PREDICTION_V)
    generator = np.random.default_rng(0)
    noise = np.ones((2, 1, 1, 1), np.float32)
    chains.walk(gaussian_denoiser(spec, 0.5), spec, noise, 5, eta=0.0, clip=(-1, 1), generator=generator)
    assert generator.random() == np.random.default_rng(0).random()


def test_clipping_keeps_samples_in_range() -> None:
    """With `clip_denoised`, a network that overshoots still ends inside the range of clean samples."""
    spec = cosine(Prediction.PREDICTION_SAMPLE, clip=True)
    samples = walk(spec, lambda x, t: 3 * x, 10, 0.0)
    assert (samples.min(), samples.max()) == (-1, 1)


def test_ddpm_steps_use_the_posterior_of_the_forward_process() -> None:
    """One step with eta 1 has the mean and the deviation of q(x_s | x_t, x0), Ho et al. eq. 7."""
    spec = cosine(Prediction.PREDICTION_SAMPLE)
    t, s = chains.trailing_timesteps(T, 2)
    alpha_bar_t, alpha_bar_s = spec.alphas[t] ** 2, spec.alphas[s] ** 2
    beta = 1 - alpha_bar_t / alpha_bar_s
    states = []

    def denoise(x: chains.Floats, timestep: NDArray[np.int64]) -> chains.Floats:
        states.append(x)
        return np.full_like(x, 0.4)

    walk(spec, denoise, 2, 1.0)
    mean = (
        np.sqrt(alpha_bar_s) * beta / (1 - alpha_bar_t) * 0.4
        + np.sqrt(alpha_bar_t / alpha_bar_s) * (1 - alpha_bar_s) / (1 - alpha_bar_t) * states[0]
    )
    fresh = states[1] - mean
    assert fresh.std() == pytest.approx(np.sqrt((1 - alpha_bar_s) / (1 - alpha_bar_t) * beta), rel=0.03)
    assert np.corrcoef(fresh.ravel(), states[0].ravel())[0, 1] == pytest.approx(0, abs=0.03)


def test_timesteps_trail_from_the_noisiest() -> None:
    """Ten of a thousand are 999, 899, ..., 99; all of them are every one; more than there are is an error."""
    assert chains.trailing_timesteps(1000, 10).tolist() == list(range(999, 0, -100))
    assert chains.trailing_timesteps(5, 5).tolist() == [4, 3, 2, 1, 0]
    with pytest.raises(ValueError, match="step_count must be 1 to 5, got 6"):
        chains.trailing_timesteps(5, 6)


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # inside diffusers
@pytest.mark.parametrize("kind", KINDS)
def test_order_two_walks_as_diffusers_multistep_solver(kind: int) -> None:
    """A whole chain at order 2 comes out as diffusers' DPM-Solver++(2M) from the same noise and timesteps."""
    oracle = DPMSolverMultistepScheduler(
        1000,
        beta_schedule="squaredcos_cap_v2",
        prediction_type={KINDS[0]: "epsilon", KINDS[1]: "v_prediction", KINDS[2]: "sample"}[kind],
        timestep_spacing="trailing",
        final_sigmas_type="zero",
    )
    cumulative = oracle.alphas_cumprod.double().numpy()
    spec = model_pb2.DiffusionSpec(alphas=np.sqrt(cumulative), sigmas=np.sqrt(1 - cumulative), prediction=kind)
    denoise = gaussian_denoiser(spec, 0.5)
    noise = np.random.default_rng(0).standard_normal((16, 1, 2, 2), np.float32)
    ours = chains.walk(denoise, spec, noise, 10, eta=0.0, order=2, clip=(-1, 1), generator=np.random.default_rng(0))
    oracle.set_timesteps(10)
    x = torch.from_numpy(spec.sigmas[-1] * noise)
    for t in oracle.timesteps:
        x = oracle.step(torch.from_numpy(denoise(x.numpy(), np.full(16, int(t)))), t, x).prev_sample
    np.testing.assert_allclose(ours, x.numpy(), atol=2e-4)


def test_order_two_is_nearer_to_the_exact_flow_in_ten_steps() -> None:
    """For Gaussian data the deterministic flow scales noise by the data's deviation; order 2 comes nearer to it."""
    spec = cosine(Prediction.PREDICTION_V)
    generator = np.random.default_rng(0)
    noise = np.ones((1, 1, 1, 1), np.float32)
    ends = [
        chains.walk(
            gaussian_denoiser(spec, 0.5), spec, noise, 10, eta=0, order=order, clip=(-1, 1), generator=generator
        )
        for order in (1, 2)
    ]
    errors = [abs(float(end[0, 0, 0, 0]) - 0.5) for end in ends]
    assert errors[1] < errors[0] / 3
