"""From a bundle on disk to graphs on the device: compile, warm up, certify. Slow; belongs on a thread of its own."""

import hashlib
import logging
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from latentd import __version__
from latentd.tensor import DTYPES
from latentd.v1 import bundle_pb2, model_pb2

from latentd_server import graph_cost, latents, sizes, step_graph
from latentd_server.alone import Alone
from latentd_server.bundle import BundleError, StoredBundle, read
from latentd_server.call_runner import CallRunner
from latentd_server.certificate import Buckets, Certificate, Promise, Trial, bucket_sizes, certify, warm_up, witness
from latentd_server.certificate_cache import CertificateCache
from latentd_server.determinism import conditions, determinism_class, is_promise, joined
from latentd_server.job import Servable
from latentd_server.runners import Runner
from latentd_server.runtime import CompiledGraph, Device, compiling
from latentd_server.scheduler import GraphKey, key_of
from latentd_server.step_runner import StepRunner
from latentd_server.trials import CallTrial, StepTrial
from latentd_server.wiring import state_spec

log = logging.getLogger(__name__)

_NONE: Mapping[str, Servable] = {}

_SHORT_CALL = 100_000_000
"""Multiply-adds that one core does in some milliseconds at most."""
_SMALL_CALL_BYTES = 2**20
"""Of inputs and outputs, of a call that is wider than others."""

_Source = bundle_pb2.NetworkInput
_Determinism = model_pb2.ModelDeterminism

_PROMISES = {
    Promise.BATCHED: _Determinism.PROMISE_BATCHED,
    Promise.ALONE: _Determinism.PROMISE_ALONE,
    Promise.NOTHING: _Determinism.PROMISE_NOTHING,
}


@dataclass(frozen=True)
class LoadedModel:
    """A model that is ready to be served."""

    servable: Servable
    runners: dict[GraphKey, Runner]
    checkable: bool  # whether the bytes of its own graphs are promised
    state_lanes: dict[GraphKey, int] = field(default_factory=dict)  # room for lanes' state, where that is bounded
    wide: dict[GraphKey, int] = field(default_factory=dict)  # rows of a batch, where that is more than usual


@dataclass(frozen=True)
class Terms:
    """How models are to be loaded."""

    device: Device
    threads: int
    max_rows: int
    strict: bool  # equal bytes, or else whatever is fastest
    cache: CertificateCache
    max_samples: int = 1024  # of one request
    widest_rows: int = 0  # of graphs so small that such a call is short, where that is more than `max_rows`


def load(directory: Path, terms: Terms, served: Mapping[str, Servable] = _NONE) -> LoadedModel:
    """Read, check, compile, warm up and certify one bundle; `served` are the models that it may lean on, by name.

    Raises:
        BundleError: the bundle is not one that can be served.
        DeviceError: the device does not start.
    """
    started = time.monotonic()
    stored = read(directory)
    model = stored.message.model
    decoder = served.get(model.latent_space.decoder) if model.HasField("latent_space") else None
    if model.HasField("latent_space") and (found := latents.problems(stored.message, decoder)):
        raise BundleError(found)
    circumstances = conditions(model.digest, terms.device, terms.threads)
    runners: dict[GraphKey, Runner] = {}
    certificates: dict[str, Certificate] = {}
    state_lanes: dict[GraphKey, int] = {}
    wide: dict[GraphKey, int] = {}
    variants = {size: replace(stored, message=sizes.at(stored.message, size)) for size in sizes.listed(model)}
    model.ClearField("determinism")
    for size, variant in [(None, stored), *variants.items()]:
        for network in variant.message.networks:
            with compiling():
                rows = _most_rows(network, variant, terms)
                runner, certificate = _certified(network, variant, rows, circumstances, terms)
                usual = bucket_sizes(terms.max_rows, terms.device.kind)
                if rows > terms.max_rows and not set(usual) <= set(certificate.buckets.sizes):
                    # Large calls give other bytes than small ones, or see each other's rows: they are not worth that.
                    rows = terms.max_rows
                    runner, certificate = _certified(network, variant, rows, circumstances, terms)
            key = key_of(model.name, network.role, size)
            shape = tuple(state_spec(variant.message.model).shape)
            if isinstance(runner, StepRunner) and (lanes := state_room(terms, shape).lanes):
                state_lanes[key] = lanes
            runners[key] = Alone(runner) if certificate.promise is Promise.ALONE else runner
            if rows > terms.max_rows:
                wide[key] = rows
            label = network.file if size is None else f"{network.file} at {sizes.text(size)}"
            certificates[label] = certificate
            model.determinism.graphs.append(_graph_described(network.file, size, certificate))
            if terms.strict and certificate.promise is not Promise.BATCHED:
                log.warning("%s: %s", model.name, _explanation(label, certificate))
    name = determinism_class(circumstances, terms.device, certificates, terms.strict)
    own = is_promise(name)
    model.determinism.determinism_class = name
    explanations = [_explanation(label, each) for label, each in certificates.items()]
    model.determinism.explanation = (
        "; ".join(explanations) if terms.strict else "this server runs with determinism=none"
    )
    if decoder is not None:
        model.determinism.determinism_class = name = joined(name, decoder.determinism_class)
        model.determinism.explanation += f"; samples are decoded by {decoder.model.name}, which its class covers"
    log.info("%s is ready after %.2f s (%s)", model.name, time.monotonic() - started, name)
    at_sizes = tuple(
        Servable(variant.message, variant.schedule, name, is_promise(name), size=size)
        for size, variant in variants.items()
    )
    servable = Servable(stored.message, stored.schedule, name, is_promise(name), decoder, variants=at_sizes)
    return LoadedModel(servable, runners, own, state_lanes, wide)


@dataclass(frozen=True)
class StateRoom:
    """How a denoiser shares the device's memory with the state of lanes under way."""

    device: Device  # with what is left to the network's arena
    lanes: int | None = None  # of several steps, that may be accepted; None is any number
    slots: int | None = None  # to begin with; None is what a few calls need


def state_room(terms: Terms, shape: tuple[int, ...]) -> StateRoom:
    """Set the state's memory apart where memory is limited: enough for the largest request and for calls under way.

    Raises:
        BundleError: that is more than half of the limit.
    """
    limit_mib = terms.device.cuda.memory_mib
    if not (terms.device.has_memory and limit_mib):
        return StateRoom(terms.device)
    slots = terms.max_samples + 4 * terms.max_rows  # two calls under way, and lanes that leave as others come
    pool_mib = math.ceil(8 * math.prod(shape) * (slots + 1) / 2**20)  # x and h, and the slot of padding
    if 2 * pool_mib > limit_mib:
        raise BundleError(
            [
                f"the state of {slots} samples under way takes {pool_mib} MiB of GPU memory, and at most half of "
                f"--gpu-memory-mib {limit_mib} may go to it; give {2 * pool_mib} or more, or lower --max-samples "
                f"{terms.max_samples} or --max-batch-rows {terms.max_rows}"
            ]
        )
    cuda = replace(terms.device.cuda, memory_mib=limit_mib - pool_mib)
    return StateRoom(replace(terms.device, cuda=cuda), terms.max_samples, slots)


def _most_rows(network: bundle_pb2.Network, stored: StoredBundle, terms: Terms) -> int:
    """Rows of the largest call of a graph. What a batch costs beside its call is shared by more rows where the call
    stays short; how short is counted, not measured, since replicas must agree on the sizes that are tried.
    """
    rows = terms.max_rows
    if terms.widest_rows <= rows or network.role == bundle_pb2.Network.ROLE_DENOISER:
        return rows
    cost = graph_cost.row_cost(stored.graphs[network.role])
    specs = [value.spec for value in network.inputs] + [value.spec for value in network.outputs]
    row_bytes = sum(DTYPES[spec.data_type].itemsize * math.prod(spec.shape) for spec in specs)
    if cost is None:
        return rows
    most = min(terms.widest_rows, _SHORT_CALL // max(1, cost), _SMALL_CALL_BYTES // max(1, row_bytes))
    while 2 * rows <= most:
        rows *= 2
    return rows


def _certified(
    network: bundle_pb2.Network, stored: StoredBundle, rows: int, circumstances: Mapping[str, str], terms: Terms
) -> tuple[CallRunner | StepRunner, Certificate]:
    """What runs a graph, in the sizes up to so many rows that it may be called with."""
    tried = bucket_sizes(rows, terms.device.kind, terms.max_rows)
    runner, trial, graph, data = _prepared(network, stored, tried, terms)
    known = {**circumstances, "graph": hashlib.sha256(data).hexdigest(), "latentd": __version__}
    certificate = _certificate(trial, graph, known, tried, terms)
    runner.buckets = certificate.buckets
    return runner, certificate


def _prepared(
    network: bundle_pb2.Network, stored: StoredBundle, tried: tuple[int, ...], terms: Terms
) -> tuple[CallRunner | StepRunner, Trial, CompiledGraph, bytes]:
    """What runs a graph, its trial, the graph on the device, and what was compiled: a denoiser in the step graph."""
    model, data = stored.message.model, stored.graphs[network.role]
    everything, rows = Buckets(tried), tried[-1]
    if network.role != bundle_pb2.Network.ROLE_DENOISER:
        graph = CompiledGraph(data, terms.device, terms.threads)
        calls = CallRunner(graph, network, everything)
        return calls, CallTrial(calls, network, model, rows), graph, data
    by_source = {value.source: value.name for value in network.inputs}
    label = by_source.get(_Source.SOURCE_CLASS_LABEL)
    shape = tuple(state_spec(model).shape)
    data = step_graph.build(
        data,
        by_source[_Source.SOURCE_SAMPLE],
        by_source[_Source.SOURCE_TIMESTEP],
        label,
        network.outputs[0].name,
        shape,
    )
    has_label = label is not None
    room = state_room(terms, shape)
    graph = CompiledGraph(data, room.device, terms.threads)
    steps = StepRunner(graph, shape, everything, lanes=room.slots)
    return steps, StepTrial(steps, model, has_label, rows), graph, data


def _certificate(
    trial: Trial, graph: CompiledGraph, known: Mapping[str, str], sizes: tuple[int, ...], terms: Terms
) -> Certificate:
    """Try a graph, or look up what trying it gave before; either way it is warm afterwards.

    A kept certificate is believed when the smallest call still gives the bytes it gave then.
    """
    found = terms.cache.find(known, sizes) if terms.strict else Certificate(Promise.NOTHING, Buckets(sizes))
    if found is not None and terms.device.kind == "cuda":  # kernels are loaded and graphs captured by the first calls
        warm_up(trial, found.buckets)
    if found is not None and (not terms.strict or witness(trial, found.buckets) == found.witness):
        return found
    if found is not None:
        log.warning("a kept certificate is not believed, since the bytes are not those of then; the graph is tried")
    certificate = certify(trial, sizes)
    with graph.giving_back():
        witness(trial, certificate.buckets)
    if certificate.promise is not Promise.NOTHING:
        terms.cache.keep(known, sizes, certificate)
    return certificate


def _graph_described(file: str, size: sizes.Size | None, certificate: Certificate) -> _Determinism.Graph:
    """What GetModel says of one graph, at one size of samples."""
    graph = _Determinism.Graph(file=file, promise=_PROMISES[certificate.promise], batch_sizes=certificate.buckets.sizes)
    if size is not None:
        graph.sample_size.height, graph.sample_size.width = size
    return graph


def _explanation(file: str, certificate: Certificate) -> str:
    """A graph's promise in words."""
    match certificate.promise:
        case Promise.BATCHED:
            return f"samples share calls of {file}, in sizes of equal bytes"
        case Promise.ALONE:
            return f"rows of {file} see each other, so every sample has a call to itself: equal bytes, but slower"
        case Promise.NOTHING:
            return f"{file} gave two answers to one call, so equal requests may give unequal bytes"
