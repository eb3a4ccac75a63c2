"""Mistakes in how ranks are started, and which of them says so."""

import contextlib
import os
import re
import signal
import socket
import subprocess
from unittest import mock

import pytest
import torch

from stepline.comm.mesh import World
from stepline.comm.rendezvous import UnlikeDevices
from stepline.trainer.errors import UserError
from stepline.trainer.run import devices, launch, start
from stepline.trainer.run.devices import pick_device
from stepline.trainer.run.launch import run_training
from stepline.trainer.run.lock import only_one
from stepline.trainer.run.outcome import read_outcome
from stepline.trainer.run.signals import StopSignal
from stepline.trainer.run.start import start_job

MIXTURE = ["model.ffn=moe", "model.hidden_size=48", "model.ffn_size=48"]


@pytest.mark.parametrize(
    ("variables", "sentence"),
    [
        ({"RANK": "0", "WORLD_SIZE": "abc"}, "WORLD_SIZE is 'abc'; it must be a whole number"),
        ({"RANK": "2", "WORLD_SIZE": "2"}, "RANK is 2 but there are 2 ranks"),
        ({"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "abc"}, "MASTER_PORT is 'abc'"),
        ({"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "99999"}, "ports end at 65535"),
        (
            {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"},
            "2 ranks but the environment has no MASTER_PORT",
        ),
    ],
)
def test_mistakes_in_the_environment(tiny_config, tmp_path, capsys, monkeypatch, variables, sentence):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert run_training(str(tiny_config), [f"run.folder={tmp_path / 'run'}"], "auto") == 2
    error = capsys.readouterr().err
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


@pytest.mark.parametrize("stopped", [False, True])
def test_a_rank_alone_with_its_mistake_speaks(tiny_config, capsys, monkeypatch, stopped):
    """As on a GPU smaller than the first one's: torchrun, which stops all where one ends, leaves it be."""
    for name, value in {
        "RANK": "1",
        "LOCAL_RANK": "1",
        "WORLD_SIZE": "2",
        "TORCHELASTIC_RUN_ID": "x",
    }.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("stepline.trainer.run.launch.ALONE_S", 0.2)
    stop = StopSignal()
    if stopped:
        stop.note(signal.SIGTERM)
    assert run_training(str(tiny_config), ["parallel.shard=3"], "never", stop) == 2
    assert capsys.readouterr().err.count("\n") == (not stopped)


STEP = {"SLURM_JOB_ID": "7", "SLURM_STEP_ID": "0", "SLURM_NODEID": "1", "SLURM_STEP_NUM_TASKS": "4"}
STEP |= {"SLURM_STEP_TASKS_PER_NODE": "2(x2)", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}


@pytest.mark.parametrize(
    ("first", "ends", "said"),
    [
        ({}, False, True),
        ({}, True, False),  # it has said the same
        ({"SLURM_NODEID": "0"}, False, True),  # of another node
        (None, False, True),  # out of sight, as in a container of its own
    ],
)
def test_a_rank_alone_with_its_mistake_speaks_under_srun(tiny_config, capsys, monkeypatch, first, ends, said):
    """Which lets the others be: the first rank of the node says what all find, and is gone then."""

    def refused(*_, **__) -> None:
        if ends:
            neighbour.communicate()
        raise UserError("a mistake")

    monkeypatch.setattr(launch, "start_job", refused)
    monkeypatch.setattr(launch, "ALONE_S", 1e9 if ends else 0.2)
    with contextlib.ExitStack() as held:
        if first is not None:
            environment = os.environ | STEP | first | {"SLURM_LOCALID": "0", "SLURM_PROCID": "2"}
            command = ["sh", "-c", "echo; read line"]
            neighbour = subprocess.Popen(
                command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE
            )
            held.callback(neighbour.communicate)
            neighbour.stdout.readline()  # its environment is there
        held.enter_context(mock.patch.dict(os.environ, STEP | {"SLURM_LOCALID": "1", "SLURM_PROCID": "3"}))
        assert run_training(str(tiny_config), [], "never") == 2
    assert capsys.readouterr().err == ("error: rank 3: a mistake\n" if said else "")


@pytest.mark.parametrize("ours", [True, False])
def test_a_rank_alone_with_its_mistake_notes_it(tiny_config, tmp_path, monkeypatch, ours):
    """Rank 0 of the same launch, which waits for it, holds the folder; a run of another launch may train there."""
    run, stop = tmp_path / "run", StopSignal()
    (run / "logs" / "attempt-1").mkdir(parents=True)
    for name, value in {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    monkeypatch.setattr(launch, "ALONE_S", 0.0)
    with only_one(run, stop.launcher if ours else "another"):
        assert run_training(str(tiny_config), [f"run.folder={run}", "parallel.shard=3"], "auto", stop) == 2
    said = read_outcome(run).get("message", "")
    assert ("parallel.shard is 3 but there are 2 ranks" in said) == ours


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


def test_ranks_on_one_gpu(monkeypatch):
    """As with a user's CUDA_VISIBLE_DEVICES=0 under srun, which looks like SLURM's own binding."""
    said = "NCCL error\nncclInvalidUsage: This usually reflects invalid usage.\nLast error:\n"
    same = "Duplicate GPU detected : rank 1 and rank 0 both on CUDA device 53000"

    def refused(*_):
        raise torch.distributed.DistBackendError(said + same)

    monkeypatch.setattr(start, "start_process_group", refused)
    with pytest.raises(UserError, match=rf"^ranks share a GPU \({same}\); start as many as there are"):
        start.join(World(0, 2, 0, 2), torch.device("cuda", 0), 10.0)
    same = "another error"
    with pytest.raises(torch.distributed.DistBackendError, match=same):
        start.join(World(0, 2, 0, 2), torch.device("cuda", 0), 10.0)


def test_device_choice_says_what_it_does_instead(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    four = World(3, 4, 3, 4)
    device, notes = pick_device("auto", four)
    assert device.type == "cpu"
    assert notes == ["2 GPUs cannot serve 4 ranks: this run uses the CPU"]
    with pytest.raises(UserError, match="has 2 GPUs for 4 ranks; start 2 ranks"):
        pick_device("cuda", four)
    assert pick_device("auto", World(1, 2, 1, 2))[0] == torch.device("cuda", 1)
    for name in ("SLURM_STEP_NUM_TASKS", "SLURM_GPUS_PER_TASK"):  # each task sees its own alone
        monkeypatch.setenv(name, "1")
    assert pick_device("auto", four) == pick_device("cuda", four) == (torch.device("cuda", 0), [])
    assert pick_device("cpu", four) == (torch.device("cpu"), [])
    assert pick_device("auto", World(1, 2, 1, 2))[0] == torch.device(
        "cuda", 1
    )  # by --gpu-bind=none, all of them
    monkeypatch.delenv("SLURM_GPUS_PER_TASK")
    for of_node, bound in (
        (8, True),
        (7, False),
        (4, False),
        (2, False),
    ):  # two for each, or tasks share them
        monkeypatch.setenv("SLURM_GPUS_ON_NODE", str(of_node))
        assert (pick_device("auto", four)[0] == torch.device("cuda", 0)) == bound
    monkeypatch.setenv("SLURM_GPUS_ON_NODE", "8")
    eight = World(5, 8, 5, 8)  # with CUDA_VISIBLE_DEVICES=0,1 of the user's
    assert pick_device("auto", eight)[1] == ["2 GPUs cannot serve 8 ranks: this run uses the CPU"]
    with pytest.raises(UserError, match="has 2 GPUs for 8 ranks; start 2 ranks"):
        pick_device("cuda", eight)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "a")  # torchrun's ranks share the task's
    assert pick_device("auto", four)[0].type == "cpu"


@pytest.mark.parametrize("asked", ["auto", "cpu"])
@pytest.mark.parametrize("visible", [None, "0", ""])
def test_a_gpu_that_torch_cannot_use_is_said(monkeypatch, asked, visible):
    monkeypatch.setattr(devices, "hardware_present", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    device, notes = pick_device(asked, World(0, 1, 0, 1))
    assert device.type == "cpu"
    assert notes == ([devices.UNUSED_GPU] if asked == "auto" and visible != "" else [])


def test_one_node_without_its_gpus(monkeypatch):
    def unlike(*_):
        raise UnlikeDevices("1 of 2 ranks have no usable GPU (on b)")

    monkeypatch.setattr(start, "start_process_group", unlike)
    with pytest.raises(
        UserError, match=r"^1 of 2 ranks have no usable GPU \(on b\); leave those nodes out, or give all run"
    ):
        start.join(World(0, 2, 0, 1), torch.device("cuda", 0), 10.0)


@pytest.mark.parametrize(
    ("world", "overrides", "sentence"),
    [
        (4, ["model.moe.experts=6", "parallel.experts=4"], "6 experts cannot be dealt evenly to 4 ranks"),
        (4, ["model.moe.experts=6", "parallel.experts=4"], "the nearest possible: 2"),
        (6, ["parallel.experts=4"], "does not divide the 6 ranks; the nearest that does: 3"),
        (
            4,
            ["model.moe.experts=6", "parallel.experts=2", "optimizer.name=muon"],
            "sharded evenly over 2 more",
        ),
    ],
)
def test_experts_that_ranks_cannot_share(tiny_config, tmp_path, world, overrides, sentence):
    options = [f"run.folder={tmp_path / 'run'}", *MIXTURE, *overrides]
    with pytest.raises(UserError, match=re.escape(sentence)):
        start_job(str(tiny_config), options, "never", World(0, world, 0, world))
