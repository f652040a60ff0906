"""What a bundle must say to be servable: rules on the `Bundle` message alone. Pure; every violation at once."""

import itertools
import math
from collections import Counter
from pathlib import Path

from google.protobuf.descriptor import EnumDescriptor
from latentd import names
from latentd.v1 import bundle_pb2, model_pb2, tensor_pb2

from latentd_trainer import dimensions
from latentd_trainer.spec import Meaning, Role, Source

_NOISE = {Source.SOURCE_NORMAL_NOISE, Source.SOURCE_UNIFORM_NOISE}
_CONDITION = {Source.SOURCE_CLASS_LABEL, Source.SOURCE_CODES}
_SCORES = {Meaning.MEANING_LOG_LIKELIHOOD, Meaning.MEANING_EVIDENCE_LOWER_BOUND, Meaning.MEANING_REAL_PROBABILITY}
_LATENTS = {Meaning.MEANING_LATENT_MEAN, Meaning.MEANING_LATENT_PROBABILITY}
_POSTERIORS = {*_LATENTS, Meaning.MEANING_CLASS_PROBABILITY}

_SMALLEST_LEVEL = 1e-6
"""Below this a sigma, or the alpha of an eps prediction, cannot be divided by in float32."""

ALLOWED_SOURCES = {
    Role.ROLE_DECODER: {Source.SOURCE_LATENT} | _CONDITION | _NOISE,
    Role.ROLE_ENCODER: {Source.SOURCE_SAMPLE} | _CONDITION | _NOISE,
    Role.ROLE_DENOISER: {Source.SOURCE_SAMPLE, Source.SOURCE_TIMESTEP} | _CONDITION,
    Role.ROLE_SCORER: {Source.SOURCE_SAMPLE} | _CONDITION | _NOISE,
}
"""Where a graph of each role may take values from."""

REQUIRED_SOURCES: dict[int, set[Source.Source.ValueType]] = {
    Role.ROLE_DECODER: set(),  # one of latents, codes or noise; see `_network_violations`
    Role.ROLE_ENCODER: {Source.SOURCE_SAMPLE},
    Role.ROLE_DENOISER: {Source.SOURCE_SAMPLE, Source.SOURCE_TIMESTEP},
    Role.ROLE_SCORER: {Source.SOURCE_SAMPLE},
}
"""Where a graph of each role must take values from."""

ALLOWED_MEANINGS = {
    Role.ROLE_DECODER: {Meaning.MEANING_SAMPLE, Meaning.MEANING_SAMPLE_DRAW},
    Role.ROLE_ENCODER: {*_POSTERIORS, Meaning.MEANING_LATENT_LOG_VARIANCE},
    Role.ROLE_DENOISER: {Meaning.MEANING_PREDICTION},
    Role.ROLE_SCORER: _SCORES,
}
"""What the outputs of a graph of each role may mean."""

ROLES_OF_METHOD = {
    model_pb2.Model.METHOD_SAMPLE: {Role.ROLE_DECODER, Role.ROLE_DENOISER},
    model_pb2.Model.METHOD_ENCODE: {Role.ROLE_ENCODER, Role.ROLE_DENOISER},
    model_pb2.Model.METHOD_DECODE: {Role.ROLE_DECODER, Role.ROLE_DENOISER},
    model_pb2.Model.METHOD_DENOISE: {Role.ROLE_DENOISER},
    model_pb2.Model.METHOD_SCORE: {Role.ROLE_SCORER, Role.ROLE_DENOISER},
}
"""Graphs that can answer each method; any one of them is enough."""


def role_name(role: int) -> str:
    """`decoder` for ROLE_DECODER: what a graph and its file are called."""
    return _short(Role.Role.DESCRIPTOR, role)


def bundle_violations(bundle: bundle_pb2.Bundle) -> list[str]:
    """Everything in the message that a server could not serve; empty if there is nothing."""
    found = []
    if bundle.format_version != names.BUNDLE_FORMAT_VERSION:
        found.append(f"format_version: must be {names.BUNDLE_FORMAT_VERSION}, got {bundle.format_version}")
    found += _model_violations(bundle.model)
    found += _method_violations(bundle)
    roles = Counter(network.role for network in bundle.networks)
    found += [
        f"networks: {count} graphs are {role_name(role)}s; at most one" for role, count in roles.items() if count > 1
    ]
    files = Counter(network.file for network in bundle.networks)
    found += [f"networks: {count} graphs are in {file!r}; one each" for file, count in files.items() if count > 1]
    for network in bundle.networks:
        found += [f"{role_name(network.role)}: {violation}" for violation in _network_violations(network, bundle.model)]
    found += _diffusion_violations(bundle) + dimensions.violations(bundle)
    return found


def _model_violations(model: model_pb2.Model) -> list[str]:
    found = []
    try:
        reference = names.parse_reference(model.name)
    except ValueError as error:
        found.append(f"model.name: {model.name!r} {error}")
    else:
        if not reference.version:
            found.append(f"model.name: must carry its version, as {model.name}@1")
    if model.family == model_pb2.Model.FAMILY_UNSPECIFIED:
        found.append("model.family: must be given")
    sample = model.sample_spec
    if sample.data_type != tensor_pb2.DATA_TYPE_FLOAT32 or len(sample.shape) != 3 or min(sample.shape) < 1:
        found.append(f"model.sample_spec: must be float32 of shape [C, H, W], got {_describe(sample)}")
    if not sample.min_value < sample.max_value:
        found.append(f"model.sample_spec: min_value {sample.min_value} must lie below max_value {sample.max_value}")
    if sample.level_count < 0 or sample.level_count == 1:
        found.append(
            f"model.sample_spec: level_count must be 0, for no levels, or at least 2, got {sample.level_count}"
        )
    latent = model.latent_spec
    if not model.HasField("diffusion") and (latent.min_value, latent.max_value) not in ((0, 0), (0, 1)):
        found.append(
            "model.latent_spec: must have no range, for a normal prior, or 0 to 1, for a uniform one, "
            f"got {latent.min_value} to {latent.max_value}"
        )
    found += _class_violations(model)
    return found


def _class_violations(model: model_pb2.Model) -> list[str]:
    found = []
    probabilities = model.class_probabilities
    if len(set(model.class_names)) != len(model.class_names):
        found.append("model.class_names: must differ from one another")
    if probabilities:
        if len(probabilities) != len(model.class_names):
            found.append(
                f"model.class_probabilities: {len(probabilities)} values for {len(model.class_names)} class names"
            )
        if not min(probabilities) >= 0 or not math.isclose(math.fsum(probabilities), 1.0, abs_tol=1e-6):
            found.append("model.class_probabilities: must be at least 0 and sum to 1")
    return found


def state_spec(model: model_pb2.Model) -> model_pb2.TensorSpec:
    """What a denoiser walks over: latents of another model, or samples."""
    return model.latent_spec if model.HasField("latent_space") else model.sample_spec


def _method_violations(bundle: bundle_pb2.Bundle) -> list[str]:
    found = []
    roles = {network.role for network in bundle.networks}
    used = set[int]()
    if not bundle.model.methods:
        found.append("model.methods: must name at least one method")
    for method in bundle.model.methods:
        able = ROLES_OF_METHOD.get(method, set())
        used |= roles & able
        if not roles & able:
            wanted = " or ".join(sorted(role_name(role) for role in able)) or "nothing known"
            found.append(f"model.methods: {model_pb2.Model.Method.Name(method)} needs a graph: {wanted}")
    found += [f"{role_name(role)}: no declared method uses this graph" for role in sorted(roles - used)]
    return found


def _network_violations(network: bundle_pb2.Network, model: model_pb2.Model) -> list[str]:
    if network.role not in ALLOWED_SOURCES:
        return ["role: unknown to this version"]
    found = []
    if Path(network.file).name != network.file or not network.file.endswith(".onnx"):
        found.append(f"file: must be a name in the bundle that ends in .onnx, got {network.file!r}")
    sources = Counter[int](entry.source for entry in network.inputs)
    meanings = Counter[int](entry.meaning for entry in network.outputs)
    for entry in network.inputs:
        if entry.source not in ALLOWED_SOURCES[network.role]:
            found.append(f"input {entry.name!r}: {_source(entry.source)} has no place here")
        elif expected := _input_mismatch(entry, network.role, model):
            found.append(
                f"input {entry.name!r}: {_source(entry.source)} must be {expected}, got {_describe(entry.spec)}"
            )
    for result in network.outputs:
        if result.meaning not in ALLOWED_MEANINGS[network.role]:
            found.append(f"output {result.name!r}: {_meaning(result.meaning)} has no place here")
        elif expected := _output_mismatch(result, model):
            found.append(
                f"output {result.name!r}: {_meaning(result.meaning)} must be {expected}, got {_describe(result.spec)}"
            )
    found += [f"{_source(s)}: must be an input" for s in REQUIRED_SOURCES[network.role] if not sources[s]]
    found += [f"{_source(s)}: {n} inputs; at most one" for s, n in sources.items() if n > 1 and s not in _NOISE]
    found += [f"{_meaning(m)}: {n} outputs; at most one" for m, n in meanings.items() if n > 1]
    names_used = Counter([entry.name for entry in network.inputs] + [entry.name for entry in network.outputs])
    found += [f"name {name!r}: used {count} times" for name, count in names_used.items() if count > 1]
    return found + _meaning_violations(network.role, sources, meanings)


def _meaning_violations(role: int, sources: Counter[int], meanings: Counter[int]) -> list[str]:
    noisy = any(sources[source] for source in _NOISE)
    if role == Role.ROLE_DECODER:
        found = []
        if not (noisy or sources[Source.SOURCE_LATENT] or sources[Source.SOURCE_CODES]):
            found.append("inputs: must take latents, codes or noise, else every sample is the same")
        if not meanings[Meaning.MEANING_SAMPLE]:
            found.append("outputs: must have one that means sample")
        if meanings[Meaning.MEANING_SAMPLE_DRAW] and not noisy:
            found.append("outputs: sample draw needs a noise input to draw with")
        return found
    if role == Role.ROLE_ENCODER:
        latents = sum(meanings[meaning] > 0 for meaning in _LATENTS)
        if latents > 1 or not (latents or meanings[Meaning.MEANING_CLASS_PROBABILITY]):
            return [
                "outputs: must mean exactly one of latent mean, latent probability and class probability, but for "
                "class probability beside a latent"
            ]
        if meanings[Meaning.MEANING_LATENT_LOG_VARIANCE] and not meanings[Meaning.MEANING_LATENT_MEAN]:
            return ["outputs: latent log variance needs latent mean beside it"]
        return []
    return [] if sum(meanings.values()) == 1 else [f"outputs: must be exactly one, got {sum(meanings.values())}"]


def _input_mismatch(entry: bundle_pb2.NetworkInput, role: int, model: model_pb2.Model) -> str:
    """What this input should be, if it is not that."""
    if entry.source in (Source.SOURCE_TIMESTEP, Source.SOURCE_CLASS_LABEL):
        if entry.source == Source.SOURCE_CLASS_LABEL and not model.class_names:
            return "absent: the model names no classes"
        return _mismatch(entry.spec, tensor_pb2.DATA_TYPE_INT64, [])
    state = state_spec(model) if role == Role.ROLE_DENOISER else model.sample_spec
    shape = {
        Source.SOURCE_SAMPLE: list(state.shape),
        Source.SOURCE_LATENT: list(model.latent_spec.shape),
    }.get(entry.source)
    if entry.source == Source.SOURCE_LATENT and not model.HasField("latent_spec"):
        return "absent: the model has no latent_spec"
    return _mismatch(entry.spec, tensor_pb2.DATA_TYPE_FLOAT32, shape)


def _output_mismatch(result: bundle_pb2.NetworkOutput, model: model_pb2.Model) -> str:
    """What this output should be, if it is not that."""
    shape: list[int]
    if result.meaning in _SCORES:
        shape = []
    elif result.meaning == Meaning.MEANING_CLASS_PROBABILITY:
        shape = [len(model.class_names)]
    elif result.meaning in ALLOWED_MEANINGS[Role.ROLE_ENCODER]:
        shape = list(model.latent_spec.shape)
    elif result.meaning == Meaning.MEANING_PREDICTION:
        shape = list(state_spec(model).shape)
    else:
        shape = list(model.sample_spec.shape)
    return _mismatch(result.spec, tensor_pb2.DATA_TYPE_FLOAT32, shape)


def _mismatch(spec: model_pb2.TensorSpec, data_type: tensor_pb2.DataType.ValueType, shape: list[int] | None) -> str:
    if spec.data_type == data_type and (shape is None or list(spec.shape) == shape):
        return ""
    return _describe(model_pb2.TensorSpec(data_type=data_type, shape=spec.shape if shape is None else shape))


def _diffusion_violations(bundle: bundle_pb2.Bundle) -> list[str]:
    denoiser = next((network for network in bundle.networks if network.role == Role.ROLE_DENOISER), None)
    model = bundle.model
    if denoiser is None:
        found = ["model.latent_space: given, but no graph is a denoiser"] if model.HasField("latent_space") else []
        return found + (["model.diffusion: given, but no graph is a denoiser"] if model.HasField("diffusion") else [])
    if not model.HasField("diffusion"):
        return ["model.diffusion: must be given, as there is a denoiser"]
    spec = model.diffusion
    found = schedule_violations(spec)
    if spec.prediction == model_pb2.DiffusionSpec.PREDICTION_UNSPECIFIED:
        found.append("prediction: must be given")
    unknown = sorted(set(spec.samplers) - set(names.SAMPLERS))
    if not spec.samplers or unknown:
        found.append(f"samplers: must be some of {', '.join(names.SAMPLERS)}, got {', '.join(spec.samplers) or 'none'}")
    if not 1 <= spec.default_step_count <= max(1, len(spec.alphas)):
        found.append(f"default_step_count: must be 1 to {len(spec.alphas)}, got {spec.default_step_count}")
    if spec.guidance_supported and not any(entry.source == Source.SOURCE_CLASS_LABEL for entry in denoiser.inputs):
        found.append("guidance_supported: needs a denoiser that takes a class label")
    found = [f"model.diffusion.{violation}" for violation in found]
    if model.HasField("latent_space"):
        return found + _space_violations(model)
    if list(model.latent_spec.shape) != list(model.sample_spec.shape):
        found.append("model.latent_spec: must have the shape of sample_spec, as x_T is the latent")
    return found


def _space_violations(model: model_pb2.Model) -> list[str]:
    space, latent, found = model.latent_space, model.latent_spec, []
    try:
        versioned = names.parse_reference(space.decoder).version > 0
    except ValueError:
        versioned = False
    if not versioned:
        found.append(f"decoder: must be NAME@VERSION, got {space.decoder!r}")
    if model.diffusion.clip_denoised and not latent.min_value < latent.max_value:
        found.append("estimates are clipped, so model.latent_spec must have a range")
    for name, values in (("scales", space.scales), ("shifts", space.shifts)):
        if len(values) not in (0, 1, *latent.shape[:1]) or not all(math.isfinite(value) for value in values):
            found.append(f"{name}: must be one finite value, or one for each extent of latent_spec's first axis")
    if not all(space.scales):
        found.append("scales: must not be 0")
    if model_pb2.Model.METHOD_SCORE in model.methods:
        found.append("a bound on ln p(latent) is none on ln p(sample), so Score cannot be among the methods")
    return [f"model.latent_space: {text}" for text in found]


def schedule_violations(spec: model_pb2.DiffusionSpec) -> list[str]:
    """Everything in the alphas and sigmas that a sampler could not walk along."""
    if not spec.alphas or len(spec.alphas) != len(spec.sigmas):
        return [f"alphas: {len(spec.alphas)} values and {len(spec.sigmas)} sigmas; must be as many, and at least one"]
    levels = list(zip(spec.alphas, spec.sigmas, strict=True))
    # Noise alone says nothing of x0, so only networks that predict something else may see alpha 0, and only last.
    may_end_in_noise = spec.prediction != model_pb2.DiffusionSpec.PREDICTION_EPSILON
    divided = levels[:-1] if may_end_in_noise else levels
    found = []
    if not all(alpha >= _SMALLEST_LEVEL for alpha, _ in divided) or not levels[-1][0] >= 0:
        found.append(f"alphas: must be at least {_SMALLEST_LEVEL:g}; the last may be 0 unless eps is predicted")
    if not all(sigma >= _SMALLEST_LEVEL for _, sigma in levels):
        found.append(f"sigmas: must be at least {_SMALLEST_LEVEL:g}")
    if not all(abs(alpha**2 + sigma**2 - 1) <= 1e-6 for alpha, sigma in levels):
        found.append("alphas: alpha^2 + sigma^2 must be 1 to 1e-6 at every timestep")
    if not found:
        ratios = [alpha / sigma for alpha, sigma in levels]
        if any(later >= earlier for earlier, later in itertools.pairwise(ratios)):
            found.append("alphas: alpha / sigma must fall strictly from one timestep to the next")
    return found


def _describe(spec: model_pb2.TensorSpec) -> str:
    data_type = tensor_pb2.DataType.Name(spec.data_type).removeprefix("DATA_TYPE_").lower()
    return f"{data_type} of shape {list(spec.shape)}"


def _source(value: int) -> str:
    return _short(Source.Source.DESCRIPTOR, value)


def _meaning(value: int) -> str:
    return _short(Meaning.Meaning.DESCRIPTOR, value)


def _short(enum: EnumDescriptor, value: int) -> str:
    """`log likelihood` for MEANING_LOG_LIKELIHOOD."""
    known = enum.values_by_number.get(value)
    return known.name.split("_", 1)[1].lower().replace("_", " ") if known else f"number {value}"
