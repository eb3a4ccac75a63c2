"""How much held-out text a validation during a run reads. Imports no torch."""

from stepline.trainer.config import Config

EVAL_SHARE, LEAST_EVAL_WINDOWS = 0.05, 64
"""Of the training's computing, for all validations together; and what one has at least."""


def auto_eval_windows(config: Config) -> tuple[int, str]:
    """Windows of one validation, of each source, of which all together compute EVAL_SHARE of what training does (a
    token's forward is a third of its training), and why so many."""
    steps, every = config.total_steps(), config.logging.eval_every
    validations = max(1, steps // every if every else 0) * max(1, len(config.data.folders()))
    windows = steps * config.budget.batch_tokens / config.data.seq_len
    found = round(3 * EVAL_SHARE * windows / validations)
    if found <= LEAST_EVAL_WINDOWS:
        return LEAST_EVAL_WINDOWS, f"at least {LEAST_EVAL_WINDOWS}"
    return found, "a twentieth of the computing, or all of the split"
