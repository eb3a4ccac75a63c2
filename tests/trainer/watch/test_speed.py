"""Seconds of training, and what is none of it."""

from types import SimpleNamespace

import pytest
import torch

from stepline.trainer.config_io import load_config
from stepline.trainer.watch import speed


def test_pauses_count_once_and_when_they_end_in_an_error(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(speed, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    config, _ = load_config("tiny")
    config.budget.batch_tokens = 1000
    meter = speed.Speedometer(config, torch.device("cpu"), 1, 0, trained_s=7.0)
    now[0] += 5

    def validate() -> None:
        with meter.paused():
            now[0] += 10
            with meter.paused():
                now[0] += 20
            raise ValueError("damaged")

    with pytest.raises(ValueError, match="damaged"):
        validate()
    assert meter.trained_s() == 7.0 + 5
    assert meter.lap(10)["tokens_per_second"] == 2000.0
    now[0] += 2
    assert meter.trained_s() == 7.0 + 5 + 2
