"""Windows that `logging.eval_windows: auto` gives a validation, against the computing of the training."""

import pytest

from stepline.models.config import ModelConfig
from stepline.trainer.config import Config, Source
from stepline.trainer.plan.resolve import Machine, resolve

SHAPE = {"vocab_size": 512, "hidden_size": 64, "num_layers": 2, "num_heads": 4, "ffn_size": 128}
WINDOW = 128


def resolved(sources: int = 1, **values) -> tuple[Config, dict]:
    config = Config(model=ModelConfig(**SHAPE))
    config.data.seq_len, config.budget.batch_tokens = WINDOW, 16 * WINDOW
    config.data.sources = [Source(path=f"data/{n}") for n in range(sources)]
    config.budget.tokens = values.pop("tokens", 1600 * 16 * WINDOW)
    for key, value in values.items():
        setattr(config.logging, key, value)
    origins = {}
    resolve(config, origins, Machine(1, "cpu", False), None)
    return config, origins


@pytest.mark.parametrize(("sources", "every"), [(1, "auto"), (3, "auto"), (1, 40), (2, 100)])
def test_all_validations_compute_a_twentieth_of_the_training(sources, every):
    config, origins = resolved(sources, eval_every=every)
    windows = config.logging.eval_windows
    forwards = config.total_steps() // config.logging.eval_every * sources * windows * WINDOW
    trained = 3 * config.total_steps() * config.budget.batch_tokens  # a backward is two forwards
    assert forwards / trained == pytest.approx(0.05, abs=windows**-1 * 0.05)
    assert origins["logging.eval_windows"] == "a twentieth of the computing, or all of the split"


def test_short_runs_validate_on_enough_and_what_is_set_stays():
    config, origins = resolved(tokens=20 * 16 * WINDOW)
    assert (config.logging.eval_windows, origins["logging.eval_windows"]) == (64, "at least 64")
    assert resolved(eval_every=0)[0].logging.eval_windows == round(3 * 0.05 * 1600 * 16)
    for windows in (None, 7):
        config, origins = resolved(eval_windows=windows)
        assert config.logging.eval_windows == windows
        assert "logging.eval_windows" not in origins
