"""The unary calls and Sample over real gRPC, with an engine that does what the test says."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import grpc
import numpy as np
import pytest
from bundles import LATENT, SHAPE
from doors import Front, StaticRegistry, front, until
from google.rpc import error_details_pb2, status_pb2
from grpc import aio
from latentd import tensor
from latentd.names import CALLER_KEY, PRIORITY_KEY, PUSHBACK_KEY, REQUEST_ID_KEY
from latentd.v1 import generation_service_pb2 as pb
from latentd_server import failures
from latentd_server.errors import STATUS_KEY
from manual_engine import ManualEngine

V, D = "tiny-vae", "tiny-diffusion"
IMAGES = tensor.encode(np.zeros((2, *SHAPE), np.float32))
LATENTS = tensor.encode(np.zeros((2, LATENT), np.float32))


@pytest.fixture
def engine() -> ManualEngine:
    return ManualEngine()


@pytest.fixture
def registry(held: dict[str, Any]) -> StaticRegistry:
    return StaticRegistry(held)


@pytest.fixture
async def served(engine: ManualEngine, registry: StaticRegistry) -> AsyncIterator[Front]:
    async with front(engine, registry) as running:
        yield running


def reason(error: aio.AioRpcError) -> str:
    """`ErrorInfo.reason` of a failed call."""
    packed = dict(error.trailing_metadata())[STATUS_KEY]
    info = error_details_pb2.ErrorInfo()
    status_pb2.Status.FromString(packed).details[0].Unpack(info)  # type: ignore[arg-type]
    return info.reason


UNARY = [
    ("Encode", pb.EncodeRequest(model=V, samples=IMAGES)),
    ("Decode", pb.DecodeRequest(model=V, latents=LATENTS)),
    ("DenoiseStep", pb.DenoiseStepRequest(model=D, noisy_samples=IMAGES, timesteps=[5], next_timesteps=[-1])),
    ("Score", pb.ScoreRequest(model=V, samples=IMAGES)),
]


@pytest.mark.parametrize(("method", "request_"), UNARY, ids=[method for method, _ in UNARY])
async def test_a_unary_call_is_answered_when_all_rows_are_done(
    method: str, request_: Any, served: Front, engine: ManualEngine
) -> None:
    """Rows may finish in groups; the answer comes with the last, and with what it cost."""
    call = getattr(served.stub, method)(request_)
    await until(lambda: engine.jobs)
    count = engine.submitted[0].lane_count
    engine.finish(1, [0])
    assert not call.done()
    engine.finish(1, list(range(1, count)))
    response = await call
    assert response.stats.evaluation_count == count
    assert f'latentd_requests_total{{code="OK",method="{method}",model="{request_.model}@1"}} 1.0' in served.metrics
    assert f'latentd_requests_in_flight{{method="{method}"}} 0.0' in served.metrics


async def test_the_forward_process_needs_no_engine(served: Front, engine: ManualEngine) -> None:
    """A draw from q(x_t | x0) is answered at once."""
    response = await served.stub.Encode(pb.EncodeRequest(model=D, samples=IMAGES, forward_timestep=3, seed=1))
    assert list(response.latents.shape) == [2, *SHAPE]
    assert not engine.submitted


async def test_sample_sends_accepted_then_results_as_they_come(served: Front, engine: ManualEngine) -> None:
    """The first message says how the request was understood; each sample is sent once."""
    call = served.stub.Sample(pb.SampleRequest(model=D, sample_count=3))
    accepted = (await call.read()).accepted
    assert accepted.resolved_request.model == "tiny-diffusion@1"
    assert accepted.resolved_request.seed == 77
    assert accepted.determinism_class == "test-class"
    engine.finish(1, [1])
    assert list((await call.read()).result.sample_indices) == [1]
    engine.finish(1, [0, 2])
    assert list((await call.read()).result.sample_indices) == [0, 2]
    assert await call.read() is aio.EOF
    assert 'latentd_samples_total{model="tiny-diffusion@1"} 3.0' in served.metrics


REFUSALS = [
    (failures.QuotaExceededError("caller:x", "too much"), grpc.StatusCode.RESOURCE_EXHAUSTED, "QUOTA_EXCEEDED", None),
    (failures.OverloadedError(10, 10, 2.5), grpc.StatusCode.UNAVAILABLE, "OVERLOADED", "2500"),
    (failures.DrainingError(), grpc.StatusCode.UNAVAILABLE, "DRAINING", "1000"),
    (failures.DeadlineUnreachableError("late"), grpc.StatusCode.DEADLINE_EXCEEDED, "DEADLINE_UNREACHABLE", None),
    (failures.DeadlineUnreachableError("no", 3), grpc.StatusCode.DEADLINE_EXCEEDED, "DEADLINE_UNREACHABLE", None),
]


@pytest.mark.parametrize(("refusal", "code", "why", "pushback"), REFUSALS, ids=[row[2] for row in REFUSALS])
@pytest.mark.parametrize("method", ["Sample", "Decode"])
async def test_a_refusal_at_the_engines_door_reaches_the_caller(
    method: str, refusal: Exception, code: Any, why: str, pushback: str | None, served: Front, engine: ManualEngine
) -> None:
    """With its code, its reason and, where a retry helps, when; before any header, so that gRPC itself may retry."""
    engine.refusal = refusal
    sampling = method == "Sample"
    with pytest.raises(aio.AioRpcError) as caught:
        await (
            served.stub.Sample(pb.SampleRequest(model=V)).read()
            if sampling
            else served.stub.Decode(pb.DecodeRequest(model=V, latents=LATENTS))
        )
    assert caught.value.code() is code
    assert reason(caught.value) == why
    assert dict(caught.value.trailing_metadata()).get(PUSHBACK_KEY) == pushback
    assert dict(caught.value.initial_metadata() or ()) == {}
    assert f'latentd_refusals_total{{reason="{why}"}} 1.0' in served.metrics


@pytest.mark.parametrize(
    ("method", "request_", "evaluations"),
    [
        ("Sample", pb.SampleRequest(model=D, sample_count=3, diffusion=pb.DiffusionOptions(step_count=5, eta=99)), 15),
        ("Sample", pb.SampleRequest(model=D, diffusion=pb.DiffusionOptions(timesteps=[5, 9])), 2),
        ("Decode", pb.DecodeRequest(model=V, latents=IMAGES), 2),
        ("Encode", pb.EncodeRequest(model=D, samples=LATENTS, forward_timestep=1), 0),
    ],
)
async def test_a_full_server_reads_no_further_than_what_a_request_takes_at_least(
    method: str, request_: Any, evaluations: int, served: Front, engine: ManualEngine
) -> None:
    """These are wrong too; they are refused for want of room, by model, caller and the rows that they ask for."""
    engine.full = failures.OverloadedError(9, 9, 0.5)
    call = getattr(served.stub, method)(request_, metadata=((CALLER_KEY, "a"),))
    with pytest.raises(aio.AioRpcError) as raised:
        await (call.read() if method == "Sample" else call)
    assert reason(raised.value) == "OVERLOADED"
    assert engine.asked_for == [(f"{request_.model}@1", "a", evaluations)]


async def test_a_late_server_reads_no_further_either(served: Front, engine: ManualEngine) -> None:
    """A wrong request is refused for want of time, by what it asks for at least; without a deadline it is read."""
    engine.late = failures.DeadlineUnreachableError("late", 9.0)
    request = pb.SampleRequest(model=D, sample_count=3, diffusion=pb.DiffusionOptions(step_count=5, eta=99))
    with pytest.raises(aio.AioRpcError) as raised:
        await served.stub.Sample(request, timeout=5).read()
    assert reason(raised.value) == "DEADLINE_UNREACHABLE"
    assert [(work.steps, work.rows, work.evaluations) for work in engine.asked_time_for] == [(5, 3, 15)]
    with pytest.raises(aio.AioRpcError) as raised:
        await served.stub.Sample(request).read()
    assert reason(raised.value) == "FIELD_INVALID"


@pytest.mark.parametrize(
    ("refusal", "code", "why"),
    [
        (failures.ModelLoadingError("x@1"), grpc.StatusCode.UNAVAILABLE, "MODEL_LOADING"),
        (failures.ModelFailedError("x@1", "digest"), grpc.StatusCode.FAILED_PRECONDITION, "MODEL_FAILED"),
        (failures.ModelNotFoundError("x@1", []), grpc.StatusCode.NOT_FOUND, "MODEL_NOT_FOUND"),
    ],
)
async def test_a_model_that_does_not_answer_is_told_apart(
    refusal: Exception, code: Any, why: str, served: Front, registry: StaticRegistry
) -> None:
    """Loading, broken and unknown are three answers."""
    registry.refusal = refusal
    with pytest.raises(aio.AioRpcError) as caught:
        await served.stub.Score(pb.ScoreRequest(model=V, samples=IMAGES))
    assert (caught.value.code(), reason(caught.value)) == (code, why)


@pytest.mark.parametrize("model", ["", "Not A Name", "a@0", "x" * 5000, "tiny-vae@", "-", "a/../b"])
async def test_a_malformed_model_name_is_a_wrong_field(model: str, served: Front) -> None:
    """It is refused by path before anything is looked up."""
    with pytest.raises(aio.AioRpcError) as caught:
        await served.stub.Decode(pb.DecodeRequest(model=model, latents=LATENTS))
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert caught.value.details().startswith("model: must be NAME or NAME@VERSION")


async def test_the_failure_of_a_job_ends_its_call(served: Front, engine: ManualEngine) -> None:
    """A runtime failure after `accepted` ends the stream behind what was ready."""
    call = served.stub.Sample(pb.SampleRequest(model=V, sample_count=2))
    assert (await call.read()).HasField("accepted")
    engine.finish(1, [0])
    engine.fail(1, failures.RuntimeFailureError("tiny-vae@1"))
    assert list((await call.read()).result.sample_indices) == [0]
    with pytest.raises(aio.AioRpcError) as caught:
        await call.read()
    assert caught.value.code() is grpc.StatusCode.INTERNAL
    assert reason(caught.value) == "RUNTIME_FAILURE"


@pytest.mark.parametrize("method", ["Sample", "Decode"])
async def test_a_cancelled_call_leaves_the_engine(method: str, served: Front, engine: ManualEngine) -> None:
    """The job is cancelled, and the call is counted as cancelled, once."""
    if method == "Sample":
        call = served.stub.Sample(pb.SampleRequest(model=V))
        await call.read()
    else:
        call = served.stub.Decode(pb.DecodeRequest(model=V, latents=LATENTS))
    await until(lambda: engine.jobs)
    call.cancel()
    await until(lambda: engine.cancelled == [1])
    line = f'latentd_requests_total{{code="CANCELLED",method="{method}",model="tiny-vae@1"}} 1.0'
    await until(lambda: line in served.metrics)


async def test_a_vanished_client_leaves_the_engine(served: Front, engine: ManualEngine) -> None:
    """Closing the channel is enough."""
    async with aio.insecure_channel(served.address) as channel:
        call = channel.unary_unary(
            "/latentd.v1.GenerationService/Decode", request_serializer=pb.DecodeRequest.SerializeToString
        )(pb.DecodeRequest(model=V, latents=LATENTS))
        await until(lambda: engine.jobs)
    await until(lambda: engine.cancelled == [1])
    del call


async def test_a_deadline_travels_to_the_engine_and_ends_the_call(served: Front, engine: ManualEngine) -> None:
    """The engine is told when the answer is worthless; when it passes, the job is given up."""
    with pytest.raises(aio.AioRpcError) as caught:
        await served.stub.Decode(pb.DecodeRequest(model=V, latents=LATENTS), timeout=2, wait_for_ready=True)
    assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    await until(lambda: engine.cancelled == [1])
    line = 'latentd_requests_total{code="DEADLINE_EXCEEDED",method="Decode",model="tiny-vae@1"} 1.0'
    await until(lambda: line in served.metrics)


async def test_without_a_deadline_the_engine_gets_none(served: Front, engine: ManualEngine) -> None:
    """No deadline means none, and one is passed on as monotonic seconds."""
    calls = [served.stub.Decode(pb.DecodeRequest(model=V, latents=LATENTS), timeout=t) for t in (None, 1000)]
    await until(lambda: len(engine.jobs) == 2)
    deadlines = sorted((job.deadline is not None, job.deadline or 0) for job in engine.jobs.values())
    assert deadlines[0] == (False, 0)
    assert deadlines[1][1] - served.door.clock() == pytest.approx(1000, abs=20)
    for call in calls:
        call.cancel()


async def test_a_call_names_its_priority(served: Front, engine: ManualEngine) -> None:
    """In `x-latentd-priority`; without it a call is NORMAL."""
    request = pb.DecodeRequest(model=V, latents=LATENTS)
    calls = [
        served.stub.Decode(request, metadata=((PRIORITY_KEY, "high"),)),
        served.stub.Sample(pb.SampleRequest(model=V), metadata=((PRIORITY_KEY, "low"),)),
        served.stub.Decode(request),
    ]
    await until(lambda: len(engine.jobs) == 3)
    assert sorted(job.priority.name for job in engine.jobs.values()) == ["HIGH", "LOW", "NORMAL"]
    for call in calls:
        call.cancel()


@pytest.mark.parametrize("method", ["Sample", "Decode"])
async def test_an_unknown_priority_is_refused_with_what_there_is(method: str, served: Front) -> None:
    """Like a field that is wrong, by the name of the metadata."""
    metadata = ((PRIORITY_KEY, "urgent"),)
    with pytest.raises(aio.AioRpcError, match="one of high, normal, low; got 'urgent'") as caught:
        await (
            served.stub.Sample(pb.SampleRequest(model=V), metadata=metadata).read()
            if method == "Sample"
            else served.stub.Decode(pb.DecodeRequest(model=V, latents=LATENTS), metadata=metadata)
        )
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert reason(caught.value) == "FIELD_INVALID"


async def test_callers_are_told_apart_by_name_or_by_connection(served: Front, engine: ManualEngine) -> None:
    """`x-latentd-caller` names the caller; without it a connection is one."""
    request = pb.DecodeRequest(model=V, latents=LATENTS)
    calls = [served.stub.Decode(request, metadata=((CALLER_KEY, "batch-job"),)), served.stub.Decode(request)]
    await until(lambda: len(engine.jobs) == 2)
    callers = {job.caller for job in engine.jobs.values()}
    assert "batch-job" in callers
    (other,) = callers - {"batch-job"}
    assert other.startswith("ipv4:127.0.0.1:")
    for call in calls:
        call.cancel()


async def test_a_request_id_is_echoed_and_logged(
    served: Front, engine: ManualEngine, caplog: pytest.LogCaptureFixture
) -> None:
    """In the headers of an answer, in the trailers of a refusal, and in the log line of the call."""
    metadata = ((REQUEST_ID_KEY, "abc-1"),)
    with caplog.at_level("INFO", logger="latentd.calls"):
        call = served.stub.Decode(pb.DecodeRequest(model=V, latents=LATENTS, seed=5), metadata=metadata)
        await until(lambda: engine.jobs)
        engine.finish(1)
        await call
    assert dict(await call.initial_metadata())[REQUEST_ID_KEY] == "abc-1"
    (line,) = [record.fields for record in caplog.records if hasattr(record, "fields")]
    assert line["request_id"] == "abc-1"
    assert (line["method"], line["model"], line["code"], line["seed"]) == ("Decode", "tiny-vae@1", "OK", 5)
    assert (line["samples"], line["evaluations"], line["mean_batch"]) == (2, 2, 3.0)
    assert (line["queue_s"], line["compute_s"]) == (0.25, 0.5)
    with pytest.raises(aio.AioRpcError) as caught:
        await served.stub.Decode(pb.DecodeRequest(model=V), metadata=metadata)
    assert dict(caught.value.trailing_metadata())[REQUEST_ID_KEY] == "abc-1"


async def test_an_unexpected_failure_is_internal_without_its_text(
    served: Front, registry: StaticRegistry, caplog: pytest.LogCaptureFixture
) -> None:
    """A bug of ours tells the caller nothing but that, and the log everything."""
    registry.refusal = ZeroDivisionError("at /home/someone")
    with pytest.raises(aio.AioRpcError) as caught:
        await served.stub.Score(pb.ScoreRequest(model=V, samples=IMAGES))
    assert caught.value.code() is grpc.StatusCode.INTERNAL
    assert "someone" not in str(caught.value)
    assert "someone" in caplog.text


async def test_an_answer_that_cannot_be_made_is_an_error_not_a_silence(
    served: Front, engine: ManualEngine, caplog: pytest.LogCaptureFixture
) -> None:
    """Outputs that are not what they should be end the call at once, and the log says why."""
    call = served.stub.Decode(pb.DecodeRequest(model=V, latents=LATENTS))
    await until(lambda: engine.jobs)
    engine.finish(1, outputs={"nonsense": np.zeros((2, 3))})
    with pytest.raises(aio.AioRpcError) as caught:
        await call
    assert caught.value.code() is grpc.StatusCode.INTERNAL
    assert "KeyError" in caplog.text


async def test_many_wrong_labels_come_back_as_invalid_argument(served: Front) -> None:
    """The list of violations is cut to what gRPC's metadata can hold, not the call."""
    request = pb.SampleRequest(model=D, sample_count=1000, condition=pb.Condition(class_labels=[9] * 1000))
    with pytest.raises(aio.AioRpcError) as caught:
        await served.stub.Sample(request).read()
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert "more" in caught.value.details()


class SlowReader:
    """A Sample call whose client reads only when told to."""

    COUNT = 64
    SIDE = 512  # a result of 1 MiB

    def __init__(self, served: Front, engine: ManualEngine) -> None:
        self.call = served.stub.Sample(pb.SampleRequest(model=V, sample_count=self.COUNT))
        self._engine = engine
        self._done = 0

    async def finish(self, count: int) -> None:
        """Let the engine finish samples of 1 MiB each."""
        for lane in range(self._done, self._done + count):
            outputs = {
                "sample": np.zeros((1, self.SIDE, self.SIDE), np.float32),
                "z": np.zeros((1, LATENT), np.float32),
            }
            self._engine.finish(1, [lane], outputs)
            await asyncio.sleep(0)
        self._done += count


async def test_a_slow_reader_pauses_its_job_and_loses_nothing(served: Front, engine: ManualEngine) -> None:
    """When too much waits, the job sits out; once it is read, the job rides on; every result arrives."""
    reader = SlowReader(served, engine)
    await until(lambda: engine.jobs)
    await reader.finish(40)
    await until(lambda: engine.jobs[1].paused)
    assert (await reader.call.read()).HasField("accepted")
    seen = []
    for _ in range(40):
        seen += (await reader.call.read()).result.sample_indices
    await until(lambda: not engine.jobs[1].paused)
    await reader.finish(24)
    while (response := await reader.call.read()) is not aio.EOF:
        seen += response.result.sample_indices
    assert seen == list(range(64))


async def test_a_slow_reader_that_cancels_frees_its_job(
    served: Front, engine: ManualEngine, caplog: pytest.LogCaptureFixture
) -> None:
    """A handler that is blocked in a write hears of the cancel too, and it counts as one, without an error."""
    reader = SlowReader(served, engine)
    await until(lambda: engine.jobs)
    await reader.finish(40)
    await until(lambda: engine.jobs[1].paused)
    reader.call.cancel()
    await until(lambda: engine.cancelled == [1])
    line = 'latentd_requests_total{code="CANCELLED",method="Sample",model="tiny-vae@1"} 1.0'
    await until(lambda: line in served.metrics)
    assert 'latentd_requests_total{code="INTERNAL"' not in served.metrics
    assert not [record for record in caplog.records if record.levelname == "ERROR"]


async def test_a_slow_reader_sees_only_the_newest_preview(served: Front, engine: ManualEngine) -> None:
    """Previews that were overtaken while results waited are not sent; finished samples have none."""
    request = pb.SampleRequest(
        model=D, sample_count=3, diffusion=pb.DiffusionOptions(preview_interval_steps=1, step_count=10)
    )
    call = served.stub.Sample(request)
    assert (await call.read()).HasField("accepted")
    for completed in range(1, 8):  # in one turn of the loop: the writer cannot get in between
        engine.preview(1, [0, 1, 2], completed)
    engine.finish(1, [1])
    preview = (await call.read()).preview
    assert (list(preview.sample_indices), preview.completed_step_count) == ([0, 2], 7)
    assert preview.total_step_count == 10
    assert list((await call.read()).result.sample_indices) == [1]
    call.cancel()


async def test_a_drained_service_waits_for_calls_under_way(served: Front, engine: ManualEngine) -> None:
    """`finish` returns when the last answer has left, and not before."""
    call = served.stub.Decode(pb.DecodeRequest(model=V, latents=LATENTS))
    await until(lambda: engine.jobs)
    finishing = asyncio.create_task(served.service.finish())
    await asyncio.sleep(0.01)
    assert not finishing.done()
    engine.finish(1)
    await call
    await asyncio.wait_for(finishing, 10)
