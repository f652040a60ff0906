"""InfoGAN's bound on what samples tell of their codes, and what codes tell of the data's classes."""

import contextlib
import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
from latentd.v1 import bundle_pb2, model_pb2
from latentd_trainer import codes
from latentd_trainer.data import DataInfo
from latentd_trainer.families import Batch, Moment
from latentd_trainer.families.infogan import Codes, Guess, InfoGan, InfoGanConfig
from latentd_trainer.shard import Shard
from latentd_trainer.spec import Meaning, Role, Source

INFO = DataInfo("tiny", (1, 8, 8), 17, ("a", "b", "c"), (1 / 3,) * 3, "0" * 64)


def moment(step: int) -> Moment:
    return Moment(step, 100, torch.Generator().manual_seed(step), Shard(), contextlib.nullcontext)


def stripes(step: int) -> Batch:
    """Images of three kinds: the upper half lit, the left half, or nothing; with some noise."""
    generator = torch.Generator().manual_seed(1000 + step)
    labels = torch.randint(3, (32,), generator=generator)
    kinds = torch.full((3, 1, 8, 8), -0.8)
    kinds[0, :, :4], kinds[1, :, :, :4] = 0.8, 0.8
    return Batch(kinds[labels] + 0.1 * torch.randn((32, 1, 8, 8), generator=generator), labels)


def test_log_probabilities_are_those_of_torch_s_distributions() -> None:
    """Ln q(k | x) is a categorical's, ln q(c | x) a diagonal normal's, for each image."""
    torch.manual_seed(0)
    guess = Guess(torch.randn(5, 3), torch.randn(5, 2), torch.randn(5, 2))
    drawn = Codes(torch.tensor([0, 1, 2, 1, 0]), torch.randn(5, 2), torch.randn(5, 4))
    category, continuous = guess.log_probability(drawn)
    expected = torch.distributions.Categorical(logits=guess.logits).log_prob(drawn.category)
    torch.testing.assert_close(category, expected)
    normal = torch.distributions.Normal(guess.mean, (guess.log_variance / 2).exp())
    torch.testing.assert_close(continuous, normal.log_prob(drawn.continuous).sum(dim=1))


def test_samples_come_to_tell_their_codes() -> None:
    """In sixty steps on three kinds of images the bound comes near ln 3, all there is, without a label being used;
    the discriminator's own features learn to tell codes apart. As a plain GAN, with weights of 0, it stays at nothing.
    """
    bounds = {}
    for weight in (1.0, 0.0):
        torch.manual_seed(0)
        config = InfoGanConfig(
            width=8,
            hidden=32,
            codes=3,
            noise=4,
            learning_rate=2e-3,
            information=weight,
            continuous_information=weight / 10,
        )
        model = InfoGan(config, INFO)
        losses = [model.step(stripes(step), moment(step)) for step in range(60)]
        bounds[weight] = torch.stack([each["information"] for each in losses[-10:]]).mean().item()
    assert bounds[1.0] > 0.85 * math.log(3)
    assert bounds[0.0] < 0.1


def test_the_trunk_and_the_generator_learn_what_tells_codes_apart() -> None:
    """With the information counted the trunk that both heads stand on moves elsewhere, and the generator too."""
    moved = []
    for weight in (0.0, 5.0):
        torch.manual_seed(0)
        model = InfoGan(InfoGanConfig(width=8, hidden=16, codes=3, information=weight), INFO)
        for step in range(3):
            model.step(stripes(step), moment(step))
        moved.append([*model.critic.trunk.parameters(), *model.generator.parameters()])
    assert not [one for one, other in zip(*moved, strict=True) if torch.equal(one, other)]


class Channel:
    """A model whose sample is its code's number and its latent; its encoder tells the code but for one in ten, and the
    latent but for noise of a hundredth of its variance.
    """

    def __init__(self, *, uniform: bool = False) -> None:
        latent = model_pb2.TensorSpec(shape=[1], max_value=1.0 if uniform else 0.0)
        self.bundle = bundle_pb2.Bundle(
            model=model_pb2.Model(class_names=["p", "q"], class_probabilities=[0.25, 0.75], latent_spec=latent)
        )

    def takes(self, role: int, source: int) -> bool:
        return (role, source) == (Role.ROLE_DECODER, Source.SOURCE_LATENT)

    def run(self, role: int, given: Any, generator: np.random.Generator) -> dict[int, Any]:
        if role == Role.ROLE_DECODER:
            latent = given.get(Source.SOURCE_LATENT, np.zeros((codes.DRAWS, 1), np.float32))
            return {Meaning.MEANING_SAMPLE: np.stack([given[Source.SOURCE_CLASS_LABEL], latent[:, 0]], axis=1)}
        images = given[Source.SOURCE_SAMPLE]
        code, count = images[:, 0].astype(int), len(images)
        right = np.full((count, 2), 0.1, np.float32)
        right[np.arange(count), code] = 0.9
        noise = 0.1 * generator.standard_normal((count, 1))
        return {
            Meaning.MEANING_CLASS_PROBABILITY: right,
            Meaning.MEANING_LATENT_MEAN: (images[:, 1:] + noise).astype(np.float32),
            Meaning.MEANING_LATENT_LOG_VARIANCE: np.full((count, 1), math.log(0.01), np.float32),
        }


def test_the_bounds_measured_are_those_of_the_channel() -> None:
    """E ln q + H, of code and latent: ln .9 more than the entropy of the codes, and 1/2 ln 100 nats of the latent."""
    found = codes.information(Channel(), np.random.default_rng(0))  # type: ignore[arg-type]  # stands in for Graphs
    entropy = -(0.25 * math.log(0.25) + 0.75 * math.log(0.75))
    assert found["code-information"] == pytest.approx(entropy + math.log(0.9), abs=1e-6)
    assert found["latent-information"] == pytest.approx(0.5 * math.log(100), abs=0.05)


def test_the_latent_is_measured_where_its_prior_is_normal_alone() -> None:
    """A uniform latent has another entropy, and a normal guess at it no place to speak of."""
    found = codes.information(Channel(uniform=True), np.random.default_rng(0))  # type: ignore[arg-type]  # as above
    assert found.keys() == {"code-information"}


def test_the_bound_is_never_above_the_entropy_and_finite_where_chances_round_to_zero() -> None:
    """A chance that float32 rounds to 0 makes the bound very low, not infinite."""

    class Wrong(Channel):
        def run(self, role: int, given: Any, generator: np.random.Generator) -> dict[int, Any]:
            outputs = super().run(role, given, generator)
            if role == Role.ROLE_ENCODER:
                outputs[Meaning.MEANING_CLASS_PROBABILITY] = np.tile(np.array([[0, 1]], np.float32), (codes.DRAWS, 1))
            return outputs

    found = codes.information(Wrong(), np.random.default_rng(0))  # type: ignore[arg-type]  # as above
    assert -30 < found["code-information"] < -10


def test_purity_and_matching_are_what_counting_gives() -> None:
    """Purity takes each code's commonest class; matching the best of all one-to-one maps, by brute force."""
    generator = np.random.default_rng(0)
    found, labels = generator.integers(0, 4, 200), generator.integers(0, 4, 200)
    counts = [[int(np.sum((found == code) & (labels == label))) for label in range(4)] for code in range(4)]
    best = max(sum(counts[code][label] for code, label in enumerate(map_)) for map_ in itertools.permutations(range(4)))
    expected = {"code-purity": sum(max(row) for row in counts) / 200, "matched-accuracy": best / 200}
    assert codes.agreement(found, labels) == pytest.approx(expected)


def test_codes_may_be_more_or_fewer_than_classes() -> None:
    """Two codes for one class are pure, and one of them is matched."""
    assert codes.agreement(np.array([0, 1, 2, 2]), np.array([0, 0, 1, 1])) == {
        "code-purity": 1.0,
        "matched-accuracy": 0.75,
    }
    assert codes.agreement(np.array([0, 0, 0]), np.array([0, 1, 2]))["code-purity"] == pytest.approx(1 / 3)


def test_settings_out_of_range_are_refused_together() -> None:
    """Every setting that is not allowed is named in one error."""
    with pytest.raises(
        ValueError, match=r"codes=1: must be at least 2; .*information=-1.*; loss='wasserstein'.*width=0"
    ):
        InfoGanConfig(codes=1, information=-1, loss="wasserstein", width=0)
