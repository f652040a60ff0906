"""One request under way: hears what the engine says of its job and turns it into responses.

An exchange knows what was asked, not how the answer travels: a `Reply` does that, be it a unary call, the stream of
Sample, or one id of a `Stream`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

from google.protobuf.message import Message
from latentd.v1 import generation_service_pb2, model_pb2

from latentd_server import loops, resolve, respond
from latentd_server.accounts import Account, Peer
from latentd_server.admission import Work
from latentd_server.aside import Aside
from latentd_server.delivery import Previews
from latentd_server.failures import (
    CancelledError,
    DrainingError,
    FieldsInvalidError,
    Violation,
)
from latentd_server.job import Event, Finished, Job, Preview, Servable
from latentd_server.metrics import Metrics
from latentd_server.plans import Bounding, Diffusing, Encoding, Limits, Loop, LoopStep, Sampling, Scoring
from latentd_server.priority import Priority, of_metadata
from latentd_server.respond import Gathered
from latentd_server.wire import Written


class Engine(Protocol):
    """What the door needs of the engine."""

    @property
    def queue_depth(self) -> int:
        """Jobs accepted and unfinished."""

    @property
    def draining(self) -> bool:
        """Whether new work is refused."""

    @property
    def crowded(self) -> bool:
        """Whether there may be no room."""

    def check_room(self, model: str, caller: str, evaluations: int) -> None:
        """Refuse a request that takes so many evaluations at least, if there is no room for them."""

    @property
    def pressed(self) -> bool:
        """Whether deadlines may be out of reach."""

    def check_time(self, least: Work, caller: str, priority: Priority, deadline: float) -> None:
        """Refuse a request that takes so much at least, if that would not be done in time."""

    def submit(
        self, job: Job, *, caller: str, deadline: float | None, sink: Callable[[Event], None], priority: Priority
    ) -> int:
        """Accept a job."""

    def cancel(self, job_id: int) -> None:
        """Give a job up."""

    def pause(self, job_id: int) -> None:
        """Let a job sit out."""

    def resume(self, job_id: int) -> None:
        """Let a job ride again."""


class Registry(Protocol):
    """What the door needs of the registry."""

    def get(self, reference: str) -> Servable:
        """A model that answers requests."""

    def model(self, reference: str) -> model_pb2.Model:
        """A model whatever its state."""

    def models(self) -> list[model_pb2.Model]:
        """All models."""


@dataclass(frozen=True)
class Door:
    """What every request passes through."""

    engine: Engine
    registry: Registry
    metrics: Metrics
    limits: Limits
    clock: Callable[[], float]  # monotonic seconds
    fresh_seed: Callable[[], int]
    aside: Aside = field(default_factory=Aside)

    def servable(self, reference: str) -> Servable:
        """The model a request names.

        Raises:
            FieldsInvalidError: the reference is malformed.
            ServingError: there is no such model, or it does not answer.
        """
        try:
            return self.registry.get(reference)
        except ValueError as error:
            raise FieldsInvalidError([Violation("model", str(error))]) from error


Fill = Callable[[Callable[[], Any]], None]
"""Fills responses, each into a new one that its argument gives."""


class Reply(Protocol):
    """How the answer to one request travels."""

    def new(self) -> Any:
        """An empty response, to be filled and then sent before there is another one."""

    def send(self, response: Message, size: int, *, final: bool) -> None:
        """Pass on a response that `new` gave, of about `size` bytes now."""

    def send_written(self, response: Written, *, final: bool) -> None:
        """Pass on a response that is written already."""

    def send_later(self, fill: Fill) -> None:
        """Pass on responses that are made when it is their turn."""

    def fail(self, error: Exception) -> None:
        """There will be no (further) answer."""


class Exchange(ABC):
    """What all exchanges share: at most one job at a time, and an account."""

    def __init__(self, door: Door, peer: Peer, method: str, reply: Reply) -> None:
        self.reply = reply
        self.account = Account(door.metrics, door.clock, peer, method)
        self._door = door
        self._peer = peer
        self._priority = Priority.NORMAL
        self._job_id: int | None = None
        self._paused = False
        self._over = False
        self._unanswered = 0  # evaluations of lanes that are done and not in any answer yet

    def start(self, request: Any, deadline: float | None, priority: Priority | None = None) -> None:
        """Begin; with a priority of its own, or by the call's metadata.

        Raises:
            ServingError: nothing was accepted.
        """
        self._priority = of_metadata(self._peer.priority) if priority is None else priority
        self._start(request, deadline)

    def on_event(self, event: Event) -> None:
        """Hear from the engine."""
        try:
            self._hear(event)
        except Exception as error:  # a bug of ours; the caller must not wait for an answer that will not come
            if self._job_id is not None:
                self._door.engine.cancel(self._job_id)
                self._job_id = None
            self.reply.fail(error)

    def _hear(self, event: Event) -> None:
        if isinstance(event, Preview):
            self._preview(event)
        elif isinstance(event, Finished):
            respond.add_cost(self.account.cost, event.cost)
            self._unanswered += event.cost.evaluations
            if event.last:
                self._job_id = None
            self._finished(event)
        else:
            self._job_id = None
            self.reply.fail(event.error)

    @property
    def busy(self) -> bool:
        """Whether it goes on by itself. Without steps to take that is until its last answer, whose job is over."""
        return True

    def pause(self, paused: bool) -> None:
        """Let its job, and the jobs that follow it, sit out, or ride again."""
        self._paused = paused
        if self._job_id is not None:
            (self._door.engine.pause if paused else self._door.engine.resume)(self._job_id)

    def end(self, code: str, reason: str = "") -> None:
        """Give up what is still done for it and close the account; only the first time counts."""
        self._over = True
        if self._job_id is not None:
            self._door.engine.cancel(self._job_id)
            self._job_id = None
        if self._unanswered:
            self._door.metrics.evaluations_wasted(self._unanswered)
            self._unanswered = 0
        self.account.close(code, reason)

    def _admissible(self, request: Any, deadline: float | None) -> Servable:
        """The model a request names, if what the request takes at least has room and time: refusing is cheaper than
        reading.
        """
        servable = self._servable(request.model)
        engine, limits = self._door.engine, self._door.limits
        if engine.crowded:
            engine.check_room(self.account.model, self._peer.caller, resolve.least_evaluations(request, limits))
        if deadline is not None and engine.pressed and (work := resolve.least_work(request, servable, limits)):
            engine.check_time(work, self._peer.caller, self._priority, deadline)
        return servable

    def _servable(self, reference: str) -> Servable:
        servable = self._door.servable(reference)
        self.account.model = servable.model.name
        return servable

    def _submit(self, job: Job, deadline: float | None) -> None:
        self.account.seed = job.seed
        self._job_id = self._door.engine.submit(
            job, caller=self._peer.caller, deadline=deadline, sink=self.on_event, priority=self._priority
        )
        if self._paused:
            self._door.engine.pause(self._job_id)

    @abstractmethod
    def _start(self, request: Any, deadline: float | None) -> None:
        """Understand the request and submit its job."""

    @abstractmethod
    def _finished(self, event: Finished) -> None:
        """Take in lanes that are done."""

    def _preview(self, event: Preview) -> None:
        raise TypeError(f"{self.account.method} asks for no previews")


_ONE_ANSWER: dict[str, tuple[Callable[..., Any], Callable[..., Message]]] = {
    "Encode": (resolve.encode, respond.encoded),
    "Decode": (resolve.decode, respond.decoded),
    "DenoiseStep": (resolve.denoise_step, respond.denoised),
    "Score": (resolve.score, respond.scored),
}


class SingleExchange(Exchange):
    """Encode, Decode, DenoiseStep and Score: one answer, when all rows are done."""

    def _start(self, request: Any, deadline: float | None) -> None:
        understand, self._answer = _ONE_ANSWER[self.account.method]
        plan = understand(request, self._admissible(request, deadline), self._door.limits)
        if isinstance(plan, Diffusing):
            self._door.aside.check_room(self._peer.caller, plan.samples.nbytes)
            self.account.seed, self.account.samples = plan.seed, len(plan.samples)
            self._send(partial(respond.diffused, plan), plan.samples.nbytes, drawn=plan.samples.nbytes)
            return
        self._plan = plan
        self._gathered = Gathered(plan.job.lane_count)
        self._submit(plan.job, deadline)

    def _finished(self, event: Finished) -> None:
        self._gathered.add(event)
        if event.last:
            plan = self._plan
            counts_rows = isinstance(plan, Scoring | Bounding)
            self.account.samples = plan.row_count if counts_rows else plan.job.lane_count
            size = sum(values.nbytes for values in self._gathered.outputs.values())
            draws = isinstance(plan, Encoding) and plan.seed is not None
            self._send(partial(self._answer, plan, self._gathered), size, drawn=size if draws else 0)

    def _send(self, fill: Callable[[Any], Message], size: int, *, drawn: int) -> None:
        """Fill the answer and pass it on; where much is drawn for it, the event loop does not wait."""
        response = self.reply.new()

        def filled(failure: Exception | None) -> None:
            if self._over:
                return
            if failure is not None:
                self.reply.fail(failure)
                return
            self._unanswered = 0
            self.reply.send(response, size, final=True)

        def work() -> None:
            if not self._over:
                fill(response)

        self._door.aside.do(self._peer.caller, drawn, work, filled)


class SampleExchange(Exchange):
    """Sample: one `accepted`, then previews and results as they come."""

    def _start(self, request: generation_service_pb2.SampleRequest, deadline: float | None) -> None:
        servable = self._admissible(request, deadline)
        self._plan: Sampling = resolve.sample(request, servable, self._door.fresh_seed(), self._door.limits)
        self._previews = Previews()
        queue_depth = self._door.engine.queue_depth
        self._submit(self._plan.job, deadline)
        self.reply.send(respond.accepted(self._plan, queue_depth, self.reply.new()), 0, final=False)

    def _preview(self, event: Preview) -> None:
        if self._previews.add(event):
            self.reply.send_later(self._look)

    def _finished(self, event: Finished) -> None:
        self._previews.drop(event.lanes)
        self._unanswered = 0
        self.account.samples += len(event.lanes)
        left = len(event.lanes)
        for count, response in respond.results(self._plan, event):
            left -= count
            self.reply.send_written(response, final=event.last and not left)

    def _look(self, new: Callable[[], generation_service_pb2.SampleResponse]) -> None:
        for look in self._previews.take():
            respond.preview(self._plan, look, new())


class LoopExchange(Exchange):
    """`open_denoise` and its `take_step`s: answers are `LoopState`s. Steps sent ahead are taken in order."""

    def __init__(self, door: Door, peer: Peer, method: str, reply: Reply) -> None:
        super().__init__(door, peer, method, reply)
        self._opened: Loop | None = None
        self._ahead: deque[tuple[generation_service_pb2.TakeStep, float | None]] = deque()
        self._step: LoopStep | None = None  # under way

    def _start(self, request: generation_service_pb2.SampleRequest, deadline: float | None) -> None:
        """Open the loop. Each of its steps has a deadline of its own."""
        del deadline  # opening takes no time
        if self._door.engine.draining:
            raise DrainingError
        self._held = self._servable(request.model)
        seed = self._door.fresh_seed()
        self._opened, self._position = resolve.open_loop(request, self._held, seed, self._door.limits)
        self.account.seed = self._loop.job.seed
        depth = self._door.engine.queue_depth
        self.reply.send(respond.loop_opened(self._loop, self._position, depth, self.reply.new()), 0, final=False)

    @property
    def _loop(self) -> Loop:
        if self._opened is None:
            raise RuntimeError("the loop has not been opened")
        return self._opened

    @property
    def busy(self) -> bool:
        """Whether a step is under way or lined up."""
        return self._step is not None or len(self._ahead) > 0

    @property
    def lane_count(self) -> int:
        """Samples whose state the server keeps; 0 before it is open."""
        return self._opened.job.lane_count if self._opened else 0

    def take_step(self, request: generation_service_pb2.TakeStep, deadline: float | None) -> None:
        """Take a step, or line it up behind those under way.

        Raises:
            ServingError: the step cannot be taken, and with it the loop is over.
        """
        if self._step is not None:
            self._ahead.append((request, deadline))
            return
        if self._servable(self.account.model) is not self._held:  # between steps a loop holds no model back
            raise CancelledError("the model was loaded anew while this loop was open; open another")
        step = loops.take_step(request, self._loop, self._position)
        self._gathered = Gathered(self.lane_count)
        self._submit(step.job, deadline)
        self._step = step

    @property
    def bytes_ahead(self) -> int:
        """What the steps that are lined up brought with them."""
        return sum(request.ByteSize() for request, _ in self._ahead)

    @property
    def steps_ahead(self) -> int:
        """Steps under way or lined up."""
        return len(self._ahead) + (self._step is not None)

    @property
    def steps_left(self) -> int:
        """Steps to the end of the schedule from where the loop stands now."""
        return len(self._position.remaining)

    def _finished(self, event: Finished) -> None:
        self._gathered.add(event)
        if not event.last or self._step is None:
            return
        step, self._step = self._step, None
        self._unanswered = 0
        outputs = self._gathered.outputs
        self._position = loops.stepped(self._position, step, outputs["sample"], outputs["history"])
        state = respond.loop_stepped(self._loop, self._position, step, self._gathered, self.reply.new())
        over = not self._position.remaining
        self.account.samples = self.lane_count if over else 0
        self.reply.send(state, outputs["denoised"].nbytes * (1 + step.state_requested), final=over)
        if self._ahead and not over:
            request, deadline = self._ahead.popleft()
            try:
                self.take_step(request, deadline)
            except Exception as error:  # any failure of a step that was sent ahead ends the loop, as it would at once
                self.reply.fail(error)
