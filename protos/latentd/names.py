"""Names that cross a process boundary: model references, samplers, metadata keys.

A model is addressed as `NAME` (its newest active version) or `NAME@VERSION` (canonical).
"""

import re
from functools import lru_cache
from typing import NamedTuple

NAME_PATTERN = r"[a-z]([a-z0-9-]{0,61}[a-z0-9])?"
VERSION_PATTERN = r"[1-9][0-9]{0,8}"

_NAME = re.compile(NAME_PATTERN)
_REFERENCE = re.compile(rf"(?P<name>{NAME_PATTERN})(@(?P<version>{VERSION_PATTERN}))?")

SAMPLERS = ("ddim", "ddpm", "dpmpp-2m", "dpmpp-2m-sde", "euler", "euler-ancestral", "heun")
"""Every sampler a server of this version knows, by its wire name."""

BUNDLE_FILE = "bundle.json"
BUNDLE_FORMAT_VERSION = 1

CALLER_KEY = "x-latentd-caller"
"""Request metadata: who calls, for fairness and logs."""
PRIORITY_KEY = "x-latentd-priority"
"""Request metadata: how the call shares the device with others, one of `PRIORITIES`; none is `normal`."""
PRIORITIES = ("high", "normal", "low")
"""Every priority, by its name in metadata, the highest first."""
REQUEST_ID_KEY = "x-request-id"
"""Request metadata: correlates log lines; echoed in the initial metadata of the answer."""
PUSHBACK_KEY = "grpc-retry-pushback-ms"
"""Trailing metadata: when gRPC's own retry machinery may try again (gRFC A6)."""


class ModelReference(NamedTuple):
    """A parsed model reference; `version` 0 stands for the newest active one."""

    name: str
    version: int

    def __str__(self) -> str:
        return f"{self.name}@{self.version}" if self.version else self.name


@lru_cache(maxsize=4096)
def parse_reference(text: str) -> ModelReference:
    """Parse `NAME` or `NAME@VERSION`.

    Raises:
        ValueError: the text follows neither form; the message says what is allowed.
    """
    match = _REFERENCE.fullmatch(text)
    if match is None:
        raise ValueError(
            "must be NAME or NAME@VERSION, where NAME is 1 to 63 of a-z, 0-9 and '-', starting with a letter "
            "and not ending with '-', and VERSION is a number from 1"
        )
    return ModelReference(match["name"], int(match["version"] or 0))


def is_name(text: str) -> bool:
    """Whether `text` is a model name without a version."""
    return _NAME.fullmatch(text) is not None
