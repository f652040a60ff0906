"""What classes that a model found by itself tell: of its own samples, and of the classes of the data.

bound     I(k; x) >= E ln q(k | x) + H(k), with k from its prior and x the model's sample of it
          (Chen et al., arXiv 1606.03657, eq. 5); for the latents likewise
purity    the share of real images that are of the commonest class among those with their code
matched   the same, where each code stands for one class and each class for one code, as well as can be
"""

import math

import numpy as np
from latentd.v1 import model_pb2
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment

from latentd_trainer.data import DataInfo
from latentd_trainer.served import Floats, Given, Graphs
from latentd_trainer.spec import Meaning, Role, Source

DRAWS = 4096
"""Samples that the bounds are averages over."""

Labels = NDArray[np.int64]


def has_own_classes(model: model_pb2.Model, trained_on: DataInfo) -> bool:
    """Whether a model's classes are others than those of the data that it was trained on."""
    return bool(model.class_names) and tuple(model.class_names) != trained_on.class_names


def recognise(graphs: Graphs, images: Floats, generator: np.random.Generator) -> Labels:
    """The likeliest code of each image, [n, C, H, W] -> [n], by the encoder."""
    outputs = graphs.run(Role.ROLE_ENCODER, {Source.SOURCE_SAMPLE: images}, generator)
    likeliest: Labels = outputs[Meaning.MEANING_CLASS_PROBABILITY].argmax(axis=1)
    return likeliest


def information(graphs: Graphs, generator: np.random.Generator) -> dict[str, float]:
    """Lower bounds in nats on what samples tell of the code they were drawn for, and of a normal latent."""
    model = graphs.bundle.model
    count = len(model.class_names)
    prior = np.array(model.class_probabilities or [1 / count] * count)
    code = generator.choice(count, DRAWS, p=prior)
    given: dict[int, NDArray[np.int64] | Floats] = {Source.SOURCE_CLASS_LABEL: code}
    latent = None
    if graphs.takes(Role.ROLE_DECODER, Source.SOURCE_LATENT) and model.latent_spec.max_value == 0:
        latent = generator.standard_normal((DRAWS, *model.latent_spec.shape), np.float32)
        given[Source.SOURCE_LATENT] = latent
    images = graphs.run(Role.ROLE_DECODER, given, generator)[Meaning.MEANING_SAMPLE]
    guess = graphs.run(Role.ROLE_ENCODER, {Source.SOURCE_SAMPLE: images}, generator)
    chance = guess[Meaning.MEANING_CLASS_PROBABILITY][np.arange(DRAWS), code].astype(np.float64)
    smallest = np.finfo(np.float32).tiny  # what float32 rounds to 0 is taken for this
    found = {"code-information": float(np.log(np.maximum(chance, smallest)).mean() + entropy(prior))}
    if latent is not None and Meaning.MEANING_LATENT_LOG_VARIANCE in guess:
        found["latent-information"] = normal_information(
            latent, guess[Meaning.MEANING_LATENT_MEAN], guess[Meaning.MEANING_LATENT_LOG_VARIANCE]
        )
    return found


def entropy(probabilities: NDArray[np.float64]) -> float:
    """Entropy of a discrete distribution in nats."""
    some = probabilities[probabilities > 0]
    return float(-(some * np.log(some)).sum())


def normal_information(latent: Floats, mean: Floats, log_variance: Floats) -> float:
    """E ln N(z; mean, exp(log_variance)) + H of N(0, I) in nats, for draws z of N(0, I); all [n, *latent]."""
    log_variance = log_variance.astype(np.float64)
    squared = np.square(latent - mean, dtype=np.float64) * np.exp(-log_variance)
    log_density = -0.5 * (squared + log_variance + math.log(2 * math.pi)).reshape(len(latent), -1).sum(axis=1)
    dimensions = latent.size // len(latent)
    return float(log_density.mean() + dimensions / 2 * math.log(2 * math.pi * math.e))


def agreement(codes: Labels, labels: Labels) -> dict[str, float]:
    """Purity, and the share of images whose matched code is theirs; codes and labels of [n] images from 0."""
    table = np.zeros((codes.max() + 1, labels.max() + 1), np.int64)
    np.add.at(table, (codes, labels), 1)
    rows, columns = linear_sum_assignment(table, maximize=True)
    return {
        "code-purity": float(table.max(axis=1).sum() / len(codes)),
        "matched-accuracy": float(table[rows, columns].sum() / len(codes)),
    }


def measure(graphs: Graphs, held_out: Given, generator: np.random.Generator) -> dict[str, float]:
    """All of it, with real images and their labels by their source."""
    codes = recognise(graphs, held_out[Source.SOURCE_SAMPLE], generator)
    return agreement(codes, held_out[Source.SOURCE_CLASS_LABEL]) | information(graphs, generator)
