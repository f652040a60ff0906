"""Logging, as JSON or as text, one line an event. A finished call is one line with its cost; never with its images."""

import json
import logging
import sys
import time
from typing import Literal

calls = logging.getLogger("latentd.calls")
"""One line for every finished call."""


def event(logger: logging.Logger, message: str, **fields: object) -> None:
    """Log a line with fields of its own."""
    logger.info(message, extra={"fields": fields})


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
        line |= {key: _rounded(value) for key, value in _fields(record).items()}
        if record.exc_info:
            line["stack"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)


class TextFormatter(logging.Formatter):
    """Time, level, message, and fields as `key=value`."""

    def format(self, record: logging.LogRecord) -> str:
        """Render a record."""
        text = f"{_timestamp(record)} {record.levelname:<7} {record.getMessage()}"
        text += "".join(
            f" {key}={_rounded(value)}" for key, value in _fields(record).items() if value not in ("", None)
        )
        if record.exc_info:
            text += "\n" + self.formatException(record.exc_info)
        return text


def configure(level: str, style: Literal["json", "text"]) -> None:
    """Send the log to standard error."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter() if style == "json" else TextFormatter())
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)


def _fields(record: logging.LogRecord) -> dict[str, object]:
    fields: dict[str, object] = getattr(record, "fields", {})
    return fields


def _timestamp(record: logging.LogRecord) -> str:
    whole = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
    return f"{whole}.{int(record.msecs):03d}Z"


def _rounded(value: object) -> object:
    return round(value, 6) if isinstance(value, float) else value
