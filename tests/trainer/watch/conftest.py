"""What the run says, and an environment without a wandb key."""

import logging

import pytest

from .wandb_server import WandbServer


@pytest.fixture
def said():
    """The sentences of the log, as they come."""
    sentences = []
    handler = logging.Handler()
    handler.emit = lambda record: sentences.append(record.getMessage())
    log = logging.getLogger("stepline")
    before = log.level
    log.setLevel(logging.INFO)
    log.addHandler(handler)
    yield sentences
    log.removeHandler(handler)
    log.setLevel(before)


@pytest.fixture
def no_key(monkeypatch, tmp_path):
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))


@pytest.fixture
def server(monkeypatch, no_key):
    with WandbServer() as server:
        for name, value in server.environment().items():
            monkeypatch.setenv(name, value)
        yield server
