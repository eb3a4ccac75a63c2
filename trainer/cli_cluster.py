"""The commands of clusters and machines: `stepline submit` and `stepline doctor`."""

import os
from typing import Annotated

import typer

from stepline.trainer.cli_options import Json, Overrides


def submit(
    config: Annotated[str, typer.Argument(help="YAML file, or the name of a shipped config.")],
    overrides: Overrides = None,
    nodes: Annotated[int, typer.Option(help="Nodes of the job.")] = 1,
    gpus_per_node: Annotated[
        int | None, typer.Option(help="GPUs, and ranks, of each node; 0: CPUs. \\[default: 8]")
    ] = None,
    ranks_per_node: Annotated[
        int | None, typer.Option(help="Ranks of each node where there are no GPUs.")
    ] = None,
    cpus_per_rank: Annotated[
        int | None, typer.Option(help="CPUs of each rank. \\[default: 4 with a GPU, else 1]")
    ] = None,
    time: Annotated[str, typer.Option(help="Time limit of one attempt, as sbatch takes it.")] = "24:00:00",
    lead: Annotated[
        int, typer.Option(help="Seconds before the time limit at which the run saves and is requeued.")
    ] = 300,
    resume: Annotated[
        str,
        typer.Option(
            help="auto, never, or a checkpoint of the run, which counts in the job's first attempt."
        ),
    ] = "auto",
    sbatch: Annotated[
        str, typer.Option(help="More options for sbatch, e.g. '--partition=gpu --account=mine'.")
    ] = "",
    print_only: Annotated[bool, typer.Option("--print", help="Print the script, submit nothing.")] = False,
    as_json: Json = False,
) -> None:
    """Train as a SLURM job that saves and requeues itself at its time limit or a preemption.

    Example: stepline submit dense-1b data.path=data/mine --nodes 4 --gpus-per-node 8 --time 12:00:00
    """
    from stepline.trainer.run.submit import Request, run_submit

    run_submit(
        Request(
            config, overrides or [], nodes, gpus_per_node, ranks_per_node, time, sbatch, print_only,
            cpus_per_rank, lead, resume,
        ),
        as_json,
    )  # fmt: skip


def doctor(
    folder: Annotated[str, typer.Option(help="Where runs are kept: its disk is looked at.")] = "runs",
    thorough: Annotated[bool, typer.Option(help="Try torch.compile as well (half a minute).")] = False,
    timeout: Annotated[
        float, typer.Option(help="Seconds that one rank waits for another.", min=1, max=31_536_000)
    ] = 60.0,
    as_json: Json = False,
) -> None:
    """What this machine can do, what will not work and why; under torchrun an all-reduce between the ranks too.

    Exit code 0 when a training works here, 1 when something that it needs is broken.

    Example: torchrun --nproc-per-node 8 -m stepline.trainer doctor
    """
    # What torch's C++ side would print at length comes as one sentence; torch reads this when it is imported.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "FATAL")
    from stepline.trainer.run.doctor import run_doctor

    raise typer.Exit(run_doctor(folder, as_json, thorough, timeout))
