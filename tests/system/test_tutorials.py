"""The tutorials in docs/ do what they say: every block of them is run in order, as a reader would."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from processes import start_server

DOCS = Path(__file__).resolve().parents[2] / "docs"
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```", re.DOTALL | re.MULTILINE)
SAID = {"import-onnx": "(4, 1, 8, 8)", "import-torch": "(4, 4)", "import-diffusers": "(3, 1, 8, 8)"}
"""What the last block of each prints."""


def run(command: list[str], folder: Path) -> str:
    """Run a command as a reader does who has the environment activated; it must succeed."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = os.environ | {"PATH": path, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.mark.parametrize("name", SAID)
def test_a_tutorial_runs_from_its_first_block_to_its_last(name: str, server_python: Path, tmp_path: Path) -> None:
    """Files are written, commands run, the server started, and the client's lines print what they should."""
    output, running = "", None
    try:
        for language, text in BLOCK.findall((DOCS / f"{name}.md").read_text()):
            file = re.match(r"# (\S+\.\w+)\n", text)
            if file is not None:
                (tmp_path / file[1]).write_text(text)
            elif text == "latentd --models models\n":
                running = start_server(server_python, tmp_path / "models", tmp_path / "server.log")
            elif language == "sh":
                run(["bash", "-ec", text], tmp_path)
            else:
                assert running is not None, "the client's lines come after the server's"
                output = run([sys.executable, "-c", text.replace("127.0.0.1:8500", running.target)], tmp_path)
    finally:
        if running is not None:
            assert running.stop() == 0, running.log.read_text()
    assert SAID[name] in output


def test_every_tutorial_is_run() -> None:
    """No tutorial of importing is left out here."""
    assert {path.stem for path in DOCS.glob("import-*.md")} == SAID.keys()
