"""Gaussian naive Bayes: given the class, every pixel is a normal variable of its own.

The oldest generative classifier; Bishop, Pattern Recognition and Machine Learning (2006), sections 4.2 and 8.2.2.

    model         p(y) p(x | y), with p(x | y = k) = prod_j N(x_j; m_kj, v_kj)
    fit           maximum likelihood in closed form: p(y = k) = N_k / N, m_kj the mean and v_kj the mean squared
                  deviation of pixel j in class k, to which a floor is added, for a pixel that never varies in a
                  class would make any other value impossible
    floor         the largest, of a grid, that classifies the training images as well as any when each in turn is left
                  out of the fit (cross-validation). Likelihood is no guide: pixels have levels, and the density of
                  one that never varies grows without bound as the floor falls
    classify      P(y | x) = p(x | y) p(y) / p(x),  p(x) = sum_k p(x | y = k) p(y = k)
    sample        x = m_y + sqrt(v_y) * eps, eps ~ N(0, I): eps is the latent, and eps = 0 gives the class's mean

Arithmetic is in float64, in the served graphs too, for terms of thousands of nats cancel in P(y | x).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from latentd.v1 import model_pb2, tensor_pb2
from torch import Tensor, nn

from latentd_trainer.data import DataInfo
from latentd_trainer.families import Batch, Family, Moment, below, setting
from latentd_trainer.spec import Graph, GraphInput, GraphOutput, Likelihood, Meaning, Role, ServingSpec, Source

FLOORS = tuple(10.0 ** (exponent / 2) for exponent in range(-12, 1))
"""The grid, from 1e-6 to 1 in units of the images' range of -1 to 1."""


@dataclass(frozen=True)
class NaiveBayesConfig:
    """Settings of fitting Gaussian naive Bayes."""

    steps: int = setting(1, "1: the fit is in closed form")
    batch_size: int = setting(0, "images that are fitted to; 0 is all of them")
    variance_floor: float = setting(0.0, "added to every variance; 0 chooses it by cross-validation")

    def __post_init__(self) -> None:
        problems = [] if self.steps == 1 else [f"steps={self.steps}: must be 1: the fit is in closed form"]
        problems += below(self, batch_size=0, variance_floor=0)
        if problems:
            raise ValueError("; ".join(problems))


class ClassNormals(nn.Module):
    """p(y) and p(x | y), fitted.

    Args:
        class_count: of y.
        pixels: of x.
    """

    log_prior: Tensor  # [classes] f64
    mean: Tensor  # [classes, pixels] f64
    variance: Tensor  # [classes, pixels] f64, with the floor

    def __init__(self, class_count: int, pixels: int) -> None:
        super().__init__()
        self.register_buffer("log_prior", torch.full((class_count,), -math.log(class_count), dtype=torch.float64))
        self.register_buffer("mean", torch.zeros((class_count, pixels), dtype=torch.float64))
        self.register_buffer("variance", torch.ones((class_count, pixels), dtype=torch.float64))

    def fit(self, x: Tensor, labels: Tensor, floor: float) -> None:
        """Set everything to its maximum-likelihood value, and add the floor to the variances.

        Args:
            x: [n, pixels] f64.
            labels: [n] i64.
            floor: added to every variance.

        Raises:
            ValueError: some class has no image.
        """
        one_hot = nn.functional.one_hot(labels, len(self.log_prior)).to(x.dtype)
        counts = one_hot.sum(dim=0)
        if not bool((counts > 0).all()):
            empty = ", ".join(map(str, (counts == 0).nonzero().flatten().tolist()))
            raise ValueError(f"naive Bayes needs an image of every class; there is none of {empty}")
        self.log_prior.copy_((counts / len(x)).log())
        self.mean.copy_(one_hot.t() @ x / counts[:, None])
        self.variance.copy_(one_hot.t() @ (x - self.mean[labels]).square() / counts[:, None] + floor)

    def log_likelihood(self, x: Tensor) -> Tensor:
        """Return ln p(x | y) for every class: [n, pixels] f64 -> [n, classes] f64, in nats."""
        return _log_likelihood(x, self.mean, 1 / self.variance, self.log_scale)

    @property
    def log_scale(self) -> Tensor:
        """Log of the density at the mean, [classes] f64."""
        return -0.5 * (2 * math.pi * self.variance).log().sum(dim=1)

    def log_joint(self, x: Tensor) -> Tensor:
        """Return ln p(x, y) for every class: [n, pixels] f64 -> [n, classes] f64, in nats."""
        return self.log_likelihood(x) + self.log_prior


def _log_likelihood(x: Tensor, mean: Tensor, precision: Tensor, log_scale: Tensor) -> Tensor:
    return log_scale - 0.5 * ((x[:, None] - mean).square() * precision).sum(dim=2)


def choose_floor(x: Tensor, labels: Tensor, class_count: int) -> float:
    """The largest floor of the grid that classifies as well as any, each image by a fit to all others.

    As well means within one standard error of the best share: what is more regular is preferred where accuracy cannot
    tell (Breiman et al., Classification and Regression Trees, 1984).

    Leaving out image x of a class of N images moves the class's mean by (m - x) / (N - 1), and its variance to
    N / (N - 1) (v - (x - m)^2 / (N - 1)); other classes stay as they are, so that no second fit is needed.

    Args:
        x: [n, pixels] f64.
        labels: [n] i64.
        class_count: classes there are.

    Raises:
        ValueError: some class has fewer than two images.
    """
    counts = labels.bincount(minlength=class_count)
    if int(counts.min()) < 2:
        raise ValueError("choosing a variance floor takes two images of every class; set variance_floor")
    model = ClassNormals(class_count, x.shape[1]).to(x.device)
    model.fit(x, labels, 0.0)
    others = (counts[labels] - 1).double()[:, None]  # images of the same class
    mean, variance = model.mean[labels], model.variance[labels]
    without = mean + (mean - x) / others
    spread = (variance - (x - mean).square() / others).clamp(min=0) * (others + 1) / others
    log_share = (others[:, 0] / len(x)).log()

    def right(floor: float) -> int:
        model.fit(x, labels, floor)
        joint = model.log_joint(x)
        own = _log_density(x, without, spread + floor) + log_share
        joint[torch.arange(len(x)), labels] = own
        return int((joint.argmax(dim=1) == labels).sum())

    found = {floor: right(floor) for floor in FLOORS}
    best = max(found.values())
    standard_error = math.sqrt(best * (len(x) - best) / len(x))  # in images
    largest: float = max(floor for floor, count in found.items() if count >= best - standard_error)
    return largest


def _log_density(x: Tensor, mean: Tensor, variance: Tensor) -> Tensor:
    """Log of N(x; mean, variance) of rows [n, pixels] f64 -> [n]."""
    return -0.5 * ((x - mean).square() / variance + (2 * math.pi * variance).log()).sum(dim=1)


class PosteriorGraph(nn.Module):
    """What is served as the encoder: sample -> P(y | x), [n, classes] f32."""

    def __init__(self, model: ClassNormals) -> None:
        super().__init__()
        self.mean, self.precision = (nn.Buffer(value) for value in (model.mean, 1 / model.variance))
        self.log_scale = nn.Buffer(model.log_scale + model.log_prior)

    def forward(self, sample: Tensor) -> Tensor:
        """See the class."""
        log_joint = _log_likelihood(sample.flatten(1).double(), self.mean, self.precision, self.log_scale)
        return log_joint.softmax(dim=1).float()


class LikelihoodGraph(nn.Module):
    """What is served as the scorer: (sample, label) -> ln p(x | y), [n] f32."""

    def __init__(self, model: ClassNormals) -> None:
        super().__init__()
        self.mean, self.precision = (nn.Buffer(value) for value in (model.mean, 1 / model.variance))
        self.log_scale = nn.Buffer(model.log_scale)

    def forward(self, sample: Tensor, label: Tensor) -> Tensor:
        """See the class."""
        squares = (sample.flatten(1).double() - self.mean[label]).square() * self.precision[label]
        return (self.log_scale[label] - 0.5 * squares.sum(dim=1)).float()


class SampleGraph(nn.Module):
    """What is served as the decoder: (latent, label) -> m_y + sqrt(v_y) * latent, [n, C, H, W] f32."""

    def __init__(self, model: ClassNormals, shape: tuple[int, int, int]) -> None:
        super().__init__()
        self.mean = nn.Buffer(model.mean.float().view(-1, *shape))
        self.deviation = nn.Buffer(model.variance.sqrt().float().view(-1, *shape))

    def forward(self, latent: Tensor, label: Tensor) -> Tensor:
        """See the class."""
        return self.mean[label] + self.deviation[label] * latent


class NaiveBayes(Family):
    """The fitted normals; there is nothing to follow a gradient."""

    config_type = NaiveBayesConfig
    config: NaiveBayesConfig

    def __init__(self, config: NaiveBayesConfig, info: DataInfo) -> None:
        super().__init__(config, info)
        self.model = ClassNormals(len(info.class_names), math.prod(info.shape))
        self.modules = {"model": self.model}
        self.averages = {}
        self.updaters = {}

    def step(self, batch: Batch, moment: Moment) -> dict[str, Tensor]:
        """Fit, all at once. Losses: `loss`, -ln p(x, y) in nats, and `variance_floor`.

        Raises:
            ValueError: several processes; images of some class are missing, or too few to choose the floor on.
        """
        if moment.shard.count > 1:
            raise ValueError("naive_bayes is fitted in closed form, by one process; start it without torchrun")
        x, labels = batch.images.flatten(1).double(), batch.labels
        floor = self.config.variance_floor or choose_floor(x, labels, len(self.info.class_names))
        self.model.fit(x, labels, floor)
        loss = -self.model.log_joint(x).gather(1, labels[:, None]).mean()
        return {"loss": loss, "variance_floor": torch.tensor(floor)}

    def sample(self, labels: Tensor, seed: int) -> Tensor:
        """See `Family.sample`; normal variables, so a few pixels lie outside of the range."""
        noise = torch.randn((len(labels), *self.info.shape), generator=torch.Generator().manual_seed(seed))
        mean, variance = (part.cpu()[labels].view_as(noise) for part in (self.model.mean, self.model.variance))
        return (mean + variance.sqrt() * noise).float()

    def serving_spec(self) -> ServingSpec:
        """Class and noise to image as decoder, P(y | x) as encoder, ln p(x | y) as scorer."""
        shape = self.info.shape
        sample = GraphInput("sample", Source.SOURCE_SAMPLE, shape)
        label = GraphInput("label", Source.SOURCE_CLASS_LABEL, (), tensor_pb2.DATA_TYPE_INT64)
        classes = (len(self.info.class_names),)
        graphs = (
            Graph(
                role=Role.ROLE_DECODER,
                module=SampleGraph(self.model, shape).eval(),
                inputs=(GraphInput("latent", Source.SOURCE_LATENT, shape), label),
                outputs=(GraphOutput("image", Meaning.MEANING_SAMPLE, shape),),
            ),
            Graph(
                role=Role.ROLE_ENCODER,
                module=PosteriorGraph(self.model).eval(),
                inputs=(sample,),
                outputs=(GraphOutput("class_probability", Meaning.MEANING_CLASS_PROBABILITY, classes),),
            ),
            Graph(
                role=Role.ROLE_SCORER,
                module=LikelihoodGraph(self.model).eval(),
                inputs=(sample, label),
                outputs=(GraphOutput("log_likelihood", Meaning.MEANING_LOG_LIKELIHOOD, ()),),
            ),
        )
        return ServingSpec(
            family=model_pb2.Model.FAMILY_NAIVE_BAYES,
            graphs=graphs,
            methods=(
                model_pb2.Model.METHOD_SAMPLE,
                model_pb2.Model.METHOD_ENCODE,
                model_pb2.Model.METHOD_DECODE,
                model_pb2.Model.METHOD_SCORE,
            ),
            sample_shape=shape,
            latent_shape=shape,
            description=(
                "Gaussian naive Bayes: given the class, every pixel is normal and independent. Encode answers "
                "P(class given image). The latent is the deviation from the class's mean in standard deviations, so "
                "that decoding zeros gives the mean. Scores are exact log densities in the images' range of -1 to 1."
            ),
            reference_uri="https://link.springer.com/book/9780387310732",
            likelihood=Likelihood(
                kind=Likelihood.KIND_EXACT,
                measure=Likelihood.MEASURE_DENSITY,
                explanation="Of pixels as real numbers from -1 to 1: normal given the class, summed over classes.",
            ),
            answers={
                model_pb2.Model.METHOD_SAMPLE: "the class's mean and normal deviations of every pixel",
                model_pb2.Model.METHOD_DECODE: "the class's mean and the given deviations; the mean for zeros",
            },
        )
