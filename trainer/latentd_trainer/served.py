"""Samples drawn through a bundle's own graphs, in ONNX Runtime on the CPU."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
from latentd.v1 import bundle_pb2, model_pb2
from numpy.typing import NDArray

from latentd_trainer import bundle as bundles
from latentd_trainer import chains, parity
from latentd_trainer.bundle import BundleError
from latentd_trainer.contract import role_name, state_spec
from latentd_trainer.onnx_graph import GraphError
from latentd_trainer.spec import Meaning, Role, Source

_BATCH = 144

Floats = NDArray[np.float32]
Given = Mapping[int, NDArray[Any]]
"""Inputs by their source, [n, ...]."""


class EvaluationError(ValueError):
    """A bundle that cannot be evaluated, or not on these data; the message says what would do."""


@dataclass(frozen=True)
class Samples:
    """Samples drawn in one way."""

    variant: str  # `-50-steps`; what the names of their metrics end in
    description: str
    images: Floats  # [n, C, H, W]


class Graphs:
    """The bundle's networks by role, in ONNX Runtime on the CPU."""

    def __init__(self, directory: Path, bundle: bundle_pb2.Bundle, threads: int) -> None:
        self.bundle = bundle
        self.networks: dict[int, bundle_pb2.Network] = {network.role: network for network in bundle.networks}
        self._sessions: dict[int, ort.InferenceSession] = {}
        for role, network in self.networks.items():
            try:
                self._sessions[role] = parity.open_session((directory / network.file).read_bytes(), threads)
            except (OSError, GraphError) as error:
                raise EvaluationError(f"{network.file}: {error}; `latentd-train verify` says more") from error
        self._decoder = _decoder(directory, bundle.model, threads)

    def decoded(self, states: Floats, labels: NDArray[np.int64], generator: np.random.Generator) -> Floats:
        """Samples [n, C, H, W] of what a walk ends in, [n, *state]: that itself, or what a decoder makes of it."""
        if self._decoder is None:
            return states
        space, axes = self.bundle.model.latent_space, (-1, *[1] * (states.ndim - 2))
        scales, shifts = np.array(space.scales or [1], np.float32), np.array(space.shifts or [0], np.float32)
        latents = scales.reshape(axes) * states + shifts.reshape(axes)
        given: Given = {Source.SOURCE_LATENT: latents, Source.SOURCE_CLASS_LABEL: labels}
        return self._decoder.run(Role.ROLE_DECODER, given, generator)[Meaning.MEANING_SAMPLE]

    def run(self, role: int, given: Given, generator: np.random.Generator) -> dict[int, Floats]:
        """Outputs by meaning; inputs by source, noise being drawn here. All arrays [n, ...].

        Raises:
            EvaluationError: an input takes what evaluation does not know to give, as codes, or the graph does not run.
        """
        network = self.networks[role]
        count = len(next(iter(given.values())))
        feeds = {entry.name: _values(entry, role, given, count, generator) for entry in network.inputs}
        try:
            parts = [
                parity.run_onnx(self._sessions[role], {name: rows[i : i + _BATCH] for name, rows in feeds.items()})
                for i in range(0, count, _BATCH)
            ]
        except GraphError as error:
            raise EvaluationError(f"{network.file}: {error}; `latentd-train verify` says more") from error
        outputs = [np.concatenate(pieces) for pieces in zip(*parts, strict=True)]
        return {output.meaning: rows for output, rows in zip(network.outputs, outputs, strict=True)}

    def takes(self, role: int, source: int) -> bool:
        """Whether the graph has an input from this source."""
        return role in self.networks and any(entry.source == source for entry in self.networks[role].inputs)

    def gives(self, role: int, meaning: int) -> bool:
        """Whether the graph has an output with this meaning."""
        return role in self.networks and any(output.meaning == meaning for output in self.networks[role].outputs)


UNLABELLED = -1
"""The label that asks a denoiser for no class."""


def _decoder(directory: Path, model: model_pb2.Model, threads: int) -> "Graphs | None":
    """The networks of the model that decodes this one's samples, from the same directory of models; None if none does.

    Raises:
        EvaluationError: it is not there, or is another one.
    """
    if not model.HasField("latent_space"):
        return None
    space = model.latent_space
    name, _, version = space.decoder.partition("@")
    path = directory.resolve().parents[1] / name / version
    try:
        bundle = bundles.read(path)
    except BundleError as error:
        raise EvaluationError(f"samples of {model.name} are decoded by {space.decoder}: {error}") from error
    if space.decoder_digest not in ("", bundle.model.digest):
        raise EvaluationError(f"{model.name} was trained with another {space.decoder}, by their digests")
    return Graphs(path, bundle, threads)


_WALKS = {"ddim": (0.0, 1), "ddpm": (1.0, 1), "dpmpp-2m": (0.0, 2)}
"""eta and order of the samplers that evaluation walks with, by their wire names."""


def _values(
    entry: bundle_pb2.NetworkInput,
    role: int,
    given: Given,
    count: int,
    generator: np.random.Generator,
) -> NDArray[Any]:
    if entry.source in given:
        return given[entry.source]
    shape = (count, *entry.spec.shape)
    uniform_latent = entry.source == Source.SOURCE_LATENT and entry.spec.max_value > entry.spec.min_value
    if entry.source == Source.SOURCE_UNIFORM_NOISE or uniform_latent:
        return generator.random(shape, np.float32)
    if entry.source in (Source.SOURCE_LATENT, Source.SOURCE_NORMAL_NOISE):
        return generator.standard_normal(shape, np.float32)
    kind = Source.Source.Name(entry.source)
    raise EvaluationError(f"{role_name(role)}: input {entry.name!r} takes {kind}, which evaluation does not provide")


def draw_variants(graphs: Graphs, asked: NDArray[np.int64], seed: int) -> Iterator[Samples]:
    """One sample for each label, in each way a server draws them.

    Diffusion: 50 and 10 steps of the model's default sampler. Decoders: the mean and, where there is one, the draw.
    """
    generator = np.random.default_rng([seed, 0])
    model = graphs.bundle.model
    if Role.ROLE_DENOISER in graphs.networks:
        for step_count in (50, 10):
            images = walk(graphs, asked, step_count, generator)
            yield Samples(f"-{step_count}-steps", f"{step_count} steps, {model.diffusion.samplers[0]}", images)
        return
    outputs = graphs.run(Role.ROLE_DECODER, {Source.SOURCE_CLASS_LABEL: asked}, generator)
    if Meaning.MEANING_SAMPLE_DRAW not in outputs:
        yield Samples("", "samples", outputs[Meaning.MEANING_SAMPLE])
        return
    yield Samples("-mean", "mean", outputs[Meaning.MEANING_SAMPLE])
    yield Samples("-draw", "draw", outputs[Meaning.MEANING_SAMPLE_DRAW])


def walk(
    graphs: Graphs,
    asked: NDArray[np.int64],
    step_count: int,
    generator: np.random.Generator,
    *,
    guidance_scale: float = 1.0,
) -> Floats:
    """One sample of a diffusion model for each label, by its default sampler, [n, C, H, W].

    Args:
        graphs: The model's.
        asked: Labels, [n].
        step_count: Steps of the walk; no more than the model has timesteps are taken.
        generator: Draws the noise.
        guidance_scale: w of (1 - w) m(x, t) + w m(x, t, y), as in a request: 1 asks for the label alone, 0 for none.

    Raises:
        EvaluationError: the default sampler is none that evaluation knows.
    """
    model = graphs.bundle.model
    sampler = model.diffusion.samplers[0]
    if sampler not in _WALKS:
        raise EvaluationError(f"default sampler {sampler!r}: evaluation knows {', '.join(_WALKS)}")
    eta, order = _WALKS[sampler]
    state = state_spec(model)
    noise = generator.standard_normal((len(asked), *state.shape), np.float32)

    def predict(x: Floats, t: NDArray[np.int64], labels: NDArray[np.int64]) -> Floats:
        given: Given = {Source.SOURCE_SAMPLE: x, Source.SOURCE_TIMESTEP: t, Source.SOURCE_CLASS_LABEL: labels}
        return graphs.run(Role.ROLE_DENOISER, given, generator)[Meaning.MEANING_PREDICTION]

    def denoise(x: Floats, t: NDArray[np.int64]) -> Floats:
        if guidance_scale == 1:
            return predict(x, t, asked)
        plain = predict(x, t, np.full_like(asked, UNLABELLED))
        guided: Floats = (
            plain if guidance_scale == 0 else plain + np.float32(guidance_scale) * (predict(x, t, asked) - plain)
        )
        return guided

    states = chains.walk(
        denoise,
        model.diffusion,
        noise,
        min(step_count, len(model.diffusion.alphas)),
        eta=eta,
        order=order,
        clip=(state.min_value, state.max_value),
        generator=generator,
    )
    return graphs.decoded(states, asked, generator)
