"""The training loop: stopping, going on, and what survives when things go wrong."""

import errno
import io
import json
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from latentd_trainer import checkpoint, train
from latentd_trainer.checkpoint import CHECKPOINT_FILE, RunRecord, read_record
from latentd_trainer.data import Dataset, load
from latentd_trainer.families import Batch, Family, Moment
from latentd_trainer.families.vae import Vae
from latentd_trainer.progress import Display
from PIL import Image
from rich.console import Console
from safetensors import safe_open
from safetensors.torch import load_file

TINY = {
    "vae": {"width": 8, "hidden": 16, "latent": 3},
    "gan": {"width": 8, "hidden": 16, "latent": 5, "inversion": 0.6},
    "infogan": {"width": 8, "hidden": 16, "codes": 3, "noise": 5},
    "vae_gan": {"width": 8, "hidden": 16, "latent": 3, "discriminator_steps": 5},
    "diffusion": {"width": 8, "timestep_count": 20},
    "helmholtz": {"lower": 6, "upper": 4, "draws": 3},
    "sigmoid_belief_net": {"lower": 5, "upper": 3, "sweeps": 1, "served_sweeps": 2},
    "predictability_minimization": {"units": 4, "hidden": 16, "predictor_hidden": 4},
}
CPU = torch.device("cpu")


@pytest.fixture(scope="module", name="digits")
def digits_of_sklearn() -> Dataset:
    return load("digits")


def record_of(name: str, digits: Dataset, steps: int = 20) -> RunRecord:
    """A tiny run's record."""
    settings = TINY[name] | {"steps": steps, "batch_size": 8}
    return RunRecord(name, settings, "digits", digits.info, 3, "fp32", 1, 1, train.versions())


def fit(directory: Path, record: RunRecord, digits: Dataset, *, interval: int = 100, resume: bool = False) -> str:
    """Train, and return what was printed."""
    console = Console(width=200, file=io.StringIO())
    train.fit(directory, record, digits, device=CPU, interval=interval, resume=resume, display=Display(console))
    return console.file.getvalue()


def read_log(directory: Path) -> list[dict[str, Any]]:
    """The lines of a run's log."""
    return [json.loads(line) for line in (directory / "log.jsonl").read_text().splitlines()]


def at_step(monkeypatch: pytest.MonkeyPatch, family: type[Family], step: int, action: Callable[[], None]) -> None:
    """Do something in the middle of a step."""
    whole = family.step

    def interrupted(self: Family, batch: Batch, moment: Moment) -> dict[str, torch.Tensor]:
        if moment.step == step:
            action()
        return whole(self, batch, moment)

    monkeypatch.setattr(family, "step", interrupted)


@pytest.mark.parametrize("name", TINY)
def test_a_resumed_run_is_bit_for_bit_the_uninterrupted_one(
    name: str, digits: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """20 steps equal 10 steps, SIGTERM and 10 more in a fresh state: weights, averages, optimiser, losses, pictures."""
    record = record_of(name, digits)
    fit(tmp_path / "whole", record, digits)
    with monkeypatch.context() as patch:
        at_step(patch, checkpoint.load_family(name), 9, lambda: os.kill(os.getpid(), signal.SIGTERM))
        with pytest.raises(train.InterruptedTraining, match="SIGTERM after step 10"):
            fit(tmp_path / "parts", record, digits)
    torch.manual_seed(999)  # a new process would have another global state
    fit(tmp_path / "parts", read_record(tmp_path / "parts"), digits, resume=True)

    whole, parts = (load_file(tmp_path / run / CHECKPOINT_FILE) for run in ("whole", "parts"))
    assert set(whole) == set(parts)
    assert any(key.startswith("updaters/") for key in whole)
    for key, tensor in whole.items():
        assert tensor.numpy().tobytes() == parts[key].numpy().tobytes(), key
    logs = [[(line["step"], line["losses"]) for line in read_log(tmp_path / run)] for run in ("whole", "parts")]
    assert logs[0] == logs[1]
    assert [step for step, _ in logs[0]] == list(range(1, 21))
    assert (tmp_path / "whole" / "samples.png").read_bytes() == (tmp_path / "parts" / "samples.png").read_bytes()


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize("name", TINY)
def test_mixed_precision_resumes_bit_for_bit(
    name: str, precision: str, digits: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Half-precision arithmetic keeps fp32 weights and finite losses, and its loss scale survives a restart.

    The CPU stands in for CUDA, which alone is offered to people.
    """
    record = RunRecord(**{**vars(record_of(name, digits, steps=6)), "precision": precision})
    fit(tmp_path / "whole", record, digits)
    with monkeypatch.context() as patch:
        at_step(patch, checkpoint.load_family(name), 2, lambda: os.kill(os.getpid(), signal.SIGTERM))
        with pytest.raises(train.InterruptedTraining):
            fit(tmp_path / "parts", record, digits)
    fit(tmp_path / "parts", record, digits, resume=True)
    whole, parts = (load_file(tmp_path / run / CHECKPOINT_FILE) for run in ("whole", "parts"))
    fp32 = load_fp32(tmp_path, record, digits)
    for key, tensor in whole.items():
        assert tensor.dtype == torch.float32
        assert torch.equal(tensor, parts[key]), key
    assert any(not torch.equal(tensor, fp32[key]) for key, tensor in whole.items())
    with safe_open(tmp_path / "parts" / CHECKPOINT_FILE, "pt") as file:
        scalers = json.loads(file.metadata()["latentd"])["scalers"]
    assert all(bool(state) == (precision == "fp16") for state in scalers.values())


def load_fp32(directory: Path, record: RunRecord, digits: Dataset) -> dict[str, torch.Tensor]:
    """What the same run comes to in fp32."""
    fit(directory / "fp32", RunRecord(**{**vars(record), "precision": "fp32"}), digits)
    return load_file(directory / "fp32" / CHECKPOINT_FILE)


def test_another_seed_trains_other_weights(digits: Dataset, tmp_path: Path) -> None:
    """The seed of the record is the seed of the weights and of the batches."""
    record = record_of("vae", digits, steps=2)
    fit(tmp_path / "a", record, digits)
    fit(tmp_path / "b", checkpoint.RunRecord(**{**vars(record), "seed": 4}), digits)
    one, other = (load_file(tmp_path / run / CHECKPOINT_FILE) for run in "ab")
    key = "modules/networks/encoder.head.weight"
    assert not torch.equal(one[key], other[key])


def test_a_run_leaves_its_record_log_and_pictures(digits: Dataset, tmp_path: Path) -> None:
    """The directory of a run holds what is documented, and nothing else."""
    printed = fit(tmp_path / "run", record_of("vae", digits), digits)
    assert {path.name for path in (tmp_path / "run").iterdir()} == {
        ".lock",
        "config.json",
        "checkpoint.safetensors",
        "log.jsonl",
        "loss.png",
        "samples.png",
    }
    for picture in ("loss.png", "samples.png"):
        assert np.asarray(Image.open(tmp_path / "run" / picture)).std() > 0
    assert read_record(tmp_path / "run") == record_of("vae", digits)
    assert checkpoint.load_run(tmp_path / "run").step == 20
    assert "vae  20/20  loss" in printed
    assert "steps/s" in printed
    assert "s left" in printed


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_saves_and_stops(
    number: int, status: int, digits: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The step in progress is finished and saved, the exit status tells the signal, and the old handlers are back."""
    before = signal.getsignal(number)
    at_step(monkeypatch, Vae, 4, lambda: os.kill(os.getpid(), number))
    with pytest.raises(train.InterruptedTraining) as caught:
        fit(tmp_path, record_of("vae", digits), digits)
    assert caught.value.exit_status == status
    assert checkpoint.load_run(tmp_path).step == 5
    assert signal.getsignal(number) is before


def test_a_second_signal_does_not_wait(digits: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C twice ends training at once, by Python's own handler."""

    def twice() -> None:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    at_step(monkeypatch, Vae, 4, twice)
    with pytest.raises(KeyboardInterrupt):
        fit(tmp_path, record_of("vae", digits), digits)


def test_signals_that_torchrun_repeats_do_not_keep_it_from_saving() -> None:
    """Among several processes a second signal is one more in the list, and the old handler is back afterwards."""
    before = signal.getsignal(signal.SIGINT)
    with train._caught_signals(2) as received:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
    assert received == [signal.SIGINT, signal.SIGINT]
    assert signal.getsignal(signal.SIGINT) is before


def test_what_a_killed_process_left_is_removed(
    digits: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed in the middle of a checkpoint, a run goes on from the one before and the half-written file is gone."""
    script = """if True:
        import os, signal, sys
        from pathlib import Path
        from latentd_trainer.checkpoint import write_whole
        os.fsync = lambda descriptor: os.kill(os.getpid(), signal.SIGKILL)
        write_whole(Path(sys.argv[1]), b"half")
    """
    record = record_of("vae", digits)
    with monkeypatch.context() as patch:
        at_step(patch, Vae, 9, lambda: os.kill(os.getpid(), signal.SIGTERM))
        with pytest.raises(train.InterruptedTraining):
            fit(tmp_path, record, digits)
    killed = subprocess.run([sys.executable, "-c", script, str(tmp_path / CHECKPOINT_FILE)], check=False)
    assert killed.returncode == -signal.SIGKILL
    assert len(list(tmp_path.glob(".*.partial"))) == 1
    assert checkpoint.load_run(tmp_path).step == 10
    fit(tmp_path, record, digits, resume=True)
    assert not list(tmp_path.glob(".*.partial"))
    assert checkpoint.load_run(tmp_path).step == 20


def test_a_full_disk_stops_with_the_last_checkpoint_intact(
    digits: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """When the disk is full while saving step 10, step 5 is still there, whole, and no stray file is left."""
    real = os.fsync
    synced = []

    def fsync(descriptor: int) -> None:
        name = os.readlink(f"/proc/self/fd/{descriptor}")
        if CHECKPOINT_FILE in name:
            synced.append(name)
            if len(synced) == 2:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(train.TrainingError, match=r"(?s)No space left on device.*the last checkpoint, .* is intact"):
        fit(tmp_path, record_of("vae", digits), digits, interval=5)
    assert checkpoint.load_run(tmp_path).step == 5
    assert not list(tmp_path.glob(".*.partial"))
    monkeypatch.undo()
    fit(tmp_path, read_record(tmp_path), digits, resume=True)
    assert checkpoint.load_run(tmp_path).step == 20


def test_a_log_that_cannot_grow_stops_training(digits: Dataset, tmp_path: Path) -> None:
    """When the system refuses to write more, here by a limit on the size of files, training stops and says why."""
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    record = record_of("vae", digits, steps=60)
    fit_until_full = pytest.raises(train.TrainingError, match=r"File too large.*there is no checkpoint yet")
    resource.setrlimit(resource.RLIMIT_FSIZE, (2048, limit[1]))
    try:
        with fit_until_full:
            fit(tmp_path, record, digits)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert not (tmp_path / CHECKPOINT_FILE).exists()


def test_nan_loss_stops_with_the_last_checkpoint_intact(
    digits: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A loss that is not finite stops the run, names the step, and leaves the checkpoint of before."""
    whole = Vae.step

    def broken(self: Vae, batch: Batch, moment: Moment) -> dict[str, torch.Tensor]:
        if moment.step == 7:
            next(iter(self.networks.parameters())).data.fill_(float("nan"))
        return whole(self, batch, moment)

    monkeypatch.setattr(Vae, "step", broken)
    with pytest.raises(
        train.TrainingError, match=r"step 8: a loss is not finite \(loss nan.* is intact.*learning_rate"
    ):
        fit(tmp_path, record_of("vae", digits), digits, interval=5)
    assert checkpoint.load_run(tmp_path).step == 5


def test_weights_that_are_not_finite_are_never_saved(
    digits: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A step whose loss was finite but whose weights are not does not replace the checkpoint of before."""
    whole = Vae.step

    def broken(self: Vae, batch: Batch, moment: Moment) -> dict[str, torch.Tensor]:
        losses = whole(self, batch, moment)
        if moment.step == 9:
            next(iter(self.networks.parameters())).data.fill_(float("inf"))
        return losses

    monkeypatch.setattr(Vae, "step", broken)
    with pytest.raises(checkpoint.CheckpointError, match="holds NaN or infinity after step 10"):
        fit(tmp_path, record_of("vae", digits), digits, interval=5)
    assert checkpoint.load_run(tmp_path).step == 5


def test_a_log_that_ran_ahead_of_the_checkpoint_is_cut_back(digits: Dataset, tmp_path: Path) -> None:
    """Lines of steps after the checkpoint, and half a line, are dropped when a killed run goes on."""
    record = record_of("vae", digits)
    fit(tmp_path, record, digits)
    family = checkpoint.build_family(record.family, record.settings, record.info, record.seed)
    checkpoint.restore(tmp_path, family)
    checkpoint.save(tmp_path, family, 12)
    with open(tmp_path / "log.jsonl", "a") as file:
        file.write('{"step": 21, "los')
    fit(tmp_path, record, digits, resume=True)
    assert [line["step"] for line in read_log(tmp_path)] == list(range(1, 21))


def test_resuming_a_finished_run_changes_nothing(digits: Dataset, tmp_path: Path) -> None:
    """There is nothing left to do, and the checkpoint stays as it was."""
    record = record_of("vae", digits, steps=3)
    fit(tmp_path, record, digits)
    before = (tmp_path / CHECKPOINT_FILE).read_bytes()
    fit(tmp_path, record, digits, resume=True)
    assert (tmp_path / CHECKPOINT_FILE).read_bytes() == before


@pytest.mark.parametrize(
    ("device", "precision", "message"),
    [
        ("cpu", "bf16", "precision bf16 needs a CUDA device"),
        ("cpu", "fp16", "precision fp16 needs a CUDA device"),
        ("cpu", "int8", "must be one of fp32, bf16, fp16"),
        ("tpu", "fp32", "must be auto, cpu, cuda or cuda:N"),
        ("cpu:1", "fp32", "must be auto, cpu, cuda or cuda:N"),
        ("cuda:99", "fp32", r"sees \d+ CUDA devices here"),
    ],
)
def test_devices_and_precisions_that_are_not_there(device: str, precision: str, message: str) -> None:
    """What cannot be trained on is refused, never replaced by something else."""
    with pytest.raises(ValueError, match=message):
        train.choose_device(device, precision)


def test_auto_takes_the_cpu_where_there_is_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a CUDA device `auto` is the CPU."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert train.choose_device("auto", "fp32") == CPU
