"""Checks of a bundle on disk, from its JSON down to what its graphs answer."""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import safetensors.torch
from google.protobuf.message import DecodeError
from latentd import names
from latentd.digest import bundle_digest
from latentd.v1 import bundle_pb2, model_pb2
from rich.console import Console
from rich.table import Table
from safetensors import SafetensorError

from latentd_trainer import bundle as bundles
from latentd_trainer import dimensions, export, onnx_graph, parity
from latentd_trainer.bundle import BundleError
from latentd_trainer.checkpoint import CHECKPOINT_FILE, build_family
from latentd_trainer.contract import bundle_violations, role_name
from latentd_trainer.data import DataInfo
from latentd_trainer.onnx_graph import GraphError
from latentd_trainer.parity import Precision
from latentd_trainer.spec import ServingSpec

SMOKE_SIZES = (1, 3)
"""Batch sizes at which every graph must answer with finite numbers."""


@dataclass(frozen=True)
class Check:
    """One check and its outcome: passed if `failures` is empty and it was not skipped."""

    subject: str  # a file of the bundle
    name: str
    failures: list[str] = field(default_factory=list)
    note: str = ""  # a figure, or why it was skipped
    skipped: bool = False


def run(directory: Path, console: Console | None = None) -> int:
    """Check a bundle, print a table of the checks and then every failure; return the exit status, 0 or 1."""
    console = console or Console()
    checks = list(check(directory))
    table = Table("file", "check", "result", title=str(directory))
    for each in checks:
        result = "[yellow]skipped[/]" if each.skipped else "[red]FAILED[/]" if each.failures else "[green]passed[/]"
        table.add_row(each.subject, each.name, f"{result} {each.note}")
    console.print(table)
    failures = [f"{each.subject}: {failure}" for each in checks for failure in each.failures]
    for failure in failures:
        console.print(failure, markup=False, highlight=False, soft_wrap=True)
    return 1 if failures else 0


def check(directory: Path) -> Iterator[Check]:
    """Every check that can be made of the bundle in `directory`; later ones are skipped where earlier ones failed."""
    try:
        bundle = bundles.read(directory)
    except BundleError as error:
        yield Check(names.BUNDLE_FILE, "parses", [str(error)])
        return
    yield Check(names.BUNDLE_FILE, "parses")
    violations = bundle_violations(bundle)
    yield Check(names.BUNDLE_FILE, "is servable", violations)
    yield Check(names.BUNDLE_FILE, "name matches its folder", _name_failures(directory, bundle.model))
    yield Check(names.BUNDLE_FILE, "digest", _digest_failures(bundle))
    yield Check("*.onnx", "no strays", _stray_failures(directory, bundle))
    if violations:  # the graphs cannot be checked against a message that contradicts itself
        yield Check("*.onnx", "graphs", skipped=True, note=f"until {names.BUNDLE_FILE} is servable")
        return
    spec, why_not, failures = _rebuild(directory)
    if failures:
        yield Check(CHECKPOINT_FILE, "builds the networks again", failures)
    precision = _precision(directory)
    for network in bundle.networks:
        yield from _graph_checks(directory / network.file, network, bundle.model, spec, why_not, precision)


def _precision(directory: Path) -> Precision:
    """What the bundle's networks were exported to compute in, by its record; float32 where there is none."""
    try:
        half = bundles.read_record(directory)["export"]["precision"] == "fp16"
    except (BundleError, OSError, KeyError, TypeError):
        return "fp32"
    return "fp16" if half else "fp32"


def _name_failures(directory: Path, model: model_pb2.Model) -> list[str]:
    path = directory.resolve()
    expected = f"{path.parent.name}@{path.name}"
    return [] if model.name == expected else [f"model.name is {model.name!r}, its folder says {expected!r}"]


def _digest_failures(bundle: bundle_pb2.Bundle) -> list[str]:
    expected = bundle_digest(bundle)
    if bundle.model.digest == expected:
        return []
    return [f"model.digest is {bundle.model.digest!r}, the contents give {expected!r}"]


def _stray_failures(directory: Path, bundle: bundle_pb2.Bundle) -> list[str]:
    strays = {path.name for path in directory.glob("*.onnx*")} - {network.file for network in bundle.networks}
    return [f"{name} is named by no graph of {names.BUNDLE_FILE}" for name in sorted(strays)]


def _graph_checks(
    path: Path,
    network: bundle_pb2.Network,
    model: model_pb2.Model,
    spec: ServingSpec | None,
    why_not: str,
    precision: Precision,
) -> Iterator[Check]:
    try:
        data = path.read_bytes()
    except OSError as error:
        yield Check(path.name, "sha256", [f"cannot be read: {error.strerror}"])
        return
    sized = dimensions.followers(network) if model.sample_sizes else frozenset[str]()
    digest = bundles.sha256(data)
    wrong = [] if digest == network.sha256 else [f"sha256 is {digest}, {names.BUNDLE_FILE} says {network.sha256}"]
    yield Check(path.name, "sha256", wrong)
    try:
        contradictions = onnx_graph.graph_violations(onnx.load_model_from_string(data), network, sized)
    except DecodeError as error:
        contradictions = [f"is no ONNX file: {error}"]
    yield Check(path.name, f"inputs and outputs agree with {names.BUNDLE_FILE}", contradictions)
    if contradictions:
        yield Check(path.name, "runs", skipped=True, note="until its inputs and outputs agree")
        return
    try:
        session = parity.open_session(data)
        yield Check(path.name, f"runs at batch sizes {SMOKE_SIZES}", _smoke_failures(session, network))
        for size, variant in dimensions.at_each(network, model):
            yield Check(path.name, f"runs with samples of {dimensions.text(size)}", _smoke_failures(session, variant))
        invariant = parity.row_invariant(session, network)
    except GraphError as error:
        yield Check(path.name, "runs", [str(error)])
        return
    if not invariant:
        yield Check(path.name, "rows do not depend on their batch", skipped=True, note="they do, on this machine")
    if spec is None:
        yield Check(path.name, "equals torch", skipped=True, note=why_not)
        return
    yield _parity_check(path.name, session, network, model, spec, precision)
    for size, variant in dimensions.at_each(network, model):
        each = _parity_check(path.name, session, variant, dimensions.sized(model, size), spec, precision)
        yield replace(each, name=f"{each.name} at {dimensions.text(size)}")


def _smoke_failures(session: ort.InferenceSession, network: bundle_pb2.Network) -> list[str]:
    failures = []
    for size in SMOKE_SIZES:
        answers = parity.run_onnx(session, parity.random_rows(network, size))
        for output, values in zip(network.outputs, answers, strict=True):
            expected = (size, *output.spec.shape)
            if values.shape != expected:
                failures.append(f"output {output.name!r} must be of shape {expected}, is {values.shape}")
            elif not np.isfinite(values).all():
                failures.append(f"output {output.name!r} is not finite at batch size {size}")
    return failures


def _parity_check(
    name: str,
    session: ort.InferenceSession,
    network: bundle_pb2.Network,
    model: model_pb2.Model,
    spec: ServingSpec,
    precision: Precision,
) -> Check:
    graph = next((graph for graph in spec.graphs if graph.role == network.role), None)
    if graph is None:
        return Check(name, "equals torch", [f"the family has no {role_name(network.role)}"])
    try:
        worst = parity.worst_deviation(graph.module, session, network, precision)
        chain = parity.chain_deviation(graph.module, session, network, model) if model.HasField("diffusion") else 0.0
    except GraphError as error:
        return Check(name, "equals torch", [str(error)])
    return Check(
        name, "equals torch", parity.excesses(worst, chain, precision), f"to {max(chain, *worst.values()):.1e}"
    )


def _rebuild(directory: Path) -> tuple[ServingSpec | None, str, list[str]]:
    """The networks with the bundle's weights; or else why they cannot be had, and whether that is a failure."""
    weights_path = directory / CHECKPOINT_FILE
    if not weights_path.exists():
        return None, "there is no checkpoint beside it", []
    try:
        record = bundles.read_record(directory)
        info = DataInfo.of(record["info"])
        spec = build_family(record["family"], record["settings"], info, record["seed"]).serving_spec()
        export.load_weights(spec, safetensors.torch.load(weights_path.read_bytes()))
    except (
        BundleError,
        OSError,
        AttributeError,
        KeyError,
        TypeError,
        ValueError,
        SafetensorError,
        GraphError,
    ) as error:
        return None, "the checkpoint cannot be used", [f"{type(error).__name__}: {error}"]
    return spec, "", []
