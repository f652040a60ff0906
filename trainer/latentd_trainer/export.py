"""From a trained model to a bundle on disk: export each network, prove it equal to torch, write everything at once."""

import dataclasses
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import onnx
import onnxruntime as ort
import safetensors.torch
import torch
from latentd import names
from latentd.digest import bundle_digest
from latentd.v1 import bundle_pb2, model_pb2, tensor_pb2

from latentd_trainer import bundle as bundles
from latentd_trainer import card, dimensions, half, licenses, onnx_graph, parity
from latentd_trainer.bundle import BundleError, VersionTakenError
from latentd_trainer.checkpoint import CHECKPOINT_FILE, RunRecord, load_run
from latentd_trainer.contract import bundle_violations, role_name
from latentd_trainer.data import EMBEDDED, EMBEDDED_LICENSE
from latentd_trainer.dimensions import Size
from latentd_trainer.onnx_graph import GraphError
from latentd_trainer.onnx_module import OnnxModule
from latentd_trainer.parity import Precision
from latentd_trainer.spec import Graph, GraphInput, Role, ServingSpec, Source

EMBEDDED_WEIGHTS_LICENSE = "Apache-2.0"
"""Of what is trained on the embedded digits by the recipes that come with latentd: latentd's own."""

_log = logging.getLogger(__name__)


def run(
    run_directory: Path,
    *,
    models: Path,
    name: str,
    version: int | None = None,
    license: str | None = None,
    data_license: str | None = None,
    replace: bool = False,
    precision: Precision = "fp32",
    sizes: Sequence[Size] = (),
) -> Path:
    """Export what the run in `run_directory` has trained to `models/NAME/VERSION/`; see `write_bundle`.

    Raises:
        CheckpointError: the run cannot be read.
        GraphError: see `write_bundle`.
        BundleError: see `write_bundle`.
    """
    trained = load_run(run_directory)
    asked = trained.family.config.steps
    if trained.step < asked:
        _log.warning("%s: trained for %d of %d steps so far", run_directory, trained.step, asked)
    return write_bundle(
        trained.family.serving_spec(),
        trained.record,
        datetime.fromtimestamp(int((run_directory / CHECKPOINT_FILE).stat().st_mtime), UTC),
        models=models,
        name=name,
        version=version,
        license=license,
        data_license=data_license,
        replace=replace,
        trained_steps=trained.step,
        precision=precision,
        sizes=sizes,
    )


def write_bundle(
    spec: ServingSpec,
    record: RunRecord,
    train_time: datetime,
    *,
    models: Path,
    name: str,
    version: int | None = None,
    license: str | None = None,
    data_license: str | None = None,
    replace: bool = False,
    trained_steps: int | None = None,
    precision: Precision = "fp32",
    sizes: Sequence[Size] = (),
) -> Path:
    """Write what was trained to `models/NAME/VERSION/` and return that.

    Beside the graphs it holds the weights served (`checkpoint.safetensors`) and how they came about
    (`record.json`), for `verify`; a server ignores both.

    Args:
        spec: The networks and what a server must know of them.
        record: How they were trained.
        train_time: When training ended, with its time zone.
        models: The models directory of a server.
        name: What the model is called.
        version: Its version; the next free one if not given.
        license: SPDX expression of the weights' licence; for the embedded digits `EMBEDDED_WEIGHTS_LICENSE` if not
            given, else `licenses.UNKNOWN`.
        data_license: The same of the training data; that of the embedded digits, or `licenses.UNKNOWN`, if not given.
        replace: Whether an existing version may be replaced.
        trained_steps: How many steps it was trained for, which may be fewer than the settings ask for.
        precision: What the networks compute in.
        sizes: Heights and widths beside the default that a server may be asked for; of a diffusion model.

    Raises:
        GraphError: see `package`.
        BundleError: see `package`.
    """
    embedded = record.data == EMBEDDED
    training = dataclasses.asdict(record)
    del training["data"], training["latents_of"]  # where the data and the encoder lay; their digests stay
    origin = Origin(
        dataset=record.info.name,
        class_names=record.info.class_names,
        class_probabilities=record.info.class_probabilities,
        license=license or (EMBEDDED_WEIGHTS_LICENSE if embedded else licenses.UNKNOWN),
        dataset_license=data_license or (EMBEDDED_LICENSE if embedded else licenses.UNKNOWN),
        train_time=train_time,
        record={**training, "trained_steps": trained_steps},
    )
    beside = {CHECKPOINT_FILE: safetensors.torch.save(weights(spec))}
    spec = dataclasses.replace(spec, sample_sizes=sizes)
    return package(
        spec, origin, models=models, name=name, version=version, replace=replace, beside=beside, precision=precision
    )


@dataclass(frozen=True)
class Origin:
    """Where a model comes from: what its card and its record say of it beside its networks."""

    dataset: str
    class_names: Sequence[str]
    class_probabilities: Sequence[float]
    license: str  # SPDX expression for the weights
    record: Mapping[str, Any]  # how it came about, as JSON
    train_time: datetime | None = None  # with its time zone
    dataset_license: str = licenses.UNKNOWN  # SPDX expression


def package(
    spec: ServingSpec,
    origin: Origin,
    *,
    models: Path,
    name: str,
    version: int | None = None,
    replace: bool = False,
    beside: Mapping[str, bytes] | None = None,
    precision: Precision = "fp32",
) -> Path:
    """Export and check every network, write all of it to `models/NAME/VERSION/` at once, and return that.

    Args:
        spec: The networks and what a server must know of them.
        origin: Where they come from.
        models: The models directory of a server.
        name: What the model is called.
        version: Its version; the next free one if not given.
        replace: Whether an existing version may be replaced.
        beside: Files that lie in the bundle beside what a server reads, by name.
        precision: What the networks compute in; their inputs and outputs are float32 either way.

    Raises:
        GraphError: a network cannot be exported, breaks the contract, or differs from torch by more than
            `parity.TOLERANCES` allow; the message names the graph, the input and what was expected.
        BundleError: the spec cannot be served as it is, the version exists and `replace` is not set, or the disk
            refused; what stood before stands.
    """
    if not names.is_name(name):
        raise BundleError(f"{name!r} is no model name; it must match {names.NAME_PATTERN}, as digits-vae does")
    number = version or bundles.next_version(models, name)
    bundles.require_free(models / name / str(number), replace)
    bundle = declare(spec, origin, f"{name}@{number}")
    if precision == "fp16":
        bundle.model.card.description += " Its networks compute in float16."
    violations = bundle_violations(bundle)
    if not violations:
        try:
            card.complete(bundle, spec.answers, spec.likelihood)
        except ValueError as error:
            violations = [str(error)]
    if violations:
        raise BundleError("the model cannot be served as it is:\n" + "\n".join(f"- {each}" for each in violations))

    files: dict[str, bytes] = {}
    proofs: dict[str, Any] = {}
    for graph, network in zip(spec.graphs, bundle.networks, strict=True):
        data, proofs[role_name(graph.role)] = _export_graph(graph, network, bundle.model, precision)
        files[network.file] = data
        network.sha256 = bundles.sha256(data)
    files |= beside or {}
    files[bundles.RECORD_FILE] = (
        json.dumps({**origin.record, "export": _how_exported(proofs, precision)}, indent=2) + "\n"
    ).encode()
    while True:
        directory = models / name / str(number)
        bundle.model.name = f"{name}@{number}"
        bundle.model.digest = bundle_digest(bundle)
        try:
            bundles.write(directory, bundle, files, replace=replace and version is not None)
        except VersionTakenError:
            if version is not None:
                raise
            number = bundles.next_version(models, name)  # another export took the one that was free
        else:
            return directory


def _how_exported(proofs: Mapping[str, Any], precision: Precision) -> dict[str, Any]:
    return {
        "precision": precision,
        "versions": {"torch": torch.__version__, "onnx": onnx.__version__, "onnxruntime": ort.__version__},
        "parity": proofs,
    }


def weights(spec: ServingSpec) -> dict[str, torch.Tensor]:
    """The parameters and buffers of every graph's module, under `ROLE.` and their own name, on the CPU."""
    return {
        f"{role_name(graph.role)}.{key}": tensor.detach().cpu().contiguous().clone()
        for graph in spec.graphs
        for key, tensor in graph.module.state_dict().items()
    }


def load_weights(spec: ServingSpec, tensors: Mapping[str, torch.Tensor]) -> None:
    """Put what `weights` returned back into the modules of an equally built spec.

    Raises:
        GraphError: tensors are missing, left over or of another shape.
    """
    for graph in spec.graphs:
        prefix = f"{role_name(graph.role)}."
        state = {key.removeprefix(prefix): tensor for key, tensor in tensors.items() if key.startswith(prefix)}
        try:
            graph.module.load_state_dict(state)
        except RuntimeError as error:
            raise GraphError(f"{role_name(graph.role)}: the checkpoint does not fit the network: {error}") from error


def declare(spec: ServingSpec, origin: Origin, reference: str) -> bundle_pb2.Bundle:
    """The bundle's message, all but the digests of its files."""
    names_of_classes, probabilities = (
        (origin.class_names, origin.class_probabilities) if spec.class_conditional else ((), ())
    )
    if spec.own_classes:
        names_of_classes, probabilities = spec.own_classes, [1 / len(spec.own_classes)] * len(spec.own_classes)
    low, high = spec.sample_range
    latent_low, latent_high = spec.latent_range or (0.0, 0.0)
    model = model_pb2.Model(
        name=reference,
        family=spec.family,
        methods=spec.methods,
        sample_spec=_tensor_spec(spec.sample_shape, low=low, high=high, levels=spec.sample_levels),
        latent_spec=_tensor_spec(spec.latent_shape, low=latent_low, high=latent_high) if spec.latent_shape else None,
        class_names=names_of_classes,
        class_probabilities=probabilities,
        diffusion=spec.diffusion,
        latent_space=spec.latent_space,
        sample_sizes=[model_pb2.Size(height=height, width=width) for height, width in spec.sample_sizes],
        card=model_pb2.ModelCard(
            description=spec.description,
            license=origin.license,
            dataset=origin.dataset,
            dataset_license=origin.dataset_license,
            reference_uri=spec.reference_uri,
        ),
    )
    if origin.train_time is not None:
        model.card.train_time.FromDatetime(origin.train_time)
    networks = [
        bundle_pb2.Network(
            role=graph.role,
            file=f"{role_name(graph.role)}.onnx",
            inputs=[
                bundle_pb2.NetworkInput(
                    name=entry.name, source=entry.source, spec=_input_spec(entry, graph.role, model)
                )
                for entry in graph.inputs
            ],
            outputs=[
                bundle_pb2.NetworkOutput(name=result.name, meaning=result.meaning, spec=_tensor_spec(result.shape))
                for result in graph.outputs
            ],
        )
        for graph in spec.graphs
    ]
    return bundle_pb2.Bundle(format_version=names.BUNDLE_FORMAT_VERSION, model=model, networks=networks)


def _input_spec(entry: GraphInput, role: int, model: model_pb2.Model) -> model_pb2.TensorSpec:
    """Type, shape and, where the values are bounded, range of an input."""
    low = high = 0.0
    if entry.source == Source.SOURCE_SAMPLE and role != Role.ROLE_DENOISER:  # noisy samples have no bound
        low, high = model.sample_spec.min_value, model.sample_spec.max_value
    elif entry.source == Source.SOURCE_LATENT:
        low, high = model.latent_spec.min_value, model.latent_spec.max_value
    elif entry.source == Source.SOURCE_TIMESTEP:
        high = len(model.diffusion.alphas) - 1
    elif entry.source == Source.SOURCE_CLASS_LABEL:
        low = -1.0 if model.diffusion.guidance_supported else 0.0  # -1 is the unconditional network
        high = len(model.class_names) - 1
    elif entry.source == Source.SOURCE_UNIFORM_NOISE:
        high = 1.0
    return _tensor_spec(entry.shape, entry.data_type, low, high)


def _tensor_spec(
    shape: Sequence[int],
    data_type: tensor_pb2.DataType.ValueType = tensor_pb2.DATA_TYPE_FLOAT32,
    low: float = 0.0,
    high: float = 0.0,
    levels: int = 0,
) -> model_pb2.TensorSpec:
    return model_pb2.TensorSpec(data_type=data_type, shape=shape, min_value=low, max_value=high, level_count=levels)


def _export_graph(
    graph: Graph, network: bundle_pb2.Network, model: model_pb2.Model, precision: Precision
) -> tuple[bytes, dict[str, Any]]:
    """The `.onnx` file of one network, and the figures that prove it equal to torch."""
    role = role_name(graph.role)
    example = parity.random_rows(network, onnx_graph.EXAMPLE_BATCH)
    sized = dimensions.followers(network) if model.sample_sizes else frozenset[str]()
    graph.module.cpu()
    try:
        module = graph.module
        if isinstance(module, OnnxModule):
            exported = onnx.ModelProto()
            exported.CopyFrom(module.model)
        else:
            for size, variant in dimensions.at_each(network, model):
                parity.require_size(dimensions.text(size), variant, lambda feeds: parity.run_torch(module, feeds))
            exported = onnx_graph.to_onnx(graph, example, sized=sized)
        onnx_graph.open_sizes(exported, sized)
        if precision == "fp16":
            exported = half.to_half(exported)
        if violations := onnx_graph.graph_violations(exported, network, sized):
            raise GraphError("the exported graph cannot be served: " + "; ".join(violations))
        data = onnx_graph.serialize(exported)
        proof = _prove(graph, network, model, data, precision)
    except GraphError as error:
        raise GraphError(f"{role}: {error}") from error
    if not all(each["row_invariant"] for each in (proof, *proof.get("sizes", {}).values())):
        _log.warning("%s: a row's bytes depend on the batch it rides in; equal seeds will not give equal bytes", role)
    return data, {"opset": onnx_graph.opset(exported), **proof}


def _prove(
    graph: Graph, network: bundle_pb2.Network, model: model_pb2.Model, data: bytes, precision: Precision
) -> dict[str, Any]:
    """How far the exported graph is from torch.

    Raises:
        GraphError: further than is allowed.
    """
    session = parity.open_session(data)
    by_size: dict[str, Any] = {}
    for size, variant in dimensions.at_each(network, model):
        parity.require_size(dimensions.text(size), variant, lambda feeds: parity.run_onnx(session, feeds))
        try:
            by_size[dimensions.text(size)] = _prove_once(
                graph, variant, dimensions.sized(model, size), session, precision
            )
        except GraphError as error:
            raise GraphError(f"at {dimensions.text(size)}: {error}") from error
    return _prove_once(graph, network, model, session, precision) | ({"sizes": by_size} if by_size else {})


def _prove_once(
    graph: Graph,
    network: bundle_pb2.Network,
    model: model_pb2.Model,
    session: ort.InferenceSession,
    precision: Precision,
) -> dict[str, Any]:
    """The same at one size of samples."""
    if isinstance(graph.module, OnnxModule):  # there is no torch to be equal to
        return {"row_invariant": parity.row_invariant(session, network)}
    proof: dict[str, Any] = {"deviation": parity.worst_deviation(graph.module, session, network, precision)}
    if graph.role == Role.ROLE_DENOISER:
        proof["chain_deviation"] = parity.chain_deviation(graph.module, session, network, model)
    if excesses := parity.excesses(**proof, precision=precision):
        raise GraphError("; ".join(excesses))
    return {**proof, "row_invariant": parity.row_invariant(session, network)}
