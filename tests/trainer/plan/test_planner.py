"""The seven steps, the rounding, and what `auto` becomes."""

import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stepline.models.config import ModelConfig
from stepline.models.flops import parameter_counts
from stepline.trainer.config import Config
from stepline.trainer.config_io import dump, flatten
from stepline.trainer.errors import UserError
from stepline.trainer.plan.explain import lines
from stepline.trainer.plan.law_file import named_law
from stepline.trainer.plan.laws import STEP_LAW
from stepline.trainer.plan.planner import Inputs, make_plan, penalty_percent, round_batch, scaled_lr
from stepline.trainer.plan.resolve import Machine, resolve


@given(st.floats(1e3, 1e9), st.integers(1, 10**7))
def test_rounding_is_a_nearest_multiple_and_idempotent(ideal, quantum):
    batch = round_batch(ideal, quantum)
    assert batch >= quantum
    assert batch % quantum == 0
    assert round_batch(batch, quantum) == batch
    for other in (batch - quantum, batch + quantum):
        if other > 0:
            assert abs(math.log(batch / ideal)) <= abs(math.log(other / ideal)) + 1e-12


@given(st.floats(1e3, 1e9), st.floats(1.0, 4.0), st.integers(1, 10**7))
def test_rounding_is_monotone(ideal, factor, quantum):
    """Also between neighbouring floats, where one of them is on the edge of two multiples."""
    assert round_batch(ideal, quantum) <= round_batch(ideal * factor, quantum)
    edge = math.sqrt(2.0) * quantum  # as far from one multiple as from two
    near = [edge * (1 + i * 2.0**-52) for i in range(-3, 4)]
    rounded = [round_batch(value, quantum) for value in near]
    assert rounded == sorted(rounded)
    assert {rounded[0], rounded[-1]} == {quantum, 2 * quantum}


@given(st.floats(1e-3, 1e3), st.floats(1.0, 10.0))
def test_the_learning_rate_never_rises_when_the_batch_shrinks(ratio, factor):
    assert scaled_lr(1.0, ratio / factor) <= scaled_lr(1.0, ratio) <= 1.0


def test_worked_example():
    """124M, 2.5B tokens, sequence 1024, 8 ranks, micro-batch 16."""
    plan = make_plan(Inputs(124e6, 2.5e9, seq_len=1024, world_size=8, micro_batch=16))
    assert (plan.batch_tokens, plan.grad_accumulation, plan.steps) == (131_072, 1, 19_074)
    assert plan.lr == pytest.approx(2.285e-3, rel=5e-4)
    assert plan.weight_decay == pytest.approx(0.1031, rel=1e-3)


def test_the_contract_s_example():
    plan = make_plan(Inputs(1.1e9, 1e11, seq_len=4096, world_size=64, micro_batch=4))
    assert (plan.batch_tokens, plan.grad_accumulation, plan.steps) == (1_048_576, 1, 95_368)
    assert (plan.lr, plan.weight_decay, plan.tau) == pytest.approx((0.001468, 0.0710, 0.1007), rel=1e-3)
    assert (plan.ideal_lr, plan.ideal_weight_decay) == pytest.approx((0.001525, 0.0722), rel=1e-3)
    assert plan.batch_critical_tokens == pytest.approx(11.65e6, rel=1e-4)


def test_without_the_machine_nothing_is_rounded():
    plan = make_plan(Inputs(1.1e9, 1e11, seq_len=4096, micro_batch=4))
    assert (plan.lr, plan.batch_tokens) == (plan.ideal_lr, plan.ideal_batch_tokens)
    assert plan.penalty_percent == 0


def test_a_forced_batch_scales_the_learning_rate_down_and_never_up():
    ideal = STEP_LAW.batch_tokens(2.5e9)
    small = make_plan(Inputs(124e6, 2.5e9, batch_tokens=round(ideal / 4)))
    large = make_plan(Inputs(124e6, 2.5e9, batch_tokens=round(ideal * 4)))
    assert small.lr == pytest.approx(small.ideal_lr * 0.25**0.7, rel=1e-4)
    assert large.lr == large.ideal_lr
    assert small.penalty_percent == pytest.approx(0.29 * 4, rel=1e-4)
    assert penalty_percent(1.0, 2.0) == pytest.approx(0.33)
    assert any("x the law's" in w for w in small.warnings)


def test_each_warning_in_plain_words():
    def said(word: str, **inputs) -> bool:
        plan = make_plan(Inputs(**{"params": 1e9, "tokens": 5e10} | inputs))
        return any(word in warning for warning in plan.warnings)

    for word, inputs in (
        ("N = 2e+09 outside", {"params": 2e9}),
        ("D = 2e+11 outside", {"tokens": 2e11}),
        ("D/N = 10 outside", {"tokens": 1e10}),
        ("exceeds the critical", {"batch_tokens": 20_000_000}),
        ("x the law's", {"batch_tokens": 100_000}),
        ("steps are few", {"batch_tokens": 50_000_000}),
        ("fitted with adamw, not muon", {"optimizer": "muon"}),
        ("fitted with all_reduce, not demo", {"sync": "demo"}),
        ("weight decay: Power Lines was fitted with adamw and all_reduce, not muon", {"optimizer": "muon"}),
        ("weight decay: Power Lines was fitted with adamw and all_reduce, not demo", {"sync": "demo"}),
        ("clamped to 0.3", {"lr": 1e-5}),
        ("not validated for mixtures", {"active_params": 2e8}),
        ("the laws disagree on the batch", {"params": 1e6, "tokens": 1e8}),
    ):
        assert said(word, **inputs), word
        assert not said(word), word


@pytest.mark.parametrize(
    ("given", "advice", "check", "guess"),
    [
        ({}, "set optimizer.lr,", "check the learning rate", "its learning rate and batch are a guess"),
        ({"lr": 1e-3}, "set budget.batch_tokens,", "check the batch", "its batch is a guess"),
        (
            {"batch_tokens": 9_000_000},
            "set optimizer.lr,",
            "check the learning rate",
            "its learning rate is a guess",
        ),
    ],
)
def test_what_is_set_is_no_longer_warned_of(given, advice, check, guess):
    """Of the law's range, optimizer, synchroniser and models only what is left to it; of the batch always."""
    law = replace(STEP_LAW, kind="canon=AC")
    inputs = {"optimizer": "muon", "sync": "demo", "kind": "canon=none", "weight_decay": 0.1} | given
    warnings = make_plan(Inputs(1e6, 1e9, **inputs), law).warnings
    assert "is extrapolated" in warnings[0]
    for word, warning in zip((advice, check, guess), warnings[1:4], strict=True):
        assert word in warning
    both = make_plan(Inputs(1e6, 1e9, **inputs | {"lr": 1e-3, "batch_tokens": 9_000_000}), law).warnings
    for text, word in zip(both, ("exceeds the critical", "x the law's", "steps are few"), strict=True):
        assert word in text
    if "batch_tokens" in given:
        assert warnings[4:] == both
        assert not any("disagree" in text for text in make_plan(Inputs(1e6, 1e8, **given)).warnings)


def test_few_steps_are_those_of_the_law_s_own_runs():
    """The quickstart's: its smallest budget, 199,680 tokens at .4845 * D^.571 = 515.0 tokens a batch."""
    law = named_law("quickstart")

    def said(steps: int) -> list[str]:
        inputs = Inputs(4e5, 600_000, batch_tokens=600_000 // steps, optimizer="muon")
        return [warning for warning in make_plan(inputs, law).warnings if "few" in warning]

    assert said(389) == []
    assert said(300) == ["300 steps are few: the laws were fitted on runs of at least 388"]


def test_a_mixture_s_weight_decay_is_fixed():
    plan = make_plan(Inputs(1e9, 5e10, active_params=2e8))
    assert plan.weight_decay == 0.1
    assert plan.ideal_lr == STEP_LAW.lr(1e9, 5e10)  # the law takes the total


@pytest.mark.parametrize(
    ("inputs", "used", "ideal", "end"),
    [
        ({}, 0.1039, 0.1039, "= 0.1039, tau = 1.084 * 20.16^-0.527"),
        ({"weight_decay": 0.2}, 0.2, 0.1039, "= 0.1039, tau = 1.084 * 20.16^-0.527; 0.2 set by you"),
        ({"lr": 1e-5}, 0.3, 0.1039, "= 24.22, tau = 1.084 * 20.16^-0.527; 0.3, clamped to 0.02-0.3"),
        (
            {"active_params": 1e7},
            0.1,
            0.1039,
            "= 0.1039, tau = 1.084 * 20.16^-0.527; 0.1, fixed for a mixture",
        ),
    ],
)
def test_the_weight_decay_s_line_has_its_result_and_why_it_is_not_taken(inputs, used, ideal, end):
    plan = make_plan(Inputs(124e6, 2.5e9, **inputs))
    (line,) = (line for line in lines(plan) if line.name == "weight decay")
    assert (line.used, line.ideal) == pytest.approx((used, ideal), rel=1e-3)
    assert line.equation.startswith(f"B / (lr * tau * D) = {plan.batch_tokens:,.0f} / ({plan.lr:.4g} * ")
    assert line.equation.endswith(end)


@pytest.mark.parametrize(
    ("inputs", "sentence"),
    [
        ({"params": -1, "tokens": 1e9}, "params is -1; it must be between"),
        ({"params": 0, "tokens": 1e9}, "params is 0; it must be between"),
        ({"params": math.nan, "tokens": 1e9}, "params is nan; it must be between"),
        ({"params": 1e9, "tokens": 1e40}, r"tokens is 1e\+40; it must be between"),
        ({"params": 1e9, "tokens": 1e9, "seq_len": -5}, "seq_len is -5; it must be between 1 and"),
        ({"params": 1e9, "tokens": 1e9, "world_size": 0}, "world_size is 0; it must be between 1 and"),
        ({"params": 1e9, "tokens": 1e9, "active_params": 2e9}, "active_params 2e.09 exceed params"),
        ({"params": 1e9, "tokens": 1e4, "batch_tokens": 20_000}, "below one batch of 20,000"),
    ],
)
def test_bad_input_is_one_sentence(inputs, sentence):
    with pytest.raises(UserError, match=sentence):
        make_plan(Inputs(**inputs))


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
    # These are decided anew at every start: by the keys that are there, what a rank has to read, what is measured.
    assert "auto" not in [
        v
        for k, v in flatten(dump(run)).items()
        if k not in ("logging.wandb", "data.verify", "sparse.forward")
    ]


def test_what_is_set_stays_and_a_clamp_is_said():
    run = config()
    run.budget.tokens, run.budget.batch_tokens, run.optimizer.lr = 10**9, 1024 * 1024, 1e-4
    _, warnings = resolve(run, {}, Machine(1, "cpu", False), None)
    assert (run.optimizer.lr, run.budget.batch_tokens) == (1e-4, 1024 * 1024)
    assert run.optimizer.weight_decay == 0.3
    assert [w for w in warnings if "clamped to 0.3" in w]
    assert [w for w in warnings if "x the law's" in w]


def test_the_batch_is_warned_of_when_learning_rate_and_weight_decay_are_set():
    """4096 ranks of dense-125m: one window each is twice the critical batch."""
    run = config()
    run.budget.tokens, run.optimizer.lr, run.optimizer.weight_decay = 2.5e9, 1e-3, 0.1
    _, warnings = resolve(run, {}, Machine(4096, "cuda", True), None)
    assert run.budget.batch_tokens == 4096 * 1024
    for word in ("exceeds the critical 2,119,333", "31 x the law's 134,788", "597 steps are few"):
        assert [w for w in warnings if word in w], word
    assert not [w for w in warnings if "learning rate" in w or "weight decay" in w]
    # at a resume all three are set, and the first attempt has said it
    assert resolve(run, {}, Machine(4096, "cuda", True), None)[1] == []


def test_without_a_budget_it_is_one_epoch():
    run = config()
    origins = {}
    resolve(run, origins, Machine(1, "cpu", False), 5_000_000)
    assert run.budget.tokens == 5_000_000
    assert origins["budget.tokens"] == "one epoch of the data"
    with pytest.raises(UserError, match=r"set budget\.tokens"):
        resolve(config(), {}, Machine(1, "cpu", False), None)
