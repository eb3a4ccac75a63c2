"""Worked values of the laws, the rounding, and what `auto` becomes."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stepline.models.config import ModelConfig
from stepline.models.flops import parameter_counts
from stepline.trainer.config import Config
from stepline.trainer.config_io import dump, flatten
from stepline.trainer.errors import UserError
from stepline.trainer.plan.laws import POWER_LINES, STEP_LAW
from stepline.trainer.plan.planner import round_batch, scaled_lr
from stepline.trainer.plan.resolve import Machine, resolve


@pytest.mark.parametrize(
    ("params", "tokens", "lr", "batch", "tau", "decay"),
    [
        (124e6, 2.5e9, 2.330e-3, 134_788, 0.22261, 0.1039),
        (1.1e9, 100e9, 1.525e-3, 1.108e6, 0.10066, 0.0722),
        (7e9, 2e12, 1.023e-3, 6.128e6, 0.05505, 0.0544),
    ],
)
def test_published_values(params, tokens, lr, batch, tau, decay):
    law, lines = STEP_LAW, POWER_LINES
    assert law.lr(params, tokens) == pytest.approx(lr, rel=5e-4)
    assert law.batch_tokens(tokens) == pytest.approx(batch, rel=5e-4)
    assert lines.tau(params, tokens) == pytest.approx(tau, rel=5e-4)
    got = lines.weight_decay(params, tokens, law.lr(params, tokens), law.batch_tokens(tokens))
    assert got == pytest.approx(decay, rel=1e-3)


def test_exponents_are_the_log_log_slopes():
    law = STEP_LAW
    assert math.log(law.lr(2e9, 1e11) / law.lr(1e9, 1e11), 2) == pytest.approx(-0.713)
    assert math.log(law.lr(1e9, 2e11) / law.lr(1e9, 1e11), 2) == pytest.approx(0.307)
    assert math.log(law.batch_tokens(2e11) / law.batch_tokens(1e11), 2) == pytest.approx(0.571)
    assert math.log(POWER_LINES.tau(1e9, 2e11) / POWER_LINES.tau(1e9, 1e11), 2) == pytest.approx(-0.527)


@given(st.floats(1e3, 1e9), st.integers(1, 10**7))
def test_rounding_is_a_nearest_multiple_and_idempotent(ideal, quantum):
    batch = round_batch(ideal, quantum)
    assert batch >= quantum
    assert batch % quantum == 0
    assert round_batch(batch, quantum) == batch
    for other in (batch - quantum, batch + quantum):
        if other > 0:
            assert abs(math.log(batch / ideal)) <= abs(math.log(other / ideal)) + 1e-12


@given(st.floats(1e-3, 1e3), st.floats(1.0, 10.0))
def test_the_learning_rate_never_rises_when_the_batch_shrinks(ratio, factor):
    assert scaled_lr(1.0, ratio / factor) <= scaled_lr(1.0, ratio) <= 1.0


def config(**model) -> Config:
    shape = {"vocab_size": 50304, "hidden_size": 768, "num_layers": 12, "num_heads": 12, "ffn_size": 2048}
    return Config(model=ModelConfig(**shape | model))


def test_every_auto_is_filled_and_says_from_where():
    run = config()
    run.budget.tokens, run.parallel.micro_batch = 2_500_000_000, 16
    origins = dict.fromkeys(flatten(dump(run)), "default")
    _, warnings = resolve(run, origins, Machine(world_size=8, device="cuda", bf16=True), None)
    n = parameter_counts(run.model).linear
    assert run.budget.batch_tokens == 8 * 16 * 1024
    assert run.total_steps() == 19_074
    ratio = run.budget.batch_tokens / STEP_LAW.batch_tokens(2.5e9)
    assert run.optimizer.lr == pytest.approx(STEP_LAW.lr(n, 2.5e9) * ratio**0.7)
    assert origins["optimizer.lr"] == origins["budget.batch_tokens"] == "law: Step Law"
    assert origins["optimizer.weight_decay"] == "law: Power Lines"
    assert (run.precision.compute, run.run.compile, run.parallel.shard) == ("bf16", True, 8)
    assert [w for w in warnings if "is extrapolated" in w]
    assert "auto" not in [v for k, v in flatten(dump(run)).items() if k != "logging.wandb"]


def test_what_is_set_stays_and_a_clamp_is_said():
    run = config()
    run.budget.tokens, run.budget.batch_tokens, run.optimizer.lr = 10**9, 1024 * 1024, 1e-4
    _, warnings = resolve(run, {}, Machine(1, "cpu", False), None)
    assert (run.optimizer.lr, run.budget.batch_tokens) == (1e-4, 1024 * 1024)
    assert run.optimizer.weight_decay == 0.3
    assert [w for w in warnings if "clamped to 0.3" in w]
    assert [w for w in warnings if "x the law's" in w]


def test_without_a_budget_it_is_one_epoch():
    run = config()
    origins = {}
    resolve(run, origins, Machine(1, "cpu", False), 5_000_000)
    assert run.budget.tokens == 5_000_000
    assert origins["budget.tokens"] == "one epoch of the data"
    with pytest.raises(UserError, match=r"set budget\.tokens"):
        resolve(config(), {}, Machine(1, "cpu", False), None)
