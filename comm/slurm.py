"""Ranks that srun starts without torchrun: each of a step's tasks is one."""

import os
import re
import subprocess
from pathlib import Path

TASKS = "SLURM_STEP_NUM_TASKS"
"""Only a job step has it; a batch script has SLURM_PROCID too, but is no rank."""


def is_rank() -> bool:
    """Whether this process is one of several tasks of a step, and no other launcher has made it a rank."""
    own = all(os.environ.get(name, "").isdigit() for name in (TASKS, "SLURM_PROCID", "SLURM_LOCALID"))
    return own and "RANK" not in os.environ and "WORLD_SIZE" not in os.environ and int(os.environ[TASKS]) > 1


def neighbours() -> list[int] | None:
    """The processes of the first task of this rank's node, as far as they can be seen; None for that task, and where
    srun has started no ranks."""
    if not is_rank() or int(os.environ["SLURM_LOCALID"]) == 0:
        return None
    return [int(path.name) for path in Path("/proc").glob("[0-9]*") if is_first_of_node(int(path.name))]


def is_first_of_node(process: int) -> bool:
    """Whether a process is there and of the first task of this one's node, by what it was started with."""
    step = ("SLURM_JOB_ID", "SLURM_STEP_ID", "SLURM_NODEID", TASKS)
    same = {f"{name}={os.environ[name]}".encode() for name in step if name in os.environ}
    try:
        return same | {b"SLURM_LOCALID=0"} <= set(Path(f"/proc/{process}/environ").read_bytes().split(b"\0"))
    except OSError:  # gone, or of another user
        return False


def gave_gpus_to_tasks(visible: int, tasks: int) -> bool:
    """Whether each of a node's tasks, and no torchrun within one, has GPUs of its own: by `--gpus-per-task`, or where
    the node has as many for every task as this one sees (`--gpu-bind`, `--ntasks-per-gpu`). Where it has not, tasks
    see the same ones, as by a CUDA_VISIBLE_DEVICES of the user's."""
    if TASKS not in os.environ or "TORCHELASTIC_RUN_ID" in os.environ:
        return False
    of_node = os.environ.get("SLURM_GPUS_ON_NODE", "")
    bound = of_node.isdigit() and visible * tasks <= int(of_node)
    return bound or "SLURM_GPUS_PER_TASK" in os.environ


def torchrun_variables() -> dict[str, str]:
    """What torchrun would have set. Raises ValueError where SLURM does not tell where the ranks meet."""
    of_nodes = tasks_of_nodes(os.environ.get("SLURM_STEP_TASKS_PER_NODE", os.environ[TASKS]))
    variables = {
        "RANK": os.environ["SLURM_PROCID"],
        "WORLD_SIZE": os.environ[TASKS],
        "LOCAL_RANK": os.environ["SLURM_LOCALID"],
        "LOCAL_WORLD_SIZE": str(of_nodes[int(os.environ.get("SLURM_NODEID", 0))]),
    }
    if "MASTER_ADDR" not in os.environ:
        variables["MASTER_ADDR"] = _first_node()
    if "MASTER_PORT" not in os.environ:  # of the step's own, below those that systems hand out
        step = int(os.environ.get("SLURM_JOB_ID", 0)) + int(os.environ.get("SLURM_STEP_ID", 0))
        variables["MASTER_PORT"] = str(10_000 + step % 20_000)
    return variables


def tasks_of_nodes(text: str) -> list[int]:
    """SLURM's short form written out: `2(x3),1` is [2, 2, 2, 1]."""
    found = re.findall(r"(\d+)(?:\(x(\d+)\))?", text)
    return [int(tasks) for tasks, times in found for _ in range(int(times or 1))]


def _first_node() -> str:
    """The address of the step's first node, whose name need not be one that the nodes can look up."""
    try:
        name = _scontrol("hostnames", os.environ["SLURM_STEP_NODELIST"]).split()[0]
        return re.search(r"NodeAddr=(\S+)", _scontrol("node", name))[1]
    except (OSError, subprocess.SubprocessError, LookupError, TypeError) as error:
        raise ValueError(
            f"SLURM does not say where the step's first node is ({error}); set MASTER_ADDR"
        ) from error


def _scontrol(what: str, name: str) -> str:
    command = ["scontrol", "show", what, name]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout
