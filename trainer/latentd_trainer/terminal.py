"""What `latentd-train` prints with."""

from typing import NoReturn

import typer
from rich.console import Console

from latentd_trainer import licenses

console = Console()
errors = Console(stderr=True)


def fail(message: object, status: int) -> NoReturn:
    """Say on standard error what is wrong, and leave with this exit status."""
    errors.print(f"latentd-train: {message}", markup=False, highlight=False, soft_wrap=True)
    raise typer.Exit(status)


def license_option(text: str | None) -> str | None:
    """A licence given as an option, as SPDX writes it."""
    try:
        return None if text is None else licenses.canonical(text)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
