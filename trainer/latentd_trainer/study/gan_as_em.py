"""The GAN's game, rewritten as variational EM over a label y that says real or generated.

Hu, Yang, Salakhutdinov, Xing: On unifying deep generative models, arXiv 1706.00550, section 3.

    p(x | y = 1) = p_data(x), p(x | y = 0) = p_g(x), p(y) = 1/2
    q(y | x)     the discriminator, q(1 | x) = D(x); turned around, q^r(y | x) = q(1 - y | x)
    E step       max over D of E_p(x, y) ln q(y | x)
    M step       max over G of E_p(x, y) ln q^r(y | x), the nonsaturating loss but for a constant
    lemma 1      at p_g = p_0 the M step's gradient is that of
                 -E_p(y) KL(p(x | y) || q^r(x | y)) + JS(p_g, p_data), q^r(x | y) ~ q^r(y | x) (p_0 + p_data) / 2

With the best D, D = p_data / (p_data + p_g) (Goodfellow et al., arXiv 1406.2661, proposition 1), the game's value is
2 JS - ln 4 (theorem 1), and the nonsaturating gradient is that of KL(p_g || p_data) - 2 JS (Arjovsky, Bottou,
arXiv 1701.04862, theorem 2.5): not of KL(p_g || p_data).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from latentd_trainer import data
from latentd_trainer.families.gan import Gan, discriminator_loss, generator_loss
from latentd_trainer.ladder import train
from latentd_trainer.study.exact_sums import divergence, gradient, relative_error
from latentd_trainer.study.section import Criterion, Section, Settings
from latentd_trainer.train import global_batch

_NETWORKS = {"width": 8, "hidden": 32, "latent": 8, "batch_size": 64}
_STEPS = 50
_POINTS = 8
_NEAR = 1e-3  # how far two distributions' logits differ that count as nearly equal


def expectation_objective(real: Tensor, generated: Tensor) -> Tensor:
    """E_p(x, y) ln q(y | x), from the discriminator's logits of p(x | y = 1) and p(x | y = 0), [n] each."""
    return 0.5 * (_log_q(real)[:, 1].mean() + _log_q(generated)[:, 0].mean())


def maximisation_objective(real: Tensor, generated: Tensor) -> Tensor:
    """E_p(x, y) ln q^r(y | x), from the same logits. Its first half does not depend on the generator."""
    return 0.5 * (_log_q(real)[:, 0].mean() + _log_q(generated)[:, 1].mean())


@dataclass(frozen=True)
class Finite:
    """Distributions over a few points, and a discriminator, by their logits, [points] f64 each."""

    model: Tensor
    data: Tensor
    discriminator: Tensor

    @property
    def log_model(self) -> Tensor:
        """Return ln p_g."""
        return self.model.log_softmax(dim=0)

    @property
    def log_data(self) -> Tensor:
        """Return ln p_data."""
        return self.data.log_softmax(dim=0)

    def value(self, discriminator: Tensor | None = None) -> Tensor:
        """E_data ln D + E_g ln(1 - D), the value of the game."""
        f = self.discriminator if discriminator is None else discriminator
        return self.log_data.exp() @ functional.logsigmoid(f) + self.log_model.exp() @ functional.logsigmoid(-f)

    def best_discriminator(self) -> Tensor:
        """The logits ln p_data - ln p_g of p_data / (p_data + p_g)."""
        return self.log_data - self.log_model

    def maximisation(self) -> Tensor:
        """-E_p(x, y) ln q^r(y | x), which the M step minimises."""
        generated = self.log_model.exp() @ functional.logsigmoid(self.discriminator)
        return -0.5 * (generated + self.log_data.exp() @ functional.logsigmoid(-self.discriminator))

    def lemma(self) -> Tensor:
        """E_p(y) KL(p(x | y) || q^r(x | y)) - JS(p_g, p_data), with p_0 the model as it is."""
        log_mixture = torch.logaddexp(self.log_model, self.log_data).detach() - math.log(2)
        of_generated = (functional.logsigmoid(self.discriminator) + log_mixture).log_softmax(dim=0)
        of_real = (functional.logsigmoid(-self.discriminator) + log_mixture).log_softmax(dim=0)
        away = 0.5 * (divergence(self.log_model, of_generated) + divergence(self.log_data, of_real))
        return away - jensen_shannon(self.log_model, self.log_data)


def jensen_shannon(log_one: Tensor, log_other: Tensor) -> Tensor:
    """JS in nats, from 0 to ln 2, from logarithms of probabilities."""
    log_mixture = torch.logaddexp(log_one, log_other) - math.log(2)
    return 0.5 * (divergence(log_one, log_mixture) + divergence(log_other, log_mixture))


def random_finite(seed: int, *, apart: float = 1.0) -> Finite:
    """Random logits; those of the data are off the model's by `apart` times a normal draw."""
    generator = torch.Generator().manual_seed(seed)
    model, away, discriminator = torch.randn((3, _POINTS), generator=generator, dtype=torch.float64)
    return Finite(model.requires_grad_(), model.detach() + apart * away, discriminator)


def trained_discriminator(finite: Finite) -> Tensor:
    """The logits that maximise the value of the game, found by L-BFGS."""
    f = torch.zeros_like(finite.data, requires_grad=True)
    optimizer = torch.optim.LBFGS([f], max_iter=500, tolerance_grad=1e-12, tolerance_change=1e-18)

    def closure() -> Tensor:
        optimizer.zero_grad()
        cost = -finite.value(f)
        (f.grad,) = torch.autograd.grad(cost, f)
        return cost

    optimizer.step(closure)  # type: ignore[no-untyped-call]  # torch leaves it unannotated
    return f.detach()


def study(settings: Settings) -> Section:
    """Both forms on trained networks and digits; then the theorems on finite distributions."""
    settings.tell("trains a small GAN")
    figures = _on_networks(settings) | _on_points(settings.seed)
    criteria = (
        Criterion("E step: the same loss (error)", "networks/discriminator-loss-error", "<=", 1e-6),
        Criterion("and the same gradient (relative error)", "networks/discriminator-gradient-error", "<=", 1e-5),
        Criterion("M step: the same loss (error)", "networks/generator-loss-error", "<=", 1e-6),
        Criterion("and the same gradient (relative error)", "networks/generator-gradient-error", "<=", 1e-5),
        Criterion("lemma 1 (relative error of the gradient)", "points/lemma-error", "<=", 1e-12),
        Criterion("the best D is p_data / (p_data + p_g) (error)", "points/best-discriminator-error", "<=", 1e-6),
        Criterion("the game's value there is 2 JS - ln 4 (error)", "points/value-error", "<=", 1e-12),
        Criterion("minimax then follows 2 JS (relative error)", "points/minimax-error", "<=", 1e-12),
        Criterion(
            "nonsaturating follows KL(p_g‖p_data) - 2 JS (relative error)", "points/asymmetric-error", "<=", 1e-12
        ),
        Criterion("which is not KL(p_g‖p_data) (relative error)", "points/reverse-kl-error", ">", 0.1),
        Criterion("but half of it where p_g is nearly p_data (relative error)", "points/near-error", "<=", 0.01),
    )
    body = (
        "The rewriting is exact, and it is only that: the same losses with other names. What is often drawn from it, "
        "that a GAN minimises KL(p_g‖p_data) where a VAE minimises KL(p_data‖p), leaves out the term with JS. On these "
        "random distributions the nonsaturating loss's gradient and that of KL(p_g‖p_data) have a cosine of "
        f"{figures['points/reverse-kl-cosine']:.3f} and norms in a ratio of {figures['points/reverse-kl-ratio']:.3f}."
    )
    return Section(
        title="A GAN as variational EM",
        claim="With q(y given x) = D as the E step and its turned-around form as the target of the M step, the GAN's "
        "game is variational EM (Hu et al. 2017, section 3, lemma 1).",
        measured="Losses and gradients of both forms in float32, on a small conditional GAN trained on digits for "
        f"{_STEPS} steps, with {_NETWORKS['batch_size']} real and as many generated images. "
        f"The theorems on random distributions over {_POINTS} points in float64, where every expectation is a sum.",
        figures=figures,
        criteria=criteria,
        body=body,
    )


def _on_networks(settings: Settings) -> dict[str, float]:
    digits = data.load("digits")
    gan = train("gan", {**_NETWORKS, "steps": _STEPS}, digits, settings.seed)
    assert isinstance(gan, Gan)
    batch = global_batch(digits, gan.config.batch_size, _STEPS, settings.seed)
    latent = torch.randn((len(batch.labels), gan.config.latent), generator=torch.Generator().manual_seed(settings.seed))
    real = gan.discriminator(batch.images, batch.labels)
    generated = gan.discriminator(gan.generator(latent, batch.labels), batch.labels)
    expected, game = -2 * expectation_objective(real, generated), discriminator_loss("nonsaturating", real, generated)
    constant = functional.softplus(real).mean()  # the M step's cost of the real images
    maximised = -2 * maximisation_objective(real, generated)
    escape = generator_loss("nonsaturating", generated)
    return {
        "networks/discriminator-loss": game.item(),
        "networks/discriminator-loss-error": abs((expected - game).item()),
        "networks/discriminator-gradient-error": _gradient_error(expected, game, gan.discriminator),
        "networks/generator-loss": escape.item(),
        "networks/generator-loss-error": abs((maximised - constant - escape).item()),
        "networks/generator-gradient-error": _gradient_error(maximised, escape, gan.generator),
    }


def _on_points(seed: int) -> dict[str, float]:
    anything = random_finite(seed)
    best = Finite(anything.model, anything.data, anything.best_discriminator().detach())
    followed = 2 * _by_model(best, best.maximisation())
    reversed_kl = _by_model(best, divergence(best.log_model, best.log_data))
    shannon = _by_model(best, jensen_shannon(best.log_model, best.log_data))
    near = random_finite(seed, apart=_NEAR)
    near = Finite(near.model, near.data, near.best_discriminator().detach())
    half = 0.5 * _by_model(near, divergence(near.log_model, near.log_data))
    with torch.no_grad():
        value_error = best.value() - (2 * jensen_shannon(best.log_model, best.log_data) - math.log(4))
        found = trained_discriminator(anything)
    return {
        "points/lemma-error": relative_error(
            _by_model(anything, anything.maximisation()), _by_model(anything, anything.lemma())
        ),
        "points/best-discriminator-error": float((found.sigmoid() - best.discriminator.sigmoid()).abs().max()),
        "points/value-error": abs(float(value_error)),
        "points/minimax-error": relative_error(_by_model(best, best.value()), 2 * shannon),
        "points/asymmetric-error": relative_error(followed, reversed_kl - 2 * shannon),
        "points/reverse-kl-error": relative_error(followed, reversed_kl),
        "points/reverse-kl-cosine": float(functional.cosine_similarity(followed, reversed_kl, dim=0)),
        "points/reverse-kl-ratio": float(followed.norm() / reversed_kl.norm()),
        "points/near-error": relative_error(2 * _by_model(near, near.maximisation()), half),
    }


def _log_q(logits: Tensor) -> Tensor:
    """Return ln q(y | x) for y of 0 and 1, [n] -> [n, 2]."""
    return torch.stack([torch.zeros_like(logits), logits], dim=1).log_softmax(dim=1)


def _by_model(finite: Finite, value: Tensor) -> Tensor:
    (found,) = torch.autograd.grad(value, finite.model)
    return found


def _gradient_error(found: Tensor, right: Tensor, module: nn.Module) -> float:
    return relative_error(gradient(found, module), gradient(right, module))
