"""What the phases of wake-sleep and the M step of EM follow, and what slips in their formulas would follow instead.

Hinton, Dayan, Frey, Neal, The wake-sleep algorithm, Science 268 (1995); Dempster, Laird, Rubin, JRSS B 39 (1977).

    wake     E_data E_q ln p(x, z), by p: the bound's own gradient, q held
    sleep    E_p(x, z) -ln q(z | x), by q: that of E_p(x) KL(p(z | x) || q(z | x)), while the bound asks for
             KL(q || p(z | x))
    EM       Q(p, p_t) = E_data E_p_t(z | x) ln p(x, z): at p = p_t its gradient is that of ln p(x)
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from latentd_trainer.report import figure_text, table
from latentd_trainer.study.exact_bounds import elbo
from latentd_trainer.study.exact_sums import Machine, divergence, gradient, random_machine, relative_error
from latentd_trainer.study.section import Criterion, Section, Settings


@dataclass(frozen=True)
class Phase:
    """A gradient that is followed, and the one that it should be; [parameters] f64 each."""

    name: str
    followed: Tensor
    wanted: Tensor
    slip: bool = False

    @property
    def error(self) -> float:
        """Of the one to the other, relative."""
        return relative_error(self.followed, self.wanted)

    @property
    def cosine(self) -> float:
        """Of the angle between the two."""
        return float(torch.nn.functional.cosine_similarity(self.followed, self.wanted, dim=0))


def wake(machine: Machine) -> Phase:
    """E_data E_q ln p(x, z) against the bound, by p."""
    q = machine.log_q().exp().detach()
    followed = machine.data @ (q * machine.log_joint()).sum(dim=1)
    return Phase("wake", gradient(followed, machine.net), _by_net(machine, elbo(machine)))


def wake_without_prior(machine: Machine) -> Phase:
    """The slip E_data E_q ln p(x | z), under which nothing above the pixels is learnt."""
    q = machine.log_q().exp().detach()
    followed = machine.data @ (q * (machine.log_joint() - machine.log_prior())).sum(dim=1)
    return Phase("wake without p(z)", gradient(followed, machine.net), _by_net(machine, elbo(machine)), slip=True)


def sleep(machine: Machine) -> Phase:
    """E_p(x, z) -ln q(z | x) against E_p(x) KL(p(z | x) || q), by q."""
    joint = machine.log_joint().exp().detach()
    return Phase("sleep", gradient(-(joint * machine.log_q()).sum(), machine.recognition), _inclusive(machine))


def sleep_by_the_bound(machine: Machine) -> Phase:
    """What sleep follows against what the bound would have: E_p(x) KL(q || p(z | x)), by q."""
    exclusive = machine.log_likelihood().exp().detach() @ divergence(machine.log_q(), machine.log_posterior().detach())
    wanted = gradient(exclusive, machine.recognition)
    return Phase("sleep, if it were the bound's", sleep(machine).followed, wanted, slip=True)


def sleep_apart(machine: Machine) -> Phase:
    """The slip of dreaming z apart from x, E_p(x) E_p(z) -ln q(z | x), which teaches q to answer the prior."""
    apart = machine.log_likelihood().exp()[:, None] * machine.log_prior().exp()
    followed = gradient(-(apart.detach() * machine.log_q()).sum(), machine.recognition)
    return Phase("sleep with z apart from x", followed, _inclusive(machine), slip=True)


def maximisation(machine: Machine) -> Phase:
    """EM's Q at the present parameters against ln p(x): Fisher's identity."""
    posterior = machine.log_posterior().exp().detach()
    followed = machine.data @ (posterior * machine.log_joint()).sum(dim=1)
    return Phase("EM", gradient(followed, machine.net), _by_net(machine, machine.log_likelihood()))


def maximisation_by_prior(machine: Machine) -> Phase:
    """The slip of a Q with z from p(z) in place of p(z | x)."""
    prior = machine.log_prior().exp().detach()
    followed = machine.data @ (machine.log_joint() @ prior)
    wanted = _by_net(machine, machine.log_likelihood())
    return Phase("EM with z from p(z)", gradient(followed, machine.net), wanted, slip=True)


PHASES = (wake, sleep, maximisation, wake_without_prior, sleep_by_the_bound, sleep_apart, maximisation_by_prior)


def study(settings: Settings) -> Section:
    """Compare what each phase follows with what it should, on a random machine."""
    machine = random_machine(settings.seed)
    settings.tell("sums over all states")
    phases = {of.__name__.replace("_", "-"): of(machine) for of in PHASES}
    figures = {f"{name}/error": phase.error for name, phase in phases.items()}
    figures |= {f"{name}/cosine": phase.cosine for name, phase in phases.items()}
    criteria = [
        Criterion(f"{phase.name}: is not the same (relative error)", f"{name}/error", ">", 0.01)
        if phase.slip
        else Criterion(f"{phase.name}: is the same gradient (relative error)", f"{name}/error", "<=", 1e-12)
        for name, phase in phases.items()
    ]
    rows = [[phase.name, figure_text(phase.error), figure_text(phase.cosine)] for phase in phases.values()]
    return Section(
        title="Wake, sleep and EM",
        claim="Wake follows the bound in p; sleep follows KL(p(z given x)‖q) in q, the other direction than the bound "
        "(Hinton et al. 1995); EM's M step follows ln p(x) (Dempster, Laird, Rubin 1977).",
        measured="Gradients by all parameters of a random belief net of 4 pixels, 2 and 1 hidden units, or of its "
        "recognition net, through sums over all 16 images and 8 states in float64.",
        figures=figures,
        criteria=criteria,
        body="\n\n".join(
            [
                table(["followed", "relative error", "cosine"], rows),
                "So wake-sleep ascends no single objective: its two phases descend different divergences. The last "
                "four rows are what formulas would follow that leave p(z) out of wake, take sleep for a step on the "
                "bound, dream z and x apart, or let EM draw z from the prior.",
            ]
        ),
    )


def _by_net(machine: Machine, per_image: Tensor) -> Tensor:
    return gradient(machine.data @ per_image, machine.net)


def _inclusive(machine: Machine) -> Tensor:
    """E_p(x) KL(p(z | x) || q(z | x)), by q."""
    away = divergence(machine.log_posterior().detach(), machine.log_q())
    return gradient(machine.log_likelihood().exp().detach() @ away, machine.recognition)
