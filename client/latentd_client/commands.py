"""The commands of `latentctl`."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from google.protobuf.json_format import MessageToDict
from latentd import __version__

from latentd_client import arguments, images
from latentd_client.calls import Priority
from latentd_client.channels import DEFAULT_TARGET
from latentd_client.model import Model
from latentd_client.results import ImageBatch, Preview, Samples, Stats
from latentd_client.resume import assemble
from latentd_client.sync import Client
from latentd_client.terminal import EXIT_CODES, Guarded, Terminal, facts_table, model_table, models_table

_MAX_PREVIEW_BYTES = 1 << 20  # larger estimates would cost more than the bar that they move is worth

app = typer.Typer(
    cls=Guarded,
    help="Talk to a latentd server: list, sample, encode, decode, denoise, score.",
    epilog=EXIT_CODES,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@dataclass
class Session:
    """What the global options say."""

    server: str
    timeout_s: float
    priority: Priority
    terminal: Terminal

    def client(self) -> Client:
        """A client of that server."""
        return Client(self.server, timeout=self.timeout_s, caller="latentctl", priority=self.priority)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"latentctl {__version__}")
        raise typer.Exit


@app.callback()
def connect(
    context: typer.Context,
    server: Annotated[str, typer.Option(envvar="LATENTD_SERVER", help="HOST:PORT of the server.")] = DEFAULT_TARGET,
    timeout: Annotated[float, typer.Option(envvar="LATENTD_TIMEOUT", help="Seconds a call may take.")] = 60.0,
    priority: Annotated[
        Priority, typer.Option(envvar="LATENTD_PRIORITY", help="How calls share the device with others.")
    ] = "normal",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, for programs; errors too.")] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Options for every command."""
    context.obj = Session(server, timeout, priority, Terminal(as_json))


ModelArgument = Annotated[str, typer.Argument(metavar="MODEL", help="NAME (newest version) or NAME@VERSION.")]
SeedOption = Annotated[int | None, typer.Option(help="Equal seeds give equal samples. Drawn and printed if not given.")]
LabelOption = Annotated[
    str | None, typer.Option(help="Class to condition on: a number or name, several with commas, or 'each'.")
]
StepsOption = Annotated[int | None, typer.Option(help="Solver steps (diffusion).")]
GuidanceOption = Annotated[float | None, typer.Option(help="Classifier-free guidance scale (diffusion).")]
IntervalOption = Annotated[
    tuple[int, int] | None,
    typer.Option(metavar="FIRST LAST", help="Guide from this timestep to that one; at all if not given (diffusion)."),
]
SizeOption = Annotated[
    str | None, typer.Option(metavar="HxW", help="Height and width, as 16x24; one of the model's sizes (diffusion).")
]
SamplerOption = Annotated[str | None, typer.Option(help="How to walk from noise to data (diffusion).")]
EtaOption = Annotated[float | None, typer.Option(help="Fresh noise per step, 0 to 1 (diffusion).")]
OutOption = Annotated[
    list[Path], typer.Option("--out", "-o", help="File to write; may be given more than once. .png .npz .npy ...")
]
ColumnsOption = Annotated[int | None, typer.Option(help="Images in a row of the grid.")]
ScaleOption = Annotated[int | None, typer.Option(help="Enlarge every pixel by this; a legible size if not given.")]
TERMS = ("prior", "diffusion", "reconstruction")
FilesArgument = Annotated[list[Path], typer.Argument(help="Pictures, .npy, or .npz with an array called samples.")]


@app.command("models")
def list_models(context: typer.Context) -> None:
    """List the models of the server."""
    session: Session = context.obj
    with session.client() as client:
        models = client.models()
    session.terminal.show([MessageToDict(model.proto) for model in models], models_table(models))


@app.command()
def describe(context: typer.Context, model: ModelArgument) -> None:
    """Say what a model is, what it can do, and how good it is."""
    session: Session = context.obj
    with session.client() as client:
        found = client.model(model)
    session.terminal.show(MessageToDict(found.proto), model_table(found))


@app.command()
def sample(
    context: typer.Context,
    model: ModelArgument,
    count: Annotated[int | None, typer.Option("-n", "--count", help="How many. 16, or as many as labels.")] = None,
    seed: SeedOption = None,
    label: LabelOption = None,
    steps: StepsOption = None,
    sampler: SamplerOption = None,
    guidance: GuidanceOption = None,
    guidance_interval: IntervalOption = None,
    eta: EtaOption = None,
    size: SizeOption = None,
    temperature: Annotated[float | None, typer.Option(help="Scale of the prior (not diffusion).")] = None,
    draw: Annotated[bool, typer.Option("--draw", help="Draw from p(sample | latent) instead of its mean.")] = False,
    start: Annotated[
        Path | None, typer.Option(help="File of a sample to start from, for image-to-image (diffusion).")
    ] = None,
    strength: Annotated[
        float | None, typer.Option(help="Share of the walk that --start goes through, above 0, up to 1.")
    ] = None,
    known: Annotated[
        Path | None, typer.Option(help="File of a sample of which part is given, for inpainting; with --mask.")
    ] = None,
    mask: Annotated[
        Path | None, typer.Option(help="Where --known is given: white in a picture, 1 in an .npz or .npy file.")
    ] = None,
    first: Annotated[int, typer.Option(help="Index of the first sample; continues an earlier run.")] = 0,
    out: OutOption = [Path("samples.png")],  # noqa: B006  # typer copies it
    columns: ColumnsOption = None,
    scale: ScaleOption = None,
) -> None:
    """Draw samples and write them as a grid (.png) or as arrays (.npz)."""
    session: Session = context.obj
    arguments.check_outputs(out)
    extents = arguments.size(size)
    with session.client() as client:
        about = client.model(model)
        labels, total = arguments.labels_and_count(label, about, count)
        previews = preview_interval(about, total, steps, extents) if session.terminal.err.is_terminal else 0
        begun, given = (
            None if path is None else arguments.read_samples([path], about, extents) for path in (start, known)
        )
        shown = None if mask is None else arguments.read_mask(mask, about, extents)
        progress_by_sample = np.zeros(max(total, 0))
        parts: list[Samples] = []
        with session.terminal.progress(f"sampling {about.name}", total) as bar:
            for event in client.sample_stream(
                model,
                total,
                seed=seed,
                label=labels,
                steps=steps,
                sampler=sampler,
                guidance=guidance,
                guidance_interval=guidance_interval,
                eta=eta,
                temperature=temperature,
                output="draw" if draw else "mean",
                start=begun,
                strength=strength,
                known=given,
                mask=shown,
                size=extents,
                first_index=first,
                previews=previews,
            ):
                if isinstance(event, Preview):
                    progress_by_sample[event.indices] = event.completed_steps / event.total_steps
                elif isinstance(event, Samples):
                    progress_by_sample[event.indices] = 1
                    parts.append(event)
                bar.update(bar.task_ids[0], completed=float(progress_by_sample.sum()))
    samples = assemble(parts, total)
    facts = samples.facts() | stats_facts(samples.stats)
    brief = {"model": samples.model, "samples": total, "seed": samples.seed, "class": samples.determinism_class}
    columns = arguments.grid_columns(label, columns, about)
    write(session.terminal, samples, out, columns, scale, facts, brief)


@app.command()
def encode(
    context: typer.Context,
    model: ModelArgument,
    files: FilesArgument,
    label: LabelOption = None,
    seed: Annotated[int | None, typer.Option(help="Draw from the posterior by this seed instead of its mean.")] = None,
    steps: StepsOption = None,
    out: Annotated[Path, typer.Option("--out", "-o", help=".npz file for the latents.")] = Path("latents.npz"),
) -> None:
    """Map samples to latents (diffusion: DDIM inversion to noise)."""
    session: Session = context.obj
    arguments.check_outputs([out], [".npz"])
    with session.client() as client:
        known = client.model(model)
        batch = arguments.read_samples(files, known)
        labels, _ = arguments.labels_and_count(label, known, len(batch))
        encoded = client.encode(model, batch, label=labels, seed=seed, steps=steps)
    found = {
        "latents": encoded.latents,
        "mean": encoded.mean,
        "log_variance": encoded.log_variance,
        "probability": encoded.probability,
        "class_probability": encoded.class_probability,
        "labels": None if labels is None else np.broadcast_to(labels, len(batch)),
    }
    kept: dict[str, Any] = {name: array for name, array in found.items() if array is not None}
    np.savez(out, **kept)
    facts = {
        "model": known.name,
        "arrays": {name: list(array.shape) for name, array in kept.items()},
        "out": [str(out)],
    }
    brief = {"model": known.name, "latents": list(encoded.latents.shape)}
    session.terminal.show(facts | stats_facts(encoded.stats), facts_table(brief, [out]))


@app.command()
def decode(
    context: typer.Context,
    model: ModelArgument,
    latents: Annotated[Path, typer.Argument(help=".npy, or .npz with an array called latents.")],
    label: LabelOption = None,
    seed: SeedOption = None,
    steps: StepsOption = None,
    guidance: GuidanceOption = None,
    guidance_interval: IntervalOption = None,
    draw: Annotated[bool, typer.Option("--draw", help="Draw from p(sample | latent) instead of its mean.")] = False,
    out: OutOption = [Path("decoded.png")],  # noqa: B006  # typer copies it
    columns: ColumnsOption = None,
    scale: ScaleOption = None,
) -> None:
    """Map latents to samples."""
    session: Session = context.obj
    arguments.check_outputs(out)
    with session.client() as client:
        known = client.model(model)
        batch = arguments.read_latents(latents, known)
        labels, _ = arguments.labels_and_count(label, known, len(batch))
        decoded = client.decode(
            model,
            batch,
            label=labels,
            seed=seed,
            steps=steps,
            guidance=guidance,
            guidance_interval=guidance_interval,
            output="draw" if draw else "mean",
        )
    facts = decoded.facts() | {"model": known.name, "seed": decoded.seed} | stats_facts(decoded.stats)
    brief = {"model": known.name, "samples": len(decoded)}
    columns = arguments.grid_columns(label, columns, known)
    write(session.terminal, decoded, out, columns, scale, facts, brief)


@app.command()
def denoise(
    context: typer.Context,
    model: ModelArgument,
    count: Annotated[int | None, typer.Option("-n", "--count", help="How many. 16, or as many as labels.")] = None,
    seed: SeedOption = None,
    label: LabelOption = None,
    steps: StepsOption = None,
    sampler: SamplerOption = None,
    guidance: GuidanceOption = None,
    guidance_interval: IntervalOption = None,
    eta: EtaOption = None,
    size: SizeOption = None,
    estimate: Annotated[
        bool, typer.Option("--estimate", help="Show the estimate of x0 at each step instead of x_t.")
    ] = False,
    gif: Annotated[Path, typer.Option(help="Animation of the run.")] = Path("denoise.gif"),
    columns: ColumnsOption = None,
    scale: ScaleOption = None,
) -> None:
    """Take a diffusion model's steps one by one and write them as an animation."""
    session: Session = context.obj
    arguments.check_outputs([gif], [".gif"])
    frames = []
    with session.client() as client:
        known = client.model(model)
        if known.walks_over_latents:
            decoder = known.proto.latent_space.decoder
            raise ValueError(
                f"{known.name} takes its steps among latents of {decoder}, which are no pictures: use sample"
            )
        labels, total = arguments.labels_and_count(label, known, count)
        loop = client.denoise_loop(
            model,
            total,
            seed=seed,
            label=labels,
            steps=steps,
            sampler=sampler,
            guidance=guidance,
            guidance_interval=guidance_interval,
            eta=eta,
            size=arguments.size(size),
        )
        across = arguments.grid_columns(label, columns, known)
        with loop, session.terminal.progress(f"denoising with {known.name}", len(loop.remaining)) as bar:
            for step in loop:
                shown = step.array if estimate else step.state
                frames.append(images.grid(images.to_uint8(shown, step.value_range), across, scale))
                bar.update(bar.task_ids[0], advance=1, description=f"{known.name} at timestep {step.timestep}")
            accepted = loop.accepted
    images.save_gif(frames, gif)
    facts = {"model": accepted.model, "seed": accepted.seed, "samples": total, "steps": len(frames)}
    brief = facts | {"class": accepted.determinism_class}
    session.terminal.show(
        facts | {"determinism_class": accepted.determinism_class, "out": [str(gif)]}, facts_table(brief, [gif])
    )


@app.command()
def score(
    context: typer.Context,
    model: ModelArgument,
    files: FilesArgument,
    label: LabelOption = None,
    seed: Annotated[int | None, typer.Option(help="Seed of a Monte Carlo estimate; 0 if not given.")] = None,
    draws: Annotated[int, typer.Option(help="Monte Carlo draws per sample; 0 is the model's default.")] = 0,
    timestep_count: Annotated[
        int, typer.Option("--timesteps", help="Estimate a bound from so many of its timesteps; 0 is all (diffusion).")
    ] = 0,
) -> None:
    """Rate samples: a likelihood, a bound on it, or a critic's opinion."""
    session: Session = context.obj
    with session.client() as client:
        known = client.model(model)
        batch = arguments.read_samples(files, known)
        labels, _ = arguments.labels_and_count(label, known, len(batch))
        scores = client.score(model, batch, label=labels, seed=seed, draws=draws, timestep_count=timestep_count)
    values = scores.values.tolist()
    facts: dict[str, Any] = {"model": known.name, "kind": scores.kind, "values": values}
    brief: dict[str, Any] = {"model": known.name, "kind": scores.kind, "mean": f"{scores.values.mean():.6g}"}
    if scores.bits_per_dimension is not None:
        facts["bits_per_dimension"] = scores.bits_per_dimension.tolist()
        brief["bits per dimension"] = f"{scores.bits_per_dimension.mean():.4g}"
    if scores.terms is not None:
        facts["terms"] = {name: getattr(scores.terms, name).tolist() for name in TERMS}
        brief |= {name: f"{getattr(scores.terms, name).mean():.6g}" for name in TERMS}
    brief |= {str(index): f"{value:.6g}" for index, value in enumerate(values)}
    session.terminal.show(facts | stats_facts(scores.stats), facts_table(brief, []))


@app.command()
def interpolate(
    context: typer.Context,
    model: ModelArgument,
    first: Annotated[str, typer.Argument(help="A seed, a latent (.npy, .npz) or a sample (a picture).")],
    last: Annotated[str, typer.Argument(help="The other end.")],
    count: Annotated[int, typer.Option("-n", "--count", help="Stops, both ends included.")] = 10,
    label: LabelOption = None,
    steps: StepsOption = None,
    guidance: GuidanceOption = None,
    out: OutOption = [Path("walk.png")],  # noqa: B006  # typer copies it
    columns: ColumnsOption = None,
    scale: ScaleOption = None,
) -> None:
    """Walk between two latents along a great circle and decode every stop. A .gif becomes an animation."""
    session: Session = context.obj
    arguments.check_outputs(out)
    with session.client() as client:
        known = client.model(model)
        labels, _ = arguments.labels_and_count(label, known, 1)
        ends = [arguments.end_of_walk(text, known) for text in (first, last)]
        given = {kind for _, kind in ends if kind is not None}
        if len(given) > 1:
            raise ValueError("one end is a latent and the other a sample: encode the sample first")
        walk = client.interpolate(
            model,
            ends[0][0],
            ends[1][0],
            count,
            given="sample" if given == {"sample"} else "latent",
            label=labels[0] if isinstance(labels, list) else labels,
            steps=steps,
            guidance=guidance,
        )
    facts = walk.facts() | {"model": known.name} | stats_facts(walk.stats)
    brief = {"model": known.name, "stops": count}
    write(session.terminal, walk, out, columns or count, scale, facts, brief)


def preview_interval(model: Model, count: int, steps: int | None, size: tuple[int, int] | None = None) -> int:
    """Steps between previews that keep a progress bar moving; 0 where they would cost too much."""
    if not model.is_diffusion or count * int(np.prod(model.shape_at(size))) * 4 > _MAX_PREVIEW_BYTES:
        return 0
    return max(1, (steps or model.proto.diffusion.default_step_count) // 20)


def stats_facts(stats: Stats) -> dict[str, Any]:
    """What a call cost, as plain JSON types."""
    return {
        "stats": {
            "queue_s": stats.queue_s,
            "compute_s": stats.compute_s,
            "evaluations": stats.evaluations,
            "mean_batch_size": stats.mean_batch_size,
        }
    }


def write(
    terminal: Terminal,
    result: ImageBatch,
    paths: Sequence[Path],
    columns: int | None,
    scale: int | None,
    facts: dict[str, Any],
    brief: dict[str, Any],
) -> None:
    """Save a result to every path, and say so."""
    for path in paths:
        if path.suffix.lower() == ".gif":
            images.save_gif([images.grid(row[None], 1, scale) for row in result.uint8()], path)
        else:
            result.save(path, columns=columns, scale=scale)
    terminal.show(facts | {"out": [str(path) for path in paths]}, facts_table(brief, list(paths)))
