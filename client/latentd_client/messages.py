"""Python values to requests, and answers to results. Pure: no gRPC, no clock, no chance.

Values that do not fit into a request at all are refused here, every one at once, with the exception the server's own
refusal becomes. What fits is sent as it is: the server knows the model, and the rules are written once.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, SupportsIndex

import numpy as np
from google.protobuf.duration_pb2 import Duration
from latentd import tensor
from latentd.v1 import generation_service_pb2 as pb
from latentd.v1 import model_pb2, tensor_pb2
from numpy.typing import ArrayLike, DTypeLike, NDArray

from latentd_client import errors
from latentd_client.model import Model, enum_name
from latentd_client.results import Decoded, Encoded, LoopStep, Scores, Stats, Step, VariationalTerms

Array = NDArray[Any]
Label = int | Sequence[int] | NDArray[np.integer[Any]] | None
"""One label for all, one for each sample, or None: unconditional."""
Output = Literal["mean", "draw", "latent"]

_INT32_MAX = 2**31 - 1
_INT64_MAX = 2**63 - 1
_SAMPLE_TYPES = {
    tensor.DTYPES[data_type]: data_type
    for data_type in (tensor_pb2.DATA_TYPE_FLOAT32, tensor_pb2.DATA_TYPE_FLOAT16, tensor_pb2.DATA_TYPE_UINT8)
}
_OUTPUT_MODES = {"mean": pb.OUTPUT_MODE_MEAN, "draw": pb.OUTPUT_MODE_DRAW, "latent": pb.OUTPUT_MODE_LATENT}


@dataclass(slots=True)
class Fields:
    """Converts the arguments of one call, and gathers what is wrong with them."""

    violations: list[errors.Violation] = field(default_factory=list)

    def check(self) -> None:
        """Raise what was gathered, if anything.

        Raises:
            FieldsInvalid: with every violation.
        """
        if self.violations:
            raise errors.invalid(self.violations)

    def wrong(self, path: str, description: str) -> None:
        """Note that a field is wrong."""
        self.violations.append(errors.Violation(path, description))

    def integer(self, path: str, value: SupportsIndex, largest: int = _INT32_MAX) -> int:
        """An integer that the wire can hold; Python's and numpy's are both welcome."""
        try:
            number = value.__index__()
        except AttributeError:
            self.wrong(path, f"must be an integer, got {value!r}")
            return 0
        if not -largest - 1 <= number <= largest:
            self.wrong(path, f"must lie in [{-largest - 1}, {largest}], got {number}")
            return 0
        return number

    def number(self, path: str, value: float) -> float:
        """A finite number."""
        try:
            number = float(value)
        except (TypeError, ValueError):
            number = math.nan
        if not math.isfinite(number):
            self.wrong(path, f"must be a finite number, got {value!r}")
            return 0.0
        return number

    def tensor(self, path: str, values: ArrayLike, item_shape: tuple[int, ...] | None = None) -> tensor_pb2.Tensor:
        """An array with a batch axis; 64-bit floats become 32-bit ones, which is all that models compute in.

        A single item is given its batch axis if `item_shape` says that it is one.
        """
        array = np.asarray(values)
        if array.dtype.kind == "f" and array.dtype.itemsize > 4:
            array = array.astype(np.float32)
        if item_shape is not None and array.shape == item_shape:
            array = array[None]
        try:
            return tensor.encode(array, path)
        except tensor.TensorError as error:
            self.wrong(error.path, error.description)
            return tensor_pb2.Tensor()

    def condition(self, label: Label, codes: Sequence[float] = ()) -> pb.Condition | None:
        """What to condition on; None for nothing."""
        if label is None and not len(codes):
            return None
        condition = pb.Condition(codes=[self.number(f"condition.codes[{i}]", code) for i, code in enumerate(codes)])
        if label is None:
            return condition
        if np.ndim(label) == 0:
            condition.class_label = self.integer("condition.class_label", label, _INT64_MAX)  # type: ignore[arg-type]  # a scalar, as np.ndim says
        else:
            labels: Sequence[Any] = label  # type: ignore[assignment]  # not a scalar
            condition.class_labels.extend(
                self.integer(f"condition.class_labels[{i}]", one, _INT64_MAX) for i, one in enumerate(labels)
            )
        return condition

    def data_type(self, dtype: DTypeLike | None) -> tensor_pb2.DataType.ValueType:
        """The wire's name of a numpy element type that samples can have; unspecified for None."""
        if dtype is None:
            return tensor_pb2.DATA_TYPE_UNSPECIFIED
        try:
            wanted = np.dtype(dtype)
        except TypeError:  # numpy knows none of that name
            data_type, got = None, repr(dtype)
        else:
            data_type, got = _SAMPLE_TYPES.get(wanted.newbyteorder("<")), wanted.name
        if data_type is None:
            allowed = ", ".join(known.name for known in _SAMPLE_TYPES)
            self.wrong("output_data_type", f"must be one of {allowed}, got {got}")
            return tensor_pb2.DATA_TYPE_UNSPECIFIED
        return data_type

    def output_mode(self, output: Output) -> pb.OutputMode.ValueType:
        """The wire's name of what to take from a distribution over samples."""
        if output not in _OUTPUT_MODES:
            self.wrong("output_mode", f"must be one of {', '.join(_OUTPUT_MODES)}, got {output!r}")
            return pb.OUTPUT_MODE_UNSPECIFIED
        return _OUTPUT_MODES[output]

    def size(self, size: tuple[int, int] | None) -> model_pb2.Size | None:
        """Height and width of samples; None for the model's own."""
        if size is None:
            return None
        extents = tuple(size)
        if len(extents) != 2:
            self.wrong("size", f"must be a height and a width, got {len(extents)} values")
            return None
        return model_pb2.Size(
            height=self.integer("size.height", extents[0]), width=self.integer("size.width", extents[1])
        )

    def seed(self, value: SupportsIndex) -> int:
        """A seed."""
        return self.integer("seed", value, _INT64_MAX)

    def walk(
        self,
        *,
        sampler: str | None = None,
        steps: int | None = None,
        timesteps: Sequence[int] | None = None,
        guidance: float | None = None,
        guidance_interval: tuple[int | None, int | None] | None = None,
        eta: float | None = None,
        previews: int = 0,
        start: ArrayLike | None = None,
        strength: float | None = None,
        known: ArrayLike | None = None,
        mask: ArrayLike | None = None,
        item_shape: tuple[int, ...] | None = None,
    ) -> pb.DiffusionOptions | None:
        """How a diffusion model is to walk; None if nothing is said, as other models want it."""
        if steps == 0:  # the wire's way to say "the model's default", which here is None
            self.wrong("diffusion.step_count", "must be at least 1, got 0")
        options = pb.DiffusionOptions(
            sampler=sampler or "",
            step_count=self.integer("diffusion.step_count", steps or 0),
            guidance_scale=None if guidance is None else self.number("diffusion.guidance_scale", guidance),
            eta=None if eta is None else self.number("diffusion.eta", eta),
            preview_interval_steps=self.integer("diffusion.preview_interval_steps", previews),
            timesteps=[self.integer(f"diffusion.timesteps[{i}]", one) for i, one in enumerate(_some(timesteps))],
        )
        if start is not None:
            options.start.samples.CopyFrom(self.tensor("diffusion.start.samples", start, item_shape))
        if guidance_interval is not None:
            path, ends = "diffusion.guidance_interval", tuple(guidance_interval)
            if len(ends) != 2:
                self.wrong(path, f"must be the first and the last timestep, got {len(ends)} values")
            else:
                options.guidance_interval.SetInParent()
                for name, end in zip(("min_timestep", "max_timestep"), ends, strict=True):
                    if end is not None:
                        setattr(options.guidance_interval, name, self.integer(f"{path}.{name}", end))
        if strength is not None:
            options.start.strength = self.number("diffusion.start.strength", strength)
        if known is not None:
            options.known.samples.CopyFrom(self.tensor("diffusion.known.samples", known, item_shape))
        if mask is not None:
            options.known.mask.CopyFrom(self._mask(mask, item_shape))
        return options if options.ByteSize() else None

    def _mask(self, mask: ArrayLike, item_shape: tuple[int, ...] | None) -> tensor_pb2.Tensor:
        array = np.asarray(mask)
        if array.dtype.kind in "bi" and np.array_equal(array, array.astype(np.uint8)):
            array = array.astype(np.uint8)
        single = item_shape is not None and array.shape == (1, *item_shape[1:])
        return self.tensor("diffusion.known.mask", array[None] if single else array, item_shape)


def label_count(label: Label) -> int | None:
    """How many samples a label argument speaks of; None for any number."""
    return None if label is None or np.ndim(label) == 0 else len(label)  # type: ignore[arg-type]  # not a scalar


def read_array(message: tensor_pb2.Tensor, path: str) -> Array:
    """The array of an answer.

    Raises:
        ProtocolError: the tensor contradicts itself.
    """
    try:
        return tensor.decode(message, path)
    except tensor.TensorError as error:
        raise errors.ProtocolError(f"the server sent a bad tensor: {error}") from error


def read_optional(message: Any, name: str) -> Array | None:
    """The array in a field that may be unset."""
    return read_array(getattr(message, name), name) if message.HasField(name) else None


def read_stats(stats: pb.ExecutionStats) -> Stats:
    """What an answer cost."""
    return Stats(
        queue_s=_seconds(stats.queue_duration),
        compute_s=_seconds(stats.compute_duration),
        evaluations=stats.evaluation_count,
        mean_batch_size=stats.mean_batch_size,
    )


def value_range(array: Array, model: Model, output: pb.OutputMode.ValueType) -> tuple[float, float]:
    """The range of received samples: bytes span 0..255, everything else the model's own range."""
    if output == pb.OUTPUT_MODE_LATENT:
        return model.state_range
    return (0.0, 255.0) if array.dtype == np.uint8 else model.value_range


def state_range(array: Array, model: Model) -> tuple[float, float]:
    """The range of received estimates of x0; as that of samples, where these are not latents."""
    return (0.0, 255.0) if array.dtype == np.uint8 else model.state_range


def read_encoded(response: pb.EncodeResponse, seed: int | None) -> Encoded:
    """Result of Encode."""
    posterior = response.WhichOneof("posterior")
    mean = log_variance = probability = None
    if posterior == "normal":
        mean = read_array(response.normal.mean, "normal.mean")
        log_variance = read_array(response.normal.log_variance, "normal.log_variance")
    elif posterior is not None:
        probability = read_array(getattr(response, posterior).probability, f"{posterior}.probability")
    classes = None
    if response.HasField("class_posterior"):
        classes = read_array(response.class_posterior.probability, "class_posterior.probability")
    return Encoded(
        array=read_array(response.latents, "latents"),
        mean=mean,
        log_variance=log_variance,
        probability=probability,
        class_probability=classes,
        seed=seed,
        stats=read_stats(response.stats),
    )


def read_decoded(response: pb.DecodeResponse, request: pb.DecodeRequest, model: Model) -> Decoded:
    """Result of Decode."""
    array = read_array(response.samples, "samples")
    return Decoded(
        array=array,
        value_range=value_range(array, model, request.output_mode),
        latents=tensor.decode(request.latents),
        seed=request.seed if request.HasField("seed") else None,
        stats=read_stats(response.stats),
    )


def read_step(response: pb.DenoiseStepResponse, model: Model) -> Step:
    """Result of DenoiseStep."""
    array = read_array(response.denoised_samples, "denoised_samples")
    return Step(
        array=array,
        value_range=state_range(array, model),
        noise=read_optional(response, "noise_estimates"),
        state=read_optional(response, "next_samples"),
        stats=read_stats(response.stats),
    )


def read_loop_step(state: pb.LoopState, model: Model) -> LoopStep:
    """Result of one step of a loop."""
    array = read_array(state.step.denoised_samples, "step.denoised_samples")
    return LoopStep(
        array=array,
        value_range=state_range(array, model),
        noise=read_optional(state.step, "noise_estimates"),
        state=read_array(state.step.next_samples, "step.next_samples"),
        timestep=state.timestep,
        stats=read_stats(state.step.stats),
    )


def read_scores(response: pb.ScoreResponse, request: pb.ScoreRequest) -> Scores:
    """Result of Score."""
    terms = None
    if response.HasField("terms"):
        parts = response.terms.prior, response.terms.diffusion, response.terms.reconstruction
        terms = VariationalTerms(*(np.array(part, np.float64) for part in parts))
    return Scores(
        values=np.array(response.values, np.float64),
        kind=enum_name(pb.ScoreResponse.Type, response.type, "TYPE_"),
        stats=read_stats(response.stats),
        dimensions=math.prod(request.samples.shape[1:]),
        terms=terms,
    )


def _seconds(duration: Duration) -> float:
    return duration.seconds + duration.nanos * 1e-9


def _some(values: Sequence[int] | None) -> Sequence[int]:
    return () if values is None else values
