"""The server's settings: one schema for flags, `LATENTD_*` environment variables and a TOML file.

A flag beats the environment, which beats the file, which beats the default. Environment variables that name no
setting are ignored, because Kubernetes puts `LATENTD_PORT` and its like into every pod beside a Service of that
name; unknown flags and unknown keys of the file are problems.
"""

import argparse
import difflib
import re
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from latentd import __version__
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError
from pydantic.fields import FieldInfo

ENVIRONMENT_PREFIX = "LATENTD_"


class ConfigError(Exception):
    """The settings cannot be used; `problems` names every one, by where it was set."""

    def __init__(self, problems: list[str]) -> None:
        super().__init__("; ".join(problems))
        self.problems = problems


def _address(text: str) -> str:
    match = re.fullmatch(r"(\[[0-9a-fA-F:.]+\]|[^\s:\[\]]+):(\d{1,5})", text)
    if match is None or int(match[2]) > 65535:
        raise ValueError(
            "must be HOST:PORT with a port from 0 (any free one) to 65535, e.g. 127.0.0.1:8500 or [::]:8500"
        )
    return text


def _optional_address(text: str) -> str:
    return _address(text) if text else text


def _directory(path: Path) -> Path:
    if not path.is_dir():
        raise ValueError("must be a directory that exists")
    return path


def _device(text: str) -> str:
    if not re.fullmatch(r"auto|cpu|cuda:\d{1,3}", text):
        raise ValueError("must be auto, cpu or cuda:N")
    return text


def _batch_rows(rows: int) -> int:
    if rows == 1:
        raise ValueError("must be 0, or from 2 to 4096, since a guided sample takes two rows")
    return rows


def _caller_weights(value: object) -> object:
    """`NAME=WEIGHT,...` of a flag or a variable as a mapping; the file has a table of them."""
    if not isinstance(value, str):
        return value
    pairs = [part.rpartition("=") for part in value.split(",") if part.strip()]
    weights = {name.strip(): weight.strip() for name, _, weight in pairs}
    if "" in weights or len(weights) < len(pairs):
        raise ValueError("must be NAME=WEIGHT with commas between, each name once, e.g. web=4,batch=0.5")
    return weights


Address = Annotated[str, AfterValidator(_address)]
OptionalAddress = Annotated[str, AfterValidator(_optional_address)]
RowCount = Annotated[int, AfterValidator(_batch_rows)]
CallerWeights = Annotated[dict[str, Annotated[float, Field(ge=0.001, le=1000)]], BeforeValidator(_caller_weights)]


class Config(BaseModel):
    """Every setting, with its unit and default. The descriptions are what `latentd --help` shows."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)

    models: Annotated[Path, AfterValidator(_directory)] = Field(
        Path("models"), description="directory of bundles, NAME/VERSION/ each; read only"
    )
    listen: Address = Field("127.0.0.1:8500", description="HOST:PORT of gRPC; port 0 takes any free one")
    http: Address = Field("127.0.0.1:9090", description="HOST:PORT of /metrics and /healthz")
    health: OptionalAddress = Field(
        "", description="HOST:PORT of one more, health-only gRPC port, for probes; none if empty"
    )
    admin: OptionalAddress = Field(
        "", description="HOST:PORT of AdminService, which loads and unloads models; none if empty"
    )
    device: Annotated[str, AfterValidator(_device)] = Field(
        "auto", description="auto (a GPU if there is one that can be used), cpu, or cuda:N"
    )
    gpu_memory_mib: int = Field(
        0,
        ge=0,
        description="MiB of GPU memory for one network, its arena and the state of samples under way; 0 is no limit",
    )
    gpu_arena: Literal["exact", "double"] = Field(
        "exact", description="how that arena grows: by exactly what is asked for, or doubling, with fewer allocations"
    )
    cuda_graphs: Literal["on", "off"] = Field(
        "on", description="whether calls are recorded as CUDA graphs, one for each size, and replayed"
    )
    tf32: Literal["off", "on"] = Field(
        "off", description="whether GPUs may round inputs of products to TF32, for speed; changes every byte"
    )
    determinism: Literal["strict", "none"] = Field(
        "strict",
        description="strict: equal requests give equal bytes whatever the load; none: nothing is promised or tried",
    )
    cache: str = Field(
        "auto",
        description="directory where certificates of equal bytes are kept, so that a restart is quick; auto is latentd "
        "in the user's cache directory, off keeps none",
    )
    self_check_interval: float = Field(
        10.0,
        ge=0,
        le=86_400,
        description="seconds at least between self-checks, which repeat a finished sample while nothing else is to be "
        "done; 0 is never",
    )
    threads: int = Field(0, ge=0, le=1024, description="threads of one network call on the CPU; 0 takes all cores")
    max_batch_rows: RowCount = Field(
        0,
        ge=0,
        le=4096,
        description="rows of one network call; a guided sample takes two. 0 is 64, and up to 1024 of one-shot networks "
        "so small that such a call takes some milliseconds at most",
    )
    max_backlog: int = Field(
        1_000_000, ge=1, description="evaluations that may be accepted and not yet run; more are refused"
    )
    max_model_backlog: int = Field(750_000, ge=1, description="evaluations of one model among them")
    max_caller_backlog: int = Field(500_000, ge=1, description="evaluations of one caller among them")
    caller_weights: CallerWeights = Field(
        {}, description="callers' shares in what is contended, as NAME=WEIGHT with commas between; others weigh 1"
    )
    max_samples: int = Field(1024, ge=1, le=1_000_000, description="samples, or rows of a tensor, in one request")
    max_steps: int = Field(1000, ge=1, le=1_000_000, description="solver steps of one sample")
    max_message_mib: int = Field(64, ge=1, le=2047, description="MiB of one received message")
    max_streams: int = Field(128, ge=1, le=1_000_000, description="concurrent calls on one connection")
    max_stream_requests: int = Field(1024, ge=1, le=1_000_000, description="unfinished requests on one Stream call")
    reader_timeout: float = Field(
        30.0,
        ge=0,
        le=86_400,
        description="seconds in which a reader that lags far behind must take 1 MiB, or its call is given up; "
        "0 is for ever",
    )
    drain_seconds: float = Field(
        60.0,
        ge=0,
        le=86_400,
        description="seconds that accepted work may take after SIGTERM or UnloadModel before it is given up",
    )
    log_level: Literal["debug", "info", "warning", "error"] = Field("info", description="least level that is logged")
    log_format: Literal["json", "text"] = Field("json", description="one JSON object a line, or text")


def read(arguments: Sequence[str], environment: Mapping[str, str]) -> Config:
    """Put the settings together.

    Raises:
        ConfigError: lists every problem.
        SystemExit: `--help` or `--version` was asked for, or a flag has no value.
    """
    flags, unknown = _parser().parse_known_args(arguments)
    problems = [f"{text}: no such flag; see latentd --help" for text in unknown]
    values: dict[str, Any] = {}
    origins: dict[str, str] = {}
    path = flags.config or environment.get(f"{ENVIRONMENT_PREFIX}CONFIG")
    if path:
        for key, value in _file(path, problems).items():
            values[key], origins[key] = value, f"{key} in {path}"
    for key in Config.model_fields:
        variable = ENVIRONMENT_PREFIX + key.upper()
        if variable in environment:
            values[key], origins[key] = environment[variable], variable
        if getattr(flags, key) is not None:
            values[key], origins[key] = getattr(flags, key), _flag(key)
    try:
        config = Config.model_validate(values)
    except ValidationError as error:
        problems += [_problem(entry, origins) for entry in error.errors()]
    if problems:
        raise ConfigError(problems)
    return config


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="latentd",
        description="Serves deep generative models over gRPC, batched step by step.",
        epilog="Each flag can be set by its environment variable, or by its name (max_samples = 16) in the TOML file. "
        "A flag beats the environment, which beats the file.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"latentd {__version__}")
    parser.add_argument("--config", metavar="FILE", help="TOML file of settings (LATENTD_CONFIG; default: none)")
    for key, field in Config.model_fields.items():
        shown = "none" if field.default in ("", {}) else field.default
        text = f"{field.description} ({ENVIRONMENT_PREFIX}{key.upper()}; default: {shown})"
        parser.add_argument(_flag(key), dest=key, metavar=_metavar(key, field), help=text.replace("%", "%%"))
    return parser


def _metavar(key: str, field: FieldInfo) -> str:
    kinds: dict[object, str] = {int: "N", float: "SECONDS", Path: "DIR"}
    if key in ("listen", "http", "health", "admin"):
        return "HOST:PORT"
    if key == "caller_weights":
        return "NAME=WEIGHT,..."
    if key in ("device", "cache"):
        return {"device": "DEVICE", "cache": "DIR|auto|off"}[key]
    literals = getattr(field.annotation, "__args__", None)
    return "|".join(literals) if literals else kinds.get(field.annotation, "VALUE")


def _flag(key: str) -> str:
    return "--" + key.replace("_", "-")


def _file(path: str, problems: list[str]) -> dict[str, Any]:
    try:
        return tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        problems.append(f"{path}: cannot be read ({error.strerror})")
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        problems.append(f"{path}: is not TOML ({error})")
    return {}


def _problem(error: Any, origins: Mapping[str, str]) -> str:
    key = str(error["loc"][0])
    origin = " ".join((origins.get(key, _flag(key) + " (default)"), *map(str, error["loc"][1:2])))
    if error["type"] == "extra_forbidden":
        close = difflib.get_close_matches(key, Config.model_fields, 1)
        return f"{origin}: no such setting" + (f"; did you mean {close[0]}?" if close else "")
    message = (
        error["msg"].removeprefix("Value error, ").replace("Input should", "must").replace("String should", "must")
    )
    return f"{origin}: {message}; got {str(error['input'])!r}"
