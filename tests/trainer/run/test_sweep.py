"""What counts as a result of a sweep's run, and what the folder of a sweep holds; no run is started."""

import csv
import json
from pathlib import Path

import pytest
import yaml

from stepline.trainer.errors import UserError
from stepline.trainer.plan.grid import numbers
from stepline.trainer.run.eval_command import evaluate_run
from stepline.trainer.run.launch import run_training
from stepline.trainer.run.sweep import run_sweep
from stepline.trainer.run.sweep_runs import RunFailed, open_sweep, read_result


def outcome(folder: Path, first_loss: float = 6.0, **values) -> Path:
    folder.mkdir(exist_ok=True)
    base = {"status": "done", "exit_code": 0, "attempt": 1, "seconds": 99.0, "train_seconds": 3.5}
    (folder / "outcome.json").write_text(json.dumps(base | values))
    (folder / "metrics.jsonl").write_text(json.dumps({"step": 1, "loss": first_loss}) + "\n")
    return folder


def test_a_result_a_divergence_and_a_failure_are_three_things(tmp_path):
    good = read_result(outcome(tmp_path / "a", val_loss=4.25))
    assert (good.loss, good.diverged, good.seconds) == (4.25, False, 3.5)
    for name, values in {
        "nan": {"val_loss": None, "val_loss_is_finite": False},
        "nan of an older version": {"val_loss": float("nan")},
        "above": {"val_loss": 6.01},
        "guard": {"status": "failed", "exit_code": 1, "diverged": True, "message": "10 steps had a NaN"},
    }.items():
        bad = read_result(outcome(tmp_path / name, **values))
        assert (bad.loss, bad.diverged) == (None, True)
        assert bad.reason
    for name, values in {
        "crash": {"status": "failed", "exit_code": 1, "message": "RuntimeError: boom"},
        "mistake": {"status": "stopped", "exit_code": 2, "message": "choose another"},
        "saved": {"status": "continue", "exit_code": 75, "message": "to be continued"},
    }.items():
        with pytest.raises(RunFailed, match=values["message"]):
            read_result(outcome(tmp_path / name, **values))
    full = outcome(tmp_path / "full", val_loss=4.25)
    (full / "metrics.jsonl").unlink()
    assert read_result(full).loss == 4.25
    (full / "metrics.jsonl").write_text("no row\n")
    with pytest.raises(RunFailed, match="is not a JSON object"):
        read_result(full)
    killed = tmp_path / "killed"
    killed.mkdir()
    with pytest.raises(RunFailed, match="no outcome and no log"):
        read_result(killed)
    (killed / "outcome.json").write_text("{")
    (killed / "output.log").write_text("Traceback\nKilled by something\n\n")
    with pytest.raises(RunFailed, match="Killed by something"):
        read_result(killed)


def test_dry_run_tells_runs_and_cost_and_writes_nothing(request_of, tmp_path, capsys):
    assert run_sweep(request_of(dry_run=True, peak_flops=1e12, mfu=0.5), as_json=True) == 0
    told = json.loads(capsys.readouterr().out)
    assert len(told["runs"]) == 4
    assert told["cost"]["tokens"] == 4 * 1920
    flops = sum(run["flops"] + run["eval_flops"] for run in told["runs"])
    assert told["cost"]["flops"] == pytest.approx(flops)
    assert told["cost"]["seconds"] == pytest.approx(4 * 4.0 + flops / 0.5e12)
    assert "MFU 0.5" in told["cost"]["assumption"]
    assert not (tmp_path / "sweep").exists()


def test_layout_is_kept_and_another_one_is_refused(request_of, tmp_path, capsys):
    ask = request_of(slurm=True, print_only=True, jobs=2, sbatch_options="--partition=gpu --time=1:00:00")
    assert run_sweep(ask, as_json=False) == 0
    script = capsys.readouterr().out
    assert "#SBATCH --array=0-3%2\n" in script
    assert "#SBATCH --partition=gpu\n#SBATCH --time=1:00:00\n" in script
    assert f'sweep --output {tmp_path / "sweep"} --only "$SLURM_ARRAY_TASK_ID"' in script
    assert (tmp_path / "sweep" / "sweep.sbatch").read_text() == script
    sweep = open_sweep(tmp_path / "sweep")
    assert [run.name for run in sweep.missing()] == [run.name for run in sweep.runs]

    frozen = yaml.safe_load((tmp_path / "sweep" / "config.yaml").read_text())
    assert frozen["logging"] | {"every": 1} == frozen["logging"]
    assert (frozen["logging"]["wandb"], frozen["logging"]["eval_every"]) == ("off", 0)
    assert frozen["logging"]["eval_split"] == "tune"
    assert frozen["checkpoint"]["every"] == 1000  # the file's own
    for asked, sentence in (
        (request_of(grid={"lr": (1e-3, 4e-3)}), r"runs\.\d\.\S+ was .* and is now"),
        (request_of("optimizer.beta2=0.9"), r"config\.optimizer\.beta2 was 0\.95 and is now 0\.9"),
        (request_of(grid={"seeds": 2}), "runs were 4 and are now 8"),
    ):
        with pytest.raises(UserError, match=sentence):
            run_sweep(asked, as_json=False)
    with pytest.raises(UserError, match="--only is 4; the sweep has runs 0 to 3"):
        run_sweep(request_of(config=None, only=4), as_json=False)
    (tmp_path / "sweep" / "sweep.json").write_text("{")
    with pytest.raises(UserError, match=r"sweep\.json is damaged"):
        run_sweep(request_of(), as_json=False)


def test_rows_of_ended_runs_are_gathered(request_of, tmp_path, capsys):
    """Each run once, also one whose sweep died before it could record it; its checkpoints go."""
    run_sweep(request_of(slurm=True, print_only=True), as_json=False)
    sweep = open_sweep(tmp_path / "sweep")
    for run, values in zip(sweep.runs, ({"val_loss": 4.5}, {"val_loss": float("inf")})):
        folder = sweep.folder(run)
        (folder / "checkpoints" / "step-000010").mkdir(parents=True)
        outcome(folder, **values)
    capsys.readouterr()
    for _ in range(2):
        assert run_sweep(request_of(config=None, collect=True), as_json=True) == 0
        told = json.loads(capsys.readouterr().out)
        assert (told["runs"], told["done"], told["diverged"]) == (4, 2, 1)
    lines = (tmp_path / "sweep" / "runs.csv").read_text().splitlines()
    assert lines[0] == (
        "name,params,tokens,lr,batch_tokens,weight_decay,optimizer,sync,schedule,kind,seed,loss,diverged,held_out,seconds"
    )
    rows = list(csv.DictReader(lines))
    assert [(row["loss"], row["diverged"], row["seconds"]) for row in rows] == [
        ("4.5", "0", "3.5"),
        ("", "1", "3.5"),
    ]
    assert rows[0]["params"] == str(sweep.runs[0].params)
    fingerprint = json.loads((tmp_path / "sweep" / "sweep.json").read_text())["data"][0]
    assert rows[0]["held_out"] == f"tune of {fingerprint[:16]}"
    assert not list((tmp_path / "sweep").glob("runs/*/checkpoints"))
    run_sweep(request_of(slurm=True, print_only=True, config=None), as_json=False)
    assert "#SBATCH --array=2-3\n" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"config": "quickstrat"}, "did you mean 'quickstart'"),
        ({"config": None}, "holds no sweep to continue; give a CONFIG"),
        ({"jobs": 0}, "--jobs is 0; it must be at least 1"),
        ({"slurm": True}, "there is no sbatch on this machine"),
        (
            {"grid": {"lr": (20.0,)}},
            "optimizer.lr is 20.0; it must be 'auto' or a number above 0 and at most 10",
        ),
        ({"grid": {"tokens": (100.0,)}}, "a budget of 100 tokens is below one batch of 192"),
        ({"grid": {"ranks": 0}}, "--ranks is 0; it must be between 1 and 1e+06"),
        ({"grid": {"tokens_per_param": (1.0,)}}, "give --tokens or --tokens-per-param, not both"),
        ({"device": "Z9"}, "the peak of device 'Z9' is not known"),
    ],
)
def test_mistakes(request_of, tmp_path, monkeypatch, options, sentence):
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(UserError) as caught:
        run_sweep(request_of(**options), as_json=False)
    assert sentence in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "sweep").exists()


def test_folders_that_are_no_sweep(request_of, tmp_path):
    with pytest.raises(UserError, match="holds no sweep to collect"):
        run_sweep(request_of(collect=True), as_json=False)
    assert not (tmp_path / "sweep").exists()
    (tmp_path / "sweep").mkdir()
    (tmp_path / "sweep" / "runs.csv").write_text("mine\n")
    for output in (tmp_path / "sweep", tmp_path / "sweep" / "runs.csv"):
        with pytest.raises(UserError, match="exists and holds no sweep; choose another --output"):
            run_sweep(request_of(output=output), as_json=False)
    assert (tmp_path / "sweep" / "runs.csv").read_text() == "mine\n"


def test_mistakes_in_data(request_of, tmp_path):
    for override, sentence in (
        ("data.path=null", "the config names no data"),
        (f"data.path={tmp_path}/no", "no meta.json"),
        ("run.folder=mine", "run.folder has no place in a sweep"),
        ("optimizer.lrr=1", "unknown key 'optimizer.lrr'; did you mean 'lr'"),
        ("model.vocab_size=300", "set it to at least 330"),
        ("data.seq_len=100000", "fewer than seq_len 100000"),
    ):
        with pytest.raises(UserError, match=sentence):
            run_sweep(request_of(override), as_json=False)


def test_numbers():
    assert numbers("3e5, 6e5,", "--tokens") == (3e5, 6e5)
    assert numbers(None, "--tokens") is None
    assert numbers("96,128", "--widths", whole=True) == (96, 128)
    for text, sentence in (
        ("", "--lr is empty"),
        ("1,x", "'x', which is no number"),
        ("1,-2", "every value must be above 0"),
        ("nan", "every value must be above 0"),
        ("1e-3,0.001", "0.001 twice"),
    ):
        with pytest.raises(UserError, match=sentence):
            numbers(text, "--lr")
    with pytest.raises(UserError, match="must be a whole number"):
        numbers("96.5", "--widths", whole=True)


def test_validation_on_the_tune_split(tiny_config, tuned_data, tiny_data, tmp_path, capsys):
    """`logging.eval_split: tune` validates on the text that `stepline eval --split tune` reads; absent: refused."""
    folder = tmp_path / "run"
    options = [f"data.path={tuned_data}", "budget.steps=2", "logging.eval_split=tune"]
    assert run_training(str(tiny_config), [f"run.folder={folder}", *options], "never") == 0
    told = json.loads((folder / "outcome.json").read_text())["val_loss"]
    assert told == pytest.approx(evaluate_run(folder, tuned_data, "tune")["val_loss"], rel=1e-6)
    assert told != pytest.approx(evaluate_run(folder, tuned_data, "val")["val_loss"], rel=1e-6)
    capsys.readouterr()
    assert run_training(str(tiny_config), [*options, f"data.path={tiny_data}"], "never") == 2
    assert "has no tokens in 'tune' to evaluate" in capsys.readouterr().err
