"""`stepline submit`: a run as a SLURM job that saves and requeues itself. Imports no torch."""

import json
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path

from stepline.trainer.config import Config
from stepline.trainer.config_io import Origins, load_config, read_run_config
from stepline.trainer.config_resume import merge_for_resume
from stepline.trainer.data.dataset import load_for_run
from stepline.trainer.errors import UserError
from stepline.trainer.files import write_whole
from stepline.trainer.plan.resolve import Machine, law_of_resumed, resolve
from stepline.trainer.run.folder import check_folder, checkpoint_to_resume
from stepline.trainer.run.manifest import find_checkpoint, step_of
from stepline.trainer.run.slurm import (
    directive,
    fill,
    find_sbatch,
    hand_in,
    log_path,
    option_lines,
    seconds_of,
    template,
)

GPUS, CPUS_OF_A_GPU = 8, 4
LEAST_LEAD_S, MOST_LEAD_S = 10, 65535
HAND_OVER_S = 30
"""Of the time before the limit: for the requeue, after the ranks have saved."""


@dataclass(frozen=True)
class Request:
    """The command line."""

    config: str
    overrides: list[str]
    nodes: int = 1
    gpus_per_node: int | None = None
    """None: GPUS, unless `ranks_per_node` or run.device=cpu asks for CPUs."""
    ranks_per_node: int | None = None
    time: str = "24:00:00"
    sbatch_options: str = ""
    print_only: bool = False
    cpus_per_rank: int | None = None
    lead: int = 300
    """Seconds before the time limit at which the run is told to save."""
    resume: str = "auto"
    """As `stepline train` takes it. A named checkpoint counts in the first attempt; never: the folder holds no run when
    the job is handed in."""


@dataclass(frozen=True)
class Layout:
    """Ranks and devices of each node."""

    gpus: int
    ranks: int
    cpus_per_rank: int


def run_submit(ask: Request, as_json: bool) -> None:
    """Checks the run, writes its batch script and hands it to SLURM, or prints the script. Raises UserError."""
    check_numbers(ask)
    if not ask.print_only:
        find_sbatch()
    config, origins = load_config(ask.config, ask.overrides)
    layout = layout_of(ask, config.run.device)
    run = config.run.folder.absolute()
    check_run(config, origins, layout, ask)
    script = render(ask, layout, run)
    path, job = None, None
    if not ask.print_only:
        path = run / "logs" / "slurm" / "train.sbatch"
        try:
            path.parent.mkdir(parents=True, exist_ok=True)  # SLURM makes no folder for its log
            write_whole(path, script)
        except OSError as error:
            raise UserError(
                f"{path} cannot be written ({error.strerror}); choose another run.folder"
            ) from None
        job = hand_in(path)
    if as_json:
        told = {"job": job, "path": None if path is None else str(path), "run": str(run), "script": script}
        print(json.dumps(told))
    elif job is None:
        print(script, end="")
    else:
        print(f"submitted as job {job}; its log: {path.parent / f'{job}.log'}")


def check_numbers(ask: Request) -> None:
    """Raises UserError for a count or a time that no job can have."""
    for option, value, least in (
        ("--nodes", ask.nodes, 1),
        ("--gpus-per-node", ask.gpus_per_node, 0),
        ("--ranks-per-node", ask.ranks_per_node, 1),
        ("--cpus-per-rank", ask.cpus_per_rank, 1),
        ("--lead", ask.lead, LEAST_LEAD_S),
    ):
        if value is not None and value < least:
            raise UserError(f"{option} is {value}; it must be at least {least}")
    if ask.lead > MOST_LEAD_S:
        raise UserError(f"--lead is {ask.lead}; SLURM allows at most {MOST_LEAD_S} s")
    limit = seconds_of(ask.time)
    if limit is not None and limit <= ask.lead:
        raise UserError(
            f"--time {ask.time} leaves no time before the run saves, {ask.lead} s before the limit; "
            "raise it or lower --lead"
        )


def layout_of(ask: Request, device: str) -> Layout:
    """Ranks and devices of each node; device: run.device of the config. Raises UserError for a contradiction."""
    gpus, ranks = ask.gpus_per_node, ask.ranks_per_node
    if gpus is None:
        gpus = 0 if ranks is not None or device == "cpu" else GPUS
    if gpus and ranks is not None:
        raise UserError("every GPU has one rank; leave --ranks-per-node out, or set --gpus-per-node 0")
    if gpus and device == "cpu":
        raise UserError("run.device is cpu, which needs no GPU; give --ranks-per-node instead")
    if not gpus and device == "cuda":
        raise UserError("run.device is cuda but the job asks for no GPU; give --gpus-per-node")
    return Layout(gpus, gpus or ranks or 1, ask.cpus_per_rank or (CPUS_OF_A_GPU if gpus else 1))


def check_run(config: Config, origins: Origins, layout: Layout, ask: Request) -> None:
    """Raises UserError for what would end the job at its start; looks at files only."""
    folder = config.run.folder
    check_folder(folder)
    (resume_from, _), law = checkpoint_to_resume(folder, ask.resume), None
    if resume_from is not None:
        config, origins = merge_for_resume(read_run_config(folder), config, origins, step_of(resume_from))
        law, _ = law_of_resumed(config)
    elif config.run.init_from is not None:
        find_checkpoint(config.run.init_from, checksums=False)
    sources = [source.path for source in config.data.folders()]
    metas = load_for_run(sources, config.model.vocab_size, config.data.seq_len, config.logging.eval_split)
    corpus = sum(meta.splits["train"].tokens for meta in metas)
    device = "cuda" if layout.gpus else "cpu"
    machine = Machine(ask.nodes * layout.ranks, device, bf16=layout.gpus > 0, node_ranks=layout.ranks)
    resolve(config, origins, machine, corpus, law)


def render(ask: Request, layout: Layout, run: Path) -> str:
    """The batch script; run: the run's folder. Raises UserError for what cannot stand in one."""
    logs, options = run / "logs" / "slurm", option_lines(ask.sbatch_options)
    if layout.gpus:
        options = f"#SBATCH --gpus-per-node={layout.gpus}\n{options}"
    # otherwise a node whose GPUs are gone would train on its CPU
    device = ["run.device=cuda"] if layout.gpus else []
    resume = [] if ask.resume in ("auto", "never") else ["--resume", ask.resume]  # a requeued job must go on
    values = {
        "name": directive(f"stepline-{run.name}"),
        "nodes": ask.nodes,
        "cpus": layout.ranks * layout.cpus_per_rank,
        "time": ask.time,
        "here": directive(Path.cwd()),
        "job_log": log_path(logs, "%j.log"),
        "lead": ask.lead,
        "options": options.strip(),
        "python": shlex.quote(sys.executable),
        "run": shlex.quote(str(run)),
        "logs": shlex.quote(str(logs)),
        "threads": layout.cpus_per_rank,
        "grace": max(ask.lead - HAND_OVER_S, ask.lead // 2),
        "ranks": layout.ranks,
        "command": shlex.join(["train", ask.config, *ask.overrides, *device, *resume]),
    }
    return fill(template("train.sbatch"), values)
