"""The training loop. It reads from top to bottom; what happens at a step happens here."""

import json
import logging
import os
from dataclasses import asdict
from typing import Any, TextIO

import torch
import torch.distributed as dist

from stepline.comm.mesh import build_mesh, limit_groups
from stepline.models.flops import parameter_counts
from stepline.models.revffn import streams_of, take_max
from stepline.models.transformer import Transformer
from stepline.trainer.config import Config
from stepline.trainer.config_io import write_config
from stepline.trainer.errors import DONE, FAILED, TO_BE_CONTINUED, USER_ERROR, TrainingStopped, UserError
from stepline.trainer.files import write_whole
from stepline.trainer.hf.adapters import initial_checkpoints
from stepline.trainer.optim.schedule import learning_rate_multiplier
from stepline.trainer.plan.explain import plan_json
from stepline.trainer.run.attempt import Attempt, go_on, refuse_damaged_data, verify_data
from stepline.trainer.run.outcome import note_begun
from stepline.trainer.run.products import choose_products
from stepline.trainer.run.profile import profiler
from stepline.trainer.run.signals import StopSignal
from stepline.trainer.run.start import Job, write_environment
from stepline.trainer.run.state import TrainState, load_weights
from stepline.trainer.run.step import StepMeasures, all_max, train_step
from stepline.trainer.run.stored import check_by_all
from stepline.trainer.run.together import together, together_on_disk
from stepline.trainer.run.validation import validation_due
from stepline.trainer.run.watchdog import SPARE_S
from stepline.trainer.watch.course import leave_course
from stepline.trainer.watch.loggers import run_id

log = logging.getLogger("stepline")

RESIDUAL = 1e-2
"""Of a fixed point in the units of a stream: beyond it a warning is due."""


def train(job: Job, stop: StopSignal, number: int, stacks: TextIO) -> dict[str, float]:
    """Attempt `number` of a job, to its last step, in an already started process group; returns the last
    validation's values. However it ends, `job.train_seconds` is what the run's steps took.

    stacks: file for the stacks of a rank that hangs. Raises ToBeContinued after a signal to any rank, TrainingStopped
    when the guard skipped too many steps in a row or the last checkpoint cannot be saved, UserError for damaged data.
    """
    config, device, world = job.config, job.device, job.world
    torch.manual_seed(config.run.seed)
    if config.run.deterministic:
        # torch refuses cuBLAS products without it.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    # in a bf16 run too: what is in fp32 there, a router's logits say, is so for a reason
    torch.set_float32_matmul_precision("highest")

    mesh = build_mesh(device, world.size, config.parallel.shard)
    group = dist.new_group(backend="gloo")  # of the host's own bookkeeping
    verifier = verify_data(job, group)
    refuse_damaged_data(verifier, group)
    reads_initial = job.resume_from is None or config.optimizer.only == "adapters"
    initial = together(lambda: initial_checkpoints(config.run.init_from) if reads_initial else [], group)
    check_by_all(initial, group)
    state = TrainState.create(config, device, mesh, world.rank, job.fingerprints)
    state.loader.on_damage = verifier.report
    limit_groups(config.parallel.timeout_s + SPARE_S, group)
    if job.resume_from is not None:
        go_on(job, state, group)
    elif config.run.init_from is not None:
        masters = state.synchronizer.masters()
        loaded = load_weights(state.model, initial[0], masters, checksums=False, of_base=False)
        log.info("weights from %s", loaded)
        state.synchronizer.adopt()
    if (name := state.first_difference()) is not None:
        raise UserError(
            f"the replicas start from different weights ({name}); give all of them the same checkpoint"
        )
    job.products, slower = choose_products(config, state.model, device, group)
    job.notes += slower
    plan = _describe(job, state, number, group)

    steps = config.total_steps()
    state.sparsity.begin(state.step, watched=False)
    attempt = Attempt(job, state, stop, verifier, group, number, stacks, plan)
    watch = attempt.watch
    validation: dict[str, float] | None = {}
    exit_code = FAILED
    try:
        with attempt.dog, profiler(config, job.folder, world.rank, device) as profile:
            stopping = attempt.told_to_stop()
            if not stopping and attempt.owes_validation():
                validation = attempt.validate(whole=state.step == steps)
                stopping = attempt.told_to_stop()
            while state.step < steps and not stopping:
                batch = next(state.loader)
                attempt.begin_to_agree()
                lr = config.optimizer.lr * learning_rate_multiplier(config, state.step)
                state.sparsity.begin(state.step, watched=is_logged(state.step + 1, config))
                # W is not beta S(W): the loss jumps, and that is no spike
                if state.step == state.sparsity.dense_from:
                    state.guard.forget()
                result = train_step(state, batch, lr)
                state.step += 1
                state.tokens += config.budget.batch_tokens
                profile.step()
                agreed = attempt.agreed()
                stopping = agreed.stop

                last = state.step == steps
                permanent = last or state.step % config.checkpoint.every == 0
                if is_logged(state.step, config):
                    row = step_row(state, result, lr) | attempt.speed.lap(state.step)
                    watch.log(row)
                if is_logged(state.step, config) or state.step % config.optimizer.guard.max_skipped == 0:
                    stop_after_skips(state.guard.take_longest(), config)

                if validation_due(state.step, config) and not stopping:
                    validation = attempt.validate(whole=last)
                    stopping = attempt.told_to_stop() if validation is None else 0

                attempt.saver.poll()
                saves = permanent or agreed.save or stopping
                every = config.parallel.check_replicas_every
                if every and (saves or state.step % every == 0):  # what is on disk is what all hold
                    stop_where_replicas_differ(state)
                if saves:
                    attempt.save(permanent)
                watch.beat(state.step, "training", tokens=state.tokens, **attempt.saved())
            attempt.finish_saving()
        exit_code = TO_BE_CONTINUED if stopping else DONE
    except UserError:
        exit_code = USER_ERROR
        raise
    except TrainingStopped as error:
        with attempt.dog:
            attempt.written()
        watch.alert("Training stopped", str(error), "error")
        raise
    finally:
        job.train_seconds = attempt.speed.trained_s()
        state.loader.close()
        verifier.close()
        watch.close(exit_code, validation, **attempt.saved())
    if stopping:
        raise attempt.to_be_continued(stopping)
    # weights of another run know something before the first step
    begun = watch.first_loss() if config.run.init_from is None else None
    if begun is not None and not validation["val_loss"] <= begun:
        log.warning(
            "validation ends at %.4g, above the loss of the first step (%.4g): this run has learned nothing; lower "
            "optimizer.lr", validation["val_loss"], begun,
        )  # fmt: skip
    log.info("done at step %d, checkpoint of step %d", state.step, attempt.saved_step)
    return validation


def is_logged(step: int, config: Config) -> bool:
    """Whether finished step `step` gets a row."""
    return step % config.logging.every == 0 or step in (1, config.total_steps())


def step_row(state: TrainState, result: StepMeasures, lr: float) -> dict[str, float]:
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
        **state.traffic.lap(),
        **state.balance.row(),
        **stream_row(state.model),
        **state.sparsity.row(),
    }


def stream_row(model: Transformer) -> dict[str, float]:
    """What reversible blocks say of themselves since the last row, on whichever rank it is largest; of all ranks."""
    if model.config.blocks != "revffn":
        return {}
    names = ("stream_max", "residual")
    nothing = torch.tensor(-1.0, device=next(model.parameters()).device)
    values = [nothing if (v := take_max(model.layers, name)) is None else v.float() for name in names]
    largest = all_max(torch.stack(values)).tolist()
    row = {name: value for name, value in zip(names, largest, strict=True) if value != -1}
    limit = streams_of(model.config.revffn).limit()
    if row.get("stream_max", 0.0) >= limit:
        log.warning(
            "a stream reached %.3g: beyond %g sums on the grid are rounded, and gradients are no longer exact; lower "
            "model.revffn.grid_bits", row["stream_max"], limit,
        )  # fmt: skip
    if row.get("residual", 0.0) > RESIDUAL:
        log.warning(
            "the inverse of a block is off by %.2g: its gradients are too; raise model.revffn.iterations, lower the "
            "learning rate, or use model.coupling=exact", row["residual"],
        )  # fmt: skip
    return row


def stop_after_skips(in_a_row: int, config: Config) -> None:
    """Ends the run, on all ranks alike, when the guard keeps skipping."""
    if in_a_row >= config.optimizer.guard.max_skipped:
        raise TrainingStopped(
            f"{in_a_row} steps in a row had a NaN or a spike and were skipped; start a new run.folder with a lower "
            "optimizer.lr; run.init_from may give it the weights of an earlier checkpoint",
            diverged=True,
        )


def stop_where_replicas_differ(state: TrainState) -> None:
    """Ends the run, on all ranks alike, when the replicas are no longer copies of each other."""
    name = state.synchronizer.first_difference()
    if name is not None:
        raise TrainingStopped(
            f"at step {state.step} the replicas differ in {name}; look for a faulty device; the same command goes on "
            "from the last checkpoint, before which they were compared"
        )


def _describe(job: Job, state: TrainState, number: int, group: dist.ProcessGroup) -> dict[str, Any]:
    """Writes what the run is (rank 0) and says it in a few lines; returns what plan.json holds.

    Raises UserError on all ranks where the folder takes no files.
    """
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
        f"{job.world.size} {job.device.type} rank{'s' if job.world.size > 1 else ''}, "
        f"micro-batch {config.parallel.micro_batch}",
    )
    if job.expected is not None:
        log.info("expected at the end: validation loss %.3f by %s", job.expected.loss, job.expected.source)
    for note in job.notes:
        log.warning("%s", note)

    def describe() -> dict[str, Any]:
        return _write_description(job, state, number) if job.world.rank == 0 else {}

    return together_on_disk(describe, job.folder, group)


def _write_description(job: Job, state: TrainState, number: int) -> dict[str, Any]:
    """config.yaml, environment.json and plan.json, whose content is returned; raises OSError."""
    path = job.folder / "plan.json"
    if job.resume_from is not None:
        leave_course(job.folder, job.config, state.step)
    state.run_id = run_id(job.folder)
    write_config(job.config, job.origins, job.folder / "config.yaml")
    write_environment(job, number)
    note_begun(job.folder, job.launchers)
    if job.resume_from is None or job.replanned or not path.exists():  # else a resumed run keeps its plan
        plan = plan_json(job.plan) | {
            "data": job.fingerprints,
            "eval_split": job.config.logging.eval_split,
            "canon": job.config.model.canon,
            "expected_final_loss": None if job.expected is None else asdict(job.expected),
        }
        write_whole(path, json.dumps(plan, indent=2) + "\n")
    return json.loads(path.read_text(encoding="utf-8"))
