"""How good the families must be on the embedded digits, whatever the seed: what CI holds them to.

The Frechet distance to the training images is judged as a multiple of the distance of real held-out images, which
makes it comparable between classifiers. Real images, measured as samples are, have precision .95, recall .91 and
coverage .98 here.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from latentd.v1 import model_pb2

DATASET = "digits"
"""The only data these bars are set for."""


@dataclass(frozen=True)
class Bar:
    """A limit on one metric of the card."""

    metric: str
    limit: float
    at_most: bool = False  # else the metric must be at least `limit`
    change: bool = False  # the limit is on how far the metric is from that of the model it was tuned from

    def __str__(self) -> str:
        return f"{'change of ' * self.change}{self.metric} {'<=' if self.at_most else '>='} {self.limit:g}"

    def value(self, metrics: Mapping[str, float], start: Mapping[str, float] | None = None) -> float | None:
        """What the limit is on, if it was measured.

        Args:
            metrics: The model's.
            start: Those of the model that it was tuned from, if it was.
        """
        before = (start or {}) if self.change else {self.metric: 0.0}
        if self.metric not in metrics or self.metric not in before:
            return None
        return metrics[self.metric] - before[self.metric]

    def missed(self, metrics: Mapping[str, float], start: Mapping[str, float] | None = None) -> str:
        """Why the metrics miss the bar, see `value`; empty if they clear it."""
        value = self.value(metrics, start)
        if value is None:
            return f"{self}: was not measured" + ", as --against names no model that it was tuned from" * self.change
        clear = value <= self.limit if self.at_most else value >= self.limit  # NaN clears nothing
        return "" if clear else f"{self}: is {value:.4g}"


def _samples(variant: str, ratio: float, precision: float, recall: float, agreement: float) -> list[Bar]:
    return [
        Bar(f"frechet-ratio{variant}", ratio, at_most=True),
        Bar(f"precision{variant}", precision),
        Bar(f"recall{variant}", recall),
        Bar(f"label-agreement{variant}", agreement),
    ]


BARS: "dict[model_pb2.Model.Family.ValueType, list[Bar]]" = {
    model_pb2.Model.FAMILY_DIFFUSION: [
        bar
        for variant in ("-50-steps", "-10-steps")
        for bar in (*_samples(variant, 2.5, 0.92, 0.87, 0.97), Bar(f"coverage{variant}", 0.95))
    ],
    model_pb2.Model.FAMILY_HELMHOLTZ_MACHINE: [Bar("iwae-500", -18.0)],  # nats, ln p(binary image)
    model_pb2.Model.FAMILY_NAIVE_BAYES: [Bar("accuracy", 0.9)],
    model_pb2.Model.FAMILY_PREDICTABILITY_MINIMIZATION: [
        # A plain autoencoder's codes have .008 to .009 nats and 2 % near an end, and it keeps images to .027.
        Bar("code-mutual-information", 0.0028, at_most=True),
        Bar("near-binary-share", 0.8),
        Bar("reconstruction-error", 0.15, at_most=True),
    ],
    model_pb2.Model.FAMILY_SIGMOID_BELIEF_NET: [Bar("iwae-500", -20.0)],  # nats, ln p(binary image)
    model_pb2.Model.FAMILY_GAN: [
        *_samples("", 5.0, 0.88, 0.85, 0.965),
        Bar("reconstruction-error", 0.08, at_most=True),  # other samples of the class: .32; their mean image: .18
    ],
    model_pb2.Model.FAMILY_INFO_GAN: [
        Bar("code-information", 2.0),  # nats; ln 10 = 2.303 is all there is
        Bar("code-purity", 0.55),
    ],
    model_pb2.Model.FAMILY_VAE_GAN: [
        Bar("frechet-ratio-mean", 0.0, at_most=True, change=True),
        Bar("recall-mean", 0.05, change=True),
        Bar("iwae-500", -1.0, change=True),  # nats, ln p(image | label)
        Bar("label-agreement-mean", 0.965),
    ],
    model_pb2.Model.FAMILY_VAE: [
        Bar("iwae-500", -80.5),  # nats, ln p(image | label)
        Bar("smallest-latent-kl", 0.1),  # nats; below this a dimension carries nothing
        Bar("label-agreement-mean", 0.98),
    ],
}
"""The limits by family."""

LATENT_DIFFUSION = [
    bar
    for variant in ("-50-steps", "-10-steps")
    for bar in (*_samples(variant, 2.0, 0.95, 0.6, 0.97), Bar(f"coverage{variant}", 0.95))
]
"""Of diffusion over a VAE's latents: nearer to real images than that VAE, whose decoder leaves little recall."""


WAKE_SLEEP = [Bar("iwae-500", -19.0)]
"""Of a Helmholtz machine whose objective is not the reweighted one."""


def bars_of(model: model_pb2.Model, settings: Mapping[str, object]) -> list[Bar]:
    """The bars of a model of the embedded digits, trained with these settings; empty if there are none."""
    if model.HasField("latent_space"):
        return LATENT_DIFFUSION
    if settings.get("objective") == "ws":
        return WAKE_SLEEP
    return BARS.get(model.family, [])
