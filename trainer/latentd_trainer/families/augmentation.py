"""Changes to training images that leave their class as it is."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from latentd_trainer.families import Moment


def mirrored(images: torch.Tensor, moment: Moment, share: float) -> torch.Tensor:
    """This process's images ([n, C, H, W] f32), each left for right with probability `share`.

    A share of 0 draws no random numbers, so that a recipe without it stays the same run.
    """
    if not share:
        return images
    chosen = torch.rand(len(images) * moment.shard.count, generator=moment.generator) < share
    here = moment.shard.rows(chosen).to(images.device)
    return torch.where(here[:, None, None, None], images.flip(3), images)
