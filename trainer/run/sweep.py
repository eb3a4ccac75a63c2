"""`stepline sweep`: small runs over sizes, budgets, learning rates and batches, for `stepline laws fit`.

Imports no torch; the runs are processes of their own.
"""

import json
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console

from stepline.trainer.config import Config
from stepline.trainer.config_io import Origins, dump, load_config, read_run_config, write_config
from stepline.trainer.data.dataset import Meta, check_held_out, check_windows, load_sources
from stepline.trainer.errors import DONE, FAILED, TO_BE_CONTINUED, UserError
from stepline.trainer.plan.grid import Grid
from stepline.trainer.plan.resolve import config_law
from stepline.trainer.plan.screen import screen
from stepline.trainer.plan.sweep import SweepRun, lay_out
from stepline.trainer.plan.sweep_cost import find_gpus, find_rate, sweep_cost
from stepline.trainer.plan.sweep_show import show
from stepline.trainer.run.slurm import find_sbatch
from stepline.trainer.run.sweep_local import LocalRunner, Report
from stepline.trainer.run.sweep_runs import SweepFolder, check_same, open_sweep, sweep_of, write_whole
from stepline.trainer.run.sweep_slurm import render, submit, write_script

NEVER = 10**9
"""Steps between checkpoints of a run that keeps none but its last."""


@dataclass(frozen=True)
class Request:
    """The command line."""

    config: str | None
    overrides: list[str]
    output: Path
    grid: Grid
    jobs: int | None = None
    """At the same time; None: one on this machine, no limit for a SLURM array."""
    dry_run: bool = False
    only: int | None = None
    """Index of the one run to do."""
    collect: bool = False
    slurm: bool = False
    sbatch_options: str = ""
    print_only: bool = False
    device: str | None = None
    peak_flops: float | None = None
    mfu: float | None = None


def run_sweep(ask: Request, as_json: bool) -> int:
    """Lays out or continues a sweep; returns the exit code. Raises UserError."""
    try:
        return _run_sweep(ask, as_json)
    except BrokenPipeError:  # of the output, not of the folder
        raise
    except OSError as error:
        where = error.filename or ask.output
        raise UserError(f"--output {ask.output}: cannot use {where}: {error.strerror or error}") from None


def check_modes(ask: Request) -> None:
    """Raises UserError for options that ask for two different things at once."""
    given = {
        "--only": ask.only is not None,
        "--collect": ask.collect,
        "--slurm": ask.slurm,
        "--print": ask.print_only,
        "--sbatch": bool(ask.sbatch_options),
        "--dry-run": ask.dry_run,
    }
    pairs = (
        ("--only", "--collect"),
        ("--only", "--slurm"),
        ("--collect", "--slurm"),
        ("--collect", "--dry-run"),
    )
    for one, other in pairs:
        if given[one] and given[other]:
            raise UserError(f"{one} and {other} do not go together; leave one of them out")
    for option in ("--print", "--sbatch"):
        if given[option] and not ask.slurm:
            raise UserError(f"{option} needs --slurm")
    if ask.print_only and ask.dry_run:
        raise UserError(
            "--print and --dry-run do not go together: --print writes the script and submits nothing"
        )


def _run_sweep(ask: Request, as_json: bool) -> int:
    console = screen(stderr=as_json)
    check_modes(ask)
    if ask.jobs is not None and ask.jobs < 1:
        raise UserError(f"--jobs is {ask.jobs}; it must be at least 1")
    if ask.slurm and not (ask.print_only or ask.dry_run):
        find_sbatch()
    sweep, config, new = _open(ask)
    if ask.only is not None and not 0 <= ask.only < len(sweep.runs):
        raise UserError(f"--only is {ask.only}; the sweep has runs 0 to {len(sweep.runs) - 1}")
    if ask.collect:
        if new is not None:
            raise UserError(f"{ask.output} holds no sweep to collect")
        return _summary(sweep, Report(), console, as_json)
    gpus = {} if config.run.device == "cpu" else find_gpus()
    # Not where the runs would be elsewhere: a SLURM array's GPUs are not those of the login node.
    if config.run.device == "cuda" and not (gpus or ask.slurm or ask.dry_run):
        raise UserError("run.device is cuda, but no GPU is found on this machine; set run.device=cpu or auto")
    if 0 < len(gpus) < sweep.ranks and not (ask.slurm or ask.dry_run):
        raise UserError(
            f"a run has {sweep.ranks} ranks (--ranks) and this machine {len(gpus)} GPUs; give fewer ranks, or "
            "run.device=cpu"
        )
    if ask.only is not None:
        if not ask.dry_run:
            if new is not None:
                _write_layout(sweep, config, new)
            return _one(sweep, ask.only, gpus, console, as_json)
        sweep = replace(sweep, runs=(sweep.runs[ask.only],))

    runs, jobs = sweep.missing(), ask.jobs or 1
    threads = threads_of_a_rank(jobs * sweep.ranks)
    rate = find_rate(ask.device, ask.peak_flops, ask.mfu, sweep.ranks, threads, list(gpus.values()))
    cost = sweep_cost(runs, rate, jobs)
    if not (ask.slurm and ask.print_only):
        split, notes = config.logging.eval_split, new.notes if new else ()
        at_once = ask.jobs if ask.slurm else jobs
        show(f"Sweep {sweep.path}", sweep.runs, notes, split, cost, at_once, console, every_run=ask.dry_run)
    if ask.dry_run:
        if as_json:
            print(json.dumps({"runs": [asdict(run) for run in sweep.runs], "cost": asdict(cost)}))
        return DONE
    if new is not None:
        _write_layout(sweep, config, new)
    if ask.slurm and runs:
        return _submit(sweep, runs, ask, console, as_json)
    runner = LocalRunner(sweep, jobs=jobs, threads=threads, gpus=gpus, rate=rate, say=_line(console))
    return _summary(sweep, runner.do(runs), console, as_json)


def _line(console: Console) -> Callable[[str], None]:
    return lambda text: console.print(text, markup=False, highlight=False, soft_wrap=True)


def threads_of_a_rank(ranks: int) -> int:
    """This machine's cores divided by the ranks at work; no more than OMP_NUM_THREADS where that is set."""
    cores = int(os.environ.get("SLURM_CPUS_PER_TASK") or len(os.sched_getaffinity(0)))
    asked = os.environ.get("OMP_NUM_THREADS", "")
    return max(1, min(cores // ranks, int(asked) if asked.isdigit() else cores))


def _one(sweep: SweepFolder, index: int, gpus: Iterable[str], console: Console, as_json: bool) -> int:
    """One run: an element of a SLURM array, or by hand."""
    runner = LocalRunner(
        sweep, jobs=1, threads=threads_of_a_rank(sweep.ranks), gpus=gpus, rate=None, say=_line(console)
    )
    run, report = sweep.runs[index], Report()
    if sweep.result(run) is not None:
        _line(console)(f"{run.name} is done")
    else:
        report = runner.do([run])
    if report.elsewhere:
        _line(console)(f"{run.name} is being done by another process")
    if as_json:
        result, failed = sweep.result(run), [reason for _, reason in report.failed]
        told = {"run": run.name, "done": result is not None, "result": result and asdict(result)}
        told |= {"failed": failed[0] if failed else None, "stopped": report.stopped or None}
        print(json.dumps(told | {"elsewhere": bool(report.elsewhere)}))
    return TO_BE_CONTINUED if report.stopped else FAILED if report.failed else DONE


def _submit(
    sweep: SweepFolder, runs: Sequence[SweepRun], ask: Request, console: Console, as_json: bool
) -> int:
    script = render(sweep, runs, ask.jobs, ask.sbatch_options)
    if ask.print_only:
        path = write_script(sweep, script)
        told = {"script": script, "path": str(path), "elements": len(runs), "job": None}
        print(json.dumps(told) + "\n" if as_json else script, end="")
        return DONE
    job = submit(sweep, script)
    if as_json:
        path = sweep.path / "sweep.sbatch"
        print(json.dumps({"script": script, "path": str(path), "elements": len(runs), "job": job}))
    _line(console)(
        f"submitted as job {job}, {len(runs)} elements; afterwards: stepline sweep --output {sweep.path} --collect"
    )
    return DONE


@dataclass(frozen=True)
class _New:
    """What is known of a sweep that is being laid out."""

    content: dict[str, Any]
    """Of sweep.json."""
    origins: Origins
    notes: tuple[str, ...]


def _open(ask: Request) -> tuple[SweepFolder, Config, _New | None]:
    """The sweep of the folder, or a new one; raises UserError."""
    saved = open_sweep(ask.output)
    if ask.config is None:
        if saved is None:
            raise UserError(f"{ask.output} holds no sweep to continue; give a CONFIG")
        if ask.grid != Grid():
            raise UserError(
                "options of the grid need a CONFIG; without one a sweep goes on as it was laid out"
            )
        return saved, read_run_config(ask.output), None
    if saved is None and ask.output.exists() and (not ask.output.is_dir() or any(ask.output.iterdir())):
        raise UserError(f"{ask.output} exists and holds no sweep; choose another --output")
    config, origins = load_config(ask.config, ask.overrides)
    if origins["run.folder"] != "default":
        raise UserError("run.folder has no place in a sweep, whose runs are in DIR/runs; leave it out")
    metas = load_sources([source.path for source in config.data.folders()], config.model.vocab_size)
    law = config_law(config)
    _settle(config, origins, metas)
    corpus = sum(meta.splits["train"].tokens for meta in metas)
    held_out = sum(meta.splits[config.logging.eval_split].tokens for meta in metas)
    layout = lay_out(config, ask.grid, law, corpus, held_out)
    for key in ("tokens", "steps"):  # each run sets its own
        setattr(config.budget, key, None)
    content = {
        "config": dump(config),
        "data": [meta.fingerprint for meta in metas],
        "ranks": ask.grid.ranks,
        "runs": [asdict(run) for run in layout.runs],
    }
    if saved is not None:
        check_same(ask.output, content)
        return saved, config, None
    for run in layout.runs:
        load_config(ask.config, [*ask.overrides, "budget.steps=null", *run.overrides()])  # raises UserError
    return sweep_of(ask.output, content), config, _New(content, origins, layout.notes)


def _settle(config: Config, origins: Origins, metas: list[Meta]) -> None:
    """What all runs of a sweep have in common, in place: no wandb, one validation and one checkpoint, at the end.

    They are compared on the tune split where the data has one: nothing is chosen on validation text.
    """

    def held_out(split: str) -> bool:
        return all(split in meta.splits and meta.splits[split].tokens > 1 for meta in metas)

    values: dict[tuple[str, str], Any] = {("logging", "wandb"): "off", ("logging", "eval_every"): 0}
    if origins["logging.eval_split"] == "default" and held_out("tune"):
        values["logging", "eval_split"] = "tune"
    if config.checkpoint.every == "auto":
        values["checkpoint", "every"] = NEVER
    for (section, key), value in values.items():
        setattr(getattr(config, section), key, value)
        origins[f"{section}.{key}"] = "sweep"
    sources = [source.path for source in config.data.folders()]
    check_held_out(sources, metas, config.logging.eval_split)
    check_windows(sources, metas, config.data.seq_len)
    config.run.folder = None


def _write_layout(sweep: SweepFolder, config: Config, new: _New) -> None:
    sweep.path.mkdir(parents=True, exist_ok=True)
    write_config(config, new.origins, sweep.config)
    write_whole(sweep.path / "sweep.json", json.dumps(new.content, indent=1) + "\n")
    sweep.write_csv()


def _summary(sweep: SweepFolder, report: Report, console: Console, as_json: bool) -> int:
    """Gathers runs.csv, says how it stands and how to go on; the exit code."""
    sweep.record_ended()
    say, count = _line(console), sweep.write_csv()
    missing = len(sweep.runs) - count
    results = [result for run in sweep.runs if (result := sweep.result(run)) is not None]
    diverged = sum(result.diverged for result in results)
    table = sweep.path / "runs.csv"
    say(f"{table}: {count} of {len(sweep.runs)} runs, {diverged} of them diverged")
    for run, reason in report.failed:
        say(f"failed: {run.name}: {reason} (see {sweep.folder(run) / 'output.log'})")
    if missing:
        why = f"stopped by {report.stopped}, " if report.stopped else ""
        why += f"{missing} {'run is' if missing == 1 else 'runs are'} missing"
        if report.elsewhere:
            why += f" ({len(report.elsewhere)} being done by another process)"
        say(f"{why}; go on with: stepline sweep --output {sweep.path}")
    if as_json:
        failed = [run.name for run, _ in report.failed]
        told = {"csv": str(table), "runs": len(sweep.runs), "done": count, "diverged": diverged}
        print(json.dumps(told | {"failed": failed, "stopped": report.stopped or None}))
    if report.failed and not report.stopped:
        return FAILED
    return TO_BE_CONTINUED if report.stopped or (missing and report.elsewhere) else DONE
