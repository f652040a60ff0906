"""`latentd-train import`. Each command imports what it needs when it is called, so that help is quick."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from latentd_trainer import dimensions, licenses
from latentd_trainer.terminal import console, errors, fail, license_option

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


@app.command("diffusers")
def import_diffusers(
    folder: Annotated[Path, typer.Argument(help="Folder of a pipeline, as save_pretrained writes it.")],
    name: Annotated[str, typer.Option(help="Name of the model; an autoencoder becomes NAME-vae.")],
    models: Models = Path("models"),
    version: Version = None,
    replace: Replace = False,
    class_names: Annotated[
        str | None, typer.Option(help="Names of the classes, with commas between them; 0, 1 ... if not given.")
    ] = None,
    unconditional_class: Annotated[
        int | None, typer.Option(min=0, help="The class that means no class, if one does; makes guidance possible.")
    ] = None,
    size: Annotated[
        str | None, typer.Option(metavar="HxW", help="Size of the network's samples; its own if not given.")
    ] = None,
    sizes: Annotated[
        str,
        typer.Option(help="Other sizes that may be asked for, as 64x64,64x96; of a pipeline without an autoencoder."),
    ] = "",
    steps: Annotated[
        int | None, typer.Option(min=1, help="Default number of steps; 50, or all for DDPM, if not given.")
    ] = None,
    license_: Annotated[
        str | None,
        typer.Option(
            "--license",
            callback=license_option,
            help="SPDX expression of the weights' licence; what the pipeline's README.md says if not given.",
        ),
    ] = None,
    data_license: Annotated[
        str | None,
        typer.Option(callback=license_option, help="SPDX expression of the training data's licence; else not known."),
    ] = None,
) -> None:
    """Import a diffusers pipeline. A UNet2DModel, its scheduler and an autoencoder, see docs/import-diffusers.md."""
    try:
        from latentd_trainer.importers import diffusers_folder
    except ModuleNotFoundError as error:
        if error.name != "diffusers":
            raise
        fail("needs diffusers: pip install 'latentd[diffusers]'", 2)

    if size is not None and not re.fullmatch(r"[1-9]\d{0,4}x[1-9]\d{0,4}", size):
        fail(f"--size {size}: must be HxW, as 32x32", 2)
    try:
        others = dimensions.parse(sizes) if sizes else ()
    except ValueError as error:
        fail(f"--sizes: {error}", 2)
    wishes = diffusers_folder.Wishes(
        name=name,
        class_names=tuple(class_names.split(",")) if class_names else (),
        unconditional_class=unconditional_class,
        size=None if size is None else (int(size.partition("x")[0]), int(size.partition("x")[2])),
        sizes=others,
        step_count=steps,
        license=license_,
        data_license=data_license or licenses.UNKNOWN,
    )

    def importing() -> list[Path]:
        written, notes = diffusers_folder.run(folder, wishes, models=models, version=version, replace=replace)
        for note in notes:
            errors.print(f"note: {note}", markup=False, highlight=False, soft_wrap=True)
        return written

    _run(importing)


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
