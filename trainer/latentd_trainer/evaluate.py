"""Measures a bundle by what its graphs answer in ONNX Runtime; writes the figures into its card or a report.

Samples are compared with real images in the feature space of a small classifier of the same data (`classifier`), by
the metrics of `metrics`. Nothing here needs the training run: what is measured is what is served.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from latentd.v1 import bundle_pb2, model_pb2
from numpy.typing import NDArray
from rich.console import Console

from latentd_trainer import bundle as bundles
from latentd_trainer import card as cards
from latentd_trainer import classifier, codes, metrics, report, start, variational
from latentd_trainer.bars import BARS, DATASET, bars_of
from latentd_trainer.classifier import Reading, Yardstick
from latentd_trainer.data import Dataset, Split, load, scale
from latentd_trainer.served import EvaluationError, Floats, Given, Graphs, Samples, draw_variants
from latentd_trainer.spec import Meaning, Role, Source

SAMPLE_COUNT = 1440
SUBSET_COUNT = 10
LARGEST_SUBSET = 1000
"""Rows on each side of the metrics that compare rows one by one; as many as are held out, but no more."""
BOUND_DRAWS = 500

__all__ = ["EvaluationError", "run"]


@dataclass(frozen=True)
class Real:
    """The real images, as the classifier reads them, and how far apart its own two parts are."""

    train: Reading
    held_out: Reading
    train_images: Floats  # [n, pixels]
    held_out_images: Floats  # [at most LARGEST_SUBSET, pixels]
    rows: int  # of every set that a Frechet ratio is made of: those held out, but no more than SAMPLE_COUNT
    floor: float  # Frechet distance of that many held-out images from the training images

    @classmethod
    def of(cls, dataset: Dataset, yardstick: Yardstick) -> "Real":
        """Read both splits."""
        images = [scale(split.pixels, dataset.info.levels) for split in (dataset.train, dataset.test)]
        train, held_out = (yardstick.read(each) for each in images)
        rows = min(len(held_out.features), SAMPLE_COUNT)
        floor = metrics.frechet_distance(held_out.features[spread(len(held_out.features), rows)], train.features)
        if floor == 0:
            raise EvaluationError("held-out and training images have the same features; nothing can be measured")
        flat = [each.reshape(len(each), -1) for each in images]
        return cls(train, held_out, flat[0], flat[1][spread(len(flat[1]), LARGEST_SUBSET)], rows, floor)


def run(
    directory: Path,
    *,
    data: str = DATASET,
    out: Path | None = None,
    card: bool = False,
    cache: Path | None = None,
    seed: int = 0,
    bars: bool = False,
    against: Path | None = None,
    threads: int | None = None,
    console: Console | None = None,
) -> int:
    """Evaluate a bundle; return the exit status: 1 if `bars` is set and one is missed, else 0.

    Writes `report.md` and `samples.png` into `out`. Without `out` they go into the bundle, and the metrics into its
    card.

    Args:
        directory: The bundle.
        data: What it was trained on, as `data.load` takes it.
        out: Where the report goes; the bundle's own directory if not given.
        card: Write the metrics into the card even if the report goes elsewhere.
        cache: Where the classifier is kept from one evaluation to the next; `classifier.default_cache()` if not given.
        seed: Of all draws and of the classifier.
        bars: Hold the metrics against `bars.BARS`, and name each one missed.
        against: Another bundle, to be measured in the same way; its figures go into the card beside this one's. A model
            that was tuned from another takes that one only.
        threads: Of ONNX Runtime; as many as there are cores, up to 4, if not given.
        console: Where progress and the table go.

    Raises:
        BundleError: the bundle cannot be read.
        DataError: the data cannot be read.
        EvaluationError: the bundle cannot be evaluated, or not on these data, or the outcome cannot be written.
    """
    console = console or Console()
    bundle = bundles.read(directory)
    model = bundle.model
    dataset = load(data)
    _require_data(directory, model, dataset)
    if bars and (dataset.info.name != DATASET or model.family not in BARS):
        known = ", ".join(model_pb2.Model.Family.Name(family) for family in BARS)
        raise EvaluationError(f"bars are set for {DATASET} and {known} only")
    threads = threads or min(4, os.cpu_count() or 1)
    graphs = _sampling_graphs(directory, bundle, threads)
    other, relation = None, ""
    if against is not None:
        other_bundle = bundles.read(against)
        relation = _relation(directory, against)
        _require_data(against, other_bundle.model, dataset)
        other = _sampling_graphs(against, other_bundle, threads)

    with console.status("classifier") as status:
        yardstick = _yardstick(dataset, cache, seed)
        real = Real.of(dataset, yardstick)
        asked = allotted_labels(model, dataset, SAMPLE_COUNT)
        results, drawn = _measured(graphs, dataset, yardstick, real, asked, seed, status.update)
        cards.record_figures(model.card, results, int(np.prod(dataset.info.shape)))
        if other is not None:
            its_labels = allotted_labels(other.bundle.model, dataset, SAMPLE_COUNT)
            its_figures, _ = _measured(other, dataset, yardstick, real, its_labels, seed, status.update)
            cards.record_comparison(model.card, relation, other.bundle.model, its_figures)

    limits = bars_of(model) if dataset.info.name == DATASET else []
    try:
        if card or out is None:
            bundles.replace_card(directory, model.card)
        shown_as = dataset.test.labels
        if codes.has_own_classes(model, dataset.info):
            images = scale(dataset.test.pixels, dataset.info.levels)
            shown_as = codes.recognise(graphs, images, np.random.default_rng([seed, 3]))
        written = report.write(out or directory, model, dataset, drawn, asked, shown_as, real_row(real, seed), limits)
    except OSError as error:
        raise EvaluationError(f"{error.filename}: cannot be written ({error.strerror})") from error
    report.show(console, model, limits)
    console.print(f"report: {written}", markup=False, highlight=False, soft_wrap=True)
    before = cards.start_figures(model.card)
    missed = [why for bar in limits if (why := bar.missed(results, before))] if bars else []
    for why in missed:
        console.print(f"missed: {why}", markup=False, highlight=False, soft_wrap=True)
    return 1 if missed else 0


def _sampling_graphs(directory: Path, bundle: bundle_pb2.Bundle, threads: int) -> Graphs:
    graphs = Graphs(directory, bundle, threads)
    if not {Role.ROLE_DECODER, Role.ROLE_DENOISER} & graphs.networks.keys():
        raise EvaluationError(f"{bundle.model.name} draws no samples: it has neither a decoder nor a denoiser")
    return graphs


def _relation(directory: Path, other: Path) -> str:
    """What the bundle in `other` is to the one in `directory`.

    Raises:
        EvaluationError: the one was tuned from another model than this.
    """
    recorded = bundles.read_record(directory) if (directory / bundles.RECORD_FILE).exists() else {}
    if recorded.get("start") is None:
        return "compared with"
    if not start.is_served_by(recorded["start"], other):
        raise EvaluationError(f"{directory} was tuned from other weights than those of {other}")
    return cards.TUNED_FROM


def _measured(
    graphs: Graphs,
    dataset: Dataset,
    yardstick: Yardstick,
    real: Real,
    asked: NDArray[np.int64],
    seed: int,
    say: Callable[[str], None],
) -> tuple[dict[str, float], list[Samples]]:
    """Every figure of a model, and the samples that they were measured on, one for each of `asked`."""
    model = graphs.bundle.model
    results = {"classifier-accuracy": yardstick.accuracy, "frechet-floor": real.floor}
    drawn = []
    for samples in draw_variants(graphs, asked, seed):
        say(f"{model.name}, samples: {samples.description}")
        if not np.isfinite(samples.images).all():
            raise EvaluationError(f"{model.name} draws samples that are not finite; `latentd-train verify` says more")
        reading = yardstick.read(samples.images)
        found = compare(samples.images, reading, real, seed)
        found["histogram-distance"] = metrics.class_histogram_distance(
            reading.labels, real.train.labels, len(dataset.info.class_names)
        )
        if model.class_names and not codes.has_own_classes(model, dataset.info):
            found["label-agreement"] = metrics.agreement(reading.labels, asked)
        results |= {name + samples.variant: value for name, value in found.items()}
        drawn.append(samples)
    say(f"{model.name}, likelihood")
    return results | likelihood(graphs, dataset, seed), drawn


def _yardstick(dataset: Dataset, cache: Path | None, seed: int) -> Yardstick:
    cache = cache or classifier.default_cache()
    try:
        return classifier.load_or_train(dataset, cache, seed)
    except OSError as error:
        raise EvaluationError(f"{cache}: cannot be used ({error.strerror}); name another place with --cache") from error


def allotted_labels(model: model_pb2.Model, dataset: Dataset, count: int) -> NDArray[np.int64]:
    """`count` labels in the shares of the training data, to one sample; without the noise of drawing them.

    [n] i64, in order of class.
    """
    shares = np.array(model.class_probabilities or dataset.info.class_probabilities) * count
    counts = np.floor(shares).astype(np.int64)
    short = count - counts.sum()
    counts[np.argsort(counts - shares, kind="stable")[:short]] += 1  # the largest remainders first
    return np.repeat(np.arange(len(counts)), counts)


def compare(images: Floats, reading: Reading, real: Real, seed: int) -> dict[str, float]:
    """The metrics of images [n, C, H, W], in order of class, against real ones, by name."""
    # The distance falls with the number of rows, so the ratio to the floor takes as many rows as the floor does. The
    # images are in order of class, so evenly spread ones make a part with the same shares of classes.
    part = spread(len(images), real.rows)
    distances = [
        metrics.frechet_distance(reading.features[part + k], real.train.features)
        for k in range(len(images) // len(part))
    ]
    try:
        neighbour_ratio = metrics.nearest_neighbour_ratio(
            images.reshape(len(images), -1), real.train_images, real.held_out_images
        )
    except ValueError as error:
        raise EvaluationError(f"{error}; the data need held-out images that were not trained on") from error
    return {
        "frechet-distance": metrics.frechet_distance(reading.features, real.train.features),
        "frechet-ratio": float(np.mean(distances)) / real.floor,
        "neighbour-ratio": neighbour_ratio,
        **_neighbourhoods(reading.features, real, seed),
    }


def real_row(real: Real, seed: int) -> dict[str, float]:
    """What real images score: held-out ones in distance to training ones, training ones among held-out ones."""
    neighbourhoods = _neighbourhoods(real.train.features, real, seed)
    return {"frechet-distance": real.floor, "frechet-ratio": 1.0, "neighbour-ratio": 1.0, **neighbourhoods}


def _neighbourhoods(features: Floats, real: Real, seed: int) -> dict[str, float]:
    """Mean over random subsets as large as the held-out split, since these metrics depend on the number of rows."""
    generator = np.random.default_rng([seed, 1])
    size = min(len(features), len(real.held_out.features), LARGEST_SUBSET)
    held_out = real.held_out.features[spread(len(real.held_out.features), size)]
    found = [
        metrics.neighbourhoods(held_out, features[generator.choice(len(features), size, replace=False)])
        for _ in range(SUBSET_COUNT)
    ]
    return {
        name: float(np.mean([getattr(each, name) for each in found]))
        for name in ("precision", "recall", "density", "coverage")
    }


def likelihood(graphs: Graphs, dataset: Dataset, seed: int) -> dict[str, float]:
    """What the scorer and the encoder tell of the held-out images: likelihoods or bounds in nats an image, the KL of
    latents, how often the likeliest class is the right one, and what codes are like.
    """
    generator = np.random.default_rng([seed, 2])
    given = _held_out(dataset.test, dataset.info.levels)
    found: dict[str, float] = {}
    bound, exact = Meaning.MEANING_EVIDENCE_LOWER_BOUND, Meaning.MEANING_LOG_LIKELIHOOD
    noises = (Source.SOURCE_NORMAL_NOISE, Source.SOURCE_UNIFORM_NOISE)
    if graphs.gives(Role.ROLE_SCORER, exact):
        found["log-likelihood"] = float(_log_likelihood(graphs, given, generator).mean())
    if graphs.gives(Role.ROLE_SCORER, bound) and any(graphs.takes(Role.ROLE_SCORER, noise) for noise in noises):
        weights = np.stack([graphs.run(Role.ROLE_SCORER, given, generator)[bound] for _ in range(BOUND_DRAWS)])
        found["elbo"] = float(weights.mean())
        found[f"iwae-{BOUND_DRAWS}"] = float(metrics.importance_weighted_bound(weights).mean())
        dimensions = int(np.prod(dataset.info.shape))
        found["bits-per-dimension"] = metrics.bits_per_dimension(found[f"iwae-{BOUND_DRAWS}"], dimensions)
    if cards.scored_by_denoiser(graphs.bundle):
        found |= variational.measure(graphs, given, generator)
    if graphs.gives(Role.ROLE_ENCODER, Meaning.MEANING_LATENT_LOG_VARIANCE):
        posterior = graphs.run(Role.ROLE_ENCODER, given, generator)
        divergence = metrics.normal_divergence(
            posterior[Meaning.MEANING_LATENT_MEAN], posterior[Meaning.MEANING_LATENT_LOG_VARIANCE]
        ).ravel()
        found |= {f"latent-kl-{index}": float(value) for index, value in enumerate(divergence)}
        found["smallest-latent-kl"] = float(divergence.min())
    elif graphs.gives(Role.ROLE_ENCODER, Meaning.MEANING_LATENT_MEAN):
        found |= _codes(graphs, given, generator)
    if graphs.gives(Role.ROLE_ENCODER, Meaning.MEANING_CLASS_PROBABILITY):
        if codes.has_own_classes(graphs.bundle.model, dataset.info):
            return found | codes.measure(graphs, given, generator)
        classes = codes.recognise(graphs, given[Source.SOURCE_SAMPLE], generator)
        found["accuracy"] = metrics.agreement(classes, given[Source.SOURCE_CLASS_LABEL])
    return found


def _log_likelihood(graphs: Graphs, given: Given, generator: np.random.Generator) -> NDArray[np.float64]:
    """Exact ln p(x) of each image in nats, [n]: over all classes, where the scorer takes one."""
    exact = Meaning.MEANING_LOG_LIKELIHOOD
    if not graphs.takes(Role.ROLE_SCORER, Source.SOURCE_CLASS_LABEL):
        return graphs.run(Role.ROLE_SCORER, given, generator)[exact].astype(np.float64)
    model = graphs.bundle.model
    probabilities = model.class_probabilities or [1 / len(model.class_names)] * len(model.class_names)
    each = []
    for label, probability in enumerate(probabilities):
        labelled = {**given, Source.SOURCE_CLASS_LABEL: np.full_like(given[Source.SOURCE_CLASS_LABEL], label)}
        each.append(graphs.run(Role.ROLE_SCORER, labelled, generator)[exact] + np.log(probability))
    total: NDArray[np.float64] = np.logaddexp.reduce(each, axis=0, dtype=np.float64)
    return total


def _codes(graphs: Graphs, given: Given, generator: np.random.Generator) -> dict[str, float]:
    """How well the encoder's codes keep the images, and, where codes are from 0 to 1, how nearly they are free bits."""
    codes = graphs.run(Role.ROLE_ENCODER, given, generator)[Meaning.MEANING_LATENT_MEAN]
    decoded = graphs.run(Role.ROLE_DECODER, {**given, Source.SOURCE_LATENT: codes}, generator)
    error = np.square(decoded[Meaning.MEANING_SAMPLE] - given[Source.SOURCE_SAMPLE])
    found = {"reconstruction-error": float(error.mean(dtype=np.float64))}
    if graphs.bundle.model.latent_spec.max_value == 1:
        flat = codes.reshape(len(codes), -1)
        found["code-mutual-information"] = metrics.pairwise_mutual_information(flat > 0.5)
        found["near-binary-share"] = metrics.near_binary_share(flat)
    return found


def _held_out(split: Split, levels: int) -> Given:
    rows = spread(len(split.labels), LARGEST_SUBSET)
    return {
        Source.SOURCE_SAMPLE: scale(split.pixels[rows], levels),
        Source.SOURCE_CLASS_LABEL: split.labels[rows],
    }


def spread(count: int, size: int) -> NDArray[np.int64]:
    """`size` of `count` rows, evenly spread, for the first ones may be all of one class; all of them if fewer."""
    size = min(size, count)
    return np.arange(size) * count // size


def _require_data(directory: Path, model: model_pb2.Model, dataset: Dataset) -> None:
    """Refuse data that the bundle was not trained on.

    Raises:
        EvaluationError: says what differs.
    """
    info = dataset.info
    if len(info.class_names) < 2:
        raise EvaluationError(f"{info.name} has one class only; evaluation needs labelled images of two or more")
    least = metrics.NEIGHBOURS + 1
    if min(len(dataset.train.labels), len(dataset.test.labels)) < least:
        raise EvaluationError(
            f"{info.name} has {len(dataset.train.labels)} images to train on and {len(dataset.test.labels)} held out; "
            f"evaluation needs at least {least} of each"
        )
    if tuple(model.sample_spec.shape) != info.shape:
        raise EvaluationError(
            f"{model.name} makes samples of shape {list(model.sample_spec.shape)}, {info.name} holds {list(info.shape)}"
        )
    has_record = (directory / bundles.RECORD_FILE).exists()
    trained_on = bundles.read_record(directory).get("info", {}).get("sha256") if has_record else None
    # Trained on these very data, a model with other classes found them by itself.
    if codes.has_own_classes(model, info) and trained_on != info.sha256:
        raise EvaluationError(
            f"{model.name} knows the classes {', '.join(model.class_names)}; "
            f"{info.name} has {', '.join(info.class_names)}"
        )
    if has_record and trained_on != info.sha256:
        raise EvaluationError(f"{model.name} was trained on other data than {info.name}, by their digests")
