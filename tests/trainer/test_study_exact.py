"""The studies that sum over all states, against torch's distributions, brute force and draws."""

import itertools
import math
from pathlib import Path

import pytest
import torch
from latentd_trainer.belief_net import draw, enumerate_posterior
from latentd_trainer.study import exact_bounds, wake_and_sleep
from latentd_trainer.study.exact_sums import (
    LOWER,
    PIXELS,
    UPPER,
    Machine,
    divergence,
    every_state,
    gradient,
    random_machine,
    relative_error,
)
from latentd_trainer.study.section import Settings
from torch import Tensor

UNITS = LOWER + UPPER


@pytest.fixture(scope="module")
def machine() -> Machine:
    """A machine of its own seed."""
    return random_machine(5)


def bernoulli(units: Tensor, logits: Tensor) -> Tensor:
    """Log probability of units, by torch's own distribution."""
    return torch.distributions.Bernoulli(logits=logits).log_prob(units).sum(dim=-1)


def test_tables_are_products_of_bernoulli_distributions(machine: Machine) -> None:
    """Both logarithms of every image and state equal torch's in float64, in this order of rows and columns."""
    net, recognition = machine.net, machine.recognition
    for row, x in enumerate(every_state(PIXELS)):
        for column, state in enumerate(every_state(UNITS)):
            lower, upper = state[:LOWER], state[LOWER:]
            joint = bernoulli(upper, net.top) + bernoulli(lower, net.middle(upper)) + bernoulli(x, net.bottom(lower))
            q = bernoulli(lower, recognition.first(x)) + bernoulli(upper, recognition.second(lower))
            torch.testing.assert_close(machine.log_joint()[row, column], joint, rtol=1e-13, atol=0)
            torch.testing.assert_close(machine.log_q()[row, column], q, rtol=1e-13, atol=0)


def test_every_distribution_sums_to_one(machine: Machine) -> None:
    """p(x, z), p(z), p(x), each p(z | x) and q(z | x), and that of the data, to float64's rounding."""
    totals = [
        machine.log_joint().exp().sum(),
        machine.log_prior().exp().sum(),
        machine.log_likelihood().exp().sum(),
        *machine.log_posterior().exp().sum(dim=1),
        *machine.log_q().exp().sum(dim=1),
        machine.data.sum(),
    ]
    torch.testing.assert_close(torch.stack(totals), torch.ones(len(totals), dtype=torch.float64), rtol=0, atol=1e-14)


def test_the_enumeration_oracle_keeps_float64(machine: Machine) -> None:
    """`enumerate_posterior` of a float64 net gives the same ln p(x) and marginals to 1e-14."""
    log_likelihood, marginals = enumerate_posterior(machine.net, every_state(PIXELS))
    torch.testing.assert_close(log_likelihood, machine.log_likelihood().detach(), rtol=0, atol=1e-14)
    expected = machine.log_posterior().detach().exp() @ every_state(UNITS)
    torch.testing.assert_close(marginals, expected, rtol=0, atol=1e-14)


def test_a_divergence_is_torch_s() -> None:
    """KL of two rows of probabilities, and 0 of a row to itself."""
    one, other = torch.rand((2, 5), generator=torch.Generator().manual_seed(0), dtype=torch.float64).log_softmax(dim=1)
    expected = torch.distributions.kl_divergence(
        *(torch.distributions.Categorical(logits=each) for each in (one, other))
    )
    torch.testing.assert_close(divergence(one, other), expected)
    assert divergence(one, one) == 0


@pytest.mark.parametrize("draws", [1, 2, 3])
def test_the_bound_of_several_draws_is_the_sum_over_all_of_their_outcomes(machine: Machine, draws: int) -> None:
    """Counting states gives what all 8 ** K ordered outcomes give, each with its probability."""
    log_q = machine.log_q()[3]
    log_weight = machine.log_joint()[3] - log_q
    outcomes = torch.tensor(list(itertools.product(range(2**UNITS), repeat=draws)))
    probability = log_q[outcomes].sum(dim=1).exp()
    expected = probability @ (log_weight[outcomes].logsumexp(dim=1) - math.log(draws))
    found = exact_bounds.importance_weighted_bound(machine, draws)[3]
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-13)


def test_a_prior_counted_twice_loses_its_logarithm(machine: Machine) -> None:
    """E_q ln p(x, z) - KL(q || p(z)) is the ELBO plus E_q ln p(z), which is below 0: off by nats."""
    with torch.no_grad():
        lost = machine.log_q().exp() @ machine.log_prior()
        found = exact_bounds.prior_counted_twice(machine) - exact_bounds.elbo(machine)
    torch.testing.assert_close(found, lost, rtol=0, atol=1e-13)
    assert (lost < -0.1).all()


def test_a_divergence_that_is_added_bounds_nothing(machine: Machine) -> None:
    """E_q ln p(x | z) + KL(q || p(z)) exceeds ln p(x) for some images; with a minus it is the ELBO."""
    with torch.no_grad():
        added = exact_bounds.reconstruction_less_divergence(machine, sign=1.0)
        torch.testing.assert_close(
            exact_bounds.reconstruction_less_divergence(machine), exact_bounds.elbo(machine), rtol=0, atol=1e-13
        )
        assert (added > machine.log_likelihood()).any()


def test_the_mean_bound_is_a_divergence_of_joints(machine: Machine) -> None:
    """E_data ELBO = -KL(p_data q || p) - H(p_data), and so the KL of data and model is no larger than that."""
    log_data = machine.data.log()
    with torch.no_grad():
        joint = divergence((log_data[:, None] + machine.log_q()).flatten(), machine.log_joint().flatten())
        bound = machine.data @ exact_bounds.elbo(machine)
        assert divergence(log_data, machine.log_likelihood()) < joint
    entropy = -(machine.data * log_data).sum()
    torch.testing.assert_close(bound, -joint - entropy, rtol=0, atol=1e-13)


def test_the_bound_on_information_falls_short_by_what_sleep_descends(machine: Machine) -> None:
    """I(z; x) = E ln q(z | x) + H(z) + E_p(x) KL(p(z | x) || q): InfoGAN's bound and sleep have one gradient."""
    log_prior, log_posterior = machine.log_prior().detach(), machine.log_posterior().detach()
    in_all = -(log_prior.exp() * log_prior).sum()
    left = -(machine.log_likelihood().exp() @ (log_posterior.exp() * log_posterior).sum(dim=1)).detach()
    torch.testing.assert_close(exact_bounds.information(machine).detach(), in_all - left, rtol=0, atol=1e-13)
    assert exact_bounds.information_bound(machine) < exact_bounds.information(machine)
    followed = gradient(-exact_bounds.information_bound(machine), machine.recognition)
    torch.testing.assert_close(followed, wake_and_sleep.sleep(machine).wanted, rtol=0, atol=1e-13)


def test_with_the_posterior_as_q_the_bound_is_tight(machine: Machine) -> None:
    """Where one q can be the posterior of every image, both bounds are ln p(x): a net whose pixels tell nothing."""
    with torch.no_grad():
        blind = random_machine(6)
        for layer in (blind.net.bottom, blind.recognition.first):
            layer.weight.zero_()
        blind.net.middle.weight.zero_()
        blind.recognition.second.weight.zero_()
        blind.recognition.first.bias.copy_(blind.net.middle.bias)
        blind.recognition.second.bias.copy_(blind.net.top)
        for bound in (exact_bounds.elbo(blind), exact_bounds.importance_weighted_bound(blind, 2)):
            torch.testing.assert_close(bound, blind.log_likelihood(), rtol=0, atol=1e-13)
        assert (exact_bounds.elbo(machine) < machine.log_likelihood() - 0.1).all()


def test_dreams_that_are_drawn_follow_what_the_sum_says(machine: Machine) -> None:
    """The gradient of -ln q(z | x) over 100,000 dreams of the float32 nets is that of the sleep phase, to 3 %."""
    net, recognition = random_machine(5).net.float(), random_machine(5).recognition.float()
    generator = torch.Generator().manual_seed(0)
    lower, upper = net.dream(torch.rand((100_000, UNITS), generator=generator))
    x = draw(torch.rand((len(lower), PIXELS), generator=generator), net.bottom(lower))
    drawn = gradient(-recognition.log_posterior(x, lower, upper).mean(), recognition)
    assert relative_error(drawn.double(), wake_and_sleep.sleep(machine).followed) < 0.03


@pytest.mark.parametrize("phase", ["wake", "sleep", "maximisation"])
def test_phases_follow_what_their_papers_say(machine: Machine, phase: str) -> None:
    """Wake the bound, sleep KL(p(z | x) || q), EM's M step ln p(x): the same gradient to 1e-12."""
    assert getattr(wake_and_sleep, phase)(machine).error < 1e-12


def test_wake_without_the_prior_learns_nothing_above_the_pixels(machine: Machine) -> None:
    """E_q ln p(x | z) has no gradient by what draws z, which the bound does have."""
    found = wake_and_sleep.wake_without_prior(machine)
    above = machine.net.top.numel() + sum(each.numel() for each in machine.net.middle.parameters())
    assert found.followed[:above].abs().max() < 1e-14
    assert found.wanted[:above].abs().max() > 0.01
    torch.testing.assert_close(found.followed[above:], found.wanted[above:], rtol=0, atol=1e-13)


def test_dreams_of_x_apart_from_z_teach_the_prior(machine: Machine) -> None:
    """With E_p(x) E_p(z) in place of the joint the gradient is that of E_p(x) KL(p(z) || q(z | x))."""
    away = divergence(machine.log_prior().detach(), machine.log_q())
    expected = gradient(machine.log_likelihood().exp().detach() @ away, machine.recognition)
    torch.testing.assert_close(wake_and_sleep.sleep_apart(machine).followed, expected, rtol=0, atol=1e-13)


@pytest.mark.parametrize("claim", [exact_bounds, wake_and_sleep])
def test_the_claims_hold(claim, tmp_path: Path) -> None:
    """ELBO = ln p(x) - KL to 1e-12, IWAE-K rising; every phase as claimed and every slip different."""
    section = claim.study(Settings(seed=0, quick=True, trained=tmp_path))
    assert section.verdict == "holds"
