"""Reading a bundle: `NAME/VERSION/bundle.json` and the graphs it names, checked before anything runs.

Every file is read once; what is checked is what is loaded.
"""

import hashlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from google.protobuf.json_format import Parse, ParseError
from latentd.digest import bundle_digest
from latentd.names import BUNDLE_FILE, BUNDLE_FORMAT_VERSION, ModelReference, is_name
from latentd.v1 import bundle_pb2, model_pb2

from latentd_server import gate, latents, sizes, wiring
from latentd_server.schedules import Schedule

_NEEDED_ROLES = {
    model_pb2.Model.METHOD_SAMPLE: (bundle_pb2.Network.ROLE_DECODER, bundle_pb2.Network.ROLE_DENOISER),
    model_pb2.Model.METHOD_DECODE: (bundle_pb2.Network.ROLE_DECODER, bundle_pb2.Network.ROLE_DENOISER),
    model_pb2.Model.METHOD_ENCODE: (bundle_pb2.Network.ROLE_ENCODER, bundle_pb2.Network.ROLE_DENOISER),
    model_pb2.Model.METHOD_DENOISE: (bundle_pb2.Network.ROLE_DENOISER,),
    model_pb2.Model.METHOD_SCORE: (bundle_pb2.Network.ROLE_SCORER, bundle_pb2.Network.ROLE_DENOISER),
}


class BundleError(Exception):
    """A bundle that cannot be served; `problems` lists every reason found."""

    def __init__(self, problems: list[str]) -> None:
        super().__init__("; ".join(problems))
        self.problems = problems


@dataclass(frozen=True)
class StoredBundle:
    """A bundle whose files are what its digests say."""

    message: bundle_pb2.Bundle
    graphs: dict[int, bytes]  # by role
    schedule: Schedule | None


def find(root: Path) -> Iterator[tuple[ModelReference, Path]]:
    """The bundles under a models directory: every `NAME/VERSION/bundle.json`, hidden directories left out."""
    for path in sorted(root.glob(f"[!.]*/[!.]*/{BUNDLE_FILE}")):
        name, version = path.parts[-3:-1]
        if is_name(name) and version.isdecimal() and version == str(int(version)) and int(version) > 0:
            yield ModelReference(name, int(version)), path.parent


def named_decoder(directory: Path) -> str:
    """The model that decodes this one's samples, as `NAME@VERSION`; empty if none does, or it cannot be read."""
    try:
        return _read_message(directory / BUNDLE_FILE).model.latent_space.decoder
    except BundleError:
        return ""


def read(directory: Path) -> StoredBundle:
    """Read and check one bundle.

    Raises:
        BundleError: it is incomplete, damaged, newer than this server, or not what a bundle must be.
    """
    bundle = _read_message(directory / BUNDLE_FILE)
    problems = _model_problems(bundle, f"{directory.parent.name}@{directory.name}") + wiring.problems(bundle)
    problems += latents.space_problems(bundle) + sizes.problems(bundle)
    graphs: dict[int, bytes] = {}
    for network in bundle.networks:
        role = bundle_pb2.Network.Role.Name(network.role) if network.role else "no role"
        if network.role in graphs:
            problems.append(f"{network.file}: a second graph with {role}")
            continue
        if not network.file or Path(network.file).name != network.file:
            problems.append(f"{network.file!r} is not the name of a file in the bundle")
            continue
        try:
            data = (directory / network.file).read_bytes()
        except OSError as error:
            problems.append(f"{network.file}: cannot be read ({error.strerror})")
            continue
        if hashlib.sha256(data).hexdigest() != network.sha256:
            problems.append(f"{network.file}: differs from its digest in {BUNDLE_FILE}")
            continue
        problems += gate.problems(data, network, sized=len(bundle.model.sample_sizes) > 0)
        graphs[network.role] = data
    if bundle.model.digest != bundle_digest(bundle):
        problems.append(f"{BUNDLE_FILE}: model.digest does not match its contents")
    schedule = None
    if bundle.model.HasField("diffusion"):
        try:
            schedule = Schedule.from_spec(bundle.model.diffusion, wiring.state_spec(bundle.model))
        except ValueError as error:
            problems.append(f"diffusion: {error}")
    if problems:
        raise BundleError(problems)
    return StoredBundle(bundle, graphs, schedule)


def _read_message(path: Path) -> bundle_pb2.Bundle:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise BundleError([f"{path.name}: cannot be read ({error.__class__.__name__})"]) from error
    try:
        bundle = Parse(text, bundle_pb2.Bundle())
    except ParseError as error:
        raise BundleError([f"{path.name}: {error}"]) from error
    if bundle.format_version != BUNDLE_FORMAT_VERSION:
        raise BundleError(
            [f"{path.name}: format_version is {bundle.format_version}, this server reads {BUNDLE_FORMAT_VERSION}"]
        )
    return bundle


def _model_problems(bundle: bundle_pb2.Bundle, expected_name: str) -> list[str]:
    model = bundle.model
    roles = {network.role for network in bundle.networks}
    found = []
    if model.name != expected_name:
        found.append(f"model.name is {model.name!r}, its directory says {expected_name!r}")
    if not model.methods:
        found.append("model.methods is empty")
    found += [
        f"model.methods: no graph for {model_pb2.Model.Method.Name(method)}"
        for method in model.methods
        if not roles.intersection(_NEEDED_ROLES.get(method, ()))
    ]
    if (bundle_pb2.Network.ROLE_DENOISER in roles) != model.HasField("diffusion"):
        found.append("a denoiser and model.diffusion must come together")
    if not model.sample_spec.shape or min(model.sample_spec.shape) < 1:
        found.append("model.sample_spec.shape must name positive extents")
    if not model.sample_spec.min_value < model.sample_spec.max_value:
        found.append("model.sample_spec must have min_value < max_value")
    if model.sample_spec.level_count == 1 or model.sample_spec.level_count < 0:
        found.append("model.sample_spec.level_count must be 0, for no levels, or at least 2")
    probabilities = model.class_probabilities
    if probabilities and (
        len(probabilities) != len(model.class_names)
        or min(probabilities) < 0
        or not math.isclose(sum(probabilities), 1.0, abs_tol=1e-6)
    ):
        found.append("model.class_probabilities must give one value a class, none negative, summing to 1")
    return found
