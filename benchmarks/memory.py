"""The memory that `stepline train --dry-run` says a step needs, against the measured peak of the trainer's own step.

On CPUs the measure is the profiler's record of every allocation (trainer/watch/allocations.py), on CUDA
torch.cuda.max_memory_allocated, less what was allocated before the case. Each case runs three steps (forward, backward,
update) and takes the median of their peaks: they agree, but for buffers that gloo's threads have freed unseen, which
make a measured peak too large. Of two ranks the one that is farther off counts. A case passes within 10 %.

NOT YET RUN ON A GPU: with CUDA the same cases run there in bf16, those of two ranks where there are two GPUs.

    python benchmarks/memory.py [--case NAME …] [--json]

Exits with 1 when a case is outside. --json: one object of all cases so far after each.
"""

import argparse
import functools
import gc
import json
import os
import statistics
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from unittest import mock

import torch
import torch.distributed as dist
import torch.multiprocessing

from stepline.comm.mesh import build_mesh
from stepline.models.config import ModelConfig, MoEConfig, RevFFNConfig
from stepline.trainer.config import Config
from stepline.trainer.data.loader import Batch
from stepline.trainer.plan.memory import Layout, estimate
from stepline.trainer.run import build
from stepline.trainer.run.state import Trainee
from stepline.trainer.run.step import train_step
from stepline.trainer.watch.allocations import Allocations

TOLERANCE, STEPS = 0.1, 3
BLOCKS = {
    "vocab_size": 640, "hidden_size": 256, "num_layers": 6, "num_heads": 4, "num_kv_heads": 2, "ffn_size": 768,
}  # fmt: skip
"""Activations of the blocks are most of it."""
MIXTURE = {"ffn": "moe", "ffn_size": 256, "moe": MoEConfig(experts=12, top_k=3, shared_size=128)}
TWO = BLOCKS | {"num_layers": 2}
"""Parameters and what an update holds are most of it."""
REVERSIBLE = BLOCKS | {"blocks": "revffn"}
PUBLISHED = REVERSIBLE | {"coupling": "revffn", "revffn": RevFFNConfig(adapters=True)}
LOGITS = {"vocab_size": 16384, "hidden_size": 64, "num_layers": 2, "num_heads": 4, "ffn_size": 128}
"""Logits and embedding are most of it."""


@dataclass(frozen=True)
class Case:
    """One measurement."""

    name: str
    model: dict
    world: int = 1
    shard: int | None = None
    """Default: all ranks."""
    seq_len: int = 256
    micro_batch: int = 4
    accumulation: int = 1
    settings: dict[str, object] = field(default_factory=dict)
    """`section.key` of the config."""

    def config(self, device: str) -> Config:
        """The resolved config, as far as a step and its estimate read it."""
        config = Config(model=ModelConfig(**self.model))
        config.data.seq_len = self.seq_len
        config.run.device, config.run.compile = device, False
        config.precision.compute = "bf16" if device == "cuda" else "fp32"
        config.optimizer.weight_decay = 0.1
        config.parallel.shard, config.parallel.micro_batch = self.shard or self.world, self.micro_batch
        config.budget.steps = 1000
        for key, value in self.settings.items():
            *sections, name = key.split(".")
            setattr(functools.reduce(getattr, sections, config), name, value)
        return config

    def layout(self) -> Layout:
        """How it is spread."""
        return Layout(self.world, self.shard or self.world, self.micro_batch, self.accumulation)


MUON = {"optimizer.name": "muon"}
FULL, SELECTIVE = {"run.recompute": "full"}, {"run.recompute": "selective"}
MIXED = {"precision.compute": "bf16"}
S_STE, FP8 = {"sparse.mode": "s-ste"}, {"precision.fp8": True}
REDUCED = {"precision.reduce": "bf16"}
DEMO = {"parallel.sync": "demo"}
GRADIENTS = {"parallel.demo.accumulate": "gradients"}
DILOCO = {"parallel.sync": "diloco", "parallel.diloco.every": 1}
DEALT = {"parallel.experts": 2}
ALONE = {"optimizer.only": "adapters"}
GATHERED = {"parallel.reshard_after_forward": False}
CASES = [
    Case("blocks", BLOCKS),
    Case("blocks, qk-norm, tied", BLOCKS | {"qk_norm": True, "tied_embeddings": True}),
    Case("blocks, canon", BLOCKS | {"canon": "AC"}),
    Case("blocks, recompute selective", BLOCKS, settings=SELECTIVE),
    Case("blocks, recompute full", BLOCKS, settings=FULL),
    Case("blocks, accumulation 2", BLOCKS, accumulation=2),
    Case("blocks, confined attention", BLOCKS, settings={"data.confine_attention": True}),
    Case("blocks, compiled", BLOCKS | {"num_layers": 3}, settings={"run.compile": True}),
    Case("blocks, muon", BLOCKS, settings=MUON),
    Case("muon's update", BLOCKS, micro_batch=1, settings=MUON),
    Case("reversible", REVERSIBLE),
    Case("reversible, 24 blocks, qk-norm", REVERSIBLE | {"num_layers": 24, "qk_norm": True}),
    Case("reversible, canon", REVERSIBLE | {"canon": "AC"}),
    Case("reversible, anchors", REVERSIBLE | {"revffn": RevFFNConfig(anchor_every=1)}, micro_batch=16),
    Case("reversible, fp32 streams", REVERSIBLE | {"revffn": RevFFNConfig(streams="fp32")}),
    Case("reversible, adapters", REVERSIBLE | {"revffn": RevFFNConfig(adapters=True)}),
    Case("reversible, coupling revffn, adapters", PUBLISHED),
    Case("adapters alone", PUBLISHED, settings=ALONE),
    Case("adapters alone, parameters", PUBLISHED, micro_batch=1, settings=ALONE),
    Case("adapters alone, two ranks", PUBLISHED, world=2, settings=ALONE),
    Case("adapters alone, experts", PUBLISHED | MIXTURE, settings=ALONE),
    Case("reversible, experts", REVERSIBLE | MIXTURE),
    Case("reversible, confined attention", REVERSIBLE, settings={"data.confine_attention": True}),
    Case("reversible, compiled", REVERSIBLE | {"num_layers": 3}, settings={"run.compile": True}),
    Case("reversible, mixed precision", REVERSIBLE, settings=MIXED),
    Case("experts", BLOCKS | MIXTURE),
    Case("experts, recompute full, two ranks", BLOCKS | MIXTURE, world=2, settings=FULL),
    *(
        Case(f"experts dealt{name}", TWO | MIXTURE, world=2, seq_len=128, settings=DEALT | settings)
        for name, settings in {"": {}, ", recompute full": FULL, ", kept gathered": GATHERED}.items()
    ),
    Case("2:4", BLOCKS, settings=S_STE),
    Case("2:4, recompute full, weights", BLOCKS, micro_batch=1, settings=S_STE | FULL),
    Case("2:4, estimator", BLOCKS, settings=S_STE | {"sparse.grad_weight": "mvue"}),
    Case("2:4, fp8, estimator", TWO, seq_len=128, settings=S_STE | FP8 | {"sparse.grad_weight": "mvue"}),
    Case("2:4, experts, weights", BLOCKS | MIXTURE, micro_batch=1, settings=S_STE),
    Case("fp8", BLOCKS, settings=FP8),
    Case("fp8, recompute selective", TWO, seq_len=128, settings=FP8 | SELECTIVE),
    Case("fp8, scales of rows", BLOCKS, settings=FP8 | {"precision.fp8_scales": "row"}),
    Case("fp8, experts", BLOCKS | MIXTURE, settings=FP8),
    Case("2:4, fp8, mixed precision", BLOCKS | {"num_layers": 3}, settings=S_STE | FP8 | MIXED),
    Case("fsdp, 2:4, parameters", BLOCKS, world=2, micro_batch=1, settings=S_STE),
    Case("fsdp, 2:4, fp8", BLOCKS, world=2, settings=S_STE | FP8),
    Case("fsdp, 2:4, fp8, parameters", BLOCKS, world=2, micro_batch=1, settings=S_STE | FP8),
    Case("fsdp, 2:4, fp8, experts", BLOCKS | MIXTURE, world=2, settings=S_STE | FP8),
    Case("fsdp, 2:4, reversible", REVERSIBLE, world=2, settings=S_STE),
    Case("logits", LOGITS, micro_batch=8),
    Case("logits, tied, recompute full", LOGITS | {"tied_embeddings": True}, micro_batch=8, settings=FULL),
    Case("mixed precision", BLOCKS | {"num_layers": 3}, micro_batch=2, settings=MIXED),
    Case("mixed precision, logits", LOGITS, settings=MIXED),
    Case("fsdp", BLOCKS, world=2),
    Case("fsdp, reversible", REVERSIBLE, world=2),
    Case("fsdp, reversible, experts, mixed precision", REVERSIBLE | MIXTURE, world=2, settings=MIXED),
    Case("fsdp, parameters", BLOCKS, world=2, micro_batch=1),
    Case(
        "fsdp, recompute full, accumulation 2, bf16 sums", BLOCKS, 2, accumulation=2, settings=FULL | REDUCED
    ),
    Case("fsdp, kept gathered", BLOCKS, world=2, micro_batch=1, settings=GATHERED),
    Case("fsdp, kept gathered, one group", BLOCKS | {"num_layers": 3}, world=2, settings=GATHERED),
    Case("fsdp, recompute selective", BLOCKS, world=2, settings=SELECTIVE),
    Case("fsdp, recompute full, accumulation 2", BLOCKS, world=2, accumulation=2, settings=FULL),
    Case("fsdp, muon, accumulation 2", BLOCKS, world=2, accumulation=2, settings=MUON),
    Case("fsdp, muon's update", BLOCKS, world=2, micro_batch=1, settings=MUON),
    Case("fsdp, logits", LOGITS, world=2, micro_batch=8),
    Case("fsdp, logits, kept gathered", LOGITS, world=2, micro_batch=8, settings=GATHERED),
    Case("fsdp, mixed precision", BLOCKS | {"num_layers": 3}, world=2, micro_batch=2, settings=MIXED),
    Case("hsdp 2 x 1, accumulation 2", BLOCKS, world=2, shard=1, micro_batch=1, accumulation=2),
    *(
        Case(name, BLOCKS, world=2, shard=1, micro_batch=1, settings=settings)
        for name, settings in {
            "demo": DEMO,
            "demo, a step late": DEMO | {"parallel.demo.delay": 1},
            "demo on gradients": DEMO | GRADIENTS,
            "demo on gradients, muon": DEMO | GRADIENTS | {"parallel.demo.phi": "muon"},
            "diloco": DILOCO,
            "diloco, int8": DILOCO | {"parallel.diloco.codec": "int8"},
            "random-k": {"parallel.sync": "random_k"},
        }.items()
    ),
    *(
        Case(name, model, world=2, shard=1, micro_batch=1, settings=settings)
        for name, model, settings in (
            ("demo, logits", LOGITS, DEMO),
            ("demo, half of each chunk", TWO, DEMO | {"parallel.demo.kept": 512}),
            (
                "demo, half of each chunk, owners",
                TWO,
                DEMO | {"parallel.demo.kept": 512, "parallel.demo.owner_reduce_above": 1},
            ),
            ("demo, half as fp32", TWO, DEMO | {"parallel.demo.density": 0.5, "parallel.demo.codec": "fp32"}),
            ("demo, faithful", TWO, DEMO | {"parallel.demo.faithful": True}),
            ("random-k, half", TWO, {"parallel.sync": "random_k", "parallel.random_k.density": 0.5}),
        )
    ),
    Case("demo, one replica of two shards", BLOCKS, world=2, micro_batch=1, settings=DEMO),
]


def measure(case: Case, device: torch.device) -> dict:
    """Estimated and measured peak in bytes, of this rank. The process group of `case.world` ranks is there."""
    config, layout = case.config(device.type), case.layout()
    mesh = build_mesh(device, layout.world, layout.shard)
    others = torch.cuda.memory_allocated(device) if device.type == "cuda" else 0
    record = Allocations() if device.type == "cpu" else None
    if record is not None:
        record.start()
    # what is frozen takes the same memory wherever its values come from
    with mock.patch.multiple(
        build, check_adapters=lambda config: None, load_frozen=lambda model, config: None
    ):
        state = Trainee.build(config, device, mesh)
    draw = torch.Generator().manual_seed(dist.get_rank())
    shape = (layout.accumulation, layout.micro_batch, case.seq_len)
    peaks = []
    for step in range(STEPS):
        tokens, targets = torch.randint(0, config.model.vocab_size, (2, *shape), generator=draw)
        documents = torch.zeros(shape, dtype=torch.int32) if config.data.confine_attention else None
        batch = Batch(tokens, targets, documents, {})
        if record is not None:
            with record.region(f"step {step}"):
                state.sparsity.begin(step, watched=False)
                train_step(state, batch, 1e-4)
            continue
        torch.cuda.reset_peak_memory_stats(device)
        state.sparsity.begin(step, watched=False)
        train_step(state, batch, 1e-4)
        torch.cuda.synchronize(device)
        peaks.append(torch.cuda.max_memory_allocated(device) - others)
    if record is not None:
        record.stop()
        peaks = [record.peak(f"step {step}") for step in range(STEPS)]
    memory = estimate(config, layout)
    measured = int(statistics.median(peaks))
    return {
        "case": case.name,
        "ranks": case.world,
        "estimate": memory.total,
        "measured": measured,
        "ratio": memory.total / measured,
        "moment": memory.moment,
        "parts": memory.parts,
    }


def summary(rows: list[dict], device_type: str) -> dict:
    """What --json prints."""
    outside = [row["case"] for row in rows if abs(row["ratio"] - 1) > TOLERANCE]
    return {"torch": torch.__version__, "device": device_type, "outside": outside, "rows": rows}


def _rank(
    rank: int, world: int, folder: str, cases: list[Case], device_type: str, before: list[dict], tell: bool
) -> None:
    torch.set_num_threads(1)
    device = torch.device(device_type, *([rank] if device_type == "cuda" else []))
    backend = "gloo"
    if device_type == "cuda":
        torch.cuda.set_device(device)
        backend = "cpu:gloo,cuda:nccl"
    dist.init_process_group(backend, init_method=f"file://{folder}/store", rank=rank, world_size=world)
    rows = list(before)
    for case in cases:
        row = measure(case, device)
        of_ranks: list = [None] * world
        dist.all_gather_object(of_ranks, row)
        if device_type == "cuda":  # what lies in cycles goes before the next case
            gc.collect()
            torch.cuda.empty_cache()
        rows.append(max(of_ranks, key=lambda row: abs(row["ratio"] - 1)))
        if rank == 0:
            print(f"{case.name}: {rows[-1]['ratio']:.3f}", file=sys.stderr, flush=True)
        if rank == 0 and tell:
            print(json.dumps(summary(rows, device_type)), flush=True)
    if rank == 0:
        Path(folder, "rows.json").write_text(json.dumps(rows))
    dist.destroy_process_group()


def run(cases: list[Case], device_type: str, tell: bool = False) -> list[dict]:
    """The rows of all cases, each number of ranks in processes of its own. tell: prints JSON after each."""
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    rows: list[dict] = []
    for world in sorted({case.world for case in cases}):
        mine = [case for case in cases if case.world == world]
        if device_type == "cuda" and world > torch.cuda.device_count():
            print(f"{len(mine)} cases need {world} GPUs: left out", file=sys.stderr)
            continue
        with tempfile.TemporaryDirectory() as folder:
            arguments = (world, folder, mine, device_type, rows, tell)
            torch.multiprocessing.spawn(_rank, arguments, nprocs=world)
            rows = json.loads(Path(folder, "rows.json").read_text())
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--case", choices=[case.name for case in CASES], action="append", help="default: all")
    parser.add_argument("--json", action="store_true", help="JSON objects on standard output")
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    rows = run([case for case in CASES if not args.case or case.name in args.case], device, args.json)
    outside = summary(rows, device)["outside"]
    if args.json:
        print(json.dumps(summary(rows, device)))
    else:
        print(f"torch {torch.__version__}, {device}")
        print(
            f"{'case':38}{'ranks':>6}{'estimate, MB':>14}{'measured, MB':>14}{'ratio':>8}  peak in the estimate"
        )
        for row in rows:
            sizes = f"{row['estimate'] / 1e6:14.2f}{row['measured'] / 1e6:14.2f}{row['ratio']:8.3f}"
            print(f"{row['case']:38}{row['ranks']:6}{sizes}  {row['moment']}")
    if outside:
        print(f"error: more than {TOLERANCE:.0%} off: {', '.join(outside)}", file=sys.stderr)
    return 1 if outside else 0


if __name__ == "__main__":
    sys.exit(main())
