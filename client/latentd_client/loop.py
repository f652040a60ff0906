"""A denoising loop driven by the caller, over as many streams as it takes. Pure.

The loop's state lives on the server and dies with the stream. But every step is a function of what was sent, and the
seed is in the first message. So the messages are kept, and a new stream is given all of them again, one by one; the
answers that came before are skipped.
"""

from typing import Any

from latentd.v1 import generation_service_pb2 as pb
from numpy.typing import ArrayLike

from latentd_client import errors, messages
from latentd_client.model import Model
from latentd_client.results import Accepted, LoopStep

_ID = 1  # the only request on its stream


class LoopRun:
    """The state of one loop.

    A shell sends `log[k]` and hands the answer to `receive(k, answer)`, for k = 0, 1, ... on every fresh stream.

    Args:
        request: what to open the loop with; `seed` and `sample_count` set.
        model: what is asked.
    """

    def __init__(self, request: pb.SampleRequest, model: Model) -> None:
        self.model = model
        self.asked = request.model  # as the caller wrote it
        self.log = [pb.StreamRequest(id=_ID, open_denoise=request)]
        if model.walks_over_latents and request.output_mode == pb.OUTPUT_MODE_MEAN:  # nothing is decoded in a loop
            self.log[0].open_denoise.output_mode = pb.OUTPUT_MODE_LATENT
        self.accepted: Accepted | None = None
        self.timestep: int | None = None
        self.remaining: tuple[int, ...] = ()
        self.answered = 0  # messages of the log that have had an answer, on any stream
        self._step: LoopStep | None = None

    @property
    def finished(self) -> bool:
        """Whether the loop has reached clean data."""
        return self.timestep == -1

    @property
    def _item_shape(self) -> tuple[int, ...]:
        """Of one sample's state."""
        opened = self.log[0].open_denoise
        if not opened.HasField("size") or self.model.walks_over_latents:
            return self.model.state_shape
        return self.model.shape_at((opened.size.height, opened.size.width))

    def take_step(self, next_timestep: int | None = None, state: ArrayLike | None = None) -> None:
        """Add a step to the log.

        Args:
            next_timestep: where to step to; None means the next timestep of the schedule.
            state: replaces the server's x before the step. Shape [n, *sample].

        Raises:
            FieldsInvalid: a value does not fit into the message.
            RuntimeError: the loop is finished.
        """
        if self.finished:
            raise RuntimeError("the loop has reached clean data; open another")
        fields = messages.Fields()
        take = pb.TakeStep(state_requested=True)
        if next_timestep is not None:
            take.next_timestep = fields.integer("take_step.next_timestep", next_timestep)
        if state is not None:
            take.noisy_samples.CopyFrom(fields.tensor("take_step.noisy_samples", state, self._item_shape))
        fields.check()
        del self.log[max(1, self.answered) :]  # a step that was refused is not part of the loop
        self.log.append(pb.StreamRequest(id=_ID, take_step=take))

    def receive(self, position: int, response: pb.StreamResponse) -> None:
        """Take the answer to `log[position]`.

        Raises:
            LatentdError: the server refused it, or the answer contradicts the contract.
            DeterminismChanged: the stream is a second one, and its server promises other bytes.
        """
        match response.WhichOneof("response"):
            case "error":
                raise errors.from_status(response.error.code, response.error.message, response.error.details)
            case "loop":
                state = response.loop
            case other:
                raise errors.ProtocolError(f"the server answered a denoising loop with {other}")
        if position == 0:
            self._receive_accepted(state.accepted)
        if position < self.answered:
            return
        self.answered = position + 1
        self.timestep = state.timestep
        self.remaining = tuple(state.remaining_timesteps)
        if position > 0:
            self._step = messages.read_loop_step(state, self.model)

    @property
    def step(self) -> LoopStep:
        """The latest step's tensors."""
        if self._step is None:
            raise RuntimeError("no step was taken yet")
        return self._step

    def _receive_accepted(self, message: pb.SampleAccepted) -> None:
        if self.accepted is None:
            request = message.resolved_request
            self.accepted = Accepted(
                model=request.model,
                seed=request.seed,
                determinism_class=message.determinism_class,
                queue_depth=message.queue_depth,
                resolved_request=request,
            )
            self.log[0].open_denoise.model = request.model  # a newer version must not take over half-way
        elif self.answered > 1 and message.determinism_class != self.accepted.determinism_class:
            raise errors.DeterminismChanged(
                f"the loop began under {self.accepted.determinism_class!r}, "
                f"the server that took over promises {message.determinism_class!r}"
            )


class LoopView:
    """What callers see of a loop; the shells add the steps."""

    def __init__(self) -> None:
        self._opened: LoopRun | None = None
        self._override: dict[str, Any] = {}

    def __repr__(self) -> str:
        if self._opened is None:
            return f"<{type(self).__name__}, not open>"
        return f"<{type(self).__name__} of {self.accepted.model} at timestep {self.timestep}>"

    @property
    def accepted(self) -> Accepted:
        """How the server understood the request."""
        accepted = self._run.accepted
        assert accepted is not None, "a loop opens with the answer to its first message"
        return accepted

    @property
    def timestep(self) -> int | None:
        """The timestep now reached; -1 means finished."""
        return self._run.timestep

    @property
    def remaining(self) -> tuple[int, ...]:
        """Timesteps still to come if nothing is overridden, ending in -1."""
        return self._run.remaining

    @property
    def finished(self) -> bool:
        """Whether clean data is reached."""
        return self._run.finished

    def override(self, *, next_timestep: int | None = None, state: ArrayLike | None = None) -> None:
        """Change the next step: where it steps to, or what it starts from (shape [n, *sample])."""
        changes = {"next_timestep": next_timestep, "state": state}
        self._override |= {name: value for name, value in changes.items() if value is not None}

    @property
    def _run(self) -> LoopRun:
        if self._opened is None:
            raise RuntimeError("open the loop first, with a `with` block")
        return self._opened

    def _log_step(self, next_timestep: int | None, state: ArrayLike | None) -> None:
        """Add the next step to the log, changed as was asked for."""
        run = self._run
        self.override(next_timestep=next_timestep, state=state)
        changes, self._override = self._override, {}
        run.take_step(**changes)
