"""Settings and fixtures of the whole suite."""

import importlib.util
import os
from pathlib import Path

import pytest

os.environ["OMP_NUM_THREADS"] = "1"
os.environ.setdefault("WANDB_MODE", "offline")


def pytest_configure() -> None:
    import torch

    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def pool():
    """Four long-lived gloo processes; see tests/pool.py."""
    spec = importlib.util.spec_from_file_location("stepline_test_pool", Path(__file__).with_name("pool.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    shared = module.Pool()
    yield shared
    shared.close()
