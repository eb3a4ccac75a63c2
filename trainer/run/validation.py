"""Validations of a run: when they are due, whether they were made, and what they say of the held-out text."""

from collections.abc import Callable
from pathlib import Path

import torch.distributed as dist

from stepline.comm.fsdp import forget_gathered
from stepline.trainer.config import Config
from stepline.trainer.data.dataset import source_names
from stepline.trainer.data.held_out import ValidationLoader
from stepline.trainer.errors import Unreadable
from stepline.trainer.run.evaluate import evaluate
from stepline.trainer.run.state import TrainState
from stepline.trainer.watch.metrics import has_validation


def validation_due(step: int, config: Config) -> bool:
    """Whether a step ends with a validation."""
    every = config.logging.eval_every
    return step == config.total_steps() or bool(every and step % every == 0)


def validated(folder: Path, step: int) -> bool:
    """Whether metrics.jsonl has a validation of that step; raises UserError where it cannot be read."""
    path = folder / "metrics.jsonl"
    try:
        return has_validation(path, step)
    except OSError as error:
        raise Unreadable(path, error) from error


def validate(
    state: TrainState, whole: bool, interrupted: Callable[[], int] = lambda: 0
) -> dict[str, float] | None:
    """Held-out loss and bits per byte: of several sources the means, in which each counts alike, and each one's as
    `val_loss/NAME`; and `val_tokens`, on how many. None as soon as `interrupted`, which all ranks ask after each
    micro-batch, says so."""
    with state.synchronizer.shared_model():
        forget_gathered(state.model)
        state.sparsity.enter_phase(max(state.step - 1, 0))  # of the step that led here, after a resume too
        state.sparsity.refresh()
        values = _validate(state, whole, interrupted)
    forget_gathered(state.model)
    return values


def _validate(state: TrainState, whole: bool, interrupted: Callable[[], int]) -> dict[str, float] | None:
    config = state.config
    folders, results, tokens = [source.path for source in config.data.folders()], {}, 0
    for name, folder in zip(source_names(folders), folders, strict=True):
        loader = ValidationLoader(
            folder,
            config.logging.eval_split,
            seq_len=config.data.seq_len,
            micro_batch=config.parallel.micro_batch,
            rank=dist.get_rank(),
            world_size=dist.get_world_size(),
            max_windows=None if whole else config.logging.eval_windows,
            confine_attention=config.data.confine_attention,
            on_damage=state.loader.on_damage,
        )
        score = evaluate(state.model, loader, state.device, interrupted)
        if score is None:
            return None
        tokens += score.tokens
        results[name] = score.row()
    of = {"val_tokens": tokens}
    if len(results) == 1:
        return next(iter(results.values())) | of
    mean = {k: sum(r[k] for r in results.values()) / len(results) for k in ("val_loss", "val_bits_per_byte")}
    return mean | {f"{k}/{name}": v for name, r in results.items() for k, v in r.items()} | of
