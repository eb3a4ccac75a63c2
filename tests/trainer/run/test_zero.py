"""DeepSpeed ZeRO behind the same loop: the numbers of FSDP2, one checkpoint format for both."""

import importlib.metadata
import itertools
import json
import math
import shutil

import pytest
import torch
import torch.distributed as dist

from stepline.comm.mesh import World, build_mesh
from stepline.comm.pieces import parts
from stepline.trainer.run.build import build_model
from stepline.trainer.run.manifest import complete_checkpoints
from stepline.trainer.run.start import start_job
from stepline.trainer.run.stored import stored_names

pytest.importorskip("deepspeed")

ZERO = "parallel.backend=zero"
MODELS = {
    "dense": [],
    "moe": [
        "model.ffn=moe", "model.hidden_size=40", "model.head_dim=12", "model.ffn_size=24", "model.moe.experts=5",
        "model.moe.shared_size=10", "model.moe.bias_rate=0.05",
    ],
    "revffn": ["model.blocks=revffn", "model.hidden_size=48", "model.num_layers=3", "model.ffn_size=48"],
}  # fmt: skip
FINE = "model.revffn.grid_bits=20"
"""A grid that does not turn differences of the last bit into larger ones: on that of 14 bits FSDP2 on 1 and on 2 ranks
differ by 2e-5 already, by 3e-7 on this one."""
OTHERS = [
    pytest.param([*MODELS["moe"]], marks=pytest.mark.e2e),
    pytest.param([*MODELS["revffn"], FINE], marks=pytest.mark.e2e),
]
SHORT = "budget.steps=8"
PADDED = ["budget.batch_tokens=160", "parallel.micro_batch=1"]
"""Three micro-batches on each of two ranks, of which the last one carries no loss."""


def stage(number: int) -> list[str]:
    """Stage 3 without weights that stay gathered, as ones this small do."""
    threshold = ["parallel.deepspeed.stage3_param_persistence_threshold=0"] if number == 3 else []
    return [ZERO, f"parallel.zero.stage={number}", *threshold]


@pytest.fixture
def close(train, tiny_config, tmp_path):
    """Largest relative difference of the loss curves of FSDP2 and of runs with further options, and of their norms."""

    folders = (tmp_path / f"run{i}" for i in itertools.count())

    def compare(options: list[str], *more: list[str], world: int = 2) -> float:
        wanted = train(world, tiny_config, next(folders), *options)
        worst = 0.0
        for some in more:
            found = train(world, tiny_config, next(folders), *options, *some)
            for key in ("loss", "grad_norm", "val_loss"):
                a, b = (torch.tensor([r[key] for r in rows if key in r]).double() for rows in (found, wanted))
                worst = max(worst, float((a / b - 1).abs().max()))
        return worst

    return compare


@pytest.mark.e2e
def test_every_stage_gives_the_curve_of_fsdp2(close):
    assert close([*PADDED, "budget.steps=50"], stage(1), stage(2), stage(3)) < 1e-5


@pytest.mark.e2e
@pytest.mark.parametrize(
    ("name", "stages", "options"),
    [
        ("moe", (1, 2, 3), ["budget.steps=50"]),
        ("moe", (3,), [SHORT, "data.confine_attention=true", "run.recompute=full"]),
        ("revffn", (2, 3), ["budget.steps=50", FINE]),
        (
            "revffn",
            (3,),
            [SHORT, FINE, "data.confine_attention=true", "parallel.reshard_after_forward=false"],
        ),
        ("moe", (3,), [SHORT, "run.recompute=selective", "parallel.reshard_after_forward=false"]),
        ("dense", (3,), [SHORT, "run.recompute=full", "model.tied_embeddings=true"]),
        ("dense", (3,), [SHORT, "run.recompute=selective", "parallel.reshard_after_forward=false"]),
    ],
)
def test_every_model_gives_the_curve_of_fsdp2(close, name, stages, options):
    assert close([*MODELS[name], *options, *PADDED], *map(stage, stages)) < 1e-5


def initial_masters(config: str, options: list[str]) -> bool:
    """Whether this rank's parts are bitwise those of the whole model, and the ranks' parts are all of it."""
    from stepline.trainer.run.zero import build_zero

    job = start_job(config, options, "never", World.from_environment())
    plain = dict(build_model(job.config, job.device, None).named_parameters())
    mesh = build_mesh(job.device, job.world.size, job.config.parallel.shard)
    zero = build_zero(job.config, build_model(job.config, job.device, mesh), job.device)
    right, held = True, torch.zeros(())
    for name, pieces in zero.masters().items():
        right &= pieces.shape == plain[name].shape
        for part, offset in parts(pieces):
            box = tuple(slice(o, o + n) for o, n in zip(offset, part.shape, strict=True))
            right &= torch.equal(part, plain[name].detach()[box])
            held += part.numel()
    dist.all_reduce(held)
    return right and int(held) == sum(p.numel() for p in plain.values())


@pytest.mark.parametrize("number", [2, 3])
def test_initial_values_are_bitwise_those_of_one_rank(pool, tiny_config, tmp_path, number):
    options = [f"run.folder={tmp_path / 'r'}", *stage(number), *MODELS["moe"]]
    assert pool.run(2, initial_masters, str(tiny_config), options) == [True, True]


@pytest.mark.parametrize("model", [[], *OTHERS])
def test_a_run_goes_on_on_other_ranks_and_with_the_other_backend(train, tiny_config, tmp_path, column, model):
    """ZeRO-3 on 2 ranks -> FSDP2 on 1 -> ZeRO-2 on 2: the curve of an undisturbed run by FSDP2."""
    options = [*model, "budget.steps=12", "checkpoint.every=4", "checkpoint.keep=10"]
    straight = column(train(2, tiny_config, tmp_path / "straight", *options))
    folder = tmp_path / "run"
    train(2, tiny_config, folder, *options, *stage(3))
    names = [stored_names(complete_checkpoints(run)[0]) for run in (tmp_path / "straight", folder)]
    assert names[0] == names[1]
    for world, keep_until, backend in ((1, 4, ["parallel.backend=fsdp"]), (2, 8, stage(2))):
        for path in complete_checkpoints(folder):
            if int(path.name.removeprefix("step-")) > keep_until:
                shutil.rmtree(path)
        rows = train(world, tiny_config, folder, *options, *backend, resume="auto")
    assert (column(rows) / straight - 1).abs().max() < 1e-6


@pytest.mark.parametrize("model", [[], *OTHERS])
@pytest.mark.parametrize("number", [1, 3])
def test_resume_is_bitwise(interrupted, number, model):
    number = max(number, 2) if model else number
    options = [
        *model,
        "budget.steps=8",
        "checkpoint.every=3",
        "checkpoint.keep=9",
        "data.confine_attention=true",
    ]
    straight, resumed = interrupted(2, *options, *stage(number))
    for key in ("loss", "grad_norm", "val_loss"):
        assert [r.get(key) for r in resumed] == [r.get(key) for r in straight], key


def test_a_run_is_evaluated_and_starts_another(train, tiny_config, tmp_path, column):
    from safetensors.torch import load_file

    from stepline.models.hf import to_hf_names
    from stepline.trainer.hf.export import export_run
    from stepline.trainer.run.eval_command import evaluate_run
    from stepline.trainer.run.infer import load_run

    rows = train(2, tiny_config, tmp_path / "run", *stage(3))
    environment = json.loads((tmp_path / "run" / "environment.json").read_text())
    assert environment["versions"]["deepspeed"] == importlib.metadata.version("deepspeed")
    data = start_job(str(tiny_config), [f"run.folder={tmp_path / 'x'}"], "never", World(0, 1, 0, 1)).metas
    found = evaluate_run(tmp_path / "run", data[0].tokenizer_path.parent)
    assert found["val_loss"] == pytest.approx(rows[-1]["val_loss"], rel=1e-6)
    export_run(tmp_path / "run", tmp_path / "hf")  # rows in parts of two ranks
    exported = load_file(tmp_path / "hf" / "model.safetensors")
    for name, parameter in load_run(tmp_path / "run")[0].named_parameters():
        (hf_name,) = to_hf_names(name, 0, "qwen3")
        assert torch.equal(exported[hf_name], parameter.detach()), name
    start = f"run.init_from={tmp_path / 'run'}"
    fsdp, zero = (
        column(train(2, tiny_config, tmp_path / name, start, "budget.steps=3", *options))
        for name, options in (("fsdp", []), ("zero", stage(3)))
    )
    assert fsdp[0] < 3
    assert (zero / fsdp - 1).abs().max() < 1e-6


def broken_step(config: str, options: list[str], kind: str) -> tuple[list[float], int, bool]:
    """Three steps; in the second one, rank 1's gradients are NaN, or the norm is a spike, which DeepSpeed lets pass."""
    from stepline.trainer.run.state import TrainState
    from stepline.trainer.run.step import train_step

    job = start_job(config, options, "never", World.from_environment())
    mesh = build_mesh(job.device, job.world.size, job.config.parallel.shard)
    state = TrainState.create(job.config, job.device, mesh, job.world.rank, job.fingerprints)
    skipped, unchanged = [], True
    for step in range(3):
        handle = None
        if step == 1 and kind == "spike":
            state.guard.accepted.fill_(128)
            state.guard.losses.fill_(10.0)
            state.guard.grad_norms.fill_(1e-9)
        elif step == 1 and dist.get_rank() == 1:
            handle = state.model.embed.register_forward_hook(lambda m, i, o: o * math.nan)
        before = {n: [p.clone() for p, _ in parts(t)] for n, t in state.tensors().items()}
        result = train_step(state, next(state.loader), 1e-3)
        changed = {
            n
            for n, t in state.tensors().items()
            if any(not torch.equal(p, q) for (p, _), q in zip(parts(t), before[n], strict=True))
        }
        if handle is not None:
            handle.remove()
        if step == 1:
            unchanged = not any(n.startswith(("model.", "optimizer.")) for n in changed)
        else:
            assert any(n.startswith("model.") for n in changed)
        state.guard.accepted.zero_()
        skipped.append(result.skipped.item())
    state.loader.close()
    return skipped, int(state.guard.skipped_total), unchanged


@pytest.mark.parametrize("kind", ["nan", "spike"])
@pytest.mark.parametrize(
    ("number", "model"), [(1, []), (2, []), (3, []), (3, MODELS["moe"]), (2, [*MODELS["revffn"], FINE])]
)
def test_a_skipped_step_changes_nothing_on_any_rank(pool, tiny_config, tmp_path, number, model, kind):
    options = [f"run.folder={tmp_path / 'r'}", *stage(number), *model]
    for result in pool.run(2, broken_step, str(tiny_config), options, kind):
        assert result == ([0.0, 1.0, 0.0], 1, True)


def held_bytes(config: str, options: list[str]) -> tuple[dict[str, int], dict[str, int]]:
    """(counted from shapes, found in DeepSpeed) before the first step, by part."""
    from stepline.trainer.plan.zero_memory import ZeroReplay
    from stepline.trainer.run.zero import build_zero

    def size(*tensors: torch.Tensor) -> int:
        return sum({t.data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())

    job = start_job(config, options, "never", World.from_environment())
    mesh = build_mesh(job.device, job.world.size, job.config.parallel.shard)
    zero = build_zero(job.config, build_model(job.config, job.device, mesh), job.device)
    states = [t for optimizer in zero.optimizers for t in optimizer.state().values()]
    weights = [zero.zero.lp_param_buffer] if zero.settings.stage == 3 else zero.zero.bit16_groups_flat
    found = {"parameters": size(*zero.flat, *weights), "optimizer": size(*states)}
    if zero.settings.stage == 3:
        found["gradients"] = size(zero.zero.grad_partitions_flat_buffer)
        found["all-gather"] = size(*(b.buffer for b in zero.zero.ipg_buckets.values()))
    replay = ZeroReplay(job.config, 2, 2, 1, 1)
    replay.hold()
    return {key: replay.tally.live[key] for key in found}, found


@pytest.mark.parametrize(
    ("number", "options"), [(1, []), (2, ["precision.compute=bf16"]), (3, ["precision.compute=bf16"])]
)
def test_the_planner_knows_what_deepspeed_holds(pool, tiny_config, tmp_path, number, options):
    options = [f"run.folder={tmp_path / 'r'}", *stage(number), *MODELS["moe"], *options]
    for counted, found in pool.run(2, held_bytes, str(tiny_config), options):
        for key, size in found.items():
            assert counted[key] == pytest.approx(size, rel=0.01), key


@pytest.mark.e2e
def test_options_that_must_not_change_the_numbers(close):
    """Offload (on a CPU both memories are one), small buckets, one rank."""
    deepspeed = "parallel.deepspeed."
    small = f"{deepspeed}reduce_bucket_size=3000"
    two = [*stage(2), "parallel.zero.offload=optimizer", small, f"{deepspeed}allgather_bucket_size=2000"]
    three = [*stage(3), "parallel.zero.offload=all", small, f"{deepspeed}sub_group_size=5000"]
    more = [*stage(3), f"{deepspeed}zero_hpz_partition_size=2"]
    assert close([SHORT, *PADDED], two, three, more, [ZERO]) < 1e-5
    for model in ([*MODELS["moe"]], [*MODELS["revffn"], FINE]):
        assert close([SHORT, *PADDED, *model], two, three) < 1e-5


@pytest.mark.e2e
def test_one_rank_and_three(close):
    assert close([SHORT], stage(1), stage(3), world=1) < 1e-5
    assert close([SHORT, "parallel.micro_batch=1"], stage(2), stage(3), world=3) < 1e-5


@pytest.mark.e2e
@pytest.mark.parametrize(
    "options",
    [
        ["precision.compute=bf16"],
        ["precision.reduce=bf16"],
        ["precision.compute=bf16", *MODELS["moe"]],
        ["precision.compute=bf16", *MODELS["revffn"]],
    ],
)
def test_bf16_is_near_fsdp2_in_bf16(close, options):
    """The same products in bf16 with sums of gradients and masters in fp32, or sums in bf16 alone."""
    assert close([SHORT, *options, *PADDED], stage(2), stage(3)) < 5e-3
