"""`make demo`: train VAE, GAN and diffusion on real handwritten digits, serve them, and draw with the client.

Each stage is a command that anyone can run by hand; bundles that are there already are kept. Pictures and logs go
to `out/`, bundles to `models/`, training runs to `runs/`.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from latentd.names import BUNDLE_FILE
from latentd_client import Client, LatentdError, Preview, Samples
from latentd_client.images import grid, save_gif, to_uint8
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parent.parent
MODELS, RUNS, OUT = ROOT / "models", ROOT / "runs", ROOT / "out"
FAMILIES = ("diffusion", "gan", "vae")  # the longest first, since two run at a time
SHOWN = ("frechet-ratio", "precision", "recall", "coverage", "label-agreement", "iwae-500")
HOW = ("-50-steps", "-mean", "")  # what a family is measured by, where there is more than one way to sample it
console = Console(highlight=False, soft_wrap=True, width=None if sys.stdout.isatty() else 110)


def main() -> int:
    """Run every stage; a failure says which command failed and where its log is."""
    started = time.monotonic()
    OUT.mkdir(exist_ok=True)
    try:
        train_missing()
        with server() as target, Client(target) as client:
            show_models(client)
            draw(client)
    except (RuntimeError, LatentdError) as error:
        console.print(f"demo: {error}", style="red", markup=False)
        return 1
    except KeyboardInterrupt:
        console.print("demo: stopped; `make demo` goes on from here")
        return 130
    console.print(f"\nDone in {time.monotonic() - started:.0f} s. `make serve` keeps the server running; then try")
    console.print("  .venv/bin/latentctl sample digits-diffusion -n 16 --label each --out out/mine.png")
    return 0


# ---- train ---------------------------------------------------------------------------------------------------------


def train_missing() -> None:
    """Fit, export, verify and evaluate the models that have no bundle, two at a time."""
    missing = [family for family in FAMILIES if not is_evaluated(MODELS / f"digits-{family}" / "1" / BUNDLE_FILE)]
    for family in FAMILIES:
        if family not in missing:
            console.print(f"[green]kept[/]     models/digits-{family}/1")
    stopped = threading.Event()

    def train_in_turn(family: str) -> str:
        if stopped.is_set():  # what waited for its turn need not begin
            return f"[yellow]left out[/] digits-{family}"
        try:
            return train(family)
        except BaseException:
            stopped.set()
            raise

    with ThreadPoolExecutor(max_workers=2) as pool:
        try:
            for done in as_completed([pool.submit(train_in_turn, family) for family in missing]):
                console.print(done.result())
        finally:
            stopped.set()


def is_evaluated(bundle: Path) -> bool:
    """Whether a bundle is there and has been measured, which is the last thing done to it."""
    return bundle.exists() and bool(json.loads(bundle.read_text())["model"].get("card", {}).get("metrics"))


def train(family: str) -> str:
    """One family, from nothing to a checked bundle; says what came of it."""
    name, log = f"digits-{family}", OUT / f"train-{family}.log"
    log.unlink(missing_ok=True)
    started = time.monotonic()
    console.print(f"[yellow]training[/] {name} (follow it in {log.relative_to(ROOT)})")
    run, bundle = str(RUNS / name), str(MODELS / name / "1")
    trainer("fit", family, "--data", "digits", "--out", run, "--seed", "0", "--resume", log=log)
    fitted = time.monotonic() - started
    if not Path(bundle).exists():
        trainer("export", run, "--models", str(MODELS), "--name", name, log=log)
    trainer("verify", bundle, log=log)
    trainer("evaluate", bundle, "--cache", str(RUNS / "classifiers"), log=log)
    total = time.monotonic() - started
    return f"[green]trained[/]  {name} in {fitted:.0f} s; exported, verified and evaluated after {total:.0f} s"


def trainer(*arguments: str, log: Path) -> None:
    """Run `latentd-train`, appending what it says to a log."""
    command = [str(Path(sys.executable).with_name("latentd-train")), *arguments]
    # One thread each: two families train side by side, and small networks gain nothing from more.
    environment = os.environ | {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive", "MPLBACKEND": "Agg"}
    with log.open("a") as output:
        status = subprocess.run(command, stdout=output, stderr=output, env=environment, check=False).returncode
    if status:
        tail = "\n".join(log.read_text().splitlines()[-15:])
        raise RuntimeError(f"latentd-train {' '.join(arguments)} failed ({status}); {log} ends with\n{tail}")


# ---- serve ---------------------------------------------------------------------------------------------------------


@contextmanager
def server() -> Iterator[str]:
    """A server on loopback, ready; stopped by SIGTERM, which drains it."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        target = f"127.0.0.1:{probe.getsockname()[1]}"
    command = [sys.executable, "-m", "latentd_server", "--models", str(MODELS), "--listen", target]
    log = (OUT / "server.log").open("w")
    process = subprocess.Popen([*command, "--http", "127.0.0.1:0"], stdout=log, stderr=log)
    try:
        started = time.monotonic()
        wait_until_serving(target, process)
        console.print(f"[green]serving[/]  {target} after {time.monotonic() - started:.1f} s")
        yield target
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(timeout=90)
        log.close()


def wait_until_serving(target: str, process: subprocess.Popen[bytes]) -> None:
    """Until the server lists all models as active."""
    with Client(target) as client:
        for _ in range(300):
            if process.poll() is not None:
                raise RuntimeError(f"the server ended with {process.returncode}; see {OUT / 'server.log'}")
            try:
                states = [model.state for model in client.models(timeout=5)]
            except LatentdError:
                states = []
            if states and "loading" not in states:
                return
            time.sleep(0.1)
    raise RuntimeError("the server did not come up within 30 s")


# ---- draw ----------------------------------------------------------------------------------------------------------


def show_models(client: Client) -> None:
    """A table of what is served and how good it is."""
    table = Table("model", *SHOWN)
    for model in client.models():
        cells = []
        for name in SHOWN:
            found = [model.metrics[name + how] for how in HOW if name + how in model.metrics]
            cells.append(f"{found[0]:.3f}" if found else "-")
        table.add_row(model.name, *cells)
    console.print(table)
    console.print("diffusion by 50 steps, VAE by its mean; more in the report.md beside each bundle")


def saved(path: Path, what: str) -> None:
    """Say which picture shows what."""
    console.print(f"  {path.relative_to(ROOT)!s:<28} {what}")


def draw(client: Client) -> None:
    """Every RPC once, on pictures."""
    console.print("pictures:")
    by_class = [digit for digit in range(10) for _ in range(10)]
    grids: dict[str, Samples] = {}
    for family in FAMILIES:
        grids[family] = client.sample(f"digits-{family}", seed=7, label=by_class)
        saved(grids[family].save(OUT / f"samples-{family}.png", columns=10), f"Sample: digits-{family}, a row a class")

    again = client.reproduce(grids["diffusion"])
    parts = [client.sample("digits-diffusion", 1, seed=7, label=by_class[i], first_index=i) for i in (0, 42, 99)]
    same = again.array.tobytes() == grids["diffusion"].array.tobytes() and all(
        part.array[0].tobytes() == grids["diffusion"].array[i].tobytes()
        for part, i in zip(parts, (0, 42, 99), strict=True)
    )
    if not same:
        raise RuntimeError("the same seed gave other bytes")

    frames = list(client.sample_stream("digits-diffusion", seed=3, label=list(range(10)), steps=50, previews=2))
    path = OUT / "denoising.gif"
    save_gif(denoising(frames), path)
    saved(path, "Sample with previews: ten digits appear, 50 steps")

    pictures = grids["diffusion"].array[::10]
    latents = client.encode("digits-vae", pictures).latents
    decoded = client.decode("digits-vae", latents, label=list(range(10)))
    path = OUT / "reconstruction-vae.png"
    grid(pixels(pictures, decoded.array), columns=10).save(path)
    saved(path, "Encode and Decode: diffusion samples above, the VAE's reconstruction below")

    noise = client.encode("digits-diffusion", pictures, label=list(range(10)), steps=50)
    back = client.decode("digits-diffusion", noise.latents, label=list(range(10)), steps=50)
    path = OUT / "inversion-diffusion.png"
    grid(pixels(pictures, noise.latents.clip(-1, 1), back.array), columns=10).save(path)
    error = float(np.abs(back.array - pictures).mean())
    saved(path, f"Encode and Decode: DDIM inversion to noise and back, mean error {error:.3f} of a range of 2")

    walks = [client.interpolate("digits-vae", latents[2], latents[7], 10, label=digit).array for digit in range(10)]
    path = OUT / "interpolation-vae.png"
    grid(pixels(*walks), columns=10).save(path)
    saved(path, "Decode between two latents (slerp), a row a class: the style changes, the digit stays")

    state = np.random.default_rng(0).standard_normal((10, 1, 8, 8), np.float32)
    seen = []
    timesteps = list(range(999, -1, -111))
    for now, after in zip(timesteps, [*timesteps[1:], -1], strict=True):
        step = client.denoise_step("digits-diffusion", state, now, after, label=list(range(10)))
        assert step.state is not None
        state = step.state
        seen.append(step.denoised)
    path = OUT / "denoise-steps.png"
    grid(pixels(*seen), columns=10).save(path)
    saved(path, "DenoiseStep: the estimate of x0 after each of ten client-driven steps")

    real = client.score("digits-gan", pictures, label=list(range(10))).array
    static = client.score(
        "digits-gan", np.random.default_rng(0).uniform(-1, 1, pictures.shape), label=list(range(10))
    ).array
    bound = client.score("digits-vae", pictures, label=list(range(10)), seed=0).array
    console.print(
        f"Score: the GAN's critic gives diffusion samples P(real) {real.mean():.2f}, static {static.mean():.2f};"
    )
    console.print(f"       the VAE bounds their ln p(x | y) at {bound.mean():.1f} nats on average")
    console.print("[green]same seed, same bytes[/]: 100 samples again, and three of them alone, agree to the bit")


def pixels(*rows: np.ndarray) -> np.ndarray:
    """Rows of images [n, 1, 8, 8] in [-1, 1], one below the other, as bytes."""
    return to_uint8(np.concatenate(rows), (-1.0, 1.0))


def denoising(events: Sequence[object]) -> list:
    """Previews of ten digits side by side, frame by frame, and the result."""
    frames: dict[int, np.ndarray] = {}
    for event in events:
        if isinstance(event, Preview):
            frame = frames.setdefault(event.completed_steps, np.full((10, 1, 8, 8), -1.0, np.float32))
            frame[list(event.indices)] = event.array
        elif isinstance(event, Samples):
            frame = frames.setdefault(10**6, np.full((10, 1, 8, 8), -1.0, np.float32))
            frame[list(event.indices)] = event.array
    return [grid(pixels(frames[step]), columns=10) for step in sorted(frames)]


if __name__ == "__main__":
    sys.exit(main())
