"""An encoder that inverts a trained generator: which z would G turn into this image?

A GAN has no inference model, so q(z | x) is not known; the inverse is learnt after the fact and is a guess.

    on samples   z ~ N(0, I), x = G(z, y): E(x, y) minimises |E(x, y) - z|^2
                 (Perarnau et al.: Invertible conditional GANs, arXiv 1611.06355, section 3.1)
    on data      E also minimises |G(E(x, y), y) - x|^2, so that what the generator can draw of a real image comes back
                 (Zhu et al.: Generative visual manipulation on the natural image manifold, arXiv 1609.03552, eq. 3)

The generator is given and does not learn from it. Squares are averaged over elements.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from latentd_trainer.families import Batch, Moment
from latentd_trainer.nets import ImageToVector
from latentd_trainer.optimization import Updater, warm_up_then_cosine
from latentd_trainer.pyramid import Pyramid

_SHARE_ON_SAMPLES = 0.2
_LATENT_WEIGHT = 0.1
_SHARE_OF_WARM_UP = 0.05


class Inverse(nn.Module):
    """Images and labels to the latents that the generator would draw them from: [n, C, H, W] f32, [n] i64 -> [n, d]."""

    def __init__(self, pyramid: Pyramid, hidden: int, latent: int, label_width: int, classes: int) -> None:
        super().__init__()
        self.trunk = ImageToVector(pyramid, hidden, nn.SiLU())
        self.embed_label = nn.Embedding(classes, label_width)
        self.head = nn.Sequential(nn.Linear(hidden + label_width, hidden), nn.SiLU(), nn.Linear(hidden, latent))

    def forward(self, images: Tensor, label: Tensor) -> Tensor:
        """See the class."""
        latent: Tensor = self.head(torch.cat([self.trunk(images), self.embed_label(label)], dim=1))
        return latent


def inversion_step(
    updater: Updater,
    inverse: nn.Module,
    generator: nn.Module,
    latent: Tensor,
    batch: Batch,
    moment: Moment,
    share: float,
) -> dict[str, Tensor]:
    """One step of the inverse, if it is its turn: in the last `share` of all steps, while the generator settles.

    Args:
        updater: of the inverse.
        inverse: E.
        generator: G, in evaluation mode; it is left as it is.
        latent: [n, d] f32, draws from the prior.
        batch: n real images, and the labels that the samples are drawn for too.
        moment: where in training this is.
        share: of the steps, from 0 (never) to 1 (all).

    Returns:
        `inversion`, the error on samples, and `reconstruction`, that on data, once it counts; empty before the turn.
    """
    count = math.ceil(share * moment.step_count)
    step = moment.step - (moment.step_count - count)
    if step < 0:
        return {}
    refining = step >= _SHARE_ON_SAMPLES * count
    images, labels = batch.images, batch.labels
    with moment.autocast():
        with torch.no_grad():
            drawn = generator(latent, labels).float()
        on_samples = (inverse(drawn, labels).float() - latent).square().mean()
        losses, loss = {"inversion": on_samples.detach()}, on_samples
        if refining:
            on_data = (generator(inverse(images, labels), labels).float() - images).square().mean()
            losses["reconstruction"] = on_data.detach()
            loss = on_data + _LATENT_WEIGHT * on_samples
    updater.apply(loss, moment.shard, warm_up_then_cosine(step, count, math.ceil(_SHARE_OF_WARM_UP * count)))
    return losses
