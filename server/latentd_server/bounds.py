"""Score requests to diffusion models -> lanes of one evaluation each, one for every term of every row's bound. Pure."""

import numpy as np
from latentd.v1 import generation_service_pb2
from numpy.typing import NDArray

from latentd_server import bound_terms, noise, samplers
from latentd_server.bound_terms import BoundTerms, Decoder, Levels
from latentd_server.calls import MAX_SCORE_ROWS
from latentd_server.fields import MAX_INT32, Fields
from latentd_server.job import StepJob
from latentd_server.noise import Purpose
from latentd_server.options import schedule_of
from latentd_server.plans import Bounding, Limits
from latentd_server.walks import labels_or_unconditional
from latentd_server.wiring import Wiring

_TIMESTEPS = noise.word(Purpose.SCORE, stream=1)
"""Draws of the timesteps that stand for their runs; stream 0 is the noise at them."""


def score(
    fields: Fields,
    request: generation_service_pb2.ScoreRequest,
    samples: NDArray[np.float32] | None,
    model: Wiring,
    limits: Limits,
) -> Bounding:
    """Samples to the variational bound on ln p(sample | label), or on ln p(sample) by the unconditional network."""
    schedule = schedule_of(model)
    count = schedule.timestep_count
    labels = labels_or_unconditional(fields, request.condition, samples, model, 1.0)
    draws = fields.integer(request.draw_count, "draw_count", 1, MAX_INT32 // count, default=1) or 1
    terms = fields.integer(request.timestep_count, "timestep_count", min(2, count), count, default=count) or count
    _check_size(fields, 1 if samples is None else len(samples), draws, terms, limits)
    fields.check()
    assert samples is not None
    item = model.sample
    levels = Levels(item.low, item.high, item.level_count) if item.level_count else None
    if levels is not None:
        samples = levels.nearest(samples)
    timesteps, weights = _visits(request.seed, len(samples), draws, terms, count)
    # Numbered so that the noise at a timestep does not depend on which others are visited.
    numbers = np.arange(draws)[:, None] * count + timesteps
    visited = timesteps.reshape(-1)
    rows = np.repeat(np.arange(len(samples), dtype=np.int64), draws * terms)
    tables = samplers.estimates(schedule)
    if terms == count:
        tables *= len(samples) * draws
    else:
        tables = tuple(map(tables.__getitem__, visited.tolist()))
    job = StepJob(
        model=model.name,
        lane_count=len(rows),
        tables=tables,
        start=BoundTerms(
            samples=samples,
            rows=rows,
            draws=numbers.reshape(-1),
            alphas=schedule.alphas[visited].astype(np.float32),
            sigmas=schedule.sigmas[visited].astype(np.float32),
            weights=weights.reshape(-1) / draws,
            halves=bound_terms.halved_falls(schedule.alphas, schedule.sigmas)[visited],
            decoder=Decoder(float(schedule.sigmas[0]), levels),
        ),
        size=model.size,
        seed=request.seed,
        sample_indices=rows,
        labels=labels[rows],
    )
    return Bounding(
        job=job,
        prior=bound_terms.prior_divergence(samples, *schedule.level(count - 1)),
        row_count=len(samples),
        draw_count=draws,
    )


def _visits(
    seed: int, rows: int, draws: int, terms: int, timestep_count: int
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """The timesteps that are evaluated and how many each stands for, [rows, draws, terms] i64 and f64.

    0 stands for itself. The others are split into `terms` - 1 runs, whose lengths differ by one at most, and of
    each run one timestep is drawn, by (seed, row, draw, run). As many runs as timesteps leave nothing to draw.
    """
    runs = terms - 1
    edges = 1 + np.arange(runs + 1) * (timestep_count - 1) // max(1, runs)
    lengths = np.diff(edges)
    points = np.zeros((rows * draws, runs))
    if 0 < runs < timestep_count - 1:
        own = [run for row in range(rows) for run in noise.runs(_TIMESTEPS, seed, [row] * draws, range(draws))]
        points = noise.uniforms(own, runs).astype(np.float64)
    drawn = edges[:-1] + (points * lengths).astype(np.int64)
    timesteps = np.concatenate([np.zeros((rows * draws, 1), np.int64), drawn], axis=1)
    weights = np.broadcast_to(np.concatenate([[1.0], lengths]), timesteps.shape)
    return timesteps.reshape(rows, draws, terms), weights.reshape(rows, draws, terms)


def _check_size(fields: Fields, rows: int, draws: int, terms: int, limits: Limits) -> None:
    most = min(MAX_SCORE_ROWS, limits.max_evaluations)
    total = rows * draws * terms
    if total > most:
        fields.reject(
            "timestep_count",
            f"{rows} rows x {draws} draws x {terms} timesteps make {total} evaluations; "
            f"at most {most} are allowed in one request",
        )
