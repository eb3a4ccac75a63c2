"""The expected final loss: shown where the user's own numbers give it an intercept, and nowhere else."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from stepline.trainer.plan.expect import Expected, expected_final_loss, held_out_text, kept_expectation
from stepline.trainer.plan.laws import EPOCH, STEP_LAW, LossLaw, Source
from stepline.trainer.plan.planner import Inputs, make_plan

DATA_FOLDER = Path("/nowhere/run")
DATA = ["0123456789abcdef" + "0" * 48]
BIG = {"params": 1e8, "tokens": 1e10, "seq_len": 1024}


def epoch(n, d):
    return 1.8172 + 482.01 / n**0.3478 + 2085.43 / d**0.3658


def own_law(held_out):
    loss = LossLaw(Source("mine", "", ""), 1.0, 30.0, 0.3478, 100.0, 0.3658, ())
    return replace(STEP_LAW, loss_law=loss, held_out=held_out)


def earlier(runs, name, loss, *, params=2e8, tokens=2e10, data=DATA, split="val", status="done", **inputs):
    folder = runs / name
    folder.mkdir(parents=True)
    plan = {
        "params": params,
        "tokens": tokens,
        "data": data,
        "eval_split": split,
        "inputs": {"seq_len": 1024, "optimizer": "adamw", "sync": "all_reduce"} | inputs,
    }
    (folder / "plan.json").write_text(json.dumps(plan))
    (folder / "outcome.json").write_text(json.dumps({"status": status, "val_loss": loss}))


def test_own_law_on_the_same_text():
    plan = make_plan(Inputs(2e5, 4e5), own_law("val of 0123456789abcdef"))
    expected = expected_final_loss(plan, DATA_FOLDER, DATA, "val")
    assert expected.loss == pytest.approx(1.0 + 30 / 2e5**0.3478 + 100 / 4e5**0.3658, rel=1e-12)
    assert "mine" not in expected.source
    assert "Step Law" in expected.source
    for otherwise in ({"kind": "canon=A"}, {"optimizer": "muon"}, {"sync": "diloco"}):
        other = make_plan(Inputs(2e5, 4e5, **otherwise), plan.law)
        assert expected_final_loss(other, DATA_FOLDER, DATA, "val") is None


@pytest.mark.parametrize("held_out", ["tune of 0123456789abcdef", "val of fedcba9876543210", ""])
def test_a_law_of_other_text_says_nothing(held_out):
    plan = make_plan(Inputs(2e5, 4e5), own_law(held_out))
    assert expected_final_loss(plan, DATA_FOLDER, DATA, "val") is None


def test_a_published_law_says_nothing():
    assert expected_final_loss(make_plan(Inputs(**BIG)), DATA_FOLDER, DATA, "val") is None


def test_earlier_run_gives_the_intercept(tmp_path):
    """Of several the nearest; none of other data, split or sequence, unfinished, or outside Chinchilla's range."""
    plan = make_plan(Inputs(**BIG))
    earlier(tmp_path, "far", 3.0, params=5e9, tokens=4e11)
    earlier(tmp_path, "other-data", 9.0, data=["f" * 64])
    earlier(tmp_path, "other-split", 9.0, split="tune")
    earlier(tmp_path, "other-sequence", 9.0, seq_len=512)
    earlier(tmp_path, "other-optimizer", 9.0, optimizer="muon")
    earlier(tmp_path, "other-sync", 9.0, sync="demo")
    earlier(tmp_path, "stopped", 9.0, params=1e8, tokens=1e10, status="stopped")
    earlier(tmp_path, "tiny", 9.0, params=1e6, tokens=1e10)
    expected = expected_final_loss(plan, tmp_path / "new", DATA, "val")
    assert expected.loss == pytest.approx(3.0 + epoch(1e8, 1e10) - epoch(5e9, 4e11), rel=1e-9)
    earlier(tmp_path, "near", 2.9)
    expected = expected_final_loss(plan, tmp_path / "new", DATA, "val")
    assert expected.loss == pytest.approx(2.9 + epoch(1e8, 1e10) - epoch(2e8, 2e10), rel=1e-9)
    assert expected.source == f"the earlier run near and {EPOCH.source.name}"
    other = make_plan(Inputs(**BIG, kind="canon=AC"))
    assert expected_final_loss(other, tmp_path / "new", DATA, "val") is None
    # too small for Epoch's exponents: nothing is said
    assert (
        expected_final_loss(make_plan(Inputs(1e6, 1e10, seq_len=1024)), tmp_path / "new", DATA, "val") is None
    )


def test_kept_over_a_resume(tmp_path):
    assert kept_expectation(tmp_path) is None
    (tmp_path / "plan.json").write_text(json.dumps({"expected_final_loss": {"loss": 2.5, "source": "x"}}))
    assert kept_expectation(tmp_path) == Expected(2.5, "x")


def test_held_out_text():
    assert held_out_text(["a" * 64, "b" * 64], "tune") == f"tune of {'a' * 16}+{'b' * 16}"
