"""A server of toy models that fails on demand.

Its arithmetic is a hash: sample i is a function of (seed, first_sample_index + i) alone, as the contract demands, so a
client that stitches a broken stream wrongly is found out by its bytes.
"""

import itertools
import threading
import time
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent import futures
from dataclasses import dataclass, field
from typing import Any

import grpc
import numpy as np
from fake_shared_stream import SharedStream
from google.protobuf import any_pb2
from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import Message
from google.rpc import error_details_pb2, status_pb2
from latentd import tensor
from latentd.reasons import DOMAIN, Reason
from latentd.v1 import generation_service_pb2 as pb
from latentd.v1 import (
    generation_service_pb2_grpc,
    model_pb2,
    model_service_pb2,
    model_service_pb2_grpc,
    tensor_pb2,
)

SHAPE = (1, 4, 4)
LATENT_SHAPE = (3,)
TIMESTEPS = (9, 6, 3, 0)
CLASS_COUNT = 10


def toy_card() -> model_pb2.ModelCard:
    """A card of which everything is told."""
    card = model_pb2.ModelCard(
        description="A toy.",
        license="Apache-2.0",
        dataset_license="CC-BY-4.0",
        metrics={"frechet-ratio": 1.25},
        likelihood=model_pb2.ModelCard.Likelihood(
            kind=model_pb2.ModelCard.Likelihood.KIND_BOUND,
            measure=model_pb2.ModelCard.Likelihood.MEASURE_MASS,
            explanation="Of toys.",
            nats=-44.36,
            bits_per_dimension=4,
            draw_count=50,
        ),
    )
    card.capabilities.add(method=model_pb2.Model.METHOD_SAMPLE, description="a toy")
    card.capabilities.add(method=model_pb2.Model.METHOD_ENCODE, description="a code")
    card.capabilities.add(method=model_pb2.Model.METHOD_SCORE, description="no critic")
    card.comparisons.add(relation="tuned from", model="older@2", digest="sha256:0a", metrics={"recall": 0.625})
    return card


@dataclass
class Fault:
    """What goes wrong in one call: after `after` messages, wait `delay_s`, then fail with `code`, or end well if None.

    `then` runs before the failure is sent.
    """

    after: int = 0
    code: grpc.StatusCode | None = grpc.StatusCode.UNAVAILABLE
    message: str = "a fault"
    details: Sequence[Message] = ()
    trailers: Sequence[tuple[str, str]] = ()
    delay_s: float = 0.0
    then: Callable[[], None] = lambda: None


@dataclass
class Seen:
    """A call that arrived."""

    rpc: str
    request: Any
    metadata: dict[str, Any]
    time_remaining_s: float | None


def info(reason: Reason | str, **metadata: str) -> error_details_pb2.ErrorInfo:
    """The detail that every latentd error carries."""
    return error_details_pb2.ErrorInfo(reason=str(reason), domain=DOMAIN, metadata=metadata)


def retry_after(seconds: float) -> error_details_pb2.RetryInfo:
    """The detail that says when to try again."""
    delay = Duration()
    delay.FromNanoseconds(round(seconds * 1e9))
    return error_details_pb2.RetryInfo(retry_delay=delay)


def packed(details: Sequence[Message]) -> list[any_pb2.Any]:
    """Details as `google.rpc.Status` holds them."""
    boxes = []
    for detail in details:
        box = any_pb2.Any()
        box.Pack(detail)
        boxes.append(box)
    return boxes


def toy_normal(seed: int, index: int, shape: Sequence[int]) -> np.ndarray[Any, Any]:
    """Noise that depends on (seed, index) alone."""
    return np.random.default_rng([seed, index]).standard_normal(shape).astype(np.float32)


def toy_sample(request: pb.SampleRequest, i: int) -> tuple[np.ndarray[Any, Any], int]:
    """Sample i of a request, and its label."""
    index = request.first_sample_index + i
    labels = request.condition.class_labels
    if labels:
        label = labels[i]
    elif request.condition.HasField("class_label"):
        label = request.condition.class_label
    else:
        label = (request.seed + index) % CLASS_COUNT
    array = np.tanh(toy_normal(request.seed, index, SHAPE) + label)
    start = request.diffusion.start.samples
    if start.shape:
        starts = tensor.decode(start)
        array = array + starts[i if len(starts) > 1 else 0]
    return array.astype(np.float32), label


@dataclass
class FakeServer(generation_service_pb2_grpc.GenerationServiceServicer, model_service_pb2_grpc.ModelServiceServicer):
    """Serves `toy` (one-shot, latents of 3) and `toy-diffusion` on a free port."""

    determinism_class: str = "class-a"
    rows_per_message: int = 1
    faults: dict[str, deque[Fault]] = field(default_factory=lambda: defaultdict(deque))
    seen: list[Seen] = field(default_factory=list)
    open_streams: int = 0
    port: int = 0
    versions: int = 1
    value_limit: float = 1.0  # of samples, both ways
    sample_shape: tuple[int, ...] = SHAPE  # as models are described
    credentials: grpc.ServerCredentials | None = None
    knows_batches: bool = True  # of requests on a stream
    answers_in_batches: bool = True
    answers_at_once: int = 1  # how many answers of a shared stream are waited for before they are sent
    shared_streams: int = 0
    shared_requests: Counter[str] = field(default_factory=Counter)  # by the RPC that each stands for
    half_closed_streams: int = 0  # shared ones that clients have ended in words
    batches_sent: list[int] = field(default_factory=list)  # their sizes
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def start(self) -> "FakeServer":
        """Listen; on the same port again if it listened before."""
        self.server = grpc.server(futures.ThreadPoolExecutor(16), options=[("grpc.so_reuseport", 0)])
        generation_service_pb2_grpc.add_GenerationServiceServicer_to_server(self, self.server)
        model_service_pb2_grpc.add_ModelServiceServicer_to_server(self, self.server)
        address = f"127.0.0.1:{self.port}"
        if self.credentials is None:
            self.port = self.server.add_insecure_port(address)
        else:
            self.port = self.server.add_secure_port(address, self.credentials)
        self.server.start()
        return self

    def stop(self) -> None:
        """Break every connection."""
        self.server.stop(None).wait()

    @property
    def target(self) -> str:
        return f"127.0.0.1:{self.port}"

    def fail(self, rpc: str, *faults: Fault) -> None:
        """Let the next calls of an RPC fail, one fault a call."""
        self.faults[rpc].extend(faults)

    def requests(self, rpc: str) -> list[Any]:
        """What arrived at an RPC."""
        return [seen.request for seen in self.seen if seen.rpc == rpc]

    def _arrive(self, rpc: str, request: Any, context: grpc.ServicerContext) -> Fault | None:
        metadata = {item.key: item.value for item in context.invocation_metadata()}
        with self._lock:
            self.seen.append(Seen(rpc, request, metadata, context.time_remaining()))
            return self.faults[rpc].popleft() if self.faults[rpc] else None

    def see(self, kind: str, message: Any) -> None:
        """Note a message of a stream."""
        self.seen.append(Seen(kind, message, {}, None))

    def _strike(self, fault: Fault, context: grpc.ServicerContext) -> None:
        waited = threading.Event()
        if not context.add_callback(waited.set):  # the call is over
            waited.set()
        waited.wait(fault.delay_s)
        fault.then()
        if fault.code is None:
            return
        trailers: list[tuple[str, Any]] = list(fault.trailers)
        if fault.details:
            status = status_pb2.Status(code=fault.code.value[0], message=fault.message, details=packed(fault.details))
            trailers.append(("grpc-status-details-bin", status.SerializeToString()))
        context.set_trailing_metadata(tuple(trailers))
        context.abort(fault.code, fault.message)

    def _unary(self, rpc: str, request: Any, context: grpc.ServicerContext) -> None:
        fault = self._arrive(rpc, request, context)
        if fault is not None:
            self._strike(fault, context)

    def _resolved(self, request: pb.SampleRequest) -> pb.SampleAccepted:
        resolved = pb.SampleRequest()
        resolved.CopyFrom(request)
        resolved.model = self._canonical(request.model)
        if resolved.diffusion.HasField("start"):
            resolved.diffusion.start.ClearField("samples")
        return pb.SampleAccepted(resolved_request=resolved, determinism_class=self.determinism_class, queue_depth=2)

    def _canonical(self, reference: str) -> str:
        return reference if "@" in reference else f"{reference}@{self.versions}"

    def _sample_messages(self, request: pb.SampleRequest) -> Iterator[pb.SampleResponse]:
        yield pb.SampleResponse(accepted=self._resolved(request))
        indices = list(range(request.sample_count))
        drawn = [toy_sample(request, i) for i in indices]
        if request.diffusion.preview_interval_steps:
            for done in range(request.diffusion.preview_interval_steps, 4, request.diffusion.preview_interval_steps):
                yield pb.SampleResponse(
                    preview=pb.SamplePreview(
                        sample_indices=indices,
                        completed_step_count=done,
                        total_step_count=4,
                        estimates=tensor.encode(np.stack([array * done / 4 for array, _ in drawn])),
                    )
                )
        # Odd samples first: the contract promises no order.
        order = [i for i in indices if i % 2] + [i for i in indices if i % 2 == 0]
        for first in range(0, len(order), self.rows_per_message):
            rows = order[first : first + self.rows_per_message]
            arrays = np.stack([drawn[i][0] for i in rows])
            if request.output_data_type == tensor_pb2.DATA_TYPE_UINT8:
                arrays = np.rint(np.clip(arrays + 1, 0, 2) * 127.5).astype(np.uint8)
            latents = None
            if not request.model.startswith("toy-diffusion"):
                latents = tensor.encode(
                    np.stack([toy_normal(request.seed, request.first_sample_index + i, LATENT_SHAPE) for i in rows])
                )
            yield pb.SampleResponse(
                result=pb.SampleResult(
                    sample_indices=rows,
                    samples=tensor.encode(arrays),
                    latents=latents,
                    class_labels=[drawn[i][1] for i in rows],
                    stats=pb.ExecutionStats(
                        queue_duration=Duration(nanos=1_000_000), evaluation_count=4 * len(rows), mean_batch_size=2.0
                    ),
                )
            )

    def Sample(self, request: pb.SampleRequest, context: grpc.ServicerContext) -> Iterator[pb.SampleResponse]:
        fault = self._arrive("Sample", request, context)
        self.open_streams += 1
        gone = threading.Event()
        if not context.add_callback(gone.set):  # the call is over
            gone.set()
        try:
            for k, message in enumerate(self._sample_messages(request)):
                if fault is not None and k == fault.after:
                    self._strike(fault, context)
                    return
                if gone.is_set():
                    return
                yield message
            if fault is not None:
                self._strike(fault, context)
        finally:
            self.open_streams -= 1

    def Encode(self, request: pb.EncodeRequest, context: grpc.ServicerContext) -> pb.EncodeResponse:
        self._unary("Encode", request, context)
        samples = tensor.decode(request.samples)
        if request.model.startswith("toy-diffusion"):
            return pb.EncodeResponse(latents=tensor.encode(2 * samples))
        mean = samples.reshape(len(samples), -1)[:, :3]
        return pb.EncodeResponse(
            latents=tensor.encode(mean),
            normal=pb.DiagonalNormal(mean=tensor.encode(mean), log_variance=tensor.encode(np.zeros_like(mean))),
        )

    def Decode(self, request: pb.DecodeRequest, context: grpc.ServicerContext) -> pb.DecodeResponse:
        self._unary("Decode", request, context)
        latents = tensor.decode(request.latents)
        if request.model.startswith("toy-diffusion"):
            return pb.DecodeResponse(samples=tensor.encode(np.tanh(latents)))
        samples = np.zeros((len(latents), 16), np.float32)
        samples[:, :3] = latents
        return pb.DecodeResponse(samples=tensor.encode(samples.reshape(-1, *SHAPE)))

    def DenoiseStep(self, request: pb.DenoiseStepRequest, context: grpc.ServicerContext) -> pb.DenoiseStepResponse:
        self._unary("DenoiseStep", request, context)
        noisy = tensor.decode(request.noisy_samples)
        return pb.DenoiseStepResponse(
            denoised_samples=tensor.encode(noisy / 2),
            noise_estimates=tensor.encode(noisy / 4),
            next_samples=tensor.encode(noisy * 0.75) if request.next_timesteps else None,
        )

    def Score(self, request: pb.ScoreRequest, context: grpc.ServicerContext) -> pb.ScoreResponse:
        self._unary("Score", request, context)
        samples = tensor.decode(request.samples)
        return pb.ScoreResponse(
            values=samples.reshape(len(samples), -1).sum(axis=1).tolist(),
            type=pb.ScoreResponse.TYPE_EVIDENCE_LOWER_BOUND,
        )

    def Stream(
        self, request_iterator: Iterator[pb.StreamRequest], context: grpc.ServicerContext
    ) -> Iterator[pb.StreamResponse]:
        first = next(request_iterator, None)
        if first is None:
            return
        if first.HasField("batch"):
            yield from self._shared_stream(first, request_iterator, context)
            return
        fault = self._arrive("Stream", None, context)
        state = np.zeros((0, *SHAPE), np.float32)
        remaining: list[int] = []
        self.open_streams += 1
        try:
            for k, message in enumerate(itertools.chain([first], request_iterator)):
                self.see("StreamRequest", message)
                if fault is not None and k == fault.after:
                    self._strike(fault, context)
                    return
                if message.HasField("open_denoise"):
                    request = message.open_denoise
                    state = np.stack([toy_normal(request.seed, i, SHAPE) for i in range(request.sample_count)])
                    remaining = [*TIMESTEPS[1:], -1]
                    yield pb.StreamResponse(
                        id=message.id,
                        loop=pb.LoopState(
                            accepted=self._resolved(request), timestep=TIMESTEPS[0], remaining_timesteps=remaining
                        ),
                    )
                    continue
                take = message.take_step
                if take.HasField("next_timestep") and take.next_timestep not in remaining:
                    yield pb.StreamResponse(
                        id=message.id,
                        final=True,
                        error=pb.StreamError(
                            code=grpc.StatusCode.INVALID_ARGUMENT.value[0],
                            message="take_step.next_timestep: must be one of the remaining",
                            details=packed([info(Reason.FIELD_INVALID)]),
                        ),
                    )
                    continue
                if take.HasField("noisy_samples"):
                    state = tensor.decode(take.noisy_samples)
                reached = take.next_timestep if take.HasField("next_timestep") else remaining[0]
                remaining = remaining[remaining.index(reached) + 1 :]
                state = (state * 0.5 + reached).astype(np.float32)
                yield pb.StreamResponse(
                    id=message.id,
                    final=reached == -1,
                    loop=pb.LoopState(
                        timestep=reached,
                        remaining_timesteps=remaining,
                        step=pb.DenoiseStepResponse(
                            denoised_samples=tensor.encode(state / 2),
                            next_samples=tensor.encode(state) if take.state_requested else None,
                        ),
                    ),
                )
        finally:
            self.open_streams -= 1

    def _shared_stream(
        self, first: pb.StreamRequest, messages: Iterator[pb.StreamRequest], context: grpc.ServicerContext
    ) -> Iterator[pb.StreamResponse]:
        with self._lock:
            self.shared_streams += 1
            fault = self.faults["SharedStream"].popleft() if self.faults["SharedStream"] else None
        self.open_streams += 1
        try:
            yield from SharedStream(self, context).serve(first, messages, fault)
        finally:
            self.open_streams -= 1

    def GetModel(
        self, request: model_service_pb2.GetModelRequest, context: grpc.ServicerContext
    ) -> model_service_pb2.GetModelResponse:
        self._unary("GetModel", request, context)
        for model in self._models():
            if request.name in (model.name, model.name.split("@")[0]):
                return model_service_pb2.GetModelResponse(model=model)
        self._strike(
            Fault(
                code=grpc.StatusCode.NOT_FOUND,
                message=f"no model {request.name!r}",
                details=[info(Reason.MODEL_NOT_FOUND, model=request.name)],
            ),
            context,
        )
        raise AssertionError("abort raises")

    def ListModels(
        self, request: model_service_pb2.ListModelsRequest, context: grpc.ServicerContext
    ) -> model_service_pb2.ListModelsResponse:
        self._unary("ListModels", request, context)
        models = self._models()
        first = int(request.page_token or 0)
        token = str(first + 1) if first + 1 < len(models) else ""
        return model_service_pb2.ListModelsResponse(models=models[first : first + 1], next_page_token=token)

    def _models(self) -> list[model_pb2.Model]:
        spec = model_pb2.TensorSpec(
            data_type=tensor_pb2.DATA_TYPE_FLOAT32,
            shape=self.sample_shape,
            min_value=-self.value_limit,
            max_value=self.value_limit,
        )
        methods = [
            model_pb2.Model.METHOD_SAMPLE,
            model_pb2.Model.METHOD_ENCODE,
            model_pb2.Model.METHOD_DECODE,
        ]
        both: dict[str, Any] = {
            "state": model_pb2.Model.STATE_ACTIVE,
            "sample_spec": spec,
            "class_names": [f"class {i}" for i in range(CLASS_COUNT)],
            "card": toy_card(),
        }
        return [
            model_pb2.Model(
                name=self._canonical("toy"),
                family=model_pb2.Model.FAMILY_VAE,
                methods=[*methods, model_pb2.Model.METHOD_SCORE],
                latent_spec=model_pb2.TensorSpec(data_type=tensor_pb2.DATA_TYPE_FLOAT32, shape=LATENT_SHAPE),
                **both,
            ),
            model_pb2.Model(
                name=self._canonical("toy-diffusion"),
                family=model_pb2.Model.FAMILY_DIFFUSION,
                methods=[*methods, model_pb2.Model.METHOD_DENOISE],
                diffusion=model_pb2.DiffusionSpec(
                    alphas=[1.0] * 10, sigmas=[0.1] * 10, samplers=["ddim", "ddpm"], default_step_count=4
                ),
                **both,
            ),
        ]


def wait_until(condition: Callable[[], bool], timeout_s: float = 10.0) -> None:
    """Wait for what another thread is about to bring about; fail if it does not."""
    give_up_s = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < give_up_s, "it never happened"
        time.sleep(0.005)
