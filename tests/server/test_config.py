"""Settings: one schema, four sources, every problem at once, and a help text that tells all."""

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from latentd_server import config as settings
from latentd_server.config import Config


@pytest.fixture
def models(tmp_path: Path) -> Path:
    directory = tmp_path / "models"
    directory.mkdir()
    return directory


def problems(*arguments: str, **environment: str) -> list[str]:
    """What `read` complains of."""
    with pytest.raises(settings.ConfigError) as caught:
        settings.read(arguments, environment)
    return caught.value.problems


def run(cwd: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """The command itself, in a directory without models."""
    clean = {key: value for key, value in os.environ.items() if not key.startswith("LATENTD_")}
    return subprocess.run(
        [sys.executable, "-m", "latentd_server", *arguments],
        cwd=cwd,
        env={**clean, "COLUMNS": "100", **environment},
        capture_output=True,
        text=True,
        timeout=60,
    )


def test_a_flag_beats_the_environment_beats_the_file_beats_the_default(models: Path, tmp_path: Path) -> None:
    """Each source decides what no stronger one does."""
    file = tmp_path / "latentd.toml"
    file.write_text(f'models = "{models}"\nmax_samples = 1\nmax_steps = 1\nthreads = 1\n')
    environment = {"LATENTD_MAX_SAMPLES": "2", "LATENTD_MAX_STEPS": "2", "LATENTD_CONFIG": str(file)}
    config = settings.read(["--max-samples=3"], environment)
    assert (config.max_samples, config.max_steps, config.threads, config.max_batch_rows) == (3, 2, 1, 0)
    assert config.models == models
    other = tmp_path / "other.toml"
    other.write_text(f'models = "{models}"\nthreads = 7\n')
    assert settings.read(["--config", str(other)], environment).threads == 7


def test_the_defaults_are_those_of_the_documentation(models: Path) -> None:
    """Ports, limits and drain as the design and the deployment rely on them."""
    config = Config(models=models)
    assert (config.listen, config.http, config.health, config.admin) == ("127.0.0.1:8500", "127.0.0.1:9090", "", "")
    assert (config.device, config.drain_seconds, config.max_batch_rows) == ("auto", 60.0, 0)
    assert (config.max_samples, config.max_steps, config.max_message_mib) == (1024, 1000, 64)
    assert config.reader_timeout == 30.0
    assert (config.max_backlog, config.max_model_backlog, config.max_caller_backlog) == (1_000_000, 750_000, 500_000)


def test_callers_weigh_what_is_set(models: Path, tmp_path: Path) -> None:
    """As NAME=WEIGHT in a flag or a variable, as a table in the file; names may hold an equals sign."""
    flags = ["--models", str(models), "--caller-weights", "web=4, batch=0.5,a=b=2"]
    assert settings.read(flags, {}).caller_weights == {"web": 4.0, "batch": 0.5, "a=b": 2.0}
    file = tmp_path / "latentd.toml"
    file.write_text(f'models = "{models}"\n[caller_weights]\nweb = 3\n')
    assert settings.read(["--config", str(file)], {}).caller_weights == {"web": 3.0}
    assert settings.read(["--models", str(models)], {"LATENTD_CALLER_WEIGHTS": "x=1"}).caller_weights == {"x": 1.0}


BAD = [
    (["--caller-weights", "web"], {}, "--caller-weights: must be NAME=WEIGHT with commas between"),
    (["--caller-weights", "web=1,web=2"], {}, "--caller-weights: must be NAME=WEIGHT with commas between, each name"),
    (["--caller-weights", "web=0"], {}, "--caller-weights web: must be greater than or equal to 0.001; got '0'"),
    (["--caller-weights", "web=much"], {}, "--caller-weights web: must be a valid number"),
    (["--listen", "8500"], {}, "--listen: must be HOST:PORT"),
    (["--listen", "127.0.0.1:70000"], {}, "--listen: must be HOST:PORT"),
    (["--http", ""], {}, "--http: must be HOST:PORT"),
    (["--device", "tpu"], {}, "--device: must be auto, cpu or cuda:N; got 'tpu'"),
    ([], {"LATENTD_THREADS": "many"}, "LATENTD_THREADS: must be a valid integer"),
    ([], {"LATENTD_MAX_BATCH_ROWS": "1"}, "LATENTD_MAX_BATCH_ROWS: must be 0, or from 2 to 4096, since"),
    (["--drain-seconds", "-1"], {}, "--drain-seconds: must be greater than or equal to 0"),
    (["--drain-seconds", "nan"], {}, "--drain-seconds: must be"),
    (["--reader-timeout", "-1"], {}, "--reader-timeout: must be greater than or equal to 0"),
    (["--log-level", "loud"], {}, "--log-level: must be 'debug', 'info', 'warning' or 'error'"),
    (["--models", "/no/such/place"], {}, "--models: must be a directory that exists; got '/no/such/place'"),
    (["--frobnicate"], {}, "--frobnicate: no such flag"),
    (["--config", "/no/such.toml"], {}, "/no/such.toml: cannot be read"),
]


@pytest.mark.parametrize(("arguments", "environment", "expected"), BAD, ids=[case[2][:40] for case in BAD])
def test_a_bad_setting_is_named_by_where_it_was_set(
    arguments: list[str], environment: dict[str, str], expected: str, models: Path
) -> None:
    """The report names the flag, variable or file key, and says what is allowed."""
    found = problems(*(["--models", str(models)] if "--models" not in arguments else []), *arguments, **environment)
    assert any(problem.startswith(expected) for problem in found), found
    assert len(found) == 1


def test_a_missing_models_directory_is_named_though_nobody_set_it(tmp_path: Path, monkeypatch: Any) -> None:
    """The default is checked too."""
    monkeypatch.chdir(tmp_path)
    assert problems() == ["--models (default): must be a directory that exists; got 'models'"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("max_sampels = 1", "max_sampels in {file}: no such setting; did you mean max_samples?"),
        ("max_samples = 'x'", "max_samples in {file}: must be a valid integer"),
        ("max_samples = ", "{file}: is not TOML"),
        ("[server]\nlisten = 'x:1'", "server in {file}: no such setting"),
    ],
)
def test_a_bad_file_is_named(text: str, expected: str, models: Path, tmp_path: Path) -> None:
    """Unknown keys, wrong values and broken syntax each say where."""
    file = tmp_path / "latentd.toml"
    file.write_text(text)
    (problem,) = problems("--models", str(models), "--config", str(file))
    assert problem.startswith(expected.format(file=file))


def test_variables_that_are_no_settings_are_ignored(models: Path) -> None:
    """Kubernetes puts LATENTD_PORT and its like into pods beside a Service of that name."""
    environment = {"LATENTD_PORT": "tcp://10.0.0.1:8500", "LATENTD_SERVICE_HOST": "10.0.0.1"}
    assert settings.read(["--models", str(models)], environment) == Config(models=models)


def test_the_command_lists_every_problem_and_exits_2(tmp_path: Path) -> None:
    """From all sources, in one go, before anything is opened or loaded."""
    file = tmp_path / "latentd.toml"
    file.write_text("max_steps = 0\nlistn = 'x'\n")
    done = run(tmp_path, "--config", str(file), "--device=tpu", "--bogus", LATENTD_THREADS="-1")
    assert done.returncode == 2
    assert done.stdout == ""
    lines = done.stderr.splitlines()
    assert lines[0] == "latentd: 6 problems with the settings"
    assert [line.split(":")[0].split(" in ")[0].strip() for line in lines[1:]] == [
        "--bogus",
        "--models (default)",
        "--device",
        "LATENTD_THREADS",
        "max_steps",
        "listn",
    ]


def test_help_tells_every_flag_its_variable_its_unit_and_its_default(tmp_path: Path) -> None:
    """The schema and the help text cannot drift apart; a default that is shown is the default."""
    done = run(tmp_path, "--help")
    assert done.returncode == 0
    text = re.sub(r"\s+", " ", done.stdout)
    for key, field in Config.model_fields.items():
        default = "none" if field.default in ("", {}) else field.default
        assert f"--{key.replace('_', '-')} " in text
        assert f"{field.description} (LATENTD_{key.upper()}; default: {default})" in text
        assert field.description
    assert "--config FILE" in text
    for unit in ("seconds", "MiB", "HOST:PORT"):
        assert unit in text


def test_version_is_the_packages(tmp_path: Path) -> None:
    """`latentd --version` says what is installed."""
    from latentd import __version__

    assert run(tmp_path, "--version").stdout == f"latentd {__version__}\n"
