"""The quickstart's law is the fit of the sweep that travels with it, and its config plans by it."""

import csv

import pytest

from stepline.trainer.config_io import find_config, load_config
from stepline.trainer.plan.fit import fit_law
from stepline.trainer.plan.law_file import find_law, read_law
from stepline.trainer.plan.planner import make_plan
from stepline.trainer.plan.resolve import config_inputs, config_law
from stepline.trainer.plan.runs import read_runs


def test_the_law_is_the_fit_of_its_runs():
    path = find_law("quickstart")
    runs = path.with_suffix(".csv")
    shipped, again = read_law(path), fit_law(read_runs(runs), "quickstart").law()
    assert shipped.lr_law.scale == pytest.approx(again.lr_law.scale, rel=1e-6)
    assert shipped.batch_law.scale == pytest.approx(again.batch_law.scale, rel=1e-6)
    assert shipped.lr_law.exponents == again.lr_law.exponents
    for n, d in ((4e5, 4e5), (1e9, 2e10)):
        assert shipped.lr_law.interval(n, d) == pytest.approx(again.lr_law.interval(n, d), rel=1e-3)
        assert shipped.batch_law.interval(d) == pytest.approx(again.batch_law.interval(d), rel=1e-3)
    assert shipped.kind == again.kind == "ffn=dense blocks=standard canon=AC qk_norm=true sparse=none"
    assert shipped.loss_law.loss(4e5, 1e6) == pytest.approx(again.loss_law.loss(4e5, 1e6), rel=1e-6)
    with runs.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) >= 81
    assert {row["held_out"].split(" of ")[0] for row in rows} == {"tune"}


def test_the_quickstart_plans_by_it():
    config, _ = load_config(str(find_config("quickstart")), [])
    law = config_law(config)
    assert (law.source.name, law.optimizer) == ("quickstart", "muon")
    plan = make_plan(config_inputs(config, 2), law)
    n, d = plan.inputs.params, plan.inputs.tokens
    assert (n, d) == (2 * (4 * 128**2 + 3 * 128 * 384), 3.5e6)
    assert plan.ideal_lr == pytest.approx(law.lr_law.scale * n**-0.713 * d**0.307, rel=1e-12)
    assert [warning.partition(":")[0] for warning in plan.warnings] == ["quickstart is extrapolated"]
