"""What a card says of a model whatever its family: what every method answers, and what is known of its likelihood.

Most of it follows from the graphs. A family adds what they cannot tell: of what the likelihood is, or why there is
none.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from latentd.v1 import bundle_pb2, model_pb2

from latentd_trainer import metrics
from latentd_trainer.spec import Likelihood, Meaning, Role, Source, no_likelihood

Model = model_pb2.Model

METHODS: tuple[Model.Method.ValueType, ...] = (
    Model.METHOD_SAMPLE,
    Model.METHOD_ENCODE,
    Model.METHOD_DECODE,
    Model.METHOD_DENOISE,
    Model.METHOD_SCORE,
)
"""What every card speaks of, in its order."""

_POSTERIORS = {
    frozenset({Meaning.MEANING_LATENT_MEAN, Meaning.MEANING_LATENT_LOG_VARIANCE}): (
        "mean and log variance of q(latent given sample), or a draw from it"
    ),
    frozenset({Meaning.MEANING_LATENT_MEAN}): "a latent",
    frozenset({Meaning.MEANING_LATENT_PROBABILITY}): "P(unit = 1 given sample), or states drawn from it",
    frozenset({Meaning.MEANING_CLASS_PROBABILITY}): "P(class given sample)",
}
_EXACT = "ln p(sample) in nats, exact"
_BOUND = "a lower bound on ln p(sample) in nats"
_SCORES = {
    Meaning.MEANING_LOG_LIKELIHOOD: _EXACT,
    Meaning.MEANING_EVIDENCE_LOWER_BOUND: _BOUND,
    Meaning.MEANING_REAL_PROBABILITY: "P(real), the critic's opinion; no likelihood",
}
_DRAWN_BOUND = f"{_BOUND}: the ELBO from one draw, IWAE-K from K draws"
_ABSENT = {
    Model.METHOD_SAMPLE: "the bundle has no graph that makes samples, or its latents follow no prior",
    Model.METHOD_ENCODE: "there is no explicit inference model",
    Model.METHOD_DECODE: "the bundle has no graph that takes latents",
    Model.METHOD_DENOISE: "samples are not walked to step by step",
    Model.METHOD_SCORE: "the bundle has no graph that scores samples",
}
_KINDS = {
    Meaning.MEANING_LOG_LIKELIHOOD: Likelihood.KIND_EXACT,
    Meaning.MEANING_EVIDENCE_LOWER_BOUND: Likelihood.KIND_BOUND,
}
_CRITIC = no_likelihood(
    "It makes samples from latents, and no density of theirs can be worked out; Score is a critic's P(real)."
)
OF_LATENTS = "A bound on ln p(latent) could be summed over all timesteps; it is none on ln p(sample)."
"""Why a model that walks over another one's latents has no likelihood."""
UNSAID = "Of what, and why no more is known, whoever made the bundle has not said."
"""Where neither a family nor the graphs explain a likelihood."""


def complete(
    bundle: bundle_pb2.Bundle,
    answers: Mapping[Model.Method.ValueType, str],
    likelihood: Likelihood | None,
) -> None:
    """Fill in the card's capabilities and likelihood.

    Args:
        bundle: Its model's methods and its networks are read, its card is changed.
        answers: What methods answer, or why they do not, where the graphs do not tell all of it.
        likelihood: What is known of it; what the graphs tell if not given.

    Raises:
        ValueError: the graphs contradict `likelihood`, or it explains nothing.
    """
    card = bundle.model.card
    for method in METHODS:
        card.capabilities.add(method=method, description=answers.get(method) or _capability(bundle, method))
    meaning = _meaning_of_score(bundle)
    scored = _KINDS.get(meaning, Likelihood.KIND_UNSPECIFIED)
    if likelihood is None and meaning == Meaning.MEANING_REAL_PROBABILITY:
        likelihood = _CRITIC
    elif likelihood is None and scored_by_denoiser(bundle):
        likelihood = _variational(bundle.model)
    elif likelihood is None:
        likelihood = Likelihood(kind=scored or Likelihood.KIND_NONE, explanation=UNSAID)
    if scored and likelihood.kind != scored:
        raise ValueError(
            f"card.likelihood: is {Likelihood.Kind.Name(likelihood.kind)}, scores are {Likelihood.Kind.Name(scored)}"
        )
    if not likelihood.kind or not likelihood.explanation:
        raise ValueError("card.likelihood: must have a kind and an explanation")
    card.likelihood.CopyFrom(likelihood)


TUNED_FROM = "tuned from"
"""The relation of the model that another one started from, in `ModelCard.Comparison`."""


def record_figures(card: model_pb2.ModelCard, figures: Mapping[str, float], dimensions: int) -> None:
    """Put an evaluation's figures into the card: all as metrics, and as its likelihood the best known of ln p(sample).

    Comparisons with other models are removed, for they were made with the figures of before.

    Args:
        card: It is changed.
        figures: By metric. `log-likelihood` is exact; `iwae-K` is the bound of K draws, `elbo` that of one.
        dimensions: Numbers in a sample.
    """
    del card.comparisons[:]
    card.metrics.clear()
    card.metrics.update(figures)
    for field in ("nats", "bits_per_dimension", "draw_count"):
        card.likelihood.ClearField(field)
    draws = {int(name.removeprefix("iwae-")): name for name in figures if re.fullmatch(r"iwae-\d+", name)}
    if card.likelihood.kind == Likelihood.KIND_EXACT and "log-likelihood" in figures:
        card.likelihood.nats = figures["log-likelihood"]
    elif card.likelihood.kind == Likelihood.KIND_BOUND and draws:
        card.likelihood.draw_count = max(draws)
        card.likelihood.nats = figures[draws[max(draws)]]
    elif card.likelihood.kind == Likelihood.KIND_BOUND and "elbo" in figures:
        card.likelihood.draw_count = 1
        card.likelihood.nats = figures["elbo"]
    if card.likelihood.HasField("nats") and card.likelihood.measure == Likelihood.MEASURE_MASS:
        card.likelihood.bits_per_dimension = metrics.bits_per_dimension(card.likelihood.nats, dimensions)


def record_comparison(
    card: model_pb2.ModelCard, relation: str, model: model_pb2.Model, figures: Mapping[str, float]
) -> None:
    """Put another model's figures, measured in the same way, beside those of the card."""
    card.comparisons.add(relation=relation, model=model.name, digest=model.digest, metrics=figures)


def start_figures(card: model_pb2.ModelCard) -> Mapping[str, float]:
    """The figures of the model that this one was tuned from; empty if it was not, or they were not measured."""
    return next((each.metrics for each in card.comparisons if each.relation == TUNED_FROM), {})


def _capability(bundle: bundle_pb2.Bundle, method: Model.Method.ValueType) -> str:
    """What the graphs tell of a method."""
    decoder = bundle.model.latent_space.decoder  # empty where a denoiser walks over samples
    if method not in bundle.model.methods:
        return OF_LATENTS if decoder and method == Model.METHOD_SCORE else _ABSENT[method]
    networks = {network.role: network for network in bundle.networks}
    given = {entry.source for network in bundle.networks for entry in network.inputs}
    by_class = " of a class" if Source.SOURCE_CLASS_LABEL in given else ""
    by_label = ", or on ln p(sample given class)" if by_class else ""
    if Role.ROLE_DENOISER in networks:
        made = f"; the walk is over latents of {decoder}, which decodes them" if decoder else ""
        diffused = f"; {decoder} encodes the sample first" if decoder else ", or a draw of q(x_t given x_0)"
        return {
            Model.METHOD_SAMPLE: f"a sample{by_class}, walked to from noise by any sampler of the model's{made}",
            Model.METHOD_ENCODE: f"the noise that DDIM would walk from (inversion){diffused}",
            Model.METHOD_DECODE: f"the sample{by_class} that given noise is walked to{made}",
            Model.METHOD_DENOISE: "one step from given noise, or a loop that the caller drives",
            Model.METHOD_SCORE: f"{_BOUND}{by_label}, summed over all timesteps or estimated from some of them",
        }[method]
    if method == Model.METHOD_ENCODE:
        meanings = frozenset(output.meaning for output in networks[Role.ROLE_ENCODER].outputs)
        return _POSTERIORS.get(meanings, "what the model infers from a sample")
    if method == Model.METHOD_SCORE:
        return _score(bundle, networks[Role.ROLE_SCORER])
    drawn = any(output.meaning == Meaning.MEANING_SAMPLE_DRAW for output in networks[Role.ROLE_DECODER].outputs)
    what = f"the mean of p(sample given latent){by_class}, or a draw from it" if drawn else f"the sample{by_class}"
    return (
        f"{what}, for latents drawn from the prior" if method == Model.METHOD_SAMPLE else f"{what}, for given latents"
    )


def _score(bundle: bundle_pb2.Bundle, scorer: bundle_pb2.Network) -> str:
    meaning = _meaning_of_score(bundle)
    sources = {entry.source for entry in scorer.inputs}
    if meaning == Meaning.MEANING_EVIDENCE_LOWER_BOUND and sources & {
        Source.SOURCE_NORMAL_NOISE,
        Source.SOURCE_UNIFORM_NOISE,
    }:
        what = _DRAWN_BOUND
    else:
        what = _SCORES.get(meaning, "a number for each sample")
    if Source.SOURCE_CLASS_LABEL not in sources:
        return what
    if meaning == Meaning.MEANING_REAL_PROBABILITY:
        return f"{what}; given the class"
    return f"{what}; given the class, or over all classes"


def scored_by_denoiser(bundle: bundle_pb2.Bundle) -> bool:
    """Whether Score is a diffusion model's variational bound."""
    roles = {network.role for network in bundle.networks}
    return Model.METHOD_SCORE in bundle.model.methods and Role.ROLE_DENOISER in roles and Role.ROLE_SCORER not in roles


def _variational(model: model_pb2.Model) -> Likelihood:
    """The bound of the chain that the sampler DDPM walks, over all timesteps."""
    levels = model.sample_spec.level_count
    of_what = f"ln P(sample) on {levels} levels" if levels else "ln p(sample), a density"
    given = ", given the class" if model.class_names else ""
    return Likelihood(
        kind=Likelihood.KIND_BOUND,
        measure=Likelihood.MEASURE_MASS if levels else Likelihood.MEASURE_DENSITY,
        explanation=f"The variational bound on {of_what}{given}, of the chain over all {len(model.diffusion.alphas)} "
        "timesteps that DDPM samples.",
    )


def _meaning_of_score(bundle: bundle_pb2.Bundle) -> Meaning.Meaning.ValueType:
    if scored_by_denoiser(bundle):
        return Meaning.MEANING_EVIDENCE_LOWER_BOUND
    scorer = next((network for network in bundle.networks if network.role == Role.ROLE_SCORER), None)
    return scorer.outputs[0].meaning if scorer is not None and scorer.outputs else Meaning.MEANING_UNSPECIFIED
