"""Broken streams are mended: every sample once, with the bytes of an unbroken one."""

import asyncio
from typing import Any

import grpc
import numpy as np
import pytest
from fake_server import SHAPE, FakeServer, Fault, info, retry_after, toy_sample, wait_until
from hypothesis import given
from hypothesis import strategies as st
from latentd import tensor
from latentd.reasons import Reason
from latentd.v1 import generation_service_pb2 as pb
from latentd.v1 import model_pb2
from latentd_client import Accepted, AsyncClient, Client, DeterminismChanged, Preview, Samples, ServerUnavailable
from latentd_client.errors import ProtocolError
from latentd_client.model import Model
from latentd_client.resume import SampleRun, assemble, part_of

N = 6
MESSAGES = 1 + N  # `accepted` and one result each


@pytest.mark.parametrize("k", range(MESSAGES + 1))
def test_a_stream_broken_anywhere_gives_the_same_bytes(client: Any, server: FakeServer, k: int) -> None:
    """Wherever the stream breaks, even after the last sample, the caller gets every sample once and unchanged."""
    whole = client.sample("toy", N, seed=7)
    server.fail("Sample", Fault(after=k))
    parts = [event for event in client.sample_stream("toy", N, seed=7) if isinstance(event, Samples)]
    arrived = [index for part in parts for index in part.indices.tolist()]
    assert sorted(arrived) == list(range(N))
    mended = assemble(parts, N)
    np.testing.assert_array_equal(mended.array, whole.array)
    np.testing.assert_array_equal(mended.labels, whole.labels)
    np.testing.assert_array_equal(mended.latents, whole.latents)


def test_a_stream_broken_at_every_message_in_turn_gives_the_same_bytes(client: Any, server: FakeServer) -> None:
    """A stream that breaks after every single sample still arrives, for each attempt brings something new."""
    server.fail("Sample", *[Fault(after=2)] * (N - 1))
    samples = client.sample("toy", N, seed=7)
    expected = [toy_sample(pb.SampleRequest(seed=7), i)[0] for i in range(N)]
    np.testing.assert_array_equal(samples.array, expected)
    assert len(server.requests("Sample")) == N


def test_only_the_missing_range_is_asked_for_again(client: Any, server: FakeServer) -> None:
    """Each further stream covers one missing range and no more, of the canonical model, with its share of labels."""
    server.fail("Sample", Fault(after=3))  # odd samples travel first: 1 and 3 arrive
    labels = [3, 1, 4, 1, 5, 9]
    samples = client.sample("toy", seed=7, label=labels)
    assert samples.labels.tolist() == labels
    again = server.requests("Sample")[1:]
    assert {(request.model, request.seed) for request in again} == {("toy@1", 7)}
    assert [(request.first_sample_index, request.sample_count) for request in again] == [(0, 1), (2, 1), (4, 2)]
    assert [list(request.condition.class_labels) for request in again] == [labels[:1], labels[2:3], labels[4:]]


def test_start_points_are_cut_with_their_samples(client: Any, server: FakeServer) -> None:
    """Image-to-image resumes with each sample's own start point, which the server does not echo."""
    start = np.arange(4 * 16, dtype=np.float32).reshape(4, *SHAPE)
    whole = client.sample("toy-diffusion", 4, seed=7, start=start)
    for shared in (False, True):
        server.fail("Sample", Fault(after=3))  # 1 and 3 have arrived
        given_start = start[:1] if shared else start
        mended = client.sample("toy-diffusion", 4, seed=7, start=given_start)
        if not shared:
            np.testing.assert_array_equal(mended.array, whole.array)
        resumed = server.requests("Sample")[-1]
        assert (resumed.first_sample_index, resumed.sample_count) == (2, 1)
        assert tensor.decode(resumed.diffusion.start.samples)[0].tolist() == given_start[0 if shared else 2].tolist()


def test_previews_do_not_repeat(client: Any, server: FakeServer) -> None:
    """After a break, previews go on where they were: progress never runs backwards."""
    server.fail("Sample", Fault(after=3))  # `accepted` and the previews after steps 1 and 2
    events = list(client.sample_stream("toy-diffusion", 2, seed=7, previews=1))
    assert [event.completed_steps for event in events if isinstance(event, Preview)] == [1, 2, 3]
    assert sum(isinstance(event, Accepted) for event in events) == 1


def test_what_is_refused_for_good_is_not_asked_again(client: Any, server: FakeServer) -> None:
    """An error that repeating cannot cure ends the stream at once."""
    server.fail("Sample", Fault(after=2, code=grpc.StatusCode.INTERNAL, details=[info(Reason.RUNTIME_FAILURE)]))
    with pytest.raises(Exception, match="a fault"):
        client.sample("toy", 3)
    assert len(server.requests("Sample")) == 1


def test_samples_are_not_lost_to_how_their_stream_ends(client: Any, server: FakeServer) -> None:
    """Once every sample has arrived, even a failure that cannot be repeated does not take them back."""
    server.fail("Sample", Fault(after=1 + 3, code=grpc.StatusCode.INTERNAL, details=[info(Reason.RUNTIME_FAILURE)]))
    assert len(client.sample("toy", 3)) == 3
    assert len(server.requests("Sample")) == 1


def test_a_proxys_reset_is_mended(client: Any, server: FakeServer) -> None:
    """INTERNAL without latentd's own details is how proxies end the streams of a server that went away."""
    server.fail("Sample", Fault(after=2, code=grpc.StatusCode.INTERNAL, message="Received RST_STREAM"))
    assert len(client.sample("toy", 3)) == 3


def test_attempts_that_bring_nothing_are_bounded(client: Any, server: FakeServer) -> None:
    """A server that refuses time and again is asked five times, and its last refusal is what the caller sees."""
    refusal = Fault(details=[info(Reason.OVERLOADED), retry_after(0.001)])
    server.fail("Sample", *[refusal] * 9)
    with pytest.raises(ServerUnavailable) as caught:
        client.sample("toy", 3)
    assert caught.value.reason is Reason.OVERLOADED
    assert len(server.requests("Sample")) == 5


def test_no_retry_outlives_the_deadline(client: Any, server: FakeServer) -> None:
    """A server that says to come back after the deadline is not waited for."""
    server.fail("Sample", Fault(details=[info(Reason.OVERLOADED), retry_after(60)]), Fault())
    with pytest.raises(ServerUnavailable) as caught:
        client.sample("toy", timeout=20)
    assert caught.value.retry_after_s == 60
    assert len(server.requests("Sample")) == 1


def test_a_stream_that_ends_early_is_asked_for_the_rest(client: Any, server: FakeServer) -> None:
    """A clean end with samples missing is not taken for the end; a server that keeps doing so is called out."""
    server.fail("Sample", Fault(after=3, code=None))
    assert len(client.sample("toy", 4)) == 4
    server.fail("Sample", *[Fault(after=1, code=None)] * 9)
    with pytest.raises(ServerUnavailable, match="ended the stream with 4 samples missing"):
        client.sample("toy", 4)


def test_a_gathered_result_is_of_one_class(client: Any, server: FakeServer) -> None:
    """If the server that takes over promises other bytes, all samples are drawn there."""
    server.fail("Sample", Fault(after=4, then=lambda: setattr(server, "determinism_class", "class-b")))
    samples = client.sample("toy", N, seed=7)
    assert samples.determinism_class == "class-b"
    asked = [(request.first_sample_index, request.sample_count) for request in server.requests("Sample")]
    assert asked == [(0, N), (0, 1), (1, 5)]
    assert samples.stats.evaluations >= 4 * N


def test_a_streamed_result_tells_of_a_new_class(client: Any, server: FakeServer) -> None:
    """Samples that were handed out are not taken back: a second `Accepted` says that the rest is of another class."""
    server.fail("Sample", Fault(after=4, then=lambda: setattr(server, "determinism_class", "class-b")))
    events = list(client.sample_stream("toy", N, seed=7))
    assert [event.determinism_class for event in events if isinstance(event, Accepted)] == ["class-a", "class-b"]
    parts = [event for event in events if isinstance(event, Samples)]
    assert [(part.determinism_class, part.indices.tolist()) for part in parts] == [
        *[("class-a", [i]) for i in (1, 3, 5)],
        *[("class-b", [i]) for i in (0, 2, 4)],
    ]


def test_a_newer_version_does_not_take_over_half_way(client: Any, server: FakeServer) -> None:
    """Once accepted by a version, a request stays with it."""
    server.fail("Sample", Fault(after=2, then=lambda: setattr(server, "versions", 2)))
    assert client.sample("toy", 2).model == "toy@1"
    assert [request.model for request in server.requests("Sample")] == ["toy", "toy@1"]


@pytest.mark.parametrize("k", range(6))
def test_a_loop_broken_anywhere_goes_on_with_the_same_bytes(client: Any, server: FakeServer, k: int) -> None:
    """The steps taken are sent anew, edits included, and lead to the same states; no step is seen twice."""

    def states() -> Any:
        with client.denoise_loop("toy-diffusion", 2, seed=7) as loop:
            first = loop.step().state
            second = loop.step(state=first * 3).state
            return np.stack([first, second, *(step.state for step in loop)])

    unbroken = states()
    server.fail("Stream", Fault(after=k), Fault(after=min(k, 2)))
    np.testing.assert_array_equal(states(), unbroken)


async def test_an_interrupted_step_leaves_the_loop_in_step(server: FakeServer) -> None:
    """A step whose task is cancelled before its answer was not taken; the next one is answered as itself."""
    async with AsyncClient(server.target) as client:
        async with client.denoise_loop("toy-diffusion", 1, seed=7) as loop:
            unbroken = [step.state async for step in loop]
        server.fail("Stream", Fault(after=2, delay_s=30.0))
        async with client.denoise_loop("toy-diffusion", 1, seed=7) as loop:
            states = [(await loop.step()).state]
            waiting = asyncio.create_task(loop.step())
            # The first loop sent 5 messages, this one 2, and now the step that waits.
            await asyncio.to_thread(wait_until, lambda: len(server.requests("StreamRequest")) == 5 + 2 + 1)
            waiting.cancel()
            with pytest.raises(asyncio.CancelledError):
                await waiting
            states += [step.state async for step in loop]
    np.testing.assert_array_equal(np.stack(states), np.stack(unbroken))


def test_an_interrupt_leaves_a_blocking_loop_in_step(server: FakeServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C between a step and its answer does not make the next step read the answer of the last."""
    with Client(server.target) as client:
        with client.denoise_loop("toy-diffusion", 1, seed=7) as loop:
            unbroken = [step.state for step in loop]
        with client.denoise_loop("toy-diffusion", 1, seed=7) as loop:
            states = [loop.step().state]
            with monkeypatch.context() as patch:
                patch.setattr(loop._run, "receive", _interrupt)
                with pytest.raises(KeyboardInterrupt):
                    loop.step()
            states += [step.state for step in loop]
    np.testing.assert_array_equal(np.stack(states), np.stack(unbroken))


def _interrupt(*arguments: object) -> None:
    raise KeyboardInterrupt


def test_a_loop_does_not_change_class_half_way(client: Any, server: FakeServer) -> None:
    """A loop is a promise of equal bytes; a server that cannot keep it does not take over."""
    with client.denoise_loop("toy-diffusion", 1, seed=7) as loop:
        loop.step()
        server.determinism_class = "class-b"
        server.faults["Stream"].clear()
        server.stop()
        server.start()
        with pytest.raises(DeterminismChanged, match="class-b"):
            loop.step()


def test_a_restarted_server_is_found_again(client: Any, server: FakeServer) -> None:
    """A stream survives its server's death and rebirth on the same address."""
    server.fail("Sample", Fault(after=3, delay_s=30.0))
    events = client.sample_stream("toy", N, seed=7)
    seen = [next(events) for _ in range(3)]
    server.stop()
    server.start()
    parts = [event for event in (*seen, *events) if isinstance(event, Samples)]
    assert sorted(index for part in parts for index in part.indices) == list(range(N))


# --- the state machine alone ---------------------------------------------------------------------------------------

TOY = Model(model_pb2.Model(name="toy@1"))


def result(request: pb.SampleRequest, rows: list[int]) -> pb.SampleResponse:
    """A result for some samples of a request."""
    return pb.SampleResponse(
        result=pb.SampleResult(
            sample_indices=rows, samples=tensor.encode(np.stack([toy_sample(request, i)[0] for i in rows]))
        )
    )


def accepted(request: pb.SampleRequest, determinism_class: str) -> pb.SampleResponse:
    """The first message of a stream."""
    return pb.SampleResponse(accepted=pb.SampleAccepted(resolved_request=request, determinism_class=determinism_class))


@given(data=st.data(), count=st.integers(1, 12), first=st.integers(0, 5), one_class=st.booleans())
def test_any_history_of_breaks_yields_every_sample_once(
    data: st.DataObject, count: int, first: int, one_class: bool
) -> None:
    """Whatever order and groups samples come in, and wherever streams end: every index is delivered once, its bytes
    right, and no stream asks for a sample that is there already. Only where all samples must be of one class does a
    new class begin anew.
    """
    whole = pb.SampleRequest(model="toy@1", sample_count=count, seed=7, first_sample_index=first)
    run = SampleRun(whole, TOY)
    run.one_class = one_class
    delivered: list[Samples] = []
    determinism_class = "a"
    streams = 0
    while not run.done:
        last_stream = streams >= 6
        request = run.next_request()
        present = {int(i) for part in delivered for i in part.indices}
        offset = request.first_sample_index - first
        assert not present & set(range(offset, offset + request.sample_count))

        before, determinism_class = determinism_class, data.draw(st.sampled_from([determinism_class, "b"]))
        if last_stream:
            determinism_class = before
        run.receive(accepted(request, determinism_class))
        if one_class and determinism_class != before:
            delivered.clear()

        order = data.draw(st.permutations(range(request.sample_count)))
        stop = len(order) if last_stream else data.draw(st.integers(0, len(order)))
        position = 0
        while position < stop:
            size = data.draw(st.integers(1, stop - position))
            events = run.receive(result(request, list(order[position : position + size])))
            delivered += [event for event in events if isinstance(event, Samples)]
            position += size
        streams += 1

    assert sorted(int(i) for part in delivered for i in part.indices) == list(range(count))
    expected = np.stack([toy_sample(whole, i)[0] for i in range(count)])
    np.testing.assert_array_equal(assemble(delivered, count).array, expected)


@given(data=st.data(), count=st.integers(1, 9))
def test_a_part_asks_for_the_samples_of_the_whole(data: st.DataObject, count: int) -> None:
    """Samples of any part of any request have the bytes they have in the whole."""
    whole = pb.SampleRequest(
        sample_count=count,
        seed=data.draw(st.integers(0, 99)),
        first_sample_index=data.draw(st.integers(0, 9)),
        condition=data.draw(
            st.sampled_from(
                [None, pb.Condition(class_label=3), pb.Condition(class_labels=[(3 * i) % 10 for i in range(count)])]
            )
        ),
    )
    first = data.draw(st.integers(0, count - 1))
    stop = data.draw(st.integers(first + 1, count))
    part = part_of(whole, first, stop)
    assert part.sample_count == stop - first
    for i in range(first, stop):
        of_part, of_whole = toy_sample(part, i - first), toy_sample(whole, i)
        np.testing.assert_array_equal(of_part[0], of_whole[0])
        assert of_part[1] == of_whole[1]


@pytest.mark.parametrize(
    ("message", "complaint"),
    [
        (pb.SampleResult(sample_indices=[9], samples=tensor.encode(np.zeros((1, 2)).astype("f4"))), "nobody asked"),
        (pb.SampleResult(sample_indices=[-1], samples=tensor.encode(np.zeros((1, 2)).astype("f4"))), "nobody asked"),
        (pb.SampleResult(sample_indices=[0, 0], samples=tensor.encode(np.zeros((2, 2)).astype("f4"))), "twice"),
        (pb.SampleResult(sample_indices=[0], samples=tensor.encode(np.zeros((2, 2)).astype("f4"))), "2 rows"),
        (
            pb.SampleResult(
                sample_indices=[0], samples=tensor.encode(np.zeros((1, 2)).astype("f4")), class_labels=[1, 2]
            ),
            "2 rows in result.class_labels",
        ),
        (pb.SampleResult(sample_indices=[0]), "bad tensor"),
    ],
)
def test_answers_that_contradict_the_contract_are_refused(message: pb.SampleResult, complaint: str) -> None:
    """Wrong indices, row counts and tensors raise instead of being stitched in."""
    request = pb.SampleRequest(model="toy@1", sample_count=2, seed=7)
    run = SampleRun(request, TOY)
    with pytest.raises(ProtocolError, match="before `accepted`"):
        run.receive(result(request, [0]))
    run.receive(accepted(request, "a"))
    with pytest.raises(ProtocolError, match=complaint):
        run.receive(pb.SampleResponse(result=message))


def test_events_of_a_newer_server_are_skipped() -> None:
    """A kind of event that this client does not know is no error."""
    assert SampleRun(pb.SampleRequest(sample_count=1), TOY).receive(pb.SampleResponse()) == []
