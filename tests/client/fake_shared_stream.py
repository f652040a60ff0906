"""The fake server's side of a Stream call that many requests share.

Each request is handed to the handler of its unary call, as a call that travels inside another: what a test lets go
wrong in `Decode` goes wrong in a decode of either kind.
"""

import itertools
import queue
from collections.abc import Callable, Iterator
from concurrent import futures
from dataclasses import dataclass
from typing import Any, NoReturn

import grpc
from google.rpc import status_pb2
from latentd.names import PRIORITIES, PRIORITY_KEY
from latentd.v1 import generation_service_pb2 as pb

RPCS = {"encode": "Encode", "decode": "Decode", "denoise_step": "DenoiseStep", "score": "Score"}
_PRIORITY_NAMES = {pb.Priority.Value(f"PRIORITY_{name.upper()}"): name for name in PRIORITIES}


class Aborted(Exception):
    """A handler refused."""

    def __init__(self, error: pb.StreamError) -> None:
        super().__init__(error.message)
        self.error = error


@dataclass
class Metadatum:
    """As gRPC's."""

    key: str
    value: str


class IdContext:
    """What a unary handler sees of one request of a stream."""

    def __init__(self, call: grpc.ServicerContext, request: pb.StreamRequest) -> None:
        self._call = call
        self._request = request
        self._callbacks: list[Callable[[], None]] = []
        self._status = status_pb2.Status()
        self.cancelled = False
        call.add_callback(self.end)

    def invocation_metadata(self) -> list[Any]:
        """The stream's own, and the request's priority."""
        priority = _PRIORITY_NAMES.get(self._request.priority)
        own = [Metadatum(PRIORITY_KEY, priority)] if priority not in (None, "normal") else []
        return [*self._call.invocation_metadata(), *own]

    def time_remaining(self) -> float | None:
        """The request's own timeout."""
        timeout = self._request.timeout
        return timeout.seconds + timeout.nanos / 1e9 if self._request.HasField("timeout") else None

    def add_callback(self, callback: Callable[[], None]) -> bool:
        """Call when the request is given up; False if it has been."""
        self._callbacks.append(callback)
        return not self.cancelled

    def set_trailing_metadata(self, trailers: Any) -> None:
        """Of which a stream's error carries the details."""
        self._status.ParseFromString(dict(trailers).get("grpc-status-details-bin", b""))

    def abort(self, code: grpc.StatusCode, message: str) -> NoReturn:
        """Refuse."""
        if self.cancelled:
            code = grpc.StatusCode.CANCELLED
        raise Aborted(pb.StreamError(code=code.value[0], message=message, details=self._status.details))

    def end(self) -> None:
        """Nobody waits any more."""
        self.cancelled = True
        for callback in self._callbacks:
            callback()


class SharedStream:
    """One call; `server` is a `FakeServer`."""

    def __init__(self, server: Any, context: grpc.ServicerContext) -> None:
        self._server = server
        self._context = context
        self._answers: queue.SimpleQueue[pb.StreamResponse | None] = queue.SimpleQueue()
        self._open: dict[int, IdContext] = {}
        context.add_callback(lambda: self._answers.put(None))

    def serve(
        self, first: pb.StreamRequest, messages: Iterator[pb.StreamRequest], fault: Any
    ) -> Iterator[pb.StreamResponse]:
        """Answer in the order in which handlers are done; a fault strikes before its message is taken up."""
        with futures.ThreadPoolExecutor(16) as pool:
            reading = pool.submit(self._read, itertools.chain([first], messages), fault, pool)
            over = False
            while not over:
                gathered = [self._answers.get()]
                while gathered[-1] is not None and (
                    len(gathered) < self._server.answers_at_once or not self._answers.empty()
                ):
                    gathered.append(self._answers.get())
                over = None in gathered
                answers = [answer for answer in gathered if answer is not None]
                if self._server.answers_in_batches and len(answers) > 1:
                    self._server.batches_sent.append(len(answers))
                    yield pb.StreamResponse(batch=pb.StreamResponseBatch(responses=answers))
                else:
                    yield from answers
            struck = self._context.is_active() and reading.result()
        if struck:
            self._server._strike(fault, self._context)

    def _read(self, messages: Iterator[pb.StreamRequest], fault: Any, pool: futures.Executor) -> bool:
        """Take up every message; whether a fault put an end to it."""
        work: list[futures.Future[None]] = []
        try:
            for k, message in enumerate(messages):
                if fault is not None and k == fault.after:
                    return True
                self._server.see("StreamRequest", message)
                batched = message.HasField("batch")
                if batched and not self._server.knows_batches:
                    error = pb.StreamError(code=grpc.StatusCode.INVALID_ARGUMENT.value[0], message="no such request")
                    self._answers.put(pb.StreamResponse(id=message.id, final=True, error=error))
                    continue
                for request in message.batch.requests if batched else [message]:
                    if request.HasField("cancel"):
                        self._server.see("Cancel", request)
                        if request.id in self._open:
                            self._open[request.id].end()
                    else:
                        assert request.id not in self._open, "an id in use"
                        assert request.id, "ids of requests are not 0"
                        id_context = self._open[request.id] = IdContext(self._context, request)
                        field = request.WhichOneof("request") or ""
                        self._server.shared_requests[RPCS[field]] += 1
                        work.append(pool.submit(self._answer, request, field, id_context))
            self._server.half_closed_streams += 1
            futures.wait(work)
            return False
        except grpc.RpcError:  # the client is gone
            return False
        finally:
            self._answers.put(None)

    def _answer(self, request: pb.StreamRequest, field: str, context: IdContext) -> None:
        answer = pb.StreamResponse(id=request.id, final=True)
        try:
            getattr(answer, field).CopyFrom(getattr(self._server, RPCS[field])(getattr(request, field), context))
        except Aborted as refusal:
            answer.error.CopyFrom(refusal.error)
        del self._open[request.id]
        self._answers.put(answer)
