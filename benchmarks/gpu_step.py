"""Tokens per second, MFU and memory of the trainer's own step on one GPU: 125M, 1.3B and 8B-shaped models.

NOT YET RUN ON A GPU: written for torch >= 2.11 with CUDA 13 on one H200 (targets: 1.3B >= 55 % MFU; 8B with full
recompute, fp32 master weights and >= 64k tokens a step >= 9,800 tokens/s). Its plumbing is tested on CPUs with
`--device cpu --shape tiny`.

Everything goes through `build_model` and `train_step`: FSDP2 over a mesh of one rank keeps fp32 parameters, gradients
and AdamW state and computes in bf16. The data are random tokens: the loss means nothing, the speed does. MFU counts
the model's FLOPs with causal attention (models/flops.py) over the device's known peak (trainer/watch/peaks.py); with
`mfu_full` attention is counted whole, as most others do. Each shape runs in a process of its own.

    python benchmarks/gpu_step.py [--shape 1b] [--micro-batch 4 8] [--recompute none full] [--no-compile] [--json]
                                  [--set precision.fp8=true sparse.mode=s-ste]

--json: one object of all rows so far after each timed step, so that the last line holds when a limit ends it.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable

import torch
from children import call, emit, last_object, reason

from stepline.comm.mesh import World, build_mesh, start_process_group
from stepline.models.config import ModelConfig
from stepline.models.flops import flops_per_token, parameter_counts
from stepline.trainer.config import Config
from stepline.trainer.config_io import find_config, load_config
from stepline.trainer.config_yaml import parse_overrides
from stepline.trainer.data.loader import Batch
from stepline.trainer.plan.memory import Layout, estimate
from stepline.trainer.run.products import choose_products
from stepline.trainer.run.state import Trainee
from stepline.trainer.run.step import train_step
from stepline.trainer.watch.peaks import mfu, peak_flops

# shape: (sequence, micro-batches that are tried, recompute modes that are tried, tokens of a step)
SHAPES = {
    "125m": (1024, (32, 64), ("none",), 65_536),
    "1b": (2048, (4, 8, 16), ("none", "selective"), 65_536),
    "8b": (4096, (1, 2, 4), ("full",), 65_536),
    "tiny": (64, (2,), ("none", "full"), 512),
}


def shape_config(shape: str, overrides: list[str]) -> Config:
    """The shipped config of a shape, or a tiny one."""
    if shape == "tiny":
        tiny = Config(
            model=ModelConfig(vocab_size=256, hidden_size=64, num_layers=2, num_heads=4, ffn_size=128)
        )
        for key, value in parse_overrides(overrides).items():
            section, name = key.split(".")
            setattr(getattr(tiny, section), name, value)
        return tiny
    return load_config(str(find_config(f"dense-{shape}")), overrides)[0]


def measure(args: argparse.Namespace, device: torch.device, told: Callable[[dict], None]) -> None:
    """Tells the row of the first shape, micro-batch and recompute mode after each timed step: the median so far."""
    begun = time.perf_counter()
    shape, micro_batch, recompute = args.shape[0], args.micro_batch[0], args.recompute[0]
    seq_len, _, _, step_tokens = SHAPES[shape]
    cuda = device.type == "cuda"
    config = shape_config(shape, args.set)
    config.precision.compute, config.run.device = "bf16" if cuda else "fp32", device.type
    config.run.compile, config.run.recompute = not args.no_compile, recompute
    config.optimizer.weight_decay, config.budget.steps = 0.1, args.warm_up + args.steps
    config.parallel.micro_batch, config.data.seq_len = micro_batch, seq_len
    accumulation = max(1, step_tokens // (micro_batch * seq_len))
    state = Trainee.build(config, device, build_mesh(device, 1, 1))
    products, _ = choose_products(config, state.model, device, torch.distributed.group.WORLD)
    if cuda:
        torch.cuda.synchronize(device)
    set_up = time.perf_counter() - begun
    flops, peak = flops_per_token(config.model, seq_len), None
    if cuda:
        peak = peak_flops(torch.cuda.get_device_name(device))
    tokens_per_step = accumulation * micro_batch * seq_len
    row = {
        "shape": shape, "params": parameter_counts(config.model).total, "layers": config.model.num_layers,
        "seq_len": seq_len, "micro_batch": micro_batch, "recompute": recompute, "compile": config.run.compile,
        "tokens_per_step": tokens_per_step, "overrides": args.set, "products": products,
        "cudnn": torch.backends.cudnn.version(), "set_up_s": round(set_up, 1),
        "estimate_gb": estimate(config, Layout(1, 1, micro_batch, accumulation)).total / 1e9,
    }  # fmt: skip
    draw, seconds = torch.Generator().manual_seed(0), []
    for step in range(args.warm_up + args.steps):
        tokens = torch.randint(
            0, config.model.vocab_size, (accumulation, micro_batch, seq_len + 1), generator=draw
        )
        batch = Batch(tokens[..., :-1].contiguous(), tokens[..., 1:].contiguous(), None, {})
        start = time.perf_counter()
        state.sparsity.begin(step, watched=False)
        loss = train_step(state, batch, 1e-4).loss.item()  # reading the loss waits for the device
        if cuda:
            torch.cuda.synchronize(device)
        spent = time.perf_counter() - start
        print(f"set up in {set_up:.1f} s, step {step}: {spent:.2f} s", file=sys.stderr, flush=True)
        if step == 0:
            row["first_step_s"] = round(spent, 2)  # with what is compiled
        if step < args.warm_up:
            continue
        seconds.append(spent)
        rate = tokens_per_step / statistics.median(seconds)
        told(row | {
            "steps": len(seconds), "tokens_per_second": round(rate), "tflops": round(rate * flops.total / 1e12, 3),
            "mfu": mfu(rate, flops.total, peak), "mfu_full": mfu(rate, flops.total_full, peak),
            "memory_gb": torch.cuda.max_memory_allocated(device) / 1e9 if cuda else None,
            "alloc_retries": torch.cuda.memory_stats(device)["num_alloc_retries"] if cuda else None, "loss": loss,
        })  # fmt: skip


def main() -> None:
    """One child process per row, so that a row that runs out of memory ends alone."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", nargs="*", choices=SHAPES, default=["125m", "1b", "8b"])
    parser.add_argument("--micro-batch", nargs="*", type=int)
    parser.add_argument("--recompute", nargs="*", choices=["none", "selective", "full"])
    parser.add_argument("--no-compile", action="store_true")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--warm-up", type=int, default=3, help="steps before those that are timed")
    parser.add_argument("--set", nargs="*", default=[], help="overrides of the config")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        sys.exit("error: no CUDA device; --device cpu --shape tiny tries the plumbing")
    if args.child:
        device = torch.device(args.device, 0) if args.device == "cuda" else torch.device("cpu")
        start_process_group(World(0, 1, 0, 1), device, 600)
        measure(args, device, emit)
        torch.distributed.destroy_process_group()
        return
    rows: list[dict] = []

    def tell(row: dict | None = None) -> None:
        if args.json:
            more = [] if row is None else [row]
            emit({"torch": torch.__version__, "device": args.device, "rows": rows + more})

    def tell_line(line: str) -> None:
        if row := last_object(line):
            tell(row)

    common = ["--device", args.device, "--steps", str(args.steps), "--warm-up", str(args.warm_up)]
    common += ["--no-compile"] if args.no_compile else []
    common += ["--set", *args.set] if args.set else []
    for shape in args.shape:
        for recompute in args.recompute or SHAPES[shape][2]:
            for micro_batch in args.micro_batch or SHAPES[shape][1]:
                command = [sys.executable, __file__, "--child", "--shape", shape, "--recompute", recompute]
                command += ["--micro-batch", str(micro_batch), *common]
                child = call(command, tell_line)
                row = {"shape": shape, "micro_batch": micro_batch, "recompute": recompute}
                row = last_object(child.stdout) or row | {"overrides": args.set}
                if child.code:
                    row["error"] = reason(child.stderr) or f"exit code {child.code} without a word"
                rows.append(row)
                tell()
                if not args.json:
                    print(describe(row), flush=True)


def describe(row: dict) -> str:
    """One line of the table."""
    start = f"{row['shape']:5} micro-batch {row['micro_batch']:3} recompute {row['recompute']:9}"
    if "error" in row:
        return f"{start} failed: {row['error'][:120]}"
    used = (
        f"MFU {row['mfu']:.1%} (full attention {row['mfu_full']:.1%})"
        if row["mfu"]
        else f"{row['tflops']} TFLOP/s"
    )
    memory = f"{row['memory_gb']:.1f} GB" if row["memory_gb"] else ""
    return f"{start} {row['tokens_per_second']:>9,} tokens/s  {used}  {memory}"


if __name__ == "__main__":
    main()
