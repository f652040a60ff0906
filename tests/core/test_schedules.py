"""Schedules: what is accepted, and which timesteps are visited."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from latentd.v1 import model_pb2
from latentd_server.schedules import Schedule, from_strength

EPSILON = model_pb2.DiffusionSpec.PREDICTION_EPSILON
V = model_pb2.DiffusionSpec.PREDICTION_V
SAMPLE = model_pb2.DiffusionSpec.PREDICTION_SAMPLE
RANGE = model_pb2.TensorSpec(min_value=-1, max_value=1)


def spec_of(alphas: list[float], prediction: int = EPSILON, **fields: object) -> model_pb2.DiffusionSpec:
    """A specification whose sigmas go with these alphas."""
    sigmas = [math.sqrt(1 - alpha**2) for alpha in alphas]
    return model_pb2.DiffusionSpec(**{"alphas": alphas, "sigmas": sigmas, "prediction": prediction} | fields)


def test_read_from_a_bundle():
    """A bundle's schedule keeps its float64 levels, and clips to the samples' range if it says so."""
    schedule = Schedule.from_spec(spec_of([0.9, 0.5], V, clip_denoised=True), RANGE)
    assert schedule.level(1) == (0.5, math.sqrt(0.75))
    assert schedule.level(-1) == (1.0, 0.0)
    assert schedule.clip == (-1.0, 1.0)
    assert Schedule.from_spec(spec_of([0.9, 0.5]), RANGE).clip is None


def test_levels_cannot_be_changed():
    """Tables are cached by schedule, so a schedule cannot change."""
    schedule = Schedule.from_spec(spec_of([0.9, 0.5]), RANGE)
    with pytest.raises(ValueError, match="read-only"):
        schedule.alphas[0] = 0.8


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (spec_of([]), "equal length, at least 1, not 0 and 0"),
        (spec_of([0.9, 0.5], sigmas=[0.1]), "equal length, at least 1, not 2 and 1"),
        (spec_of([0.9, 0.5], sigmas=[0.1, math.nan]), "must be finite"),
        (spec_of([0.9, 0.5], sigmas=[0.1, 0.5]), r"alpha\^2 \+ sigma\^2 must be 1 to 1e-6; at timestep 1"),
        (spec_of([0.5, 0.9]), "alpha / sigma must fall strictly with the timestep; at timestep 1"),
        (spec_of([0.9, 0.5, 0.5]), "alpha / sigma must fall strictly with the timestep; at timestep 2"),
        (spec_of([0.9, -0.5]), "alphas must be at least 1e-06$"),
        (spec_of([0.9, -0.5], V), "alphas must be at least 1e-06, but for the last, which may be 0"),
        (spec_of([0.9, 0.0]), "alphas must be at least 1e-06$"),
        (spec_of([0.9, 0.0, 0.0], SAMPLE), "alphas must be at least 1e-06, but for the last"),
        (spec_of([1.0, 0.5]), "sigmas must be at least 1e-06"),
        (spec_of([0.9, 0.5], 0), "prediction must be one of PREDICTION_EPSILON, PREDICTION_V, PREDICTION_SAMPLE"),
    ],
)
def test_what_is_wrong_is_said(spec, message):
    """A schedule that no sampler can walk is refused, and the message says what is allowed."""
    with pytest.raises(ValueError, match=message):
        Schedule.from_spec(spec, RANGE)


def test_every_problem_is_said_at_once():
    """One error lists everything that is wrong."""
    spec = spec_of([0.9, -0.5], 0, sigmas=[0.0, 0.5], clip_denoised=True)
    with pytest.raises(ValueError, match=r"prediction .*; clipping .*; alphas .*; sigmas .*; alpha\^2"):
        Schedule.from_spec(spec, model_pb2.TensorSpec(min_value=1, max_value=1))


def test_zero_terminal_snr():
    """The last alpha may be 0 where the network predicts v or x0."""
    for prediction in (V, SAMPLE):
        assert Schedule.from_spec(spec_of([0.9, 0.5, 0.0], prediction), RANGE).level(2) == (0.0, 1.0)


@pytest.mark.parametrize("timestep", [-2, 2])
def test_level_out_of_range(timestep):
    """There are no levels but those of the timesteps and of clean data."""
    schedule = Schedule.from_spec(spec_of([0.9, 0.5]), RANGE)
    with pytest.raises(ValueError, match=r"from -1 \(clean data\) to 1"):
        schedule.level(timestep)


def test_trailing_timesteps(make_schedule):
    """Spacing is that of arXiv 2305.08891, table 2: round(T, T - T / n, ...) - 1."""
    assert make_schedule().spaced_timesteps(10) == tuple(range(999, 0, -100))
    assert make_schedule().spaced_timesteps(7) == (999, 856, 713, 570, 428, 285, 142)


@given(st.integers(1, 60).flatmap(lambda total: st.tuples(st.just(total), st.integers(1, total))))
def test_spacing(numbers):
    """Any count gives that many timesteps, from the noisiest strictly down, none further than T / count + 1 apart."""
    total, count = numbers
    schedule = Schedule.from_spec(spec_of(list(np.linspace(0.99, 0.05, total))), RANGE)
    timesteps = schedule.spaced_timesteps(count)
    assert len(timesteps) == count
    assert timesteps[0] == total - 1
    gaps = -np.diff([*timesteps, -1])
    assert gaps.min() >= 1
    assert gaps.max() <= total / count + 1


@pytest.mark.parametrize("count", [-1, 0, 1001])
def test_impossible_counts(count, make_schedule):
    """A walk has from one step to as many as there are timesteps."""
    with pytest.raises(ValueError, match="must be from 1 to 1000"):
        make_schedule().spaced_timesteps(count)


@pytest.mark.parametrize(("strength", "kept"), [(1.0, 100), (0.5, 50), (0.505, 51), (0.07, 7), (0.29, 29), (1e-6, 1)])
def test_strength(strength, kept):
    """Strength keeps the last ceil(strength * n) timesteps, at least one, with products rounded as decimals are."""
    timesteps = tuple(range(999, 0, -10))
    assert from_strength(timesteps, strength) == timesteps[-kept:]


@pytest.mark.parametrize("strength", [0.0, -0.5, 1.1, math.nan])
def test_strength_out_of_range(strength):
    """Strength is a share of the schedule."""
    with pytest.raises(ValueError, match="must be above 0 and at most 1"):
        from_strength((1, 0), strength)
