"""Runs of FP8 layers with scales of rows."""

import pytest
import torch

from stepline.comm.mesh import World
from stepline.trainer.errors import UserError
from stepline.trainer.run.build import build_model
from stepline.trainer.run.eval_command import evaluate_run
from stepline.trainer.run.start import start_job

SHAPE = ["model.hidden_size=48", "model.ffn_size=64", "model.head_dim=16"]
ROWS = [*SHAPE, "precision.fp8=true", "precision.fp8_scales=row"]
MOE = ["model.ffn=moe", "model.ffn_size=32", "model.moe.experts=4", "model.moe.shared_size=16"]


def started(config, *options):
    return start_job(str(config), list(options), "never", World(0, 1, 0, 1))


@pytest.mark.e2e
def test_ranks_compile_and_recompute_give_the_same_curve(train, tiny_config, tiny_data, tmp_path, column):
    """Tokens are scaled by themselves: two ranks have the first loss of one. Afterwards a gradient's scale is that of
    its output in a micro-batch, and what lies between two FP8 numbers may fall to either side."""
    rows = [*ROWS, "model.num_layers=1"]
    one = train(1, tiny_config, tmp_path / "one", *rows, "parallel.micro_batch=6")
    ranks = [*rows, "parallel.micro_batch=3"]
    two = train(2, tiny_config, tmp_path / "two", *ranks)
    compiled = train(2, tiny_config, tmp_path / "compiled", *ranks, "run.compile=true", "run.recompute=full")
    assert column(one)[-1] < column(one)[0] - 0.3
    said = evaluate_run(tmp_path / "one", tiny_data)["val_loss"]
    assert said == pytest.approx(one[-1]["val_loss"], rel=1e-6)
    assert column(two)[0] == pytest.approx(column(one)[0].item(), rel=1e-6)
    for many in (two, compiled):
        assert (column(many) / column(one) - 1).abs().max() < 2e-2


@pytest.mark.e2e
def test_dealt_experts_give_the_same_curve(train, tiny_config, tmp_path, column):
    """With Muon and confined attention."""
    common = [*ROWS, *MOE, "optimizer.name=muon", "data.confine_attention=true"]
    one = train(1, tiny_config, tmp_path / "one", *common, "parallel.micro_batch=6")
    two = train(2, tiny_config, tmp_path / "two", *common, "parallel.micro_batch=3", "parallel.experts=2")
    assert column(two)[0] == pytest.approx(column(one)[0].item(), rel=1e-6)
    assert (column(two) / column(one) - 1).abs().max() < 2e-2
    assert column(two)[-1] < column(two)[0] - 0.3


@pytest.mark.e2e
@pytest.mark.parametrize(
    "options", [["parallel.sync=demo"], ["model.blocks=revffn", *MOE, "model.hidden_size=64"]]
)
def test_a_resume_repeats_the_run(interrupted, options):
    straight, again = interrupted(2, *ROWS, *options, "checkpoint.every=5")
    for key in ("loss", "grad_norm", "val_loss"):
        assert [r.get(key) for r in again] == [r.get(key) for r in straight], key


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (["precision.fp8_scales=row"], "set precision.fp8=true, or leave it out"),
        ([*ROWS, "sparse.mode=s-ste"], "one scale for all tokens; set it to tensor, or sparse.mode to none"),
        ([*ROWS, "model.ffn_size=50"], "FP8 products take multiples of 16"),
        ([*ROWS, "precision.compute=fp64"], "which fp64 is not for"),
    ],
)
def test_what_cannot_be_is_refused(tiny_config, tmp_path, overrides, sentence):
    with pytest.raises(UserError, match=sentence):
        started(tiny_config, f"run.folder={tmp_path / 'run'}", *overrides)


def test_what_is_rounded_to_bf16_is_said(tiny_config, tmp_path):
    for compute, said in (("fp32", 1), ("bf16", 0)):
        job = started(tiny_config, f"run.folder={tmp_path / 'run'}", *ROWS, f"precision.compute={compute}")
        assert sum("scales of rows give bf16" in note for note in job.notes) == said


def test_a_window_has_the_same_logits_whatever_lies_beside_it(tiny_config):
    """With one scale for each tensor it has not."""
    tokens = torch.randint(0, 331, (2, 32), generator=torch.Generator().manual_seed(0))
    for scales in ("row", "tensor"):
        job = started(tiny_config, *ROWS, f"precision.fp8_scales={scales}")
        model = build_model(job.config, job.device, None)
        both, alone = model(tokens), torch.cat([model(window[None]) for window in tokens])
        same = torch.allclose(both, alone, rtol=1e-6, atol=1e-6)
        assert same is (scales == "row")
