"""`latentd-train`. Each command imports what it needs when it is called, so that help is quick."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.table import Table

from latentd_trainer.families import FAMILIES, load_family, parse_settings, preset_settings
from latentd_trainer.importers import commands as import_commands
from latentd_trainer.study import CLAIMS, chosen
from latentd_trainer.terminal import console, errors, fail, license_option

if TYPE_CHECKING:
    from latentd_trainer.checkpoint import RunRecord
    from latentd_trainer.data import Dataset
    from latentd_trainer.start import Start

app = typer.Typer(
    help="Train deep generative models and write the bundles that latentd serves.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
app.add_typer(import_commands.app, name="import")
LARGEST_SEED = 2**63 - 1
FamilyName = Annotated[str, typer.Argument(metavar="FAMILY", help=f"One of {', '.join(FAMILIES)}.")]


@app.command()
def fit(
    family: FamilyName,
    out: Annotated[Path, typer.Option(help="Directory of the run: record, checkpoint, log, pictures.")],
    data: Annotated[
        str | None,
        typer.Option(
            help="`digits` (embedded, the default), an .npz file, IDX files (the MNIST format) or a folder of images "
            "whose subfolders are classes."
        ),
    ] = None,
    steps: Annotated[int | None, typer.Option(help="Training steps; the default is the family's.")] = None,
    preset: Annotated[
        str | None, typer.Option(help="Settings for other data than digits, see `latentd-train settings`.")
    ] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="NAME=VALUE", help="A setting of the family, see `latentd-train settings`."),
    ] = None,
    latents_of: Annotated[
        Path | None,
        typer.Option(
            metavar="BUNDLE",
            help="Train on latents of the data by this bundle's encoder, MODELS/NAME[/VERSION], in place of the data: "
            "latent diffusion, which that bundle decodes.",
        ),
    ] = None,
    from_: Annotated[
        Path | None,
        typer.Option("--from", metavar="RUN", help="The trained run to go on from, for families that do (vae_gan)."),
    ] = None,
    seed: Annotated[
        int | None,
        typer.Option(
            min=0, max=LARGEST_SEED, help="Of the weights, the order of the data and all noise; 0 by default."
        ),
    ] = None,
    device: Annotated[str, typer.Option(help="auto (CUDA where there is a device), cpu, cuda or cuda:N.")] = "auto",
    precision: Annotated[
        str | None, typer.Option(help="fp32 (the default), or on a CUDA device bf16 or fp16 with fp32 weights.")
    ] = None,
    threads: Annotated[
        int | None, typer.Option(min=1, help="CPU threads of each process; 1 by default, best for small networks.")
    ] = None,
    interval: Annotated[
        int, typer.Option("--every", min=1, help="Steps from one checkpoint and its pictures to the next.")
    ] = 500,
    resume: Annotated[
        bool,
        typer.Option(
            "--resume",
            help="Continue the run in --out as if it had not stopped, on the CPU bit for bit; start it if it is new.",
        ),
    ] = False,
) -> None:
    """Train a model. Ctrl-C and SIGTERM save first; under torchrun the processes share every batch.

    Exit status: 0 trained to the end; 1 stopped by an error, the last checkpoint intact; 2 options or data that
    are not allowed; 130 (Ctrl-C) or 143 (SIGTERM) saved and stopped early.
    """
    from latentd_trainer import checkpoint, shard, start, train
    from latentd_trainer.progress import Display

    given = {"data": data, "seed": seed, "precision": precision, "threads": threads}
    given |= {"latents_of": None if latents_of is None else str(latents_of)}
    try:
        wanted = {} if preset is None else preset_settings(load_family(family), preset)
        wanted |= _parse_texts(settings or []) | ({} if steps is None else {"steps": str(steps)})
        has_run = (out / checkpoint.RECORD_FILE).exists()
        if not resume:
            checkpoint.require_no_run(out)
        begin = None if has_run and from_ is None else start.of_run(from_, family, load_family(family))
        if has_run:
            record, dataset = _continued_record(out, family, given, wanted, begin)
        else:
            record, dataset = _new_record(family, given, wanted, begin)
        train.fit(
            out,
            record,
            dataset,
            device=train.choose_device(device, record.precision, shard.local_rank()),
            interval=interval,
            resume=has_run,
            display=Display(console),
            start=None if begin is None else begin.run.family,
        )
    except ValueError as error:
        fail(error, 2)
    except (train.TrainingError, checkpoint.CheckpointError) as error:
        fail(error, 1)
    except train.InterruptedTraining as stopped:
        fail(stopped, stopped.exit_status)
    if shard.rank() == 0:
        console.print(
            f"{out}: {record.family} trained for {record.settings['steps']} steps", markup=False, soft_wrap=True
        )


@app.command("settings")
def list_settings(
    family: FamilyName,
    preset: Annotated[str | None, typer.Option(help="Show this preset's values in place of the defaults.")] = None,
) -> None:
    """List a family's settings. Their defaults are the recipe for the embedded digits.

    `fit --preset` takes a preset's values, `fit --set` changes single ones.
    """
    try:
        kind = load_family(family)
        changed = {} if preset is None else preset_settings(kind, preset)
    except ValueError as error:
        fail(error, 2)
    table = Table("setting", "default" if preset is None else preset, "what it is")
    for entry in dataclasses.fields(kind.config_type):
        table.add_row(entry.name, changed.get(entry.name, str(entry.default)), entry.metadata["help"])
    console.print(table)
    if kind.presets:
        console.print(f"presets: {', '.join(kind.presets)}", markup=False, highlight=False)


@app.command()
def export(
    run: Annotated[Path, typer.Argument(help="Directory of a run.")],
    name: Annotated[str, typer.Option(help="Name of the model: a-z, 0-9 and '-', e.g. digits-vae.")],
    models: Annotated[Path, typer.Option(help="Directory of models; the bundle goes to MODELS/NAME/VERSION.")] = Path(
        "models"
    ),
    version: Annotated[
        int | None, typer.Option(min=1, help="The next one after those there are, if not given.")
    ] = None,
    license_: Annotated[
        str | None,
        typer.Option(
            "--license",
            callback=license_option,
            help="SPDX expression of the weights' licence; Apache-2.0 for digits, else not known.",
        ),
    ] = None,
    data_license: Annotated[
        str | None,
        typer.Option(
            callback=license_option,
            help="SPDX expression of the training data's licence; CC-BY-4.0 for digits, else not known.",
        ),
    ] = None,
    replace: Annotated[bool, typer.Option("--replace", help="Replace this version if it is there.")] = False,
    precision: Annotated[
        Literal["fp32", "fp16"], typer.Option(help="What the networks compute in; fp16 is for GPUs.")
    ] = "fp32",
    sizes: Annotated[
        str, typer.Option(help="Other sizes that may be asked for, HEIGHTxWIDTH with commas: 12x12,16x24 (diffusion).")
    ] = "",
) -> None:
    """Write a run as a bundle. Each ONNX graph is proved equal to torch first."""
    from latentd_trainer import dimensions
    from latentd_trainer import export as exporter
    from latentd_trainer.bundle import BundleError
    from latentd_trainer.checkpoint import CheckpointError
    from latentd_trainer.onnx_graph import GraphError

    try:
        others = dimensions.parse(sizes) if sizes else ()
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--sizes") from error
    try:
        directory = exporter.run(
            run,
            models=models,
            name=name,
            version=version,
            license=license_,
            data_license=data_license,
            replace=replace,
            precision=precision,
            sizes=others,
        )
    except (BundleError, CheckpointError, GraphError, OSError) as error:
        fail(error, 1)
    console.print(directory, markup=False, soft_wrap=True)


@app.command()
def evaluate(
    bundle: Annotated[Path, typer.Argument(help="Directory of a bundle, MODELS/NAME/VERSION.")],
    data: Annotated[str, typer.Option(help="What it was trained on, as for fit.")] = "digits",
    out: Annotated[
        Path | None,
        typer.Option(
            help="Where the report goes; into the bundle if not given. If given, the bundle is left as it is."
        ),
    ] = None,
    card: Annotated[bool, typer.Option("--card", help="Write the metrics into the card even with --out.")] = False,
    cache: Annotated[
        Path | None,
        typer.Option(
            help="Where the classifier is kept from one evaluation to the next; latentd/classifiers in "
            "$XDG_CACHE_HOME or ~/.cache if not given."
        ),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, max=LARGEST_SEED, help="Of all draws and of the classifier.")] = 0,
    bars: Annotated[bool, typer.Option("--bars", help="Exit with 1 if a model of digits misses its bars.")] = False,
    against: Annotated[
        Path | None,
        typer.Option(
            metavar="BUNDLE",
            help="Measure this bundle too and put its figures beside; for vae_gan the VAE that it was tuned from.",
        ),
    ] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="Of ONNX Runtime; up to 4 if not given.")] = None,
) -> None:
    """Measure a bundle's samples. Metrics go into its card, a report with pictures beside it or into --out."""
    from latentd_trainer import evaluate as evaluator
    from latentd_trainer.bundle import BundleError
    from latentd_trainer.data import DataError

    try:
        status = evaluator.run(
            bundle,
            data=data,
            out=out,
            card=card,
            cache=cache,
            seed=seed,
            bars=bars,
            against=against,
            threads=threads,
            console=console,
        )
    except DataError as error:
        fail(error, 2)
    except (BundleError, evaluator.EvaluationError, OSError) as error:
        fail(error, 1)
    raise typer.Exit(status)


@app.command()
def verify(bundle: Annotated[Path, typer.Argument(help="Directory of a bundle, MODELS/NAME/VERSION.")]) -> None:
    """Check a bundle. Digests, contract of the graphs, parity with torch; exit status 1 if anything is wrong."""
    from latentd_trainer import verify as verifier

    raise typer.Exit(verifier.run(bundle, console))


@app.command()
def study(
    out: Annotated[Path, typer.Option(help="Where the report goes, with its figures, pictures and trained models.")],
    only: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help=f"Only this claim; may be given again. Of {', '.join(CLAIMS)}."),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, max=LARGEST_SEED, help="Of all weights, batches and draws.")] = 0,
    models: Annotated[
        Path | None,
        typer.Option(help="Directory of models; digits-vae and the like in it are used in place of training them."),
    ] = None,
    jobs: Annotated[
        int | None,
        typer.Option(min=1, help="Claims studied at once, a process each; as many as there are cores if not given."),
    ] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="Seconds, not minutes: tiny networks, whose figures say nothing.")
    ] = False,
) -> None:
    """Measure what is said of these models. A report of claims, each with its figures and a verdict.

    The report is written after each claim. What was trained is kept in --out and not trained again. Exit status: 0
    done, whatever the verdicts; 1 something could not be trained or written; 2 options that are not allowed; 130
    (Ctrl-C) or 143 (SIGTERM) stopped early.
    """
    import shlex
    import sys

    from latentd_trainer import train
    from latentd_trainer.bundle import BundleError
    from latentd_trainer.checkpoint import CheckpointError
    from latentd_trainer.study import report, run

    command = shlex.join(["latentd-train", *sys.argv[1:]])
    try:
        names = chosen(only or [])
    except ValueError as error:
        fail(error, 2)
    try:
        run.run(
            out,
            names,
            seed=seed,
            quick=quick,
            models=models,
            jobs=min(jobs or report.core_count(), len(names)),
            command=command,
            console=console,
        )
    except (BundleError, CheckpointError, train.TrainingError, OSError) as error:
        fail(error, 1)
    except (KeyboardInterrupt, train.InterruptedTraining) as stopped:
        fail("stopped; what was found and trained so far is kept", getattr(stopped, "exit_status", 130))


def _parse_texts(texts: list[str]) -> dict[str, str]:
    """`NAME=VALUE` texts as a mapping."""
    wrong = [text for text in texts if not text.partition("=")[0] or "=" not in text]
    if wrong:
        raise ValueError(f"--set {', '.join(wrong)}: must be NAME=VALUE")
    return {text.partition("=")[0]: text.partition("=")[2] for text in texts}


def _new_record(
    family: str, given: Mapping[str, Any], settings: Mapping[str, str], start: Start | None
) -> tuple[RunRecord, Dataset]:
    """The record of a run that starts now, and its data: those of the run that it goes on from, if it does.

    Raises:
        ValueError: settings are not allowed, or `start` was trained with others or on other data.
    """
    from latentd_trainer import checkpoint, encoded, shard, train

    kind = load_family(family)
    config = parse_settings(kind.config_type, settings if start is None else start.settings(kind, settings))
    values: dict[str, Any] = {"data": "digits", "seed": 0, "precision": "fp32", "threads": 1}
    if start is not None:
        values["data"] = start.run.record.data
    values |= {name: value for name, value in given.items() if value is not None}
    dataset = encoded.load_data(values["data"], values.get("latents_of"))
    if start is not None and dataset.info.sha256 != start.run.record.info.sha256:
        raise ValueError(f"{start.directory} was trained on other data than {values['data']}")
    record = checkpoint.RunRecord(
        family=family,
        settings=dataclasses.asdict(config),
        info=dataset.info,
        processes=shard.process_count(),
        versions=train.versions(),
        start=None if start is None else start.record,
        **values,
    )
    return record, dataset


def _continued_record(
    out: Path, family: str, given: Mapping[str, Any], settings: Mapping[str, str], start: Start | None
) -> tuple[RunRecord, Dataset]:
    """The record of the run in `out`, and its data.

    Raises:
        ValueError: options ask for another run than this one, or the data have changed; the message lists all.
    """
    from latentd_trainer import checkpoint, encoded, shard, train

    record = checkpoint.read_record(out)
    asked: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    asked |= {"family": family, "processes": shard.process_count()}
    problems = [
        f"{name} is {getattr(record, name)}, not {value}"
        for name, value in asked.items()
        if value != getattr(record, name)
    ]
    if family == record.family:
        config = parse_settings(load_family(family).config_type, settings)
        problems += [
            f"{name} is {record.settings[name]}, not {getattr(config, name)}"
            for name in settings
            if getattr(config, name) != record.settings[name]
        ]
    if start is not None and start.record != record.start:
        problems.append(f"it went on from another run than {start.directory}")
    if problems:
        raise ValueError(f"{out} cannot be resumed as another run: {'; '.join(problems)}")
    dataset = encoded.load_data(record.data, record.latents_of)
    if dataset.info.sha256 != record.info.sha256:
        raise ValueError(f"{out} cannot be resumed: {record.data} has changed since the run began")
    if dataset.info.latents != record.info.latents:
        raise ValueError(f"{out} cannot be resumed: {record.latents_of} gives other latents than when the run began")
    if record.versions != train.versions():
        errors.print(
            f"note: begun with {dict(record.versions)}, resumed with {train.versions()}; bits may differ",
            markup=False,
            highlight=False,
            soft_wrap=True,
        )
    return record, dataset
