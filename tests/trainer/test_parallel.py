"""Data-parallel training: two processes come to what one process comes to."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from latentd_trainer.checkpoint import CHECKPOINT_FILE, read_record
from latentd_trainer.cli import app
from latentd_trainer.shard import Shard
from safetensors.torch import load_file
from typer.testing import CliRunner

STEPS = 6
SETTINGS = {
    "vae": ["width=16", "hidden=16", "latent=3", "free_bits=0.05", "kl_warm_up=0"],
    "gan": ["width=16", "hidden=16", "latent=5"],
    "infogan": ["width=16", "hidden=16", "noise=5"],
    "diffusion": ["width=16", "timestep_count=20"],
    "helmholtz": ["lower=6", "upper=4", "draws=3"],
    "sigmoid_belief_net": ["lower=5", "upper=3", "sweeps=1"],
    "predictability_minimization": ["units=4", "hidden=16", "predictor_hidden=4"],
}
JOIN_AND_LEAVE = """
from pathlib import Path

import torch
from latentd_trainer.shard import join_group

for _ in range(3):
    with join_group(torch.device("cpu")) as shard:
        torch.optim.AdamW([torch.ones(1, requires_grad=True)])  # imports more of torch.distributed
        assert shard.mean(torch.tensor(float(shard.rank))) == 0.5
    threads = [path.read_text().strip() for path in Path("/proc/self/task").glob("*/comm")]
    assert threads and not [name for name in threads if "gloo" in name], threads
"""


OLDER = ("sigmoid_belief_net", "helmholtz", "predictability_minimization")
"""They train in seconds, and torchrun takes longer to start; the loop they share with the others is tested by those."""


def torchrun(*arguments: str | Path) -> None:
    """Run a program as two processes; raises CalledProcessError if one fails."""
    subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *arguments],
        check=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        timeout=300,
    )


@pytest.mark.parametrize(
    "family", [pytest.param(name, marks=[pytest.mark.soak] if name in OLDER else []) for name in SETTINGS]
)
def test_two_processes_train_what_one_does(tmp_path: Path, family: str) -> None:
    """Under torchrun, with the same global batch, weights, averages and logged losses agree to float tolerance."""
    settings = [f"steps={STEPS}", "batch_size=8", *SETTINGS[family]]
    options = ["--device", "cpu", "--seed", "5", *(part for setting in settings for part in ("--set", setting))]
    assert CliRunner().invoke(app, ["fit", family, "--out", str(tmp_path / "one"), *options]).exit_code == 0
    torchrun("-m", "latentd_trainer", "fit", family, "--out", tmp_path / "two", *options)
    one, two = (load_file(tmp_path / name / CHECKPOINT_FILE) for name in ("one", "two"))
    assert set(one) == set(two)
    for key, tensor in one.items():
        if not key.startswith("updaters/"):
            torch.testing.assert_close(tensor, two[key], atol=5e-5, rtol=1e-3, msg=key)
    logs = [
        [json.loads(line)["losses"] for line in (tmp_path / name / "log.jsonl").read_text().splitlines()]
        for name in ("one", "two")
    ]
    assert len(logs[0]) == len(logs[1]) == STEPS
    for ours, theirs in zip(*logs, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4, abs=1e-6)
    # Shares round in another way when they are summed, so the number of processes belongs to the record.
    assert [read_record(tmp_path / name).processes for name in ("one", "two")] == [1, 2]


def test_a_group_that_is_left_leaves_no_thread_and_another_can_be_joined(tmp_path: Path) -> None:
    """No thread of gloo lives on to meet the interpreter's end, and the addresses of old groups are not taken again."""
    program = tmp_path / "program.py"
    program.write_text(JOIN_AND_LEAVE)
    torchrun(program)


def test_shares_are_equal_and_cover_the_batch() -> None:
    """Every row is in one process's share."""
    whole = torch.arange(12).reshape(6, 2)
    shares = [Shard(rank, 3).rows(whole) for rank in range(3)]
    assert torch.equal(torch.cat(shares), whole)
    assert {len(share) for share in shares} == {2}
    with pytest.raises(ValueError, match="a batch of 6 does not divide by 4 processes"):
        Shard(0, 4).rows(whole)
