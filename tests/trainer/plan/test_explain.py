"""What a plan says beside its numbers: other laws, the schedule, whose FLOPs, how many GPUs."""

import io
import json
import math

import pytest
from rich.console import Console

from stepline.trainer.config_io import load_config
from stepline.trainer.optim.schedule import lr_multiplier
from stepline.trainer.plan.command import Request, run_plan
from stepline.trainer.plan.cost import hardware, iso_loss, run_cost
from stepline.trainer.plan.explain import plan_json, show
from stepline.trainer.plan.laws import POWER_LINES
from stepline.trainer.plan.planner import Inputs, make_plan
from stepline.trainer.plan.resolve import Machine, resolve
from stepline.trainer.plan.schedule_text import schedule_of


def shown(inputs: Inputs) -> str:
    plan, console = make_plan(inputs), Console(width=200, file=io.StringIO())
    show(plan, None, None, iso_loss(inputs.tokens, plan.batch_tokens, None), console)
    return console.file.getvalue()


def asked(config: str | None, *overrides: str, **options) -> Request:
    return Request(config, list(overrides), **options)


def planned(capsys, config: str | None, *overrides: str, **options) -> dict:
    run_plan(asked(config, *overrides, **options), as_json=True)
    return json.loads(capsys.readouterr().out)


def test_deepseek_takes_the_compute_of_a_mixture():
    """C = 6 * 1.3e9 * 1e11 = 7.8e20 and not 6 * 7e9 * 1e11."""
    said = plan_json(make_plan(Inputs(7e9, 1e11, active_params=1.3e9)))["second_opinion"]
    assert (
        said["deepseek_batch_tokens"]
        == pytest.approx(0.2920 * 7.8e20**0.3271)
        == pytest.approx(1_991_531, rel=1e-6)
    )
    assert said["deepseek_lr"] == pytest.approx(0.3118 * 7.8e20**-0.125) == pytest.approx(7.63e-4, rel=1e-3)
    # those that count N, count all of it
    assert said["porian_lr"] == pytest.approx(3.7 * 7e9**-0.36)
    dense = plan_json(make_plan(Inputs(7e9, 1e11)))["second_opinion"]
    assert dense["deepseek_batch_tokens"] == pytest.approx(0.2920 * 4.2e21**0.3271)


def test_epoch_s_loss_is_of_dense_models():
    dense, mixture = Inputs(7e9, 1e11), Inputs(7e9, 1e11, active_params=1.3e9)
    assert "of dense models only" in plan_json(make_plan(mixture))["expected_loss_of"]
    assert "dense" not in plan_json(make_plan(dense))["expected_loss_of"]
    assert "not a prediction for your data, and of dense models only" in shown(mixture)
    assert "of dense models only" not in shown(dense)


@pytest.mark.parametrize(
    ("params", "tokens", "active", "far"),
    [
        (1.1e9, 1e11, None, ["deepseek"]),  # C = 6.6e20, 33 times too much
        (2e8, 1e10, None, []),  # 1.2e19
        (2e8, 1e7, None, ["deepseek"]),  # 1.2e16
        (1e8, 1e10, None, ["power_lines"]),  # below 111M
        (7e9, 1e11, None, ["power_lines", "deepseek"]),
        (2e9, 1e10, 2e8, []),  # C of the active weights
    ],
)
def test_second_opinions_from_afar_are_marked(params, tokens, active, far):
    inputs = Inputs(params, tokens, active_params=active)
    told = plan_json(make_plan(inputs))
    assert told["second_opinion_extrapolated"] == far
    rate, batch = (told["explain"][i] for i in (0, 1))
    assert list(batch["extrapolated_opinions"]) == far
    assert list(rate["extrapolated_opinions"]) == [name for name in far if name != "power_lines"]
    text = shown(inputs)
    for name in ("power_lines", "deepseek", "porian"):
        marked = f"{name} {told['second_opinion'][f'{name}_batch_tokens']:,.0f} (extrapolated)"
        assert (marked in text) == (name in far)


def test_mixtures_like_those_of_step_law_are_inside():
    inside = plan_json(make_plan(Inputs(2.15e9, 1e10, active_params=5e8)))
    assert not any("is extrapolated" in text for text in inside["warnings"])
    assert [line["in_range"] for line in inside["explain"][:2]] == [True, True]
    far = plan_json(make_plan(Inputs(5e8, 1e10, active_params=5e6)))
    (warning,) = [text for text in far["warnings"] if "is extrapolated" in text]
    assert "active share = 0.01 outside 0.087-0.576" in warning


@pytest.mark.parametrize(
    ("schedule", "told"),
    [
        ({}, "2,000 steps (2.1 %) warm-up, then linear to zero"),
        (
            {"schedule": "cosine", "final_fraction": 0.1},
            "2,000 steps (2.1 %) warm-up, then cosine to 10 % of the peak",
        ),
        ({"warmup_steps": 0, "final_fraction": 0.1}, "no warm-up, then linear to 10 % of the peak"),
        ({"warmup_steps": 9537}, "9,537 steps (10 %) warm-up, then linear to zero"),
        (
            {"schedule": "wsd", "decay_fraction": 0.25},
            "2,000 steps (2.1 %) warm-up, the peak until the last 25 %, then linear to zero",
        ),
    ],
)
def test_the_schedule_is_that_of_the_run(schedule, told):
    """1.1B, 100B tokens: 95,368 steps."""
    plan = make_plan(Inputs(1.1e9, 1e11, seq_len=4096, world_size=64, micro_batch=4, **schedule))
    assert schedule_of(plan) == told
    assert plan_json(plan)["schedule"].startswith(f"{told} (Step Law was fitted with: ")


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["budget.tokens=1e9"],
        ["schedule.name=wsd", "schedule.decay_fraction=0.3", "schedule.final_fraction=0.05"],
        ["schedule.warmup_steps=0", "schedule.final_fraction=0.1"],
        ["schedule.name=cosine", "schedule.warmup_steps=123"],
    ],
)
def test_the_numbers_of_the_schedule_are_those_that_train_settles(overrides):
    config, origins = load_config("dense-125m", overrides)
    plan, _ = resolve(config, origins, Machine(8, "cuda", True), None)
    warmup, steps = config.schedule.warmup_steps, config.total_steps()
    told = schedule_of(plan)
    assert told.startswith(f"{warmup:,} steps (" if warmup else "no warm-up")
    end = lr_multiplier(
        steps,
        steps,
        warmup,
        config.schedule.name,
        config.schedule.final_fraction,
        config.schedule.decay_fraction,
    )
    assert told.endswith("to zero" if end == 0 else f"to {end:.0%} of the peak".replace("%", " %"))
    if "schedule.warmup_steps" in origins and origins["schedule.warmup_steps"].startswith(
        ("10 %", "at most")
    ):
        assert (warmup == 2000) == ("at most" in origins["schedule.warmup_steps"])
        assert warmup == min(2000, steps // 10)


def test_the_two_forms_say_which_flops_they_count(capsys):
    """dense-125m: head and attention are .36 of its work, which --params cannot know."""
    options = {"world_size": 1, "device": "H200"}
    config = planned(capsys, "dense-125m", **options)
    numbers = planned(capsys, None, params=config["params"], tokens=2.5e9, seq_len=1024, **options)
    assert config["cost"]["flops"] == pytest.approx(2.00e18, rel=5e-3)
    assert numbers["cost"]["flops"] == pytest.approx(6 * 84934656 * 2.5e9)
    assert config["cost"]["counted"] == "the model's, with head and causal attention"
    assert numbers["cost"]["counted"].startswith("6 x N x D, without head and attention")
    run_plan(asked(None, params=1e9, tokens=1e10, active_params=1e8, device="H200"), as_json=False)
    out = capsys.readouterr().out
    assert "6e+18 FLOPs" in out
    assert (
        "these FLOPs are 6 x active N x D, without head and attention, which add most to small models" in out
    )


def test_beyond_the_critical_batch_cost_rises_faster_than_time_falls():
    """What the sentence on GPUs says, by the iso-loss law: the two are equal at B_crit of D_min."""
    plan = make_plan(Inputs(1.1e9, 1e11, seq_len=4096))
    least = POWER_LINES.min_tokens(1e11, plan.batch_tokens)
    critical = POWER_LINES.critical_batch_tokens(least)

    def slopes(batch: float) -> tuple[float, float]:
        """Of ln D and of -ln(D / B) over ln B."""
        one, other = (POWER_LINES.tokens_for(least, b) for b in (batch, batch * 1.001))
        cost = math.log(other / one) / math.log(1.001)
        return cost, 1 - cost

    for factor, more in ((0.9, False), (1.1, True)):
        cost, saved = slopes(critical * factor)
        assert (cost > saved) is more
        assert saved > 0  # it still falls
    cost = run_cost(1e11, 6.6e9, hardware("H200", None, 8), critical, 4096)
    console = Console(width=200, file=io.StringIO())
    show(plan, hardware("H200", None, 8), cost, iso_loss(1e11, plan.batch_tokens, cost), console)
    assert cost.max_useful_gpus == 2722
    assert (
        "beyond 2,722 GPUs (one window each is the critical batch of D_min) a further GPU adds more to the cost"
        in (console.file.getvalue())
    )
