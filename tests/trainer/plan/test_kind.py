"""What a law was fitted on: told by a sweep, kept by the fit, and compared with the model that is planned."""

from dataclasses import replace
from pathlib import Path

import pytest

from stepline.trainer.config_io import load_config
from stepline.trainer.errors import UserError
from stepline.trainer.plan.expect import expected_final_loss, own_loss_law
from stepline.trainer.plan.explain import plan_json
from stepline.trainer.plan.fit import fit_law
from stepline.trainer.plan.grid import Grid
from stepline.trainer.plan.kind import differences, kind_of
from stepline.trainer.plan.law_file import named_law
from stepline.trainer.plan.laws import STEP_LAW
from stepline.trainer.plan.planner import Inputs, make_plan
from stepline.trainer.plan.resolve import Machine, resolve
from stepline.trainer.plan.runs import read_runs
from stepline.trainer.plan.sweep import lay_out

from .synthetic import sweep, write

DENSE = "ffn=dense blocks=standard canon=none qk_norm=true sparse=none"
CANON = DENSE.replace("canon=none", "canon=AC")
N, D = 425_984, 3_500_000
"""Of the quickstart."""


@pytest.mark.parametrize(
    ("config", "overrides", "kind"),
    [
        ("quickstart", [], CANON),
        ("quickstart", ["model.canon=none"], DENSE),
        ("moe-tiny", [], CANON.replace("ffn=dense", "ffn=moe experts=8 top_k=2")),
        (
            "quickstart",
            ["model.blocks=revffn", "sparse.mode=s-ste"],
            "ffn=dense blocks=revffn coupling=exact adapters=false canon=AC qk_norm=true sparse=s-ste",
        ),
        ("dense-1b", [], DENSE.replace("true", "false")),
    ],
)
def test_the_kind_of_a_config(config, overrides, kind):
    assert kind_of(load_config(config, overrides)[0]) == kind


@pytest.mark.parametrize(
    ("law", "model", "told"),
    [
        (DENSE, DENSE, []),
        (DENSE, CANON, ["canon=none, not AC"]),
        (DENSE, "ffn=moe", ["ffn=dense, not moe"]),
        ("", CANON, []),
        (DENSE, "", []),
        ("of my own", CANON, []),
        (CANON, f"{CANON} trained=adapters", ["trained=all, not adapters"]),
        (f"{CANON} trained=adapters", CANON, ["trained=adapters, not all"]),
        ("ffn=moe experts=8", "ffn=dense", ["ffn=moe, not dense"]),
        ("ffn=moe experts=8 canon=A", "ffn=moe experts=16 canon=C", ["experts=8, not 16", "canon=A, not C"]),
    ],
)
def test_differences(law, model, told):
    assert differences(law, model) == told


def test_a_law_of_another_kind_warns_once_and_expects_no_loss():
    law = named_law("quickstart")
    assert law.kind == CANON
    own, other = (make_plan(Inputs(N, D, optimizer="muon", kind=kind), law) for kind in (CANON, DENSE))
    assert (own.lr, own.batch_tokens) == (other.lr, other.batch_tokens)
    (said,) = set(other.warnings) - set(own.warnings)
    assert said == (
        "quickstart was fitted on models with canon=AC, not none: its learning rate and batch are a guess here, and no "
        "loss is expected by it"
    )
    told = plan_json(own)
    assert told["expected_loss"] == pytest.approx(2.9332, abs=1e-4)
    assert told["expected_loss_own"] is True
    told = plan_json(other)
    assert (told["expected_loss"], told["expected_loss_own"]) == (None, False)
    assert told["expected_loss_of"] == "quickstart was fitted with canon=AC, not none"
    assert told["law"]["kind"] == CANON
    text = ["8b7428ccd01039cf"]
    assert expected_final_loss(own, Path("/nowhere/run"), text, "tune").loss == pytest.approx(
        2.9332, abs=1e-4
    )
    assert expected_final_loss(other, Path("/nowhere/run"), text, "tune") is None


def test_two_numbers_of_a_mixture_tell_its_kind():
    law = named_law("quickstart")
    plan = make_plan(Inputs(N, D, active_params=N / 2, optimizer="muon"), law)
    assert [w for w in plan.warnings if "ffn=dense, not moe" in w]
    assert plan_json(plan)["expected_loss"] is None
    assert plan_json(make_plan(Inputs(N, D, optimizer="muon"), law))["expected_loss"] == pytest.approx(
        2.9332, abs=1e-4
    )


def test_a_law_that_does_not_tell_its_kind_is_older_than_canon_layers():
    law = replace(named_law("quickstart"), kind="")
    assert own_loss_law(law, Inputs(N, D, optimizer="muon", kind=CANON)) is None
    assert own_loss_law(law, Inputs(N, D, optimizer="muon", kind="ffn=moe")) is law.loss_law
    assert own_loss_law(law, Inputs(N, D, kind="ffn=moe")) is None
    assert own_loss_law(law, Inputs(N, D, optimizer="muon", sync="demo", kind="ffn=moe")) is None
    for kind in (CANON, "ffn=moe"):
        assert make_plan(Inputs(N, D, kind=kind), law).warnings == make_plan(Inputs(N, D), law).warnings


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        ([], []),
        (["model.canon=AC"], ["canon=none, not AC"]),
        (["model.blocks=revffn"], ["blocks=standard, not revffn"]),
        (["sparse.mode=s-ste"], ["sparse=none, not s-ste"]),
        (
            ["model.blocks=revffn", "model.revffn.adapters=true", "optimizer.only=adapters"],
            ["blocks=standard, not revffn and trained=all, not adapters"],
        ),
    ],
)
def test_the_published_law_is_of_plain_models(overrides, told):
    """It expects no loss of its own."""
    plan = make_plan(Inputs(1e9, 2e10, kind=kind_of(load_config("dense-1b", overrides)[0])), STEP_LAW)
    said = "Step Law was fitted on models with {}: its learning rate and batch are a guess here"
    assert list(plan.warnings) == [said.format(one) for one in told]
    assert plan_json(plan)["expected_loss_own"] is False


def test_a_sweep_tells_its_kind_and_the_fit_keeps_it(tmp_path):
    config, _ = load_config("quickstart", [])
    runs = lay_out(
        config, Grid(widths=(96,), tokens=(2e5,), lr_points=1, batch_points=1), STEP_LAW, None
    ).runs
    assert {run.kind for run in runs} == {CANON}
    table = read_runs(write(tmp_path / "runs.csv", sweep(), kind=CANON))
    assert table.kind == CANON
    law = fit_law(table, "mine", draws=20)
    assert law.kind == law.law().kind == CANON
    assert read_runs(write(tmp_path / "old.csv", sweep())).kind == ""


def test_runs_of_two_kinds_are_refused(tmp_path):
    path = write(tmp_path / "runs.csv", sweep(), kind=CANON)
    other = write(tmp_path / "other.csv", sweep(), kind=DENSE)
    path.write_text(path.read_text() + other.read_text().split("\n", 1)[1])
    with pytest.raises(
        UserError, match=r"runs\.csv mixes kind .*canon=AC.* and .*canon=none.*; fit each in a file"
    ):
        read_runs(path)


@pytest.mark.parametrize(
    ("override", "told"),
    [("model.canon=none", "canon=AC, not none:"), ("model.ffn=moe", "ffn=dense, not moe:")],
)
def test_train_warns_of_a_law_of_another_kind(override, told):
    config, origins = load_config("quickstart", [override])
    plan, warnings = resolve(config, origins, Machine(2, "cpu", False), None)
    (said,) = [warning for warning in warnings if "was fitted on models with" in warning]
    assert told in said
    assert plan.inputs.kind == kind_of(config)
    assert plan_json(plan)["expected_loss"] is None
