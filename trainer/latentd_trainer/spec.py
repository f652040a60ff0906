"""What a trained family hands to export: graphs whose inputs and outputs say where values come from and go to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from latentd.v1 import bundle_pb2, model_pb2, tensor_pb2
from torch import nn

Source = bundle_pb2.NetworkInput
Meaning = bundle_pb2.NetworkOutput
Role = bundle_pb2.Network
Likelihood = model_pb2.ModelCard.Likelihood


def no_likelihood(why: str) -> Likelihood:
    """What a card says of a model that defines no likelihood, or none that can be worked out."""
    return Likelihood(kind=Likelihood.KIND_NONE, explanation=why)


def bound_on_mass(explanation: str) -> Likelihood:
    """What a card says of a model of discrete values of which a lower bound on ln p(sample) is known."""
    return Likelihood(kind=Likelihood.KIND_BOUND, measure=Likelihood.MEASURE_MASS, explanation=explanation)


@dataclass(frozen=True)
class GraphInput:
    """One input of a graph, without the batch axis."""

    name: str
    source: bundle_pb2.NetworkInput.Source.ValueType
    shape: tuple[int, ...]
    data_type: tensor_pb2.DataType.ValueType = tensor_pb2.DATA_TYPE_FLOAT32


@dataclass(frozen=True)
class GraphOutput:
    """One output of a graph, without the batch axis."""

    name: str
    meaning: bundle_pb2.NetworkOutput.Meaning.ValueType
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Graph:
    """One network to export. `module(*inputs)` returns the outputs in order (a tensor, or a tuple of them).

    The module is in evaluation mode, holds the weights to serve (EMA where the family keeps one), and draws
    no noise: noise comes in by inputs.
    """

    role: bundle_pb2.Network.Role.ValueType
    module: nn.Module
    inputs: Sequence[GraphInput]
    outputs: Sequence[GraphOutput]


@dataclass(frozen=True)
class ServingSpec:
    """Everything that a bundle says of a model but its name, its classes, its card and its files."""

    family: model_pb2.Model.Family.ValueType
    graphs: Sequence[Graph]
    methods: Sequence[model_pb2.Model.Method.ValueType]
    sample_shape: tuple[int, int, int]  # [C, H, W]
    latent_shape: tuple[int, ...]  # empty for a model without latents
    description: str
    reference_uri: str  # the paper
    diffusion: model_pb2.DiffusionSpec | None = None
    sample_range: tuple[float, float] = field(default=(-1.0, 1.0))
    sample_levels: int = 0  # evenly spaced values in that range that data have; 0: continuous, or of no concern
    sample_sizes: Sequence[tuple[int, int]] = ()  # other heights and widths that a denoiser's samples may have
    latent_range: tuple[float, float] | None = None  # (0, 1) where the prior is U[0, 1); else it is N(0, 1)
    latent_space: model_pb2.LatentSpace | None = None  # whose latents, of `latent_shape`, a denoiser walks over
    class_conditional: bool = True  # whether the model knows the data's classes
    own_classes: Sequence[str] = ()  # names of classes, equally likely, that it has in place of the data's
    likelihood: Likelihood | None = None  # what is known of ln p(sample), or why nothing is; else what the graphs tell
    answers: Mapping[model_pb2.Model.Method.ValueType, str] = field(default_factory=dict)
    """What methods answer, or why they do not, where the graphs do not tell it (`card.complete`)."""
