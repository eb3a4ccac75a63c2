"""Settings and fixtures of the whole suite."""

import importlib.util
import os
import subprocess
from pathlib import Path

import pytest

os.environ["OMP_NUM_THREADS"] = "1"
os.environ.setdefault("WANDB_MODE", "offline")


def pytest_configure() -> None:
    import torch
    from hypothesis import settings

    torch.set_num_threads(1)
    settings.register_profile("untimed", deadline=None)  # a busy machine must not fail a test
    settings.load_profile("untimed")


@pytest.hookimpl(tryfirst=True)  # before xdist, which reads the marks
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """For `-n 2 --dist loadgroup`: one worker has the pool of processes and begins with its tests; the rest of a file
    stays together, as its fixtures are shared."""
    for item in items:
        pooled = "pool" in getattr(item, "fixturenames", ())
        item.add_marker(pytest.mark.xdist_group("pool" if pooled else item.path.stem))
    items.sort(key=lambda item: "pool" not in getattr(item, "fixturenames", ()))


@pytest.fixture(scope="session")
def unavailable():
    """Skips a test for want of something; where STEPLINE_CI is set it fails, as a skip would hide a lack of proof."""
    return pytest.fail if os.environ.get("STEPLINE_CI") else pytest.skip


@pytest.fixture(scope="session")
def mount(unavailable):
    """Runs `mount` with these arguments; whoever mounts also unmounts."""

    def run(*arguments: object) -> None:
        done = subprocess.run(["mount", *map(str, arguments)], capture_output=True, text=True, check=False)
        if done.returncode:
            unavailable(f"this machine does not let the test mount a disk: {done.stderr.strip()}")

    return run


@pytest.fixture(scope="session")
def pool():
    """Four long-lived gloo processes; see tests/pool.py."""
    spec = importlib.util.spec_from_file_location("stepline_test_pool", Path(__file__).with_name("pool.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    shared = module.Pool()
    yield shared
    shared.close()
