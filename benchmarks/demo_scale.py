"""What a rank receives in a step, and how long its step takes, as replicas are added.

    python benchmarks/demo_scale.py [--output DIR] [--steps 20]

Bytes for 2 to 512 replicas are counted from the packets' sizes (trainer/plan/sync_cost.py); for 2, 4 and 8 they are
what the real synchronisers declare on as many gloo processes of one thread each, and must be the same. A step is timed
there between barriers, on gradients that are there already: encode, exchange over loopback, decode and update (of
DiLoCo one that exchanges). With more processes than cores its wall-clock time is that of the crowd, hence the CPU time
of one rank beside it.

DIR gets demo_scale.json, demo_scale.md (tables) and demo_scale.png.
"""

import argparse
import json
import os
import platform
import socket
import statistics
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing

from stepline.comm.mesh import build_mesh
from stepline.models.flops import parameter_counts
from stepline.models.transformer import Transformer
from stepline.trainer.config import Config
from stepline.trainer.config_io import load_config
from stepline.trainer.plan.sync_cost import Exchange, SyncBytes
from stepline.trainer.run.synchronize import build_synchronizer

SMALL = {
    "vocab_size": 2048, "hidden_size": 192, "num_layers": 6, "num_heads": 6, "ffn_size": 512, "qk_norm": True,
}  # fmt: skip
"""3.4M parameters: the model that benchmarks/slow_link.py times."""
LARGE = "dense-1b"
REPLICAS = tuple(2**i for i in range(1, 10))
MEASURED = (2, 4, 8)
EVERY = 50
METHODS = {
    "all-reduce bf16": {"precision": {"reduce": "bf16"}},
    "DeMo, all-gather": {"parallel": {"sync": "demo", "demo": {"owner_reduce_above": 10**6}}},
    "DeMo, owners reduce": {"parallel": {"sync": "demo", "demo": {"owner_reduce_above": 1}}},
    f"DiLoCo int8, H = {EVERY}": {
        "parallel": {"sync": "diloco", "diloco": {"every": EVERY, "codec": "int8"}}
    },
}
MBIT = 100


def config_of(method: str, model: dict) -> Config:
    """A settled config of one method."""
    config = Config(
        model=model,
        budget={"steps": 10**6, "batch_tokens": 4096},
        optimizer={"lr": 1e-3, "weight_decay": 0.1},
        **METHODS[method],
    )
    config.run.device, config.run.compile, config.precision.compute = "cpu", False, "fp32"
    return config


def exchange_of(method: str, model: dict, replicas: int, replica: int = -1) -> Exchange:
    """What a rank that holds a whole replica exchanges in a step, counted."""
    config = config_of(method, model)
    mine = SyncBytes(config, 1, replicas, replica=replica)
    return mine.all_reduce(2) if method == "all-reduce bf16" else getattr(mine, config.parallel.sync)()


def measure(rank: int, world: int, port: int, steps: int, path: str) -> None:
    """One of `world` replicas; rank 0 writes {method: {sent, received, wall_s, cpu_s}}, lists by rank."""
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), GLOO_SOCKET_IFNAME="lo")
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=world)
    mesh = build_mesh(torch.device("cpu"), world, 1)
    found = {}
    for method in METHODS:
        config = config_of(method, SMALL)
        config.parallel.diloco.every = 1  # every step exchanges
        torch.manual_seed(0)
        named = dict(Transformer(config.model).named_parameters())
        synchronizer = build_synchronizer(config, named, mesh)
        torch.manual_seed(rank + 1)
        mine: dict[str, list[float]] = {"sent": [], "received": [], "wall_s": [], "cpu_s": []}
        for step in range(steps + 2):
            for parameter in named.values():
                parameter.grad = torch.randn_like(parameter)
            dist.barrier()
            wall, cpu = time.perf_counter(), time.process_time()
            if method == "all-reduce bf16":  # the rest is in the backward of HSDP, here one message
                flat = torch.cat([p.grad.view(-1) for p in named.values()]).bfloat16()
                dist.all_reduce(flat)
                for p, part in zip(
                    named.values(), flat.split([p.numel() for p in named.values()]), strict=True
                ):
                    p.grad.copy_(part.view_as(p))
            result = synchronizer.step(1e-3)
            if step >= 2:  # the first ones open connections
                mine["wall_s"].append(time.perf_counter() - wall)
                mine["cpu_s"].append(time.process_time() - cpu)
                mine["sent"].append(result.bytes_sent)
                mine["received"].append(result.bytes_received)
        share = EVERY if "DiLoCo" in method else 1
        row = {key: statistics.median(values) for key, values in mine.items()}
        row |= {key: statistics.mean(mine[key]) / share for key in ("sent", "received")}
        every: list[dict] = [{}] * world
        dist.all_gather_object(every, row)
        found[method] = {key: [r[key] for r in every] for key in row}
    if rank == 0:
        Path(path).write_text(json.dumps(found))
    dist.destroy_process_group()


def run(output: Path, steps: int) -> dict:
    """Counts and measures; demo_scale.json."""
    large = load_config(LARGE, [])[0].model.model_dump()
    shapes = {"small": SMALL, "large": large}
    found: dict = {"replicas": list(REPLICAS), "measured": {}, "machine": machine()}
    found["settings"] = exchange_of("DeMo, all-gather", SMALL, 2).label
    for name, shape in shapes.items():
        counted = {m: [exchange_of(m, shape, r).received for r in REPLICAS] for m in METHODS}
        found[name] = {"parameters": parameter_counts(config_of("all-reduce bf16", shape).model).total}
        found[name]["received"] = counted
    for world in MEASURED:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        path = output / f"measured-{world}.json"
        torch.multiprocessing.spawn(measure, (world, port, steps, str(path)), nprocs=world)
        seen = json.loads(path.read_text())
        path.unlink()
        for method, row in seen.items():
            mine = [exchange_of(method, SMALL, world, replica) for replica in range(world)]
            if [row["sent"], row["received"]] != [[e.sent for e in mine], [e.received for e in mine]]:
                sys.exit(f"{method}, {world} replicas: counted and declared bytes differ")
        found["measured"][str(world)] = seen
    (output / "demo_scale.json").write_text(json.dumps(found, indent=1) + "\n")
    return found


def machine() -> str:
    """What the figures stand on."""
    load = f"load {os.getloadavg()[0]:.1f} at the start"
    return f"{os.cpu_count()} cores ({load}), Python {platform.python_version()}, torch {torch.__version__}"


def tables(found: dict) -> str:
    """Markdown."""
    lines = [found["machine"], found["settings"]]
    for name in ("small", "large"):
        part = found[name]
        lines += ["", f"Bytes received by a rank in a step, {part['parameters']:,} parameters"]
        lines += [f"(seconds on {MBIT} Mbit/s):", "", f"| replicas | {' | '.join(METHODS)} |"]
        lines.append("|---" * (1 + len(METHODS)) + "|")
        for i, replicas in enumerate(found["replicas"]):
            sizes = [part["received"][method][i] for method in METHODS]
            cells = [f"{size:,.0f} ({size * 8 / MBIT / 1e6:.3g})" for size in sizes]
            lines.append(f"| {replicas} | {' | '.join(cells)} |")
    lines += [
        "",
        "`step` on gloo processes, small model, medians: wall-clock ms of the slowest rank / CPU ms of a rank",
    ]
    lines += ["", f"| replicas | {' | '.join(METHODS)} |", "|---" * (1 + len(METHODS)) + "|"]
    for world, seen in found["measured"].items():
        rows = [seen[method] for method in METHODS]
        cells = [f"{max(r['wall_s']) * 1e3:.0f} / {statistics.median(r['cpu_s']) * 1e3:.0f}" for r in rows]
        lines.append(f"| {world} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def plot(found: dict, path: Path) -> None:
    """Bytes against replicas, counted as lines and declared as dots; times of the measured steps."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 4))
    for i, method in enumerate(METHODS):
        left.plot(found["replicas"], found["small"]["received"][method], color=f"C{i}", label=method)
        worlds = [int(world) for world in found["measured"]]
        rows = [seen[method] for seen in found["measured"].values()]
        left.plot(worlds, [max(row["received"]) for row in rows], "o", color=f"C{i}")
        right.plot(
            worlds, [statistics.median(row["cpu_s"]) for row in rows], "o-", color=f"C{i}", label=method
        )
    left.set(yscale="log", xlabel="replicas", ylabel="bytes received by a rank in a step")
    left.set(title=f"{found['small']['parameters'] / 1e6:.1f}M parameters: counted, dots: declared")
    right.set(xlabel="replicas", ylabel="CPU seconds of a rank's step", ylim=(0, None))
    right.set(title="gloo processes: exchange and update alone")
    left.legend(fontsize=8)
    for axes in (left, right):
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter("{x:.0f}")
        axes.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, dpi=100)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, default=Path("runs/demo_scale"))
    parser.add_argument("--steps", type=int, default=20, help="timed steps of each method")
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    found = run(options.output, options.steps)
    (options.output / "demo_scale.md").write_text(tables(found))
    plot(found, options.output / "demo_scale.png")
    print(tables(found), end="")


if __name__ == "__main__":
    main()
