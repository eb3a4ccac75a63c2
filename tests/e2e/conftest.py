"""Whole launches: every test of this folder is marked e2e."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent


def pytest_collection_modifyitems(items):
    for item in items:
        if Path(item.fspath).is_relative_to(Path(__file__).parent):
            item.add_marker(pytest.mark.e2e)


@pytest.fixture(scope="session")
def sh():
    """Runs a command, returns the finished process; output is text and part of a failed assertion."""

    def run(*command: str, cwd: Path = ROOT, timeout: float = 600, code: int | None = 0, **env: str):
        process = subprocess.run(
            [str(part) for part in command],
            cwd=cwd,
            env=os.environ | {"WANDB_MODE": "offline"} | env,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )
        if code is not None:
            assert process.returncode == code, (
                f"{command}\n{process.stdout[-3000:]}\n{process.stderr[-5000:]}"
            )
        return process

    return run


@pytest.fixture(scope="session")
def corpus(tmp_path_factory) -> Path:
    """A folder with some of the Python library's packages: real text, a second to prepare."""
    import shutil
    import sysconfig

    folder = tmp_path_factory.mktemp("corpus") / "corpus"
    folder.mkdir()
    library = Path(sysconfig.get_paths()["stdlib"])
    for name in ("json", "email", "asyncio", "logging", "http", "xml"):
        shutil.copytree(library / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    return folder


@pytest.fixture(scope="session")
def data(sh, corpus, tmp_path_factory) -> Path:
    """That corpus, prepared by the command with a vocabulary of 512."""
    folder = tmp_path_factory.mktemp("data") / "small"
    options = ["--vocab-size", "512", "--val-share", "0.1"]
    sh(sys.executable, "-m", "stepline.trainer", "prepare", corpus, "--output", folder, *options)
    return folder
