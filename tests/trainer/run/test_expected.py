"""A run whose law knows the loss of this text shows what it should end with, in all that watches it."""

import json
import logging
import math
import sys

import pytest

from stepline.comm.mesh import World
from stepline.trainer.data.dataset import load_meta
from stepline.trainer.plan.command import Request, run_plan
from stepline.trainer.plan.expect import held_out_text
from stepline.trainer.plan.law_file import LawFile, write_law
from stepline.trainer.run.launch import run_training
from stepline.trainer.run.start import start_job
from stepline.trainer.watch.metrics import read_metrics


def law_file(path, held_out):
    power = {"scale": 1e-2, "exponents": [0.0, 0.0]}
    content = {
        "name": "mine",
        "held_out": held_out,
        "lr": power,
        "batch_tokens": power | {"exponents": [0.571]},
        "params": (1e3, 1e9),
        "tokens": (1e2, 1e9),
        "tokens_per_param": (1e-3, 1e3),
        "loss": {
            "entropy": 1.5,
            "params_scale": 20.0,
            "params_exponent": 0.3478,
            "tokens_scale": 30.0,
            "tokens_exponent": 0.3658,
        },
    }
    write_law(LawFile(**content), path)
    return path


def run(config: str, overrides: list[str], resume: str) -> str:
    sys.argv = ["stepline"]
    assert run_training(config, overrides, resume) == 0
    (path,) = [h.baseFilename for h in logging.getLogger("stepline").handlers if hasattr(h, "baseFilename")]
    with open(path, encoding="utf-8") as file:
        return file.read()


def test_expected_loss_of_a_run(pool, tiny_config, tiny_data, tmp_path):
    held_out = held_out_text([load_meta(tiny_data).fingerprint], "val")
    law = law_file(tmp_path / "law.json", held_out)
    folder = tmp_path / "run"
    overrides = [f"run.folder={folder}", f"budget.law={law}", "logging.eval_every=5", "checkpoint.every=5"]
    (said,) = pool.run(1, run, str(tiny_config), overrides, "never", init=False)
    plan = json.loads((folder / "plan.json").read_text())
    n, d = plan["params"], plan["tokens"]
    expected = 1.5 + 20 / n**0.3478 + 30 / d**0.3658
    assert plan["expected_final_loss"]["loss"] == pytest.approx(expected, rel=1e-12)
    rows = [row for row in read_metrics(folder / "metrics.jsonl") if "val_loss" in row]
    assert [row["step"] for row in rows] == [5, 10, 15, 20]
    assert all(math.isclose(row["expected_final_loss"], expected) for row in rows)
    outcome = json.loads((folder / "outcome.json").read_text())
    assert (outcome["expected_final_loss"], outcome["val_loss"]) == (
        rows[-1]["expected_final_loss"],
        rows[-1]["val_loss"],
    )
    assert f"expected at the end: validation loss {expected:.3f} by the loss law of mine" in said

    # a resume keeps what the first attempt expected, whatever the law's file says by then
    law_file(law, "val of something else")
    for path in (folder / "checkpoints").glob("step-*"):
        if path.name == "step-000020":
            (path / "COMPLETE").unlink()
    pool.run(1, run, str(tiny_config), overrides, "auto", init=False)
    again = [row for row in read_metrics(folder / "metrics.jsonl") if "val_loss" in row]
    assert [row["expected_final_loss"] for row in again] == [rows[0]["expected_final_loss"]] * 4


def test_nothing_is_expected_on_other_text(pool, tiny_config, tmp_path):
    law = law_file(tmp_path / "law.json", "val of something else")
    folder = tmp_path / "run"
    pool.run(1, run, str(tiny_config), [f"run.folder={folder}", f"budget.law={law}"], "never", init=False)
    assert json.loads((folder / "plan.json").read_text())["expected_final_loss"] is None
    assert all("expected_final_loss" not in row for row in read_metrics(folder / "metrics.jsonl"))


def test_plan_says_as_train_that_the_corpus_repeats(tiny_config, tiny_data, tmp_path, capsys):
    budget = ["budget.steps=null", "budget.tokens=1000000"]
    corpus = load_meta(tiny_data).splits["train"].tokens
    told = f"the budget of 1,000,000 tokens repeats the corpus of {corpus:,} {1e6 / corpus:.1f} times"
    job = start_job(str(tiny_config), [*budget, f"run.folder={tmp_path / 'new'}"], "auto", World(0, 1, 0, 1))
    steps = job.config.total_steps() * job.config.budget.batch_tokens
    assert [note for note in job.notes if "repeats" in note] == [told.replace("1,000,000", f"{steps:,}")]
    run_plan(Request(str(tiny_config), budget, world_size=1), as_json=True)
    assert told in json.loads(capsys.readouterr().out)["warnings"]
