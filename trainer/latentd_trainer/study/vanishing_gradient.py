"""What the generator learns from while the discriminator gets better: the minimax loss against the nonsaturating one.

Goodfellow et al., arXiv 1406.2661, section 3; Arjovsky, Bottou, arXiv 1701.04862, theorem 2.4 and figure 2.

    D = s(f), s the logistic function, f the logit of a generated image
    minimax         d/df ln(1 - s(f)) = -s(f),       which vanishes where D is sure that it is generated
    nonsaturating   d/df -ln s(f)     = -(1 - s(f)), which is 1 in size there

Both push f up; they weigh the images differently.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from latentd_trainer import data, plots
from latentd_trainer.checkpoint import build_family
from latentd_trainer.data import Dataset
from latentd_trainer.families.gan import Gan, discriminator_loss, generator_loss
from latentd_trainer.report import figure_text, table
from latentd_trainer.study.exact_sums import gradient
from latentd_trainer.study.section import Criterion, Picture, Section, Settings
from latentd_trainer.train import global_batch

if TYPE_CHECKING:
    from matplotlib.axes import Axes

LOSSES = ("minimax", "nonsaturating")
_NETWORKS = {"width": 8, "hidden": 32, "latent": 8, "batch_size": 64}
_RATE = 1e-3  # of the discriminator's Adam
_MEASURED_AT = (0, 10, 20, 40, 80, 160)
_JUDGED = 256  # generated images that gradients are measured on
_LARGEST_LOGIT = 20.0


@dataclass(frozen=True)
class Moment:
    """How well the discriminator does after some steps, and what is left for the generator."""

    step: int
    real: float  # mean D of real images
    generated: float  # mean D of generated ones
    norms: dict[str, float]  # of the gradient by all of the generator's parameters, by loss
    cosine: float  # of the angle between the two gradients


def slopes(loss: str, logits: Tensor) -> Tensor:
    """The derivative of the generator's loss on each image by that image's logit, as autograd has it, [n]."""
    logits = logits.detach().requires_grad_()
    (found,) = torch.autograd.grad(generator_loss(loss, logits) * len(logits), logits)
    return found


def closed_slopes(loss: str, logits: Tensor) -> Tensor:
    """The same in closed form."""
    return -torch.sigmoid(logits if loss == "minimax" else -logits)


def overtrain(gan: Gan, dataset: Dataset, steps: tuple[int, ...], seed: int) -> Iterator[Moment]:
    """Train the discriminator alone, the generator as it is, and measure after each of `steps`."""
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(gan.discriminator.parameters(), _RATE, betas=(0.0, 0.99))
    judged = global_batch(dataset, _JUDGED, 0, seed)
    latent = torch.randn((len(judged.labels), gan.config.latent), generator=generator)
    yield _measure(gan, judged.images, judged.labels, latent, steps[0])
    for before, step in pairwise(steps):
        for position in range(before, step):
            batch = global_batch(dataset, gan.config.batch_size, position, seed)
            with torch.no_grad():
                noise = torch.randn((len(batch.labels), gan.config.latent), generator=generator)
                generated = gan.generator(noise, batch.labels)
            logits = (gan.discriminator(images, batch.labels) for images in (batch.images, generated))
            optimizer.zero_grad()
            discriminator_loss("minimax", *logits).backward()  # type: ignore[no-untyped-call]  # torch's own
            optimizer.step()
        yield _measure(gan, judged.images, judged.labels, latent, step)


def study(settings: Settings) -> Section:
    """Overtrain a small discriminator against an untrained generator on digits."""
    digits = data.load("digits")
    gan = build_family("gan", _NETWORKS, digits.info, settings.seed)
    assert isinstance(gan, Gan)
    settings.tell("trains a discriminator")
    moments = list(overtrain(gan, digits, _MEASURED_AT, settings.seed))
    last = moments[-1]
    logits = torch.linspace(-_LARGEST_LOGIT, _LARGEST_LOGIT, 401)
    figures = {
        f"slopes/{loss}-error": float((slopes(loss, logits) - closed_slopes(loss, logits)).abs().max())
        for loss in LOSSES
    }
    for moment in moments:
        figures |= {f"{loss}/{moment.step}": norm for loss, norm in moment.norms.items()}
    largest = {loss: max(moment.norms[loss] for moment in moments) for loss in LOSSES}
    figures |= {f"{loss}/left": last.norms[loss] / largest[loss] for loss in LOSSES}
    figures |= {
        "generated/last": last.generated,
        "ratio/last": last.norms["nonsaturating"] / last.norms["minimax"],
    }
    criteria = (
        Criterion("d/df ln(1 - D) is -D (largest error)", "slopes/minimax-error", "<=", 1e-6),
        Criterion("d/df -ln D is -(1 - D) (largest error)", "slopes/nonsaturating-error", "<=", 1e-6),
        Criterion("D comes to tell generated images (mean D of them)", "generated/last", "<=", 0.01),
        Criterion("the minimax gradient vanishes: share of its largest norm left", "minimax/left", "<=", 0.05),
        Criterion("the nonsaturating one does not (share)", "nonsaturating/left", ">=", 0.5),
    )
    rows = [
        [
            str(moment.step),
            *map(figure_text, (moment.real, moment.generated, *moment.norms.values(), moment.cosine)),
        ]
        for moment in moments
    ]
    body = "\n\n".join(
        [
            table(
                ["steps of D", "mean D, real", "mean D, generated", *(f"norm, {loss}" for loss in LOSSES), "cosine"],
                rows,
            ),
            "The nonsaturating gradient grows, for it also carries the slope of f, which gets steeper as D trains; and "
            "the images that weigh most differ, so that the two do not point the same way.",
        ]
    )
    return Section(
        title="The generator's vanishing gradient",
        claim="While D rejects generated images with confidence, the minimax loss leaves the generator no gradient and "
        "the nonsaturating loss does (Goodfellow et al. 2014, section 3).",
        measured=f"A small conditional GAN on digits: D is trained for {last.step} steps by Adam against the "
        f"generator's first weights; norms of the gradient by all of the generator's parameters, on {_JUDGED} images. "
        f"Slopes by autograd at logits from -{_LARGEST_LOGIT:g} to {_LARGEST_LOGIT:g}.",
        figures=figures,
        criteria=criteria,
        body=body,
        pictures=(
            Picture(
                "vanishing-gradient.png",
                "Left: norm of the generator's gradient as D trains. Right: size of each loss's slope by the logit.",
                _picture(moments, logits),
            ),
        ),
    )


def _measure(gan: Gan, images: Tensor, labels: Tensor, latent: Tensor, step: int) -> Moment:
    generated = gan.discriminator(gan.generator(latent, labels), labels)
    minimax, nonsaturating = (gradient(generator_loss(loss, generated), gan.generator) for loss in LOSSES)
    with torch.no_grad():
        real = gan.discriminator(images, labels).sigmoid().mean()
    return Moment(
        step,
        float(real),
        float(generated.detach().sigmoid().mean()),
        dict(zip(LOSSES, (float(minimax.norm()), float(nonsaturating.norm())), strict=True)),
        float(torch.nn.functional.cosine_similarity(minimax, nonsaturating, dim=0)),
    )


def _picture(moments: list[Moment], logits: Tensor) -> bytes:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    for loss, color in zip(LOSSES, ("tab:red", "tab:blue"), strict=True):
        left.semilogy([each.step for each in moments], [each.norms[loss] for each in moments], "o-", color=color)
        right.semilogy(logits, closed_slopes(loss, logits).abs(), color=color, label=loss)
    left.set(xlabel="steps of D", ylabel="norm of the generator's gradient")
    _label_slopes(right)
    return plots.png(figure)


def _label_slopes(axes: Axes) -> None:
    axes.set(xlabel="logit f of a generated image", ylabel="|dL/df|")
    axes.legend(frameon=False)
