"""Noise that is drawn for many rows, and for many steps, at once."""

from typing import Any

import numpy as np
import pytest
from latentd_server import draws, noise
from latentd_server.draws import Draws, StepNoise, draw_steps
from latentd_server.noise import Purpose

SIZE = 6


def single(lane: StepNoise, position: int) -> bytes:
    """The noise of one evaluation, drawn by itself."""
    own = noise.runs(noise.word(Purpose.STEP), lane.seed, [lane.sample], [lane.first_step + position])
    return noise.normals(own, SIZE).tobytes()


def test_noise_drawn_ahead_is_noise_drawn_at_its_step() -> None:
    """Lanes that join, sit out, go back to an evaluation and end get what a draw for that step alone gives."""
    lanes = [StepNoise(seed, 3 * seed, 10 * seed, evaluations) for seed, evaluations in enumerate((30, 12, 5, 9))]
    positions = [0, 3, 0, 1]
    rng = np.random.default_rng(0)
    for _ in range(300):
        riders = [i for i, lane in enumerate(lanes) if positions[i] < lane.evaluations and rng.random() < 0.7]
        draw_steps([(lanes[i], positions[i]) for i in riders], Draws(), SIZE)
        for i in riders:
            assert lanes[i].at(positions[i]).tobytes() == single(lanes[i], positions[i])
            positions[i] = max(0, positions[i] + (-2 if rng.random() < 0.1 else 1))
    assert all(position >= lane.evaluations for position, lane in zip(positions, lanes, strict=True))


def test_what_was_asked_for_before_comes_back_in_its_order() -> None:
    """Start noise shares the draw with the steps' and is given back alone."""
    asked, lane = Draws(), StepNoise(1, 2, 0, 4)
    asked.want(noise.word(Purpose.START), 7, [5, 6], [0, 0])
    begun = draw_steps([(lane, 0)], asked, SIZE)
    assert begun.tobytes() == noise.normals(noise.runs(Purpose.START, 7, [5, 6]), SIZE).tobytes()
    assert lane.at(0).tobytes() == single(lane, 0)


def test_lanes_draw_together_and_seldom(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sixteen evaluations of five lanes take two draws, of nothing beyond their end; large rows are not drawn ahead."""
    drawn: list[int] = []
    normals = noise.normals

    def count(wanted: list[noise.Run], size: int) -> Any:
        drawn.append(sum(run.length for run in wanted))
        return normals(wanted, size)

    monkeypatch.setattr(noise, "normals", count)
    lanes = [StepNoise(seed, 0, 0, 16) for seed in range(5)]
    for position in range(16):
        draw_steps([(lane, position) for lane in lanes], Draws(), SIZE)
    assert drawn == [40, 40]
    drawn.clear()
    draw_steps([(StepNoise(0, 0, 0, 16), 0)], Draws(), draws._AT_ONCE)
    assert drawn == [1]
