"""A config file of its own."""

from pathlib import Path

import pytest
import yaml

MODEL = {"vocab_size": 100, "hidden_size": 64, "num_layers": 2, "num_heads": 4, "ffn_size": 128}


@pytest.fixture
def file(tmp_path) -> Path:
    path = tmp_path / "a.yaml"
    path.write_text(yaml.safe_dump({"model": MODEL, "optimizer": {"beta2": 0.99}}))
    return path
