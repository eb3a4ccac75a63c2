"""Replicas across a slow link: what a step costs and what loss it buys, for every way in which they can agree.

Two "nodes" are two network namespaces on a bridge, with `tc tbf` at both ends of the link (bandwidth is shaped; latency
and loss are not, and nothing is claimed about them). Bytes are those of the interfaces' counters.

    python benchmarks/slow_link.py time DATA     # needs root, iproute2
    python benchmarks/slow_link.py turns DATA    # the same; one rate, against no network, in turns
    python benchmarks/slow_link.py loss DATA     # the learning rates' grid, then three seeds
    python benchmarks/slow_link.py show          # tables and plots of what is there

Each with [--output DIR], `time` and `loss` with [--methods METHOD ...].

DATA: a folder written by `stepline prepare` with a `tune` split and at most 2048 tokens in its vocabulary.
"""

import argparse
import json
import math
import os
import shutil
import socket
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from shaped_link import Link
from slow_link_show import show

TIMED = {"hidden_size": 192, "num_layers": 6, "num_heads": 6, "ffn_size": 512}
"""3.4M parameters with embeddings."""
TRAINED = {"hidden_size": 128, "num_layers": 4, "num_heads": 4, "ffn_size": 384}
"""1.4M parameters with embeddings."""
SHAPE = [
    "model.tied_embeddings=false", "model.canon=none", "data.seq_len=256", "data.verify=off", "budget.law=null",
    "budget.tokens=null", "budget.batch_tokens=4096", "optimizer.name=adamw", "parallel.shard=1",
    "parallel.micro_batch=8", "logging.eval_every=0", "logging.wandb=off", "checkpoint.ephemeral_minutes=null",
    "checkpoint.every=1000000",
]  # fmt: skip
"""2,048 tokens for each of two replicas in a step."""
EVERY = 32
"""Steps between two exchanges of DiLoCo, which then sends 1.02 times the bytes of DeMo at 1/50."""
DILOCO = f"DiLoCo int8, H = {EVERY}"
METHODS = {
    "no network": ["parallel.sync=diloco", "parallel.diloco.every=1000000"],
    "all-reduce fp32": [],
    "all-reduce bf16": ["precision.reduce=bf16"],
    "DeMo 1/50": ["parallel.sync=demo"],
    "DeMo 1/50, a step late": ["parallel.sync=demo", "parallel.demo.delay=1"],
    "DeMo 1/50, late, not ahead": [
        "parallel.sync=demo",
        "parallel.demo.delay=1",
        "parallel.demo.ahead=false",
    ],
    "DeMo 1/100": ["parallel.sync=demo", "parallel.demo.density=0.01"],
    "DeMo 1/400": ["parallel.sync=demo", "parallel.demo.density=0.0025"],
    "DeMo int8 1/128": ["parallel.sync=demo", "parallel.demo.codec=int8", "parallel.demo.density=0.0078125"],
    DILOCO: ["parallel.sync=diloco", f"parallel.diloco.every={EVERY}", "parallel.diloco.codec=int8"],
    "random-k 1/100": ["parallel.sync=random_k", "parallel.random_k.density=0.01"],
}
"""random-k sends two thirds of the bytes of DeMo at 1/50 a step."""
RATES_MBIT = (10, 100, 1000, 10000)


STEPLINE = (sys.executable, "-m", "stepline.trainer")


class Diverged(Exception):
    """A run was ended by its guard: the learning rate is too high for it."""


def run(
    data: Path, folder: Path, options: list[str], shape: dict, nodes=None, program: Sequence[str] = STEPLINE,
    per_node: int = 1,
) -> list[dict]:  # fmt: skip
    """Trains with two nodes of `per_node` ranks; the rows of metrics.jsonl. nodes: (namespace, interface, address) of
    each; program: that takes stepline's arguments. Raises Diverged."""
    shutil.rmtree(folder, ignore_errors=True)
    program = [*program, "train", "quickstart", f"data.path={data}", *SHAPE]
    program += [f"model.{key}={value}" for key, value in shape.items()] + options + [f"run.folder={folder}"]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ranks = []
    for rank in range(2 * per_node):
        namespace, interface, _ = nodes[rank // per_node] if nodes else (None, "lo", None)
        env = os.environ | {
            "OMP_NUM_THREADS": "1", "WORLD_SIZE": str(2 * per_node), "RANK": str(rank),
            "LOCAL_RANK": str(rank % per_node), "LOCAL_WORLD_SIZE": str(per_node),
            "MASTER_ADDR": nodes[0][2] if nodes else "127.0.0.1", "MASTER_PORT": str(port),
            "GLOO_SOCKET_IFNAME": interface,
        }  # fmt: skip
        enter = ["ip", "netns", "exec", namespace] if namespace else []
        ranks.append(
            subprocess.Popen([*enter, *program], env=env, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        )
    errors = [rank.communicate()[1].decode() for rank in ranks]
    if any(rank.returncode for rank in ranks):
        outcome = folder / "outcome.json"
        if outcome.exists() and json.loads(outcome.read_text()).get("diverged"):
            raise Diverged
        sys.exit("\n".join(errors))
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


COUNTED_STEPS = {DILOCO: (EVERY + 2, 3 * EVERY + 2)}
"""Of a short and a long run, which differ by whole exchanges; of other methods any will do."""


def step_seconds(rows: list[dict]) -> float:
    """Median of the steps after the first two."""
    steps = [row for row in rows if "loss" in row][2:]
    return statistics.median(4096 / row["tokens_per_second"] for row in steps)


def time_steps(data: Path, output: Path, methods: Sequence[str]) -> None:
    """times.json: seconds of a step by method and rate; bytes of a step by the counters and by the ledger."""
    found: dict = {"rates_mbit": list(RATES_MBIT), "methods": {}}
    folder = output / "timed"
    with Link() as link:
        for method in methods:
            options = METHODS[method]
            link.shape(None)
            lengths, counted, late = COUNTED_STEPS.get(method, (6, 26)), [], {}
            for steps in lengths:
                before = link.counters()
                rows = run(
                    data, folder, [*options, f"budget.steps={steps}", "logging.every=1"], TIMED, link.nodes
                )
                counted.append({k: v - before[k] for k, v in link.counters().items()})
                late[steps] = [row["bytes_sent"] for row in rows if "loss" in row]
            span = lengths[1] - lengths[0]
            entry = {
                "sent_by_counter": (counted[1]["tx"] - counted[0]["tx"]) / span,
                "received_by_counter": (counted[1]["rx"] - counted[0]["rx"]) / span,
                "sent_by_ledger": (sum(late[lengths[1]]) - sum(late[lengths[0]])) / span,
                "loopback": counted[1]["lo"],
                "seconds": {"unshaped": step_seconds(rows)},
            }
            for rate in RATES_MBIT:
                link.shape(rate)
                slow = "all-reduce" in method and rate == 10
                steps = 7 if slow else EVERY + 3 if method == DILOCO else 27
                rows = run(
                    data, folder, [*options, f"budget.steps={steps}", "logging.every=1"], TIMED, link.nodes
                )
                seconds = [4096 / row["tokens_per_second"] for row in rows if "loss" in row][2:]
                # DiLoCo's exchanges are few and long: the mean of as many steps counts, one of which has an exchange
                # (without the last step, which has another).
                entry["seconds"][str(rate)] = (
                    statistics.mean(seconds[:-1]) if method == DILOCO else statistics.median(seconds)
                )
            found["methods"][method] = entry
            print(method, json.dumps(entry), flush=True)
            (output / "times.json").write_text(json.dumps(found, indent=1) + "\n")


TURNS, TURNED_MBIT = 6, 100
TURNED_METHODS = ("no network", "DeMo 1/50", "DeMo 1/50, a step late")


def time_turns(data: Path, output: Path) -> None:
    """turns.json: seconds of a step at TURNED_MBIT, the methods one after the other, TURNS times: what is true of the
    machine at that moment is true of all of them, and a ratio is of one turn."""
    found: dict[str, list[float]] = {method: [] for method in TURNED_METHODS}
    with Link() as link:
        link.shape(TURNED_MBIT)
        for turn in range(TURNS):
            # whoever comes first takes its turn last the next time
            for method in TURNED_METHODS if turn % 2 == 0 else TURNED_METHODS[::-1]:
                options = [*METHODS[method], "budget.steps=27", "logging.every=1"]
                rows = run(data, output / "timed", options, TIMED, link.nodes)
                found[method].append(step_seconds(rows))
            (output / "turns.json").write_text(json.dumps(found, indent=1) + "\n")
    free = found[TURNED_METHODS[0]]
    for method, seconds in found.items():
        ratios = sorted(mine / theirs for mine, theirs in zip(seconds, free, strict=True))
        print(
            f"{method}: {statistics.median(seconds):.3f} s, {statistics.median(ratios):.3f} of a step without network "
            f"({ratios[0]:.3f} to {ratios[-1]:.3f})"
        )


LEARNING_RATES = (4e-3, 8e-3, 1.6e-2)
"""Doubled or halved further where the best of them is at an edge."""
SEEDS = (0, 1, 2)
TRAINED_STEPS = 300
LOSS_METHODS = (
    "all-reduce fp32",
    "all-reduce bf16",
    "DeMo 1/50",
    "DeMo 1/100",
    DILOCO,
    "random-k 1/100",
    "DeMo 1/50, a step late",
    "DeMo 1/50, late, not ahead",
    "DeMo 1/400",
)
WINNERS = ("all-reduce fp32", "all-reduce bf16", "DeMo 1/50", "DeMo 1/100", "DeMo 1/50, a step late")
"""Trained with all seeds."""


def train_all(data: Path, output: Path, methods: Sequence[str]) -> None:
    """losses.json: the curve of every method at every learning rate on one seed, at its best on the unseen split, and
    those of the winners on all seeds.

    The learning rate is chosen by the `tune` split, what is reported stands on `val`. Bandwidth changes the time, not
    the loss: these runs are unshaped. Runs that are in losses.json already are not repeated; one that diverged has no
    loss there.
    """
    path = output / "losses.json"
    found = json.loads(path.read_text()) if path.exists() else []

    def curve(method: str, lr: float, seed: int, split: str) -> dict:
        key = {"method": method, "lr": lr, "seed": seed, "split": split, "steps": TRAINED_STEPS}
        for known in found:
            if {k: known[k] for k in key} == key:
                return known
        options = [
            *METHODS[method], f"optimizer.lr={lr}", f"run.seed={seed}", f"logging.eval_split={split}",
            "optimizer.weight_decay=0.1", f"budget.steps={TRAINED_STEPS}", "logging.every=10",
            f"logging.eval_every={TRAINED_STEPS // 8}", "logging.eval_windows=64",
        ]  # fmt: skip
        try:
            rows = run(data, output / "trained", options, TRAINED)
        except Diverged:
            known, says = key | {"val": None}, "diverged"
        else:
            values = [(row["step"], row["val_loss"]) for row in rows if "val_loss" in row]
            sent = statistics.mean(row["bytes_sent"] for row in rows if "loss" in row)
            known, says = key | {"val": values[-1][1], "curve": values, "bytes": sent}, f"{values[-1][1]:.4f}"
        found.append(known)
        path.write_text(json.dumps(found, indent=1) + "\n")
        print(f"{method}, lr {lr:g}, seed {seed}, {split}: {says}", flush=True)
        return known

    def tuned(method: str, lr: float) -> float:
        loss = curve(method, lr, SEEDS[0], "tune")["val"]
        return math.inf if loss is None else loss

    for method in methods:
        tried = {lr: tuned(method, lr) for lr in LEARNING_RATES}
        while (lr := min(tried, key=tried.get)) in (min(tried), max(tried)):
            further = lr / 2 if lr == min(tried) else lr * 2
            tried[further] = tuned(method, further)
        for seed in SEEDS if method in WINNERS else SEEDS[:1]:
            curve(method, lr, seed, "val")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("part", choices=("time", "turns", "loss", "show"))
    parser.add_argument("data", nargs="?", type=Path)
    parser.add_argument("--output", type=Path, default=Path("runs/slow_link"))
    parser.add_argument(
        "--methods", nargs="+", choices=METHODS, metavar="METHOD", help="of `time` and `loss`"
    )
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    if options.part == "show":
        show(options.output, LOSS_METHODS)
    elif options.data is None:
        parser.error("give a folder written by `stepline prepare`")
    elif options.part == "turns":
        time_turns(options.data.resolve(), options.output)
    else:
        part, methods = {"time": (time_steps, METHODS), "loss": (train_all, LOSS_METHODS)}[options.part]
        part(options.data.resolve(), options.output, options.methods or list(methods))


if __name__ == "__main__":
    main()
