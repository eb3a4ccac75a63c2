"""`stepline laws fit` and `stepline laws check`: files in, sentences or JSON out. Imports no torch."""

import json
import sys
from pathlib import Path

from stepline.trainer.errors import UserError
from stepline.trainer.plan.fit import fit_law
from stepline.trainer.plan.law_file import LawFile, write_law
from stepline.trainer.plan.runs import read_runs


def run_fit(runs: str, output: Path, name: str | None, as_json: bool) -> None:
    """Reads runs, writes law.json, says what was fitted; raises UserError."""
    table = read_runs(runs)
    if not output.parent.is_dir():
        raise UserError(f"no folder {output.parent} for {output.name}; make it first")
    law = fit_law(table, name or output.stem)
    try:
        write_law(law, output)
    except OSError as error:
        raise UserError(f"cannot write {output}: {error}") from None
    for note in law.notes:
        print(f"note: {note}", file=sys.stderr)
    if as_json:
        print(json.dumps(law.model_dump(mode="json")))
        return
    for line in fit_lines(law):
        print(line)
    print(f"written to {output}; use it with `stepline plan --law {output}` or budget.law={output}")


def fit_lines(law: LawFile) -> list[str]:
    """What a person reads: the equations, their intervals in the middle of the runs, the method."""
    fitted = law.law()
    (n, d), (n_exponent, d_exponent) = law.lr.spread.centre, law.lr.exponents
    low, high = fitted.lr_law.interval(n, d)
    least, most = fitted.batch_law.interval(d)
    return [
        f"{law.runs} runs in {law.cells} cells, {law.diverged} diverged; {law.optimizer}, {law.sync}",
        f"lr    = {law.lr.scale:.4g} * N^{n_exponent:.4g} * D^{d_exponent:.4g}",
        f"        at N = {n:.4g}, D = {d:.4g}: {fitted.lr(n, d):.4g}, 95 % interval {low:.4g} - {high:.4g}",
        f"batch = {law.batch_tokens.scale:.4g} * D^{law.batch_tokens.exponents[0]:.4g} tokens",
        f"        at D = {d:.4g}: {fitted.batch_tokens(d):,.0f}, 95 % interval {least:,.0f} - {most:,.0f}",
        f"{fitted.loss_law.equation.replace('L =', 'loss  =')}; misses by {law.loss.error_percent:.2f} %",
        f"method: {law.method}; loss: {law.loss.method}",
    ]
