"""Two normals fitted by one: what each direction of the Kullback-Leibler divergence makes of them.

Bishop, Pattern Recognition and Machine Learning (2006), section 10.1.2 and figure 10.3; Minka, Divergence measures
and message passing, MSR-TR-2005-173.

    data         p(x) = 1/2 N(x; -d, s^2) + 1/2 N(x; d, s^2)
    inclusive    argmin KL(p || q) over normals q has p's mean and variance, 0 and d^2 + s^2: it covers both normals
    exclusive    argmin KL(q || p) takes one of the two where they lie far apart, at KL = ln 2, and covers both only
                 where they overlap

A VAE's and any likelihood's direction is the first, KL(data || model); reversed KL is the second.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from latentd_trainer import plots
from latentd_trainer.report import figure_text, table
from latentd_trainer.study.section import Criterion, Picture, Section, Settings

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_POINTS = 601  # of the quadrature by the trapezoidal rule, which for densities that vanish at both ends is exact
_REACH = 10.0  # standard deviations on either side that a density is integrated over
_STARTS = (-1.0, -0.3, 0.0, 0.3, 1.0)  # means to start from, in units of d; 0 starts on the ridge between the two
_SPREAD = 0.5
_DISTANCE = 3.0
_DISTANCES = (0.5, 0.75, 1.0, 1.1, 1.2, 1.3, 1.5, 2.0, 3.0)


@dataclass(frozen=True)
class Pair:
    """Two normals of equal weight."""

    distance: float  # d, of each mean from 0
    spread: float  # s, the standard deviation of each

    def log_density(self, x: Tensor) -> Tensor:
        """Return ln p(x), elementwise."""
        means = torch.tensor([-self.distance, self.distance], dtype=x.dtype)
        each = _normal(x[..., None], means, torch.tensor(math.log(self.spread), dtype=x.dtype))
        return each.logsumexp(dim=-1) - math.log(2)


@dataclass(frozen=True)
class Fit:
    """A normal and its divergence."""

    mean: float
    deviation: float
    divergence: float  # nats


def inclusive(pair: Pair, mean: Tensor, log_deviation: Tensor) -> Tensor:
    """KL(p || N(mean, deviation^2)) in nats, by quadrature in float64."""
    reach = pair.distance + _REACH * pair.spread
    x = torch.linspace(-reach, reach, _POINTS, dtype=torch.float64)
    log_p = pair.log_density(x)
    return torch.trapezoid(log_p.exp() * (log_p - _normal(x, mean, log_deviation)), x)


def exclusive(pair: Pair, mean: Tensor, log_deviation: Tensor) -> Tensor:
    """KL(N(mean, deviation^2) || p) in nats, by quadrature in float64."""
    e = torch.linspace(-_REACH, _REACH, _POINTS, dtype=torch.float64)
    x = mean + log_deviation.exp() * e
    log_q = _normal(x, mean, log_deviation)
    standard = torch.exp(-0.5 * e.square()) / math.sqrt(2 * math.pi)
    return torch.trapezoid(standard * (log_q - pair.log_density(x)), e)


def fit(divergence: Callable[[Tensor, Tensor], Tensor], mean: float, deviation: float) -> Fit:
    """The normal that L-BFGS reaches from this one, down a divergence of (mean, ln deviation)."""
    place = torch.tensor([mean, math.log(deviation)], dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [place], max_iter=200, tolerance_grad=1e-9, tolerance_change=1e-18, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        value = divergence(*place)
        value.backward()  # type: ignore[no-untyped-call]  # torch leaves it unannotated
        return value

    optimizer.step(closure)  # type: ignore[no-untyped-call]  # torch leaves it unannotated
    with torch.no_grad():
        return Fit(float(place[0]), float(place[1].exp()), float(divergence(*place)))


def moment_match(pair: Pair) -> Fit:
    """The inclusive fit in closed form: p's own mean and variance."""
    deviation = math.hypot(pair.distance, pair.spread)
    place = torch.tensor([0.0, math.log(deviation)], dtype=torch.float64)
    return Fit(0.0, deviation, float(inclusive(pair, *place)))


def fits(
    pair: Pair, direction: Callable[[Pair, Tensor, Tensor], Tensor], starts: Sequence[float] = _STARTS
) -> list[Fit]:
    """The fits from each start, a mean in units of d."""
    return [fit(partial(direction, pair), start * pair.distance, pair.distance) for start in starts]


def study(settings: Settings) -> Section:
    """Fit both directions from several starts; then the exclusive one as the two normals draw apart."""
    pair = Pair(_DISTANCE, _SPREAD)
    settings.tell("fits")
    covering, seeking = fits(pair, inclusive), fits(pair, exclusive)
    closed = moment_match(pair)
    best = min(seeking, key=lambda each: each.divergence)
    sweep = {
        distance: min(fits(Pair(distance, _SPREAD), exclusive, (0.0, 1.0)), key=lambda each: each.divergence)
        for distance in _DISTANCES
    }
    figures = {
        "inclusive/mean-error": max(abs(each.mean - closed.mean) for each in covering),
        "inclusive/deviation-error": max(abs(each.deviation - closed.deviation) for each in covering),
        "inclusive/deviation": closed.deviation,
        "inclusive/divergence": closed.divergence,
        "exclusive/distance-to-a-mode": abs(abs(best.mean) - pair.distance),
        "exclusive/deviation": best.deviation,
        "exclusive/divergence-beyond-ln-2": abs(best.divergence - math.log(2)),
        "exclusive/mean-of-close-normals": abs(sweep[_DISTANCES[0]].mean),
    }
    criteria = (
        Criterion(
            "Whatever the start, KL(p‖q) is least at p's mean (largest error)", "inclusive/mean-error", "<=", 1e-6
        ),
        Criterion("and at its standard deviation (largest error)", "inclusive/deviation-error", "<=", 1e-6),
        Criterion("KL(q‖p) is least at one of the two normals", "exclusive/distance-to-a-mode", "<=", 1e-3),
        Criterion("at the price of the other, ln 2 nats", "exclusive/divergence-beyond-ln-2", "<=", 1e-3),
        Criterion("unless they overlap: then between them", "exclusive/mean-of-close-normals", "<=", 1e-4),
    )
    rows = [
        [f"{start * pair.distance:g}", *(_text(each) for each in both)]
        for start, *both in zip(_STARTS, covering, seeking, strict=True)
    ]
    rows.append(["*closed form*", _text(closed), f"±{pair.distance:g}, {_SPREAD:g}"])
    body = "\n\n".join(
        [
            "Mean and standard deviation reached from each start; the closed form of the second is that of normals "
            "infinitely far apart:",
            table(["start at", "min KL(p‖q)", "min KL(q‖p)"], rows),
            "KL(p‖q) has one minimum. KL(q‖p) has two, and a start at exactly 0 is kept between them by symmetry, at "
            f"{seeking[2].divergence:.3f} nats against ln 2 = {math.log(2):.3f}.",
            f"The best exclusive fit with the two normals at ±d, whose standard deviation is {_SPREAD:g}:",
            table(
                ["d", "mean", "standard deviation", "nats"],
                [
                    [f"{distance:g}", f"{abs(each.mean):.4f}", f"{each.deviation:.4f}", figure_text(each.divergence)]
                    for distance, each in sweep.items()
                ],
            ),
            "Which direction a family minimises says what it does with a mode it cannot reach. It does not say that a "
            "family misses modes: that needs a model too small for its data, as one normal is for two.",
        ]
    )
    return Section(
        title="The two directions of KL",
        claim="A model too small for its data covers all of it under KL(data‖model), as VAEs and likelihoods ask, and "
        "takes to one mode under KL(model‖data) (Bishop 2006, section 10.1.2).",
        measured=f"p is half N(-3, {_SPREAD:g}²), half N(3, {_SPREAD:g}²); q is a normal. Both divergences by "
        "quadrature in float64, minimised by L-BFGS from five starts.",
        figures=figures,
        criteria=criteria,
        body=body,
        pictures=(
            Picture(
                "kl-directions.png",
                "Left: p, and q by both directions. Right: mean of the exclusive fit by d; it leaves the middle where "
                "the normals part.",
                _picture(pair, closed, best, sweep),
            ),
        ),
    )


def _text(found: Fit) -> str:
    return f"{round(found.mean, 4) + 0.0:.4f}, {found.deviation:.4f}"  # no minus before a zero


def _normal(x: Tensor, mean: Tensor, log_deviation: Tensor) -> Tensor:
    return -0.5 * ((x - mean) * (-log_deviation).exp()).square() - log_deviation - 0.5 * math.log(2 * math.pi)


def _picture(pair: Pair, closed: Fit, best: Fit, sweep: dict[float, Fit]) -> bytes:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.2), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(3, 2))
    x = torch.linspace(-3 * pair.distance, 3 * pair.distance, 601, dtype=torch.float64)
    left.fill_between(x, pair.log_density(x).exp(), color="lightgrey", label="p")
    for found, name, color in ((closed, "min KL(p‖q)", "tab:blue"), (best, "min KL(q‖p)", "tab:red")):
        place = torch.tensor([found.mean, math.log(found.deviation)], dtype=torch.float64)
        left.plot(x, _normal(x, *place).exp(), color=color, label=name)
    left.set(xlabel="x", ylabel="density")
    left.legend(frameon=False)
    _draw_sweep(right, sweep)
    return plots.png(figure)


def _draw_sweep(axes: Axes, sweep: dict[float, Fit]) -> None:
    distances = list(sweep)
    axes.plot(distances, distances, color="lightgrey", label="a mode")
    axes.plot(distances, [abs(each.mean) for each in sweep.values()], "o-", color="tab:red", label="min KL(q‖p)")
    axes.set(xlabel="d", ylabel="|mean|")
    axes.legend(frameon=False)
