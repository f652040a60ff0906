"""Noise of a training step, the same however many processes share the step."""

from __future__ import annotations

import torch

from latentd_trainer.families import Batch, Moment


def normal(batch: Batch, moment: Moment, width: int) -> torch.Tensor:
    """This process's rows of N(0, 1) noise drawn for the whole global batch, [n, width] f32, where the batch is."""
    whole = torch.randn((len(batch.images) * moment.shard.count, width), generator=moment.generator)
    return moment.shard.rows(whole).to(batch.images.device)
