"""Why work is refused or fails inside the server, as exceptions that know nothing of gRPC; `errors.py` maps them."""

from dataclasses import dataclass


class ServingError(Exception):
    """Base of every failure that a caller is told about."""


@dataclass(frozen=True, slots=True)
class Violation:
    """One field that is wrong: its path as protobuf writes it, and what is allowed there."""

    path: str
    description: str


class FieldsInvalidError(ServingError):
    """The request contradicts the API or the model; lists every violation."""

    def __init__(self, violations: list[Violation]) -> None:
        super().__init__("; ".join(f"{v.path}: {v.description}" for v in violations))
        self.violations = violations


class ModelNotFoundError(ServingError):
    """No model of that name or version."""

    def __init__(self, reference: str, known: list[str]) -> None:
        super().__init__(f"no model {reference!r}; this server has {', '.join(known) or 'none'}")
        self.reference = reference


class MethodUnsupportedError(ServingError):
    """The model exists but does not answer this method."""

    def __init__(self, model: str, method: str, supported: list[str], why: str = "") -> None:
        super().__init__(f"{model} does not support {method}{why and f' ({why})'}; it supports {', '.join(supported)}")
        self.model = model
        self.method = method
        self.supported = supported


class ModelLoadingError(ServingError):
    """The model is being loaded; try again shortly."""

    def __init__(self, model: str, retry_after_s: float = 1.0) -> None:
        super().__init__(f"{model} is still loading")
        self.model = model
        self.retry_after_s = retry_after_s


class ModelFailedError(ServingError):
    """The model could not be loaded."""

    def __init__(self, model: str, why: str) -> None:
        super().__init__(f"{model} could not be loaded: {why}")
        self.model = model


class ModelInUseError(ServingError):
    """Other models lean on this one, so that it stays."""

    def __init__(self, model: str, users: list[str]) -> None:
        super().__init__(f"{model} decodes the samples of {', '.join(users)}; unload that first")
        self.model = model


class OverloadedError(ServingError):
    """The backlog is full; nothing was accepted."""

    def __init__(
        self,
        backlog: int,
        limit: int,
        retry_after_s: float,
        model: str = "",
        *,
        of: str = "the backlog",
        unit: str = "evaluations",
    ) -> None:
        of_what = f"{of} of {model}" if model else of
        super().__init__(f"{of_what} holds {backlog} {unit} of at most {limit}")
        self.retry_after_s = retry_after_s


class DrainingError(ServingError):
    """The server is shutting down and finishes only what it has accepted."""

    def __init__(self, retry_after_s: float = 1.0, description: str = "the server is draining") -> None:
        super().__init__(description)
        self.retry_after_s = retry_after_s


class ModelUnloadedError(DrainingError):
    """The model was unloaded, and what was accepted took longer than it was given; another server may hold it."""

    def __init__(self, model: str, grace_s: float) -> None:
        super().__init__(description=f"{model} is being unloaded, and this was not finished within {grace_s:g} s")


class QuotaExceededError(ServingError):
    """The caller holds as much as one caller may; nothing was accepted."""

    def __init__(self, subject: str, description: str) -> None:
        super().__init__(description)
        self.subject = subject
        self.description = description


class ReaderTooSlowError(ServingError):
    """The reader took next to nothing while much waited for it, or a drain; what was still done for it is given up."""

    def __init__(self, timeout_s: float) -> None:
        super().__init__(
            f"the server waits for what it has sent to be read, and too little was read in {timeout_s:g} s"
        )
        self.timeout_s = timeout_s


class DeadlineError(ServingError):
    """The deadline passed."""

    def __init__(self, description: str = "the deadline passed before the answer was ready") -> None:
        super().__init__(description)


class DeadlineUnreachableError(DeadlineError):
    """The deadline cannot be met; nothing was accepted."""

    def __init__(self, description: str, estimate_s: float | None = None) -> None:
        super().__init__(description)
        self.estimate_s = estimate_s  # how long it would have taken, where that is known


class CancelledError(ServingError):
    """The caller gave up."""

    def __init__(self, description: str = "cancelled by the caller") -> None:
        super().__init__(description)


class RuntimeFailureError(ServingError):
    """The network failed on this request's rows; carries no path and no stack."""

    def __init__(self, model: str) -> None:
        super().__init__(f"{model} failed to evaluate this request; the server's log has the details")
        self.model = model
