"""What every method of a client asks, and what it makes of the answers. Pure: a program yields its questions.

`Client` and `AsyncClient` turn each method of `Calls` into one of the same signature: they send what the program
yields, hand back what was answered, and return what the program returns. So the two cannot differ.

Arguments that appear everywhere:

* `model`: `NAME` (its newest version) or `NAME@VERSION`;
* `label`: one class for all, one for each sample, or None: drawn from p(label) by (seed, i);
* `timeout`: seconds for the whole call, retries included; None is the client's own; `math.inf` waits for ever;
* `priority`: "high", "normal" or "low": how the call shares the device with others; None is the client's own.
"""

import inspect
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, TypeVar, get_args

import numpy as np
from google.protobuf.message import Message
from latentd.names import parse_reference
from latentd.v1 import generation_service_pb2 as pb
from latentd.v1 import model_service_pb2
from numpy.typing import ArrayLike, DTypeLike

from latentd_client import messages
from latentd_client.errors import FieldsInvalid, LatentdError, ModelNotFound, ProtocolError
from latentd_client.interpolation import slerp
from latentd_client.loop import LoopRun
from latentd_client.messages import Array, Fields, Label, Output
from latentd_client.model import Model
from latentd_client.results import Decoded, Encoded, Samples, Scores, Step
from latentd_client.resume import SampleRun

_T = TypeVar("_T")
_Method = TypeVar("_Method", bound=Callable[..., Any])


@dataclass(frozen=True, slots=True)
class Within:
    """The whole program shall take at most this many seconds, at this priority; None is the client's own.

    Answered with None; the first one counts.
    """

    timeout_s: float | None
    priority: "Priority | None" = None


@dataclass(frozen=True, slots=True)
class Unary:
    """A unary RPC, by its name. Answered with its response."""

    rpc: str
    request: Message


Priority: TypeAlias = Literal["high", "normal", "low"]
Ask: TypeAlias = Within | Unary | SampleRun
"""What a program may yield. A `SampleRun` is run to its end and answered with all its `Samples`."""
Program: TypeAlias = Generator[Ask, Any, _T]


def presented_as(program: Callable[..., Any], returns: Any = None) -> Callable[[_Method], _Method]:
    """Give a shell's method its program's parameters and docstring, and for `help` the type that it returns itself.

    Args:
        program: a method of `Calls`.
        returns: what the shell's method returns; if None, what the program does.
    """
    signature = inspect.signature(program)
    returned = returns or get_args(signature.return_annotation)[-1]

    def present(method: _Method) -> _Method:
        method.__doc__ = program.__doc__
        method.__signature__ = signature.replace(return_annotation=returned)  # type: ignore[attr-defined]  # PEP 362
        return method

    return present


class Calls:
    """The programs of one client, and what it remembers from call to call.

    Args:
        draw_seed: where the seeds come from that callers do not give.
    """

    def __init__(self, draw_seed: Callable[[], int]) -> None:
        self.draw_seed = draw_seed
        self._models: dict[str, Model] = {}  # by canonical name; what is used of it never changes in a version
        self._meant: dict[str, str] = {}  # the canonical name that another reference stood for when last heard of

    def sampling(
        self,
        model: str,
        n: int | None = None,
        *,
        seed: int | None = None,
        label: Label = None,
        codes: Sequence[float] = (),
        temperature: float | None = None,
        sampler: str | None = None,
        steps: int | None = None,
        timesteps: Sequence[int] | None = None,
        guidance: float | None = None,
        guidance_interval: tuple[int | None, int | None] | None = None,
        eta: float | None = None,
        start: ArrayLike | None = None,
        strength: float | None = None,
        known: ArrayLike | None = None,
        mask: ArrayLike | None = None,
        size: tuple[int, int] | None = None,
        previews: int = 0,
        output: Output = "mean",
        dtype: DTypeLike | None = None,
        first_index: int = 0,
        timeout: float | None = None,
        priority: Priority | None = None,
    ) -> Program[SampleRun]:
        """Draw samples. `sample` returns all of them, `sample_stream` iterates over what happens, `denoise_loop` takes
        the steps one by one.

        Sample i depends on (seed, i) alone: a thousand samples are the same in one request as in a thousand.
        A stream that breaks is resumed; one that is left early is given up when its iterator is closed, for which
        `contextlib.closing` and `aclosing` are made.

        Args:
            model: which model.
            n: how many samples; if None, as many as there are labels, else 1.
            seed: if None, a fresh one, which the result names.
            label: what to condition on.
            codes: continuous codes to condition on, for models that have them.
            temperature: scale of the prior; not for diffusion models.
            sampler: how to walk, one of `Model.samplers`. This and all down to `previews`: diffusion models only.
            steps: solver steps.
            timesteps: the timesteps to visit instead, falling strictly.
            guidance: scale of classifier-free guidance; 1 is none.
            guidance_interval: first and last timestep to guide at; elsewhere a step costs half as much. None is no end,
                or no interval.
            eta: fresh noise per step, 0 (none) to 1 (ancestral).
            start: samples to start from instead of pure noise. Shape [n, *sample], or [1, *sample] for all.
            strength: share of the schedule to run from `start`, in (0, 1].
            known: samples of which part is given, for inpainting; with `mask`. Shapes as those of `start`.
            mask: True or 1 where `known` is given. Shape [n, *sample] or [1, *sample], or one channel for all.
            size: height and width, one of `Model.sample_sizes`; the model's own if None.
            previews: send the estimate of x0 after every this many steps; 0 is never. For `sample_stream`.
            output: the mean of p(sample | latent), or a draw from it; "latent" gives what a model with a
                `Model.latent_space` walks over.
            dtype: element type to receive; uint8 maps the value range to 0..255.
            first_index: index of the first sample; continues an earlier request of the same seed.
            timeout: seconds for the whole call.
            priority: how it shares the device with others.

        Raises:
            LatentdError: see `latentd_client.errors` for the kinds.
        """
        yield Within(timeout, priority)
        about = yield from self._look_up(model)
        fields = Fields()
        count = fields.integer("sample_count", (messages.label_count(label) or 1) if n is None else n)
        if count < 1:
            fields.wrong("sample_count", f"must be at least 1, got {n}")
        request = pb.SampleRequest(
            model=model,
            sample_count=count,
            seed=fields.seed(self.draw_seed() if seed is None else seed),
            condition=fields.condition(label, codes),
            temperature=None if temperature is None else fields.number("temperature", temperature),
            diffusion=fields.walk(
                sampler=sampler,
                steps=steps,
                timesteps=timesteps,
                guidance=guidance,
                guidance_interval=guidance_interval,
                eta=eta,
                previews=previews,
                start=start,
                strength=strength,
                known=known,
                mask=mask,
                item_shape=about.shape_at(size),
            ),
            size=fields.size(size),
            output_data_type=fields.data_type(dtype),
            output_mode=fields.output_mode(output),
            first_sample_index=fields.integer("first_sample_index", first_index),
        )
        fields.check()
        return SampleRun(request, about)

    def reproduce(
        self, samples: Samples, *, timeout: float | None = None, priority: Priority | None = None
    ) -> Program[Samples]:
        """Draw the very samples of an earlier result again, from the request that the server had resolved.

        Args:
            samples: the earlier result; of a `sample_stream`, any part of it stands for the whole.
            timeout: seconds for the whole call.
            priority: how it shares the device with others.

        Returns:
            Samples of equal bytes, if `determinism_class` is equal too.
        """
        yield Within(timeout, priority)
        known = yield from self._look_up(samples.model)
        again: Samples = yield SampleRun(samples.resolved_request, known)
        return again

    def encode(
        self,
        model: str,
        samples: ArrayLike,
        *,
        seed: int | None = None,
        label: Label = None,
        codes: Sequence[float] = (),
        forward_timestep: int | None = None,
        steps: int | None = None,
        timesteps: Sequence[int] | None = None,
        guidance: float | None = None,
        guidance_interval: tuple[int | None, int | None] | None = None,
        timeout: float | None = None,
        priority: Priority | None = None,
    ) -> Program[Encoded]:
        """Map samples to latents.

        Args:
            model: which model.
            samples: shape [n, *sample], in the model's value range.
            seed: if given, latents are drawn from the posterior, row i by (seed, i); else they are its mean.
            label: what to condition on.
            codes: continuous codes to condition on.
            forward_timestep: diffusion models: draw q(x_t | x0) at this timestep by `seed` instead of inverting.
            steps: diffusion models: steps of the inversion.
            timesteps: the timesteps to visit instead.
            guidance: scale of classifier-free guidance.
            guidance_interval: first and last timestep to guide at, both included; None is no end, or no interval.
            timeout: seconds for the whole call.
            priority: how it shares the device with others.

        Raises:
            LatentdError: see `latentd_client.errors` for the kinds.
        """
        yield Within(timeout, priority)
        known = yield from self._look_up(model)
        fields = Fields()
        if forward_timestep is not None and seed is None:
            seed = self.draw_seed()
        request = pb.EncodeRequest(
            model=model,
            samples=fields.tensor("samples", samples, known.sample_shape),
            seed=None if seed is None else fields.seed(seed),
            condition=fields.condition(label, codes),
            diffusion=fields.walk(
                steps=steps, timesteps=timesteps, guidance=guidance, guidance_interval=guidance_interval
            ),
            forward_timestep=None if forward_timestep is None else fields.integer("forward_timestep", forward_timestep),
        )
        fields.check()
        response: pb.EncodeResponse = yield Unary("Encode", request)
        return messages.read_encoded(response, seed)

    def decode(
        self,
        model: str,
        latents: ArrayLike,
        *,
        seed: int | None = None,
        label: Label = None,
        codes: Sequence[float] = (),
        steps: int | None = None,
        timesteps: Sequence[int] | None = None,
        guidance: float | None = None,
        guidance_interval: tuple[int | None, int | None] | None = None,
        output: Output = "mean",
        dtype: DTypeLike | None = None,
        timeout: float | None = None,
        priority: Priority | None = None,
    ) -> Program[Decoded]:
        """Map latents to samples.

        Args:
            model: which model.
            latents: shape [n, *latent]; for diffusion models noise of shape [n, *sample].
            seed: what draws depend on, row i by (seed, i); if None and something is to be drawn, a fresh one.
            label: what to condition on; None draws row i's label for a model with classes.
            codes: continuous codes to condition on.
            steps: diffusion models: steps from noise to data.
            timesteps: the timesteps to visit instead.
            guidance: scale of classifier-free guidance.
            guidance_interval: first and last timestep to guide at, both included; None is no end, or no interval.
            output: the mean of p(sample | latent), or a draw from it.
            dtype: element type to receive; uint8 maps the value range to 0..255.
            timeout: seconds for the whole call.
            priority: how it shares the device with others.

        Raises:
            LatentdError: see `latentd_client.errors` for the kinds.
        """
        yield Within(timeout, priority)
        known = yield from self._look_up(model)
        if seed is None and (output == "draw" or (label is None and known.class_names)):
            seed = self.draw_seed()
        fields = Fields()
        request = pb.DecodeRequest(
            model=model,
            latents=fields.tensor("latents", latents, known.latent_shape),
            seed=None if seed is None else fields.seed(seed),
            condition=fields.condition(label, codes),
            diffusion=fields.walk(
                steps=steps, timesteps=timesteps, guidance=guidance, guidance_interval=guidance_interval
            ),
            output_mode=fields.output_mode(output),
            output_data_type=fields.data_type(dtype),
        )
        fields.check()
        response: pb.DecodeResponse = yield Unary("Decode", request)
        return messages.read_decoded(response, request, known)

    def denoise_step(
        self,
        model: str,
        noisy_samples: ArrayLike,
        timestep: int | Sequence[int],
        next_timestep: int | Sequence[int] | None = None,
        *,
        label: Label = None,
        codes: Sequence[float] = (),
        guidance: float | None = None,
        eta: float | None = None,
        seed: int | None = None,
        step_index: int = 0,
        timeout: float | None = None,
        priority: Priority | None = None,
    ) -> Program[Step]:
        """Evaluate a denoiser once and, if asked, take one step of DDIM (`eta` 0) to DDPM (`eta` 1).

        Args:
            model: which model; a diffusion model.
            noisy_samples: x_t, shape [n, *sample]; [n, *latent] where latents are walked over.
            timestep: t, for all rows or for each.
            next_timestep: where to step to, -1 meaning clean data; None for no step.
            label: what to condition on.
            codes: continuous codes to condition on.
            guidance: scale of classifier-free guidance.
            eta: fresh noise of the step.
            seed: what the fresh noise depends on; needed if `eta` is over 0, by (seed, row, `step_index`).
            step_index: number of this step in the caller's loop.
            timeout: seconds for the whole call.
            priority: how it shares the device with others.

        Raises:
            LatentdError: see `latentd_client.errors` for the kinds.
        """
        yield Within(timeout, priority)
        known = yield from self._look_up(model)
        fields = Fields()
        request = pb.DenoiseStepRequest(
            model=model,
            noisy_samples=fields.tensor("noisy_samples", noisy_samples, known.state_shape),
            timesteps=[fields.integer(f"timesteps[{i}]", one) for i, one in enumerate(np.atleast_1d(timestep))],
            next_timesteps=[]
            if next_timestep is None
            else [fields.integer(f"next_timesteps[{i}]", one) for i, one in enumerate(np.atleast_1d(next_timestep))],
            condition=fields.condition(label, codes),
            guidance_scale=None if guidance is None else fields.number("guidance_scale", guidance),
            eta=None if eta is None else fields.number("eta", eta),
            seed=None if seed is None else fields.seed(seed),
            step_index=fields.integer("step_index", step_index),
        )
        fields.check()
        response: pb.DenoiseStepResponse = yield Unary("DenoiseStep", request)
        return messages.read_step(response, known)

    def score(
        self,
        model: str,
        samples: ArrayLike,
        *,
        label: Label = None,
        codes: Sequence[float] = (),
        seed: int | None = None,
        draws: int = 0,
        timestep_count: int = 0,
        timeout: float | None = None,
        priority: Priority | None = None,
    ) -> Program[Scores]:
        """Rate samples: a likelihood, a bound on it, or a critic's opinion; `Scores.kind` says which.

        Args:
            model: which model.
            samples: shape [n, *sample], in the model's value range.
            label: what to condition on.
            codes: continuous codes to condition on.
            seed: what a Monte Carlo estimate draws from; None counts as 0, so that scores compare.
            draws: Monte Carlo draws per sample; 0 is the model's default.
            timestep_count: diffusion models: estimate the bound, without bias, from so many timesteps a draw; 0 is all.
            timeout: seconds for the whole call.
            priority: how it shares the device with others.

        Raises:
            LatentdError: see `latentd_client.errors` for the kinds.
        """
        yield Within(timeout, priority)
        known = yield from self._look_up(model)
        fields = Fields()
        request = pb.ScoreRequest(
            model=model,
            samples=fields.tensor("samples", samples, known.sample_shape),
            condition=fields.condition(label, codes),
            seed=fields.seed(0 if seed is None else seed),
            draw_count=fields.integer("draw_count", draws),
            timestep_count=fields.integer("timestep_count", timestep_count),
        )
        fields.check()
        response: pb.ScoreResponse = yield Unary("Score", request)
        return messages.read_scores(response, request)

    def model(self, name: str, *, timeout: float | None = None) -> Program[Model]:
        """Ask for one model: what it is, what it can do, and its card. Always asks the server, for states change.

        Args:
            name: `NAME` (its newest active version) or `NAME@VERSION`.
            timeout: seconds for the whole call.

        Raises:
            ModelNotFound: there is none.
        """
        yield Within(timeout)
        self._models.pop(self._meant.pop(name, name), None)
        return (yield from self._look_up(name))

    def models(self, *, timeout: float | None = None) -> Program[list[Model]]:
        """List the server's models by name, newest version first.

        Args:
            timeout: seconds for the whole call.
        """
        yield Within(timeout)
        found: list[Model] = []
        token = ""
        while True:
            request = model_service_pb2.ListModelsRequest(page_size=500, page_token=token)
            response: model_service_pb2.ListModelsResponse = yield Unary("ListModels", request)
            found.extend(Model(one) for one in response.models)
            if response.next_page_token == token and token:
                raise ProtocolError(f"the server gave page token {token!r} for its own next page")
            token = response.next_page_token
            if not token:
                return found

    def interpolate(
        self,
        model: str,
        first: int | ArrayLike,
        last: int | ArrayLike,
        count: int = 8,
        *,
        given: Literal["latent", "sample"] = "latent",
        label: int | None = None,
        steps: int | None = None,
        guidance: float | None = None,
        dtype: DTypeLike | None = None,
        timeout: float | None = None,
        priority: Priority | None = None,
    ) -> Program[Decoded]:
        """Walk between two latents along a great circle and decode every stop (slerp; White 2016, arXiv:1609.04468).

        An end is a seed (the latent of that seed's first sample), a latent, or a sample to encode. A diffusion model's
        latent is the noise its DDIM inversion ends in.

        Args:
            model: which model.
            first: a seed, or an array as `given` says, with or without a batch axis of 1.
            last: the same for the other end.
            count: stops, both ends included.
            given: what an array is.
            label: class of every stop. If None, the classes that the seeds drew are used, the first up to half-way; a
                model with classes cannot tell the class of an array, and wants a label then.
            steps: diffusion models: steps of each walk between noise and data.
            guidance: scale of classifier-free guidance while decoding.
            dtype: element type to receive.
            timeout: seconds for the whole call.
            priority: how it shares the device with others.

        Raises:
            ValueError: `count` is less than 2, an end is no single item, or a label is needed.
            LatentdError: see `latentd_client.errors` for the kinds.
        """
        yield Within(timeout, priority)
        if count < 2:
            raise ValueError(f"count must be at least 2, got {count}")
        known = yield from self.model(
            model
        )  # the ends are checked here, where no refusal would tell of a newer version
        ends: list[Array] = []
        labels: list[int | None] = []
        for name, end in (("first", first), ("last", last)):
            latent, drawn = yield from self._end_of_walk(known, model, name, end, given, label, steps)
            ends.append(latent)
            labels.append(drawn)
        if known.class_names and None in labels:
            raise ValueError(f"{known.name} has classes: say which one to walk in with label=")

        stops = slerp(ends[0], ends[1], np.linspace(0.0, 1.0, count))
        halves = [labels[0]] * ((count + 1) // 2) + [labels[1]] * (count // 2)
        of_each = [one for one in halves if one is not None]
        return (
            yield from self.decode(
                model,
                stops,
                label=of_each or None,
                steps=steps,
                guidance=guidance,
                dtype=dtype,
                timeout=timeout,
                priority=priority,
            )
        )

    def _end_of_walk(
        self,
        known: Model,
        model: str,
        name: str,
        end: int | ArrayLike,
        given: Literal["latent", "sample"],
        label: int | None,
        steps: int | None,
    ) -> Program[tuple[Array, int | None]]:
        """The latent of one end, without a batch axis, and its class where it is known."""
        if isinstance(end, int | np.integer):
            run = yield from self.sampling(model, seed=int(end), label=label, steps=steps)
            samples: Samples = yield run
            label = label if samples.labels is None else int(samples.labels[0])
            if samples.latents is not None and not known.is_diffusion:  # whose own latent is noise
                return samples.latents[0], label
            array, given = samples.array, "sample"
        else:
            array = np.asarray(end, np.float32)
        shape = known.sample_shape if given == "sample" else known.latent_shape
        if array.shape not in (shape, (1, *(shape or ()))):
            raise ValueError(f"{name}: one {given} of {known.name} has shape {shape}, got {array.shape}")
        array = array.reshape(shape or ())
        if given == "latent":
            return array, label
        # Only a diffusion model's inversion depends on the class; encoders see the sample alone.
        encoded = yield from self.encode(model, array[None], label=label if known.is_diffusion else None, steps=steps)
        return encoded.array[0], label

    def _look_up(self, reference: str) -> Program[Model]:
        """The model; asks the server only for what it has not heard of yet."""
        known = self._models.get(self._meant.get(reference, reference))
        if known is None:
            response: model_service_pb2.GetModelResponse = yield Unary(
                "GetModel", model_service_pb2.GetModelRequest(name=reference)
            )
            known = self._models[response.model.name] = Model(response.model)
            self._meant[reference] = known.name
        return known

    def follow(self, run: SampleRun | LoopRun) -> Program[None]:
        """Know the model that answers a run: for a bare NAME it may be newer than the one known when it was asked."""
        if run.accepted is not None and run.accepted.model != run.model.name:
            self._meant[parse_reference(run.accepted.model).name] = run.accepted.model
            run.model = yield from self._look_up(run.accepted.model)

    def heed(self, failure: LatentdError, reference: str) -> None:
        """Ask anew what a reference means once a call of it was refused: what was checked here may be out of date."""
        if isinstance(failure, FieldsInvalid | ModelNotFound):
            self._meant.pop(reference, None)
