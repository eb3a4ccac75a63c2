"""`make quickstart`: from the Python library's source files to a trained model, with the program's own commands."""

import json
import os
import subprocess
import sys
import sysconfig
from pathlib import Path

from rich.console import Console
from rich.table import Table

from stepline.trainer.config_io import load_config, read_run_config
from stepline.trainer.errors import USER_ERROR, UserError
from stepline.trainer.watch.curve import draw_curve
from stepline.trainer.watch.metrics import read_metrics

EXCLUDED = (
    "*/test/*",
    "*/tests/*",
    "*/idle_test/*",
    "*/site-packages/*",
    "*/dist-packages/*",
    "*/__pycache__/*",
)
"""Tests are left out, because distributions differ in how many of them they install."""
PREPARE = ("--vocab-size", "2048", "--val-share", "0.05", "--tune-share", "0.05")


def corpus_arguments() -> list[str]:
    """The arguments of `stepline prepare` that read this Python's standard library."""
    excludes = [part for pattern in EXCLUDED for part in ("--exclude", pattern)]
    return [sysconfig.get_paths()["stdlib"], *excludes, *PREPARE]


def launcher() -> list[str]:
    """torchrun on every GPU, or on two CPU processes."""
    import torch

    ranks = torch.cuda.device_count() if torch.cuda.is_available() else min(2, os.cpu_count() or 1)
    # --standalone picks a free port by itself.
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]


def stepline(*arguments: str, launch: list[str] | None = None, capture: bool = False) -> str:
    """Runs one command of the program; ends the quickstart with its exit code when it fails."""
    command = [*(launch or [sys.executable]), "-m", "stepline.trainer", *arguments]
    result = subprocess.run(command, stdout=subprocess.PIPE if capture else None, text=True, check=False)
    if result.returncode != 0:
        sys.exit(result.returncode)
    return result.stdout or ""


def main() -> None:
    """`quickstart`, its arguments being overrides of the config; says a mistake in one sentence."""
    try:
        quickstart(sys.argv[1:])
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(USER_ERROR)


def quickstart(overrides: list[str]) -> None:
    """Prepares, trains, evaluates, samples and shows a short table, where the overrides say. Raises UserError."""
    config, _ = load_config("quickstart", overrides)
    run, data = config.run.folder, config.data.path
    if data is None:
        raise UserError("the quickstart reads one folder; give data.path instead of data.sources")
    console = Console()
    if not (data / "meta.json").is_file():
        console.rule("1. prepare: the Python standard library's sources")
        stepline("prepare", *corpus_arguments(), "--output", str(data))
    console.rule("2. train")
    stepline("train", "quickstart", *overrides, launch=launcher())
    console.rule("3. evaluate on held-out text, and sample")
    values = json.loads(stepline("eval", str(run), "--data", str(data), "--json", capture=True))
    prompt = "def read_lines(path):\n"
    print(stepline("generate", str(run), "--prompt", prompt, "--max-tokens", "96", capture=True))
    summary(console, run, values)


def summary(console: Console, run: Path, values: dict[str, float]) -> None:
    """The table at the end, and the picture of the loss curve."""
    rows = read_metrics(run / "metrics.jsonl")
    steps = [row for row in rows if row.get("loss") is not None]  # null where a skipped step was NaN
    curve = run / "curve.png"
    draw_curve(run / "metrics.jsonl", curve)
    config = read_run_config(run)
    law = json.loads((run / "plan.json").read_text(encoding="utf-8"))["law"]["name"]
    # A batch of 2,048 tokens is a noisy sample: the end is the mean of the last logged steps.
    last = sum(row["loss"] for row in steps[-10:]) / len(steps[-10:])
    middle = sorted(row["tokens_per_second"] for row in steps)[len(steps) // 2]
    table = Table(show_header=False, title="Quickstart")
    for name, value in (
        ("loss, start → end", f"{steps[0]['loss']:.3f} → {last:.3f} nats per token"),
        ("validation", f"{values['val_bits_per_byte']:.3f} bits per byte (loss {values['val_loss']:.3f})"),
        ("speed", f"{middle:,.0f} tokens/s"),
        (
            "optimizer",
            f"{config.optimizer.name}, lr {config.optimizer.lr:.3g}, "
            f"weight decay {config.optimizer.weight_decay:.3g}",
        ),
        ("batch", f"{config.budget.batch_tokens:,} tokens, {config.total_steps()} steps"),
        ("law", f"{law}: learning rate and batch from N and D"),
        ("run's folder", str(run)),
        ("curve", str(curve)),
    ):
        table.add_row(name, value)
    console.print(table)


if __name__ == "__main__":
    main()
