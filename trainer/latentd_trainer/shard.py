"""One process's part in data-parallel training: its rows of the global batch, and averages over all processes."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

# Imported before any group is joined, because its functions keep the group of that moment as a default argument. An
# optimizer imports it; were that later, the group would outlive `join_group`, and with it gloo's threads, which take
# the interpreter's lock to free a tensor. One that does so while the interpreter ends aborts the process.
import torch.distributed.nn.functional
from torch import distributed, nn
from torch.distributed.rendezvous import rendezvous

_joined = itertools.count()


@dataclass(frozen=True)
class Shard:
    """Process `rank` of `count`. With a count of 1 nothing is communicated."""

    rank: int = 0
    count: int = 1

    @property
    def is_first(self) -> bool:
        """Whether this is the process that writes files and speaks to people."""
        return self.rank == 0

    def rows(self, whole: torch.Tensor) -> torch.Tensor:
        """This process's equal, contiguous share of the first axis.

        Raises:
            ValueError: the axis does not divide by the number of processes.
        """
        if len(whole) % self.count:
            raise ValueError(f"a batch of {len(whole)} does not divide by {self.count} processes")
        size = len(whole) // self.count
        return whole[self.rank * size : (self.rank + 1) * size]

    def mean(self, part: torch.Tensor) -> torch.Tensor:
        """The mean of a tensor over all processes, without gradient."""
        value = part.detach().clone()
        if self.count > 1:
            distributed.all_reduce(value)
            value /= self.count
        return value

    def average_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Replace each gradient by its mean over all processes, in one message."""
        if self.count == 1:
            return
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        flat = torch.cat([gradient.reshape(-1) for gradient in gradients])
        distributed.all_reduce(flat)
        flat /= self.count
        means = torch.split(flat, [gradient.numel() for gradient in gradients])
        for gradient, mean in zip(gradients, means, strict=True):
            gradient.copy_(mean.view_as(gradient))


@contextmanager
def join_group(device: torch.device) -> Iterator[Shard]:
    """Join the processes that `torchrun` started, if it started this one; leave them at the end.

    A process may join and leave many times; all must do so equally often.
    """
    if process_count() == 1:
        yield Shard()
        return
    # The store lives as long as torchrun does, and still holds the addresses of groups that were left.
    store, rank, count = next(rendezvous("env://"))
    store = distributed.PrefixStore(f"latentd/{next(_joined)}", store)  # type: ignore[attr-defined] # not in __all__
    backend = "nccl" if device.type == "cuda" else "gloo"
    distributed.init_process_group(backend, store=store, rank=rank, world_size=count)
    try:
        yield Shard(rank, count)
    finally:
        distributed.destroy_process_group()


def process_count() -> int:
    """How many processes `torchrun` started; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def rank() -> int:
    """This process's number among those that `torchrun` started."""
    return int(os.environ.get("RANK", "0"))


def local_rank() -> int:
    """This process's number among those that `torchrun` started on this machine."""
    return int(os.environ.get("LOCAL_RANK", "0"))
