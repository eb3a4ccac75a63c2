"""`stepline plan` as a user calls it."""

import json
import subprocess
import sys

import pytest

from stepline.models.config import ModelConfig
from stepline.models.flops import flops_per_token, parameter_counts
from stepline.trainer.config_io import find_config, load_config

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
    assert values["ideal"].keys() == {"lr", "weight_decay", "batch_tokens"}
    assert values["interval95"]["lr"] == pytest.approx([1.42e-3, 1.70e-3], rel=0.01)
    assert {"power_lines_batch_tokens", "deepseek_lr", "porian_batch_tokens"} <= values[
        "second_opinion"
    ].keys()
    assert values["expected_loss"] == pytest.approx(2.3601, rel=1e-4)
    assert values["warnings"] == []
    hours = 6 * 1.1e9 * 1e11 / (989e12 * 0.4) / 3600
    assert values["cost"]["gpu_hours"] == pytest.approx(hours)
    assert values["cost"]["hours"] == pytest.approx(hours / 64)
    assert values["cost"]["max_useful_gpus"] == 11_650_668 // 4096
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


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--params", "1e9"], "give --params and --tokens, or a config"),
        (["--params", "1e40", "--tokens", "1e9"], "params is 1e+40"),
        ([*TWO, "--device", "H999"], "the peak of device 'H999' is not known"),
        ([*TWO, "--mfu", "0.5"], "--mfu needs --device"),
        ([*TWO, "--device", "H200", "--mfu", "40"], "mfu is 40"),
        ([*TWO, "--law", "nowhere.json"], "no law file 'nowhere.json'"),
        (["dense-125m", "--params", "1e9"], "--params does not go with a config"),
        (["quickstart", "budget.tokens=1000", "budget.batch_tokens=2048"], "below one batch"),
    ],
)
def test_mistakes(arguments, sentence):
    done = plan(*arguments, code=2)
    assert done.stdout == ""
    assert done.stderr.startswith("error: ")
    assert sentence in done.stderr
    assert done.stderr.count("\n") == 1
