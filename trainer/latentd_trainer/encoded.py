"""Images as latents of a bundle's encoder, for diffusion over latents (arXiv 2112.10752, section 3).

Latents are drawn from the encoder's posterior, some times an image, for that is what the decoder was trained to take;
where there is no variance they are what the encoder gives. They are brought to mean 0 and deviation 1 in each channel.
"""

from dataclasses import replace
from pathlib import Path

import numpy as np

from latentd_trainer import bundle as bundles
from latentd_trainer.bundle import BundleError
from latentd_trainer.data import Dataset, EncodedSplit, LatentsInfo, load, scale
from latentd_trainer.served import EvaluationError, Given, Graphs
from latentd_trainer.spec import Meaning, Role, Source

DRAWS = 16
"""Latents an image."""
_SEED = 0
_SMALLEST_DEVIATION = 1e-6


def load_data(source: str, latents_of: str | None) -> Dataset:
    """What `data.load` loads, and beside it its latents if they are asked for.

    Args:
        source: As of `data.load`.
        latents_of: A bundle, MODELS/NAME/VERSION, or MODELS/NAME for its newest version.

    Raises:
        DataError: the data cannot be read.
        ValueError: the bundle cannot be read, or its encoder and decoder are not for these data.
    """
    dataset = load(source)
    return dataset if latents_of is None else encode(dataset, Path(latents_of))


def encode(dataset: Dataset, directory: Path) -> Dataset:
    """A data set with the latents of its training images; see `load_data`."""
    try:
        directory = _newest(directory)
        bundle = bundles.read(directory)
        graphs = Graphs(directory, bundle, threads=1)
        values, labels = _latents(graphs, dataset)
    except (BundleError, EvaluationError, OSError) as error:
        raise ValueError(f"--latents-of {directory}: {error}") from error
    axes = (0, *range(2, values.ndim))
    means, deviations = values.mean(axes, np.float64), values.std(axes, np.float64)
    if not deviations.min() > _SMALLEST_DEVIATION:
        raise ValueError(f"--latents-of {directory}: a channel of its latents is the same for all images")
    across = (-1, *[1] * (values.ndim - 2))
    standard = ((values - means.reshape(across)) / deviations.reshape(across)).astype(np.float32)
    info = LatentsInfo(
        model=bundle.model.name,
        digest=bundle.model.digest,
        shape=tuple(bundle.model.latent_spec.shape),
        means=tuple(means.tolist()),
        deviations=tuple(deviations.tolist()),
        bound=float(np.ceil(np.abs(standard).max())),
    )
    return replace(dataset, info=replace(dataset.info, latents=info), encoded=EncodedSplit(standard, labels))


def _newest(directory: Path) -> Path:
    versions = [each for each in directory.iterdir() if each.name.isdigit()] if directory.is_dir() else []
    return max(versions, key=lambda each: int(each.name)) if versions else directory


def _latents(graphs: Graphs, dataset: Dataset) -> tuple[np.ndarray, np.ndarray]:
    model, info = graphs.bundle.model, dataset.info
    problems = []
    if not graphs.takes(Role.ROLE_DECODER, Source.SOURCE_LATENT):
        problems.append("has no decoder of latents")
    if not graphs.gives(Role.ROLE_ENCODER, Meaning.MEANING_LATENT_MEAN):
        problems.append("has no encoder to latents")
    if tuple(model.sample_spec.shape) != info.shape:
        problems.append(f"is for images of shape {list(model.sample_spec.shape)}, {info.name} holds {list(info.shape)}")
    if graphs.takes(Role.ROLE_DECODER, Source.SOURCE_CLASS_LABEL) and tuple(model.class_names) != info.class_names:
        problems.append(f"is conditioned on classes that are not those of {info.name}")
    if problems:
        raise EvaluationError("; ".join(problems))
    images, labels = scale(dataset.train.pixels, info.levels), dataset.train.labels
    generator = np.random.default_rng(_SEED)
    given: Given = {Source.SOURCE_SAMPLE: images, Source.SOURCE_CLASS_LABEL: labels}
    posterior = graphs.run(Role.ROLE_ENCODER, given, generator)
    means = posterior[Meaning.MEANING_LATENT_MEAN]
    if Meaning.MEANING_LATENT_LOG_VARIANCE not in posterior:
        return means, labels
    deviations = np.exp(posterior[Meaning.MEANING_LATENT_LOG_VARIANCE] / 2)
    eps = generator.standard_normal((DRAWS, *means.shape), np.float32)
    return (means + deviations * eps).reshape(-1, *means.shape[1:]), np.tile(labels, DRAWS)
