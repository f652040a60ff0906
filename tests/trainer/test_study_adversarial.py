"""The studies of the GAN's losses, against definitions written out another way."""

import math
from pathlib import Path

import pytest
import torch
from latentd_trainer.study import gan_as_em, vanishing_gradient
from latentd_trainer.study.exact_sums import divergence
from latentd_trainer.study.section import Settings
from torch.nn import functional


def test_objectives_are_cross_entropies_of_the_label() -> None:
    """The E step scores D as a classifier of y, the M step one whose labels are turned around."""
    real, generated = torch.randn((2, 6), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    logits = torch.cat([real, generated])
    label = torch.cat([torch.ones_like(real), torch.zeros_like(generated)])
    entropy = functional.binary_cross_entropy_with_logits
    torch.testing.assert_close(gan_as_em.expectation_objective(real, generated), -entropy(logits, label))
    torch.testing.assert_close(gan_as_em.maximisation_objective(real, generated), -entropy(logits, 1 - label))


def test_jensen_shannon_runs_from_nothing_to_ln_two() -> None:
    """0 for equal distributions, ln 2 for disjoint ones, and symmetric."""
    one = torch.tensor([0.5, 0.5, 1e-300, 1e-300], dtype=torch.float64)
    assert gan_as_em.jensen_shannon(one.log(), one.log()) == 0
    assert gan_as_em.jensen_shannon(one.log(), one.flip(0).log()).item() == pytest.approx(math.log(2))
    other = torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=torch.float64)
    there = gan_as_em.jensen_shannon(one.log(), other.log())
    torch.testing.assert_close(there, gan_as_em.jensen_shannon(other.log(), one.log()))


def test_no_discriminator_beats_the_best() -> None:
    """The game's value is largest at p_data / (p_data + p_g): any change of any logit lowers it."""
    finite = gan_as_em.random_finite(3)
    best = finite.best_discriminator().detach()
    largest = finite.value(best)
    for shift in (*torch.eye(len(best), dtype=torch.float64), *-torch.eye(len(best), dtype=torch.float64)):
        assert finite.value(best + 0.1 * shift) < largest - 1e-6


def test_the_best_value_is_twice_jensen_shannon() -> None:
    """2 JS - ln 4 at the best discriminator, and the minimax gradient there is that of 2 JS: not of one."""
    finite = gan_as_em.random_finite(3)
    value = finite.value(finite.best_discriminator().detach())
    shannon = gan_as_em.jensen_shannon(finite.log_model, finite.log_data)
    assert value.item() == pytest.approx(2 * shannon.item() - math.log(4), abs=1e-14)
    (followed,), (once,) = (torch.autograd.grad(each, finite.model) for each in (value, shannon))
    torch.testing.assert_close(followed, 2 * once, rtol=0, atol=1e-14)


def test_the_nonsaturating_loss_does_not_descend_reversed_kl() -> None:
    """At the best discriminator its gradient is that of KL(p_g || p_data) - 2 JS, here two thirds as long as KL's."""
    finite = gan_as_em.random_finite(0)
    best = gan_as_em.Finite(finite.model, finite.data, finite.best_discriminator().detach())
    reversed_kl = divergence(best.log_model, best.log_data)
    wanted = reversed_kl - 2 * gan_as_em.jensen_shannon(best.log_model, best.log_data)
    followed, right, wrong = (
        torch.autograd.grad(each, finite.model, retain_graph=True)[0]
        for each in (2 * best.maximisation(), wanted, reversed_kl)
    )
    torch.testing.assert_close(followed, right, rtol=0, atol=1e-14)
    assert (followed.norm() / wrong.norm()).item() == pytest.approx(0.65, abs=0.01)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_hu_s_lemma_holds_for_any_discriminator(seed: int) -> None:
    """The M step's gradient is that of KL(p(x | y) || q^r(x | y)) less JS, and without JS it is another."""
    finite = gan_as_em.random_finite(seed)
    (found,) = torch.autograd.grad(finite.maximisation(), finite.model)
    (expected,) = torch.autograd.grad(finite.lemma(), finite.model)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-14)
    shannon = gan_as_em.jensen_shannon(finite.log_model, finite.log_data)
    (without,) = torch.autograd.grad(finite.lemma() + shannon, finite.model)
    assert (found - without).norm() > 0.1 * found.norm()


@pytest.mark.parametrize("loss", vanishing_gradient.LOSSES)
def test_slopes_have_their_closed_form(loss: str) -> None:
    """-D and -(1 - D): at a logit of -10 the minimax slope is 4.5e-5, the nonsaturating one 1 - 4.5e-5."""
    logits = torch.tensor([-10.0, 0.0, 10.0], dtype=torch.float64)
    small = 1 / (1 + math.exp(10))
    expected = [-small, -0.5, small - 1] if loss == "minimax" else [small - 1, -0.5, -small]
    assert vanishing_gradient.slopes(loss, logits).tolist() == pytest.approx(expected, rel=1e-12)
    assert vanishing_gradient.closed_slopes(loss, logits).tolist() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("claim", [gan_as_em, vanishing_gradient])
def test_the_claims_hold(claim, tmp_path: Path) -> None:
    """On networks and digits: the same losses to 1e-6; a minimax gradient that vanishes where the other does not."""
    section = claim.study(Settings(seed=0, quick=True, trained=tmp_path))
    assert section.verdict == "holds"
    assert all(picture.png.startswith(b"\x89PNG") for picture in section.pictures)
