"""Stream: many requests over one call, each with an id, each ended by exactly one final message."""

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

import grpc
import numpy as np
import pytest
from bundles import LATENT, SHAPE
from doors import Front, StaticRegistry, front, until
from google.protobuf.duration_pb2 import Duration
from google.rpc import error_details_pb2
from grpc import aio
from latentd import tensor
from latentd.names import PRIORITY_KEY
from latentd.v1 import generation_service_pb2 as pb
from latentd_server import failures, stream
from latentd_server.plans import Limits
from manual_engine import ManualEngine

V, D = "tiny-vae", "tiny-diffusion"
IMAGES = tensor.encode(np.zeros((2, *SHAPE), np.float32))
LATENTS = tensor.encode(np.zeros((2, LATENT), np.float32))
DECODE = pb.DecodeRequest(model=V, latents=LATENTS)
Request = pb.StreamRequest


@pytest.fixture
def engine() -> ManualEngine:
    return ManualEngine()


@pytest.fixture
def limits() -> Limits:
    return Limits(max_open_ids=4, max_loop_samples=6)


@pytest.fixture
async def served(engine: ManualEngine, held: dict[str, Any], limits: Limits) -> AsyncIterator[Front]:
    async with front(engine, StaticRegistry(held), limits) as running:
        yield running


class Bounded:
    """A call whose reads fail where a wrong server would leave them waiting for ever."""

    def __init__(self, call: Any) -> None:
        self._call = call

    def __getattr__(self, name: str) -> Any:
        return getattr(self._call, name)

    async def read(self) -> Any:
        return await asyncio.wait_for(self._call.read(), 10)


@pytest.fixture
async def call(served: Front) -> AsyncIterator[Any]:
    call = Bounded(served.stub.Stream())
    yield call
    call.cancel()


def reason(response: pb.StreamResponse) -> str:
    """`ErrorInfo.reason` of a StreamError."""
    info = error_details_pb2.ErrorInfo()
    response.error.details[0].Unpack(info)
    return info.reason


ANSWERED = [
    ("sample", pb.SampleRequest(model=V)),
    ("encode", pb.EncodeRequest(model=V, samples=IMAGES)),
    ("decode", DECODE),
    ("denoise_step", pb.DenoiseStepRequest(model=D, noisy_samples=IMAGES, timesteps=[4])),
    ("score", pb.ScoreRequest(model=V, samples=IMAGES)),
]


@pytest.mark.parametrize(("kind", "request_"), ANSWERED, ids=[kind for kind, _ in ANSWERED])
async def test_every_request_is_answered_under_its_id(
    kind: str, request_: Any, call: Any, engine: ManualEngine
) -> None:
    """The answer is that of the unary call; its last message is final."""
    await call.write(Request(id=7, **{kind: request_}))
    await until(lambda: engine.jobs)
    engine.finish(1)
    messages = [await call.read()]
    while not messages[-1].final:
        messages.append(await call.read())
    assert {message.id for message in messages} == {7}
    assert {message.WhichOneof("response") for message in messages} == {kind}
    if kind == "sample":
        assert [message.sample.WhichOneof("event") for message in messages] == ["accepted", "result"]


async def test_answers_come_in_the_order_they_are_ready(call: Any, engine: ManualEngine) -> None:
    """A slow request holds no other up."""
    for request_id in (1, 2, 3):
        await call.write(Request(id=request_id, decode=DECODE))
    await until(lambda: len(engine.jobs) == 3)
    for job in (3, 1, 2):
        engine.finish(job)
    assert [(await call.read()).id for _ in range(3)] == [3, 1, 2]


async def test_an_error_ends_its_own_id_only(call: Any, engine: ManualEngine) -> None:
    """Wrong fields, unknown models and failed jobs are told under their id; the others go on."""
    await call.write(Request(id=1, decode=DECODE))
    await call.write(Request(id=2, decode=pb.DecodeRequest(model=V)))
    await call.write(Request(id=3, decode=pb.DecodeRequest(model="nobody", latents=LATENTS)))
    await call.write(Request(id=4, decode=DECODE))
    await until(lambda: len(engine.jobs) == 2)
    engine.fail(2, failures.RuntimeFailureError("tiny-vae@1"))
    engine.finish(1)
    seen = {}
    for _ in range(4):
        message = await call.read()
        assert message.final
        seen[message.id] = (
            (message.error.code, reason(message)) if message.HasField("error") else message.WhichOneof("response")
        )
    assert seen == {
        1: "decode",
        2: (grpc.StatusCode.INVALID_ARGUMENT.value[0], "FIELD_INVALID"),
        3: (grpc.StatusCode.NOT_FOUND.value[0], "MODEL_NOT_FOUND"),
        4: (grpc.StatusCode.INTERNAL.value[0], "RUNTIME_FAILURE"),
    }


async def test_an_id_in_use_is_refused_and_its_request_goes_on(call: Any, engine: ManualEngine) -> None:
    """The refusal is not final, because the id is not over."""
    await call.write(Request(id=1, decode=DECODE))
    await call.write(Request(id=1, decode=DECODE))
    refused = await call.read()
    assert (refused.id, refused.final, reason(refused)) == (1, False, "FIELD_INVALID")
    assert "unique" in refused.error.message
    engine.finish(1)
    assert (await call.read()).final
    await call.write(Request(id=1, decode=DECODE))  # free again
    await until(lambda: engine.jobs)


@pytest.mark.parametrize("request_", [Request(id=5), Request(id=5, take_step=pb.TakeStep())])
async def test_a_message_that_means_nothing_is_refused(request_: Any, call: Any) -> None:
    """Nothing asked for, or a step of a loop that is not open: a final error."""
    await call.write(request_)
    message = await call.read()
    assert (message.id, message.final, reason(message)) == (5, True, "FIELD_INVALID")


async def test_a_step_of_what_is_no_loop_leaves_it_alone(call: Any, engine: ManualEngine) -> None:
    """`take_step` with the id of a decode is refused without ending the decode."""
    await call.write(Request(id=1, decode=DECODE))
    await call.write(Request(id=1, take_step=pb.TakeStep()))
    assert not (await call.read()).final
    engine.finish(1)
    assert (await call.read()).HasField("decode")


async def test_cancel_ends_an_id_with_a_final_message(call: Any, engine: ManualEngine) -> None:
    """The job leaves the engine; an id that is unknown, or over, is nothing to cancel."""
    await call.write(Request(id=9, cancel=pb.Cancel()))
    await call.write(Request(id=1, decode=DECODE))
    await until(lambda: engine.jobs)
    await call.write(Request(id=1, cancel=pb.Cancel()))
    message = await call.read()
    assert (message.id, message.final, reason(message)) == (1, True, "CANCELLED")
    assert engine.cancelled == [1]


async def test_a_timeout_of_its_own_or_the_streams_whichever_is_earlier(served: Front, engine: ManualEngine) -> None:
    """Each request's deadline is the minimum of both; a timeout must be positive."""
    call = Bounded(served.stub.Stream(timeout=500))
    for request_id, seconds in ((1, None), (2, 100), (3, 1000)):
        timeout = None if seconds is None else Duration(seconds=seconds)
        await call.write(Request(id=request_id, timeout=timeout, decode=DECODE))
    await until(lambda: len(engine.jobs) == 3)
    left = [job.deadline - served.door.clock() for job in engine.jobs.values()]  # type: ignore[operator]
    assert left == pytest.approx([500, 100, 500], abs=30)
    await call.write(Request(id=4, timeout=Duration(), decode=DECODE))
    message = await call.read()
    assert (message.id, message.error.message) == (4, "timeout: must be above 0 s; got 0 s")
    call.cancel()


async def test_half_close_finishes_what_was_accepted(call: Any, engine: ManualEngine) -> None:
    """The stream ends behind the last answer, with OK."""
    for request_id in (1, 2):
        await call.write(Request(id=request_id, decode=DECODE))
    await call.done_writing()
    await until(lambda: len(engine.jobs) == 2)
    engine.finish(2)
    assert (await call.read()).id == 2
    engine.finish(1)
    assert (await call.read()).id == 1
    assert await call.read() is aio.EOF
    assert await call.code() is grpc.StatusCode.OK


async def test_half_close_lets_an_answer_of_several_messages_end(call: Any, engine: ManualEngine) -> None:
    """The job is over when the first of them is sent, and what it was asked for is not all there yet."""
    await call.write(Request(id=1, sample=pb.SampleRequest(model=V, sample_count=3)))
    await call.done_writing()
    await until(lambda: engine.jobs)
    await asyncio.sleep(0.05)  # for the half-close to be heard
    images, latents = np.zeros((3, 1, 512, 512), np.float32), np.zeros((3, LATENT), np.float32)
    engine.finish(1, None, {"sample": images, "z": latents})
    messages = [await call.read() for _ in range(4)]
    assert [message.final for message in messages] == [False, False, False, True]
    assert [list(message.sample.result.sample_indices) for message in messages[1:]] == [[0], [1], [2]]
    assert await call.read() is aio.EOF
    assert await call.code() is grpc.StatusCode.OK


async def test_a_cancelled_stream_takes_its_jobs_along(served: Front, call: Any, engine: ManualEngine) -> None:
    """Every unfinished id leaves the engine and is counted once."""
    for request_id in (1, 2):
        await call.write(Request(id=request_id, decode=DECODE))
    await until(lambda: len(engine.jobs) == 2)
    call.cancel()
    await until(lambda: sorted(engine.cancelled) == [1, 2])
    line = 'latentd_requests_total{code="CANCELLED",method="Decode",model="tiny-vae@1"} 2.0'
    await until(lambda: line in served.metrics)
    await until(lambda: 'latentd_requests_in_flight{method="Stream"} 0.0' in served.metrics)
    await until(lambda: 'latentd_requests_in_flight{method="Decode"} 0.0' in served.metrics)


async def test_a_stream_may_have_only_so_many_unfinished_requests(call: Any, engine: ManualEngine) -> None:
    """One more is refused as a quota, final under its own id, and the others go on."""
    for request_id in range(5):
        await call.write(Request(id=request_id, decode=DECODE))
    message = await call.read()
    assert (message.id, message.final, reason(message)) == (4, True, "QUOTA_EXCEEDED")
    assert message.error.code == grpc.StatusCode.RESOURCE_EXHAUSTED.value[0]
    assert len(engine.jobs) == 4


async def test_a_slow_reader_pauses_all_jobs_of_its_stream(call: Any, engine: ManualEngine) -> None:
    """The jobs sit out while too much waits to be read, and ride on after; nothing is lost."""
    await call.write(Request(id=1, sample=pb.SampleRequest(model=V, sample_count=40)))
    await call.write(Request(id=2, decode=DECODE))
    await until(lambda: len(engine.jobs) == 2)
    for lane in range(39):
        image = np.zeros((1, 512, 512), np.float32)
        engine.finish(1, [lane], {"sample": image, "z": np.zeros((1, LATENT), np.float32)})
        await asyncio.sleep(0)
    await until(lambda: engine.jobs[1].paused)
    assert engine.jobs[2].paused
    assert (await call.read()).sample.HasField("accepted")
    seen = [index for _ in range(39) for index in (await call.read()).sample.result.sample_indices]
    assert seen == list(range(39))
    await until(lambda: not engine.jobs[1].paused)
    assert not engine.jobs[2].paused


def opening(count: int = 1, steps: int = 4, **fields: Any) -> pb.SampleRequest:
    return pb.SampleRequest(
        model=D, sample_count=count, diffusion=pb.DiffusionOptions(timesteps=range(10 * steps, 0, -10)), **fields
    )


async def test_a_loop_is_opened_stepped_and_finished(call: Any, engine: ManualEngine) -> None:
    """Each step says where the loop stands; the step to clean data is final."""
    await call.write(Request(id=1, open_denoise=opening(steps=2, seed=4)))
    opened = (await call.read()).loop
    assert opened.accepted.resolved_request.seed == 4
    assert (opened.timestep, list(opened.remaining_timesteps)) == (20, [10, -1])
    assert not opened.HasField("step")

    await call.write(Request(id=1, take_step=pb.TakeStep(state_requested=True)))
    await until(lambda: engine.jobs)
    engine.finish(1)
    message = await call.read()
    assert (message.final, message.loop.timestep, list(message.loop.remaining_timesteps)) == (False, 10, [-1])
    assert message.loop.step.HasField("denoised_samples")
    assert message.loop.step.HasField("next_samples")

    await call.write(Request(id=1, take_step=pb.TakeStep()))
    await until(lambda: engine.jobs)
    engine.finish(2)
    message = await call.read()
    assert (message.final, message.loop.timestep, list(message.loop.remaining_timesteps)) == (True, -1, [])
    assert not message.loop.step.HasField("next_samples")


async def test_the_state_of_a_loop_stays_on_the_server(call: Any, engine: ManualEngine) -> None:
    """A step begins where the one before it ended, unless the caller brings a state of its own."""
    await call.write(Request(id=1, open_denoise=opening()))
    await call.read()
    await call.write(Request(id=1, take_step=pb.TakeStep()))
    await until(lambda: engine.jobs)
    assert engine.jobs[1].job.start.values is None  # type: ignore[union-attr]
    state, history = (np.full((1, *SHAPE), value, np.float32) for value in (3, 5))
    engine.finish(1, outputs={"sample": state, "history": history, "denoised": state, "noise": state})
    await call.read()
    await call.write(Request(id=1, take_step=pb.TakeStep()))
    await until(lambda: engine.jobs)
    start = engine.jobs[2].job.start  # type: ignore[union-attr]
    assert start.values is state
    assert start.history is history
    assert start.noise_scale == 0
    engine.finish(2)
    await call.read()
    own = np.full((1, *SHAPE), 9, np.float32)
    await call.write(Request(id=1, take_step=pb.TakeStep(noisy_samples=tensor.encode(own), next_timestep=-1)))
    await until(lambda: engine.jobs)
    assert engine.jobs[3].job.start.values.tolist() == own.tolist()  # type: ignore[union-attr]
    engine.finish(3)
    assert (await call.read()).final


async def test_steps_sent_ahead_are_taken_one_after_the_other(call: Any, engine: ManualEngine) -> None:
    """At most one step of a loop is with the engine; one too many is refused without ending the loop."""
    await call.write(Request(id=1, open_denoise=opening(steps=2)))
    await call.read()
    for _ in range(3):
        await call.write(Request(id=1, take_step=pb.TakeStep()))
    refused = await call.read()
    assert (refused.final, reason(refused)) == (False, "FIELD_INVALID")
    assert len(engine.submitted) == 1
    engine.finish(1)
    await until(lambda: len(engine.submitted) == 2)
    engine.finish(2)
    assert [(await call.read()).loop.timestep for _ in range(2)] == [10, -1]


async def test_steps_sent_ahead_wait_for_a_slow_reader(call: Any, engine: ManualEngine) -> None:
    """While too much waits to be read, the next step of a loop is lined up but sits out."""
    await call.write(Request(id=1, open_denoise=opening(steps=9)))
    assert (await call.read()).loop.timestep == 90
    for _ in range(9):
        await call.write(Request(id=1, take_step=pb.TakeStep()))
    big = np.zeros((1, 1024, 1024), np.float32)
    outputs = dict.fromkeys(("sample", "history", "denoised", "noise"), big)
    for step in range(1, 9):
        await until(lambda step=step: step in engine.jobs)  # type: ignore[misc]
        if engine.jobs[step].paused:
            break
        engine.finish(step, outputs=outputs)
        await asyncio.sleep(0)
    assert engine.jobs[step].paused
    for _ in range(step - 1):
        await call.read()
    await until(lambda: not engine.jobs[step].paused)


async def test_a_wrong_step_ends_its_loop(call: Any, engine: ManualEngine) -> None:
    """What the caller wanted after it would start from somewhere else than it thinks."""
    await call.write(Request(id=1, open_denoise=opening()))
    await call.read()
    await call.write(Request(id=1, take_step=pb.TakeStep(next_timestep=40)))
    message = await call.read()
    assert (message.final, message.error.message) == (True, "next_timestep: must be from -1 to 39; got 40")
    await call.write(Request(id=1, take_step=pb.TakeStep()))
    assert "open loop" in (await call.read()).error.message


async def test_a_loop_ends_when_its_model_is_unloaded_or_exchanged(
    served: Front, call: Any, held: dict[str, Any]
) -> None:
    """A step after that is refused as a new request would be, and never taken with other weights."""
    registry = served.door.registry
    assert isinstance(registry, StaticRegistry)
    for request_id in (1, 2):
        await call.write(Request(id=request_id, open_denoise=opening()))
        await call.read()
    registry.refusal = failures.ModelNotFoundError(D, [])
    await call.write(Request(id=1, take_step=pb.TakeStep()))
    message = await call.read()
    assert (message.final, reason(message)) == (True, "MODEL_NOT_FOUND")
    registry.refusal = None
    registry.exchange(D, replace(held[D]))
    await call.write(Request(id=2, take_step=pb.TakeStep()))
    message = await call.read()
    assert (message.final, reason(message)) == (True, "CANCELLED")
    assert "loaded anew" in message.error.message


async def test_a_wrong_step_sent_ahead_ends_its_loop_when_its_turn_comes(call: Any, engine: ManualEngine) -> None:
    """The steps before it are taken, those behind it are not."""
    await call.write(Request(id=1, open_denoise=opening()))
    await call.read()
    for step in (pb.TakeStep(), pb.TakeStep(next_timestep=35), pb.TakeStep()):
        await call.write(Request(id=1, take_step=step))
    await until(lambda: engine.jobs)
    engine.finish(1)
    assert (await call.read()).loop.timestep == 30
    message = await call.read()
    assert (message.final, reason(message)) == (True, "FIELD_INVALID")
    assert not engine.jobs


async def test_half_close_finishes_steps_and_gives_open_loops_up(call: Any, engine: ManualEngine) -> None:
    """A loop that nobody can drive any more is told so, after its steps under way are done."""
    await call.write(Request(id=1, open_denoise=opening()))
    await call.write(Request(id=2, open_denoise=opening()))
    for _ in range(2):
        await call.write(Request(id=2, take_step=pb.TakeStep()))
    await call.done_writing()
    await until(lambda: engine.jobs)
    engine.finish(1)
    await until(lambda: len(engine.submitted) == 2)
    engine.finish(2)
    messages = []
    while (message := await call.read()) is not aio.EOF:
        messages.append(message)
    assert [m.loop.timestep for m in messages if m.HasField("loop")] == [40, 40, 30, 20]
    ends = {m.id: reason(m) for m in messages if m.final}
    assert ends == {1: "CANCELLED", 2: "CANCELLED"}
    assert await call.code() is grpc.StatusCode.OK


async def test_loops_of_a_stream_hold_only_so_many_samples(call: Any) -> None:
    """The memory that open loops may take is bounded, and freed when a loop ends."""
    await call.write(Request(id=1, open_denoise=opening(4)))
    assert (await call.read()).HasField("loop")
    await call.write(Request(id=2, open_denoise=opening(3)))
    assert reason(await call.read()) == "QUOTA_EXCEEDED"
    await call.write(Request(id=1, cancel=pb.Cancel()))
    assert (await call.read()).final
    await call.write(Request(id=2, open_denoise=opening(3)))
    assert (await call.read()).HasField("loop")


async def test_a_draining_server_refuses_loops_and_new_streams(served: Front, call: Any, engine: ManualEngine) -> None:
    """Both would be new work that no engine refuses by itself."""
    await call.write(Request(id=1, decode=DECODE))
    await until(lambda: engine.jobs)
    engine.draining = True
    await call.write(Request(id=2, open_denoise=opening()))
    assert reason(await call.read()) == "DRAINING"
    other = served.stub.Stream()
    assert await other.code() is grpc.StatusCode.UNAVAILABLE


async def test_a_drained_server_ends_streams_behind_their_answers(
    served: Front, call: Any, engine: ManualEngine
) -> None:
    """What was accepted is answered, open loops are told, and the stream ends with UNAVAILABLE: connect elsewhere."""
    await call.write(Request(id=1, open_denoise=opening()))
    await call.read()
    await call.write(Request(id=2, decode=DECODE))
    await until(lambda: engine.jobs)
    engine.draining = True
    engine.finish(1)
    await asyncio.wait_for(served.service.finish(), 10)
    messages = [await call.read(), await call.read()]
    assert messages[0].HasField("decode")
    assert (messages[1].id, messages[1].final, reason(messages[1])) == (1, True, "DRAINING")
    with pytest.raises(aio.AioRpcError) as caught:
        await call.read()
    assert caught.value.code() is grpc.StatusCode.UNAVAILABLE


def batch(*requests: pb.StreamRequest) -> pb.StreamRequest:
    """Several requests in one message."""
    return Request(batch=pb.StreamRequestBatch(requests=requests))


async def test_requests_of_one_message_are_taken_up_as_if_each_had_come_alone(call: Any, engine: ManualEngine) -> None:
    """In order: what is wrong with one of them is its own, and a batch inside a batch is one of those."""
    await call.write(batch(Request(id=1, decode=DECODE), Request(id=2), batch(), Request(id=3, decode=DECODE)))
    await until(lambda: len(engine.jobs) == 2)
    refused = (await call.read()).batch.responses
    assert [(response.id, response.final, reason(response)) for response in refused] == [
        (2, True, "FIELD_INVALID"),
        (0, True, "FIELD_INVALID"),
    ]


async def test_a_batch_waits_for_its_reader_as_requests_do_that_come_alone(served: Front) -> None:
    """A few bytes are a request, and its refusal takes kilobytes until it is read."""
    call = Bounded(served.stub.Stream())
    await call.write(batch(*[Request()] * 20_000))
    await until(lambda: served.service._sessions)
    (session,) = served.service._sessions
    most, seen = 0, 0
    while seen < 20_000:
        most = max(most, len(session._outbox._waiting))
        seen += len((await call.read()).batch.responses) or 1
    assert most < 100
    call.cancel()


async def test_answers_that_are_ready_together_come_in_one_message(call: Any, engine: ManualEngine) -> None:
    """In order, and only to a client that has sent a batch, were it empty."""
    await call.write(batch())
    for request_id in (1, 2, 3):
        await call.write(Request(id=request_id, decode=DECODE))
    await until(lambda: len(engine.jobs) == 3)
    for job in (2, 3, 1):
        engine.finish(job)
    message = await call.read()
    assert [response.id for response in message.batch.responses] == [2, 3, 1]
    assert all(response.final for response in message.batch.responses)
    assert not message.final


async def test_a_client_that_sends_no_batch_gets_none(call: Any, engine: ManualEngine) -> None:
    """Clients older than batches read on."""
    for request_id in (1, 2):
        await call.write(Request(id=request_id, decode=DECODE))
    await until(lambda: len(engine.jobs) == 2)
    for job in (1, 2):
        engine.finish(job)
    assert [(await call.read()).id for _ in range(2)] == [1, 2]


async def test_requests_of_one_stream_have_priorities_of_their_own(served: Front, engine: ManualEngine) -> None:
    """A request's field beats the stream's metadata, which count where it has none; a loop keeps its first."""
    call = Bounded(served.stub.Stream(metadata=((PRIORITY_KEY, "low"),)))
    await call.write(Request(id=1, decode=DECODE))
    await call.write(Request(id=2, decode=DECODE, priority=pb.PRIORITY_HIGH))
    loop = pb.SampleRequest(model=D, seed=1, diffusion=pb.DiffusionOptions(step_count=3))
    await call.write(Request(id=3, open_denoise=loop, priority=pb.PRIORITY_NORMAL))
    await call.write(Request(id=3, take_step=pb.TakeStep()))
    await until(lambda: len(engine.jobs) == 3)
    assert [job.priority.name for job in engine.jobs.values()] == ["LOW", "HIGH", "NORMAL"]
    call.cancel()


async def test_a_priority_this_version_does_not_know_is_refused(call: Any, engine: ManualEngine) -> None:
    """By its path, with what is allowed; the stream goes on."""
    await call.write(Request(id=1, decode=DECODE, priority=9))  # type: ignore[arg-type]  # as a newer client might
    refused = await call.read()
    assert (refused.final, reason(refused)) == (True, "FIELD_INVALID")
    assert "priority: must be one of PRIORITY_HIGH, PRIORITY_NORMAL, PRIORITY_LOW; got 9" in refused.error.message
    await call.write(Request(id=1, decode=DECODE))
    await until(lambda: len(engine.jobs) == 1)


async def test_states_sent_ahead_are_bounded(call: Any, engine: ManualEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is lined up behind a step is in no backlog, so a loop that lines up too much is over."""
    monkeypatch.setattr(stream, "AHEAD_BYTES", 200)
    await call.write(Request(id=1, open_denoise=pb.SampleRequest(model=D, diffusion=pb.DiffusionOptions(step_count=9))))
    assert (await call.read()).HasField("loop")
    state = tensor.encode(np.zeros((1, *SHAPE), np.float32))
    for step in (pb.TakeStep(noisy_samples=state), pb.TakeStep(), pb.TakeStep(noisy_samples=state)):
        await call.write(Request(id=1, take_step=step))
    await until(lambda: engine.jobs)
    await call.write(Request(id=1, take_step=pb.TakeStep(noisy_samples=state, state_requested=False)))
    await call.write(Request(id=1, take_step=pb.TakeStep(noisy_samples=state)))
    refused = await call.read()
    assert refused.final
    assert reason(refused) == "QUOTA_EXCEEDED"
