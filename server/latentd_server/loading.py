"""From a bundle on disk to graphs on the device: compile, warm up, certify. Slow; belongs on a thread of its own."""

import logging
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from latentd.tensor import DTYPES
from latentd.v1 import bundle_pb2, model_pb2

from latentd_server import samplers, step_graph
from latentd_server.bundle import StoredBundle, read
from latentd_server.certificate import Buckets, certify
from latentd_server.determinism import determinism_class
from latentd_server.job import Servable
from latentd_server.runners import CallRunner, Runner, StepRunner
from latentd_server.runtime import CompiledGraph, Device, Feeds
from latentd_server.scheduler import GraphKey

log = logging.getLogger(__name__)

_Source = bundle_pb2.NetworkInput


@dataclass(frozen=True)
class LoadedModel:
    """A model that is ready to be served."""

    servable: Servable
    runners: dict[GraphKey, Runner]


def load(directory: Path, device: Device, threads: int, max_rows: int) -> LoadedModel:
    """Read, check, compile, warm up and certify one bundle.

    Raises:
        BundleError: the bundle is not one that can be served.
        DeviceError: the device does not start.
    """
    started = time.monotonic()
    stored = read(directory)
    model = stored.message.model
    runners: dict[GraphKey, Runner] = {}
    buckets: dict[int, Buckets] = {}
    for network in stored.message.networks:
        data = stored.graphs[network.role]
        if network.role == bundle_pb2.Network.ROLE_DENOISER:
            runners[model.name, network.role], sizes = _step_runner(data, network, stored, device, threads, max_rows)
        else:
            graph = CompiledGraph(data, device, threads)
            sizes = certify(graph, partial(_rows, network, model), max_rows)
            runners[model.name, network.role] = CallRunner(graph, network, sizes)
        if not sizes.certified:
            log.warning("%s: rows of %s see each other; its bytes may change with load", model.name, network.file)
        buckets[network.role] = sizes
    determinism = determinism_class(model.digest, device, threads, buckets)
    log.info("%s is ready after %.2f s (%s)", model.name, time.monotonic() - started, determinism)
    return LoadedModel(Servable(stored.message, stored.schedule, determinism), runners)


def _rows(network: bundle_pb2.Network, model: model_pb2.Model, count: int, rng: np.random.Generator) -> Feeds:
    """Random inputs of a graph, as requests might bring them."""
    feeds: Feeds = {}
    for value in network.inputs:
        shape = (count, *value.spec.shape)
        if value.source == _Source.SOURCE_TIMESTEP:
            feeds[value.name] = rng.integers(0, len(model.diffusion.alphas), shape)
        elif value.source == _Source.SOURCE_CLASS_LABEL:
            feeds[value.name] = rng.integers(0, max(1, len(model.class_names)), shape)
        elif value.source == _Source.SOURCE_UNIFORM_NOISE:
            feeds[value.name] = rng.random(shape, np.float32)
        else:
            feeds[value.name] = rng.standard_normal(shape, np.float32).astype(DTYPES[value.spec.data_type])
    return feeds


def _step_runner(
    data: bytes, network: bundle_pb2.Network, stored: StoredBundle, device: Device, threads: int, max_rows: int
) -> tuple[StepRunner, Buckets]:
    """Wrap the denoiser in the step graph and try that as a whole."""
    model = stored.message.model
    by_source = {value.source: value.name for value in network.inputs}
    label = by_source.get(_Source.SOURCE_CLASS_LABEL)
    shape = tuple(model.sample_spec.shape)
    fused = step_graph.build(
        data,
        by_source[_Source.SOURCE_SAMPLE],
        by_source[_Source.SOURCE_TIMESTEP],
        label,
        network.outputs[0].name,
        shape,
    )
    graph = CompiledGraph(fused, device, threads)

    def rows(count: int, rng: np.random.Generator) -> Feeds:
        own = np.arange(count)
        feeds = _rows(network, model, count, rng)
        images = {
            name: rng.standard_normal((count, *shape), np.float32) for name in ("x", "h", "x_init", "h_init", "z")
        }
        step = {
            "slot": own,
            "lane": own,
            "row_u": own,
            "row_c": own,
            "timestep": feeds[by_source[_Source.SOURCE_TIMESTEP]],
            "reset": rng.random(count) < 0.5,  # admitted, or held from the call before
            "w": np.ones(count, np.float32),
            "coefficients": rng.standard_normal((len(samplers.COLUMNS), count, *[1] * len(shape)), np.float32),
        }
        return images | step | ({"label": feeds[label]} if label is not None else {})

    sizes = certify(graph, rows, max_rows)
    return StepRunner(graph, shape, label is not None, sizes), sizes
