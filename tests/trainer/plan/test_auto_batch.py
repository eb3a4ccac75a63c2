"""The batch that `auto` gives with `parallel.micro_batch: auto`: monotone in D, and near the law's."""

import math
from dataclasses import replace

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from stepline.models.config import ModelConfig
from stepline.trainer.config import Config
from stepline.trainer.plan.laws import STEP_LAW
from stepline.trainer.plan.planner import Plan, make_plan
from stepline.trainer.plan.resolve import (
    MICRO_BATCH_TOKENS,
    Machine,
    auto_micro_batch,
    config_inputs,
    resolve,
)

SHAPE = {"vocab_size": 512, "hidden_size": 64, "num_layers": 2, "num_heads": 4, "ffn_size": 128}


def config(tokens: float, seq_len: int = 1024, **budget) -> Config:
    run = Config(model=ModelConfig(**SHAPE))
    run.data.seq_len, run.budget.tokens = seq_len, tokens
    for key, value in budget.items():
        setattr(run.budget, key, value)
    return run


def planned(run: Config, world: int, device: str = "cuda") -> Plan:
    """As `plan` and `train` do, before memory cuts the micro-batch."""
    inputs = config_inputs(run, world)
    batch = inputs.batch_tokens or STEP_LAW.batch_tokens(inputs.tokens)
    return make_plan(replace(inputs, micro_batch=auto_micro_batch(run, batch, Machine(world, device, True))))


def tokens_of(windows: float, world: int, seq_len: int = 1024) -> float:
    """D whose batch by Step Law is so many windows a rank: the law turned round."""
    return (windows * world * seq_len / 0.58) ** (1 / 0.571)


SIZES = st.sampled_from([100, 128, 1000, 1024, 2048, 4096, 8192, 20_000])


@given(
    st.floats(0.3, 3000), st.floats(1.0, 3.0), st.sampled_from([1, 2, 3, 8, 64, 1000]), SIZES,
    st.sampled_from(["cpu", "cuda"]),
)  # fmt: skip
@example(
    2.84, 1.0025, 64, 1024, "cuda"
)  # 4.834e9 and 4.848e9 tokens of dense-125m: was 262,144, then 196,608
@example(16.0, 1.06, 8, 1024, "cuda")
@example(128.0, 1.01, 1, 1024, "cuda")
@settings(max_examples=300, deadline=None)
def test_more_tokens_never_mean_a_smaller_batch(windows, factor, world, seq_len, device):
    tokens = min(tokens_of(windows, world, seq_len), 1e18)
    one, other = (planned(config(d, seq_len), world, device) for d in (tokens, min(tokens * factor, 1e18)))
    assert one.batch_tokens <= other.batch_tokens


@given(st.floats(0.3, 3000), st.sampled_from([1, 3, 64]), SIZES, st.sampled_from(["cpu", "cuda"]))
@settings(max_examples=200, deadline=None)
def test_micro_batches_are_whole_and_useful_and_the_batch_is_near(windows, world, seq_len, device):
    plan = planned(config(tokens_of(windows, world, seq_len), seq_len), world, device)
    micro_batch, most = plan.inputs.micro_batch, max(1, MICRO_BATCH_TOKENS[device] // seq_len)
    share = plan.batch_tokens / (world * seq_len)
    assert share == micro_batch * plan.grad_accumulation
    assert micro_batch <= most
    assert plan.grad_accumulation == math.ceil(share / most)
    if windows > 1:
        assert (
            abs(math.log2(share / windows)) <= 0.5 + 1e-9
        )  # from 1 to 2, or from 2 to 4 where 2 are the most
        assert plan.penalty_percent <= 0.29 * 0.5**2 + 1e-9
    if windows > 16 and most >= 16:
        assert plan.penalty_percent <= 0.0021  # from 16 to 18


@pytest.mark.parametrize(
    ("windows", "micro_batch", "pieces"),
    [
        (0.2, 1, 1),
        (1.4, 1, 1),
        (1.9, 2, 1),
        (2.8, 3, 1),
        (2.9, 3, 1),
        (3.6, 4, 1),
        (16.4, 16, 1),
        (17.1, 9, 2),  # 17 is a prime: 18
        (26.8, 13, 2),
        (31.7, 16, 2),
        (33.4, 11, 3),
        (131.6, 15, 9),  # 128 or 135
        (130.4, 16, 8),
    ],
)
def test_windows_a_rank(windows, micro_batch, pieces):
    plan = planned(config(tokens_of(windows, 64)), 64)
    assert (plan.inputs.micro_batch, plan.grad_accumulation) == (micro_batch, pieces)


@pytest.mark.parametrize(
    ("windows", "world", "micro_batch"),
    [(4, 8, 1), (16, 8, 2), (20, 8, 3), (33, 1, 11), (34, 1, 12), (27, 1, 14), (4096, 8, 16)],
)
def test_a_batch_that_is_set_leaves_few_places_empty(windows, world, micro_batch):
    """20 windows on 8 ranks were two micro-batches of 2, 12 of 32 places empty; they are one of 3."""
    run = config(1e9, batch_tokens=windows * 1024)
    assert planned(run, world).inputs.micro_batch == micro_batch


def test_train_keeps_the_batch_when_memory_cuts_the_micro_batch():
    batches = set()
    for memory in (None, 80_000_000_000, 700_000_000):
        run = config(tokens_of(27.6, 8))
        plan, _ = resolve(run, {}, Machine(8, "cuda", True, memory), None)
        batches.add((run.budget.batch_tokens, plan.batch_tokens))
    assert batches == {(28 * 8 * 1024, 28 * 8 * 1024)}
