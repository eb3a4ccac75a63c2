"""The training loop. It reads from top to bottom; what happens at a step happens here."""

import json
import logging
import os
from dataclasses import asdict
from pathlib import Path

import torch
import torch.distributed as dist

from stepline.comm.mesh import build_mesh
from stepline.models.flops import parameter_counts
from stepline.trainer.config import Config
from stepline.trainer.config_io import write_config
from stepline.trainer.data.loader import ValidationLoader
from stepline.trainer.errors import TrainingStopped
from stepline.trainer.optim.schedule import lr_multiplier
from stepline.trainer.plan.explain import plan_json
from stepline.trainer.run.checkpoint import Checkpointer
from stepline.trainer.run.evaluate import evaluate
from stepline.trainer.run.profile import profiler
from stepline.trainer.run.start import Job, write_environment
from stepline.trainer.run.state import TrainState, load_weights
from stepline.trainer.run.step import StepResult, train_step
from stepline.trainer.watch.speed import Speedometer
from stepline.trainer.watch.watch import Watch

log = logging.getLogger("stepline")


def train(job: Job) -> dict[str, float]:
    """Runs a job to its last step in an already started process group; returns the last validation's
    values and `train_seconds`, without validation and saving.

    Raises TrainingStopped when the guard skipped too many steps in a row.
    """
    config, device, world = job.config, job.device, job.world
    torch.manual_seed(config.run.seed)
    if config.run.deterministic:
        # torch refuses cuBLAS products without it.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    torch.set_float32_matmul_precision("high" if config.precision.compute == "bf16" else "highest")

    mesh = build_mesh(device, world.size, config.parallel.shard)
    state = TrainState.create(config, device, mesh, world.rank, job.fingerprints)
    if job.resume_from is not None:
        state.load(job.resume_from)
        log.info("continuing %s at step %d", job.resume_from, state.step)
    elif config.run.init_from is not None:
        log.info("weights from %s", load_weights(state.model, config.run.init_from))
    _describe(job, state)

    steps = config.total_steps()
    checkpointer = Checkpointer(job.folder, config.checkpoint.keep)
    watch = Watch(job.folder, config, state.step, enabled=world.rank == 0)
    speed = Speedometer(config, device, world.size, state.step)
    validation: dict[str, float] = {}
    saved_step = state.step if job.resume_from is not None else -1
    exit_code = 1
    try:
        with profiler(config, job.folder, world.rank, device) as profile:
            while state.step < steps:
                batch = next(state.loader)
                lr = config.optimizer.lr * learning_rate_multiplier(config, state.step)
                result = train_step(state, batch, lr)
                state.step += 1
                state.tokens += config.budget.batch_tokens
                profile.step()

                last = state.step == steps
                if state.step % config.logging.every == 0 or last or state.step == 1:
                    row = step_row(state, result, lr) | speed.lap(state.step)
                    watch.log(row)
                    stop_after_skips(row["skipped_in_a_row"], config)

                every = config.logging.eval_every
                if last or (every and state.step % every == 0):
                    with speed.paused():
                        validation = validate(state, whole=last)
                    if job.expected is not None:  # beside the loss, wherever that is shown
                        validation["expected_final_loss"] = job.expected.loss
                    watch.log({"step": state.step, "tokens": state.tokens} | validation)

                checkpointer.poll()
                if state.step % config.checkpoint.every == 0 or last:
                    with speed.paused():
                        checkpointer.save(state.step, state.tensors(), state.counters())
                    saved_step = state.step
        checkpointer.finish()
        exit_code = 0
    finally:
        state.loader.close()
        watch.close(exit_code)
    log.info("done at step %d, checkpoint of step %d", state.step, saved_step)
    return validation | {"train_seconds": round(speed.total, 1)}


def learning_rate_multiplier(config: Config, step: int) -> float:
    """The schedule's factor for the update with index `step`."""
    return lr_multiplier(
        step,
        total_steps=config.total_steps(),
        warmup_steps=config.schedule.warmup_steps,
        name=config.schedule.name,
        final_fraction=config.schedule.final_fraction,
        decay_fraction=config.schedule.decay_fraction,
    )


def step_row(state: TrainState, result: StepResult, lr: float) -> dict[str, float]:
    """One row of metrics.jsonl; this is where the host waits for the device."""
    guard = state.guard
    return {
        "step": state.step,
        "tokens": state.tokens,
        "epoch": round(max(state.loader.epochs), 4),
        "loss": result.loss.item(),
        "lr": lr,
        "grad_norm": result.grad_norm.item(),
        "skipped": int(guard.skipped_total),
        "skipped_in_a_row": int(guard.skipped_in_a_row),
    }


def stop_after_skips(in_a_row: int, config: Config) -> None:
    """Ends the run, on all ranks alike, when the guard keeps skipping."""
    if in_a_row >= config.optimizer.guard.max_skipped:
        raise TrainingStopped(
            f"{in_a_row} steps in a row had a NaN or a spike and were skipped; lower optimizer.lr, or resume from "
            "an earlier checkpoint with another data order (run.seed)"
        )


def validate(state: TrainState, whole: bool) -> dict[str, float]:
    """Held-out loss and bits per byte, over every source (one number each where there are several)."""
    config = state.config
    results = {}
    for source in config.data.folders():
        loader = ValidationLoader(
            source.path,
            config.logging.eval_split,
            seq_len=config.data.seq_len,
            micro_batch=config.parallel.micro_batch,
            rank=dist.get_rank(),
            world_size=dist.get_world_size(),
            max_windows=None if whole else config.logging.eval_windows,
            confine_attention=config.data.confine_attention,
        )
        results[source.path.name] = evaluate(state.model, loader, state.device)
    if len(results) == 1:
        return next(iter(results.values()))
    mean = {k: sum(r[k] for r in results.values()) / len(results) for k in ("val_loss", "val_bits_per_byte")}
    return mean | {f"{k}/{name}": v for name, r in results.items() for k, v in r.items()}


def _describe(job: Job, state: TrainState) -> None:
    """Writes what the run is (rank 0) and says it in a few lines."""
    config = job.config
    counts = parameter_counts(config.model)
    log.info(
        "%s parameters (%s in linear layers), %d steps of %s tokens, lr %.3g, weight decay %.3g, %s",
        f"{counts.total:,}",
        f"{counts.linear:,}",
        config.total_steps(),
        f"{config.budget.batch_tokens:,}",
        config.optimizer.lr,
        config.optimizer.weight_decay,
        f"{job.world.size} {job.device.type} ranks, micro-batch {config.parallel.micro_batch}",
    )
    if job.expected is not None:
        log.info("expected at the end: validation loss %.3f by %s", job.expected.loss, job.expected.source)
    for note in job.notes:
        log.warning("%s", note)
    if job.world.rank == 0:
        write_config(config, job.origins, job.folder / "config.yaml")
        if job.resume_from is None:  # a resumed run keeps its plan
            plan = plan_json(job.plan) | {
                "data": job.fingerprints,
                "eval_split": config.logging.eval_split,
                "expected_final_loss": None if job.expected is None else asdict(job.expected),
            }
            (job.folder / "plan.json").write_text(json.dumps(plan, indent=2) + "\n", encoding="utf-8")
        write_environment(job, attempt=_attempt(job.folder))
    dist.barrier()


def _attempt(folder: Path) -> int:
    return max((int(p.name.removeprefix("attempt-")) for p in (folder / "logs").glob("attempt-*")), default=1)
