"""Parts of a model's card in words, the same wherever they are shown."""

from latentd.v1 import model_pb2

_Likelihood = model_pb2.ModelCard.Likelihood
_KINDS = {
    _Likelihood.KIND_EXACT: "exact",
    _Likelihood.KIND_BOUND: "lower bound",
    _Likelihood.KIND_NONE: "none",
}
_MEASURES = {
    _Likelihood.MEASURE_MASS: " of a probability mass",
    _Likelihood.MEASURE_DENSITY: " of a density",
}


def likelihood_in_words(likelihood: model_pb2.ModelCard.Likelihood) -> str:
    """What is known of ln p(sample), e.g. `lower bound, IWAE-500: -78.4 nats, 1.77 bits/dim. Of images ...`."""
    kind = _KINDS.get(likelihood.kind, "the card does not say") + _MEASURES.get(likelihood.measure, "")
    if likelihood.draw_count:
        kind += f", IWAE-{likelihood.draw_count}" if likelihood.draw_count > 1 else ", ELBO"
    figures = []
    if likelihood.HasField("nats"):
        figures.append(f"{likelihood.nats:.4g} nats")
    if likelihood.HasField("bits_per_dimension"):
        figures.append(f"{likelihood.bits_per_dimension:.3g} bits/dim")
    said = f"{kind}: {', '.join(figures)}" if figures else kind
    return f"{said}. {likelihood.explanation}".rstrip(" ")
