"""What a request is understood to mean: a job for the engine, and what turning its outcome into an answer takes."""

from dataclasses import dataclass

from latentd.v1 import generation_service_pb2, tensor_pb2

from latentd_server.job import Array, CallJob, Job, StepJob
from latentd_server.schedules import Schedule


@dataclass(frozen=True, slots=True)
class Limits:
    """What one request, or one stream, may ask for, and how long its reader may stand still."""

    max_samples: int = 1024  # samples, or rows of a tensor
    max_steps: int = 1000
    max_evaluations: int = 1_000_000  # network rows of the whole request
    max_open_ids: int = 1024  # unfinished requests of a stream
    max_loop_samples: int = 4096  # samples of a stream's open loops, together
    reader_timeout_s: float = 30.0  # 0 is for ever


@dataclass(frozen=True, slots=True)
class Range:
    """Shape and value range of one sample or latent, without the batch axis."""

    shape: tuple[int, ...]
    data_type: tensor_pb2.DataType.ValueType
    low: float
    high: float
    level_count: int = 0  # evenly spaced values that data can have; 0 where they are continuous, or it is not known

    @property
    def bounded(self) -> bool:
        """Whether a range is declared, so that 0..255 can be mapped to it."""
        return self.low < self.high


@dataclass(frozen=True, slots=True)
class SampleHead:
    """The part of a SampleRequest that means the same to every model."""

    resolved_request: generation_service_pb2.SampleRequest  # without what depends on the kind of model
    indices: Array  # [n] i64; what the seed is combined with
    seed: int
    form: "OutputForm"
    determinism_class: str


@dataclass(frozen=True, slots=True)
class OutputForm:
    """How samples leave: their element type, and the model's range, which UINT8 maps to 0..255."""

    data_type: tensor_pb2.DataType.ValueType
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class Sampling:
    """Sample."""

    job: Job
    resolved_request: generation_service_pb2.SampleRequest
    determinism_class: str
    form: OutputForm
    samples: str  # the job's output that holds them
    latents: str | None  # and the latents, if there are any
    labels: Array | None  # [n] i64; None where the model has no classes
    preview_form: "OutputForm | None" = None  # of previews, where these are latents of what samples are decoded from


@dataclass(frozen=True, slots=True)
class Encoding:
    """Encode by a network. Names are outputs of the job; which are there says what the posterior is."""

    job: Job
    latents: str  # the mean, the probabilities, or x_t of an inversion
    log_variance: str | None = None
    bernoulli: bool = False
    categorical: bool = False
    seed: int | None = None  # draw from the posterior
    stream: int = 0  # of that draw; the streams before it fed the encoder
    classes: str | None = None  # P(class | sample), where there are latents beside it


@dataclass(frozen=True, slots=True)
class Diffusing:
    """Encode by the forward process: a draw from q(x_t | x0), which takes no network."""

    model: str
    samples: Array  # [n, *sample] f32, x0
    alpha: float
    sigma: float
    seed: int


@dataclass(frozen=True, slots=True)
class Decoding:
    """Decode."""

    job: Job
    form: OutputForm
    samples: str


@dataclass(frozen=True, slots=True)
class Denoising:
    """DenoiseStep."""

    job: StepJob
    stepped: bool  # whether there is a next state to send


@dataclass(frozen=True, slots=True)
class Scoring:
    """Score. Lanes of the job run over (row, class, draw), the last fastest."""

    job: CallJob
    value: str
    type: generation_service_pb2.ScoreResponse.Type.ValueType
    row_count: int
    draw_count: int
    log_prior: Array  # [c] f64, ln p(label) of the classes summed over; [0.0] where there is nothing to sum over


@dataclass(frozen=True, slots=True)
class Bounding:
    """Score by the variational bound of a diffusion model. Lanes of the job run over (row, draw, term), the last
    fastest; the first term of each draw is that of timestep 0.
    """

    job: StepJob
    prior: Array  # [n] f64, L_T
    row_count: int
    draw_count: int


@dataclass(frozen=True, slots=True)
class Loop:
    """A client-driven loop, as it was opened."""

    sampling: Sampling
    schedule: Schedule
    sampler: str
    eta: float | None
    sample: Range

    @property
    def job(self) -> StepJob:
        """The job Sample would run."""
        assert isinstance(self.sampling.job, StepJob)
        return self.sampling.job


@dataclass(frozen=True, slots=True)
class LoopPosition:
    """Where a loop stands."""

    previous: int | None  # the timestep before `current`
    current: int
    remaining: tuple[int, ...]  # still to come if the client follows the schedule, ending in -1
    evaluation_count: int = 0  # so far; numbers the step noise
    state: Array | None = None  # [n, *sample] f32; None before the first step
    history: Array | None = None


@dataclass(frozen=True, slots=True)
class LoopStep:
    """One step of a loop, as resolved."""

    job: StepJob
    following: int
    state_requested: bool
