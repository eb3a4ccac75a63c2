"""The held-out loss that a run should end with, where the user's own numbers can tell. Imports no torch."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stepline.trainer.plan.kind import differences
from stepline.trainer.plan.laws import EPOCH, LossLaw, StepLaw
from stepline.trainer.plan.planner import Inputs, Plan

BEFORE_CANON = "canon=none"
"""Kind of the models of laws and runs that do not tell it: they are older than Canon layers, or of published data."""


@dataclass(frozen=True)
class Expected:
    """What the run's curve, its metrics and wandb show beside the loss."""

    loss: float
    """At the last step, on held-out text, in nats per token."""
    source: str
    """Whose number it is."""


def unlike(law: StepLaw, inputs: Inputs) -> list[str]:
    """What of a plan the law's runs had otherwise, each in words: then they do not tell its loss."""
    found = differences(law.kind or BEFORE_CANON, inputs.known_kind)
    for theirs, ours in ((law.optimizer, inputs.optimizer), (law.sync, inputs.sync)):
        found += [] if theirs == ours else [f"{theirs}, not {ours}"]
    return found


def own_loss_law(law: StepLaw, inputs: Inputs) -> LossLaw | None:
    """The law's own loss law; None where it has none, or where its runs were of another kind, with another optimizer
    or synchroniser."""
    return None if unlike(law, inputs) else law.loss_law


def expected_final_loss(plan: Plan, folder: Path, fingerprints: Sequence[str], split: str) -> Expected | None:
    """By a loss law fitted on the same text, else from an earlier run of the same data; None without either.

    A published loss law has the intercept of another corpus and tokenizer: it ranks plans, it predicts nothing here.

    folder: the run's own; its neighbours are the earlier runs. fingerprints: of the data, in order. split: the one
    that the run validates on; losses of different splits differ by more than a plan gains.
    """
    n, d, law = plan.inputs.params, plan.inputs.tokens, plan.law
    loss_law = own_loss_law(law, plan.inputs)
    if loss_law is not None and law.held_out == held_out_text(fingerprints, split):
        beyond = ", extrapolated" if law.source.outside(n, d, plan.inputs.active_params) else ""
        return Expected(loss_law.loss(n, d), f"the loss law of {law.source.name}{beyond}")
    return _from_earlier_run(plan, folder, list(fingerprints), split)


def held_out_text(fingerprints: Sequence[str], split: str) -> str:
    """What losses were measured on, as the column `held_out` of runs.csv has it: `tune of 8b7428ccd01039cf`."""
    return f"{split} of {'+'.join(fingerprint[:16] for fingerprint in fingerprints)}"


def _from_earlier_run(plan: Plan, folder: Path, fingerprints: list[str], split: str) -> Expected | None:
    """L = L_earlier + Epoch(N, D) - Epoch(N_earlier, D_earlier): that run gives the intercept, Epoch's
    Chinchilla fit (arXiv 2404.10102) the difference, from the nearest run and inside of its range only."""
    n, d = plan.inputs.params, plan.inputs.tokens
    if EPOCH.source.outside(n, d):
        return None
    found = []
    for path in sorted(folder.parent.glob("*/plan.json")):
        earlier = _finished(path.parent)
        if earlier is None or path.parent == folder:
            continue
        planned, loss = earlier
        same = (planned.get("data"), planned.get("eval_split")) == (fingerprints, split)
        same = same and planned["inputs"]["seq_len"] == plan.inputs.seq_len
        its_kind = planned["inputs"].get("kind") or f"canon={planned.get('canon', 'none')}"
        same = same and not differences(its_kind, plan.inputs.known_kind)
        same = same and all(
            planned["inputs"].get(key, getattr(plan.inputs, key)) == getattr(plan.inputs, key)
            for key in ("optimizer", "sync")
        )
        n0, d0 = planned["params"], planned["tokens"]
        if same and not EPOCH.source.outside(n0, d0):
            distance = abs(math.log(n / n0)) + abs(math.log(d / d0))
            found.append((distance, path.parent.name, loss + EPOCH.loss(n, d) - EPOCH.loss(n0, d0)))
    if not found:
        return None
    _, name, loss = min(found)
    return Expected(loss, f"the earlier run {name} and {EPOCH.source.name}")


def _finished(folder: Path) -> tuple[dict, float] | None:
    """plan.json and the last validation loss of a run that is done; None for any other folder."""
    try:
        planned = json.loads((folder / "plan.json").read_text(encoding="utf-8"))
        outcome = json.loads((folder / "outcome.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    if outcome.get("status") != "done" or outcome.get("val_loss") is None:
        return None
    return planned, outcome["val_loss"]


def kept_expectation(folder: Path) -> Expected | None:
    """What an earlier attempt of a resumed run wrote to plan.json."""
    kept = _kept(folder).get("expected_final_loss")
    return None if kept is None else Expected(**kept)


def kept_budget(folder: Path) -> tuple[float, float] | None:
    """(D of plan.json, D that learning rate, weight decay and batch were settled at) of a resumed run; None where there
    is no plan.json."""
    kept = _kept(folder)
    if "tokens" not in kept:
        return None
    return kept["tokens"], kept.get("inputs", {}).get("settled_at") or kept["tokens"]


def _kept(folder: Path) -> dict[str, Any]:
    """What plan.json holds; empty where there is none."""
    try:
        return json.loads((folder / "plan.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
