"""What the door reads from a bundle, once: shapes, ranges, classes, and which graph input and output means what.

One-shot graphs are wired by `NetworkInput.source` and `NetworkOutput.meaning` alone, so that a new family of
models needs no server code.
"""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from latentd.names import SAMPLERS
from latentd.v1 import bundle_pb2, generation_service_pb2, model_pb2, tensor_pb2
from numpy.typing import NDArray

from latentd_server.failures import MethodUnsupportedError
from latentd_server.job import Servable
from latentd_server.plans import Range
from latentd_server.schedules import Schedule
from latentd_server.sizes import Size

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

LATENTS = (Meaning.MEANING_LATENT_MEAN, Meaning.MEANING_LATENT_PROBABILITY, Meaning.MEANING_CLASS_PROBABILITY)
"""Meanings of an encoder's answer, the first that it has being the one that counts."""

SCORES = {
    Meaning.MEANING_LOG_LIKELIHOOD: generation_service_pb2.ScoreResponse.TYPE_LOG_LIKELIHOOD,
    Meaning.MEANING_EVIDENCE_LOWER_BOUND: generation_service_pb2.ScoreResponse.TYPE_EVIDENCE_LOWER_BOUND,
    Meaning.MEANING_REAL_PROBABILITY: generation_service_pb2.ScoreResponse.TYPE_REAL_PROBABILITY,
}
"""Meanings of a scorer's answer, and what they are called on the wire."""

_DEFAULT_STEP_COUNT = 50
_NOISE_SOURCES = (Source.SOURCE_NORMAL_NOISE, Source.SOURCE_UNIFORM_NOISE)
_CONDITIONS = (Source.SOURCE_CLASS_LABEL, Source.SOURCE_CODES)
_FED = {
    bundle_pb2.Network.ROLE_DECODER: (Source.SOURCE_LATENT, *_CONDITIONS, *_NOISE_SOURCES),
    bundle_pb2.Network.ROLE_ENCODER: (Source.SOURCE_SAMPLE, *_CONDITIONS, *_NOISE_SOURCES),
    bundle_pb2.Network.ROLE_SCORER: (Source.SOURCE_SAMPLE, *_CONDITIONS, *_NOISE_SOURCES),
    bundle_pb2.Network.ROLE_DENOISER: (Source.SOURCE_SAMPLE, Source.SOURCE_TIMESTEP, Source.SOURCE_CLASS_LABEL),
}


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
    def noise_inputs(self) -> list[Input]:
        """The inputs that are fed fresh noise, in the graph's order."""
        return [entry for entry in self.inputs if entry.source in _NOISE_SOURCES]

    @property
    def takes_noise(self) -> bool:
        """Whether it is fed fresh noise."""
        return bool(self.noise_inputs)


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
    promise: bool
    decoder: "Wiring | None"  # of the model whose latents this one walks over
    latent_scale: tuple[tuple[float, ...], tuple[float, ...]]  # scales and shifts, of one value or one a channel
    size: Size | None  # of samples, where it is not the model's default
    variants: "dict[Size, Wiring]"  # the model at its other sizes

    @property
    def state(self) -> Range:
        """What a diffusion model walks over: latents of another model, or samples."""
        return self.latent if self.decoder is not None and self.latent is not None else self.sample

    @property
    def uniform_prior(self) -> bool:
        """Whether latents come from U[0, 1), not from N(0, 1)."""
        return self.latent is not None and self.latent.bounded

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
        promise=servable.promise,
        decoder=None if servable.decoder is None else wiring(servable.decoder),
        latent_scale=(tuple(model.latent_space.scales) or (1.0,), tuple(model.latent_space.shifts) or (0.0,)),
        size=servable.size,
        variants={each.size: wiring(each) for each in servable.variants if each.size is not None},
    )


def state_spec(model: model_pb2.Model) -> model_pb2.TensorSpec:
    """What a diffusion model's network walks over: latents of another model, or samples."""
    return model.latent_spec if model.HasField("latent_space") else model.sample_spec


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
    return Range(tuple(spec.shape), data_type, spec.min_value, spec.max_value, spec.level_count)


def _graph(network: bundle_pb2.Network) -> Graph:
    inputs = tuple(Input(entry.name, entry.source, tuple(entry.spec.shape)) for entry in network.inputs)
    return Graph(network.role, inputs, {entry.meaning: entry.name for entry in network.outputs})


_METHOD_GRAPHS = {
    Model.METHOD_SAMPLE: bundle_pb2.Network.ROLE_DECODER,
    Model.METHOD_DECODE: bundle_pb2.Network.ROLE_DECODER,
    Model.METHOD_ENCODE: bundle_pb2.Network.ROLE_ENCODER,
    Model.METHOD_SCORE: bundle_pb2.Network.ROLE_SCORER,
}
_ANSWERS = {
    bundle_pb2.Network.ROLE_DECODER: (Meaning.MEANING_SAMPLE,),
    bundle_pb2.Network.ROLE_ENCODER: LATENTS,
    bundle_pb2.Network.ROLE_SCORER: tuple(SCORES),
    bundle_pb2.Network.ROLE_DENOISER: (Meaning.MEANING_PREDICTION,),
}


def problems(bundle: bundle_pb2.Bundle) -> list[str]:
    """Why requests to a model could not be wired to its graphs; empty if they can."""
    found = []
    model = bundle.model
    roles = {network.role for network in bundle.networks}
    diffusion = model.HasField("diffusion")
    latent = model.latent_spec
    if not diffusion and (latent.min_value, latent.max_value) not in ((0, 0), (0, 1)):
        found.append("model.latent_spec must have no range (a normal prior) or that of 0 to 1 (a uniform prior)")
    for method, role in _METHOD_GRAPHS.items():
        if method in model.methods and not diffusion and role not in roles:
            name = bundle_pb2.Network.Role.Name(role)
            found.append(f"model.methods: {METHODS[method]} needs a graph with {name}")
    for network in bundle.networks:
        found += [f"{network.file}: {text}" for text in _graph_problems(network)]
    if diffusion:
        spec = model.diffusion
        unknown = [name for name in spec.samplers if name not in SAMPLERS]
        if unknown or not spec.samplers:
            found.append(f"model.diffusion.samplers must name some of {', '.join(SAMPLERS)}; got {list(spec.samplers)}")
        if not 0 <= spec.default_step_count <= len(spec.alphas):
            found.append(f"model.diffusion.default_step_count must be from 0 to {len(spec.alphas)}")
    return found


def _graph_problems(network: bundle_pb2.Network) -> list[str]:
    found = []
    answers = _ANSWERS.get(network.role, ())
    meanings = [output.meaning for output in network.outputs]
    if not any(meaning in answers for meaning in meanings):
        found.append(f"needs an output meaning {' or '.join(Meaning.Meaning.Name(meaning) for meaning in answers)}")
    sources = [entry.source for entry in network.inputs]
    if network.role == bundle_pb2.Network.ROLE_DENOISER:
        wanted = (Source.SOURCE_SAMPLE, Source.SOURCE_TIMESTEP)
        found += [f"needs an input from {Source.Source.Name(source)}" for source in wanted if source not in sources]
    for source in sorted(set(sources)):
        if source not in _FED.get(network.role, ()):
            name = Source.Source.Name(source) if source in Source.Source.values() else str(source)
            found.append(f"takes an input from {name}, which this server does not feed to such a graph")
    return found
