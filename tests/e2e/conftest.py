"""Whole launches: every test of this folder is marked e2e."""

from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

# it brings a CUDA of its own, beside which torch's cannot be
collect_ignore = ["test_fake_cuda.py"] if torch.version.cuda or torch.version.hip else []


def pytest_collection_modifyitems(items):
    for item in items:
        if Path(item.fspath).is_relative_to(Path(__file__).parent):
            item.add_marker(pytest.mark.e2e)


@pytest.fixture
def stepline(capfd):
    """Runs a command in this process, as `stepline("eval", "runs/mine")`; what it wrote to both outputs.

    A new process takes seconds to import torch. `train` ends its process at once, so that what it calls is called.
    """
    from stepline.trainer.cli import app
    from stepline.trainer.run.launch import dry_run, run_training

    def run(verb: str, *arguments: str) -> tuple[str, str]:
        capfd.readouterr()
        if verb == "train":
            config, *overrides = [word for word in arguments if word != "--dry-run"]
            assert (dry_run if "--dry-run" in arguments else run_training)(config, overrides, "auto") == 0
            return capfd.readouterr()
        done = CliRunner().invoke(app, [verb, *arguments])
        assert done.exit_code == 0, (verb, arguments, done.output, done.exception)
        return done.stdout, done.stderr

    return run
