"""What a model file may say of roles, sources, meanings, families, methods and predictions.

The words are the contract's own names in small letters, so that nothing is listed twice.
"""

from collections.abc import Callable, Collection
from typing import Annotated, Any

from google.protobuf.descriptor import EnumDescriptor
from latentd.names import SAMPLERS
from latentd.v1 import bundle_pb2, model_pb2
from pydantic import AfterValidator, BeforeValidator

UNUSED = bundle_pb2.NetworkOutput.MEANING_UNSPECIFIED
"""The meaning of an output that is not served."""

PREDICTIONS = {
    "eps": model_pb2.DiffusionSpec.PREDICTION_EPSILON,
    "v": model_pb2.DiffusionSpec.PREDICTION_V,
    "x0": model_pb2.DiffusionSpec.PREDICTION_SAMPLE,
}


def _words(enum: EnumDescriptor) -> dict[str, Any]:
    """`class_label` to SOURCE_CLASS_LABEL, for every value but the unspecified one."""
    return {value.name.split("_", 1)[1].lower(): value.number for value in enum.values if value.number}


ROLES = _words(bundle_pb2.Network.Role.DESCRIPTOR)
SOURCES = _words(bundle_pb2.NetworkInput.Source.DESCRIPTOR)
MEANINGS = _words(bundle_pb2.NetworkOutput.Meaning.DESCRIPTOR) | {"unused": UNUSED}
FAMILIES = _words(model_pb2.Model.Family.DESCRIPTOR)
METHODS = _words(model_pb2.Model.Method.DESCRIPTOR)
LIKELIHOOD_KINDS = _words(model_pb2.ModelCard.Likelihood.Kind.DESCRIPTOR)
LIKELIHOOD_MEASURES = _words(model_pb2.ModelCard.Likelihood.Measure.DESCRIPTOR)


def words(known: dict[str, Any], values: Collection[int]) -> list[str]:
    """The words for these values, in the contract's order."""
    return [word for word, value in known.items() if value in values]


def _one_of(known: dict[str, Any]) -> Callable[[Any], Any]:
    def look_up(text: Any) -> Any:
        if not isinstance(text, str) or text not in known:
            raise ValueError(f"must be one of {', '.join(known)}; got {text!r}")
        return known[text]

    return look_up


def _sampler(name: str) -> str:
    if name not in SAMPLERS:
        raise ValueError(f"must be one of {', '.join(SAMPLERS)}; got {name!r}")
    return name


Role = Annotated[bundle_pb2.Network.Role.ValueType, BeforeValidator(_one_of(ROLES))]
Source = Annotated[bundle_pb2.NetworkInput.Source.ValueType, BeforeValidator(_one_of(SOURCES))]
Meaning = Annotated[bundle_pb2.NetworkOutput.Meaning.ValueType, BeforeValidator(_one_of(MEANINGS))]
Family = Annotated[model_pb2.Model.Family.ValueType, BeforeValidator(_one_of(FAMILIES))]
Method = Annotated[model_pb2.Model.Method.ValueType, BeforeValidator(_one_of(METHODS))]
LikelihoodKind = Annotated[model_pb2.ModelCard.Likelihood.Kind.ValueType, BeforeValidator(_one_of(LIKELIHOOD_KINDS))]
LikelihoodMeasure = Annotated[
    model_pb2.ModelCard.Likelihood.Measure.ValueType, BeforeValidator(_one_of(LIKELIHOOD_MEASURES))
]
Prediction = Annotated[model_pb2.DiffusionSpec.Prediction.ValueType, BeforeValidator(_one_of(PREDICTIONS))]
Sampler = Annotated[str, AfterValidator(_sampler)]
