"""From graphs and a model file to a bundle: what the file leaves out is found by running the graphs."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from latentd.v1 import bundle_pb2
from torch import Tensor

from latentd_trainer import export, parity
from latentd_trainer.contract import role_name
from latentd_trainer.importers import ImportingError
from latentd_trainer.importers.model_file import ModelFile
from latentd_trainer.onnx_graph import GraphError
from latentd_trainer.onnx_module import OnnxModule
from latentd_trainer.spec import Graph, GraphOutput, Meaning, ServingSpec, Source

SIZES = (1, 2, 3, 5)
"""Batch sizes at which every graph must answer, with a row of each output for each row that came in."""
NEIGHBOUR_TOLERANCE = 1e-3
"""How far a row may be, beside others, from what it is alone, relative to the largest value of its output: kernels
round otherwise at another batch size, but a graph that mixes rows is far beyond."""

_CHANNELS = (1, 3, 4)
_SAMPLES = (Meaning.MEANING_SAMPLE, Meaning.MEANING_SAMPLE_DRAW, Meaning.MEANING_PREDICTION)
_LATENTS = (
    Meaning.MEANING_LATENT_MEAN,
    Meaning.MEANING_LATENT_LOG_VARIANCE,
    Meaning.MEANING_LATENT_PROBABILITY,
)


def write(
    described: ModelFile[Any],
    graphs: Sequence[Graph],
    record: Mapping[str, Any],
    *,
    models: Path,
    version: int | None = None,
    replace: bool = False,
) -> Path:
    """Check the graphs by running them and write `models/NAME/VERSION/`; return that.

    Args:
        described: The model file.
        graphs: Its graphs, with the shapes of inputs; those of outputs are found here.
        record: How the model came about, as JSON.
        models: The models directory of a server.
        version: Its version; the next free one if not given.
        replace: Whether an existing version may be replaced.

    Raises:
        ImportingError: graphs do not do what the file says; the message lists what is wrong with each.
        GraphError: see `export.package`.
        BundleError: see `export.package`.
    """
    origin = export.Origin(
        dataset=described.dataset,
        class_names=described.classes,
        class_probabilities=described.class_probabilities,
        license=described.license,
        dataset_license=described.dataset_license,
        record=record,
    )
    draft = _spec(described, graphs, (1, 1, 1))  # samples' shape may not be known yet, and matters to no input
    bundle = export.declare(draft, origin, f"{described.name}@1")
    complete, problems = [], []
    for graph, network in zip(graphs, bundle.networks, strict=True):
        try:
            complete.append(measured(graph, network))
        except ImportingError as error:
            problems += [f"- {role_name(graph.role)}: {line}" for line in str(error).splitlines()]
    if problems:
        raise ImportingError("\n".join(problems))
    spec = _spec(described, complete, _sample_shape(described, complete))
    return export.package(spec, origin, models=models, name=described.name, version=version, replace=replace)


def measured(graph: Graph, network: bundle_pb2.Network) -> Graph:
    """The graph with the shapes of its outputs, found by running it at every size of `SIZES`.

    Args:
        graph: The graph; the shapes of its outputs are not looked at.
        network: What the bundle says of its inputs.

    Raises:
        ImportingError: it does not run, its outputs are not what they must be, or its rows see each other; one line
            each.
    """
    feeds = parity.random_rows(network, max(SIZES))
    answers = {size: _run(graph, {name: rows[:size] for name, rows in feeds.items()}) for size in SIZES}
    problems, outputs = [], []
    for index, output in enumerate(graph.outputs):
        values = {size: answer[index] for size, answer in answers.items()}
        shape = tuple(values[2].shape[1:])
        outputs.append(GraphOutput(output.name, output.meaning, shape))
        problems += [f"output {output.name!r} {text}" for text in _output_problems(values, shape)]
    if not problems:
        problems = _row_problems(graph, feeds, answers[max(SIZES)])
    if problems:
        raise ImportingError("\n".join(problems))
    module = graph.module
    if isinstance(module, OnnxModule):
        module = module.with_output_shapes([output.shape for output in outputs])
    return dataclasses.replace(graph, module=module, outputs=outputs)


def _run(graph: Graph, feeds: parity.Feeds) -> list[Tensor]:
    size = len(next(iter(feeds.values())))
    try:
        with torch.no_grad():
            result = graph.module(*(torch.from_numpy(rows) for rows in feeds.values()))
    except Exception as error:  # a module of somebody else's may raise anything
        why = str(error) if isinstance(error, GraphError) else f"{type(error).__name__}: {error}"
        raise ImportingError(f"does not run with {size} rows: {' '.join(why.split())}") from error
    tensors = list(result) if isinstance(result, tuple | list) else [result]
    if len(tensors) != len(graph.outputs) or not all(isinstance(each, Tensor) for each in tensors):
        kinds = ", ".join(type(each).__name__ for each in tensors)
        raise ImportingError(f"must return {len(graph.outputs)} tensors, as its outputs say; returns {kinds}")
    return tensors


def _output_problems(values: Mapping[int, Tensor], shape: tuple[int, ...]) -> list[str]:
    found = []
    if wrong := [size for size, tensor in values.items() if not tensor.ndim or len(tensor) != size]:
        found.append(
            f"is of shape {list(values[wrong[0]].shape)} for {wrong[0]} rows; its first axis must be the batch"
        )
    elif any(tuple(tensor.shape[1:]) != shape for tensor in values.values()):
        found.append(
            f"has a shape that depends on the batch size: {[list(tensor.shape) for tensor in values.values()]}"
        )
    if any(tensor.dtype != torch.float32 for tensor in values.values()):
        found.append(f"holds {str(values[2].dtype).removeprefix('torch.')}; must hold float32")
    elif not all(bool(tensor.isfinite().all()) for tensor in values.values()):
        found.append("is not finite for random inputs in their ranges")
    return found


def _row_problems(graph: Graph, feeds: parity.Feeds, together: Sequence[Tensor]) -> list[str]:
    """What makes a row's answer depend on something else than the row."""
    again = _run(graph, feeds)
    found = [
        f"output {output.name!r} is another at each run; noise must come in by inputs"
        for output, one, other in zip(graph.outputs, together, again, strict=True)
        if not torch.allclose(one, other)
    ]
    if found:
        return found
    alone = [_run(graph, {name: rows[row : row + 1] for name, rows in feeds.items()}) for row in range(max(SIZES))]
    for index, output in enumerate(graph.outputs):
        expected = torch.cat([answer[index] for answer in alone])
        difference = float((together[index] - expected).abs().max())
        if difference > NEIGHBOUR_TOLERANCE * max(1.0, float(expected.abs().max())):
            found.append(
                f"output {output.name!r} of a row differs by {difference:.2g} with the rows beside it; something goes "
                "over the batch, as batch statistics do: export it in evaluation mode"
            )
    return found


def _spec(described: ModelFile[Any], graphs: Sequence[Graph], sample_shape: tuple[int, int, int]) -> ServingSpec:
    walked = described.diffusion is not None
    return ServingSpec(
        family=described.family,
        graphs=graphs,
        methods=described.answered_methods(),
        sample_shape=sample_shape,
        latent_shape=sample_shape if walked else _first_shape(graphs, (Source.SOURCE_LATENT,), _LATENTS),
        description=described.description,
        reference_uri=described.reference,
        diffusion=described.diffusion.spec() if described.diffusion is not None else None,
        sample_range=described.sample.range,
        sample_levels=described.sample.levels or 0,
        sample_sizes=described.sample.sizes,
        latent_range=(0.0, 1.0) if described.latent.prior == "uniform" else None,
        likelihood=None if described.likelihood is None else described.likelihood.message(),
    )


def _first_shape(graphs: Sequence[Graph], sources: Sequence[int], meanings: Sequence[int]) -> tuple[int, ...]:
    """The shape of the first input from one of these sources, or else of the first output that means one of these."""
    given = [entry.shape for graph in graphs for entry in graph.inputs if entry.source in sources]
    made = [output.shape for graph in graphs for output in graph.outputs if output.meaning in meanings]
    return next(iter([*given, *made]), ())


def _sample_shape(described: ModelFile[Any], graphs: Sequence[Graph]) -> tuple[int, int, int]:
    """[C, H, W], as the model file says or as the graphs have it.

    Raises:
        ImportingError: it is something else.
    """
    if described.sample.shape is not None:
        return described.sample.shape
    shape = _first_shape(graphs, (Source.SOURCE_SAMPLE,), _SAMPLES)
    if len(shape) != 3:
        raise ImportingError(f"- samples must be of shape [C, H, W]; these are of shape {list(shape)}")
    channels, height, width = shape
    if width in _CHANNELS and channels not in _CHANNELS:
        raise ImportingError(
            f"- samples of shape {list(shape)} look like [H, W, C] (NHWC); they must be [C, H, W] (NCHW): transpose "
            "inside the graph and export it again, or say `sample: {shape: ...}` if these are channels first"
        )
    return channels, height, width
