"""The historical ladder as a claim: each idea put more probability on held-out images than the one before."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from latentd_trainer import ladder, plots
from latentd_trainer.checkpoint import CHECKPOINT_FILE, build_family, restore, save
from latentd_trainer.data import Dataset, load
from latentd_trainer.families import Family
from latentd_trainer.study.kept import digest
from latentd_trainer.study.section import Criterion, Picture, Section, Settings

_QUICK: dict[str, dict[str, Any]] = {
    "helmholtz": {"steps": 3, "batch_size": 16, "lower": 6, "upper": 3, "draws": 2},
    "vae": {"steps": 3, "batch_size": 8, "width": 8, "hidden": 8, "latent": 2},
}


def study(settings: Settings) -> Section:
    """Climb it."""
    replaced = _QUICK if settings.quick else None
    rungs = ladder.climb(load("digits"), settings.seed, replaced, settings.tell, partial(_trained, settings.trained))
    names = [rung.name for rung in rungs]
    return Section(
        title="The historical ladder",
        claim="From independent pixels to the VAE, each model of the lecture's history explains images better than the "
        "one before it.",
        measured="ln p(x) of held-out binarised digits, in nats an image, of models trained on the same images without "
        f"their classes but for naive Bayes. The first three are exact, the others bounds with {ladder.BOUND_DRAWS} "
        "draws (IWAE, arXiv 1509.00519), so the true values are no lower.",
        figures={rung.name: rung.log_likelihood for rung in rungs},
        criteria=[
            Criterion(f"{after} above {before}", after, ">", before) for before, after in itertools.pairwise(names)
        ],
        body=f"{ladder.markdown(rungs)}\n\nA lower bound above an exact value settles the order of the two; of two "
        "bounds only the bounds are compared. The mixture has as many components as there are digits, so that it is "
        "naive Bayes that has to find its classes itself.",
        pictures=[
            Picture("historical-ladder.png", "ln p(x) of held-out images; to the right is better.", _picture(rungs))
        ],
    )


def _trained(directory: Path, name: str, settings: Mapping[str, Any], dataset: Dataset, seed: int) -> Family:
    """What `ladder.train` trains, kept in `directory` and not trained again."""
    recipe = {"family": name, "settings": dict(settings), "data": dataclasses.asdict(dataset.info), "seed": seed}
    run = directory / f"ladder-{name}-{digest(recipe)}"
    if (run / CHECKPOINT_FILE).exists():
        family = build_family(name, settings, dataset.info, seed)
        restore(run, family)
        return family
    family = ladder.train(name, settings, dataset, seed)
    run.mkdir(parents=True, exist_ok=True)
    save(run, family, family.config.steps)
    return family


def _picture(rungs: Sequence[ladder.Rung]) -> bytes:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.5, 2.8), layout="constrained")
    axes = figure.subplots()
    axes.plot([rung.log_likelihood for rung in rungs], range(len(rungs)), "o-", color="tab:blue")
    axes.set(xlabel="ln p(x), nats an image", yticks=range(len(rungs)), yticklabels=[rung.name for rung in rungs])
    axes.invert_yaxis()
    axes.grid(alpha=0.3)
    return plots.png(figure)
