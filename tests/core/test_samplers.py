"""Tables of any sampler over any schedule: their form, where they end, and what is refused."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from latentd import names
from latentd_server import samplers, solvers
from latentd_server.samplers import COLUMNS, Table
from latentd_server.schedules import Prediction, Schedule, from_strength

PREDICTIONS = (Prediction.PREDICTION_EPSILON, Prediction.PREDICTION_V, Prediction.PREDICTION_SAMPLE)
DETERMINISTIC = ("ddim", "euler", "heun", "dpmpp-2m")
FIRST_ORDER = ("ddim", "ddpm", "euler", "euler-ancestral")
BOUNDS = (COLUMNS.index("lo"), COLUMNS.index("hi"))


def column(table: Table, name: str) -> np.ndarray:
    return table.coefficients[:, COLUMNS.index(name)]


def same_bytes(one: Table, two: Table) -> bool:
    return (
        one.timesteps.tobytes() == two.timesteps.tobytes()
        and one.coefficients.tobytes() == two.coefficients.tobytes()
        and one.completed_steps.tobytes() == two.completed_steps.tobytes()
        and one.step_count == two.step_count
    )


@st.composite
def schedules(draw):
    """Any strictly falling SNR over 1 to 40 timesteps, sometimes down to exactly 0."""
    falls = draw(st.lists(st.floats(1e-3, 2), min_size=0, max_size=39))
    log_snrs = draw(st.floats(-4, 9)) - np.concatenate([[0], np.cumsum(falls)])
    log_snrs = log_snrs[log_snrs > -9]
    alphas, sigmas = 1 / np.sqrt(1 + np.exp(-2 * log_snrs)), 1 / np.sqrt(1 + np.exp(2 * log_snrs))
    prediction = draw(st.sampled_from(PREDICTIONS))
    if prediction != Prediction.PREDICTION_EPSILON and len(alphas) > 1 and draw(st.booleans()):
        alphas[-1], sigmas[-1] = 0, 1
    clip = draw(st.sampled_from([None, (-1.0, 1.0), (0.0, 255.0)]))
    return Schedule(alphas, sigmas, prediction, clip)


@st.composite
def walks(draw, names=tuple(samplers.SAMPLERS)):
    """(schedule, sampler, strictly falling timesteps, eta)."""
    schedule = draw(schedules())
    timesteps = draw(st.sets(st.integers(0, schedule.timestep_count - 1), min_size=1))
    sampler = draw(st.sampled_from(names))
    eta = draw(st.none() | st.floats(0, 1)) if samplers.default_eta(sampler) is not None else None
    return schedule, sampler, tuple(sorted(timesteps, reverse=True)), eta


def oracle(schedule: Schedule, x0: np.ndarray):
    """The network that knows x0, and reads eps off x."""

    def network(x, timestep):
        alpha, sigma = schedule.level(timestep)
        eps = (x - alpha * x0) / sigma
        outputs = dict(zip(PREDICTIONS, (eps, alpha * eps - sigma * x0, x0), strict=True))
        return outputs[schedule.prediction]

    return network


def test_every_wire_name_has_a_sampler():
    """The server knows the samplers that the contract names, and no others."""
    assert tuple(samplers.SAMPLERS) == names.SAMPLERS


@given(walks())
def test_form(walk_over):
    """Every table is finite, counts its solver steps, and cannot be written to."""
    schedule, _, timesteps, _ = walk_over
    for table in (samplers.descent(*walk_over), samplers.inversion(schedule, timesteps)):
        assert np.isfinite(np.delete(table.coefficients, BOUNDS, axis=1)).all()
        assert table.coefficients.dtype == np.float32
        assert table.step_count == len(timesteps) == table.completed_steps[-1]
        assert (np.diff(table.completed_steps, prepend=0) >= 0).all()
        assert table.timesteps.min() >= 0
        assert (column(table, "lo") < column(table, "hi")).all()
        for array in (table.timesteps, table.coefficients, table.completed_steps, table.stochastic):
            assert not array.flags.writeable


@given(walks())
def test_last_step_lands_on_x0(walk_over):
    """The last update of every sampler is x' = x0, with no noise and no history."""
    table = samplers.descent(*walk_over)
    last = dict(zip(COLUMNS, table.coefficients[-1].tolist(), strict=True))
    assert {name: last[name] for name in "abcds"} == {"a": 0, "b": 1, "c": 0, "d": 0, "s": 0}
    assert not table.stochastic[-1]


@given(walks())
def test_a_walk_is_its_steps(walk_over):
    """A loop driven step by step gets the bytes of the whole walk, row by row."""
    schedule, sampler, timesteps, eta = walk_over
    whole = samplers.descent(schedule, sampler, timesteps, eta)
    steps = [
        samplers.step_rows(schedule, sampler, previous, current, following, eta)
        for previous, current, following in zip((None, *timesteps[:-1]), timesteps, (*timesteps[1:], -1), strict=True)
    ]
    joined = Table(
        np.concatenate([step.timesteps for step in steps]),
        np.concatenate([step.coefficients for step in steps]),
        np.concatenate([step.completed_steps + done for done, step in enumerate(steps)]).astype(np.int32),
        sum(step.step_count for step in steps),
    )
    assert same_bytes(whole, joined)


@given(walks(), st.floats(0.01, 1))
def test_image_to_image_runs_the_end_of_the_walk(walk_over, strength):
    """A walk from a share of the schedule has the last rows of the whole; multistep samplers begin anew."""
    schedule, sampler, timesteps, eta = walk_over
    kept = from_strength(timesteps, strength)
    whole, part = (samplers.descent(schedule, sampler, steps, eta) for steps in (timesteps, kept))
    assert part.step_count == len(kept)
    rows = len(part.timesteps)
    assert part.timesteps.tolist() == whole.timesteps[-rows:].tolist()
    begins_anew = 1 if sampler.startswith("dpmpp") else 0
    assert np.array_equal(
        part.coefficients[begins_anew:], whole.coefficients[len(whole.timesteps) - rows :][begins_anew:]
    )


@given(walks(DETERMINISTIC))
def test_rays_are_kept(walk, walk_over):
    """With the true x0, deterministic samplers keep x = alpha x0 + sigma eps with one eps, through all levels to x0."""
    schedule, sampler, timesteps, _ = walk_over
    x0, eps = np.array([-0.7, 0.0, 0.9]), np.array([1.3, -2.0, 0.4])
    if schedule.clip == (0.0, 255.0):
        x0 = x0 + 1
    alpha, sigma = schedule.level(timesteps[0])
    evaluations = list(samplers.descent_evaluations(schedule, sampler, timesteps, 0.0))
    states = walk(evaluations, oracle(schedule, x0), alpha * x0 + sigma * eps)
    ends = [state for state, evaluation in zip(states, evaluations, strict=True) if evaluation.ends_step]
    for state, timestep in zip(ends, (*timesteps[1:], -1), strict=True):
        alpha, sigma = schedule.level(timestep)
        np.testing.assert_allclose(state, alpha * x0 + sigma * eps, atol=1e-7)


@given(schedules())
def test_inversion_keeps_rays(walk, schedule):
    """With one eps at every level, inversion carries clean data up x = alpha x0 + sigma eps."""
    x0, eps = np.array([0.1, 0.5]), np.array([1.3, -0.4])
    timesteps = tuple(range(schedule.timestep_count - 1, -1, -1))
    told = {t: schedule.level(t) for t in timesteps}

    def network(x, timestep):
        alpha, sigma = told[timestep]
        if schedule.prediction == Prediction.PREDICTION_EPSILON:
            return eps
        if schedule.prediction == Prediction.PREDICTION_V:
            return (eps - sigma * x) / alpha if alpha else -x0
        return (x - sigma * eps) / alpha if alpha else x0

    states = walk(solvers.inversion(schedule, timesteps), network, x0)
    for state, timestep in zip(states, reversed(timesteps), strict=True):
        alpha, sigma = schedule.level(timestep)
        if alpha:  # at a terminal alpha of 0 the network cannot tell of eps
            np.testing.assert_allclose(state, alpha * x0 + sigma * eps, atol=1e-7)


@given(walks(FIRST_ORDER))
def test_noise_is_replaced_not_lost(walk_over):
    """A first-order step leaves sigma'^2 of noise in all: what it keeps of the old and what it adds."""
    schedule, sampler, timesteps, eta = walk_over
    eta = samplers.SAMPLERS[sampler].eta if eta is None else eta
    evaluations = samplers.descent_evaluations(schedule, sampler, timesteps, eta)
    for evaluation, current, following in zip(evaluations, timesteps, (*timesteps[1:], -1), strict=True):
        alpha, sigma = schedule.level(current)
        alpha_next, sigma_next = schedule.level(following)
        k = evaluation.row
        # With x = alpha x0 + sigma eps and the network exact, m is linear in (x0, eps).
        outputs = dict(zip(PREDICTIONS, ((0, 1), (-sigma, alpha), (1, 0)), strict=True))
        m_x0, m_eps = outputs[schedule.prediction]
        assert k.a * alpha + k.b + k.d * m_x0 == pytest.approx(alpha_next, abs=1e-7)
        kept = k.a * sigma + k.d * m_eps
        assert kept**2 + k.s**2 == pytest.approx(sigma_next**2, rel=1e-7, abs=1e-14)


@given(walks())
def test_rounded_once(walk_over):
    """A table is the float64 coefficients, rounded to float32 at the end and nowhere before."""
    schedule, sampler, timesteps, eta = walk_over
    eta = samplers.SAMPLERS[sampler].eta if eta is None else eta
    exact = [evaluation.row for evaluation in samplers.descent_evaluations(schedule, sampler, timesteps, eta)]
    assert np.array_equal(samplers.descent(*walk_over).coefficients, np.array(exact).astype(np.float32))


@pytest.mark.parametrize("sampler", samplers.SAMPLERS)
@pytest.mark.parametrize("prediction", PREDICTIONS[1:])
def test_zero_terminal_snr_is_the_limit(sampler, prediction):
    """Rows at a terminal alpha of 0 are the limit of rows at a small one."""
    ratios = np.geomspace(0.01, 50, 20)
    rows = []
    for terminal in (0.0, 1e-9):
        alphas = np.append(1 / np.sqrt(1 + ratios**2), terminal)
        schedule = Schedule(alphas, np.append(ratios * alphas[:-1], np.sqrt(1 - terminal**2)), prediction)
        rows.append(samplers.descent(schedule, sampler, (20, 13, 6, 0)).coefficients[:-1, : BOUNDS[0]])
    np.testing.assert_allclose(*rows, rtol=1e-5, atol=1e-6)
    assert rows[0].size


@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
def test_euler_ancestral_is_k_diffusion_s(eta, make_schedule):
    """At any eta the step is k-diffusion's get_ancestral_step and sample_euler_ancestral, in X = x / alpha."""
    schedule = make_schedule()
    (evaluation,) = list(samplers.descent_evaluations(schedule, "euler-ancestral", (600, 400), eta))[:1]
    (alpha, sigma), (alpha_next, sigma_next) = schedule.level(600), schedule.level(400)
    start, end = sigma / alpha, sigma_next / alpha_next
    up = min(end, eta * math.sqrt(end**2 * (start**2 - end**2) / start**2))
    down = math.sqrt(end**2 - up**2)
    x, x0, z = 0.8, -0.4, 1.7
    scaled = x / alpha + (x / alpha - x0) / start * (down - start) + z * up
    k = evaluation.row
    assert k.a * x + k.b * x0 + k.s * z == pytest.approx(alpha_next * scaled, rel=1e-12)


def test_heun_evaluates_twice_but_at_the_end(make_schedule):
    """`heun` tells the network both ends of each step; the last step has one evaluation."""
    table = samplers.descent(make_schedule(), "heun", (900, 600, 300))
    assert table.timesteps.tolist() == [900, 600, 600, 300, 300]
    assert table.completed_steps.tolist() == [0, 1, 1, 2, 3]
    assert table.step_count == 3


def test_bounds(make_schedule):
    """Bounds are the schedule's, or infinite where it does not clip."""
    clipped = samplers.descent(make_schedule(clip=(-1.0, 0.5)), "ddim", (900, 100))
    assert column(clipped, "lo").tolist() == [-1, -1]
    assert column(clipped, "hi").tolist() == [0.5, 0.5]
    free = samplers.descent(make_schedule(), "ddim", (900, 100))
    assert column(free, "lo").tolist() == [-math.inf] * 2
    assert column(free, "hi").tolist() == [math.inf] * 2


def test_stochastic_rows(make_schedule):
    """Only the updates that add noise ask for it."""
    schedule = make_schedule()
    assert samplers.descent(schedule, "ddpm", (900, 500, 100)).stochastic.tolist() == [True, True, False]
    assert not samplers.descent(schedule, "ddim", (900, 500, 100)).stochastic.any()
    assert samplers.descent(schedule, "ddim", (900, 500, 100), 0.5).stochastic.tolist() == [True, True, False]


def test_reported_estimates_are_the_network_s(walk, make_schedule):
    """Ex x + em m is the network's eps, and px x + pm m its x0, whatever it predicts."""
    x0, eps = np.array([0.2, -0.9]), np.array([-1.1, 0.6])
    for prediction in ("epsilon", "v_prediction", "sample"):
        schedule = make_schedule(prediction=prediction)
        alpha, sigma = schedule.level(500)
        x = alpha * x0 + sigma * eps
        m = oracle(schedule, x0)(x, 500)
        table = samplers.single_step(schedule, 500, None)
        np.testing.assert_allclose(column(table, "px") * x + column(table, "pm") * m, x0, atol=1e-6)
        np.testing.assert_allclose(column(table, "ex") * x + column(table, "em") * m, eps, atol=1e-6)
        np.testing.assert_array_equal(walk(table, oracle(schedule, x0), x)[-1], x)


def test_single_step_is_ddim_s(make_schedule):
    """One step of DenoiseStep has the row of `ddim`, deterministic unless eta says otherwise."""
    schedule = make_schedule()
    assert same_bytes(samplers.single_step(schedule, 500, 400), samplers.step_rows(schedule, "ddim", None, 500, 400))
    assert same_bytes(
        samplers.single_step(schedule, 500, -1, 1.0), samplers.step_rows(schedule, "ddim", 600, 500, -1, 1.0)
    )


def test_tables_are_kept(make_schedule):
    """Equal requests share one table, whether eta is given or is the default."""
    schedule = make_schedule()
    table = samplers.descent(schedule, "ddim", [900, 500, 100])
    assert samplers.descent(schedule, "ddim", (900, 500, 100), 0.0) is table
    assert samplers.descent(schedule, "ddim", (900, 500, 100), 0.5) is not table
    assert samplers.descent(make_schedule(), "ddim", (900, 500, 100)) is not table


def test_default_eta():
    """Only `ddim` and `euler-ancestral` take an eta: deterministic and ancestral by default."""
    etas = {name: samplers.default_eta(name) for name in names.SAMPLERS}
    assert {name: eta for name, eta in etas.items() if eta is not None} == {"ddim": 0.0, "euler-ancestral": 1.0}


@pytest.mark.parametrize(
    ("sampler", "timesteps", "eta", "message"),
    [
        ("plms", (900, 100), None, "must be one of ddim, ddpm, dpmpp-2m, .*, not 'plms'"),
        ("ddpm", (900, 100), 0.5, "eta must be unset for ddpm; the samplers that take one are ddim, euler-ancestral"),
        ("ddim", (900, 100), -0.1, r"eta must be from 0 \(deterministic\) to 1 \(ancestral\), not -0.1"),
        ("euler-ancestral", (900, 100), 1.5, "eta must be from 0"),
        ("ddim", (900, 100), math.nan, "eta must be from 0"),
        ("ddim", (), None, "at least one timestep"),
        ("ddim", (1000, 100), None, "timesteps must be from 0 to 999, not 1000"),
        ("ddim", (900, -1), None, "timesteps must be from 0 to 999, not -1"),
        ("ddim", (900, 900), None, "timesteps must fall strictly; 900 follows 900"),
        ("ddim", (100, 900), None, "timesteps must fall strictly; 900 follows 100"),
    ],
)
def test_what_is_refused(sampler, timesteps, eta, message, make_schedule):
    """A walk that cannot be is refused with what is allowed."""
    with pytest.raises(ValueError, match=message):
        samplers.descent(make_schedule(), sampler, timesteps, eta)


@pytest.mark.parametrize(
    ("previous", "current", "following", "message"),
    [
        (None, 500, 500, r"the next timestep must be from -1 \(clean data\) to 499, not 500"),
        (None, 500, -2, "the next timestep must be from -1"),
        (None, -1, -1, "timesteps must be from 0 to 999, not -1"),
        (500, 500, 400, "timesteps must fall strictly"),
        (1000, 500, 400, "timesteps must be from 0 to 999, not 1000"),
    ],
)
def test_which_steps_are_refused(previous, current, following, message, make_schedule):
    """A step goes down the schedule, and so did the one before it."""
    with pytest.raises(ValueError, match=message):
        samplers.step_rows(make_schedule(), "ddim", previous, current, following)


def test_single_step_and_inversion_check_their_timesteps(make_schedule):
    """Steps and inversions refuse the timesteps and etas that walks refuse."""
    with pytest.raises(ValueError, match="must be from 0 to 999"):
        samplers.single_step(make_schedule(), -1, None)
    with pytest.raises(ValueError, match="must be from -1"):
        samplers.single_step(make_schedule(), 5, 6)
    with pytest.raises(ValueError, match="eta must be from 0"):
        samplers.single_step(make_schedule(), 5, None, 2.0)
    with pytest.raises(ValueError, match="must fall strictly"):
        samplers.inversion(make_schedule(), (1, 2))
