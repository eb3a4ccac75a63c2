"""What may differ between two attempts of one run. Imports no torch."""

from typing import Any

from stepline.trainer.config import BUDGET, MAY_CHANGE_ON_RESUME, Config
from stepline.trainer.config_io import Origins, check, dump, flatten, set_key
from stepline.trainer.errors import UserError
from stepline.trainer.optim.schedule import learning_rate_multiplier


def may_change(key: str) -> bool:
    """Whether a dotted key may differ between two attempts of one run, whatever its schedule."""
    return any(key == k or (k.endswith(".*") and key.startswith(k[:-1])) for k in MAY_CHANGE_ON_RESUME)


def merge_for_resume(
    saved: Config, asked: Config, asked_origins: Origins, step: int
) -> tuple[Config, Origins]:
    """The config of a resumed run: what may change is taken from the new command, all else is kept.

    step: of the checkpoint to go on from, up to which a new budget may change nothing.

    So what a law has set is never planned again, while an `auto` that the machine decides (ranks, micro-batch)
    follows the machine. Raises UserError with both values for any other difference that was asked for.
    """
    old, new = flatten(dump(saved)), flatten(dump(asked))
    origins = dict.fromkeys(old, "saved run")
    tree = dump(saved)
    # a config without a budget asks for none: what was settled at the start stays; an imported run has none itself
    budget = all(any(flat[key] is not None for key in BUDGET) for flat in (old, new))
    budget &= any(new[key] != old[key] for key in BUDGET)
    # only where it is typed: an option of the start that is forgotten must not change D to what the file says
    budget &= any(asked_origins.get(key) == "override" for key in BUDGET)
    for key in sorted(old.keys() | new.keys()):
        before, after = old.get(key), new.get(key)
        if may_change(key) or (budget and key in BUDGET):
            set_key(tree, key, after)
            origins[key] = asked_origins.get(key, "default")
        elif key in BUDGET and after is None:
            continue
        elif before != after and after != "auto" and asked_origins.get(key) != "default":
            raise UserError(_refusal(key, saved, before, after))
    merged = check(tree, "the resumed config")
    if budget:
        _check_budget(saved, merged, step)
    return merged, origins


def _refusal(key: str, saved: Config, before: Any, after: Any) -> str:
    before, after = (
        "null" if v is None else str(v).lower() if isinstance(v, bool) else repr(v) for v in (before, after)
    )  # as in YAML
    both = f"{key} was {before} in {saved.run.folder} and is now {after}"
    if key in BUDGET and not any(flatten(dump(saved))[k] for k in BUDGET):
        return f"{saved.run.folder} is an imported run: start another run.folder with run.init_from={saved.run.folder}"
    if key in BUDGET and saved.schedule.name == "wsd":
        return f"{both}: give the old value back, or the new one on the command line"
    return f"{both}; it cannot change on resume: give the old value back or choose a new run.folder"


def _check_budget(old: Config, new: Config, step: int) -> None:
    """Raises UserError where the first `step` steps would not have been the same with the new budget."""
    if new.total_steps() == old.total_steps():
        return
    both = f"the budget was {_budget(old)} in {old.run.folder} and is now {_budget(new)}"
    name = old.schedule.name
    if name != "wsd":
        raise UserError(
            f"{both}; with schedule.name={name} it cannot change on resume (with wsd it may, before the decay): give "
            "the old value back or choose a new run.folder"
        )
    here = f"the checkpoint is of step {step}"
    first, what = _first_difference(old, new, min(step, new.total_steps()))
    if first is not None and _course(old, first - 1) < _course(new, first - 1):
        raise UserError(
            f"{both}; {what} since step {first} and {here}: give the old value back, or go on from a checkpoint of "
            f"step {first - 1} or before (`--resume PATH`, once)"
        )
    if step >= old.total_steps():  # at the last step more may happen than the update: DiLoCo averages all
        raise UserError(
            f"{both}; its last step is done: give the old value back, or go on from an earlier checkpoint "
            "(`--resume PATH`, once)"
        )
    if step >= new.total_steps():
        raise UserError(f"{both}, which ends at step {new.total_steps()}, and {here}: give more than that")
    if first is not None:
        raise UserError(f"{both}, with which {what} since step {first}, and {here}: give a larger budget")


def same_course(old: Config, new: Config, steps: int) -> bool:
    """Whether the first `steps` steps are the same by two configs of one run, whatever their budgets."""
    return new.total_steps() == old.total_steps() or _first_difference(old, new, steps)[0] is None


def _budget(config: Config) -> str:
    """As on the command line."""
    return next(f"{k}={v}" for k, v in flatten(dump(config)).items() if k in BUDGET and v is not None)


def _course(config: Config, index: int) -> tuple[float, bool]:
    """What of the step with this index depends on the budget: the learning rate and whether it is sparse."""
    return learning_rate_multiplier(config, index), index < config.dense_from()


def _first_difference(old: Config, new: Config, steps: int) -> tuple[int | None, str]:
    """The first of `steps` steps that the budgets tell apart, counted from 1 (None where they do not), and by what."""
    for index in range(steps):
        before, after = _course(old, index), _course(new, index)
        if before[0] != after[0]:
            return index + 1, "the learning rate has decayed"
        if before != after:
            return index + 1, "steps have been dense (sparse.dense_fraction)"
    return None, ""
