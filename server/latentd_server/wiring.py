"""What the door reads from a bundle, once: shapes, ranges, classes, and which graph input and output means what.

One-shot graphs are wired by `NetworkInput.source` and `NetworkOutput.meaning` alone, so that a new family of
models needs no server code.
"""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from latentd.v1 import bundle_pb2, model_pb2, tensor_pb2
from numpy.typing import NDArray

from latentd_server.failures import MethodUnsupportedError
from latentd_server.job import Servable
from latentd_server.plans import Range
from latentd_server.schedules import Schedule

Source = bundle_pb2.NetworkInput
Meaning = bundle_pb2.NetworkOutput

Model = model_pb2.Model

METHODS = {
    Model.METHOD_SAMPLE: "Sample",
    Model.METHOD_ENCODE: "Encode",
    Model.METHOD_DECODE: "Decode",
    Model.METHOD_DENOISE: "DenoiseStep",
    Model.METHOD_SCORE: "Score",
}
"""The data-plane methods, as callers name them."""

_DEFAULT_STEP_COUNT = 50
_NOISE_SOURCES = (Source.SOURCE_NORMAL_NOISE, Source.SOURCE_UNIFORM_NOISE)


@dataclass(frozen=True, slots=True)
class Input:
    """One input of a graph."""

    name: str
    source: bundle_pb2.NetworkInput.Source.ValueType
    shape: tuple[int, ...]  # without the batch axis


@dataclass(frozen=True, slots=True)
class Graph:
    """One graph: its inputs, and its outputs by meaning."""

    role: bundle_pb2.Network.Role.ValueType
    inputs: tuple[Input, ...]
    outputs: dict[int, str]  # NetworkOutput.Meaning -> name

    def input(self, source: bundle_pb2.NetworkInput.Source.ValueType) -> Input | None:
        """The first input fed from `source`."""
        return next((entry for entry in self.inputs if entry.source == source), None)

    @property
    def takes_label(self) -> bool:
        """Whether it is conditioned on a class label."""
        return self.input(Source.SOURCE_CLASS_LABEL) is not None

    @property
    def takes_noise(self) -> bool:
        """Whether it is fed fresh noise."""
        return any(entry.source in _NOISE_SOURCES for entry in self.inputs)


@dataclass(frozen=True, slots=True)
class Wiring:
    """Everything the door needs of one model."""

    name: str  # canonical
    methods: frozenset[int]
    sample: Range
    latent: Range | None
    class_count: int
    cumulative: NDArray[np.float64]  # [class_count], running sum of p(label)
    log_prior: NDArray[np.float64]  # [class_count], ln p(label)
    graphs: dict[int, Graph]  # by Network.Role
    schedule: Schedule | None
    samplers: tuple[str, ...]
    default_step_count: int
    guidance_supported: bool
    determinism_class: str

    @property
    def is_diffusion(self) -> bool:
        """Whether samples are made step by step."""
        return self.schedule is not None


@lru_cache(maxsize=256)
def wiring(servable: Servable) -> Wiring:
    """Read a model's bundle."""
    model = servable.model
    count = len(model.class_names)
    probabilities = (
        np.array(model.class_probabilities) if model.class_probabilities else np.full(count, 1 / (count or 1))
    )
    with np.errstate(divide="ignore"):
        log_prior = np.log(probabilities)
    return Wiring(
        name=model.name,
        methods=frozenset(model.methods),
        sample=_range(model.sample_spec),
        latent=_range(model.latent_spec) if model.HasField("latent_spec") else None,
        class_count=count,
        cumulative=np.cumsum(probabilities),
        log_prior=log_prior,
        graphs={network.role: _graph(network) for network in servable.bundle.networks},
        schedule=servable.schedule,
        samplers=tuple(model.diffusion.samplers),
        default_step_count=model.diffusion.default_step_count or _DEFAULT_STEP_COUNT,
        guidance_supported=model.diffusion.guidance_supported,
        determinism_class=servable.determinism_class,
    )


def supporting(servable: Servable, method: model_pb2.Model.Method.ValueType) -> Wiring:
    """The wiring of a model that answers `method`.

    Raises:
        MethodUnsupportedError: it does not.
    """
    model = wiring(servable)
    if method not in model.methods:
        supported = [name for value, name in METHODS.items() if value in model.methods]
        raise MethodUnsupportedError(model.name, METHODS[method], supported)
    return model


def _range(spec: model_pb2.TensorSpec) -> Range:
    data_type = spec.data_type or tensor_pb2.DATA_TYPE_FLOAT32
    return Range(tuple(spec.shape), data_type, spec.min_value, spec.max_value)


def _graph(network: bundle_pb2.Network) -> Graph:
    inputs = tuple(Input(entry.name, entry.source, tuple(entry.spec.shape)) for entry in network.inputs)
    return Graph(network.role, inputs, {entry.meaning: entry.name for entry in network.outputs})
