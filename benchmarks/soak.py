"""Random kills, one after the other, of a run of two ranks below torchrun; nothing may be lost, and how long it takes.

Each kill is a SIGKILL at a random moment to a random rank or to torchrun's agent (then the same command is started
again). At the end every row of metrics.jsonl must be that of a run that was left alone, bitwise, every step once.

    python benchmarks/soak.py DATA [--kills 50] [--seed 0] [--json]

DATA: a folder written by `stepline prepare`. Recovery is the time from the kill to the first new step of the next
attempt.
"""

import argparse
import json
import os
import platform
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

COMPARED = ("step", "tokens", "loss", "lr", "grad_norm", "val_loss", "skipped")
SHAPE = [
    "checkpoint.every=25",
    "checkpoint.ephemeral_minutes=0.02",
    "logging.eval_every=100",
    "logging.eval_windows=16",
    "logging.wandb=off",
]
STEPS_BETWEEN = (10, 60)


def rows(folder: Path) -> list[list]:
    """What of metrics.jsonl must not depend on the kills; complete lines only."""
    try:
        lines = (folder / "metrics.jsonl").read_text().split("\n")[:-1]
    except OSError:
        return []
    return [[json.loads(line).get(key) for key in COMPARED] for line in lines]


def last_step(folder: Path) -> int:
    """The newest logged step, 0 before the first."""
    return max((row[0] for row in rows(folder)), default=0)


def attempts(folder: Path) -> int:
    """How many attempts have opened their logs."""
    return len(list(folder.glob("logs/attempt-*")))


def start(data: Path, folder: Path, steps: int) -> subprocess.Popen:
    """The run's one command."""
    launch = [
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        "--max-restarts",
        "1000",
    ]
    options = [f"data.path={data}", *SHAPE, f"budget.steps={steps}", f"run.folder={folder}"]
    return subprocess.Popen(
        [sys.executable, *launch, "-m", "stepline.trainer", "train", "tiny", *options],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )


def wait(condition, what: str, seconds: float = 300) -> None:
    """Polls; raises RuntimeError when it takes too long."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise RuntimeError(f"{what} did not come in {seconds:.0f} s")
        time.sleep(0.02)


def ranks(agent: int) -> list[int]:
    """Process ids below torchrun's agent."""
    found = subprocess.run(["pgrep", "-P", str(agent)], capture_output=True, text=True, check=False)
    return sorted(int(pid) for pid in found.stdout.split())


def soak(data: Path, kills: int, seed: int) -> dict:
    """Runs the disturbed and the undisturbed run; what was killed and how long each recovery took, in seconds."""
    draw = random.Random(seed)
    gaps = [draw.randint(*STEPS_BETWEEN) for _ in range(kills)]
    steps = sum(gaps) + STEPS_BETWEEN[1] + 20 * kills  # some are made between a target and its kill
    with tempfile.TemporaryDirectory() as folder:
        straight, killed = Path(folder) / "straight", Path(folder) / "killed"
        if start(data, straight, steps).wait() != 0:
            raise RuntimeError("the undisturbed run failed")
        process, target, recoveries = start(data, killed, steps), 0, []
        for gap in gaps:
            target += gap
            wait(lambda: last_step(killed) >= target, f"step {target}")  # noqa: B023
            time.sleep(draw.random() * 0.2)
            who = draw.choice(["rank 0", "rank 1", "agent"])
            below = ranks(process.pid)
            os.kill(process.pid if who == "agent" else below[int(who[-1])], signal.SIGKILL)
            begun, before = time.monotonic(), attempts(killed)
            if who == "agent":
                process.wait()
                process = start(data, killed, steps)
            # The ranks of an agent that was killed make some steps, save and leave: those are not yet a recovery.
            wait(lambda: attempts(killed) > before, f"attempt {before + 1}")  # noqa: B023
            seen = last_step(killed)
            wait(lambda: last_step(killed) > seen, f"the step after {seen}")  # noqa: B023
            recoveries.append((who, round(time.monotonic() - begun, 2)))
            target = max(target, last_step(killed))
        code = process.wait()
        alike = rows(killed) == rows(straight)
    seconds = [s for _, s in recoveries]
    return {
        "kills": kills,
        "seed": seed,
        "steps": steps,
        "exit_code": code,
        "alike": alike,
        "recovery_median_s": statistics.median(seconds),
        "recovery_max_s": max(seconds),
        "recoveries": recoveries,
    }


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", type=Path)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true")
    ask = parser.parse_args()
    result = soak(ask.data.resolve(), ask.kills, ask.seed)
    if ask.json:
        print(json.dumps(result))
    else:
        for who, seconds in result["recoveries"]:
            print(f"{who:8} {seconds:6.2f} s")
        print(
            f"{result['kills']} kills in {result['steps']} steps on {platform.machine()}: "
            f"{'nothing lost' if result['alike'] else 'ROWS DIFFER'}, exit code {result['exit_code']}, recovery "
            f"{result['recovery_median_s']:.1f} s (median), {result['recovery_max_s']:.1f} s (longest)"
        )
    return 0 if result["alike"] and result["exit_code"] == 0 else 1


if __name__ == "__main__":
    sys.exit(main())
