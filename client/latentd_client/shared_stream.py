"""One Stream call that many callers share: what to send next, and whom an answer is for. Pure: time is an argument.

What gathers while a message is written goes out together in the next one. Every question that was sent keeps its id
until its final answer, also when nobody waits for it any more, so that no answer can reach the wrong caller.
"""

from collections import OrderedDict
from dataclasses import dataclass
from typing import Generic, TypeVar

from google.protobuf.message import Message
from latentd.v1 import generation_service_pb2 as pb

from latentd_client import errors

MESSAGE_BYTES = 2**20
"""What a message holds at most. A larger request gains nothing from company, and would keep it waiting."""
MESSAGE_REQUESTS = 256
UNANSWERED = 1024
"""What a stream carries at most without an answer; as much as servers take unless they are told otherwise."""

_ENVELOPE_BYTES = 64  # more than id, timeout, priority and the lengths around them take
_LONGEST_TIMEOUT_S = 315_576_000_000.0  # of a protobuf Duration


@dataclass(slots=True, eq=False)
class Question:
    """A request that has one answer.

    Attributes:
        id: unique among the questions of its stream; not 0, which is the id of messages that hold several.
        field: of StreamRequest, and of the StreamResponse that answers.
        request: what is asked.
        size: of the request, in bytes.
        priority: how it shares the device with others.
        deadline_s: until when the answer is of use, on the clock of `SharedStream.next_message`; may be infinite.
    """

    id: int
    field: str
    request: Message
    size: int
    priority: pb.Priority.ValueType
    deadline_s: float

    @property
    def fits(self) -> bool:
        """Whether it is small enough to be asked in company."""
        return self.size + _ENVELOPE_BYTES <= MESSAGE_BYTES


QuestionT = TypeVar("QuestionT", bound=Question)


class SharedStream(Generic[QuestionT]):
    """The state of one Stream call.

    Args:
        request_id: the `x-request-id` of the call.
        limit: questions that it carries at most without an answer. A stream that has had as many takes no more, so that
            it ends, and makes room for others where a connection may have only so many.

    Attributes:
        retired: whether it takes no more questions; those that are there are still answered.
    """

    def __init__(self, request_id: str, limit: int = UNANSWERED) -> None:
        self.request_id = request_id
        self.limit = limit
        self.retired = False
        self._opened = False
        self._outgoing: OrderedDict[int, QuestionT | None] = OrderedDict()  # by id; None gives the id up
        self._unanswered: dict[int, QuestionT | None] = {}  # None: given up, and not yet confirmed

    @property
    def idle(self) -> bool:
        """Whether nothing is to be sent and no answer to come."""
        return not self._outgoing and not self._unanswered

    def put(self, question: QuestionT) -> None:
        """Add a question."""
        self._outgoing[question.id] = self._unanswered[question.id] = question
        if len(self._unanswered) >= self.limit:
            self.retired = True

    def withdraw(self, question: QuestionT) -> None:
        """Nobody waits for an answer any more: do not ask, or tell the server to stop."""
        if self._outgoing.pop(question.id, None) is not None:  # not sent yet
            del self._unanswered[question.id]
        elif question.id in self._unanswered:
            self._unanswered[question.id] = self._outgoing[question.id] = None

    def next_message(self, now_s: float) -> pb.StreamRequest | None:
        """What to write now: as much of what has gathered as fits into a message; None if there is nothing.

        The first message is a batch whatever it holds, which tells the server that answers may come in batches too.
        Questions whose time is up are left out.
        """
        message = pb.StreamRequest()
        batched = not self._opened or len(self._outgoing) > 1
        if not self._opened:
            message.batch.SetInParent()
            self._opened = True
        count = size = 0
        while self._outgoing and count < MESSAGE_REQUESTS:
            request_id, question = next(iter(self._outgoing.items()))
            its_size = _ENVELOPE_BYTES + (0 if question is None else question.size)
            if count and size + its_size > MESSAGE_BYTES:
                break
            del self._outgoing[request_id]
            if question is not None and question.deadline_s <= now_s:
                del self._unanswered[request_id]
                continue
            _fill(message.batch.requests.add() if batched else message, request_id, question, now_s)
            count += 1
            size += its_size
        return message if message.WhichOneof("request") is not None else None

    def receive(self, response: pb.StreamResponse) -> tuple[QuestionT, Message | errors.LatentdError] | None:
        """Whom an answer is for, and the answer or the error; None if nobody waits for it any more.

        Raises:
            ProtocolError: it contradicts the contract, and nothing can be said of those still unanswered.
        """
        kind = response.WhichOneof("response")
        if response.id not in self._unanswered:
            why = f": {response.error.message}" if kind == "error" else ""
            raise self._contradiction(f"the server answered id {response.id}, which has no open request{why}")
        question = self._unanswered[response.id]
        if not response.final:
            raise self._contradiction(f"the server calls its answer to a single {kind} not final")
        if question is not None and kind not in (question.field, "error"):
            raise self._contradiction(f"the server answered {question.field} with {kind}")
        del self._unanswered[response.id]
        self._outgoing.pop(response.id, None)  # no need to give up what is over
        if question is None:
            return None
        if kind == "error":
            error = response.error
            return question, errors.from_status(error.code, error.message, error.details, request_id=self.request_id)
        answer: Message = getattr(response, question.field)
        return question, answer

    def abandon(self) -> list[QuestionT]:
        """The call is over: whom it leaves without an answer."""
        left = [question for question in self._unanswered.values() if question is not None]
        self.retired = True
        self._outgoing.clear()
        self._unanswered.clear()
        return left

    def _contradiction(self, message: str) -> errors.ProtocolError:
        return errors.ProtocolError(message, request_id=self.request_id)


def _fill(message: pb.StreamRequest, request_id: int, question: Question | None, now_s: float) -> None:
    message.id = request_id
    if question is None:
        message.cancel.SetInParent()
        return
    message.priority = question.priority
    getattr(message, question.field).CopyFrom(question.request)
    remaining_s = question.deadline_s - now_s
    if remaining_s != float("inf"):
        seconds, fraction = divmod(min(remaining_s, _LONGEST_TIMEOUT_S), 1.0)
        message.timeout.seconds = int(seconds)
        message.timeout.nanos = max(int(fraction * 1e9), 0 if seconds else 1)  # 0 s would be no time at all
