"""The README's Python example runs as it stands there."""

import re
import subprocess
import sys
from pathlib import Path

from processes import start_server

ROOT = Path(__file__).resolve().parents[2]


def test_the_readme_s_example_runs(server_python: Path, trained: Path, tmp_path: Path) -> None:
    """The code block draws its pictures against a real server; only the address and the models' names differ."""
    (example,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert len(example.splitlines()) <= 30
    running = start_server(server_python, trained, tmp_path / "server.log")
    code = example.replace("127.0.0.1:8500", running.target).replace('"digits-', '"tiny-')
    try:
        done = subprocess.run(
            [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False, timeout=120
        )
    finally:
        assert running.stop() == 0
    assert done.returncode == 0, done.stderr
    assert "tiny-vae@1 ['decode', 'encode', 'sample', 'score']" in done.stdout
    for picture in ("digits.png", "morph.png"):
        assert (tmp_path / picture).read_bytes().startswith(b"\x89PNG")
