"""Logging: one line for every finished call, as JSON or as text. Lines carry what a call cost, never what it made."""

import json
import logging
import sys
import time
from dataclasses import asdict, dataclass

calls = logging.getLogger("latentd.calls")


@dataclass(frozen=True, slots=True)
class CallLine:
    """What is said of a finished call."""

    method: str
    model: str
    code: str
    reason: str
    samples: int
    evaluations: int
    queue_s: float
    compute_s: float
    mean_batch: float
    total_s: float
    caller: str
    request_id: str
    seed: int | None


def call_finished(line: CallLine) -> None:
    """Write the line of a finished call."""
    calls.info("call", extra={"call": line})


class JsonFormatter(logging.Formatter):
    """One JSON object a line."""

    def format(self, record: logging.LogRecord) -> str:
        """Render a record."""
        line: dict[str, object] = {
            "time": _timestamp(record),
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
        }
        call = getattr(record, "call", None)
        if isinstance(call, CallLine):
            line |= {key: _rounded(value) for key, value in asdict(call).items()}
        if record.exc_info:
            line["stack"] = self.formatException(record.exc_info)
        return json.dumps(line)


class TextFormatter(logging.Formatter):
    """Time, level, message, and `key=value` for a call."""

    def format(self, record: logging.LogRecord) -> str:
        """Render a record."""
        text = f"{_timestamp(record)} {record.levelname:<7} {record.getMessage()}"
        call = getattr(record, "call", None)
        if isinstance(call, CallLine):
            pairs = ((key, _rounded(value)) for key, value in asdict(call).items())
            text += "".join(f" {key}={value}" for key, value in pairs if value not in ("", None))
        if record.exc_info:
            text += "\n" + self.formatException(record.exc_info)
        return text


def configure(level: str, style: str) -> None:
    """Send the server's log to standard error."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter() if style == "json" else TextFormatter())
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)


def _timestamp(record: logging.LogRecord) -> str:
    whole = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
    return f"{whole}.{int(record.msecs):03d}Z"


def _rounded(value: object) -> object:
    return round(value, 6) if isinstance(value, float) else value
