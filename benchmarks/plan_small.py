"""Does a fitted law find the learning rate and the batch of a run that it has not seen? On two CPU cores.

1. Sweep: 3 sizes x 3 budgets x 3 learning rates x 3 batches of the quickstart's model and optimizer (Muon) on its
   corpus, compared on the `tune` split (`stepline sweep`).
2. Fit: the two intercepts, with Step Law's exponents, and the exponents only where the runs carry them
   (`stepline laws fit`).
3. Predict learning rate and batch for a size and a budget that are not in the sweep (`stepline plan --law`).
4. Test: a 3 x 3 grid in factors of 2 around the prediction, 3 seeds (`stepline sweep`); the loss at the prediction,
   over the grid's best, must be at most 0.5 % above it.

Everything that was done is kept in --work, so a stopped benchmark goes on. The sweep's wall-clock time (while it
ran) must be at most 90 minutes.

    python benchmarks/plan_small.py [--jobs 2] [--json]
"""

import argparse
import csv
import json
import os
import subprocess
import sys
import time
from collections import defaultdict
from pathlib import Path

from stepline.trainer.quickstart import corpus_arguments

SWEEP = ("--widths", "96,128,192", "--tokens", "2e5,4e5,8e5", "--lr", "0.01,0.02,0.04")
"""Batches: Step Law's, half and twice of it."""
COMMON = (
    "budget.law=null",
    "budget.batch_tokens=auto",
    "optimizer.weight_decay=0.1",
    "schedule.warmup_steps=auto",
)
WIDTH, TOKENS = 160, 600_000
TARGET = (f"model.hidden_size={WIDTH}", "model.num_heads=5", "model.ffn_size=480", f"budget.tokens={TOKENS}")
SEEDS, FACTORS = 3, (0.5, 1.0, 2.0)
MOST_REGRET, MOST_MINUTES = 0.5, 90


def stepline(*arguments: str, capture: bool = True) -> str:
    """One command of the program; its standard error stays visible."""
    command = [sys.executable, "-m", "stepline.trainer", *arguments]
    result = subprocess.run(command, stdout=subprocess.PIPE if capture else sys.stderr, text=True, check=True)
    return result.stdout or ""


def sweep(folder: Path, jobs: int, *arguments: str) -> float:
    """Does what is missing of a sweep; returns the minutes that it has taken so far, over all calls."""
    clock = folder.with_name(folder.name + ".seconds")
    spent = float(clock.read_text()) if clock.is_file() else 0.0
    started = time.perf_counter()
    # A sweep that is laid out goes on by its folder alone.
    layout = () if (folder / "sweep.json").is_file() else arguments
    try:
        stepline("sweep", *layout, "--output", str(folder), "--jobs", str(jobs), capture=False)
    finally:
        clock.parent.mkdir(parents=True, exist_ok=True)
        clock.write_text(f"{spent + time.perf_counter() - started:.1f}\n")
    return float(clock.read_text()) / 60


def mean_losses(table: Path) -> dict[tuple[float, int], float]:
    """Mean over the seeds of each (lr, batch); infinite where a run diverged."""
    losses = defaultdict(list)
    with table.open(newline="") as file:
        for row in csv.DictReader(file):
            losses[float(row["lr"]), int(row["batch_tokens"])].append(float(row["loss"] or "inf"))
    return {point: sum(values) / len(values) for point, values in losses.items()}


def main() -> None:
    """Runs what is missing and prints the result; exits with 1 where a target is missed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", type=Path, default=Path("runs/plan-small"))
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    work, law = args.work, args.work / "law.json"
    data = work / "data"
    if not (data / "meta.json").is_file():
        stepline("prepare", *corpus_arguments(), "--output", str(data), capture=False)
    config = ("quickstart", f"data.path={data}", *COMMON)

    minutes = sweep(work / "sweep", args.jobs, *config, *SWEEP)
    fitted = stepline("laws", "fit", str(work / "sweep" / "runs.csv"), "-o", str(law))
    machine = ("--world-size", "1", "--micro-batch", "1", "--law", str(law), "--json")
    plan = json.loads(stepline("plan", *config, *TARGET, "optimizer.lr=auto", *machine))
    lr, batch = plan["lr"], plan["batch_tokens"]

    rates = ",".join(f"{lr * factor:.4g}" for factor in FACTORS)
    batches = ",".join(str(max(1, round(batch * factor / 128)) * 128) for factor in FACTORS)
    grid = ("--widths", str(WIDTH), "--tokens", str(TOKENS), "--lr", rates, "--batch-tokens", batches)
    test_minutes = sweep(work / "target", args.jobs, *config, *grid, "--seeds", str(SEEDS))
    losses = mean_losses(work / "target" / "runs.csv")
    predicted = losses[min(losses, key=lambda p: (abs(p[0] / lr - 1), abs(p[1] / batch - 1)))]
    best = min(losses.values())
    result = {
        "fit": fitted.strip(),
        "params": plan["params"],
        "tokens": plan["tokens"],
        "lr": lr,
        "batch_tokens": batch,
        "predicted_loss": predicted,
        "best_loss": best,
        "best_point": min(losses, key=losses.get),
        "regret_percent": 100 * (predicted / best - 1),
        "sweep_minutes": round(minutes, 1),
        "test_minutes": round(test_minutes, 1),
    }
    if args.json:
        print(json.dumps(result | {"grid": [[*point, loss] for point, loss in sorted(losses.items())]}))
    else:
        show(result, losses)
    if result["regret_percent"] > MOST_REGRET or minutes > MOST_MINUTES:
        sys.exit(1)


def show(result: dict, losses: dict[tuple[float, int], float]) -> None:
    """The grid as a table of losses, lr downwards and batch to the right, and the figures."""
    batches = sorted({batch for _, batch in losses})
    print("lr \\ batch".rjust(10), *(f"{batch:>8}" for batch in batches))
    for rate in sorted({rate for rate, _ in losses}):
        print(f"{rate:10.4g}", *(f"{losses[rate, batch]:8.4f}" for batch in batches))
    for name, value in result.items():
        print(f"{name:16} {value}")


if __name__ == "__main__":
    main()
