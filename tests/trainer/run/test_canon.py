"""Runs with Canon layers: each layout and feature against one plain rank."""

import pytest

CANON = "model.canon=AC"
REVFFN = ["model.blocks=revffn", "model.hidden_size=48", "model.ffn_size=48"]
MOE = ["model.ffn=moe", "model.hidden_size=48", "model.ffn_size=24", "model.moe.experts=6"]
OF_THE_MODEL = ("model", "optimizer", "data.", "budget", "sparse")


@pytest.mark.parametrize(
    ("world", "tolerance", "options"),
    [
        (
            4,
            1e-12,
            [
                "parallel.shard=2", "parallel.micro_batch=1", "budget.batch_tokens=512", "data.confine_attention=true",
                "run.recompute=full", "optimizer.name=muon",
            ],
        ),
        (2, 1e-12, ["run.recompute=selective", "parallel.reshard_after_forward=false"]),
        (2, 1e-12, [*REVFFN, "data.confine_attention=true"]),
        pytest.param(
            2, 1e-12, [*REVFFN, "model.revffn.adapters=true", "model.canon=C", "optimizer.name=muon"],
            marks=pytest.mark.e2e,
        ),
        pytest.param(2, 1e-12, [*MOE, "run.recompute=full"], marks=pytest.mark.e2e),
        pytest.param(
            4, 1e-12, [*MOE, "parallel.experts=2", *REVFFN, "model.ffn_size=24"], marks=pytest.mark.e2e
        ),
        (2, 1e-10, ["sparse.mode=s-ste", "model.hidden_size=48", "model.ffn_size=64"]),
    ],
)  # fmt: skip
def test_every_layout_gives_the_curve_of_one_plain_rank(
    train, tiny_config, tmp_path, column, world, tolerance, options
):
    common = [CANON, "precision.compute=fp64", *(o for o in options if o.startswith(OF_THE_MODEL))]
    one = column(train(1, tiny_config, tmp_path / "one", "parallel.micro_batch=16", *common))
    many = column(train(world, tiny_config, tmp_path / "many", *common, *options))
    assert one[-1] < one[0] - 0.3
    assert (many / one - 1).abs().max() < tolerance


@pytest.mark.parametrize(
    ("tolerance", "options"),
    [
        pytest.param(1e-5, ["run.compile=true", "model.num_layers=1"], marks=pytest.mark.e2e),
        (1e-5, ["parallel.backend=zero", "parallel.zero.stage=2"]),
        (1e-5, ["parallel.backend=zero", "parallel.zero.stage=3"]),
    ],
)
def test_compiled_and_by_deepspeed(train, tiny_config, tmp_path, column, tolerance, options):
    common = [CANON, *(o for o in options if o.startswith("model"))]
    plain = column(train(1, tiny_config, tmp_path / "plain", *common))
    other = column(train(2, tiny_config, tmp_path / "other", *common, *options))
    assert (other / plain - 1).abs().max() < tolerance


@pytest.mark.e2e
def test_they_learn_and_resume_bitwise_across_slow_links(interrupted, train, tiny_config, tmp_path, column):
    """DeMo on two replicas of two ranks; replicas are compared in every step."""
    demo = ["parallel.sync=demo", "parallel.shard=2", "parallel.check_replicas_every=1"]
    straight, again = interrupted(4, CANON, *demo, "checkpoint.every=5", "checkpoint.keep=9")
    for key in ("loss", "grad_norm"):
        assert column(again, key).equal(column(straight, key))
    without = train(4, tiny_config, tmp_path / "without", *demo)
    assert without[0]["loss"] == straight[0]["loss"]  # they begin as the model without
    assert column(without)[-1] > column(straight)[-1] + 1e-3
