"""Runs of 2:4 sparse and FP8 layers: layouts, other features, resume, phases, evaluation."""

import json
import shutil

import pytest
import torch

from stepline.comm.fsdp import local
from stepline.comm.mesh import World, build_mesh
from stepline.kernels.sparse24 import scale_of, scale_sums, soft_threshold
from stepline.models.sparse_linear import sparse_weights
from stepline.trainer.errors import UserError
from stepline.trainer.run.build import build_model
from stepline.trainer.run.eval_command import evaluate_run
from stepline.trainer.run.infer import load_run
from stepline.trainer.run.sparsity import Sparsity
from stepline.trainer.run.start import start_job
from stepline.trainer.run.state import Trainee

SPARSE = ["sparse.mode=s-ste", "model.hidden_size=48", "model.ffn_size=64"]
FP8 = [*SPARSE, "precision.fp8=true", "model.head_dim=16"]
MOE = ["model.ffn=moe", "model.ffn_size=32", "model.moe.experts=4", "model.moe.shared_size=16"]
REVFFN = ["model.blocks=revffn", "model.num_heads=2"]
TOGETHER = [  # HSDP, accumulation, Muon, confined attention, weights that stay gathered
    "parallel.shard=2", "parallel.micro_batch=1", "optimizer.name=muon", "data.confine_attention=true",
    "parallel.reshard_after_forward=false",
]  # fmt: skip


@pytest.mark.e2e
@pytest.mark.parametrize(
    ("world", "options"),
    [
        (2, []),
        (4, ["parallel.shard=4"]),
        (2, ["parallel.reshard_after_forward=false", "data.confine_attention=true"]),
        (4, ["parallel.shard=2", "parallel.micro_batch=1", "run.recompute=full", "optimizer.name=muon"]),
        (4, ["parallel.experts=2", "parallel.micro_batch=1", *MOE]),
        (4, [*TOGETHER, "run.recompute=full", *MOE]),
        (4, [*TOGETHER, *REVFFN]),
        (4, [*TOGETHER, "parallel.experts=2", *REVFFN, *MOE]),
    ],
)
def test_every_layout_gives_the_curve_of_one_plain_rank(train, tiny_config, tmp_path, world, options, column):
    """In float64 to 1e-10 over 20 steps: a threshold's tie may fall to the other side of a rounding."""
    common = [
        *SPARSE,
        "precision.compute=fp64",
        *(o for o in options if o.startswith(("model", "optimizer", "data"))),
    ]
    one = train(1, tiny_config, tmp_path / "one", "parallel.micro_batch=6", *common)
    many = train(world, tiny_config, tmp_path / "many", *common, *options)
    assert column(one)[-1] < column(one)[0] - 0.3
    assert (column(many) / column(one) - 1).abs().max() < 1e-10
    assert (column(many, "flip_rate") - column(one, "flip_rate")).abs().max() < 1e-4
    assert 0 < column(one, "flip_rate")[:5].mean() < 0.2


@pytest.mark.e2e
@pytest.mark.parametrize(
    "options",
    [
        ["parallel.shard=2", "run.recompute=full", "parallel.reshard_after_forward=false"],
        ["parallel.shard=2", "optimizer.name=muon", *REVFFN],
    ],
    ids=["recompute", "revffn"],
)
def test_the_estimator_draws_alike_on_whole_and_on_sharded_weights(
    train, tiny_config, tmp_path, options, column
):
    """Of the same micro-batches, of whose gradients each rank keeps a half; against ranks that hold all, float64."""
    common = [*SPARSE, "sparse.grad_weight=mvue", "precision.compute=fp64", "parallel.micro_batch=1"]
    common += [o for o in options if o.startswith(("model", "optimizer"))]
    whole = train(2, tiny_config, tmp_path / "whole", *common, "parallel.shard=1")
    other = train(2, tiny_config, tmp_path / "other", *common, *options)
    exact = train(2, tiny_config, tmp_path / "exact", *common, "sparse.grad_weight=dense")
    assert (column(other) / column(whole) - 1).abs().max() < 1e-10
    assert (column(exact)[2:] / column(whole)[2:] - 1).abs().min() > 1e-6


@pytest.mark.e2e
@pytest.mark.parametrize(
    ("what", "recompute", "tolerance"),
    [
        (SPARSE, "none", 1e-5),
        (SPARSE, "full", 1e-5),
        ([*SPARSE, *MOE], "none", 1e-5),
        ([*SPARSE, *REVFFN], "none", 1e-5),
        ([*SPARSE, *REVFFN, *MOE], "none", 1e-5),
        ([*FP8, "sparse.grad_weight=mvue"], "full", 1e-2),
    ],
)
def test_compiled_blocks_give_the_same_curve(
    train, tiny_config, tmp_path, column, what, recompute, tolerance
):
    """FP8 layers on as many ranks, with the same draws and scales; a rounding may fall to the other side."""
    options, world = [*what, "model.num_layers=1"], 2 if "precision.fp8=true" in what else 1
    plain = train(world, tiny_config, tmp_path / "plain", *options)
    compiled = ["run.compile=true", f"run.recompute={recompute}"]
    rows = train(2, tiny_config, tmp_path / "compiled", *options, *compiled)
    assert (column(rows) / column(plain) - 1).abs().max() < tolerance


@pytest.mark.e2e
@pytest.mark.parametrize(
    "options",
    [[], [*MOE, "parallel.experts=2", "optimizer.name=muon", "data.confine_attention=true"]],
    ids=["dense", "experts dealt"],
)
def test_fp8_on_two_ranks_is_fp8_on_one_but_for_the_scales_of_batches(
    train, tiny_config, tmp_path, column, options
):
    """Activations are scaled by a micro-batch's own largest value."""
    dealt = [o for o in options if o.startswith("parallel")]
    common = [*FP8, *(o for o in options if o not in dealt)]
    one = train(1, tiny_config, tmp_path / "one", *common, "parallel.micro_batch=6")
    two = train(2, tiny_config, tmp_path / "two", *common, "parallel.micro_batch=3", *dealt)
    assert (column(two) / column(one) - 1).abs().max() < 2e-2
    assert column(two)[-1] < column(two)[0] - 0.3


@pytest.mark.e2e
@pytest.mark.parametrize(
    ("sync", "model"),
    [
        *(("all_reduce", [*FP8, "sparse.grad_weight=mvue"]), ("demo", [*FP8, "sparse.grad_weight=mvue"])),
        *(("demo", [*SPARSE, *more]) for more in (MOE, REVFFN, [*REVFFN, *MOE])),
        # resumed before the dense phase
        ("demo", [*SPARSE, "sparse.dense_fraction=0.6", "run.compile=true"]),
    ],
)
def test_a_resume_repeats_draws_and_keeps_betas(interrupted, column, sync, model):
    straight, again = interrupted(2, *model, "checkpoint.every=5", f"parallel.sync={sync}")
    assert column(again, "loss").tolist() == column(straight, "loss").tolist()
    for key in ("grad_norm", "flip_rate", "beta_min", "beta_max"):
        assert [r[key] for r in again if "loss" in r] == [r[key] for r in straight if "loss" in r], key
    held_out = [[r["val_loss"] for r in rows if "val_loss" in r] for rows in (again, straight)]
    assert held_out[0] == held_out[1] != []


@pytest.mark.e2e
def test_the_dense_phase_at_the_end_is_what_evaluation_sees(train, tiny_config, tmp_path, tiny_data, column):
    sparse = train(1, tiny_config, tmp_path / "sparse", *SPARSE)
    dense = train(1, tiny_config, tmp_path / "dense", *SPARSE, "sparse.dense_fraction=0.25")
    assert torch.equal(column(sparse)[:15], column(dense)[:15])  # 15 of 20 steps
    assert (column(sparse)[15:] != column(dense)[15:]).all()
    for name, rows in (("sparse", sparse), ("dense", dense)):
        said = evaluate_run(tmp_path / name, tiny_data)["val_loss"]
        assert said == pytest.approx(rows[-1]["val_loss"], rel=1e-6)


def test_the_jump_to_the_dense_phase_is_no_spike(train, tiny_config, tmp_path):
    """The loss of W is not that of beta S(W), by which the guard would skip step after step."""
    options = ["budget.steps=200", "sparse.dense_fraction=0.2", "optimizer.guard.window=16"]
    rows = train(1, tiny_config, tmp_path / "run", *SPARSE, *options)
    assert [row["skipped"] for row in rows if "loss" in row] == [0] * 200


@pytest.mark.e2e
def test_a_validation_that_is_made_up_for_is_of_the_phase_that_led_to_it(train, tiny_config, tmp_path):
    """At the last sparse step: the straight run validates before the dense phase, and so does a resume."""
    options = [*SPARSE, "sparse.dense_fraction=0.5", "checkpoint.every=10", "logging.eval_every=10"]
    folder = tmp_path / "run"
    straight = train(1, tiny_config, folder, *options)
    for late in ("checkpoints/step-000020", "outcome.json"):
        path = folder / late
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    metrics = folder / "metrics.jsonl"
    kept = [line for line in metrics.read_text().splitlines() if json.loads(line)["step"] <= 10]
    assert "val_loss" in json.loads(kept.pop())
    metrics.write_text("".join(line + "\n" for line in kept))
    again = train(1, tiny_config, folder, *options, resume="auto")
    held_out = [[(r["step"], r["val_loss"]) for r in rows if "val_loss" in r] for rows in (straight, again)]
    assert held_out[0] == held_out[1]
    assert [step for step, _ in held_out[0]] == [10, 20]


@pytest.mark.parametrize(
    ("fraction", "said"), [(0.98, "makes all of the run's 20 steps dense"), (0.02, "none is dense")]
)
def test_a_dense_phase_of_no_or_all_steps_is_said(tiny_config, fraction, said):
    options = [*SPARSE, f"sparse.dense_fraction={fraction}"]
    if fraction > 0.5:
        with pytest.raises(UserError, match=said):
            start_job(str(tiny_config), options, "never", World(0, 1, 0, 1))
    else:
        assert any(
            said in note for note in start_job(str(tiny_config), options, "never", World(0, 1, 0, 1)).notes
        )


@pytest.mark.e2e
def test_a_dense_run_goes_on_sparse(train, tiny_config, tmp_path, tiny_data, column):
    """From its weights: beta is theirs, not that of the initial values."""
    dense = [o for o in SPARSE if not o.startswith("sparse")]
    train(1, tiny_config, tmp_path / "dense", *dense, "budget.steps=40")
    rows = train(2, tiny_config, tmp_path / "sparse", *SPARSE, f"run.init_from={tmp_path / 'dense'}")
    loaded, _, _ = load_run(tmp_path / "dense")
    expected = [
        scale_of(scale_sums(p.detach())).item() for n, p in loaded.named_parameters() if ".ffn.w" in n
    ]
    assert rows[0]["beta_min"] == pytest.approx(min(expected), rel=1e-6)
    assert rows[0]["beta_max"] == pytest.approx(max(expected), rel=1e-6)
    assert column(rows)[-1] < column(rows)[0]
    back = [f"run.init_from={tmp_path / 'sparse'}", "budget.steps=1"]
    train(1, tiny_config, tmp_path / "back", *dense, *back)
    said = (tmp_path / "back" / "logs" / "attempt-1" / "rank-0.log").read_text()
    assert "has 2:4 sparse layers: this run starts from their dense master weights" in said


def betas(config: str, shard: int) -> dict[str, tuple[float, float]]:
    job = start_job(config, [*SPARSE, *MOE, f"parallel.shard={shard}"], "never", World.from_environment())
    mesh = build_mesh(job.device, job.world.size, shard)
    model = build_model(job.config, job.device, mesh)
    return {name: (beta.item(), local(weight.data).numel()) for name, weight, beta in sparse_weights(model)}


@pytest.mark.parametrize("model", [[], MOE])
def test_no_forward_with_a_scale_that_was_never_set(tiny_config, model):
    """As after `to_empty` without an initialisation: the layer would give zeros."""
    job = start_job(str(tiny_config), [*SPARSE, *model], "never", World(0, 1, 0, 1))
    trainee = Trainee.build(job.config, job.device, None)
    trainee.sparsity.begin(0, watched=False)
    (name, _, beta), *_ = sparse_weights(trainee.model)
    beta.zero_()
    with pytest.raises(RuntimeError, match=f"the scale of {name} has not been set"):
        Sparsity(job.config, trainee.model).begin(0, watched=False)


def test_betas_of_shards_are_those_of_whole_weights(pool, tiny_config):
    (whole,) = pool.run(1, betas, str(tiny_config), 1)
    job = start_job(str(tiny_config), [*SPARSE, *MOE], "never", World(0, 1, 0, 1))
    model = build_model(job.config, torch.device("cpu"), None)
    for name, weight, beta in sparse_weights(model):
        w, s = weight.detach().double(), soft_threshold(weight.detach().double())
        assert beta.item() == pytest.approx(((w * s).sum() / s.square().sum()).item(), rel=1e-6)
        assert beta.item() == whole[name][0]
        if weight.ndim == 2:
            assert beta.item() == pytest.approx(scale_of(scale_sums(weight.detach())).item(), rel=1e-6)
    for world, shard in ((2, 2), (4, 4), (4, 2)):
        for found in pool.run(world, betas, str(tiny_config), shard):
            assert found.keys() == whole.keys()
            for name, (beta, size) in found.items():
                assert beta == pytest.approx(whole[name][0], rel=1e-6)
                assert size < whole[name][1]


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (
            ["sparse.mode=s-ste", "model.ffn_size=50"],
            "ffn_size gives layers a width of 50, and 2:4 sparse layers take",
        ),
        (["sparse.mode=s-ste", "model.ffn_size=50"], "the nearest width: 48"),
        (["precision.fp8=true", "model.hidden_size=48"], "FP8 products take multiples of 16"),
        (["sparse.grad_weight=mvue"], "sparse.grad_weight needs sparse layers"),
        (["sparse.dense_fraction=0.1"], "sparse.dense_fraction needs sparse layers"),
        ([*SPARSE, *MOE, "sparse.grad_weight=mvue"], "not made for experts"),
    ],
)
def test_what_cannot_be_sparse_is_refused(tiny_config, tmp_path, overrides, sentence):
    with pytest.raises(UserError, match=sentence):
        start_job(
            str(tiny_config), [f"run.folder={tmp_path / 'run'}", *overrides], "never", World(0, 1, 0, 1)
        )


@pytest.mark.parametrize(
    ("overrides", "sentences"),
    [
        ([], []),
        (
            ["precision.fp8=true", "model.hidden_size=48", "model.ffn_size=64", "model.head_dim=16"],
            ["no FP8 products"],
        ),
        (SPARSE, ["dense ones with zeros"]),
        ([*FP8, *MOE], ["no FP8 products", "dense ones with zeros"]),
    ],
)
def test_what_a_device_does_instead_is_said(tiny_config, tmp_path, overrides, sentences):
    job = start_job(
        str(tiny_config), [f"run.folder={tmp_path / 'run'}", *overrides], "never", World(0, 1, 0, 1)
    )
    said = [note for note in job.notes if "FP8" in note or "2:4" in note]
    assert len(said) == len(sentences)
    assert all(sentence in note for sentence, note in zip(sentences, said, strict=True))


def kept(four: list[float]) -> list[bool]:
    """Of four values those above the third in magnitude."""
    third = sorted(map(abs, four))[1]
    return [abs(x) > third for x in four]


def test_the_flip_rate_is_that_of_plain_loops(tiny_config, tmp_path):
    options = [*SPARSE, *MOE, f"run.folder={tmp_path / 'run'}"]
    config = start_job(str(tiny_config), options, "never", World(0, 1, 0, 1)).config
    model = build_model(config, torch.device("cpu"), None)
    sparsity, draw = Sparsity(config, model), torch.Generator().manual_seed(0)
    sparsity.begin(0, watched=True)
    flips = total = 0
    for _, weight, _ in sparsity.weights:
        before = weight.detach().reshape(-1, 4).tolist()
        with torch.no_grad():
            weight += 0.3 * weight.std() * torch.randn(weight.shape, generator=draw)
        for a, b in zip(before, weight.detach().reshape(-1, 4).tolist(), strict=True):
            flips += sum(x != y for x, y in zip(kept(a), kept(b), strict=True))
            total += 4
    assert 0.05 < flips / total < 0.5
    assert sparsity.row()["flip_rate"] == pytest.approx(flips / total, rel=1e-12)
