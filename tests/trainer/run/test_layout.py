"""The layout that a run settles on: shown by the dry run, and the same on every rank."""

from types import SimpleNamespace

import pytest

from stepline.comm.mesh import World
from stepline.trainer.config import Config
from stepline.trainer.errors import UserError
from stepline.trainer.plan.memory import PARTS
from stepline.trainer.run import start
from stepline.trainer.run.alike import check_ranks_alike
from stepline.trainer.run.devices import device_memory
from stepline.trainer.run.launch import dry_run


def test_dry_run_prints_the_memory_of_a_step(tiny_config, capsys):
    assert dry_run(str(tiny_config), [], "never") == 0
    out = capsys.readouterr().out
    assert "# memory of one device: 1 ranks, shard 1, micro-batch 2" in out
    for part in PARTS:
        assert f"# {part} " in out
    assert "that the device has" in out


def test_a_dry_run_shows_what_does_not_fit(tiny_config, capsys, monkeypatch):
    """And ends as the run would."""
    monkeypatch.setattr(start, "device_memory", lambda *_: 2**10)
    with pytest.raises(
        UserError, match=r"needs an estimated .* on each device; start more ranks, or set|start more"
    ):
        dry_run(str(tiny_config), ["parallel.micro_batch=auto"], "never")
    assert "# total " in capsys.readouterr().out
    with pytest.raises(UserError, match="start more ranks"):
        start.start_job(str(tiny_config), ["parallel.micro_batch=auto"], "never", World(0, 1, 0, 1))


def test_a_dry_run_of_what_does_not_fit_warns_as_one_that_does(tiny_config, monkeypatch):
    """Of a batch that is the law's."""
    options = ["parallel.micro_batch=auto", "optimizer.lr=1e-3"]
    options += ["budget.steps=null", "budget.tokens=50000", "budget.batch_tokens=auto"]
    fits = start.start_job(str(tiny_config), options, "never", World(0, 1, 0, 1), dry=True)
    monkeypatch.setattr(start, "device_memory", lambda *_: 2**10)
    not_ = start.start_job(str(tiny_config), options, "never", World(0, 1, 0, 1), dry=True)
    assert fits.refused is None
    assert not_.refused is not None
    assert any("batch" in note for note in fits.notes)
    assert not_.notes == fits.notes


def test_keys_without_effect_are_named(tiny_config):
    options = [
        "model.moe.top_k=3",
        "parallel.zero.stage=2",
        "parallel.demo.density=0.5",
        "optimizer.name=adamw",
    ]
    job = start.start_job(str(tiny_config), options, "never", World(0, 1, 0, 1))
    assert sorted(note for note in job.notes if "no effect" in note) == [
        "model.moe.top_k has no effect without model.ffn=moe",
        "parallel.demo.density has no effect without parallel.sync=demo",
        "parallel.zero.stage has no effect without parallel.backend=zero",
    ]
    demo = ["optimizer.name=adamw", "parallel.sync=demo", "parallel.demo.ahead=true"]
    for more, idle in ((["parallel.demo.delay=1"], False), (["parallel.demo.delay=0"], True)):
        job = start.start_job(str(tiny_config), [*demo, *more], "never", World(0, 1, 0, 1))
        assert idle == any("parallel.demo.ahead has no effect without" in note for note in job.notes)


def test_ram_is_divided_among_the_ranks_of_a_machine():
    import torch

    whole = device_memory(torch.device("cpu"), 1)
    assert whole > 2**28
    assert device_memory(torch.device("cpu"), 4) == whole // 4


def other_layouts(micro_batches: list[int], codecs: list[str], on_node: list[int]) -> str:
    import torch.distributed as dist

    model = {"vocab_size": 8, "hidden_size": 4, "num_layers": 1, "num_heads": 1, "ffn_size": 4}
    rank = dist.get_rank()
    parallel = {"shard": 1, "micro_batch": micro_batches[rank], "demo": {"codec": codecs[rank]}}
    config, world = Config(model=model, parallel=parallel), World(rank, 2, rank, on_node[rank])
    try:
        check_ranks_alike(
            SimpleNamespace(config=config, world=world, origins={}, fingerprints=[], resume_from=None)
        )
    except UserError as error:
        return str(error)
    return "alike"


@pytest.mark.parametrize(
    ("micro_batches", "codecs", "on_node", "expected"),
    [
        ([4, 4], ["int8", "int8"], [2, 2], "alike"),
        (
            [4, 3],
            ["int8", "int8"],
            [2, 2],
            "devices differ in memory and lead to different values of parallel.micro_batch (3, 4)",
        ),
        (
            [4, 3],
            ["int8", "int8"],
            [2, 1],
            "the ranks' nodes hold unequal numbers of ranks (1 and 2) and lead to different values of "
            "parallel.micro_batch (3, 4); set the same for all",
        ),
        (
            [4, 4],
            ["int8", "sign"],
            [2, 1],
            "configs have different values of parallel.demo.codec (int8, sign)",
        ),
    ],
)
def test_ranks_that_divide_the_work_differently_are_refused(pool, micro_batches, codecs, on_node, expected):
    for said in pool.run(2, other_layouts, micro_batches, codecs, on_node):
        assert expected in said
