"""`stepline plan CONFIG` refuses what `train` refuses, in the same words, and says which layout its memory is of."""

import json

import pytest

from stepline.trainer.config_io import load_config
from stepline.trainer.errors import UserError
from stepline.trainer.plan.command import Request, run_plan
from stepline.trainer.plan.memory import gigabytes
from stepline.trainer.plan.resolve import Machine, resolve

ROOM = 1 << 40
"""Bytes of a device in which everything fits."""


def plan(name: str, *overrides: str, world: int | None = 8, as_json: bool = True, **asked) -> None:
    run_plan(Request(name, list(overrides), world_size=world, **asked), as_json)


def train(name: str, *overrides: str, world: int = 8, memory: int | None = ROOM):
    """The config as `train` would resolve it on so many GPUs, and its plan."""
    config, origins = load_config(name, list(overrides))
    return config, resolve(config, origins, Machine(world, "cuda", True, memory), 10**8)[0]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ("olmoe-1b-7b parallel.experts=4 parallel.shard=2", "parallel.experts 4 does not divide the 2 ranks"),
        ("olmoe-1b-7b parallel.experts=6", "parallel.experts 6 does not divide the 8 ranks; the nearest"),
        ("olmoe-1b-7b parallel.experts=4 parallel.shard=3", "parallel.shard 3 does not divide the 8 ranks"),
        ("dense-125m parallel.experts=2", "parallel.experts deals a mixture's experts"),
        (
            "dense-125m model.blocks=revffn run.recompute=full",
            "reversible blocks recompute their activations",
        ),
        ("dense-125m sparse.forward=sparse", "sparse.forward needs sparse layers"),
        (
            "dense-125m parallel.backend=zero parallel.sync=demo",
            "parallel.backend=zero has no parallel.sync=demo",
        ),
        ("dense-125m parallel.backend=zero parallel.shard=4", "parallel.shard is 4 and ZeRO shards"),
        (
            "dense-125m sparse.mode=s-ste sparse.dense_fraction=0.99 budget.tokens=5242880 budget.batch_tokens=262144",
            "sparse.dense_fraction 0.99 makes all of the run's 20 steps dense",
        ),
        (
            "dense-125m parallel.sync=random_k parallel.random_k.density=0.4",
            "parallel.random_k.density 0.4 is not near one value of a whole number; the nearest are 0.3333 and 0.5",
        ),
    ],
)
def test_what_train_refuses(arguments, sentence):
    with pytest.raises(UserError) as of_train:
        train(*arguments.split())
    with pytest.raises(UserError) as of_plan:
        plan(*arguments.split())
    assert str(of_plan.value) == str(of_train.value)
    assert str(of_plan.value).startswith(sentence)


def test_experts_are_judged_by_the_replica_that_auto_makes(capsys):
    """256 ranks in nodes of 8: slow links make replicas of a node, whose 8 ranks hold 8 of 64 experts each. Muon, which
    takes whole matrices, could not deal them to all 256."""
    arguments = ["olmoe-1b-7b", "optimizer.name=muon", "parallel.experts=8"]
    config, origins = load_config(arguments[0], [*arguments[1:], "parallel.sync=demo"])
    resolve(config, origins, Machine(256, "cuda", True, ROOM, node_ranks=8), 10**8)
    assert config.parallel.shard == 8
    assert train(*arguments, world=256)[0].parallel.shard == 8  # the fewest that it fits on
    plan(*arguments, "parallel.sync=demo", world=256)

    for judge in (
        lambda: train(*arguments, world=256, memory=None),
        lambda: plan(*arguments, "run.device=cpu", world=256),
    ):
        with pytest.raises(UserError, match="cannot be sharded evenly over 32 more"):
            judge()


@pytest.mark.parametrize(("warmup", "warned"), [(20, 1), (10**6, 1), (19, 0), ("auto", 0)])
def test_a_warm_up_that_takes_the_whole_run(warmup, warned, capsys):
    arguments = [
        "dense-125m",
        "budget.tokens=5242880",
        "budget.batch_tokens=262144",
        f"schedule.warmup_steps={warmup}",
    ]
    plan(*arguments)
    sentence = (
        f"schedule.warmup_steps {warmup} is not below the run's 20 steps: the learning rate never reaches "
    )
    sentence += "its peak"
    config, origins = load_config(arguments[0], arguments[1:])
    of_train = resolve(config, origins, Machine(8, "cuda", True, ROOM), 10**8)[1]
    assert (
        json.loads(capsys.readouterr().out)["warnings"].count(sentence) == of_train.count(sentence) == warned
    )


@pytest.mark.parametrize(
    ("given", "key"),
    [
        (["parallel.sync=demo"], "parallel.sync=demo"), (["sparse.mode=s-ste"], "sparse.mode=s-ste"),
        (["precision.fp8=true"], "precision.fp8=true"), (["parallel.experts=2"], "parallel.experts=2"),
        (["run.compile=true"], "run.compile=true"),
    ],
)  # fmt: skip
def test_what_deepspeed_has_not_is_refused_without_a_number_of_ranks(given, key):
    with pytest.raises(UserError, match=f"^parallel.backend=zero has no {key}: set it to "):
        plan("dense-125m", "parallel.backend=zero", *given, world=None)
    plan("dense-125m", "parallel.backend=zero", world=None)


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ("parallel.zero.offload=all", "parallel.zero.offload=all moves weights, which stage 2 does not cut"),
        ("parallel.deepspeed.stage3_prefetch_bucket_size=1000", "stage3_prefetch_bucket_size is of stage 3"),
        ("parallel.deepspeed.zero_hpz_partition_size=2", "zero_hpz_partition_size is of stage 3"),
    ],
)
def test_keys_of_another_stage_are_refused_without_a_number_of_ranks(given, sentence):
    with pytest.raises(UserError, match=sentence):
        plan("dense-125m", "parallel.backend=zero", "parallel.zero.stage=2", given, world=None)
    plan("dense-125m", "parallel.backend=zero", "parallel.zero.stage=3", given, world=None)


def test_a_plan_says_what_nobody_would_ask_for(capsys):
    plan("moe-tiny", "model.moe.top_k=1", "budget.tokens=10000000", world=None, as_json=False)
    assert "every weight is 1, and the loss does not train the router" in " ".join(
        capsys.readouterr().out.split()
    )


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ("olmoe-1b-7b parallel.experts=6", "the 64 experts cannot be dealt evenly to 6 ranks"),
        ("olmoe-1b-7b parallel.experts=4 parallel.shard=2", "parallel.experts 4 does not divide the 2 ranks"),
        (
            "dense-125m model.blocks=revffn run.recompute=full",
            "reversible blocks recompute their activations",
        ),
    ],
)
def test_what_no_number_of_ranks_could_do(arguments, sentence):
    with pytest.raises(UserError, match=sentence):
        plan(*arguments.split(), world=None)


@pytest.mark.parametrize(
    ("arguments", "shard"),
    [
        ("olmoe-1b-7b parallel.experts=4 parallel.sync=diloco", 4),
        ("moe-tiny budget.tokens=1e6 parallel.experts=2 parallel.sync=demo", 2),
        ("dense-125m parallel.sync=random_k", 1),
        ("olmoe-1b-7b parallel.experts=4 parallel.sync=diloco parallel.shard=8", 8),
    ],
)
def test_replicas_on_slow_links_are_as_small_as_train_makes_them(arguments, shard, capsys):
    plan(*arguments.split())
    layout = json.loads(capsys.readouterr().out)["memory"]["layout"]
    config, made = train(*arguments.split())
    assert layout["shard"] == config.parallel.shard == shard
    assert (layout["world"], layout["micro_batch"], layout["accumulation"]) == (
        8,
        config.parallel.micro_batch,
        made.grad_accumulation,
    )


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (
            "dense-125m",
            "(sharded over all 8 ranks, micro-batch 16, bf16); train shards over as few ranks as the devices' memory "
            "allows",
        ),
        ("dense-125m parallel.shard=8", "(sharded over all 8 ranks, micro-batch 16, bf16)"),
        ("dense-125m parallel.shard=2", "(sharded over 2 of 8 ranks, micro-batch 16, bf16)"),
        (
            "dense-125m parallel.sync=demo",
            "(not sharded, micro-batch 16, bf16); on several nodes train shards over the ranks of each",
        ),
        (
            "olmoe-1b-7b parallel.experts=8 parallel.sync=diloco",
            "(sharded over all 8 ranks, micro-batch 4, bf16); on several nodes train shards over the ranks of each",
        ),
        ("dense-125m run.device=cpu", "(sharded over all 8 ranks, micro-batch 8, fp32)"),
    ],
)
def test_the_memory_says_of_which_layout_it_is(arguments, told, capsys):
    plan(*arguments.split())
    memory = json.loads(capsys.readouterr().out)["memory"]
    plan(*arguments.split(), as_json=False)
    (line,) = (row for row in capsys.readouterr().out.splitlines() if row.startswith("memory: "))
    assert (
        line
        == f"memory: {gigabytes(memory['total'])} on each device at the peak, in the {memory['moment']} {told}"
    )


def test_a_replica_that_fits_is_not_sharded_and_takes_more():
    """What the sentence is for: 8 H200s hold a whole replica each, where the plan's estimate is of one in 8 parts."""
    config, _ = train("dense-125m", memory=143_000_000_000)
    assert config.parallel.shard == 1


def test_a_refusal_of_assumed_gpus_says_that_they_are_assumed(capsys):
    """On CPUs, which `train` may find, fp32 would be taken."""
    zero = ["parallel.backend=zero", "parallel.zero.stage=1"]
    with pytest.raises(
        UserError, match=r"stage 1 .* \(for GPUs in bf16, which are assumed unless run.device is cpu\)$"
    ):
        plan("dense-125m", *zero, world=2)
    plan("dense-125m", *zero, "run.device=cpu", world=2)
    assert json.loads(capsys.readouterr().out)["memory"]
