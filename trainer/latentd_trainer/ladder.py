"""The historical ladder: what each idea added to ln p(x) of binarised images, on one scale, oldest first.

Independent pixels, naive Bayes, a mixture fitted by EM, a Helmholtz machine by wake-sleep and by reweighted
wake-sleep, a VAE. The first three are exact; the others are bounds with many draws (IWAE), so the true values are
no lower.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from latentd_trainer.checkpoint import build_family
from latentd_trainer.data import UNLABELLED, Dataset, Split, scale
from latentd_trainer.families import Family, Moment
from latentd_trainer.families.helmholtz import HelmholtzMachine
from latentd_trainer.families.vae import Vae
from latentd_trainer.mixture import Floats, expectation_maximisation, fit_classes
from latentd_trainer.shard import Shard
from latentd_trainer.train import global_batch, step_seed

BOUND_DRAWS = 500
MIXTURE_COMPONENTS = 10
"""As many as there are digits, so that the mixture is naive Bayes that has to find its classes itself. A mixture is
not held to that: with 100 components it passes wake-sleep on these few and small images."""
MIXTURE_STEPS = 100


@dataclass(frozen=True)
class Rung:
    """One model of the ladder."""

    name: str
    source: str  # who and when
    log_likelihood: float  # of held-out images, nats an image
    exact: bool  # else a lower bound


Train = Callable[[str, Mapping[str, Any], Dataset, int], Family]
"""A family's name, settings that replace its recipe's, images and a seed to the trained family."""


def climb(
    dataset: Dataset,
    seed: int = 0,
    settings: Mapping[str, Mapping[str, Any]] | None = None,
    tell: Callable[[str], None] = lambda _: None,
    trained: Train | None = None,
) -> list[Rung]:
    """Train every model on the same binarised images and measure it on the held-out ones, oldest first.

    Args:
        dataset: What is binarised.
        seed: Of all weights, batches and draws.
        settings: Settings by family that replace the recipes'.
        tell: Told what is being trained.
        trained: What trains; `train` if not given.

    Returns:
        The rungs in their historical order, which on the embedded digits is that of their likelihoods too.
    """
    given = settings or {}
    trained = trained or train
    plain = binarised(dataset)
    rungs = list(_closed_forms(dataset, seed))
    for objective, name, source in (
        ("ws", "Helmholtz machine, wake-sleep", "Dayan et al. 1995"),
        ("rws", "Helmholtz machine, reweighted wake-sleep", "Bornschein, Bengio 2015"),
    ):
        tell(name)
        wanted = {**given.get("helmholtz", {}), "objective": objective}
        machine = trained("helmholtz", wanted, plain, seed)
        assert isinstance(machine, HelmholtzMachine)
        rungs.append(Rung(name, source, _bound(machine.importance_weighted_bound, plain, seed), exact=False))
    tell("VAE")
    vae = trained("vae", given.get("vae", {}), plain, seed)
    assert isinstance(vae, Vae)
    labels = torch.from_numpy(plain.test.labels)
    bound = _bound(partial(vae.importance_weighted_bound, labels=labels), plain, seed)
    return [*rungs, Rung("VAE with Bernoulli pixels", "Kingma, Welling 2014", bound, exact=False)]


def markdown(rungs: list[Rung]) -> str:
    """The ladder as a table."""
    lines = [
        "| model | | ln p(x), nats | |",
        "| --- | --- | --- | --- |",
        *(
            f"| {rung.name} | {rung.source} | {rung.log_likelihood:.2f} | {'exact' if rung.exact else 'bound'} |"
            for rung in rungs
        ),
    ]
    return "\n".join(lines)


def binarised(dataset: Dataset) -> Dataset:
    """The same images with pixels of 0 and 1, from the middle of the range on, and without classes."""
    info = dataclasses.replace(
        dataset.info,
        name=f"{dataset.info.name}-binary",
        levels=2,
        class_names=(UNLABELLED,),
        class_probabilities=(1.0,),
    )

    def split(part: Split) -> Split:
        pixels = scale(part.pixels, dataset.info.levels) >= 0
        return Split(pixels.astype(np.uint8), np.zeros_like(part.labels))

    return Dataset(info, split(dataset.train), split(dataset.test))


def train(name: str, settings: Mapping[str, Any], dataset: Dataset, seed: int) -> Family:
    """A family trained to its end, as `train.fit` does it, without files."""
    family = build_family(name, settings, dataset.info, seed)
    count = family.config.steps
    for step in range(count):
        generator = torch.Generator().manual_seed(step_seed(seed, step))
        moment = Moment(step, count, generator, Shard(), contextlib.nullcontext)
        family.step(global_batch(dataset, family.config.batch_size, step, seed), moment)
    return family


def _closed_forms(dataset: Dataset, seed: int) -> Iterator[Rung]:
    plain = binarised(dataset)
    images, held_out = _flat(plain.train), _flat(plain.test)
    independent = fit_classes(images, plain.train.labels, 1)
    classes = fit_classes(images, dataset.train.labels, len(dataset.info.class_names))
    *_, mixture = expectation_maximisation(images, MIXTURE_COMPONENTS, MIXTURE_STEPS, seed)
    for name, source, model in (
        ("independent pixels", "", independent),
        ("naive Bayes", "Maron 1961", classes),
        (f"mixture of {MIXTURE_COMPONENTS}, by EM", "Dempster, Laird, Rubin 1977", mixture),
    ):
        yield Rung(name, source, float(model.log_likelihood(held_out).mean()), exact=True)


def _flat(split: Split) -> Floats:
    return split.pixels.reshape(len(split.pixels), -1).astype(np.float64)


def _bound(of: Callable[..., Tensor], dataset: Dataset, seed: int) -> float:
    """The mean bound of the held-out images, with `BOUND_DRAWS` draws each."""
    images = torch.from_numpy(scale(dataset.test.pixels, dataset.info.levels))
    return float(of(images, draws=BOUND_DRAWS, seed=seed).double().mean())
