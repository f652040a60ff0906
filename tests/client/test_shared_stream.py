"""The pure part of a shared stream: what is sent together, and whom an answer is for."""

import math
from typing import Any

import pytest
from google.protobuf.message import Message
from hypothesis import given
from hypothesis import strategies as st
from latentd.v1 import generation_service_pb2 as pb
from latentd_client.errors import Cancelled, LatentdError, ProtocolError
from latentd_client.shared_stream import MESSAGE_BYTES, MESSAGE_REQUESTS, Question, SharedStream

DECODED = pb.DecodeResponse(stats=pb.ExecutionStats(evaluation_count=1))


def question(number: int, *, padding: int = 0, deadline_s: float = math.inf, priority: Any = 0) -> Question:
    """A decode of about so many bytes."""
    request = pb.DecodeRequest(model="m" * padding)
    return Question(number, "decode", request, request.ByteSize(), priority, deadline_s)


def stream(*questions: Question, limit: int = 1024) -> SharedStream[Question]:
    """A stream that has been opened and was asked all that is given, of which nothing is sent."""
    opened: SharedStream[Question] = SharedStream("request-id", limit)
    assert opened.next_message(0.0) is not None
    for one in questions:
        opened.put(one)
    return opened


def sent(message: pb.StreamRequest | None) -> list[pb.StreamRequest]:
    """The requests in a message."""
    if message is None:
        return []
    return list(message.batch.requests) if message.HasField("batch") else [message]


def answer(number: int, **fields: Any) -> pb.StreamResponse:
    """What a server says."""
    return pb.StreamResponse(**({"id": number, "final": True, "decode": DECODED} | fields))


@pytest.mark.parametrize("count", [0, 1, 3])
def test_the_first_message_says_that_batches_are_read(count: int) -> None:
    """It is a batch whether it holds none, one or several; later messages are batches only of several."""
    fresh: SharedStream[Question] = SharedStream("request-id")
    for number in range(1, count + 1):
        fresh.put(question(number))
    first = fresh.next_message(0.0)
    assert first is not None
    assert first.HasField("batch")
    assert [request.id for request in first.batch.requests] == list(range(1, count + 1))
    assert fresh.next_message(0.0) is None
    fresh.put(question(8))
    alone = fresh.next_message(0.0)
    assert alone is not None
    assert (alone.id, alone.WhichOneof("request")) == (8, "decode")
    fresh.put(question(9))
    fresh.put(question(10))
    assert [request.id for request in sent(fresh.next_message(0.0))] == [9, 10]


def test_a_message_has_bounds() -> None:
    """Neither more than 256 requests nor more than 1 MiB travel together; nothing is left behind or sent twice."""
    many = stream(*[question(number) for number in range(1, 301)])
    assert [len(sent(many.next_message(0.0))) for _ in range(3)] == [MESSAGE_REQUESTS, 300 - MESSAGE_REQUESTS, 0]
    heavy = stream(*[question(number, padding=MESSAGE_BYTES // 3) for number in range(1, 6)])
    messages = [heavy.next_message(0.0) for _ in range(4)]
    assert [[request.id for request in sent(message)] for message in messages] == [[1, 2], [3, 4], [5], []]
    assert all(message.ByteSize() <= MESSAGE_BYTES for message in messages if message is not None)


@given(st.lists(st.integers(0, MESSAGE_BYTES // 2), max_size=12))
def test_no_message_is_larger_than_it_may_be(paddings: list[int]) -> None:
    """Whatever gathers, a server that takes 1 MiB takes every message."""
    questions = [
        question(10**18 + number, padding=padding, deadline_s=1e9 / 3, priority=pb.PRIORITY_HIGH)
        for number, padding in enumerate(paddings)
    ]
    shared = stream(*questions)
    ids: list[int] = []
    while (message := shared.next_message(0.0)) is not None:
        assert message.ByteSize() <= MESSAGE_BYTES
        ids += [request.id for request in sent(message)]
    assert ids == [one.id for one in questions]


def test_what_is_too_large_for_company_is_known() -> None:
    """A request that would fill a message by itself does not fit."""
    assert question(1, padding=MESSAGE_BYTES - 100).fits
    assert not question(1, padding=MESSAGE_BYTES).fits


def test_the_time_that_is_left_travels() -> None:
    """A request has what is left of its timeout when it is sent; none if it may take for ever."""
    shared = stream(question(1, deadline_s=12.5), question(2), question(3, deadline_s=10.0 + 2e-10))
    first, second, third = sent(shared.next_message(10.0))
    assert (first.timeout.seconds, first.timeout.nanos) == (2, 500_000_000)
    assert not second.HasField("timeout")
    assert (third.timeout.seconds, third.timeout.nanos) == (0, 1)  # a timeout of 0 would be refused
    shared.put(question(4, deadline_s=1e300))
    assert shared.next_message(0.0).timeout.seconds == 315_576_000_000  # the longest that fits


def test_what_has_no_time_left_is_not_sent() -> None:
    """Its caller hears of it without the server."""
    shared = stream(question(1, deadline_s=5.0), question(2, deadline_s=6.0))
    assert [request.id for request in sent(shared.next_message(5.0))] == [2]
    shared.receive(answer(2))
    assert shared.idle


def test_priorities_travel_with_each_request() -> None:
    """Requests of all classes share a message."""
    priorities = [pb.PRIORITY_LOW, pb.PRIORITY_HIGH, pb.PRIORITY_NORMAL]
    shared = stream(*[question(number, priority=priority) for number, priority in enumerate(priorities, 1)])
    assert [request.priority for request in sent(shared.next_message(0.0))] == priorities


def test_answers_find_who_asked_in_any_order() -> None:
    """By id; an error is one id's own."""
    questions = [question(number) for number in (1, 2, 3)]
    shared = stream(*questions)
    shared.next_message(0.0)
    assert shared.receive(answer(3)) == (questions[2], DECODED)
    heard = shared.receive(answer(1, decode=None, error=pb.StreamError(code=1, message="why")))
    assert heard is not None
    assert heard[0] is questions[0]
    assert isinstance(heard[1], Cancelled)
    assert (heard[1].message, heard[1].request_id) == ("why", "request-id")
    assert not shared.idle
    assert shared.receive(answer(2)) == (questions[1], DECODED)
    assert shared.idle


def test_what_was_not_sent_is_given_up_in_silence() -> None:
    """The server never hears of it."""
    one = question(1)
    shared = stream(one)
    shared.withdraw(one)
    assert shared.next_message(0.0) is None
    assert shared.idle


def test_what_was_sent_is_given_up_in_words() -> None:
    """Its id stays taken until the server has confirmed, whatever it says, and nobody is told."""
    one = question(1)
    for last_word in (answer(1), answer(1, decode=None, error=pb.StreamError(code=1))):
        shared = stream(one)
        shared.next_message(0.0)
        shared.withdraw(one)
        cancel = shared.next_message(0.0)
        assert cancel is not None
        assert (cancel.id, cancel.WhichOneof("request")) == (1, "cancel")
        assert not shared.idle
        assert shared.receive(last_word) is None
        assert shared.idle


def test_an_answer_makes_giving_up_unnecessary() -> None:
    """It came while the cancel waited to be written."""
    one = question(1)
    shared = stream(one)
    shared.next_message(0.0)
    shared.withdraw(one)
    shared.receive(answer(1))
    assert shared.next_message(0.0) is None


@pytest.mark.parametrize(
    ("response", "message"),
    [
        (answer(7), "id 7, which has no open request"),
        (answer(0, decode=None, error=pb.StreamError(message="no batches here")), "no batches here"),
        (answer(1, final=False), "not final"),
        (answer(1, decode=None, score=pb.ScoreResponse()), "answered decode with score"),
        (answer(1, decode=None), "answered decode with None"),
    ],
)
def test_answers_that_contradict_the_contract_are_not_believed(response: pb.StreamResponse, message: str) -> None:
    """They are errors of the whole stream, and leave everybody known who waits."""
    one = question(1)
    shared = stream(one)
    shared.next_message(0.0)
    with pytest.raises(ProtocolError, match=message):
        shared.receive(response)
    assert shared.abandon() == [one]


def test_a_stream_has_room_for_so_many() -> None:
    """One that was full once takes no more, and ends when all is answered."""
    shared = stream(question(1), limit=2)
    assert not shared.retired
    shared.put(question(2))
    shared.next_message(0.0)
    shared.receive(answer(1))
    assert shared.retired
    assert not shared.idle
    shared.receive(answer(2))
    assert shared.idle


class Server:
    """Holds what it was sent to the rules of the contract, and answers when told."""

    def __init__(self) -> None:
        self.open: set[int] = set()
        self.asked: list[int] = []
        self.given_up: set[int] = set()

    def take(self, message: pb.StreamRequest | None) -> None:
        for request in sent(message):
            if request.HasField("cancel"):
                assert request.id in self.asked
                self.given_up.add(request.id)
            else:
                assert request.id not in self.asked
                self.asked.append(request.id)
                self.open.add(request.id)


@given(st.lists(st.tuples(st.sampled_from(["ask", "write", "give up", "answer"]), st.integers(0, 99)), max_size=80))
def test_any_history_answers_everybody_once(history: list[tuple[str, int]]) -> None:
    """However asking, writing, giving up and answering mix: nothing is asked twice, and each is told once or not at all
    if it gave up.
    """
    shared, server = stream(), Server()
    waiting: dict[int, Question] = {}
    asked = 0
    answered: list[int] = []

    def hear(number: int) -> None:
        server.open.remove(number)
        heard: tuple[Question, Message | LatentdError] | None = shared.receive(answer(number))
        if heard is None:
            assert number not in waiting
        else:
            assert waiting.pop(number) is heard[0]
            answered.append(number)

    for act, pick in history:
        if act == "ask":
            asked += 1
            waiting[asked] = question(asked)
            shared.put(waiting[asked])
        elif act == "write":
            server.take(shared.next_message(0.0))
        elif act == "give up" and waiting:
            shared.withdraw(waiting.pop(sorted(waiting)[pick % len(waiting)]))
        elif act == "answer" and server.open:
            hear(sorted(server.open)[pick % len(server.open)])
    while (message := shared.next_message(0.0)) is not None:
        server.take(message)
    for number in sorted(server.open):
        hear(number)
    assert shared.idle
    assert not waiting
    assert server.asked == sorted(server.asked)
    assert server.given_up.isdisjoint(answered)
