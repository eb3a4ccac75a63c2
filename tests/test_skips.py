"""What CI makes of a skip."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.parametrize(("ci", "workers", "code"), [("", "0", 0), ("1", "0", 1), ("1", "2", 1)])
def test_a_skip_fails_in_ci_alone(tmp_path, ci, workers, code):
    """That of a file whose package is missing, here and with workers."""
    shutil.copy(Path(__file__).with_name("conftest.py"), tmp_path)
    (tmp_path / "test_it.py").write_text("def test_it():\n    assert True\n")
    (tmp_path / "test_more.py").write_text("import pytest\n\npytest.importorskip('no_such_package')\n")
    command = [sys.executable, "-m", "pytest", "-q", "-n", workers, "--rootdir", tmp_path, tmp_path]
    env = os.environ | {"STEPLINE_CI": ci}
    done = subprocess.run(
        command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == code, done.stdout + done.stderr
    assert "1 passed, 1 skipped" in done.stdout
