"""How much loss a fitted law costs on larger models than it has seen, on the public Step Law runs.

The runs are those of arXiv 2503.04715: data/dense_lr_bs_loss.csv (and moe_lr_bs_loss.csv) of
https://github.com/step-law/steplaw. That repository carries no licence, so nothing of it travels with Stepline:
give your own copy.

    python benchmarks/laws_regret.py dense_lr_bs_loss.csv [moe_lr_bs_loss.csv] [--json]

Fits on the cells (N, D) with N < 1e9 and prints the regret (`stepline laws check`) of that fit and of the published
law on each larger cell; then the worst of all fits on 13 of the smaller cells, and of fits on 3 x 3 runs of each cell
drawn at random around its best, which is what a user's own sweep has. Exits with 1 when the fitted law is above
.35 %, or the published one above .15 %, on a larger dense cell. The mixtures of experts are for information.
"""

import argparse
import itertools
import json
import sys
from dataclasses import replace

import numpy as np

from stepline.trainer.errors import UserError
from stepline.trainer.plan.check import check_law, grid_values
from stepline.trainer.plan.fit import fit_law
from stepline.trainer.plan.laws import STEP_LAW, StepLaw
from stepline.trainer.plan.runs import Cell, RunTable, read_runs

LARGE, CELLS = 1e9, 13
FITTED_TARGET, PUBLISHED_TARGET = 0.35, 0.15
FEW_DRAWS, SEEDS = 40, 50


def regrets(law: StepLaw, table: RunTable) -> list[float]:
    """Regret in % of each cell; raises ValueError where the runs cannot tell one."""
    found = [check.regret_percent for check in check_law(law, table)]
    if None in found:
        raise ValueError("a cell has too few runs to interpolate")
    return found


def thinned(cell: Cell, rng: np.random.Generator) -> Cell:
    """3 x 3 runs of the cell, two grid steps apart, their middle at most one step off the best run."""
    lr, batch, _ = cell.best()
    kept = []
    for value, values in (
        (lr, grid_values([r.lr for r in cell.runs])),
        (batch, grid_values([r.batch_tokens for r in cell.runs])),
    ):
        middle = int(np.argmin(np.abs(np.log(values) - np.log(value)))) + int(rng.integers(-1, 2))
        kept.append([values[i] for i in (middle - 2, middle, middle + 2) if 0 <= i < len(values)])
    runs = [r for r in cell.runs if any(v <= r.lr <= v * 1.01 for v in kept[0]) and r.batch_tokens in kept[1]]
    return replace(cell, runs=tuple(runs))


def worst_of_subsets(small: RunTable, large: RunTable) -> list[float]:
    """Largest regret of each fit on `CELLS` of the smaller cells."""
    found = []
    for cells in itertools.combinations(small.cells, CELLS):
        law = fit_law(replace(small, cells=cells), "subset", draws=FEW_DRAWS).law()
        found.append(max(regrets(law, large)))
    return found


def worst_of_thinned(small: RunTable, large: RunTable) -> tuple[list[float], int]:
    """Largest regret of each fit on 3 x 3 runs a cell, and how many fits were refused."""
    found, refused = [], 0
    for seed in range(SEEDS):
        rng = np.random.default_rng(seed)
        cells = tuple(thinned(cell, rng) for cell in small.cells)
        try:
            found.append(max(regrets(fit_law(replace(small, cells=cells), "9 runs", FEW_DRAWS).law(), large)))
        except UserError:
            refused += 1
    return found, refused


def measure(dense: str, experts: str | None) -> dict:
    """All figures."""
    table = read_runs(dense)
    small = replace(table, cells=tuple(cell for cell in table.cells if cell.params < LARGE))
    large = replace(table, cells=tuple(cell for cell in table.cells if cell.params >= LARGE))
    content = fit_law(small, "fitted")
    law = content.law()
    subsets = worst_of_subsets(small, large)
    few, refused = worst_of_thinned(small, large)
    rows = [
        {"params": cell.params, "tokens": cell.tokens, "fitted": mine, "published": theirs}
        for cell, mine, theirs in zip(large.cells, regrets(law, large), regrets(STEP_LAW, large), strict=True)
    ]
    result = {
        "fitted_on": f"{len(small.cells)} cells, {small.runs} runs, {small.diverged} diverged",
        "lr": law.lr_equation,
        "batch": law.batch_equation,
        "method": content.method,
        "larger_cells": rows,
        "subsets_of_13": {"fits": len(subsets), "worst": max(subsets), "median": float(np.median(subsets))},
        "nine_runs_a_cell": {
            "fits": len(few),
            "refused": refused,
            "worst": max(few),
            "median": float(np.median(few)),
        },
        "all_dense_published": summary(regrets(STEP_LAW, table)),
        "reached": all(r["fitted"] <= FITTED_TARGET and r["published"] <= PUBLISHED_TARGET for r in rows)
        and max(subsets) <= FITTED_TARGET,
    }
    if experts is not None:
        mixtures = read_runs(experts)
        result["experts_fitted"] = summary(regrets(law, mixtures))
        result["experts_published"] = summary(regrets(STEP_LAW, mixtures))
    return result


def summary(values: list[float]) -> dict[str, float]:
    """Mean and maximum."""
    return {"cells": len(values), "mean": sum(values) / len(values), "max": max(values)}


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("dense")
    parser.add_argument("experts", nargs="?")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    try:
        result = measure(arguments.dense, arguments.experts)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if arguments.json:
        print(json.dumps(result))
        return 0 if result["reached"] else 1
    print(f"fitted on {result['fitted_on']}: {result['lr']}, {result['batch']}\n{result['method']}\n")
    print(f"{'N':>10} {'D':>10} {'fitted, %':>10} {'published, %':>13}")
    for row in result["larger_cells"]:
        print(f"{row['params']:10.4g} {row['tokens']:10.4g} {row['fitted']:10.3f} {row['published']:13.3f}")
    print(f"{'target':>21} {FITTED_TARGET:10.2f} {PUBLISHED_TARGET:13.2f}\n")
    for name, words in (("subsets_of_13", "13 of the smaller cells"), ("nine_runs_a_cell", "9 runs a cell")):
        told = result[name]
        refused = f", {told['refused']} refused" if told.get("refused") else ""
        print(
            f"{told['fits']} fits on {words}{refused}: worst {told['worst']:.3f} %, median {told['median']:.3f} %"
        )
    for name in ("all_dense_published", "experts_fitted", "experts_published"):
        if told := result.get(name):
            print(f"{name}: {told['cells']} cells, mean {told['mean']:.3f} %, max {told['max']:.3f} %")
    return 0 if result["reached"] else 1


if __name__ == "__main__":
    sys.exit(main())
