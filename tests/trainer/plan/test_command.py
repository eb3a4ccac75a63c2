"""`stepline plan` as a user calls it."""

import io
import json
import math
import os
import subprocess
import sys

import pytest
from rich.console import Console

from stepline.models.config import ModelConfig
from stepline.models.flops import flops_per_token, parameter_counts
from stepline.trainer.config_io import find_config, load_config
from stepline.trainer.plan.cost import hardware, iso_loss, run_cost
from stepline.trainer.plan.explain import show
from stepline.trainer.plan.planner import Inputs, make_plan
from stepline.trainer.plan.screen import short

TWO = ["--params", "1.1e9", "--tokens", "1e11"]


def plan(*arguments: str, code: int = 0) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "stepline.trainer", "plan", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == code, done.stderr
    return done


def test_json_of_two_numbers():
    out = plan(
        *TWO, "--seq-len", "4096", "--world-size", "64", "--micro-batch", "4", "--device", "H200", "--json"
    )
    values = json.loads(out.stdout)
    assert values["lr"] == pytest.approx(0.001468, rel=1e-3)
    assert (values["batch_tokens"], values["steps"], values["grad_accumulation"]) == (1_048_576, 95_368, 1)
    assert values["weight_decay"] == pytest.approx(0.0710, abs=5e-5)
    assert values["tau"] == pytest.approx(0.1007, abs=5e-5)
    assert values["batch_critical_tokens"] == pytest.approx(1.165e7, abs=5e3)
    ideal = {"lr": 0.001525, "weight_decay": 0.0722, "batch_tokens": 1_108_000}
    assert values["ideal"] == pytest.approx(ideal, rel=1e-3)
    assert values["interval95"]["lr"] == pytest.approx([1.42e-3, 1.70e-3], rel=0.01)
    assert {"power_lines_batch_tokens", "deepseek_lr", "porian_batch_tokens"} <= values[
        "second_opinion"
    ].keys()
    assert values["expected_loss"] == pytest.approx(2.3601, rel=1e-4)
    assert values["warnings"] == []
    hours = 6 * 1.1e9 * 1e11 / (989e12 * 0.4) / 3600
    assert values["cost"]["gpu_hours"] == pytest.approx(hours)
    assert values["cost"]["hours"] == pytest.approx(hours / 64)
    # Power Lines: D = D_min (1 + B / B_crit(D_min)), B_crit = 2048 * .0471 * D_min^.462
    assert values["cost"]["max_useful_gpus"] == 2728
    critical = 2728 * 4096
    least = (critical / (2048 * 0.0471)) ** (1 / 0.462)
    assert least * (1 + 1_048_576 / critical) == pytest.approx(1e11, rel=1e-3)
    assert values["hardware"]["measured"] is False
    planned = next(row for row in values["iso_loss"] if row["batch_tokens"] == 1_048_576)
    assert planned["tokens"] == pytest.approx(1e11)
    times = [row["hours"] for row in values["iso_loss"]]
    assert times == sorted(times, reverse=True)
    assert [row["gpu_hours"] for row in values["iso_loss"]] == sorted(
        r["gpu_hours"] for r in values["iso_loss"]
    )


def test_a_config_is_counted_from_its_shapes():
    values = json.loads(plan("dense-125m", "budget.tokens=2.5e9", "--world-size", "8", "--json").stdout)
    model: ModelConfig = load_config(str(find_config("dense-125m")))[0].model
    assert values["params"] == parameter_counts(model).linear
    assert values["inputs"]["world_size"] == 8
    assert values["batch_tokens"] % (8 * values["inputs"]["micro_batch"] * values["inputs"]["seq_len"]) == 0


@pytest.mark.parametrize(
    "arguments", [("dense-1b",), ("quickstart", "--link-mbit", "100", "--replicas", "2"), TWO]
)
def test_it_answers_within_1_5_s_of_a_processor_and_loads_nothing_heavy(arguments):
    """The processor's time: the clock's depends on what else the machine does."""
    code = (
        "import sys\n"
        "from stepline.trainer.cli import main\n"
        "try: main()\n"
        "except SystemExit as left: assert not left.code\n"
        "heavy = {'torch', 'numpy', 'scipy', 'pandas', 'matplotlib', 'pyarrow', 'wandb', 'transformers', 'deepspeed'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)\n"
    )
    child = subprocess.Popen([sys.executable, "-c", code, "plan", *arguments], stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(child.pid, 0)
    child.returncode = os.waitstatus_to_exitcode(status)
    assert child.returncode == 0
    assert usage.ru_utime + usage.ru_stime < 1.5


def test_a_mixture_shows_its_active_weights_and_no_empty_columns():
    counts = parameter_counts(load_config("moe-tiny")[0].model)
    out = plan("moe-tiny", "budget.tokens=1e6").stdout
    assert f"N = {counts.linear:.4g} ({counts.active:.4g} active)" in " ".join(out.split())
    assert "GPU-hours" not in out
    assert "GPU-hours" in plan(*TWO, "--device", "H200").stdout


def test_the_time_on_so_many_gpus():
    out = plan(*TWO, "--device", "H200", "--world-size", "64").stdout
    seconds = 6 * 1.1e9 * 1e11 / (989e12 * 0.4) / 64
    assert f"(assumed), {seconds / 3600:.3g} h on 64 GPUs" in " ".join(out.split())


def test_cost_of_a_config_counts_attention_and_head():
    out = plan("dense-1b", "budget.tokens=1e11", "--peak-flops", "1e15", "--mfu", "0.5", "--json").stdout
    config = load_config(str(find_config("dense-1b")))[0]
    flops = flops_per_token(config.model, config.data.seq_len).total * 1e11
    cost = json.loads(out)["cost"]
    assert cost["flops"] == pytest.approx(flops)
    assert cost["gpu_hours"] == pytest.approx(flops / 0.5e15 / 3600)


def test_the_table_has_equations_with_numbers():
    text = plan(*TWO).stdout
    assert "1.79 * 1.1e+09^-0.713 * 1e+11^0.307 = 0.001525" in text
    assert "others say: power_lines 1,023,414" in text
    assert "linear to zero" in text


def test_the_published_law_by_its_name():
    assert plan(*TWO, "--law", "step-law").stdout == plan(*TWO).stdout


@pytest.mark.parametrize("tokens", [1e11, 2**20 * 100.0, 12345.0])
@pytest.mark.parametrize("batch", [2.0**10, 2.0**10 - 1, 777.7])
def test_steps_of_the_same_loss_are_those_of_the_plan(tokens, batch):
    (row,) = [row for row in iso_loss(tokens, batch, None) if row.batch_tokens == batch]
    assert row.steps == math.ceil(tokens / batch)


@pytest.mark.parametrize("numbers", [("1.1e9", "1e11"), ("1e12", "3e13"), ("2.5e5", "4e5")])
def test_tables_fit_80_columns(numbers):
    config = Inputs(*map(float, numbers), seq_len=64, world_size=8, micro_batch=1)
    made, console = make_plan(config), Console(width=80, file=io.StringIO())
    machine = hardware("H200", None, 8)
    cost = run_cost(config.tokens, 6 * config.params, machine, made.batch_critical_tokens, 64)
    show(made, machine, cost, iso_loss(config.tokens, made.batch_tokens, cost), console)
    lines = console.file.getvalue().splitlines()
    assert "…" not in console.file.getvalue()
    for value in (f"{made.batch_tokens:,.0f} <", f"{made.steps:,}", short(made.ideal_lr, 4)):
        assert any(value in line for line in lines)


def test_short():
    values = (1_048_576, 999_999, 0.000390625, 1.5e-5, 1.0, 0, 3e13)
    assert [short(v) for v in values] == ["1.05M", "1M", ".000391", "1.5e-5", "1", "0", "30T"]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--params", "1e9"], "give --params and --tokens, or a config"),
        (["{run}"], "is a folder; its config is {run}/config.yaml"),
        (["--params", "1e40", "--tokens", "1e9"], "params is 1e+40"),
        ([*TWO, "--device", "H999"], "the peak of device 'H999' is not known"),
        ([*TWO, "--mfu", "0.5"], "--mfu needs --device"),
        ([*TWO, "--device", "H200", "--mfu", "40"], "mfu is 40"),
        ([*TWO, "--law", "nowhere.json"], "no law file 'nowhere.json'"),
        ([*TWO, "--law", "nowhere/quickstart.json"], "no law file 'nowhere/quickstart.json'"),
        (["nowhere/dense-125m.yaml"], "no config file 'nowhere/dense-125m.yaml'"),
        (["dense-125m", "--params", "1e9"], "--params does not go with a config"),
        (["quickstart", "budget.tokens=1000", "budget.batch_tokens=2048"], "below one batch"),
        (["quickstart", "budget.tokens=10"], "the budget of 10 tokens is below one window of 128"),
        (["--params", "1e9", "--tokens", "10", "--seq-len", "64"], "below one window of 64"),
        ([*TWO, "--world-size", "9" * 23], "--world-size is 1e+23; it must be between 1 and 1e+15"),
        (["--params", "0", "--tokens", "10"], "--params is 0; it must be between 1 and 1e+15"),
    ],
)
def test_mistakes(tmp_path, arguments, sentence):
    (tmp_path / "config.yaml").touch()
    arguments = [argument.replace("{run}", str(tmp_path)) for argument in arguments]
    sentence = sentence.replace("{run}", str(tmp_path))
    done = plan(*arguments, code=2)
    assert done.stdout == ""
    assert done.stderr.startswith("error: ")
    assert sentence in done.stderr
    assert done.stderr.count("\n") == 1


def test_what_train_would_say_of_the_data_and_of_another_device(tmp_path):
    from stepline.trainer.plan.command import corpus_tokens

    folder = tmp_path / "data"
    (folder / "train").mkdir(parents=True)
    three = ["dense-125m", "--world-size", "3", "--json"]
    gpus = json.loads(plan(*three).stdout)["warnings"]
    assert any("is that of GPUs, which are assumed; for CPUs add run.device=cpu" in w for w in gpus)
    for device in ("cpu", "cuda"):
        told = json.loads(plan(*three, f"run.device={device}").stdout)["warnings"]
        assert not any("which are assumed" in w for w in told)
    config = load_config("dense-125m", [f"data.path={folder}", "budget.tokens=1000"])[0]
    assert corpus_tokens(config) is None
