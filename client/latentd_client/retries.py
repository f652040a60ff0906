"""When to try again. Pure: time and chance are arguments.

Unary calls are retried by gRPC itself, told by a service config (gRFC A6). A broken stream cannot be: gRPC commits a
call once the first message has come. `Attempts` decides for streams, by the same numbers.
"""

import json
from dataclasses import dataclass

from latentd_client.errors import LatentdError

_GRPC_MAX_ATTEMPTS = 5  # gRFC A6: more counts as 5
_MIN_BACKOFF_S = 0.01  # with 0.001, gRPC 1.85 rounds some waits to nothing and then never tries again
_TOKENS = 100
_TOKEN_RATIO = 0.1


@dataclass(frozen=True, slots=True)
class Retries:
    """How often and how fast a client tries again. Only what is safe to repeat is: see `LatentdError.retryable`.

    Attributes:
        max_attempts: attempts in a row that bring nothing new; 1 turns retries off. gRPC caps unary calls at 5.
        initial_backoff_s: wait before the second attempt, in seconds; the server's own hint, if longer, wins.
        backoff_multiplier: growth of the wait from one attempt to the next.
        max_backoff_s: longest wait, in seconds.
    """

    max_attempts: int = 5
    initial_backoff_s: float = 0.2
    backoff_multiplier: float = 2.0
    max_backoff_s: float = 5.0

    def __post_init__(self) -> None:
        if self.max_attempts < 1:
            raise ValueError(f"max_attempts must be at least 1, got {self.max_attempts}")
        if not _MIN_BACKOFF_S <= self.initial_backoff_s <= self.max_backoff_s:
            raise ValueError(
                f"need {_MIN_BACKOFF_S} <= initial_backoff_s <= max_backoff_s, "
                f"got {self.initial_backoff_s} and {self.max_backoff_s}"
            )
        if self.backoff_multiplier < 1:
            raise ValueError(f"backoff_multiplier must be at least 1, got {self.backoff_multiplier}")

    def service_config(self) -> str:
        """The JSON that makes gRPC retry unary calls; Sample and Stream are left to `Attempts`."""
        policy = {
            "maxAttempts": min(self.max_attempts, _GRPC_MAX_ATTEMPTS),
            "initialBackoff": f"{self.initial_backoff_s}s",
            "maxBackoff": f"{self.max_backoff_s}s",
            "backoffMultiplier": self.backoff_multiplier,
            "retryableStatusCodes": ["UNAVAILABLE"],
        }
        generation, models = "latentd.v1.GenerationService", "latentd.v1.ModelService"
        unary = {"name": [{"service": generation}, {"service": models}]}
        streams = {"name": [{"service": generation, "method": method} for method in ("Sample", "Stream")]}
        return json.dumps(
            {
                "methodConfig": [streams, unary | ({"retryPolicy": policy} if self.max_attempts > 1 else {})],
                "retryThrottling": {"maxTokens": _TOKENS, "tokenRatio": _TOKEN_RATIO},
            }
        )


@dataclass(slots=True)
class Throttle:
    """Stops retries while most calls fail, so that clients do not keep an overloaded server down (gRFC A6).

    Every failure that could be retried takes a token, every success gives a tenth back; below half there are no
    retries. What the caller asked wrongly says nothing of the server and takes none.
    """

    tokens: float = _TOKENS

    @property
    def open(self) -> bool:
        """Whether a retry is allowed."""
        return self.tokens > _TOKENS / 2

    def failed(self) -> None:
        """Note a failed attempt."""
        self.tokens = max(0.0, self.tokens - 1)

    def succeeded(self) -> None:
        """Note a stream that ran to its end, or a request of a shared one that was answered."""
        self.tokens = min(float(_TOKENS), self.tokens + _TOKEN_RATIO)


@dataclass(slots=True)
class Attempts:
    """The attempts of one stream, or of one request of a shared one. Only those in a row that brought nothing count."""

    policy: Retries
    throttle: Throttle
    fruitless: int = 0
    progress: int = 0

    def delay_s(
        self, error: LatentdError, *, progress: int, remaining_s: float, chance: float, counted: bool = True
    ) -> float:
        """How long to wait, in seconds, before asking again for what is missing.

        Args:
            error: how the last attempt ended.
            progress: how much has arrived so far; grows when an attempt was of use.
            remaining_s: time left until the deadline, in seconds.
            chance: uniform in [0, 1); spreads the waits of many clients.
            counted: whether the throttle is to hear of it; not if it has, where one failure hits many calls.

        Raises:
            LatentdError: `error` itself, when it cannot be retried, attempts or time run out, or most calls fail.
        """
        if not error.retryable:
            raise error
        if counted:
            self.throttle.failed()
        if progress > self.progress:
            self.progress = progress
            self.fruitless = 0
        self.fruitless += 1
        if self.fruitless >= self.policy.max_attempts or not self.throttle.open:
            raise error
        backoff_s = self.policy.initial_backoff_s * self.policy.backoff_multiplier ** min(self.fruitless - 1, 32)
        delay_s = max(min(backoff_s, self.policy.max_backoff_s) * (0.8 + 0.4 * chance), error.retry_after_s or 0.0)
        if delay_s >= remaining_s:
            raise error
        return delay_s
