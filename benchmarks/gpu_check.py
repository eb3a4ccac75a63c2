"""`make gpu-check`: the GPU tests, the GPU benchmarks, and last a short table of the targets. Needs one CUDA device.

NOT YET RUN ON A GPU.

    python benchmarks/gpu_check.py [--quick] [--only NAME …] [--seconds N] [--output DIR]

--quick: of each benchmark the one or two shapes that a target names; a script or a file of tests that takes longer than
its share, which is said before it starts, is ended, and what it had measured by then counts. --seconds: the share of
all together. --only leaves the others out, `tests` among them.

DIR (default runs/gpu_check) gets results.json, written anew after each task, with what earlier runs of the same kind on
the same device left there, and messages.log, what all of them say, as they say it.

It also runs in a bare checkout, with nothing of it installed: it then links the folders into DIR/site. torch, triton,
numpy, pydantic, PyYAML, typer, rich and packaging must be there, for the tests pytest and hypothesis too.
"""

import argparse
import importlib.util
import json
import os
import re
import signal
import sys
import threading
import time
import tomllib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from children import call, end_all, last_object, reason
from gpu_targets import WHOLE_8B_GIB, line, table, targets

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
PIECES = ("trainer", "models", "comm", "kernels", "configs", "slurm")
LEAST_SECONDS = 15
"""With less left nothing is started."""
TESTS_SECONDS, TEST_FILE_SECONDS, SIDE_BY_SIDE = 140, 130, 6
FIRST, LAST = ("test_sparse", "test_demo", "test_moe", "test_step"), "test_zero"
OUTCOME = re.compile(r"::(?P<name>.+?) (?P<outcome>PASSED|FAILED|ERROR|SKIPPED)\b")
STEP_1B = ("--shape", "1b", "--micro-batch", "8", "--recompute", "none", "--steps", "5")
KEPT = ("--set", "parallel.reshard_after_forward=false")
STEP_8B = ("--shape", "8b", "--micro-batch", "4", "--steps", "3", "--warm-up", "2")
NUMBERS = ("bf16", "fp8", "chosen")
PYTEST = ("-m", "pytest", "-v", "-m", "gpu", "--tb=short", "-p", "no:cacheprovider")
LOOK = """
import json, torch
if torch.cuda.is_available():
    device = torch.cuda.get_device_properties(0)
    print(json.dumps({"device": device.name, "gib": round(device.total_memory / 2**30, 1), "torch": torch.__version__,
                      "cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version()}))
"""


@dataclass(frozen=True)
class Task:
    """A benchmark that prints JSON objects with --json, each more complete than the one before."""

    name: str
    script: str
    quick: tuple[str, ...] | None = ()
    """Its arguments in a quick check; None: not in it."""
    limit: float = 60
    """Seconds of a quick check."""
    full: tuple[str, ...] | None = ()
    """Its arguments otherwise; None: in a quick check alone."""
    least_gib: float = 0
    """Memory of a device that can run it."""


def tasks(gib: float) -> list[Task]:
    """For a device of so much memory."""
    layers = 16 if gib >= WHOLE_8B_GIB else 8
    cut = (*STEP_8B, "--set", f"model.num_layers={layers}")
    fp8 = (*cut, "precision.fp8=true")
    times = ("--time-width", "2048", "--tokens", "16384")
    reversible = ("--depth", "8", "64", "--variant", "RevFFN", "--rounds", "4", *times)
    sparse = ("--models", "8b", "--tokens", "8192", "--no-block", "--no-step", "--numbers", *NUMBERS)
    kernels = ("--models", "8b", "--tokens", "8192", "16384")
    return [
        Task("sparse_kernels", "sparse_kernels.py", kernels, 70),
        Task("step_1b", "gpu_step.py", (*STEP_1B, *KEPT), 75, ("--shape", "125m", "1b", *KEPT)),
        Task("step_8b", "gpu_step.py", STEP_8B, 110, ("--shape", "8b"), WHOLE_8B_GIB),
        Task("step_8b_bf16_cut", "gpu_step.py", cut, 75, cut),
        Task("step_8b_fp8", "gpu_step.py", fp8, 80, fp8),
        Task("sparse_step", "sparse_step.py", sparse, 80, ("--layers-8b", str(layers))),
        Task("moe_step", "moe_step.py", ("--rounds", "3", "--no-other"), 80),
        Task("activation_memory", "activation_memory.py", reversible, 110, times),
        Task("memory", "memory.py", None),
        Task("demo_codec", "demo_codec.py", ("--rounds", "4"), 70),
    ]


class Share:
    """The seconds of a whole check."""

    def __init__(self, seconds: float | None, clock: Callable[[], float] = time.monotonic) -> None:
        self.clock, self.end = clock, None if seconds is None else clock() + seconds

    def of(self, limit: float | None) -> float | None:
        """Seconds that a task of this limit gets, 0 where it cannot start any more; None: as many as it takes."""
        left = None if self.end is None else self.end - self.clock()
        if left is not None and left < LEAST_SECONDS:
            return 0
        return min((n for n in (limit, left) if n is not None), default=None)


class Report:
    """results.json and messages.log in a folder."""

    def __init__(self, folder: Path, device: dict, quick: bool) -> None:
        self.path, self.kind = folder / "results.json", {**device, "quick": quick}
        self.log, self.lock = (folder / "messages.log").open("a", buffering=1), threading.Lock()
        earlier = last_object(self.path.read_text().replace("\n", " ")) if self.path.exists() else {}
        same = all(earlier.get(key) == value for key, value in self.kind.items())
        self.tasks = earlier["tasks"] if same and "tasks" in earlier else {}
        if self.tasks:
            print(f"{self.path} has {', '.join(self.tasks)} of an earlier check", flush=True)

    def message(self, text: str) -> None:
        """Adds a line to the log; threads take turns."""
        with self.lock:
            self.log.write(text if text.endswith("\n") else f"{text}\n")

    def add(self, name: str, found: dict) -> None:
        """Keeps a task's results, and prints its lines of the table."""
        self.tasks[name] = found
        partial = self.path.with_suffix(".partial")
        partial.write_text(json.dumps(self.kind | {"tasks": self.tasks}, indent=1) + "\n")
        partial.replace(self.path)
        for row in targets(self.tasks, name):
            print(line(row), flush=True)


def run(task: Task, quick: bool, share: Share, report: Report, environment: dict[str, str]) -> dict:
    """What the task's script printed last as JSON; `ended`: why it went no further."""
    arguments, limit = (task.quick, task.limit) if quick else (task.full, None)
    seconds = share.of(limit)
    if seconds == 0:
        return {"ended": "no time left"}
    said = f"{task.name}: {task.script} {' '.join(arguments)}"
    print(f"{said}, {seconds:.0f} s at most" if seconds is not None else said, flush=True)
    report.message(f"=== {said}")
    command = [sys.executable, str(HERE / task.script), *arguments, "--json"]
    done = call(command, err=report.message, seconds=seconds, environment=environment, apart=True)
    found = last_object(done.stdout)
    if done.late:
        found["ended"] = f"ended after {seconds:.0f} s"
    elif done.code or not found:
        found["ended"] = reason(done.stderr) or f"exit code {done.code} without a word"
    failed = f", {found['ended']}" if "ended" in found else ""
    print(f"{task.name}: {done.seconds:.0f} s{failed}", flush=True)
    return found


def test_files(folder: Path, quick: bool) -> list[Path]:
    """In the order in which they start; the last takes minutes."""
    names = sorted(path.stem for path in folder.glob("test_*.py"))
    others = [name for name in names if name not in FIRST and name != LAST]
    wanted = [*FIRST, *others, *([] if quick else [LAST])]
    return [folder / f"{name}.py" for name in wanted if name in names]


def run_file(file: Path, limit: float | None, share: Share, report: Report, environment: dict) -> dict:
    """A file of tests in a process of its own, as one illegal access makes all that follows in a process fail."""
    seconds = share.of(limit)
    if seconds == 0:
        return {"ended": "no time left"}

    def say(text: str) -> None:
        report.message(f"{file.stem}: {text}")

    command = [sys.executable, *PYTEST, str(file)]
    done = call(command, say, say, seconds, environment, apart=True)
    outcomes = [OUTCOME.search(text) for text in done.stdout.splitlines()]
    by = {match["name"]: match["outcome"] for match in outcomes if match}
    found = {"seconds": round(done.seconds, 1), "passed": sum(text == "PASSED" for text in by.values())}
    found["failed"] = [name for name, text in by.items() if text in ("FAILED", "ERROR")]
    found["skipped"] = [name for name, text in by.items() if text == "SKIPPED"]
    if done.late:
        found["ended"] = f"ended after {seconds:.0f} s"
    elif done.code and not found["failed"]:
        found["ended"] = reason(done.stderr) or reason(done.stdout) or f"exit code {done.code}"
    return found


def described(name: str, found: dict) -> str:
    """A line about a file of tests."""
    counts = [f"{found['passed']} passed"] if "passed" in found else []
    counts += [f"{len(found[key])} {key}" for key in ("failed", "skipped") if found.get(key)]
    said = f"{name}: {', '.join([*counts, *([found['ended']] if 'ended' in found else [])])}"
    return "\n".join([said, *(f"    FAILED {failed}" for failed in found.get("failed", []))])


def run_tests(folder: Path, quick: bool, share: Share, report: Report, environment: dict) -> bool:
    """Some files side by side, as compilers take most of their time; whether all tests passed."""
    environment = environment | {"CUBLAS_WORKSPACE_CONFIG": ":4096:8"}  # for a test of equal bits
    mine = Share(share.of(TESTS_SECONDS if quick else None), share.clock)
    limit, found = TEST_FILE_SECONDS if quick else None, {}
    report.message("=== tests")
    pool = ThreadPoolExecutor(SIDE_BY_SIDE)
    try:
        files = test_files(folder, quick)
        waiting = {file: pool.submit(run_file, file, limit, mine, report, environment) for file in files}
        for file, future in waiting.items():
            found[file.stem] = future.result()
            print(described(file.stem, found[file.stem]), flush=True)
            report.add("tests", found)
    except BaseException:
        pool.shutdown(wait=False, cancel_futures=True)
        end_all()
        raise
    pool.shutdown()
    return not any(of_file.get("failed") or "ended" in of_file for of_file in found.values())


def linked(site: Path) -> Path:
    """A folder for PYTHONPATH with links to the pieces of stepline, and with what an installation knows of it."""
    (site / "stepline").mkdir(parents=True, exist_ok=True)
    for piece in PIECES:
        link = site / "stepline" / piece
        link.unlink(missing_ok=True)
        link.symlink_to(ROOT / piece, target_is_directory=True)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lines = [f"Requires-Dist: {needed}" for needed in project["dependencies"]]
    lines = ["Metadata-Version: 2.1", "Name: stepline", f"Version: {project['version']}", *lines]
    lines += [f"Requires-Python: {project['requires-python']}", ""]
    information = site / f"stepline-{project['version']}.dist-info"
    information.mkdir(exist_ok=True)
    (information / "METADATA").write_text("\n".join(lines))
    return site


def environment_of(output: Path) -> dict[str, str]:
    """That of the children: their output comes at once, fragments of memory are joined, and stepline is found."""
    found = dict(os.environ)
    names = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")  # the second is the older name
    allocator = next((found[name] for name in names if name in found), "expandable_segments:True")
    found = dict.fromkeys(names, allocator) | {"PYTHONUNBUFFERED": "1"} | found
    if importlib.util.find_spec("stepline") is None:
        site, before = linked(output.resolve() / "site"), found.get("PYTHONPATH")
        found["PYTHONPATH"] = f"{site}{os.pathsep}{before}" if before else str(site)
    return found


def main() -> int:
    """Exit code 0 when the tests pass; the benchmarks report whatever they measure."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--only", nargs="+", choices=["tests", *(task.name for task in tasks(0))])
    parser.add_argument("--seconds", type=float, help="the share of all together")
    parser.add_argument("--output", type=Path, default=Path("runs/gpu_check"))
    args = parser.parse_args()
    share = Share(args.seconds)
    args.output.mkdir(parents=True, exist_ok=True)
    environment = environment_of(args.output)
    looked = call(
        [sys.executable, "-c", LOOK], environment=environment
    )  # this process leaves the device alone
    device = last_object(looked.stdout)
    if not device:
        print("error: make gpu-check needs a CUDA device", file=sys.stderr)
        return 2
    print(", ".join(f"{key} {value}" for key, value in device.items()), flush=True)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that children are ended
    report, passed = Report(args.output, device, args.quick), True
    if not args.only or "tests" in args.only:
        passed = run_tests(ROOT / "tests" / "gpu", args.quick, share, report, environment)
    for task in tasks(device["gib"]):
        asked = (task.quick if args.quick else task.full) is not None
        if asked and (not args.only or task.name in args.only):
            small = device["gib"] < task.least_gib
            why = {"ended": f"needs {task.least_gib} GiB"}
            report.add(task.name, why if small else run(task, args.quick, share, report, environment))
    print(table(targets(report.tasks)), flush=True)
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
