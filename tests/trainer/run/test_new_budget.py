"""A run by wsd that is made longer on resume is the run that was as long from the start."""

import json
import runpy
import signal
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from stepline.comm.mesh import World
from stepline.trainer.config_io import load_config, read_run_config
from stepline.trainer.data.dataset import load_meta
from stepline.trainer.errors import UserError
from stepline.trainer.plan.expect import held_out_text
from stepline.trainer.run.attempt import Attempt
from stepline.trainer.run.manifest import read_state
from stepline.trainer.run.start import start_job
from stepline.trainer.run.submit import Layout, Request, check_run
from stepline.trainer.watch.report.read import read_run

law_file = runpy.run_path(str(Path(__file__).with_name("test_expected.py")))["law_file"]


def test_twenty_steps_become_thirty(train, tiny_config, tiny_data, tmp_path, monkeypatch):
    law = law_file(tmp_path / "law.json", held_out_text([load_meta(tiny_data).fingerprint], "val"))
    options = ["schedule.name=wsd", "schedule.warmup_steps=2", f"budget.law={law}", "logging.eval_windows=4"]
    thirty = [*options, "budget.steps=30", "checkpoint.every=auto"]
    straight = train(1, tiny_config, tmp_path / "straight", *thirty)
    folder = tmp_path / "run"
    short = train(1, tiny_config, folder, *options, "checkpoint.every=12")
    assert [row["lr"] for row in short if "loss" in row][15:] == pytest.approx(
        [5e-3, 5e-3, 3.75e-3, 2.5e-3, 1.25e-3]
    )

    # its decay is done; a checkpoint before it is named instead
    one = World(0, 1, 0, 1)
    with pytest.raises(UserError) as caught:
        start_job(str(tiny_config), [f"run.folder={folder}", *thirty], "auto", one)
    assert str(caught.value) == (
        f"the budget was budget.steps=20 in {folder} and is now budget.steps=30; the learning rate has decayed since "
        "step 18 and the checkpoint is of step 20: give the old value back, or go on from a checkpoint of step 17 or "
        "before (`--resume PATH`, once)"
    )
    first_id = (folder / "run_id").read_text()
    (folder / "wandb-sent.json").write_text(
        '{"step": 20, "validation": true, "mode": "online", "rows": 21, "latest": []}'
    )
    longer = train(1, tiny_config, folder, *thirty, resume="step-000012")
    second_id = (folder / "run_id").read_text()
    assert second_id != first_id, "wandb never gives up a row that it was sent"
    assert read_state(folder / "checkpoints" / "step-000030")["run_id"] == second_id.strip()

    for key in ("step", "tokens", "loss", "lr", "grad_norm", "val_loss"):
        assert [row.get(key) for row in longer] == [row.get(key) for row in straight], key
    first, plan = (json.loads((path / "plan.json").read_text()) for path in (tmp_path / "straight", folder))
    kept = {key: plan["inputs"].pop(key) for key in ("settled_at", "lr", "weight_decay", "batch_tokens")}
    assert kept == {"settled_at": 20 * 192, "lr": 5e-3, "weight_decay": 0.1, "batch_tokens": 192}
    assert (plan["tokens"], plan["steps"]) == (30 * 192, 30)
    assert plan["explain"][1]["equation"].endswith("; as at the start, D = 3840")
    same = set(first) - {"inputs", "explain"}
    assert {key: plan[key] for key in same} == {
        key: first[key] for key in same
    }  # the expected loss is among them
    assert (
        plan["expected_final_loss"]["loss"]
        == longer[-1]["expected_final_loss"]
        != short[-1]["expected_final_loss"]
    )
    report = read_run(folder, "run")
    assert (report.summary["steps"], report.expected) == (30, plan["expected_final_loss"])
    assert json.loads((folder / "heartbeat.json").read_text())["steps"] == 30
    note = (
        "the budget is 5,760 tokens instead of 3,840: learning rate, weight decay, batch and warm-up are kept"
    )
    assert note in json.loads((folder / "environment.json").read_text())["notes"]
    saved = read_run_config(folder)
    assert (saved.total_steps(), saved.checkpoint.every) == (30, 3)

    # the next attempt of the same command knows nothing of a change; the old budget is one
    job = start_job(str(tiny_config), [f"run.folder={folder}", *thirty], "step-000012", one)
    assert (job.replanned, job.expected.loss) == (False, plan["expected_final_loss"]["loss"])
    job = start_job(
        str(tiny_config), [f"run.folder={folder}", *options, "budget.steps=20"], "step-000012", one
    )
    assert (job.plan.inputs.tokens, job.plan.inputs.settled_at) == (20 * 192, 20 * 192)
    assert job.expected.loss == short[-1]["expected_final_loss"]

    # where torchrun's agent or SLURM has begun to train and starts the same command again, what it says is done
    begun = {"launchers": ["agent"], "job": "7", "requeues": 0}
    (folder / ".begun.json").write_text(json.dumps(begun))
    launched = {"TORCHELASTIC_RUN_ID": "none", "TORCHELASTIC_RESTART_COUNT": "0"}  # as where a node has come
    for environment, launcher, again in (
        ({}, "agent", False),
        (launched, "agent", True),
        (launched, "another", False),
        ({"SLURM_JOB_ID": "7", "SLURM_RESTART_COUNT": "0"}, "another", False),
        ({"SLURM_JOB_ID": "7", "SLURM_RESTART_COUNT": "1"}, "another", True),
        ({"SLURM_JOB_ID": "8", "SLURM_RESTART_COUNT": "1"}, "another", False),
    ):
        with monkeypatch.context() as patched:
            for name, value in environment.items():
                patched.setenv(name, value)
            asked = str(tiny_config), [f"run.folder={folder}", *thirty]
            job = start_job(*asked, "step-000012", one, launcher=launcher)
            chosen = ("step-000030", False) if again else ("step-000012", True)
            assert (job.resume_from.name, job.resume_chosen, job.again) == (*chosen, again)
            if again:
                assert start_job(*asked, "never", one, launcher=launcher).resume_from.name == "step-000030"
            else:
                with pytest.raises(UserError, match="holds a run already"):
                    start_job(*asked, "never", one, launcher=launcher)

    # all that the law decides is decided
    law.unlink()
    job = start_job(str(tiny_config), [f"run.folder={folder}", *thirty], "step-000012", one)
    assert any(
        note.startswith(f"no law file '{law}'")
        and note.endswith("the run goes on with what was planned by it")
        for note in job.notes
    )
    assert (job.config.optimizer.lr, job.expected.loss) == (5e-3, plan["expected_final_loss"]["loss"])
    with pytest.raises(UserError, match="no law file"):
        start_job(str(tiny_config), [f"run.folder={tmp_path / 'new'}", *thirty], "auto", one)
    ask, layout = Request(str(tiny_config), [], resume="step-000012"), Layout(0, 1, 1)
    check_run(*load_config(str(tiny_config), [f"run.folder={folder}", *thirty]), layout, ask)
    with pytest.raises(UserError, match="no law file"):
        check_run(
            *load_config(str(tiny_config), [f"run.folder={tmp_path / 'new'}", *thirty]),
            layout,
            replace(ask, resume="auto"),
        )


def left_by_a_signal(chosen: bool) -> str:
    job = SimpleNamespace(world=SimpleNamespace(size=1), resume_chosen=chosen)
    stop = SimpleNamespace(number=0, launcher=None)
    attempt = SimpleNamespace(job=job, stop=stop, group=None, state=SimpleNamespace(step=3))
    return str(Attempt.to_be_continued(attempt, signal.SIGTERM))


@pytest.mark.parametrize(
    ("chosen", "command"), [(False, "the same command"), (True, "the same command without --resume")]
)
def test_who_named_a_checkpoint_is_told_not_to_do_so_again(pool, chosen, command):
    said = pool.run(1, left_by_a_signal, chosen)
    assert said == [f"SIGTERM: step 3 is saved; {command} continues the run"]
