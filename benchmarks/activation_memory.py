"""Activation memory against depth, and step time, of reversible blocks and of standard ones.

Memory: a fresh process for each cell, with the trainer's own `build_model` and `accumulate`. A first step leaves the
gradients allocated; of a second, bytes over those that lived before its forward are activations: what autograd keeps,
gradients of activations, temporaries of kernels, and one weight's gradient on its way into the allocated one. On CPUs
the profiler's record of every allocation is read, on CUDA torch's allocator. What each reversible mixture keeps to
repeat its routing, tokens x top_k x 8 bytes a layer, is told apart. Reversible gradients are compared, bit by bit, with
those of the same model by stored activations.

Step time: `train_step` of all variants in turn in one process, medians. The two-stream model under full recompute is
there too. The reversible and the standard model have equal weights and FLOPs (blocks within .5 %), by one of two pairs:

    width    equal hidden width d; layers read and write d / 2 and are twice as wide inside (memory, times)
    layers   the same layers of width d; two streams of d each, so embedding and head are doubled (times; --pair)

In bf16 (the default on CUDA) FSDP2 on one rank casts the weights block by block: the copies of two blocks and a
buffer of reductions are then in the peak, at every depth alike.

NOT YET RUN ON A GPU.

    python benchmarks/activation_memory.py [--depth N …] [--ffn dense|moe …] [--pair width|layers] [--compile]
        [--no-early-stop] [--no-time] [--json]

Writes runs/activation_memory/result.json, prints tables, and draws benchmarks/plots/activation_memory.png where all
depths of pair width are there. --json prints one object of all cells and times so far after each, and no tables.
"""

import argparse
import functools
import json
import os
import statistics
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from unittest import mock

import torch
import torch.distributed as dist
from activation_tables import DRAWN, TIMED, VARIANTS, Variant, plot, show
from children import call, emit, last_object, reason
from torch.utils.checkpoint import set_checkpoint_early_stop

from stepline.comm.mesh import build_mesh
from stepline.models import transformer
from stepline.models.config import ModelConfig
from stepline.models.flops import flops_per_token, parameter_counts
from stepline.models.revffn import run_reversible
from stepline.trainer.config import Config
from stepline.trainer.data.loader import Batch
from stepline.trainer.run.build import build_model
from stepline.trainer.run.malloc import keep_freed_memory
from stepline.trainer.run.state import Trainee
from stepline.trainer.run.step import accumulate, train_step
from stepline.trainer.watch.allocations import Allocations

ROOT = Path(__file__).resolve().parent
PAIRS = ("width", "layers")
DEPTHS, VOCAB, SEQ = (8, 16, 32, 64), 512, 256
EXPERTS, TOP_K, TIME_DEPTH = 8, 2, 8
SIDE_BY_SIDE = {"cpu": 2, "cuda": 4}
"""Cells at once: each process counts its own memory."""


def shape(blocks: str, ffn: str, layers: int, width: int, pair: str) -> ModelConfig:
    """Of pair width: with attention of width a on both sides, and inner widths f of standard blocks, f' of reversible,

        4 d a + 3 d f = 4 (d / 2) a + 3 (d / 2) f'    where    f' = 2 f + 4 a / 3

    so of a mixture the experts are doubled and the shared expert, which all tokens pass, takes the 4 a / 3.
    """
    heads, head_dim, reversible = width // 32, 24, blocks == "revffn"
    inner, more = width * 11 // 4 if ffn == "dense" else width * 3 // 4, 0
    if reversible and pair == "width":
        inner, more = 2 * inner, heads * head_dim * 4 // 3
    hidden = 2 * width if reversible and pair == "layers" else width
    mixture = {"experts": EXPERTS, "top_k": TOP_K, "shared_size": inner + more}
    return ModelConfig(
        vocab_size=VOCAB, hidden_size=hidden, num_layers=layers, num_heads=heads, head_dim=head_dim, blocks=blocks,
        ffn=ffn, ffn_size=inner if ffn == "moe" else inner + more, **({"moe": mixture} if ffn == "moe" else {}),
    )  # fmt: skip


def settled(variant: Variant, args: argparse.Namespace, ffn: str, layers: int) -> Config:
    """The config as far as a step reads it."""
    config = Config(model=shape(variant.blocks, ffn, layers, args.width, args.pair))
    config.model.revffn.anchor_every = variant.anchor_every
    config.data.seq_len = SEQ
    config.run.device, config.run.compile = args.device, args.compile
    config.run.recompute, config.precision.compute = variant.recompute, args.compute
    config.parallel.shard, config.parallel.reshard_after_forward = 1, True
    config.optimizer.weight_decay, config.budget.steps = 0.1, 1000
    return config


def device_of(args: argparse.Namespace) -> torch.device:
    """With its index, which process groups ask for."""
    return torch.device("cuda", 0) if args.device == "cuda" else torch.device(args.device)


def backward_of(variant: Variant) -> mock._patch:
    """Within it `Transformer` runs its reversible blocks as the variant says."""
    run = functools.partial(run_reversible, stored=variant.stored)
    return mock.patch.object(transformer, "run_reversible", run)


def draw_batch(args: argparse.Namespace, seed: int) -> Batch:
    """One micro-batch of random tokens, `[1, tokens / SEQ, SEQ]`."""
    generator = torch.Generator().manual_seed(seed)
    tokens, targets = torch.randint(0, VOCAB, (2, 1, args.tokens // SEQ, SEQ), generator=generator)
    return Batch(tokens, targets, None, {})


def measure(args: argparse.Namespace, name: str, ffn: str, layers: int) -> dict:
    """One cell, in bytes."""
    device, variant = device_of(args), VARIANTS[name]
    config = settled(variant, args, ffn, layers)
    record = None if args.device == "cuda" else Allocations()
    if record is not None:
        record.start()  # before what it is to know of
    model = build_model(config, device, build_mesh(device, 1, 1))
    step = functools.partial(accumulate, model, device=device, z_weight=0.0)
    live = {}

    def mark(moment: str) -> None:
        if record is None:
            live[moment] = torch.cuda.memory_allocated(device)
            return
        with record.region(moment):
            torch.empty(1)  # the record is of changes

    with backward_of(variant):
        step(draw_batch(args, 0))
        handle = model.register_forward_hook(lambda *_: mark("forward"))
        batch = draw_batch(args, 1)
        mark("before")
        if record is None:
            torch.cuda.reset_peak_memory_stats(device)
            step(batch)
            live["peak"] = torch.cuda.max_memory_allocated(device)
        else:
            with record.region("peak"):
                step(batch)
            record.stop()
            live = {moment: record.peak(moment) for moment in ("before", "forward", "peak")}
        handle.remove()
    counts = parameter_counts(config.model)
    kept_ids = 8 * args.tokens * TOP_K * layers if ffn == "moe" and variant.blocks == "revffn" else 0
    cell = {
        "variant": name, "ffn": ffn, "depth": layers, "weights": counts.linear, "active": counts.active,
        "flops": flops_per_token(config.model, SEQ).total, "activations": live["peak"] - live["before"],
        "after_forward": live["forward"] - live["before"], "routing_ids": 0 if variant.stored else kept_ids,
    }  # fmt: skip
    if variant.blocks == "revffn" and not variant.stored:
        cell["bit_equal"] = bit_equal(model, step, batch)
    return cell


def bit_equal(model: torch.nn.Module, step: functools.partial, batch: Batch) -> bool:
    """Whether backward by reconstruction and by stored activations give the same gradients.

    On CUDA by kernels that add in a fixed order, where there are some: attention's usual backward does not.
    """
    gradients = []
    # told to warn only, attention would stay as it is
    torch.use_deterministic_algorithms(next(model.parameters()).is_cuda)
    try:
        for stored in (False, True):
            model.zero_grad()
            with backward_of(Variant("revffn", stored=stored)):
                step(batch)
            gradients.append([p.grad for p in model.parameters()])
    finally:
        torch.use_deterministic_algorithms(False)
    return all(torch.equal(*pair) for pair in zip(*gradients, strict=True))


def time_steps(args: argparse.Namespace, ffn: str, layers: int) -> dict:
    """Seconds of a step, wall and of this process's CPUs: medians, and the median of RevFFN over each in its round."""
    device = device_of(args)
    if device.type == "cpu":
        keep_freed_memory()  # as `stepline train` does
    mesh = build_mesh(device, 1, 1)
    configs = {name: settled(VARIANTS[name], args, ffn, layers) for name in TIMED}
    states = {name: Trainee.build(config, device, mesh) for name, config in configs.items()}
    times = {name: [] for name in TIMED}
    for round_ in range(args.rounds + 2):
        batch = draw_batch(args, round_)
        for name in TIMED if round_ % 2 else TIMED[::-1]:
            with backward_of(VARIANTS[name]):
                wall, cpu = time.perf_counter(), time.process_time()
                train_step(states[name], batch, 1e-4)
                if args.device == "cuda":
                    torch.cuda.synchronize(device)
                times[name].append((time.perf_counter() - wall, time.process_time() - cpu))
    result = {"ffn": ffn, "depth": layers, "pair": args.pair, "width": args.width, "rounds": args.rounds}
    for i, clock in enumerate(("wall", "cpu")):
        of = {name: [pair[i] for pair in pairs[2:]] for name, pairs in times.items()}
        result[clock] = {name: statistics.median(seconds) for name, seconds in of.items()}
        over = ([a / b for a, b in zip(of["RevFFN"], of[name], strict=True)] for name in TIMED)
        result[f"{clock}_over"] = dict(zip(TIMED, map(statistics.median, over), strict=True))
    return result


def child(args: argparse.Namespace) -> None:
    """A cell or the step times in this process; one JSON line."""
    torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory() as folder:
        backend = "cpu:gloo,cuda:nccl" if args.device == "cuda" else "gloo"
        dist.init_process_group(backend, init_method=f"file://{folder}/store", rank=0, world_size=1)
        if args.device == "cuda":
            torch.cuda.set_device(0)
        name, ffn, depth = json.loads(args.cell)
        if name != "time":  # for equal bits, read before the first product
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        with set_checkpoint_early_stop(not args.no_early_stop):
            found = time_steps(args, ffn, depth) if name == "time" else measure(args, name, ffn, depth)
        print(json.dumps(found))
        dist.destroy_process_group()


def in_process(*cell: object, **options: object) -> dict:
    """The cell in a fresh process with this one's arguments, `options` in their place; `error`: why it failed."""
    more = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    command = [sys.executable, __file__, *sys.argv[1:], *more, "--cell", json.dumps(cell)]
    done = call(command)
    result = last_object(done.stdout)
    if done.code or not result:
        result = {"error": reason(done.stderr) or f"exit code {done.code} without a word", "cell": cell}
    said = result.get("activations", result.get("wall", result.get("error")))
    print(cell, said, file=sys.stderr, flush=True)
    return result


def main() -> None:
    cuda = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--depth", type=int, nargs="+", default=DEPTHS)
    parser.add_argument("--ffn", nargs="+", choices=["dense", "moe"], default=["dense", "moe"])
    parser.add_argument("--pair", choices=PAIRS, default="width")
    parser.add_argument("--all", action="store_true", help="the two-stream model under full recompute too")
    parser.add_argument("--variant", nargs="+", choices=list(VARIANTS), help="default: all but that one")
    parser.add_argument("--width", type=int, default=128, help="a multiple of 32")
    parser.add_argument("--tokens", type=int, default=1024, help=f"a multiple of {SEQ}")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if cuda else "cpu")
    parser.add_argument("--compute", choices=["fp32", "bf16"], default="bf16" if cuda else "fp32")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--compile", action="store_true", help="blocks by torch.compile, as on CUDA")
    parser.add_argument(
        "--no-early-stop", action="store_true", help="recompute makes a block's last product too"
    )
    parser.add_argument("--no-time", action="store_true")
    parser.add_argument("--time-width", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--json", action="store_true", help="in the tables' place")
    parser.add_argument("--cell", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.cell:
        child(args)
        return
    names = args.variant or (list(VARIANTS) if args.all else DRAWN)
    asked = [(name, ffn, depth) for ffn in args.ffn for depth in args.depth for name in names]
    cells, times, failures = [], [], []
    result = {"torch": torch.__version__, "device": args.device, "compute": args.compute, "tokens": args.tokens,
              "width": args.width, "pair": args.pair, "cells": cells, "times": times, "failures": failures}  # fmt: skip
    out = ROOT.parent / "runs/activation_memory/result.json"
    out.parent.mkdir(parents=True, exist_ok=True)

    def keep(row: dict, rows: list[dict]) -> None:
        (failures if "error" in row else rows).append(row)
        out.write_text(json.dumps(result, indent=1))
        if args.json:
            emit(result)

    with ThreadPoolExecutor(SIDE_BY_SIDE[args.device]) as pool:
        for row in pool.map(lambda cell: in_process(*cell), asked):
            keep(row, cells)
    asked = [] if args.no_time else [(ffn, pair) for ffn in args.ffn for pair in PAIRS]
    for ffn, pair in asked:
        keep(in_process("time", ffn, TIME_DEPTH, width=args.time_width, pair=pair), times)
    if failures:
        sys.exit(f"error: {len(failures)} cells or times failed, the first with: {failures[0]['error']}")
    if args.json:
        return
    show(cells, times, TIMED)
    if args.pair == "width" and tuple(args.depth) == DEPTHS and len(args.ffn) == 2 and not args.variant:
        plot(cells, DRAWN, ROOT / "plots/activation_memory.png")


if __name__ == "__main__":
    main()
