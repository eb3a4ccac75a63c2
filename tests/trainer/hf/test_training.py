"""Imported models in training: on as they are, and in reversible blocks in two stages; runs exported."""

import math

import pytest
import torch

from stepline.trainer.hf.adapters import fill_adapter, is_new
from stepline.trainer.hf.export import export_run
from stepline.trainer.hf.importing import import_model
from stepline.trainer.run.infer import load_run


@pytest.fixture
def imported(save, tmp_path):
    """A random model, saved by transformers, as a run."""

    def make(family):
        model = save(family, tmp_path / "hf", initializer_range=0.02)
        import_model(tmp_path / "hf", tmp_path / "run")
        return tmp_path / "run", model

    return make


def weights(run):
    model, _, checkpoint = load_run(run)
    return dict(model.named_parameters()), checkpoint


def test_training_goes_on_and_comes_out_again(imported, train, tmp_path):
    """On two ranks with expert parallelism; the export of what was trained is its family's again."""
    from transformers import AutoModelForCausalLM

    run, theirs = imported("Qwen3Moe")
    rows = train(
        2, run / "config.yaml", tmp_path / "more", f"run.init_from={run}", "budget.steps=15", "optimizer.lr=1e-2",
        "parallel.experts=2", "parallel.shard=2",
    )  # fmt: skip
    assert rows[0]["loss"] == pytest.approx(math.log(331), abs=0.1)
    assert rows[-1]["loss"] < rows[0]["loss"] - 1
    assert export_run(tmp_path / "more", tmp_path / "out").architecture == "Qwen3MoeForCausalLM"
    model, _, _ = load_run(tmp_path / "more")
    back = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    tokens = torch.randint(0, 330, (2, 60), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        torch.testing.assert_close(back(tokens).logits, model(tokens), rtol=0, atol=1e-4)
        assert (back(tokens).logits - theirs(tokens).logits).abs().max() > 0.5


@pytest.mark.e2e
@pytest.mark.parametrize(
    ("family", "world", "canon"), [("Llama", 2, "none"), ("Qwen3Moe", 2, "none"), ("Llama", 2, "AC")]
)
def test_two_stages_in_reversible_blocks(imported, train, tmp_path, family, world, canon):
    """The first loss is finite and falls; the first stage leaves the pre-trained layers bit by bit as they were."""
    run, _ = imported(family)
    first = run / "checkpoints" / "step-000000"
    shape = ["model.blocks=revffn", "model.revffn.adapters=true", f"model.canon={canon}"]
    stage = [*shape, "optimizer.lr=1e-2", "optimizer.only=adapters", f"run.init_from={first}"]
    rows = train(world, run / "config.yaml", tmp_path / "one", *stage, "budget.steps=12")
    assert math.isfinite(rows[0]["loss"])
    assert rows[-1]["loss"] < rows[0]["loss"] - 0.03

    before, _ = weights(run)
    after, checkpoint = weights(tmp_path / "one")
    stored = torch.distributed.checkpoint.FileSystemReader(checkpoint).read_metadata().state_dict_metadata
    for name, value in after.items():
        assert (f"model.{name}" in stored) == is_new(name)
        assert is_new(name) or torch.equal(value, before[name])

    rows2 = train(
        world, run / "config.yaml", tmp_path / "two", *shape, "optimizer.lr=5e-3", f"run.init_from={tmp_path / 'one'}",
        "budget.steps=12",
    )  # fmt: skip
    assert rows2[0]["loss"] < rows[0]["loss"] - 0.02
    assert rows2[-1]["loss"] < rows2[0]["loss"] - 0.5
    moved, checkpoint = weights(tmp_path / "two")
    assert not any(torch.equal(value, after[name]) for name, value in moved.items())

    export_run(tmp_path / "one", tmp_path / "out")
    import_model(tmp_path / "out", tmp_path / "back")
    assert all(torch.equal(value, after[name]) for name, value in weights(tmp_path / "back")[0].items())


@pytest.mark.e2e
def test_a_first_stage_is_resumed(imported, train, tmp_path):
    """On other ranks, from where it stands: the frozen weights are read again."""
    run, _ = imported("Llama")
    stage = [
        "model.blocks=revffn", "model.revffn.adapters=true", "optimizer.only=adapters", "optimizer.lr=1e-2",
        f"run.init_from={run / 'checkpoints' / 'step-000000'}", "budget.steps=8", "precision.compute=fp64",
    ]  # fmt: skip
    straight = train(2, run / "config.yaml", tmp_path / "straight", *stage)
    train(2, run / "config.yaml", tmp_path / "cut", *stage, "checkpoint.every=4")
    import shutil

    shutil.rmtree(tmp_path / "cut" / "checkpoints" / "step-000008")
    rows = train(1, run / "config.yaml", tmp_path / "cut", *stage)
    for key in ("loss", "grad_norm"):
        assert [r[key] for r in rows] == pytest.approx([r[key] for r in straight], rel=1e-9)


def test_adapters_repeat_and_select():
    up, down = torch.empty(6, 3), torch.empty(3, 6)
    fill_adapter(up, torch.arange(1.0, 7.0), 0)
    x = torch.tensor([1.0, 10.0, 100.0])
    assert (up @ x).tolist() == [1, 20, 300, 4, 50, 600]
    for half, expected in ((0, [1, 20, 300]), (1, [4, 50, 600])):
        fill_adapter(down, None, half)
        assert (down @ up @ x).tolist() == expected


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["optimizer.only=adapters"], "needs model.blocks=revffn"),
        (["optimizer.only=adapters", "model.blocks=revffn", "model.revffn.adapters=true"], "step-000000"),
    ],
)
def test_mistakes_of_the_first_stage(imported, data, tmp_path, options, message):
    from stepline.trainer.config_io import load_config
    from stepline.trainer.errors import UserError
    from stepline.trainer.run.build import build_model

    run, _ = imported("Llama")
    config, _ = load_config(str(run / "config.yaml"), [*options, f"run.init_from={run}"])
    with pytest.raises(UserError, match=message):
        build_model(config, torch.device("cpu"), None)


@pytest.mark.e2e
@pytest.mark.parametrize(
    ("family", "more", "kept"),
    [("Llama", [], 2), ("Qwen3Moe", [], 2), ("Llama", ["sparse.dense_fraction=0.5"], 4)],
)
def test_sparse_runs_are_exported_as_they_compute(train, imported, tmp_path, family, more, kept):
    """2:4 weights: two of four in an exported matrix are zeros, and the logits are those of the sparse forward; after
    a dense phase those of the dense one."""
    from transformers import AutoModelForCausalLM

    run, _ = imported(family)
    options = ["sparse.mode=s-ste", "budget.steps=4", "optimizer.lr=1e-2", *more]
    train(1, run / "config.yaml", tmp_path / "sparse", *options)
    export_run(tmp_path / "sparse", tmp_path / "out")
    model, _, _ = load_run(tmp_path / "sparse")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    matrices = [w for name, w in theirs.named_parameters() if ".mlp." in name and ".gate.weight" not in name]
    of_a_block = 3 if family == "Llama" else 2  # experts' w1 and w3 are one
    assert len(matrices) == of_a_block * len(theirs.model.layers)
    for matrix in matrices:
        assert int((matrix.unflatten(-1, (-1, 4)) != 0).sum(-1).max()) == kept
    tokens = torch.randint(0, 330, (2, 60), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        torch.testing.assert_close(theirs(tokens).logits, model(tokens), rtol=0, atol=1e-4)
