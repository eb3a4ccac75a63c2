"""A user's mistake ends before the first step with exit code 2 and one sentence; nothing is left behind."""

import json
import socket

import pytest
import yaml

from stepline.comm.mesh import World
from stepline.trainer.errors import UserError
from stepline.trainer.run.launch import run_training
from stepline.trainer.run.start import pick_device, start_job

ONE = World(0, 1, 0, 1)


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (["data.path={tmp}/nothing"], "no meta.json"),
        (["data.path=null"], "set data.path to a folder written by `stepline prepare`"),
        (["model.vocab_size=300"], "has 330 tokens but model.vocab_size is 300; set it to at least 330"),
        (["parallel.shard=4"], "parallel.shard is 4 but there are 1 ranks"),
        (["run.device=cuda"], "this machine has no usable GPU"),
        (["budget.batch_tokens=100"], "no multiple of data.seq_len 32; the nearest is 96"),
        (["budget.batch_tokens=auto"], "budget.steps needs budget.batch_tokens"),
        (["data.seq_len=1000000"], "seq_len"),
    ],
)
def test_mistakes_in_a_config(tiny_config, tmp_path, capsys, overrides, sentence):
    filled = [o.replace("{tmp}", str(tmp_path)) for o in overrides]
    code = run_training(str(tiny_config), [f"run.folder={tmp_path / 'run'}", *filled], "auto")
    error = capsys.readouterr().err
    assert code == 2
    assert sentence in error
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_more_shards_than_ranks_and_no_divisor(tiny_config):
    with pytest.raises(UserError, match="does not divide the 4 ranks"):
        start_job(str(tiny_config), ["parallel.shard=3"], "never", World(0, 4, 0, 4))


def test_only_one_rank_of_a_node_speaks(tiny_config, capsys, monkeypatch):
    for rank, said in (("0", 1), ("1", 0)):
        for name in ("RANK", "LOCAL_RANK"):
            monkeypatch.setenv(name, rank)
        monkeypatch.setenv("WORLD_SIZE", "2")
        assert run_training(str(tiny_config), ["parallel.shard=3"], "never") == 2
        assert capsys.readouterr().err.count("\n") == said


def test_a_port_in_use(tiny_config, tmp_path, capsys, monkeypatch):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        for name, value in {
            "RANK": "0",
            "WORLD_SIZE": "1",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": port,
        }.items():
            monkeypatch.setenv(name, str(value))
        assert run_training(str(tiny_config), [f"run.folder={tmp_path / 'run'}"], "never") == 2
    error = capsys.readouterr().err
    assert f"port 127.0.0.1:{port} is in use" in error
    assert error.count("\n") == 1


def test_device_choice_says_what_it_does_instead(monkeypatch):
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    four = World(3, 4, 3, 4)
    device, notes = pick_device("auto", four)
    assert device.type == "cpu"
    assert notes == ["2 GPUs cannot serve 4 ranks: this run uses the CPU"]
    with pytest.raises(UserError, match="has 2 GPUs for 4 ranks; start 2 ranks"):
        pick_device("cuda", four)
    assert pick_device("auto", World(1, 2, 1, 2))[0] == torch.device("cuda", 1)


def test_a_folder_that_holds_a_run(tiny_config, tmp_path, capsys):
    folder = tmp_path / "run"
    assert run_training(str(tiny_config), [f"run.folder={folder}"], "never") == 0
    assert json.loads((folder / "outcome.json").read_text())["status"] == "done"
    assert run_training(str(tiny_config), [f"run.folder={folder}"], "never") == 2
    assert "holds a run already" in capsys.readouterr().err
    assert run_training(str(tiny_config), [f"run.folder={folder}"], "auto") == 0
    assert "is finished" in capsys.readouterr().err
    assert run_training(str(tiny_config), [f"run.folder={folder}", "model.num_layers=3"], "auto") == 2
    assert "model.num_layers was 2" in capsys.readouterr().err
    assert run_training(str(tiny_config), [f"run.folder={folder}"], str(tmp_path / "step-000001")) == 2
    assert "is no complete checkpoint" in capsys.readouterr().err


def test_weights_that_do_not_fit(tiny_config, tmp_path, capsys):
    first = [f"run.folder={tmp_path / 'first'}", "budget.steps=2"]
    assert run_training(str(tiny_config), first, "never") == 0
    fits = [f"run.folder={tmp_path / 'fits'}", "budget.steps=2", f"run.init_from={tmp_path / 'first'}"]
    assert run_training(str(tiny_config), fits, "never") == 0
    wider = [f"run.folder={tmp_path / 'wider'}", "model.ffn_size=51", f"run.init_from={tmp_path / 'first'}"]
    capsys.readouterr()
    assert run_training(str(tiny_config), wider, "never") == 2
    assert "do not fit this model" in capsys.readouterr().err
    nothing = [f"run.folder={tmp_path / 'no'}", f"run.init_from={tmp_path / 'nothing'}"]
    assert run_training(str(tiny_config), nothing, "never") == 2


def test_saved_config_is_complete(tiny_config, tmp_path):
    folder = tmp_path / "run"
    assert run_training(str(tiny_config), [f"run.folder={folder}", "budget.steps=2"], "never") == 0
    saved = yaml.safe_load((folder / "config.yaml").read_text())
    assert "auto" not in [v for s in saved.values() for k, v in s.items() if k != "wandb"]
    for name in ("metrics.jsonl", "environment.json", "outcome.json", "logs/attempt-1/rank-0.log"):
        assert (folder / name).is_file(), name
