"""`make gpu-check`: the GPU tests, the GPU benchmarks, and last a short table of the targets. Needs one CUDA device.

NOT YET RUN ON A GPU.

    python benchmarks/gpu_check.py [--quick] [--only NAME …] [--output DIR]

--quick: of each benchmark the one or two shapes that a target names; a script that takes longer than its share, which
is said before it starts, is ended. What each script says goes to DIR (default runs/gpu_check), its JSON as NAME.json
and its messages as NAME.log, as soon as it ends. --only leaves the others out, `tests` among them.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
STEP_1B = ("--shape", "1b", "--micro-batch", "8", "--recompute", "none", "--steps", "5")
STEP_8B = ("--shape", "8b", "--micro-batch", "2", "--steps", "3")
FP8_STEP = "8B: FP8 step over bf16 step, tokens/s"


@dataclass(frozen=True)
class Task:
    """A benchmark that prints one JSON object with --json."""

    name: str
    script: str
    quick: tuple[str, ...] | None = ()
    """Its arguments in a quick check; None: not in it."""
    limit: float = 60
    """Seconds of a quick check."""
    full: tuple[str, ...] | None = ()
    """Its arguments otherwise; None: in a quick check alone."""


TASKS = (
    Task("sparse_kernels", "sparse_kernels.py", ("--models", "8b", "--tokens", "8192", "16384"), 90),
    Task("step_1b", "gpu_step.py", STEP_1B, 100, ("--shape", "125m", "1b")),
    Task("step_8b", "gpu_step.py", STEP_8B, 160, ("--shape", "8b")),
    Task("step_8b_fp8", "gpu_step.py", (*STEP_8B, "--set", "precision.fp8=true"), 160, None),
    Task("sparse_step", "sparse_step.py", ("--models", "8b", "--tokens", "8192", "--no-step"), 180),
    Task("moe_step", "moe_step.py", ("--rounds", "3"), 90),
    Task(
        "activation_memory",
        "activation_memory.py",
        ("--depth", "8", "64", "--variant", "RevFFN", "--rounds", "4"),
        120,
    ),
    Task("memory", "memory.py", None),
    Task("demo_codec", "demo_codec.py", ("--rounds", "4"), 120),
)


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    what: str
    measured: float | None
    """None: not measured."""
    target: float
    least: bool = True
    """Whether the target is the least that is wanted, or the most."""
    why: str = ""
    """Why it was not measured."""

    @property
    def met(self) -> str:
        """In a word."""
        if self.measured is None:
            return f"not measured{self.why and f': {self.why}'}"
        return (
            "met"
            if (self.measured >= self.target) == self.least or self.measured == self.target
            else "MISSED"
        )


def targets(found: dict[str, dict]) -> list[Row]:
    """Every target that a GPU has, from the scripts' JSON by the tasks' names; `{"error": why}` where one failed."""
    rows: list[Row] = []
    for names, read in READERS.items():
        texts = [found[name]["error"] for name in names if "error" in found.get(name, {})]
        absent = [name for name in names if name not in found]
        if not texts and not absent:
            try:
                rows += read(*(found[name] for name in names))
            except (LookupError, TypeError, ValueError, ArithmeticError) as error:
                what = f"its JSON is not as expected ({type(error).__name__}: {error})"
                rows.append(Row(", ".join(names), None, float("nan"), why=what))
        elif not absent:
            rows.append(Row(", ".join(names), None, float("nan"), why=texts[0]))
    return rows


def _best(rows: list[dict], shape: str, value: str) -> tuple[float | None, str]:
    """The largest value of a shape, or why there is none."""
    mine = [row for row in rows if row["shape"] == shape]
    values = [row[value] for row in mine if row.get(value) is not None]
    errors = [row["error"] for row in mine if "error" in row]
    return (max(values), "") if values else (None, errors[0] if errors else "the device's peak is unknown")


def _step_1b(result: dict) -> Iterator[Row]:
    mfu, why = _best(result["rows"], "1b", "mfu")
    yield Row("1.3B: MFU", mfu, 0.55, why=why)


def _step_8b(result: dict) -> Iterator[Row]:
    rate, why = _best(result["rows"], "8b", "tokens_per_second")
    yield Row("8B, full recompute: tokens/s", rate, 9800, why=why)


def _fp8_step(plain: dict, fp8: dict) -> Iterator[Row]:
    (slow, why), (fast, why_fp8) = (_best(r["rows"], "8b", "tokens_per_second") for r in (plain, fp8))
    both = slow is not None and fast is not None
    yield Row(FP8_STEP, fast / slow if both else None, 1.25, why=why or why_fp8)


def _sparse_kernels(result: dict) -> Iterator[Row]:
    new = result["cusparselt"] >= 801
    for row in result["products"]:
        if row["model"] == "8b" and row["tokens"] >= 8192:
            what = f"8B {row['rows']} x {row['cols']}, {row['tokens']} tokens: 2:4 over dense FP8"
            gain = None if "refused" in row else row["fp8"] / row["sparse"]
            yield Row(what, gain, 1.5 if new else 1.2, why=row.get("refused", ""))
    for kernels in result["kernels"]:
        copy = kernels["copy"]["gb_per_s"]
        for name in ("threshold + amax", "threshold + cast"):
            yield Row(f"{kernels['model']} {name}: of a copy", kernels[name]["gb_per_s"] / copy, 0.7)


def _sparse_step(result: dict) -> Iterator[Row]:
    new = result["cusparselt"] >= 801
    for row in result["layers"]:
        if row["model"] == "8b":
            ffn = {name: row[name]["ffn"]["both"] for name in ("bf16", "fp8", "chosen")}
            what = f"8B FFN, {row['tokens']} tokens: sparse over"
            yield Row(f"{what} dense FP8", ffn["fp8"] / ffn["chosen"], 1.1 if new else 1.03)
            yield Row(f"{what} bf16", ffn["bf16"] / ffn["chosen"], 1.6)
    for row in result["steps"]:
        if row["model"] == "8b":
            slow, fast = (row[name].get("tokens_per_second") for name in ("bf16", "fp8"))
            why = next((row[name]["error"] for name in ("bf16", "fp8") if "error" in row[name]), "")
            yield Row(FP8_STEP, fast / slow if slow and fast else None, 1.25, why=why)


def _moe_step(result: dict) -> Iterator[Row]:
    yield Row("mixture's tokens/s over dense's", result["to_dense"]["mixture"], 0.75)


def _activation_memory(result: dict) -> Iterator[Row]:
    for ffn in sorted({cell["ffn"] for cell in result["cells"]}):
        mine = {
            cell["depth"]: cell
            for cell in result["cells"]
            if (cell["variant"], cell["ffn"]) == ("RevFFN", ffn)
        }
        ends = [mine[depth]["activations"] - mine[depth]["routing_ids"] for depth in (min(mine), max(mine))]
        yield Row(
            f"RevFFN {ffn}: memory at depth {max(mine)} over {min(mine)}", ends[1] / ends[0], 1.02, False
        )
        equal = all(cell["bit_equal"] for cell in mine.values())
        yield Row(f"RevFFN {ffn}: gradients bit-equal", float(equal), 1)
    for row in result["times"]:
        what = f"RevFFN {row['ffn']}, pair {row['pair']}: step over full recompute"
        yield Row(what, row["wall_over"]["standard, full recompute"], 1.05, False)


def _memory(result: dict) -> Iterator[Row]:
    worst = max((row["ratio"] for row in result["rows"]), key=lambda ratio: abs(ratio - 1))
    yield Row("memory: estimate over measured, farthest off", abs(worst - 1), 0.1, False)


def _demo_codec(result: dict) -> Iterator[Row]:
    rows = result["milliseconds"]
    yield Row(
        "DeMo: encode and decode of a 1.3B step", rows.get("kernels", rows["torch"])["share"], 0.03, False
    )


READERS: dict[tuple[str, ...], Callable[..., Iterator[Row]]] = {
    ("step_1b",): _step_1b,
    ("step_8b",): _step_8b,
    ("step_8b", "step_8b_fp8"): _fp8_step,
    ("sparse_kernels",): _sparse_kernels,
    ("sparse_step",): _sparse_step,
    ("moe_step",): _moe_step,
    ("activation_memory",): _activation_memory,
    ("memory",): _memory,
    ("demo_codec",): _demo_codec,
}


def run(task: Task, quick: bool, output: Path) -> dict:
    """What the task's script printed as JSON, or `{"error": why}`."""
    arguments, limit = (task.quick, task.limit) if quick else (task.full, None)
    command = [sys.executable, str(HERE / task.script), *arguments, "--json"]
    share = f", {limit:g} s at most" if quick else ""
    print(f"{task.script} {' '.join(arguments)}{share}", flush=True)
    begun, why = time.perf_counter(), ""
    with (output / f"{task.name}.json").open("w") as out, (output / f"{task.name}.log").open("w") as log:
        child = subprocess.Popen(command, stdout=out, stderr=log, start_new_session=True)
        try:
            code = child.wait(limit)
        except BaseException as error:
            os.killpg(child.pid, signal.SIGKILL)  # with its own children
            code, why = child.wait(), f"ended after {limit:g} s"
            if not isinstance(error, subprocess.TimeoutExpired):
                raise
    messages = (output / f"{task.name}.log").read_text().strip().splitlines()
    found = {} if why else _last_object((output / f"{task.name}.json").read_text())
    if not found:
        found = {"error": why or (messages[-1] if messages else f"exit code {code} without a word")[:200]}
    failed = f", {found['error']}" if "error" in found else ""
    print(f"{task.name}: {time.perf_counter() - begun:.0f} s{failed}", flush=True)
    return found


def _last_object(text: str) -> dict:
    """The last line that is a JSON object; libraries may print around it."""
    for line in reversed(text.splitlines()):
        try:
            found = json.loads(line)
        except ValueError:
            continue
        if isinstance(found, dict):
            return found
    return {}


def table(rows: list[Row]) -> str:
    """Markdown."""
    lines = ["| target | measured | wanted | |", "|---|---|---|---|"]
    for row in rows:
        value = "" if row.measured is None else f"{row.measured:.4g}"
        wanted = "" if row.target != row.target else f"{'>=' if row.least else '<='} {row.target:g}"
        lines.append(f"| {row.what} | {value} | {wanted} | {row.met} |")
    return "\n".join(lines)


def main() -> int:
    """Exit code 0 when the tests pass; the benchmarks report whatever they measure."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--only", nargs="+", choices=["tests", *(task.name for task in TASKS)])
    parser.add_argument("--output", type=Path, default=Path("runs/gpu_check"))
    args = parser.parse_args()
    import torch

    if not torch.cuda.is_available():
        print("error: make gpu-check needs a CUDA device", file=sys.stderr)
        return 2
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, CUDA {torch.version.cuda}", flush=True)
    args.output.mkdir(parents=True, exist_ok=True)
    code = 0
    if not args.only or "tests" in args.only:
        tests = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", str(HERE.parent / "tests" / "gpu")]
        code = subprocess.run(tests, check=False).returncode
    asked = [task for task in TASKS if not args.only or task.name in args.only]
    found = {
        task.name: run(task, args.quick, args.output)
        for task in asked
        if (task.quick if args.quick else task.full) is not None
    }
    print(table(targets(found)), flush=True)
    return code


if __name__ == "__main__":
    sys.exit(main())
