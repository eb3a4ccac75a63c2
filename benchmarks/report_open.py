"""How long a report of ten runs of 100,000 steps takes: to be written, and to be open in a browser.

The runs are made up: rows as `stepline train` writes them, a row a step, noise around the curves of a run, spikes, five
of the runs mixtures of 8 layers of 16 experts. `stepline report` is a process of its own. A headless Chromium opens the
file; the page says when all of its plots are on the screen (`data-ready`: performance.now() after their frame).

    python benchmarks/report_open.py [--runs N] [--steps N] [--opens N]

Writes runs/report_open/{run-*/,report.html} and prints a table.
"""

import argparse
import importlib.util
import json
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

from stepline.trainer.config_io import dump, format_config, load_config

ROOT = Path(__file__).resolve().parent.parent
WINDOWS = {"desktop, 1280 x 900": (1280, 900), "phone, 390 x 844": (390, 844)}
BATCH, LAYERS, EXPERTS = 1024, 8, 16
TARGET_MS = 3000


def make_run(folder: Path, number: int, steps: int) -> None:
    """config.yaml, plan.json and metrics.jsonl of a run that never was."""
    folder.mkdir(parents=True, exist_ok=True)
    draw = np.random.default_rng(number)
    config, origins = load_config("dense-125m", [f"optimizer.lr={0.001 * (number + 1)}", "data.path=data"])
    dump(config)
    (folder / "config.yaml").write_text(format_config(config, origins))
    expected = {"loss": 2.2 + 0.02 * number, "source": "nobody"}
    (folder / "plan.json").write_text(json.dumps({"steps": steps, "expected_final_loss": expected}))
    step = np.arange(1, steps + 1)
    columns = {
        "loss": 2.2 + 9 * step**-0.25 + 0.02 * number + draw.normal(0, 0.05, steps),
        "lr": np.minimum(step / 2000, 1) * (1 - step / steps) * 0.001 * (number + 1),
        "grad_norm": np.exp(draw.normal(-0.5, 0.2, steps)) * np.where(draw.random(steps) < 1e-4, 30, 1),
        "bytes_sent": np.full(steps, 1.25e6),
        "bytes_received": np.full(steps, 1.25e6),
        "flip_rate": 0.02 * (1 - step / steps) + draw.random(steps) * 1e-3,
        "tokens_per_second": draw.normal(2.5e5, 3e3, steps),
        "memory_gb": np.full(steps, 61.2),
        "tflops_per_device": draw.normal(390, 4, steps),
        "mfu": draw.normal(0.39, 0.004, steps),
    }
    if number % 2:
        for key in ("expert_load_max", "router_entropy", "router_z", "router_balance", "router_bias_range"):
            columns[key] = 1 + draw.random(steps)
    values = {key: column.tolist() for key, column in columns.items()}
    loads = np.round(draw.gamma(20, 1 / 20, (997, LAYERS, EXPERTS)), 4).tolist()
    with (folder / "metrics.jsonl").open("w") as file:
        for i in range(steps):
            row = {"step": i + 1, "tokens": (i + 1) * BATCH, "epoch": (i + 1) / steps, "skipped": i // 30_000}
            row |= {key: column[i] for key, column in values.items()}
            if number % 2:
                row["expert_load"] = loads[i % len(loads)]
            file.write(json.dumps(row) + "\n")
            if (i + 1) % 1000 == 0:
                held_out = {"val_loss": row["loss"] + 0.03, "val_bits_per_byte": row["loss"] / 2.9}
                file.write(json.dumps({"step": i + 1, "tokens": row["tokens"]} | held_out) + "\n")


def browser_module():
    """tests/browser.py."""
    spec = importlib.util.spec_from_file_location("stepline_browser", ROOT / "tests" / "browser.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=10)
    parser.add_argument("--steps", type=int, default=100_000)
    parser.add_argument("--opens", type=int, default=5)
    asked = parser.parse_args()
    place = Path("runs/report_open")
    folders = [place / f"run-{number}" for number in range(asked.runs)]
    for number, folder in enumerate(folders):
        make_run(folder, number, asked.steps)
    size = sum((folder / "metrics.jsonl").stat().st_size for folder in folders)
    print(f"{asked.runs} runs of {asked.steps:,} steps, {size / 1e6:,.0f} MB of metrics.jsonl")

    report = place / "report.html"
    command = [
        sys.executable,
        "-m",
        "stepline.trainer",
        "report",
        *map(str, folders),
        "--output",
        str(report),
    ]
    start = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    took = time.perf_counter() - start
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    print(
        f"written in {took:.1f} s, {used.ru_utime + used.ru_stime:.1f} s of them on a CPU; "
        f"{report.stat().st_size / 1e6:.1f} MB; at most {used.ru_maxrss / 1e3:,.0f} MB of memory"
    )

    browsers = browser_module()
    program = browsers.find_browser()
    if program is None:
        sys.exit("no browser is there: install chromium")
    print(subprocess.run([program, "--version"], capture_output=True, text=True, check=True).stdout.strip())
    for name, (width, height) in WINDOWS.items():
        times = []
        for _ in range(asked.opens):
            browser = browsers.Browser(program)
            browser.open(report, width, height)
            times.append(int(browser.wait("document.documentElement.dataset.ready")))
            plots = browser.value("document.querySelectorAll('[data-drawn]').length")
            browser.close()
        median = statistics.median(times)
        print(
            f"{name}: {plots} plots drawn after {median:.0f} ms ({min(times)} to {max(times)}), target {TARGET_MS}"
        )


if __name__ == "__main__":
    main()
