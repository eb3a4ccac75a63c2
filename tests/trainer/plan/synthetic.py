"""Runs of a law that is known, for the tests of the fit."""

import csv
import math
from pathlib import Path

import numpy as np

from stepline.trainer.plan.runs import COLUMNS

STEP = (1.79, -0.713, 0.307), (0.58, 0.571)
CURVATURE = (0.0106, -0.0048, 0.0117)
"""h11, h12, h22 of released runs."""
NINE = [(n, d) for n in (5e6, 2e7, 8e7) for d in (1e8, 4.5e8, 2e9)]


def sweep(
    cells=NINE,
    points=3,
    noise=0.0,
    scatter=(0.0, 0.0),
    seed=0,
    lr=STEP[0],
    batch=STEP[1],
    skew=0.0,
    shift=0.2,
    step=2.0,
):
    """(N, D, rows of lr, batch, loss) a cell: a grid whose middle is off the optimum by `shift` in the logarithm."""
    rng, out = np.random.default_rng(seed), []
    offsets = (np.arange(points) - (points - 1) / 2) * math.log(step)
    h11, h12, h22 = CURVATURE
    for n, d in cells:
        a = math.log(lr[0]) + lr[1] * math.log(n) + lr[2] * math.log(d)
        b = math.log(batch[0]) + batch[1] * math.log(d)
        x, z = (grid.ravel() for grid in np.meshgrid(a - shift + offsets, b + shift + offsets, indexing="ij"))
        u, v = x - a - scatter[0] * rng.standard_normal(), z - b - scatter[1] * rng.standard_normal()
        excess = h11 * u * u / 2 + h12 * u * v + h22 * v * v / 2 + skew * u**3
        best = 1.5 + 300 / n**0.3478 + 1500 / d**0.3658
        loss = best * (1 + excess) * (1 + noise * rng.standard_normal(len(x)))
        out.append((n, d, np.stack([np.exp(x), np.exp(z), loss], -1)))
    return out


def write(path: Path, cells, **constants) -> Path:
    """The rows as a runs.csv; infinite losses as diverged."""
    fixed = {
        "weight_decay": 0.1,
        "optimizer": "muon",
        "sync": "all_reduce",
        "schedule": "linear",
        "seed": 1,
    } | constants
    with path.open("w", newline="") as file:
        table = csv.DictWriter(file, COLUMNS)
        table.writeheader()
        for n, d, rows in cells:
            for lr, batch, loss in rows.tolist():
                finite = math.isfinite(loss)
                row = {"params": n, "tokens": d, "lr": lr, "batch_tokens": batch, "seconds": 1.5}
                row |= {"loss": loss if finite else "", "diverged": int(not finite), "name": "run"}
                table.writerow(fixed | row)
    return path
