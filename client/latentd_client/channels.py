"""What the synchronous and the asynchronous shell share of gRPC: options, credentials, deadlines, errors."""

import math
import os
import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
from latentd.names import CALLER_KEY, PRIORITIES, PRIORITY_KEY, PUSHBACK_KEY, REQUEST_ID_KEY
from latentd.v1.generation_service_pb2_grpc import GenerationServiceStub
from latentd.v1.model_service_pb2_grpc import ModelServiceStub

from latentd_client import errors
from latentd_client.calls import Priority
from latentd_client.retries import Attempts, Retries, Throttle

DEFAULT_TARGET = "127.0.0.1:8500"
ChannelOption = tuple[str, Any]

_MAX_RECEIVE_BYTES = 64 * 1024 * 1024  # gRPC's own 4 MiB is two batches of photographs


@dataclass(frozen=True, slots=True)
class TLS:
    """How to trust a server, and how to be trusted by it. All files are PEM.

    Attributes:
        ca: certificates to trust; None means those gRPC ships with.
        certificate: this client's certificate chain, for mutual TLS.
        key: its private key.
        server_name: the name the server's certificate must carry, if it is not the target's.
    """

    ca: str | Path | None = None
    certificate: str | Path | None = None
    key: str | Path | None = None
    server_name: str | None = None

    def credentials(self) -> grpc.ChannelCredentials:
        """What gRPC calls this."""
        if (self.certificate is None) != (self.key is None):
            raise ValueError("certificate and key go together")
        ca, key, chain = (
            None if path is None else Path(path).read_bytes() for path in (self.ca, self.key, self.certificate)
        )
        return grpc.ssl_channel_credentials(ca, key, chain)


@dataclass(frozen=True)
class Settings:
    """The arguments of a client, checked, and what follows from them."""

    target: str
    tls: TLS | grpc.ChannelCredentials | None
    timeout_s: float
    retries: Retries
    caller: str | None
    priority: Priority
    channel_options: Sequence[ChannelOption]
    throttle: Throttle = field(default_factory=Throttle)

    def __post_init__(self) -> None:
        self.terms()

    def terms(self) -> "Terms":
        """The terms of a call that says nothing else."""
        return Terms.after(self.timeout_s, self.priority)

    @property
    def credentials(self) -> grpc.ChannelCredentials | None:
        """None for plaintext."""
        return self.tls.credentials() if isinstance(self.tls, TLS) else self.tls

    @property
    def options(self) -> list[ChannelOption]:
        """Channel options; the caller's come last and win."""
        ours: dict[str, Any] = {
            "grpc.service_config": self.retries.service_config(),
            "grpc.enable_retries": 1,
            "grpc.max_receive_message_length": _MAX_RECEIVE_BYTES,
            "grpc.max_send_message_length": _MAX_RECEIVE_BYTES,
            "grpc.keepalive_time_ms": 30_000,
            "grpc.keepalive_timeout_ms": 10_000,
            "grpc.initial_reconnect_backoff_ms": 200,
            "grpc.min_reconnect_backoff_ms": 200,
            "grpc.max_reconnect_backoff_ms": 5_000,
        }
        if isinstance(self.tls, TLS) and self.tls.server_name:
            ours["grpc.ssl_target_name_override"] = self.tls.server_name
        return list((ours | dict(self.channel_options)).items())

    def attempts(self) -> Attempts:
        """The attempts of a new stream; all streams of a client share one throttle."""
        return Attempts(self.retries, self.throttle)

    def metadata(self, request_id: str, terms: "Terms") -> tuple[tuple[str, str], ...]:
        """What every call carries."""
        caller = ((CALLER_KEY, self.caller),) if self.caller else ()
        priority = ((PRIORITY_KEY, terms.priority),) if terms.priority != "normal" else ()
        return (*caller, *priority, (REQUEST_ID_KEY, request_id))


@dataclass(slots=True)
class Liveness:
    """Whether a client may still be used, and by this process."""

    pid: int = field(default_factory=os.getpid)
    closed: bool = False

    def check(self) -> None:
        """Raise if not.

        Raises:
            ClientClosed: after `close`.
            ClientForked: in a child process.
        """
        if os.getpid() != self.pid:
            raise errors.ClientForked(
                f"this client was made by process {self.pid}, this is {os.getpid()}: gRPC channels do not survive "
                "fork; make the client in the process that uses it, e.g. in a worker's initialiser"
            )
        if self.closed:
            raise errors.ClientClosed("the client is closed")


@dataclass(frozen=True, slots=True)
class Terms:
    """Until when a call may take, on the monotonic clock, infinitely far if the timeout was; and its priority."""

    timeout_s: float
    at_s: float
    priority: Priority

    @classmethod
    def after(cls, timeout_s: float, priority: Priority) -> "Terms":
        """So many seconds from now."""
        check_timeout(timeout_s)
        if priority not in PRIORITIES:
            raise ValueError(f"priority must be one of {', '.join(PRIORITIES)}, got {priority!r}")
        return cls(timeout_s, time.monotonic() + timeout_s, priority)

    @classmethod
    def never(cls) -> "Terms":
        """Infinitely far."""
        return cls(math.inf, math.inf, "normal")

    def changed(self, timeout_s: float | None, priority: Priority | None) -> "Terms":
        """The same but for what is given."""
        if timeout_s is None and priority is None:
            return self
        return Terms.after(self.timeout_s if timeout_s is None else timeout_s, priority or self.priority)

    @property
    def remaining_s(self) -> float:
        """Seconds left; may be negative or infinite."""
        return self.at_s - time.monotonic()

    def timeout(self) -> float | None:
        """What to tell gRPC; None is for ever.

        Raises:
            DeadlineExceeded: nothing is left.
        """
        remaining_s = self.remaining_s
        if remaining_s <= 0:
            raise errors.DeadlineExceeded(f"the timeout of {self.timeout_s:g} s has passed")
        return None if math.isinf(remaining_s) else remaining_s


def check_timeout(timeout_s: float) -> None:
    """Raise unless it is a positive number; infinity says in so many words that there is no deadline."""
    if not timeout_s > 0:  # refuses NaN too
        raise ValueError(f"timeout must be a positive number of seconds (math.inf for none), got {timeout_s}")


def unary_calls(channel: Any) -> Mapping[str, Callable[..., Any]]:
    """The unary RPCs of a channel of either kind, by name."""
    generation, models = GenerationServiceStub(channel), ModelServiceStub(channel)
    return {
        "Encode": generation.Encode,
        "Decode": generation.Decode,
        "DenoiseStep": generation.DenoiseStep,
        "Score": generation.Score,
        "GetModel": models.GetModel,
        "ListModels": models.ListModels,
    }


def random_seed() -> int:
    """A seed nobody has used, in [0, 2^53): exact in JSON and in every language's numbers."""
    return secrets.randbits(53)


def new_request_id() -> str:
    """A fresh `x-request-id`."""
    return secrets.token_hex(8)


def translate(error: grpc.RpcError, request_id: str) -> errors.LatentdError:
    """The exception for what gRPC raised."""
    call: Any = error  # both of gRPC's error types are also calls, which their stubs do not say
    trailers = dict(call.trailing_metadata() or ())
    pushback_ms = str(trailers.get(PUSHBACK_KEY, ""))
    return errors.from_status(
        call.code().value[0],
        call.details() or "",
        errors.read_details(trailers.get("grpc-status-details-bin")),
        pushback_s=int(pushback_ms) / 1000 if pushback_ms.isdecimal() else None,
        request_id=request_id,
    )
