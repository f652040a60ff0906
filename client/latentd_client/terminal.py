"""How `latentctl` speaks: tables and bars for people, JSON for programs, one clear line and an exit code for failures.

Results go to standard output, progress and failures to standard error.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import typer
from latentd.card import likelihood_in_words
from rich.console import Console, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text
from typer.core import TyperGroup

from latentd_client import errors
from latentd_client.model import Model

EXIT_CODES = """Exit codes: 0 done, 1 failed in another way, 2 wrong arguments or fields, 3 no such model,
4 the model cannot do this, 5 server unavailable (try again later), 6 timeout, 7 over a quota or limit,
8 the server failed, 9 access denied, 130 interrupted."""

_EXIT_CODES: tuple[tuple[type[BaseException], int], ...] = (
    (errors.FieldsInvalid, 2),
    (errors.ModelNotFound, 3),
    (errors.MethodUnsupported, 4),
    (errors.ModelFailed, 4),
    (errors.ModelInUse, 4),
    (errors.ServerUnavailable, 5),
    (errors.DeadlineExceeded, 6),
    (errors.QuotaExceeded, 7),
    (errors.ReaderTooSlow, 7),
    (errors.MessageTooLarge, 7),
    (errors.RuntimeFailure, 8),
    (errors.ProtocolError, 8),
    (errors.Unauthenticated, 9),
    (errors.PermissionDenied, 9),
    (errors.LatentdError, 1),
    (ValueError, 2),
    (KeyboardInterrupt, 130),
)


def exit_code(error: BaseException) -> int:
    """The exit code of a failure."""
    return next((code for kind, code in _EXIT_CODES if isinstance(error, kind)), 1)


@dataclass
class Terminal:
    """Standard output and standard error, for a person or a program."""

    as_json: bool = False
    out: Console = field(default_factory=lambda: Console(highlight=False))
    err: Console = field(default_factory=lambda: Console(stderr=True, highlight=False))

    def show(self, facts: Any, picture: RenderableType) -> None:
        """Print a result: `facts` as JSON if asked for, else `picture`."""
        if self.as_json:
            typer.echo(json.dumps(facts))
        else:
            self.out.print(picture)

    @contextmanager
    def progress(self, what: str, total: float) -> Iterator[Progress]:
        """A progress bar with one task; nothing is drawn for programs."""
        bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            console=self.err,
            transient=True,
            disable=self.as_json or not self.err.is_terminal,
        )
        with bar:
            bar.add_task(what, total=total)
            yield bar

    def fail(self, error: BaseException) -> None:
        """Print one line for a failure, and one for each violation beyond it."""
        violations = error.violations if isinstance(error, errors.FieldsInvalid) else ()
        message = "interrupted" if isinstance(error, KeyboardInterrupt) else str(error) or type(error).__name__
        if self.as_json:
            facts: dict[str, Any] = {"message": message, "exit_code": exit_code(error)}
            if isinstance(error, errors.LatentdError):
                facts |= {
                    "code": error.code.name,
                    "reason": error.reason,
                    "retry_after_s": error.retry_after_s,
                    "request_id": error.request_id,
                    "violations": [{"path": one.path, "description": one.description} for one in violations],
                }
            typer.echo(json.dumps({"error": facts}), err=True)
            return
        if violations:
            lines = [Text.assemble((one.path, "bold"), ": ", one.description) for one in violations]
        else:
            lines = [Text(message)]
        for line in lines:
            self.err.print(Text.assemble(("error: ", "bold red"), line), soft_wrap=True)
        if isinstance(error, errors.ServerUnavailable) and error.retry_after_s is not None:
            self.err.print(f"the server suggests to try again in {error.retry_after_s:g} s", soft_wrap=True)


class Guarded(TyperGroup):
    """Turns every expected failure of a command into a message and an exit code."""

    def invoke(self, ctx: Any) -> Any:
        """Run the command.

        Raises:
            typer.Exit: the command failed; the message is out.
        """
        try:
            return super().invoke(ctx)
        except (errors.LatentdError, ValueError, OSError, ModuleNotFoundError, KeyboardInterrupt) as error:
            terminal = ctx.obj.terminal if ctx.obj is not None else Terminal()
            terminal.fail(error)
            raise typer.Exit(exit_code(error)) from error


def models_table(models: list[Model]) -> RenderableType:
    """The catalogue, one model a row."""
    if not models:
        return Text("the server has no models")
    table = Table("MODEL", "FAMILY", "STATE", "METHODS", "SAMPLE", "CLASSES", box=None, pad_edge=False)
    for model in models:
        classes = str(len(model.class_names)) if model.class_names else "-"
        shape = " x ".join(map(str, model.sample_shape))
        table.add_row(model.name, model.family, model.state, " ".join(sorted(model.methods)), shape, classes)
    return table


def model_table(model: Model) -> RenderableType:
    """Everything a caller wants to know of one model."""
    low, high = model.value_range
    classes = [name if name == str(index) else f"{index} {name}" for index, name in enumerate(model.class_names)]
    card = model.proto.card
    rows: dict[str, str] = {
        "model": model.name,
        "family": model.family,
        "state": f"{model.state} {model.proto.failure_reason}".strip(),
        "methods": " ".join(sorted(model.methods)),
        **{name: what if name in model.methods else f"no: {what}" for name, what in model.capabilities.items()},
        "likelihood": likelihood_in_words(card.likelihood) if card.HasField("likelihood") else "",
        "sample shape": f"{_shape(model.sample_shape)} in [{low:g}, {high:g}]",
        "other sizes": " ".join(f"{height}x{width}" for height, width in model.sample_sizes),
        "latent shape": _shape(model.latent_shape) if model.latent_shape else "-",
        "classes": ", ".join(classes) or "-",
    }
    if model.is_diffusion:
        rows |= {
            "samplers": " ".join(model.samplers),
            "steps": f"{model.proto.diffusion.default_step_count} by default, {model.timestep_count} timesteps",
            "guidance": "yes" if model.proto.diffusion.guidance_supported else "no",
        }
    rows |= {
        "description": card.description,
        "data": card.dataset,
        "trained": card.train_time.ToJsonString() if card.HasField("train_time") else "",
        "licence": card.license,
        "data licence": card.dataset_license,
        "paper": card.reference_uri,
        "digest": model.digest,
    }
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column()
    for name, value in rows.items():
        if value:
            table.add_row(name, Text(value))
    for name in sorted(model.metrics):
        table.add_row(Text(name, style="dim"), f"{model.metrics[name]:g}")
    for other in card.comparisons:
        table.add_row(other.relation, Text(f"{other.model} {other.digest}"))
        for name in sorted(other.metrics):
            table.add_row(Text(name, style="dim"), f"{other.metrics[name]:g}")
    return table


def facts_table(facts: dict[str, Any], paths: list[Path]) -> RenderableType:
    """A few facts, and where the files are."""
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in facts.items():
        table.add_row(name, Text(str(value)))
    for path in paths:
        table.add_row("wrote", Text(str(path)))
    return table


def _shape(shape: tuple[int, ...]) -> str:
    return "[" + ", ".join(map(str, shape)) + "]"
