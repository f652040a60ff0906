"""`latentctl` against the fake server: what it prints, writes and exits with."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from fake_server import SHAPE, FakeServer, Fault, info, retry_after
from google.rpc import error_details_pb2
from latentd.reasons import Reason
from latentd_client import errors
from latentd_client.commands import app
from latentd_client.terminal import EXIT_CODES, exit_code
from PIL import Image
from typer.testing import CliRunner

Run = Callable[..., Any]


@pytest.fixture
def run(server: FakeServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Runs `latentctl` in an empty folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LATENTD_SERVER", server.target)
    monkeypatch.setenv("COLUMNS", "200")

    def invoke(*arguments: str) -> Any:
        return CliRunner().invoke(app, [str(argument) for argument in arguments])

    return invoke


def answer(result: Any) -> Any:
    """The JSON a successful command printed."""
    assert result.exit_code == 0, result.stderr
    return json.loads(result.stdout)


def test_help_names_every_command_and_exit_code(run: Run) -> None:
    """The help is complete: all commands, and what every exit code means."""
    shown = run("--help").stdout
    for command in ("models", "describe", "sample", "encode", "decode", "denoise", "score", "interpolate"):
        assert command in shown
    assert "130 interrupted" in " ".join(shown.split())


def test_the_priority_of_calls_is_an_option(run: Run, server: FakeServer) -> None:
    """It is sent with every call; an unknown one is refused with what there is."""
    assert run("--priority", "high", "sample", "toy", "-n", "1", "--out", "x.npz").exit_code == 0
    assert {seen.metadata.get("x-latentd-priority") for seen in server.seen} == {"high"}
    refused = run("--priority", "urgent", "models")
    assert refused.exit_code == 2
    assert "'high', 'normal', 'low'" in refused.stderr


def test_models_lists_what_there_is(run: Run) -> None:
    """One line a model for people, the full cards for programs."""
    shown = run("models").stdout
    assert [line.split()[:3] for line in shown.splitlines()[1:]] == [
        ["toy@1", "vae", "active"],
        ["toy-diffusion@1", "diffusion", "active"],
    ]
    assert [model["name"] for model in answer(run("--json", "models"))] == ["toy@1", "toy-diffusion@1"]


def test_describe_says_what_a_model_can_do(run: Run) -> None:
    """Methods, shapes, classes, samplers, metrics and the card are shown."""
    shown = run("describe", "toy-diffusion").stdout
    for fact in ("decode denoise encode sample", "[1, 4, 4] in [-1, 1]", "ddim ddpm", "3 class 3", "1.25", "A toy."):
        assert fact in shown
    assert answer(run("--json", "describe", "toy"))["latentSpec"]["shape"] == ["3"]


def test_describe_shows_the_whole_card(run: Run) -> None:
    """What methods answer or why not, the likelihood with its figures, both licences, and what it is held against."""
    lines = [" ".join(line.split()) for line in run("describe", "toy-diffusion").stdout.splitlines()]
    for line in (
        "sample a toy",
        "encode a code",
        "sample shape [1, 4, 4] in [-1, 1]",
        "score no: no critic",
        "likelihood lower bound of a probability mass, IWAE-50: -44.36 nats, 4 bits/dim. Of toys.",
        "licence Apache-2.0",
        "data licence CC-BY-4.0",
        "tuned from older@2 sha256:0a",
        "recall 0.625",
    ):
        assert line in lines


def test_sample_writes_pictures_and_arrays(run: Run) -> None:
    """The grid and the arrays hold the samples of the seed; the PNG says how it was made."""
    facts = answer(run("--json", "sample", "toy", "-n", 6, "--seed", 7, "--label", "3,1", "-o", "a.png", "-o", "a.npz"))
    assert facts["seed"] == 7
    assert facts["labels"] == [3, 1, 3, 1, 3, 1]
    assert facts["out"] == ["a.png", "a.npz"]
    with np.load("a.npz") as arrays:
        assert arrays["samples"].shape == (6, *SHAPE)
        assert arrays["latents"].shape == (6, 3)
        assert json.loads(str(arrays["facts"]))["request"]["seed"] == "7"
    with Image.open("a.png") as picture:
        assert picture.width > 200
        assert json.loads(picture.info["latentd"])["model"] == "toy@1"


def test_every_option_of_sample_is_sent(run: Run, server: FakeServer) -> None:
    """Options arrive in the request; those not given stay unset."""
    walk = ["--steps", 4, "--sampler", "ddpm", "--guidance", 2, "--guidance-interval", 1, 6, "--eta", 0.5]
    run("sample", "toy-diffusion", "-n", 2, "--label", "class 4", *walk, "--draw", "--first", 8, "-o", "a.npy")
    sent = server.requests("Sample")[0]
    assert sent.condition.class_label == 4
    assert (sent.diffusion.step_count, sent.diffusion.sampler) == (4, "ddpm")
    assert (sent.diffusion.guidance_scale, sent.diffusion.eta) == (2.0, 0.5)
    interval = sent.diffusion.guidance_interval
    assert (interval.min_timestep, interval.max_timestep) == (1, 6)
    assert (sent.output_mode, sent.first_sample_index) == (2, 8)
    run("sample", "toy", "--temperature", 0.5, "-o", "a.npy")
    sent = server.requests("Sample")[1]
    assert sent.temperature == 0.5
    assert sent.sample_count == 16
    assert not sent.HasField("diffusion")
    assert not sent.HasField("condition")


def test_each_draws_every_class_in_its_own_column(run: Run, server: FakeServer) -> None:
    """`--label each` means one of every class, and rows of as many images as there are classes."""
    run("sample", "toy", "--label", "each", "--scale", 1)
    assert list(server.requests("Sample")[0].condition.class_labels) == list(range(10))
    with Image.open("samples.png") as picture:
        assert picture.size == (10 * 6 - 2, 4)


def test_encode_decode_and_score_pass_files_along(run: Run) -> None:
    """What one command writes the next one reads, pictures included."""
    run("sample", "toy", "-n", 3, "--seed", 7, "-o", "a.npz")
    assert answer(run("--json", "encode", "toy", "a.npz"))["arrays"]["latents"] == [3, 3]
    assert answer(run("--json", "decode", "toy", "latents.npz", "--label", 3, "-o", "b.npz"))["shape"] == [3, *SHAPE]
    with np.load("a.npz") as arrays:
        expected = arrays["samples"].reshape(3, -1)
        scores = answer(run("--json", "score", "toy", "a.npz"))
    np.testing.assert_allclose(scores["values"], expected.sum(axis=1), rtol=1e-5)
    assert scores["kind"] == "evidence-lower-bound"
    np.testing.assert_allclose(scores["bits_per_dimension"], -np.array(scores["values"]) / 16 / np.log(2))
    Image.fromarray(np.full((4, 4), 255, np.uint8)).save("white.png")
    assert answer(run("--json", "score", "toy", "white.png", "white.png"))["values"] == [16.0, 16.0]


def test_denoise_writes_an_animation_of_every_step(run: Run) -> None:
    """The GIF repeats and has a frame for each step."""
    facts = answer(run("--json", "denoise", "toy-diffusion", "-n", 4, "--seed", 7, "--estimate", "--gif", "a.gif"))
    assert (facts["steps"], facts["seed"]) == (4, 7)
    with Image.open("a.gif") as animation:
        assert animation.info["loop"] == 0
        assert animation.n_frames >= 2


def test_interpolate_takes_seeds_latents_and_pictures(run: Run, server: FakeServer) -> None:
    """Ends may be seeds, arrays of latents or pictures; a GIF is an animation of the walk."""
    assert answer(run("--json", "interpolate", "toy", 1, 2, "-n", 4, "-o", "a.gif", "-o", "a.npz"))["shape"][0] == 4
    np.save("z.npy", np.ones((1, 3), np.float32))
    answer(run("--json", "interpolate", "toy", "z.npy", 2, "--label", 3))
    Image.fromarray(np.zeros((4, 4), np.uint8)).save("black.png")
    answer(run("--json", "interpolate", "toy", "black.png", 2, "--label", 3))
    assert len(server.requests("Encode")) == 1
    assert "encode the sample first" in run("interpolate", "toy", "black.png", "z.npy", "--label", 3).stderr


@pytest.mark.parametrize(
    ("reason", "code", "expected"),
    [
        (Reason.FIELD_INVALID, grpc.StatusCode.INVALID_ARGUMENT, 2),
        (Reason.MODEL_NOT_FOUND, grpc.StatusCode.NOT_FOUND, 3),
        (Reason.METHOD_UNSUPPORTED, grpc.StatusCode.FAILED_PRECONDITION, 4),
        (Reason.MODEL_FAILED, grpc.StatusCode.FAILED_PRECONDITION, 4),
        (Reason.DEADLINE_UNREACHABLE, grpc.StatusCode.DEADLINE_EXCEEDED, 6),
        (Reason.QUOTA_EXCEEDED, grpc.StatusCode.RESOURCE_EXHAUSTED, 7),
        (Reason.READER_TOO_SLOW, grpc.StatusCode.RESOURCE_EXHAUSTED, 7),
        (Reason.RUNTIME_FAILURE, grpc.StatusCode.INTERNAL, 8),
    ],
)
def test_failures_are_one_clear_line_and_a_code(
    run: Run, server: FakeServer, reason: Reason, code: grpc.StatusCode, expected: int
) -> None:
    """A failure prints what the server said, no traceback, and exits with the code of its kind; JSON has it all."""
    server.fail("Sample", *[Fault(code=code, message="so it is", details=[info(reason)])] * 2)
    result = run("sample", "toy", "-n", 1)
    assert (result.exit_code, result.stdout, result.stderr) == (expected, "", "error: so it is\n")
    result = run("--json", "sample", "toy", "-n", 1)
    error = json.loads(result.stderr)["error"]
    assert (error["reason"], error["code"], error["exit_code"]) == (reason, code.name, expected)
    assert result.stdout == ""


def test_every_kind_of_error_has_a_documented_exit_code() -> None:
    """No error falls through to a code that the help does not explain."""
    documented = {int(word) for word in EXIT_CODES.replace(",", " ").split() if word.isdecimal()}
    kinds = [*errors.BY_REASON.values(), *errors.BY_CODE.values(), errors.ProtocolError, errors.DeterminismChanged]
    assert {exit_code(kind()) for kind in kinds} | {exit_code(KeyboardInterrupt())} <= documented


def test_every_violation_has_its_line(run: Run, server: FakeServer) -> None:
    """Each wrong field is printed with its path and what is allowed."""
    bad = error_details_pb2.BadRequest(
        field_violations=[
            error_details_pb2.BadRequest.FieldViolation(field="sample_count", description="at most 1024"),
            error_details_pb2.BadRequest.FieldViolation(field="seed", description="not negative"),
        ]
    )
    fault = Fault(code=grpc.StatusCode.INVALID_ARGUMENT, details=[info(Reason.FIELD_INVALID), bad])
    server.fail("Sample", fault)
    assert run("sample", "toy").stderr.splitlines() == [
        "error: sample_count: at most 1024",
        "error: seed: not negative",
    ]


def test_an_unavailable_server_says_when_to_come_back(run: Run, server: FakeServer) -> None:
    """The server's hint is passed on to the person, and the exit code tells scripts to try later."""
    server.fail("Sample", Fault(details=[info(Reason.OVERLOADED), retry_after(60)]))
    result = run("--timeout", 20, "sample", "toy")
    assert result.exit_code == 5
    assert "try again in 60 s" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("sample toy --label cat", "toy@1 has no class 'cat'"),
        ("sample toy -n 2 --label 1,2,3", "3 classes for 2 samples"),
        ("sample toy -n 0", "sample_count: must be at least 1"),
        ("sample toy -o a", "the ending must be"),
        ("sample toy -o nowhere/a.png", "there is no folder nowhere"),
        ("encode toy a.npz -o z.png", "the ending must be .npz"),
        ("encode toy bad.npy", "bad.npy: samples must have shape [n, 1, 4, 4], has [5, 2]"),
        ("encode toy two.npz", "needs an array called samples, has a, b"),
        ("encode toy large.png", "must be 4 x 4 pixels, is 9 x 9"),
        ("denoise toy-diffusion --gif a.png", "the ending must be .gif"),
        ("--timeout -1 models", "timeout must be a positive number"),
        ("interpolate toy 1 2 -n 1", "count must be at least 2"),
    ],
)
def test_wrong_arguments_are_named(run: Run, arguments: str, message: str) -> None:
    """What is wrong on the command line or in a file is said in a line, with exit code 2."""
    np.save("bad.npy", np.zeros((5, 2)))
    np.savez("two.npz", a=np.zeros(2), b=np.zeros(2))
    Image.fromarray(np.zeros((9, 9), np.uint8)).save("large.png")
    result = run(*arguments.split())
    assert result.exit_code == 2
    assert message in result.stderr
    assert len(result.stderr.splitlines()) == 1


def test_nothing_is_asked_when_the_answer_could_not_be_written(run: Run, server: FakeServer) -> None:
    """A folder that is not there is noticed before the server works."""
    run("sample", "toy", "-o", "nowhere/a.png")
    assert server.seen == []


def test_a_missing_file_is_named(run: Run) -> None:
    """A file that does not exist is an error in one line."""
    result = run("score", "toy", "none.npy")
    assert result.exit_code == 1
    assert "none.npy" in result.stderr


def test_the_command_itself_runs(server: FakeServer, tmp_path: Path) -> None:
    """The real process, with its own streams, writes where it stands and exits with the documented codes."""
    environment = os.environ | {"LATENTD_SERVER": server.target}
    command = [sys.executable, "-m", "latentd_client.cli"]
    done = subprocess.run(
        [*command, "sample", "toy", "-n", "4", "--seed", "7"],
        cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert "samples.png" in done.stdout
    assert (tmp_path / "samples.png").stat().st_size > 0
    done = subprocess.run(
        [*command, "describe", "nope"],
        cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (3, "error: no model 'nope'\n")


@pytest.mark.parametrize("missing", ["typer", "rich"])
def test_a_base_install_says_what_the_command_needs(missing: str) -> None:
    """Without its extra the command names it, as `latentd-train` does: one line, and the exit code 2."""
    script = f"import sys; sys.modules['{missing}'] = None; from latentd_client.cli import main; main()"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2
    assert done.stderr == f"latentctl needs {missing}: pip install 'latentd[cli]'\n"
