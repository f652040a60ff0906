"""The asynchronous client: a thin shell that sends what `calls` asks for. Belongs to one event loop."""

import asyncio
import contextlib
import random
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine, Iterator, Sequence
from types import TracebackType
from typing import Any, Concatenate, ParamSpec, Self, TypeAlias, TypeVar

import grpc
import grpc.aio
from latentd.v1.generation_service_pb2_grpc import GenerationServiceStub
from numpy.typing import ArrayLike

from latentd_client import errors
from latentd_client.calls import Calls, Priority, Program, Unary, Within, presented_as
from latentd_client.channels import (
    DEFAULT_TARGET,
    TLS,
    ChannelOption,
    Liveness,
    Settings,
    Terms,
    new_request_id,
    random_seed,
    translate,
    unary_calls,
)
from latentd_client.loop import LoopRun, LoopView
from latentd_client.multiplexing import Multiplexer
from latentd_client.results import Event, LoopStep, Samples
from latentd_client.resume import SampleRun, assemble
from latentd_client.retries import Attempts, Retries

_P = ParamSpec("_P")
_T = TypeVar("_T")
_SamplingProgram: TypeAlias = Callable[Concatenate[Calls, _P], Program[SampleRun]]


def _answered(
    program: Callable[Concatenate[Calls, _P], Program[_T]],
) -> "Callable[Concatenate[AsyncClient, _P], Coroutine[Any, Any, _T]]":
    """The method that runs a program to its end."""

    @presented_as(program)
    async def method(self: "AsyncClient", /, *args: _P.args, **kwargs: _P.kwargs) -> _T:
        return (await self._run(program(self._calls, *args, **kwargs)))[0]

    return method


def _gathered(
    program: "_SamplingProgram[_P]",
) -> "Callable[Concatenate[AsyncClient, _P], Coroutine[Any, Any, Samples]]":
    """The method that waits for all samples."""

    @presented_as(program, Samples)
    async def method(self: "AsyncClient", /, *args: _P.args, **kwargs: _P.kwargs) -> Samples:
        run, terms = await self._run(program(self._calls, *args, **kwargs))
        return await self._gather(run, terms)

    return method


def _streamed(
    program: "_SamplingProgram[_P]",
) -> "Callable[Concatenate[AsyncClient, _P], AsyncGenerator[Event]]":
    """The method that iterates over what happens."""

    @presented_as(program, AsyncGenerator[Event])
    async def method(self: "AsyncClient", /, *args: _P.args, **kwargs: _P.kwargs) -> AsyncGenerator[Event]:
        run, terms = await self._run(program(self._calls, *args, **kwargs))
        async with contextlib.aclosing(self._events(run, terms)) as events:
            async for event in events:
                yield event

    return method


def _looped(program: "_SamplingProgram[_P]") -> "Callable[Concatenate[AsyncClient, _P], AsyncDenoiseLoop]":
    """The method that lets the caller take the steps."""

    @presented_as(program, "AsyncDenoiseLoop")
    def method(self: "AsyncClient", /, *args: _P.args, **kwargs: _P.kwargs) -> "AsyncDenoiseLoop":
        return AsyncDenoiseLoop(self, program(self._calls, *args, **kwargs))

    return method


class AsyncClient:
    """Talks to a latentd server, asynchronously; otherwise as `Client`. Make it in the event loop that uses it.

    Args:
        target: `HOST:PORT`, or any gRPC target.
        tls: how to trust the server; None for plaintext.
        timeout: seconds a call may take unless it says otherwise; `math.inf` for no deadline.
        retries: how often and how fast to try again; `Retries(max_attempts=1)` for never.
        caller: who calls, for the server's fairness and logs.
        priority: "high", "normal" or "low", of calls that do not say otherwise.
        multiplexed: let `encode`, `decode`, `denoise_step`, `score` and what is made of them share one stream. For
            those who make many small calls at a time: each costs the server a fraction of a call of its own, and what
            is asked together is computed together. Answers, errors, deadlines and retries are the same. Samples and
            loops have streams of their own as ever.
        channel_options: further gRPC channel options; they win over this library's.

    Raises:
        ValueError: an argument makes no sense.
        RuntimeError: no event loop is running.
    """

    sample = _gathered(Calls.sampling)
    sample_stream = _streamed(Calls.sampling)
    denoise_loop = _looped(Calls.sampling)
    reproduce = _answered(Calls.reproduce)
    encode = _answered(Calls.encode)
    decode = _answered(Calls.decode)
    denoise_step = _answered(Calls.denoise_step)
    score = _answered(Calls.score)
    interpolate = _answered(Calls.interpolate)
    model = _answered(Calls.model)
    models = _answered(Calls.models)

    def __init__(
        self,
        target: str = DEFAULT_TARGET,
        *,
        tls: TLS | grpc.ChannelCredentials | None = None,
        timeout: float = 60.0,
        retries: Retries = Retries(),  # noqa: B008  # frozen
        caller: str | None = None,
        priority: Priority = "normal",
        multiplexed: bool = False,
        channel_options: Sequence[ChannelOption] = (),
    ) -> None:
        self._settings = Settings(target, tls, timeout, retries, caller, priority, tuple(channel_options))
        self._calls = Calls(random_seed)
        self._liveness = Liveness()
        credentials = self._settings.credentials
        asyncio.get_running_loop()
        self._channel = (
            grpc.aio.insecure_channel(target, self._settings.options)
            if credentials is None
            else grpc.aio.secure_channel(target, credentials, self._settings.options)
        )
        self._unary_calls = unary_calls(self._channel)
        self._generation = GenerationServiceStub(self._channel)
        self._multiplexer = Multiplexer(self._generation.Stream, self._settings) if multiplexed else None

    def __repr__(self) -> str:
        return f"<AsyncClient of {self._settings.target}{', closed' if self._liveness.closed else ''}>"

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Give up every call under way, at once, and free the connection."""
        self._liveness.closed = True
        if self._multiplexer is not None:
            await self._multiplexer.close()
        await self._channel.close()

    async def _run(self, program: Program[_T], terms: Terms | None = None) -> tuple[_T, Terms]:
        """Answer what a program asks until it returns; on terms that are set already, or its own."""
        settled = terms is not None
        terms = terms or self._settings.terms()
        answer: Any = None
        while True:
            try:
                ask = program.send(answer)
            except StopIteration as stop:
                return stop.value, terms
            answer = None
            match ask:
                case Within():
                    if not settled:
                        terms = terms.changed(ask.timeout_s, ask.priority)
                    settled = True
                case Unary():
                    answer = await self._call(ask, terms)
                case SampleRun():
                    answer = await self._gather(ask, terms)

    async def _call(self, ask: Unary, terms: Terms) -> Any:
        self._liveness.check()
        request_id = new_request_id()
        with self._translated(request_id, getattr(ask.request, "model", "")):
            if self._multiplexer is not None:
                answer = await self._multiplexer.ask(ask, terms)
                if answer is not None:
                    return answer
            return await self._unary_calls[ask.rpc](
                ask.request, timeout=terms.timeout(), metadata=self._settings.metadata(request_id, terms)
            )

    async def _gather(self, run: SampleRun, terms: Terms) -> Samples:
        run.one_class = True
        parts = [event async for event in self._events(run, terms) if isinstance(event, Samples)]
        return assemble(parts, run.request.sample_count)

    async def _events(self, run: SampleRun, terms: Terms) -> AsyncGenerator[Event]:
        """Every event of a run, over as many streams as it takes."""
        attempts = self._settings.attempts()
        request_id = new_request_id()
        while not run.done:
            self._liveness.check()
            call = self._generation.Sample(
                run.next_request(), timeout=terms.timeout(), metadata=self._settings.metadata(request_id, terms)
            )
            try:
                with self._translated(request_id, run.request.model):
                    async for response in call:
                        events = run.receive(response)
                        await self._run(self._calls.follow(run), terms)
                        for event in events:
                            yield event
                failure: errors.LatentdError | None = run.shortfall()
            except errors.LatentdError as error:
                failure = error
            finally:
                call.cancel()
            if failure is not None and not run.done:  # samples are final: how the stream ended changes nothing
                await self._pause(attempts, failure, run.progress, terms)
        attempts.throttle.succeeded()

    @contextlib.contextmanager
    def _translated(self, request_id: str, reference: str) -> Iterator[None]:
        """Raise this library's errors for gRPC's, and learn what they say of a model."""
        try:
            yield
        except grpc.RpcError as error:
            failure = translate(error, request_id)
            self._calls.heed(failure, reference)
            raise failure from error
        except errors.LatentdError as error:
            self._calls.heed(error, reference)
            raise
        except asyncio.CancelledError:
            # gRPC raises this for calls that `close` gave up; a task that was cancelled itself must see it unchanged.
            task = asyncio.current_task()
            if self._liveness.closed and task is not None and not task.cancelling():
                raise errors.Cancelled("the client was closed", request_id=request_id) from None
            raise

    async def _pause(self, attempts: Attempts, failure: errors.LatentdError, progress: int, terms: Terms) -> None:
        """Wait before the next attempt, or raise `failure` if there shall be none."""
        await asyncio.sleep(
            attempts.delay_s(failure, progress=progress, remaining_s=terms.remaining_s, chance=random.random())
        )


class AsyncDenoiseLoop(LoopView):
    """A denoising loop whose state stays on the server; otherwise as `DenoiseLoop`. Made by `AsyncClient.denoise_loop`.

    async with client.denoise_loop("digits-diffusion", 4, seed=7, steps=20) as loop:
        async for step in loop:
            if step.timestep > 500:
                loop.override(state=step.state * mask)
    """

    def __init__(self, client: AsyncClient, program: Program[SampleRun]) -> None:
        super().__init__()
        self._client = client
        self._program = program
        self._terms = Terms.never()
        self._request_id = new_request_id()
        self._attempts = client._settings.attempts()
        self._call: Any = None  # a grpc.aio.StreamStreamCall
        self._position = 0  # messages of the log that this stream has answered

    async def __aenter__(self) -> Self:
        if self._opened is not None:
            raise RuntimeError("a loop is opened once; make another")
        run, self._terms = await self._client._run(self._program)
        self._opened = LoopRun(run.request, run.model)
        await self._catch_up()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.close()

    async def __aiter__(self) -> AsyncIterator[LoopStep]:
        while not self.finished:
            yield await self.step()

    async def step(self, *, next_timestep: int | None = None, state: ArrayLike | None = None) -> LoopStep:
        """Take one step.

        Args:
            next_timestep: where to step to; None means the next timestep of the schedule.
            state: replaces the server's x before the step. Shape [n, *sample].

        Raises:
            LatentdError: the server refused the step, which then was not taken, or is gone for good.
            RuntimeError: the loop is not open, or finished.
        """
        self._log_step(next_timestep, state)
        await self._catch_up()
        return self._run.step

    async def close(self) -> None:
        """Give the loop up; its samples leave the server's batch at the next step."""
        self._hang_up()

    def _hang_up(self) -> None:
        if self._call is not None:
            self._call.cancel()
            self._call = None

    async def _catch_up(self) -> None:
        """Send what this stream has not had yet, on a new stream if it breaks."""
        while True:
            try:
                with self._client._translated(self._request_id, self._run.asked):
                    await self._exchange()
                return
            except errors.LatentdError as error:
                failure = error
            finally:
                if self._position < len(self._run.log):  # broken, or interrupted between a message and its answer
                    self._hang_up()
            await self._client._pause(self._attempts, failure, self._run.answered, self._terms)

    async def _exchange(self) -> None:
        self._client._liveness.check()
        if self._call is None:
            self._position = 0
            self._call = self._client._generation.Stream(
                timeout=self._terms.timeout(),
                metadata=self._client._settings.metadata(self._request_id, self._terms),
            )
        while self._position < len(self._run.log):
            await self._call.write(self._run.log[self._position])
            response = await self._call.read()
            if response is grpc.aio.EOF:
                raise errors.ServerUnavailable("the server ended the stream of an open loop")
            self._run.receive(self._position, response)
            await self._client._run(self._client._calls.follow(self._run), self._terms)
            self._position += 1
