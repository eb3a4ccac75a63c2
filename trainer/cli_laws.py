"""The commands of scaling laws: `stepline sweep` and `stepline laws`."""

from pathlib import Path
from typing import Annotated

import typer

from stepline.trainer.cli_options import Json, Overrides


def sweep(
    output: Annotated[Path, typer.Option(help="Folder of the sweep; one that was stopped goes on.")],
    config: Annotated[
        str | None, typer.Argument(help="YAML file, or the name of a shipped config; not needed to go on.")
    ] = None,
    overrides: Overrides = None,
    sizes: Annotated[
        str | None, typer.Option(help="Fractions of the config's N. \\[default: 0.25,0.5,1]")
    ] = None,
    widths: Annotated[str | None, typer.Option(help="Hidden sizes instead, at the config's depth.")] = None,
    tokens: Annotated[str | None, typer.Option(help="D of every size, e.g. 3e5,6e5,1.2e6.")] = None,
    tokens_per_param: Annotated[
        str | None, typer.Option(help="D/N of every size instead. \\[default: the config's own x 0.5,1,2]")
    ] = None,
    lr: Annotated[str | None, typer.Option(help="Learning rates, instead of --lr-points.")] = None,
    lr_points: Annotated[int, typer.Option(help="Learning rates in factors of 2 around the law's.")] = 5,
    batch_tokens: Annotated[
        str | None, typer.Option(help="Batches in tokens, instead of --batch-points.")
    ] = None,
    batch_points: Annotated[int, typer.Option(help="Batches in factors of 2 around the law's.")] = 3,
    seeds: Annotated[int, typer.Option(help="Runs of each point, with seeds from run.seed on.")] = 1,
    jobs: Annotated[
        int | None, typer.Option(help="Runs at the same time. \\[default: 1; no limit with --slurm]")
    ] = None,
    ranks: Annotated[int, typer.Option(help="Ranks of each run (torchrun on this machine).")] = 1,
    dry_run: Annotated[bool, typer.Option(help="Print every run and the cost, then stop.")] = False,
    only: Annotated[int | None, typer.Option(help="Do this one run, by its index.")] = None,
    collect: Annotated[bool, typer.Option(help="Gather runs.csv and stop.")] = False,
    slurm: Annotated[bool, typer.Option(help="Submit the missing runs as a SLURM array.")] = False,
    sbatch: Annotated[
        str, typer.Option(help="Options for sbatch, e.g. '--partition=gpu --gpus=1 --time=2:00:00'.")
    ] = "",
    print_only: Annotated[
        bool, typer.Option("--print", help="With --slurm: write and print the script, do not submit it.")
    ] = False,
    device: Annotated[str | None, typer.Option(help="GPU whose peak gives the time, e.g. H200.")] = None,
    peak_flops: Annotated[float | None, typer.Option(help="The same by its dense bf16 FLOP/s.")] = None,
    mfu: Annotated[float | None, typer.Option(help="Measured MFU; 0.4 is assumed otherwise.")] = None,
    as_json: Json = False,
) -> None:
    """Small runs over sizes, budgets, learning rates and batches: runs.csv for `stepline laws fit`.

    Example: stepline sweep quickstart optimizer.lr=auto --tokens 3e5,6e5,1.2e6 --output sweeps/mine --jobs 2
    """
    from stepline.trainer.plan.grid import Grid, numbers
    from stepline.trainer.run.sweep import Request, run_sweep

    grid = Grid(
        numbers(sizes, "--sizes"), numbers(widths, "--widths", whole=True), numbers(tokens, "--tokens"),
        numbers(tokens_per_param, "--tokens-per-param"), numbers(lr, "--lr"), lr_points,
        numbers(batch_tokens, "--batch-tokens"), batch_points, seeds, ranks,
    )  # fmt: skip
    ask = Request(
        config, overrides or [], output, grid, jobs, dry_run, only, collect, slurm, sbatch, print_only, device,
        peak_flops, mfu,
    )  # fmt: skip
    raise typer.Exit(run_sweep(ask, as_json))


laws_app = typer.Typer(
    no_args_is_help=True,
    help="Fit scaling laws to your own runs, and check laws on runs.",
    epilog="Example: stepline laws fit sweeps/mine/runs.csv -o law.json",
)


@laws_app.command(name="fit")
def laws_fit(
    runs: Annotated[str, typer.Argument(help="runs.csv of `stepline sweep`, or the public Step Law data.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="law.json to write.")],
    name: Annotated[str | None, typer.Option(help="Name of the law; default: that of the file.")] = None,
    as_json: Json = False,
) -> None:
    """A law for learning rate, batch and loss from your own runs.

    Example: stepline laws fit sweeps/mine/runs.csv -o law.json
    """
    from stepline.trainer.plan.laws_command import run_fit

    run_fit(runs, output, name, as_json)


@laws_app.command(name="check")
def laws_check(
    law: Annotated[
        str,
        typer.Argument(help="law.json of `stepline laws fit`, step-law (the published one), or quickstart."),
    ],
    runs: Annotated[str, typer.Argument(help="Runs that the law has not seen, in the form of `laws fit`.")],
    as_json: Json = False,
) -> None:
    """What a law's learning rate and batch cost on each cell of a grid of runs: loss above the grid's best.

    Example: stepline laws check law.json holdout.csv
    """
    from stepline.trainer.plan.laws_command import run_check

    run_check(law, runs, as_json)
