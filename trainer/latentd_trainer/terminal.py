"""What `latentd-train` prints with."""

from typing import NoReturn

import typer
from rich.console import Console

console = Console()
errors = Console(stderr=True)


def fail(message: object, status: int) -> NoReturn:
    """Say on standard error what is wrong, and leave with this exit status."""
    errors.print(f"latentd-train: {message}", markup=False, highlight=False, soft_wrap=True)
    raise typer.Exit(status)
