"""Tokens per second of a training step: a mixture of experts against the dense model of equal active parameters, and
grouped products against a loop over the experts.

Everything goes through the trainer's own step (AdamW); the variants take turns in one process, and medians are
compared. On CUDA bf16 with FSDP2 over one rank, on CPUs fp32.

NOT YET RUN ON A GPU (target there: at least 0.75 of the dense model's tokens per second).

    python benchmarks/moe_step.py [--rounds 8] [--steps 3] [--layers N] [--no-other] [--json]

--json: one object after each round, with the medians so far.
"""

import argparse
import contextlib
import statistics
import sys
import time
from collections.abc import Iterator
from unittest import mock

import torch
from children import emit

from stepline.comm.mesh import World, build_mesh, start_process_group
from stepline.kernels.grouped import grouped_mm_linear, loop_linear
from stepline.models import moe as moe_module
from stepline.models.config import ModelConfig
from stepline.models.flops import parameter_counts
from stepline.trainer.config import Config
from stepline.trainer.data.loader import Batch
from stepline.trainer.run.state import Trainee
from stepline.trainer.run.step import train_step

# device: (model, sequence, windows)
SHAPES = {
    "cpu": (
        {
            "vocab_size": 2048, "hidden_size": 256, "num_layers": 4, "num_heads": 4, "ffn_size": 256, "ffn": "moe",
            "moe": {"experts": 16, "top_k": 4},
        },
        256,
        8,
    ),
    "cuda": (
        {
            "vocab_size": 50304, "hidden_size": 2048, "num_layers": 8, "num_heads": 16, "ffn_size": 1024, "ffn": "moe",
            "qk_norm": True, "moe": {"experts": 64, "top_k": 8},
        },
        2048,
        8,
    ),
}  # fmt: skip
"""On CUDA OLMoE's layers, half as many."""
SMALL_GIB, SMALL_LAYERS = 100, 6
"""On a smaller device both models have so many layers: both are held at once, and with 8 they take 74 GiB."""


def dense_of(shape: dict) -> dict:
    """The dense model whose feed-forward layer is as wide as the experts that a token passes."""
    moe = shape["moe"]
    width = moe["top_k"] * shape["ffn_size"] + moe.get("shared_size", 0)
    return {k: v for k, v in shape.items() if k not in ("ffn", "moe")} | {"ffn_size": width}


@contextlib.contextmanager
def product(function) -> Iterator[None]:
    """Within it the experts' products are made by `function`."""
    with mock.patch.object(moe_module, "grouped_linear", function):
        yield


def trainee(shape: dict, device: torch.device) -> Trainee:
    config = Config(model=ModelConfig(**shape))
    config.precision.compute = "bf16" if device.type == "cuda" else "fp32"
    config.run.compile, config.optimizer.weight_decay = device.type == "cuda", 0.1
    return Trainee.build(config, device, build_mesh(device, 1, 1))


def shape_for(device: torch.device, layers: int | None) -> tuple[dict, int, int]:
    """Model, sequence and windows for a device; layers: instead of as many as its memory takes."""
    shape, seq_len, windows = SHAPES[device.type]
    if device.type == "cuda" and layers is None:
        small = torch.cuda.get_device_properties(device).total_memory < SMALL_GIB * 2**30
        layers = SMALL_LAYERS if small else None
    return shape | ({"num_layers": layers} if layers else {}), seq_len, windows


def measure(device: torch.device, args: argparse.Namespace) -> Iterator[dict]:
    """Medians of each variant's step so far, after each round but the first, which warms up."""
    shape, seq_len, windows = shape_for(device, args.layers)
    dense, mixture = trainee(dense_of(shape), device), trainee(shape, device)
    other = loop_linear if device.type == "cuda" else grouped_mm_linear
    variants = {"dense": (dense, contextlib.nullcontext), "mixture": (mixture, contextlib.nullcontext)}
    if not args.no_other:
        variants[f"mixture by {other.__name__}"] = (mixture, lambda: product(other))
    counts = {
        name: parameter_counts(ModelConfig(**s))
        for name, s in {"dense": dense_of(shape), "mixture": shape}.items()
    }
    of = torch.cuda.get_device_name() if device.type == "cuda" else f"{torch.get_num_threads()} CPU threads"
    told = {
        "device": of, "torch": torch.__version__, "layers": shape["num_layers"],
        "params": {name: c.linear for name, c in counts.items()},
        "active": {name: c.active for name, c in counts.items()},
    }  # fmt: skip
    draw = torch.Generator().manual_seed(0)
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for turn in range(-1, args.rounds):
        for name, (state, context) in variants.items():
            for _ in range(args.steps):
                tokens = torch.randint(0, shape["vocab_size"], (1, windows, seq_len + 1), generator=draw)
                batch = Batch(tokens[..., :-1].contiguous(), tokens[..., 1:].contiguous(), None, {})
                start = time.perf_counter()
                with context():
                    train_step(state, batch, 1e-4).loss.item()
                if device.type == "cuda":
                    torch.cuda.synchronize()
                spent = time.perf_counter() - start
                print(f"round {turn}, {name}: {spent:.2f} s", file=sys.stderr, flush=True)
                if turn >= 0:
                    seconds[name].append(spent)
        if turn >= 0:
            median = {name: statistics.median(values) for name, values in seconds.items()}
            yield told | {
                "rounds": turn + 1,
                "tokens_per_second": {
                    name: round(windows * seq_len / value) for name, value in median.items()
                },
                "to_dense": {name: round(median["dense"] / value, 3) for name, value in median.items()},
            }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--steps", type=int, default=3, help="steps of each variant in a round")
    parser.add_argument("--layers", type=int, help="of both models; default: by the device's memory")
    parser.add_argument("--no-other", action="store_true", help="the mixture by its usual products alone")
    parser.add_argument("--json", action="store_true", help="JSON objects on standard output")
    args = parser.parse_args()
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    start_process_group(World(0, 1, 0, 1), device, 60)
    for found in measure(device, args):
        result = found
        if args.json:
            emit(result)
    torch.distributed.destroy_process_group()
    if args.json:
        return
    print(f"{result['device']}, torch {result['torch']}, {result['layers']} layers")
    for name, tokens in result["tokens_per_second"].items():
        print(f"{name:32}{tokens:10,} tokens/s  {result['to_dense'][name]:.2f} of dense")
    print(", ".join(f"{n}: N {result['params'][n]:,}, active {a:,}" for n, a in result["active"].items()))


if __name__ == "__main__":
    main()
