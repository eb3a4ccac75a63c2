"""What DeepSpeed ZeRO is not offered for is said before the start."""

import pytest

from stepline.comm.mesh import World
from stepline.trainer.errors import UserError
from stepline.trainer.run.start import start_job

pytest.importorskip("deepspeed")

ZERO = "parallel.backend=zero"
MOE = [
    "model.ffn=moe",
    "model.hidden_size=40",
    "model.head_dim=12",
    "model.ffn_size=24",
    "model.moe.experts=5",
]


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["parallel.sync=demo"], "zero has no parallel.sync=demo: set it to all_reduce, or parallel.backend to fsdp"),
        (["parallel.sync=diloco"], "has no parallel.sync=diloco"),
        (["parallel.sync=random_k"], "has no parallel.sync=random_k"),
        (["parallel.experts=2", *MOE], "has no parallel.experts=2: set it to 1"),
        (["optimizer.name=muon"], "has no optimizer.name=muon: set it to adamw"),
        (["optimizer.only=adapters"], "has no optimizer.only=adapters: set it to all"),
        (["sparse.mode=s-ste"], "has no sparse.mode=s-ste: set it to none"),
        (["precision.fp8=true"], "has no precision.fp8=true: set it to false"),
        (["run.compile=true"], "has no run.compile=true: set it to false"),
        (["precision.compute=fp64"], "DeepSpeed has no float64; set precision.compute to fp32"),
        (["precision.compute=bf16", "parallel.zero.stage=1"], "set parallel.zero.stage to 2"),
        (["parallel.shard=1"], "ZeRO shards over all 2 ranks; set parallel.shard to auto"),
        (["parallel.zero.offload=all", "parallel.zero.stage=2"], "set it to optimizer, or parallel.zero.stage to 3"),
        (["parallel.deepspeed.zero_quantized_weights=true"], "needs GPUs; leave it out on the cpu"),
        (["parallel.deepspeed.zero_hpz_partition_size=3"], "does not divide the 2 ranks"),
        (
            ["parallel.deepspeed.stage3_prefetch_bucket_size=9", "parallel.zero.stage=2"],
            "stage3_prefetch_bucket_size is of stage 3; leave it out",
        ),
        (["parallel.deepspeed.gradient_clipping=1"], "is set by Stepline: use optimizer.grad_clip instead"),
        (["parallel.deepspeed.train_batch_size=8"], "is set by Stepline: use budget.batch_tokens instead"),
        (["parallel.deepspeed.reduce_bucket_sise=9"], "did you mean 'reduce_bucket_size'?"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_said_before_the_start(tiny_config, tmp_path, options, sentence):
    with pytest.raises(UserError) as error:
        start_job(
            str(tiny_config), [f"run.folder={tmp_path / 'r'}", ZERO, *options], "never", World(0, 2, 0, 2)
        )
    assert sentence in str(error.value)
    assert "\n" not in str(error.value)


def test_without_deepspeed_one_sentence_says_what_to_install(tiny_config, tmp_path, monkeypatch):
    from stepline.trainer.run import zero

    monkeypatch.setattr(zero.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"needs DeepSpeed: run `pip install 'stepline\[zero\]'`"):
        start_job(str(tiny_config), [f"run.folder={tmp_path / 'r'}", ZERO], "never", World(0, 1, 0, 1))
