"""Two steps of each case on a GPU that is not there; one JSON line for each: its name, and where the host waited for
the device in the second step, or the error.

    LD_PRELOAD=GUARD python tests/e2e/fake_cuda/steps.py RANKS
"""

import json
import sys
import traceback

import device as fake
import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing._internal.distributed.fake_pg import FakeStore

from stepline.comm import fsdp_cast
from stepline.comm.mesh import build_mesh
from stepline.trainer.config_io import find_config, load_config
from stepline.trainer.data.loader import Batch
from stepline.trainer.run import build
from stepline.trainer.run.state import Trainee
from stepline.trainer.run.step import train_step

COMMON = {
    "model.hidden_size": 256, "model.num_layers": 2, "model.num_heads": 4, "model.num_kv_heads": 2,
    "model.ffn_size": 512, "model.vocab_size": 512, "data.seq_len": 64, "budget.tokens": "null", "budget.steps": 2,
    "optimizer.lr": 0.001, "optimizer.weight_decay": 0.1, "schedule.warmup_steps": 1, "parallel.micro_batch": 2,
    "run.device": "cuda", "run.compile": "false", "precision.compute": "bf16",
}  # fmt: skip
FP8, SPARSE, MOE, REVFFN = "precision.fp8=true", "sparse.mode=s-ste", "model.ffn=moe", "model.blocks=revffn"
CASES = {
    "dense": [],
    "muon": ["optimizer.name=muon"],
    "recompute": ["run.recompute=full"],
    "selective": ["run.recompute=selective"],
    "canon": ["model.canon=AC"],
    "confined": ["data.confine_attention=true"],
    "fp8": [FP8],
    "fp8, rows": [FP8, "precision.fp8_scales=row"],
    "2:4": [SPARSE],
    "2:4, estimator": [SPARSE, "sparse.grad_weight=mvue"],
    "2:4, fp8, forced": [SPARSE, FP8, "sparse.forward=sparse", "sparse.force=true"],
    "2:4, fp8, estimator": [SPARSE, FP8, "sparse.grad_weight=mvue"],
    "experts": [MOE],
    "experts, sigmoid, shared": [MOE, "model.moe.score=sigmoid", "model.moe.shared_size=128"],
    "experts, fp8": [MOE, FP8],
    "experts, 2:4": [MOE, SPARSE],
    "reversible": [REVFFN],
    "reversible, experts": [REVFFN, MOE],
    "reversible, 2:4, fp8": [REVFFN, SPARSE, FP8],
    "reversible as published": [REVFFN, "model.coupling=revffn"],
}
SPREAD = {
    **{name: CASES[name] for name in ("dense", "muon", "fp8, rows", "2:4, fp8, estimator", "experts, fp8")},
    "hsdp": ["parallel.shard=2"],
    "bf16 sums": ["parallel.shard=2", "precision.reduce=bf16"],
    "demo": ["parallel.sync=demo", "parallel.shard=2"],
    "demo, late": ["parallel.sync=demo", "parallel.shard=1", "parallel.demo.delay=1"],
    "demo, owners": ["parallel.sync=demo", "parallel.shard=1", "parallel.demo.owner_reduce_above=2"],
    "diloco": ["parallel.sync=diloco", "parallel.shard=2", "parallel.diloco.every=2"],
    "random-k": ["parallel.sync=random_k", "parallel.shard=2"],
}


def placeholder(cast, gathered, _, dtype, *, out=None):
    """CastShard.after, whose placeholder is a subclass of its own, which a fake tensor cannot become."""
    if out is not None:
        return None
    cast.receive(gathered[0][: cast.shape[0]])
    return torch.empty(cast.shape, dtype=dtype, device=gathered[0].device), ()


def waits(options: list[str], gpu: torch.device, ranks: int) -> list[str]:
    overrides = [f"{key}={value}" for key, value in COMMON.items()] + options
    config = load_config(str(find_config("dense-125m")), overrides)[0]
    config.parallel.shard = ranks if config.parallel.shard == "auto" else config.parallel.shard
    mesh = build_mesh(gpu, ranks, config.parallel.shard)
    with FakeTensorMode(allow_non_fake_inputs=True):
        state = Trainee.build(config, gpu, mesh)
        for step in range(2):
            tokens = torch.randint(0, 512, (2, 2, 65))
            ids = torch.zeros(2, 2, 64, dtype=torch.int32) if config.data.confine_attention else None
            batch = Batch(tokens[..., :-1].contiguous(), tokens[..., 1:].contiguous(), ids, {})
            fake.WAITS.clear()
            state.sparsity.begin(step, watched=False)
            measures = train_step(state, batch, 1e-4)
        assert measures.loss.device == gpu
    return list(fake.WAITS)


def main() -> None:
    ranks = int(sys.argv[1])
    fake.pretend()
    fsdp_cast.CastShard.after = placeholder
    build.init_parameter = lambda *_, shape, device, dtype, **__: torch.zeros(
        shape, device=device, dtype=dtype
    )
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=ranks)
    for name, options in (CASES if ranks == 1 else SPREAD).items():
        try:
            row = {"case": name, "waits": waits(options, torch.device("cuda", 0), ranks)}
        except Exception:
            row = {"case": name, "error": traceback.format_exc()}
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
