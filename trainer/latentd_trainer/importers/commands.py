"""`latentd-train import`. Each command imports what it needs when it is called, so that help is quick."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from latentd_trainer.terminal import console, fail

app = typer.Typer(
    help="Make bundles of models that were trained elsewhere. Every graph is run and checked first.",
    no_args_is_help=True,
)

ModelFilePath = Annotated[Path, typer.Argument(metavar="SPEC.yaml", help="What the graphs are, see the tutorial.")]
Models = Annotated[Path, typer.Option(help="Directory of models; the bundle goes to MODELS/NAME/VERSION.")]
Version = Annotated[int | None, typer.Option(min=1, help="The next one after those there are, if not given.")]
Replace = Annotated[bool, typer.Option("--replace", help="Replace this version if it is there.")]


@app.command("onnx")
def import_onnx(
    spec: ModelFilePath, models: Models = Path("models"), version: Version = None, replace: Replace = False
) -> None:
    """Import ONNX graphs. SPEC.yaml names them and says what their inputs and outputs are (docs/import-onnx.md)."""
    from latentd_trainer.importers import described

    _run(lambda: [described.import_onnx(spec, models=models, version=version, replace=replace)])


@app.command("torch")
def import_torch(
    spec: ModelFilePath, models: Models = Path("models"), version: Version = None, replace: Replace = False
) -> None:
    """Import torch modules. SPEC.yaml names what makes them, which is run, and their weights (docs/import-torch.md)."""
    from latentd_trainer.importers import described

    _run(lambda: [described.import_torch(spec, models=models, version=version, replace=replace)])


def _run(importing: Callable[[], list[Path]]) -> None:
    from latentd_trainer.bundle import BundleError
    from latentd_trainer.importers import ImportingError
    from latentd_trainer.onnx_graph import GraphError

    try:
        directories = importing()
    except ImportingError as error:
        fail(error, 2)
    except (BundleError, GraphError, OSError) as error:
        fail(error, 1)
    for directory in directories:
        console.print(directory, markup=False, soft_wrap=True)
