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
"""

import argparse
import json
import statistics
import subprocess
import sys
import time

import torch

from stepline.comm.mesh import World, build_mesh, start_process_group
from stepline.models.config import ModelConfig
from stepline.models.flops import flops_per_token, parameter_counts
from stepline.trainer.config import Config
from stepline.trainer.config_io import find_config, load_config, parse_overrides
from stepline.trainer.data.loader import Batch
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


def measure(
    shape: str, micro_batch: int, recompute: str, compiled: bool, device: torch.device, steps: int,
    overrides: list[str],
) -> dict:  # fmt: skip
    """One row: median step of `steps` after three that warm up."""
    seq_len, _, _, step_tokens = SHAPES[shape]
    config = shape_config(shape, overrides)
    config.precision.compute = "bf16" if device.type == "cuda" else "fp32"
    config.run.compile, config.run.recompute = compiled, recompute
    config.optimizer.weight_decay, config.parallel.micro_batch, config.data.seq_len = (
        0.1,
        micro_batch,
        seq_len,
    )
    config.budget.steps = steps + 3
    accumulation = max(1, step_tokens // (micro_batch * seq_len))
    mesh = build_mesh(device, 1, 1)
    state = Trainee.build(config, device, mesh)
    products, _ = choose_products(config, state.model, device, torch.distributed.group.WORLD)
    draw = torch.Generator().manual_seed(0)
    shape_of_batch = (accumulation, micro_batch, seq_len + 1)
    seconds = []
    for step in range(steps + 3):
        tokens = torch.randint(0, config.model.vocab_size, shape_of_batch, generator=draw)
        batch = Batch(tokens[..., :-1].contiguous(), tokens[..., 1:].contiguous(), None, {})
        start = time.perf_counter()
        state.sparsity.begin(step, watched=False)
        loss = train_step(state, batch, 1e-4).loss.item()  # reading the loss waits for the device
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        if step >= 3:
            seconds.append(time.perf_counter() - start)
    tokens_per_step = accumulation * micro_batch * seq_len
    rate = tokens_per_step / statistics.median(seconds)
    flops = flops_per_token(config.model, seq_len)
    peak = peak_flops(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
    return {
        "shape": shape,
        "params": parameter_counts(config.model).total,
        "seq_len": seq_len,
        "micro_batch": micro_batch,
        "recompute": recompute,
        "compile": compiled,
        "tokens_per_step": tokens_per_step,
        "tokens_per_second": round(rate),
        "tflops": round(rate * flops.total / 1e12, 3),
        "mfu": mfu(rate, flops.total, peak),
        "mfu_full": mfu(rate, flops.total_full, peak),
        "memory_gb": torch.cuda.max_memory_allocated(device) / 1e9 if device.type == "cuda" else None,
        "loss": loss,
        "overrides": overrides,
        "products": products,
    }


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
    parser.add_argument("--set", nargs="*", default=[], help="overrides of the config")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        sys.exit("error: no CUDA device; --device cpu --shape tiny tries the plumbing")
    if args.child:
        device = torch.device(args.device, 0) if args.device == "cuda" else torch.device("cpu")
        start_process_group(World(0, 1, 0, 1), device, 600)
        print(json.dumps(measure(
            args.shape[0], args.micro_batch[0], args.recompute[0], not args.no_compile, device, args.steps, args.set
        )))  # fmt: skip
        torch.distributed.destroy_process_group()
        return
    rows = []
    for shape in args.shape:
        for recompute in args.recompute or SHAPES[shape][2]:
            for micro_batch in args.micro_batch or SHAPES[shape][1]:
                command = [
                    sys.executable,
                    __file__,
                    "--child",
                    "--shape",
                    shape,
                    "--micro-batch",
                    str(micro_batch),
                ]
                command += ["--recompute", recompute, "--device", args.device, "--steps", str(args.steps)]
                command += ["--no-compile"] if args.no_compile else []
                command += ["--set", *args.set] if args.set else []
                child = subprocess.run(command, capture_output=True, text=True, check=False)
                if child.returncode == 0:
                    rows.append(json.loads(child.stdout.splitlines()[-1]))
                else:
                    reason = (child.stderr.strip().splitlines() or ["no output"])[-1]
                    rows.append(
                        {"shape": shape, "micro_batch": micro_batch, "recompute": recompute, "error": reason}
                    )
                if not args.json:
                    print(describe(rows[-1]), flush=True)
    if args.json:
        print(json.dumps({"torch": torch.__version__, "device": args.device, "rows": rows}))


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
