"""One process and many make the same run; the reference for the numbers is transformers with torch's AdamW."""

import json
import math
import os
import shutil

import pytest
import torch
import torch.distributed as dist

from stepline.comm.fsdp import local
from stepline.comm.mesh import World, build_mesh
from stepline.trainer.run.build import build_model
from stepline.trainer.run.launch import run_training
from stepline.trainer.run.manifest import complete_checkpoints
from stepline.trainer.run.start import start_job


def losses(rows: list[dict]) -> torch.Tensor:
    return torch.tensor([r["loss"] for r in rows if "loss" in r], dtype=torch.float64)


def initial_weights(config: str, shard: int) -> dict[str, torch.Tensor]:
    job = start_job(config, [f"parallel.shard={shard}"], "never", World.from_environment())
    mesh = build_mesh(job.device, job.world.size, shard)
    model = build_model(job.config, job.device, mesh)
    full = {}
    for name, p in model.named_parameters():
        full[name] = p.full_tensor() if hasattr(p, "full_tensor") else p.data
    return {name: tensor.detach().clone() for name, tensor in full.items()}


def test_initial_weights_are_bitwise_the_same_on_any_layout(pool, tiny_config):
    (reference,) = pool.run(1, initial_weights, str(tiny_config), 1)
    assert reference["layers.1.ffn.w1.weight"].std() > 0
    for world, shard in ((2, 2), (4, 4), (4, 2), (4, 1)):
        for weights in pool.run(world, initial_weights, str(tiny_config), shard):
            assert weights.keys() == reference.keys()
            for name in reference:
                assert torch.equal(weights[name], reference[name]), (world, shard, name)


@pytest.mark.parametrize(
    ("precision", "optimizer", "steps", "eps", "tolerance"),
    [
        # in fp32 AdamW makes whole steps of gradients that are rounding alone, where they exceed eps (docs/LAB.md)
        pytest.param("fp32", "adamw", 200, 1e-6, 1e-6, marks=pytest.mark.e2e),
        pytest.param("fp64", "adamw", 200, 1e-8, 1e-9, marks=pytest.mark.e2e),
        ("fp64", "adamw", 20, 1e-8, 1e-12),
        ("fp32", "muon", 20, 1e-8, 1e-6),
        ("fp64", "muon", 20, 1e-8, 1e-12),
    ],
)
def test_one_two_and_four_ranks_give_the_same_loss_curve(
    train, tiny_config, tmp_path, precision, optimizer, steps, eps, tolerance
):
    options = [f"precision.compute={precision}", f"optimizer.name={optimizer}", f"budget.steps={steps}"]
    options += [f"optimizer.eps={eps}"]
    one = losses(train(1, tiny_config, tmp_path / "1", *options))
    assert one[-1] < one[0] - 0.5
    for world in (2, 4):
        many = losses(train(world, tiny_config, tmp_path / f"{world}", *options))
        assert len(many) == steps
        assert (many / one - 1).abs().max() < tolerance, world


def test_hsdp_equals_fsdp(train, tiny_config, tmp_path):
    options = [
        "precision.compute=fp64",
        "budget.batch_tokens=384",
        "parallel.micro_batch=1",  # 3 micro-batches
        "budget.steps=8",
    ]
    fsdp = losses(train(4, tiny_config, tmp_path / "fsdp", "parallel.shard=4", *options))
    for shard in (1, 2):
        hsdp = losses(train(4, tiny_config, tmp_path / f"hsdp{shard}", f"parallel.shard={shard}", *options))
        assert (hsdp / fsdp - 1).abs().max() < 1e-12


def test_accumulation_equals_a_larger_micro_batch(train, tiny_config, tmp_path):
    options = ["budget.batch_tokens=512", "budget.steps=20"]
    large = losses(train(2, tiny_config, tmp_path / "large", "parallel.micro_batch=8", *options))
    small = losses(train(2, tiny_config, tmp_path / "small", "parallel.micro_batch=2", *options))
    assert (small / large - 1).abs().max() < 1e-6


def test_what_must_not_change_the_numbers(train, tiny_config, tmp_path):
    plain = losses(train(2, tiny_config, tmp_path / "plain"))
    full = ["run.recompute=full", "parallel.reshard_after_forward=false", "data.prefetch=7"]
    selective = ["run.recompute=selective", "run.deterministic=true"]
    for name, options in (("full", full), ("selective", selective)):
        assert torch.equal(plain, losses(train(2, tiny_config, tmp_path / name, *options))), options


def test_compiled_blocks_give_the_same_curve(train, tiny_config, tmp_path):
    options = ["model.num_layers=1", "budget.steps=5"]
    plain = losses(train(2, tiny_config, tmp_path / "plain", *options))
    compiled = losses(train(2, tiny_config, tmp_path / "compiled", "run.compile=true", *options))
    assert (plain / compiled - 1).abs().max() < 1e-5


TOGETHER = [
    "optimizer.name=muon",
    "data.confine_attention=true",
    "budget.batch_tokens=512",
    "budget.steps=8",
]


@pytest.mark.parametrize(
    ("precision", "tolerance", "options"),
    [
        ("fp64", 1e-12, ["run.recompute=full"]),
        ("fp64", 1e-12, ["run.recompute=selective", "parallel.reshard_after_forward=false"]),
        pytest.param(
            "fp32",
            1e-5,
            ["run.recompute=full", "run.compile=true", "model.num_layers=1"],
            marks=pytest.mark.e2e,
        ),
        pytest.param(
            "fp32",
            1e-5,
            ["run.recompute=selective", "run.compile=true", "model.num_layers=1"],
            marks=pytest.mark.e2e,
        ),
    ],
)
def test_everything_at_once_equals_one_plain_rank(
    train, tiny_config, tmp_path, precision, tolerance, options
):
    """HSDP 2 x 2 with Muon, accumulation, confined attention, recompute and compile in one run: every pair of them."""
    common = [*TOGETHER, f"precision.compute={precision}", *(o for o in options if o.startswith("model."))]
    plain = losses(train(1, tiny_config, tmp_path / "plain", "parallel.micro_batch=16", *common))
    together = ["parallel.shard=2", "parallel.micro_batch=1", *common, *options]
    assert (losses(train(4, tiny_config, tmp_path / "all", *together)) / plain - 1).abs().max() < tolerance


def test_everything_at_once_resumes_bitwise(interrupted):
    options = [*TOGETHER, "parallel.shard=2", "parallel.micro_batch=1", "checkpoint.every=3"]
    options += ["run.recompute=full", "run.compile=true", "model.num_layers=1"]
    straight, again = interrupted(4, *options)
    for key in ("loss", "grad_norm"):
        assert [r.get(key) for r in again] == [r.get(key) for r in straight], key


def test_the_curve_is_that_of_transformers_and_torch_adamw(train, tiny_config, tmp_path):
    """An independent trainer, in float64: LlamaForCausalLM, its own loss, torch's AdamW and clipping."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from stepline.models.hf import hf_config_dict, to_hf_state
    from stepline.trainer.data.loader import TrainLoader

    options = ["precision.compute=fp64", "model.qk_norm=false", "model.z_loss=0", "schedule.warmup_steps=5"]
    ours = train(2, tiny_config, tmp_path / "run", *options)
    job = start_job(str(tiny_config), [f"run.folder={tmp_path / 'x'}", *options], "never", World(0, 1, 0, 1))
    config = job.config
    start = build_model(config, torch.device("cpu"), None)
    theirs = LlamaForCausalLM(LlamaConfig(**hf_config_dict(config.model, 32))).double()
    theirs.load_state_dict(to_hf_state(start.state_dict()), strict=True)
    plain = [p for n, p in theirs.named_parameters() if p.ndim < 2 or "embed" in n]
    decayed = [p for n, p in theirs.named_parameters() if p.ndim >= 2 and "embed" not in n]
    optimizer = torch.optim.AdamW(
        [{"params": plain, "weight_decay": 0.0}, {"params": decayed, "weight_decay": 0.1}],
        betas=(0.9, 0.95),
        eps=1e-8,
    )
    source = config.data.folders()[0]
    loader = TrainLoader(
        [(source.path, 1.0)], seq_len=32, batch_windows=6, micro_batch=6, rank=0, world_size=1, seed=0
    )
    for step, row in enumerate(r for r in ours if "loss" in r):
        batch = next(loader)
        logits = theirs(batch.inputs[0]).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch.targets[0].flatten())
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(theirs.parameters(), 1.0)
        lr = 5e-3 * ((step + 1) / 5 if step < 5 else 1 - (step - 5) / 15)
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()
        optimizer.zero_grad()
        assert row["lr"] == pytest.approx(lr, rel=1e-12)
        assert row["loss"] == pytest.approx(
            loss.item(), rel=1e-6
        )  # transformers rotates and normalises in fp32
        assert row["grad_norm"] == pytest.approx(norm.item(), rel=1e-4)
    loader.close()


def test_resume_is_bitwise_at_the_same_world_size(interrupted):
    straight, again = interrupted(
        2, "optimizer.name=muon", "data.confine_attention=true", "checkpoint.every=7"
    )
    for key in ("loss", "grad_norm", "lr", "tokens", "val_loss"):
        assert [r.get(key) for r in again] == [r.get(key) for r in straight], key
    assert [r["step"] for r in again if "loss" in r] == list(range(1, 21))


def test_resume_on_other_numbers_of_ranks(train, tiny_config, tmp_path):
    """2 -> 1 -> 4 processes: the curve of an undisturbed run, no window twice or never."""
    folder, options = tmp_path / "run", ["checkpoint.every=6", "checkpoint.keep=10"]
    straight = losses(train(2, tiny_config, folder, *options))
    for world, keep_until in ((1, 6), (4, 12)):
        for path in complete_checkpoints(folder):
            if int(path.name.removeprefix("step-")) > keep_until:
                shutil.rmtree(path)
        rows = train(world, tiny_config, folder, *options, "parallel.shard=auto", resume="auto")
    assert (losses(rows) / straight - 1).abs().max() < 1e-6


def test_validation_with_less_data_than_ranks(train, tiny_config, tmp_path):
    """One window of validation on four ranks: three have nothing, none waits; the value is that of one rank."""
    options = ["logging.eval_every=10", "logging.eval_windows=1", "parallel.micro_batch=1"]
    four = [r["val_loss"] for r in train(4, tiny_config, tmp_path / "4", *options) if "val_loss" in r]
    one = [r["val_loss"] for r in train(1, tiny_config, tmp_path / "1", *options) if "val_loss" in r]
    assert four == pytest.approx(one, rel=1e-6)
    assert len(four) == 2


def broken_step(config: str, folder: str, bad_rank: int) -> tuple[list[float], int, bool]:
    """Three steps; in the second one, a single rank's gradients are NaN."""
    from stepline.trainer.run.state import TrainState
    from stepline.trainer.run.step import train_step

    job = start_job(config, [f"run.folder={folder}"], "never", World.from_environment())
    mesh = build_mesh(job.device, job.world.size, job.config.parallel.shard)
    state = TrainState.create(job.config, job.device, mesh, job.world.rank, job.fingerprints)
    skipped, unchanged = [], True
    for step in range(3):
        if step == 1 and dist.get_rank() == bad_rank:
            weight = local(state.model.layers[0].ffn.w1.weight)
            handle = state.model.layers[0].register_forward_hook(lambda m, i, o: o * math.nan)
        before = {
            n: t.clone() if not hasattr(t, "to_local") else t.to_local().clone()
            for n, t in state.tensors().items()
        }
        result = train_step(state, next(state.loader), 1e-3)
        if step == 1:
            if dist.get_rank() == bad_rank:
                handle.remove()
                assert torch.equal(weight, local(state.model.layers[0].ffn.w1.weight))
            for name, tensor in state.tensors().items():
                if not name.startswith("guard."):
                    unchanged &= torch.equal(local(tensor), before[name])
        skipped.append(result.skipped.item())
    state.loader.close()
    return skipped, int(state.guard.skipped_total), unchanged


def test_a_nan_on_one_rank_skips_the_step_on_all(pool, tiny_config, tmp_path):
    for result in pool.run(4, broken_step, str(tiny_config), str(tmp_path / "r"), 2):
        assert result == ([0.0, 1.0, 0.0], 1, True)


def only_skips(config: str, options: list[str], launch: str, restarts: tuple[int, int]) -> int:
    mine = str(restarts[int(os.environ["RANK"])])
    os.environ |= {"TORCHELASTIC_RUN_ID": launch, "TORCHELASTIC_RESTART_COUNT": mine}
    return run_training(config, options, "auto")


def test_a_run_that_only_skips_stops_with_a_sentence(pool, tiny_config, tmp_path):
    folder = tmp_path / "run"
    options = [
        f"run.folder={folder}",
        "optimizer.guard.max_skipped=3",
        "model.z_loss=1e38",
        "budget.steps=30",
        "logging.every=1000",  # what no row shows counts too
    ]
    assert pool.run(2, only_skips, str(tiny_config), options, "a", (0, 0), init=False) == [1, 1]
    outcome = json.loads((folder / "outcome.json").read_text())
    assert outcome["exit_code"] == 1
    assert outcome["diverged"]
    assert outcome["message"].startswith("3 steps in a row")
    assert "start a new run.folder with a lower optimizer.lr" in outcome["message"]
    # torchrun's restarts of these ranks, which its agents count each for itself, end at once; the user's own next
    # command and another launch are attempts.
    for launch, restarts, attempts in (
        ("a", (1, 1), 1),
        ("a", (0, 1), 1),
        ("a", (0, 0), 2),
        ("b", (1, 1), 3),
    ):
        assert pool.run(2, only_skips, str(tiny_config), options, launch, restarts, init=False) == [1, 1]
        assert len(list((folder / "logs").iterdir())) == attempts


def test_overfits_one_batch(pool, tiny_config, tmp_path):
    """The same batch of two windows again and again, until the model knows it by heart."""
    (final,) = pool.run(1, overfit, str(tiny_config), str(tmp_path / "r"))
    assert final < 0.01


def overfit(config: str, folder: str) -> float:
    from stepline.trainer.run.state import TrainState
    from stepline.trainer.run.step import train_step

    # Two windows: of six, three begin with the same token, and what follows it is then no function of the past.
    options = [f"run.folder={folder}", "optimizer.weight_decay=0", "model.z_loss=0", "budget.batch_tokens=64"]
    job = start_job(config, options, "never", World.from_environment())
    mesh = build_mesh(job.device, 1, 1)
    state = TrainState.create(job.config, job.device, mesh, 0, job.fingerprints)
    batch = next(state.loader)
    for step in range(400):
        result = train_step(state, batch, 1e-2 * min(1, (400 - step) / 200))
    state.loader.close()
    return result.loss.item()
