"""Ranks that were started for different runs are refused before the first step; what may differ is not."""

import json
import os
import shutil
from types import SimpleNamespace

import pytest

from stepline.trainer.config_io import load_config
from stepline.trainer.run.alike import _first_weights, compared
from stepline.trainer.run.launch import run_training
from stepline.trainer.run.manifest import complete_checkpoints
from stepline.trainer.watch.metrics import read_metrics

DEMO = ["parallel.sync=demo", "parallel.shard=1"]


def with_own_options(config: str, common: list[str], own: list[list[str]], resume: list[str]) -> int:
    """Each rank starts with options of its own."""
    rank = int(os.environ["RANK"])
    return run_training(config, common + own[rank], resume[rank])


@pytest.fixture
def start(pool, tiny_config, tmp_path):
    """Exit codes of two ranks, the second with options of its own, and the run's outcome."""

    def run(*own: str, common: list[str] = DEMO, resume: tuple = ("auto", "auto")) -> tuple[list[int], dict]:
        options = [f"run.folder={tmp_path / 'run'}", "budget.steps=4", *common]
        arguments = (str(tiny_config), options, [[], list(own)], list(resume))
        codes = pool.run(2, with_own_options, *arguments, init=False)
        return codes, json.loads((tmp_path / "run" / "outcome.json").read_text())

    return run


@pytest.mark.parametrize(
    ("own", "said"),
    [
        (["precision.reduce=bf16"], "precision.reduce (bf16, parameters)"),
        (["optimizer.weight_decay=0.9"], "optimizer.weight_decay (0.1, 0.9)"),
        (["optimizer.lr=1e-3"], "optimizer.lr (0.001, 0.005)"),
        (["optimizer.name=muon", "optimizer.lr=auto"], "optimizer.name (adamw, muon)"),
        (["budget.steps=40"], "budget.steps (4, 40)"),  # from which warm-up and intervals follow
        (["schedule.warmup_steps=3"], "schedule.warmup_steps (0, 3)"),
        (["model.z_loss=0"], "model.z_loss (0.0, 0.0001)"),
        (["run.seed=1"], "run.seed (0, 1)"),
        (["logging.every=3"], "logging.every (1, 3)"),
        (["parallel.check_replicas_every=5"], "parallel.check_replicas_every (100, 5)"),
        (["parallel.micro_batch=3"], "parallel.micro_batch (2, 3)"),
        (["run.init_from={first}"], "run.init_from (given, null)"),
    ],
)
def test_configs_that_differ_are_refused(start, train, tiny_config, tmp_path, own, said):
    if "{first}" in own[0]:
        train(1, tiny_config, tmp_path / "first", "budget.steps=1")
    common = [*DEMO, "schedule.warmup_steps=0"] if "warmup" in own[0] else DEMO
    codes, outcome = start(*[o.replace("{first}", str(tmp_path / "first")) for o in own], common=common)
    assert codes == [2, 2]
    assert outcome["message"] == f"the ranks' configs have different values of {said}; set the same for all"
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
    beat = json.loads((tmp_path / "run" / "heartbeat.json").read_text())
    assert [beat[key] for key in ("status", "step", "attempt", "exit_code")] == ["stopped", 0, 1, 2]
    for rank in range(2):
        assert outcome["message"] in (tmp_path / f"run/logs/attempt-1/rank-{rank}.log").read_text()


def test_other_data_is_refused(start, tuned_data):
    codes, outcome = start(f"data.path={tuned_data}")
    assert codes == [2, 2]
    assert "the ranks' folders of data hold different texts (fingerprints" in outcome["message"]


def test_sources_are_compared_by_their_weights(tiny_config):
    """Wherever a node has their folders."""

    def of(*sources: str) -> dict:
        options = ["data.path=null", f"data.sources=[{', '.join(sources)}]"]
        return compared(load_config(str(tiny_config), options)[0])

    two = of("{path: a}", "{path: b, weight: 2}")
    assert two == of("{path: c, weight: 1}", "{path: d, weight: 2}")
    more = of("{path: a}", "{path: b, weight: 3}")
    assert {key for key in two if two[key] != more[key]} == {"data.sources"}
    assert of("{path: a}") == compared(load_config(str(tiny_config), ["data.path=a"])[0])


def test_another_checkpoint_is_refused(start, tmp_path):
    common = [*DEMO, "checkpoint.every=2"]
    assert start(common=common)[0] == [0, 0]
    earlier, newest = complete_checkpoints(tmp_path / "run")
    shutil.rmtree(newest)
    shutil.copytree(earlier, earlier.with_name("step-000003"))
    codes, outcome = start(common=common, resume=("auto", str(earlier)))
    assert codes == [2, 2]
    assert "go on from different checkpoints (step-000002, step-000003)" in outcome["message"]


def test_other_weights_to_start_from_are_refused(start, train, tiny_config, tmp_path):
    """Where and when a checkpoint was written does not matter. Frozen weights are read again by a resume."""
    train(1, tiny_config, tmp_path / "first", "budget.steps=1")
    train(1, tiny_config, tmp_path / "copy", "budget.steps=1")  # the same weights, saved another time
    train(1, tiny_config, tmp_path / "other", "budget.steps=1", "run.seed=1")
    common = [*DEMO, f"run.init_from={tmp_path / 'first'}"]
    assert start(f"run.init_from={tmp_path / 'copy'}", common=common)[0] == [0, 0]
    shutil.rmtree(tmp_path / "run")
    codes, outcome = start(f"run.init_from={tmp_path / 'other'}", common=common)
    assert codes == [2, 2]
    assert outcome["message"].startswith("the ranks start from different weights (")

    def seen(name: str, only: str, resume: str | None) -> tuple[int, str, str]:
        optimizer, run = SimpleNamespace(only=only), SimpleNamespace(init_from=tmp_path / name)
        return _first_weights(
            SimpleNamespace(config=SimpleNamespace(optimizer=optimizer, run=run), resume_from=resume)
        )

    assert seen("first", "all", "step-000001") == seen("other", "all", "step-000001")
    assert "neither a run with a complete checkpoint" in seen("gone", "all", None)[2]
    for resume in (None, "step-000001"):
        assert seen("first", "adapters", resume)[0] != seen("other", "adapters", resume)[0]


def test_what_a_node_may_have_of_its_own(start, tiny_data, tmp_path):
    """Paths, and what touches one rank alone."""
    shutil.copytree(tiny_data, tmp_path / "copy")
    (tmp_path / "run").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "run")
    codes, outcome = start(
        f"data.path={tmp_path / 'copy'}", f"run.folder={tmp_path / 'link'}", "data.prefetch=1", "data.verify=off",
        "run.profile=true", "logging.wandb=auto", "logging.project=another",
    )  # fmt: skip
    assert (codes, outcome["status"]) == ([0, 0], "done")
    assert read_metrics(tmp_path / "run" / "metrics.jsonl")[-1]["step"] == 4


def test_every_nodes_copy_of_the_data_is_checked(start, tiny_data, tmp_path):
    """The largest shard, which with shared files is the first rank's to read, is damaged in the second one's copy."""
    shutil.copytree(tiny_data, tmp_path / "copy")
    (shard,) = (tmp_path / "copy").glob("train*.bin")
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    codes, outcome = start(f"data.path={tmp_path / 'copy'}")
    assert codes == [2, 2]
    assert outcome["message"].startswith(f"{shard} is damaged (its checksum differs from meta.json)")
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_all_but_what_may_differ_is_compared(tiny_config):
    config, origins = load_config(str(tiny_config))
    assert origins.keys() - compared(config).keys() == {
        "run.folder", "data.path", "budget.law", "data.prefetch", "data.verify", "run.compile", "run.profile",
        "logging.wandb", "logging.project",
    }  # fmt: skip
