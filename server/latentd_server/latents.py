"""Walks over another model's latents (ADR 24): their samples are decoded, and images encoded, by that model. Pure.

A latent of that model is z = scale * x + shift, x being the walk's state.
"""

from dataclasses import replace

import numpy as np
from latentd.names import parse_reference
from latentd.v1 import bundle_pb2, generation_service_pb2, tensor_pb2
from numpy.typing import NDArray

from latentd_server import calls
from latentd_server.fields import Fields
from latentd_server.job import Handover, Job, Servable, StepJob
from latentd_server.plans import OutputForm
from latentd_server.wiring import Meaning, Model, Source, Wiring

Role = bundle_pb2.Network
_MUST_AGREE = ("data_type", "shape", "min_value", "max_value")
OutputMode = generation_service_pb2.OutputMode


def is_latent(mode: OutputMode.ValueType) -> bool:
    """Whether the walk's own state is asked for."""
    return mode == generation_service_pb2.OUTPUT_MODE_LATENT


def form(fields: Fields, asked: OutputForm, model: Wiring, *, of_results: bool) -> OutputForm:
    """How latents leave: as FLOAT32 or FLOAT16. Pixels are refused where latents are the results."""
    if asked.data_type == tensor_pb2.DATA_TYPE_UINT8:
        if of_results:
            fields.reject("output_data_type", "must be unset, FLOAT32 or FLOAT16: latents are no pixels")
        asked = replace(asked, data_type=tensor_pb2.DATA_TYPE_FLOAT32)
    return replace(asked, low=model.state.low, high=model.state.high)


def check_mode(fields: Fields, mode: OutputMode.ValueType, model: Wiring) -> None:
    """Whether samples can be asked for so: undecoded, or as the decoder answers."""
    if not is_latent(mode):
        calls.check_output_mode(fields, mode, _decoder(model).graphs[Role.ROLE_DECODER], undecoded=True)


def decoded(job: StepJob, mode: OutputMode.ValueType, model: Wiring, seed: int) -> tuple[StepJob, str, str]:
    """A walk whose lanes are decoded when they are done; what the samples and the latents are called then."""
    decoder = _decoder(model)
    last, samples, latents = calls.decoding_stage(mode, job.labels, seed, job.sample_indices, decoder)
    return replace(job, then=Handover(last, "sample", latents, *_scale_and_shift(model))), samples, latents


def encoded(fields: Fields, job: StepJob, samples: NDArray[np.float32], model: Wiring, path: str) -> Job:
    """A walk that starts from images, [1 or n, *sample] f32, encoded to the mean of their posterior.

    Args:
        fields: Where violations go.
        job: The walk, with a start that has no values.
        samples: The images.
        model: The walk's.
        path: Of the field that brought the images.
    """
    encoder = _decoder(model)
    graph = encoder.graphs.get(Role.ROLE_ENCODER)
    if graph is None or Meaning.MEANING_LATENT_MEAN not in graph.outputs:
        fields.reject(path, f"must be unset: {encoder.name}, whose latents this model walks over, encodes no images")
        return job
    if graph.takes_label and (job.labels < 0).any():
        fields.reject("condition.class_label", "must be set, or class_labels: the encoder is conditioned on a class")
    images = np.broadcast_to(samples, (job.lane_count, *samples.shape[1:]))
    first, output = calls.encoding_stage(images, job.labels, job.seed, job.sample_indices, encoder)
    scale, shift = _scale_and_shift(model)
    return replace(first, then=Handover(job, output, "", 1 / scale, -shift / scale))


def problems(bundle: bundle_pb2.Bundle, decoder: Servable | None) -> list[str]:
    """Why a model cannot walk over the latents of the one it names, as it is served here; empty if it can."""
    model, space = bundle.model, bundle.model.latent_space
    if decoder is None:
        return [f"its samples are latents of {space.decoder}, which is not served; load that first"]
    other = decoder.model
    found = []
    if space.decoder_digest and space.decoder_digest != other.digest:
        found.append(f"it was made for another {space.decoder}: digest {space.decoder_digest}, not {other.digest}")
    labelled = any(entry.source == Source.SOURCE_CLASS_LABEL for net in bundle.networks for entry in net.inputs)
    graph = decoder.network(Role.ROLE_DECODER)
    sources = [entry.source for entry in graph.inputs] if graph is not None else []
    if Model.METHOD_DECODE not in other.methods or Source.SOURCE_LATENT not in sources:
        return [*found, f"{space.decoder} decodes no latents"]
    if list(other.latent_spec.shape) != list(model.latent_spec.shape):
        ours, theirs = list(model.latent_spec.shape), list(other.latent_spec.shape)
        found.append(f"its latents have the shape {ours}, those of {space.decoder} {theirs}")
    if any(getattr(other.sample_spec, each) != getattr(model.sample_spec, each) for each in _MUST_AGREE):
        found.append(f"its sample_spec is not that of {space.decoder}")
    if Source.SOURCE_CODES in sources:
        found.append(f"{space.decoder} takes continuous codes, which a walk has none of")
    if Source.SOURCE_CLASS_LABEL in sources and not (list(other.class_names) == list(model.class_names) and labelled):
        found.append(f"{space.decoder} is conditioned on classes, so both must be, and on the same ones")
    if Model.METHOD_ENCODE in model.methods and Model.METHOD_ENCODE not in other.methods:
        found.append(f"model.methods: Encode needs an encoder, and {space.decoder} has none")
    return found


def space_problems(bundle: bundle_pb2.Bundle) -> list[str]:
    """What is wrong with a model's latent space whoever decodes; empty if there is none."""
    model = bundle.model
    if not model.HasField("latent_space"):
        return []
    space, found = model.latent_space, []
    try:
        named = parse_reference(space.decoder).version
    except ValueError:
        named = 0
    if not named:
        found.append(f"decoder must be NAME@VERSION, got {space.decoder!r}")
    if not model.HasField("diffusion"):
        found.append("is for diffusion models")
    shape = list(model.latent_spec.shape)
    for name, values in (("scales", space.scales), ("shifts", space.shifts)):
        if len(values) not in (0, 1, *shape[:1]) or not np.isfinite(values).all():
            found.append(f"{name} must hold one finite value, or one for each extent of latent_spec's first axis")
    if not all(space.scales):
        found.append("scales must not be 0")
    if Model.METHOD_SCORE in model.methods:
        found.append("leaves no Score: a bound on ln p(latent) is none on ln p(sample)")
    for network in bundle.networks:
        shapes = [list(entry.spec.shape) for entry in network.inputs if entry.source == Source.SOURCE_SAMPLE]
        shapes += [list(output.spec.shape) for output in network.outputs]
        if network.role == Role.ROLE_DENOISER and any(each != shape for each in shapes):
            found.append(f"{network.file} must take and give latents of shape {shape}")
    return [f"model.latent_space: {text}" for text in found]


def _decoder(model: Wiring) -> Wiring:
    if model.decoder is None:
        raise TypeError(f"{model.name} does not walk over latents")
    return model.decoder


def _scale_and_shift(model: Wiring) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Against rows of latents, [1 or C, 1 ...] f32."""
    axes = (-1, *[1] * (len(model.state.shape) - 1))
    scale, shift = (np.array(values, np.float32).reshape(axes) for values in model.latent_scale)
    return scale, shift
