"""Everything that is decided before the first collective, so that a user's mistake ends in one sentence."""

import importlib.metadata
import json
import os
import platform
import re
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from stepline.comm.mesh import World, check_rendezvous, start_process_group
from stepline.comm.rendezvous import UnlikeDevices
from stepline.trainer.config import Config
from stepline.trainer.config_io import Origins, load_config, read_run_config
from stepline.trainer.config_resume import merge_for_resume
from stepline.trainer.data.dataset import Meta, load_for_run
from stepline.trainer.errors import DoesNotFit, UserError
from stepline.trainer.files import write_whole
from stepline.trainer.hf.adapters import check_adapters
from stepline.trainer.plan.effects import (
    empty_windows,
    nobody_to_agree_with,
    repeated_corpus,
    unwanted_effects,
)
from stepline.trainer.plan.expect import Expected, expected_final_loss, kept_budget, kept_expectation
from stepline.trainer.plan.idle import idle_keys
from stepline.trainer.plan.planner import Plan
from stepline.trainer.plan.resolve import Machine, law_of_resumed, resolve, settler
from stepline.trainer.run.devices import device_memory, pick_device
from stepline.trainer.run.folder import check_folder, checkpoint_to_resume
from stepline.trainer.run.infer import other_tokenizer
from stepline.trainer.run.manifest import read_state, step_of
from stepline.trainer.run.outcome import begun_before
from stepline.trainer.run.products import cannot_compile_fp8, check_products_of_batch, products_done_instead
from stepline.trainer.run.room import short_of_room
from stepline.trainer.run.state import check_weights
from stepline.trainer.run.watchdog import SPARE_S
from stepline.trainer.run.zero import check_installed


@dataclass
class Job:
    """A checked run, ready to start."""

    config: Config
    origins: Origins
    world: World
    device: torch.device
    metas: list[Meta]
    """One for each source of the config."""
    plan: Plan | None
    """What the laws say of this run; None while the ranks must meet before they know where it goes on."""
    expected: Expected | None = None
    """Held-out loss at the end, where the user's own numbers tell."""
    resume_from: Path | None = None
    """Checkpoint to continue from."""
    resume_chosen: bool = False
    """Whether the user named it; otherwise an earlier one may take its place."""
    refused: DoesNotFit | None = None
    """Why the run cannot start, in a dry one."""
    notes: list[str] = field(default_factory=list)
    """Warnings of the plan and what this machine cannot do, each one sentence."""
    products: dict[str, Any] = field(default_factory=dict)
    """How 2:4 sparse products are made, by shape, and what was measured for that."""
    replanned: bool = False
    """Whether plan.json was made for another budget, which a resume has changed."""
    again: bool = False
    """Whether this launch, as far as this rank's launcher knows, has begun to train in this folder before."""
    launchers: list[str] = field(default_factory=list)
    """`StopSignal.launcher` of all ranks, once they have met."""
    train_seconds: float | None = None
    """Of the run's steps so far, over all attempts (`TrainState.train_seconds`), once this one has ended."""

    @property
    def folder(self) -> Path:
        """The run's folder."""
        return self.config.run.folder

    @property
    def fingerprints(self) -> list[str]:
        """What identifies the data, in the order of the sources."""
        return [meta.fingerprint for meta in self.metas]


def launched_world(*, rendezvous: bool = True) -> World:
    """This process among the ranks; rendezvous: they are going to meet. Raises UserError where the environment is no
    launcher's."""
    try:
        world = World.from_environment()
        if rendezvous:
            check_rendezvous(world)
    except ValueError as error:
        raise UserError(str(error)) from error
    return world


def join(world: World, device: torch.device, timeout_s: float, option: str = "run.device=") -> None:
    """Starts the process group, whose collectives end after `timeout_s` seconds and some more. Raises UserError where
    that cannot be. option: by which a device is asked for."""
    try:
        start_process_group(world, device, timeout_s + SPARE_S)
    except dist.DistNetworkError as error:
        address = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        taken = "EADDRINUSE" in str(error)
        reason = "is in use" if taken else f"cannot be used ({str(error).splitlines()[0]})"
        raise UserError(
            f"port {address} {reason}; choose another with --master-port or MASTER_PORT"
        ) from error
    except dist.DistStoreError as error:
        raise UserError(
            f"not all {world.size} ranks came within {timeout_s:g} s (parallel.timeout_s): "
            f"{str(error).splitlines()[0]}"
        ) from error
    except UnlikeDevices as error:
        raise UserError(
            f"{error}; leave those nodes out, or give all {option}cpu (`stepline doctor` there says more)"
        ) from error
    except dist.DistBackendError as error:  # NCCL's, which connects at once
        if (found := re.search(r"Duplicate GPU detected.*", str(error))) is None:
            raise
        raise UserError(
            f"ranks share a GPU ({found[0].strip()}); start as many as there are GPUs, and leave CUDA_VISIBLE_DEVICES "
            "to the launcher"
        ) from error


def start_job(
    name: str,
    overrides: list[str],
    resume: str,
    world: World,
    *,
    dry: bool = False,
    launcher: str | None = None,
) -> Job:
    """Reads and checks the config, the data, the machine and the run's folder; starts nothing.

    resume: `auto` continues the run of that folder where it has a complete checkpoint, `never` refuses a folder
    that is not empty, anything else is the checkpoint to continue from. dry: a step that does not fit is planned all
    the same, and `refused`. launcher: of this rank, before ranks have met: what it has begun goes on. Where that may be
    another node's, whose launch has moved on since, the job is one to meet with, and without a plan. Raises UserError.
    """
    config, origins = load_config(name, overrides)
    check_folder(config.run.folder)
    again = launcher is not None and begun_before(config.run.folder, launcher)
    if again:
        resume = "auto"
    asks_others = resume != "auto" and launcher is not None and world.size > world.local_size
    resume_from, damage = (None, []) if asks_others else checkpoint_to_resume(config.run.folder, resume)
    if resume_from is not None:
        saved = read_run_config(config.run.folder)
        config, origins = merge_for_resume(saved, config, origins, step_of(resume_from))
    check_installed(config)
    device, notes = pick_device(config.run.device, world)
    notes = damage + notes
    settler(config, origins)("run", "device", device.type, "machine")
    if asks_others:
        return Job(config, origins, world, device, [], None)

    sources = [source.path for source in config.data.folders()]
    metas = load_for_run(sources, config.model.vocab_size, config.data.seq_len, config.logging.eval_split)
    if resume_from is None and config.run.init_from is not None:
        check_weights(config)
        notes += other_tokenizer(config, metas[0])
    bf16 = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    if cannot_compile_fp8(config, device):
        settler(config, origins)("run", "compile", False, "this GPU has no FP8")
        notes.append("run.compile is off: this torch cannot compile FP8 numbers for a GPU that has none")
    corpus = sum(meta.splits["train"].tokens for meta in metas)
    memory = device_memory(device, world.local_size)
    machine = Machine(world.size, device.type, bf16, memory, world.local_size)
    law = None
    if resume_from is not None:
        law, missing = law_of_resumed(config)
        notes += missing
    refused, asked = None, (config.model_copy(deep=True), dict(origins))
    try:
        plan, warnings = resolve(config, origins, machine, corpus, law)
    except DoesNotFit as error:
        if not dry:
            raise
        refused, (config, origins) = error, asked
        plan, warnings = resolve(config, origins, replace(machine, memory_bytes=None), corpus, law)
    check_adapters(config)
    notes += warnings + idle_keys(config, origins) + unwanted_effects(config)
    if config.precision.compute == "bf16" and device.type == "cpu":
        notes.append("bf16 products on a CPU are about 100 times slower than fp32")
    check_products_of_batch(config, device)
    notes += products_done_instead(config, device)
    notes += repeated_corpus(config.total_steps() * config.budget.batch_tokens, corpus)
    notes += nobody_to_agree_with(config, world.size) + empty_windows(config, world.size)
    if resume_from is None and resume == "auto" and _has_rows(config.run.folder / "metrics.jsonl"):
        notes.append(
            f"{config.run.folder} has rows of earlier attempts and no checkpoint: the run starts anew"
        )
    notes += short_of_room(config, world.size, 0 if resume_from is None else step_of(resume_from))

    chosen = resume not in ("auto", "never")
    job = Job(
        config, origins, world, device, metas, plan, None, resume_from, chosen, refused, notes, again=again
    )
    if resume_from is not None:
        _note_new_budget(job)
    if resume_from is None or job.replanned:
        job.expected = expected_final_loss(job.plan, job.folder, job.fingerprints, config.logging.eval_split)
    else:
        job.expected = kept_expectation(job.folder)
    if resume_from is not None:
        held = read_state(resume_from)["fingerprints"]
        if held != job.fingerprints:
            raise UserError(
                f"the data of {', '.join(map(str, sources))} is not what {config.run.folder} was trained on "
                f"(fingerprints {_short(job.fingerprints)} and {_short(held)}); give the same data or start a new run"
            )
    return job


def _has_rows(path: Path) -> bool:
    return path.exists() and path.stat().st_size > 0


def _short(fingerprints: list[str]) -> str:
    return ", ".join(fingerprint[:16] for fingerprint in fingerprints)


def _note_new_budget(job: Job) -> None:
    """Where the plan of a resumed run is of another budget: what the laws say of this one, with what is kept."""
    kept, inputs = kept_budget(job.folder), job.plan.inputs
    if kept is None or kept[0] == inputs.tokens:
        return
    job.replanned = True
    job.plan = replace(job.plan, inputs=replace(inputs, settled_at=kept[1]))
    job.notes.append(
        f"the budget is {inputs.tokens:,} tokens instead of {kept[0]:,}: learning rate, weight decay, batch and "
        "warm-up are kept"
    )
    job.notes += job.plan.warnings


def write_environment(job: Job, attempt: int) -> None:
    """environment.json: versions, machine, and every note of what was done instead of what was asked."""
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    if job.config.parallel.backend == "zero":
        versions["deepspeed"] = importlib.metadata.version("deepspeed")
    content = {
        "attempt": attempt,
        "versions": versions,
        "host": platform.node(),
        "platform": platform.platform(),
        "cpus": os.cpu_count(),
        "world_size": job.world.size,
        "device": torch.cuda.get_device_name(job.device) if job.device.type == "cuda" else "cpu",
        "notes": job.notes,
        "products": job.products,
    }
    write_whole(job.folder / "environment.json", json.dumps(content, indent=2) + "\n")
