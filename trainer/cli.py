"""The commands. Each imports what it needs when it runs, so that `--help` answers at once."""

import json
import os
import sys
import traceback
from pathlib import Path
from typing import Annotated

import typer

from stepline.comm import slurm
from stepline.trainer.cli_cluster import doctor, submit
from stepline.trainer.cli_hf import export, import_folder
from stepline.trainer.cli_laws import laws_app, sweep
from stepline.trainer.cli_options import Device, Json, Overrides
from stepline.trainer.cli_report import report
from stepline.trainer.cli_usage import UsageError, usage_sentence
from stepline.trainer.errors import USER_ERROR, UserError, mistake_of, speaks

app = typer.Typer(
    name="stepline",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    help="Pre-train transformer language models from two numbers, N (parameters) and D (tokens).",
    epilog="Example: stepline prepare corpus/ --output data/mine; stepline train quickstart data.path=data/mine",
)


def _version(value: bool) -> None:
    if value:
        from importlib.metadata import version

        print(version("stepline"))
        raise typer.Exit()


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None: ...


@app.command()
def plan(
    config: Annotated[str | None, typer.Argument(help="YAML file, or the name of a shipped config.")] = None,
    overrides: Overrides = None,
    params: Annotated[float | None, typer.Option(help="N: non-embedding linear weights, e.g. 1.1e9.")] = None,
    tokens: Annotated[float | None, typer.Option(help="D: training tokens, e.g. 1e11.")] = None,
    active_params: Annotated[
        float | None, typer.Option(help="Mixture of experts: linear weights that one token uses.")
    ] = None,
    seq_len: Annotated[int | None, typer.Option(help="Tokens per window.")] = None,
    world_size: Annotated[int | None, typer.Option(help="GPUs (data-parallel ranks).")] = None,
    micro_batch: Annotated[
        int | None, typer.Option(help="Windows of one forward-backward on one rank.")
    ] = None,
    law: Annotated[
        str | None, typer.Option(help="law.json of `stepline laws fit`, or a shipped law.")
    ] = None,
    device: Annotated[
        str | None, typer.Option(help="GPU whose peak gives time and GPU-hours, e.g. H200.")
    ] = None,
    peak_flops: Annotated[float | None, typer.Option(help="The same by its dense bf16 FLOP/s.")] = None,
    mfu: Annotated[float | None, typer.Option(help="Measured MFU; 0.4 is assumed otherwise.")] = None,
    link_mbit: Annotated[
        float | None,
        typer.Option(help="Mbit/s between replicas: which parallel.sync suits (needs a config)."),
    ] = None,
    replicas: Annotated[int | None, typer.Option(help="Replicas that the link joins.")] = None,
    as_json: Json = False,
) -> None:
    """Learning rate, weight decay and batch size from N and D, and why.

    Example: stepline plan --params 1.1e9 --tokens 1e11 --seq-len 4096 --world-size 64 --micro-batch 4 --device H200
    """
    from stepline.trainer.plan.command import Request, run_plan

    run_plan(
        Request(
            config, overrides or [], params, tokens, active_params, seq_len, world_size, micro_batch, law,
            device, peak_flops, mfu, link_mbit, replicas,
        ),
        as_json,
    )  # fmt: skip


@app.command()
def prepare(
    inputs: Annotated[
        list[Path], typer.Argument(help="Files and folders: .txt, .py, …, .jsonl[.gz|.zst], .parquet.")
    ],
    output: Annotated[Path, typer.Option(help="Folder to write; must not exist.")],
    tokenizer: Annotated[
        Path | None, typer.Option(help="sentencepiece .model, tokenizer.json or Hugging Face folder.")
    ] = None,
    vocab_size: Annotated[
        int | None, typer.Option(help="Size of a newly trained tokenizer. \\[default: 32000]", min=260)
    ] = None,
    workers: Annotated[int | None, typer.Option(help="Processes; default: one per core.", min=1)] = None,
    exclude: Annotated[
        list[str], typer.Option(help="Glob of paths to leave out, e.g. '*/tests/*'; repeatable.")
    ] = [],  # noqa: B006
    text_key: Annotated[str, typer.Option(help="Field of .jsonl and .parquet rows with the text.")] = "text",
    val_share: Annotated[
        float, typer.Option(help="Share of the documents held out for validation.", min=0, max=0.5)
    ] = 0.01,
    tune_share: Annotated[float, typer.Option(help="Share held out for tuning.", min=0, max=0.5)] = 0.0,
    as_json: Json = False,
) -> None:
    """Turn text into tokenised, memory-mapped shards.

    Example: stepline prepare corpus/ more.jsonl.zst --output data/mine --vocab-size 32000
    """
    from stepline.trainer.data.prepare import prepare as run

    meta = run(
        inputs,
        output,
        tokenizer=tokenizer,
        vocab_size=vocab_size,
        workers=workers,
        exclude=exclude,
        text_key=text_key,
        val_share=val_share,
        tune_share=tune_share,
    )
    if as_json:
        print(json.dumps(meta))
        return
    for name, split in meta["splits"].items():
        print(
            f"{name:6} {split['documents']:>12,} documents {split['tokens']:>16,} tokens {split['bytes']:>16,} bytes"
        )
    print(f"written to {output}")


@app.command()
def train(
    config: Annotated[str, typer.Argument(help="YAML file, or the name of a shipped config.")],
    overrides: Overrides = None,
    resume: Annotated[str, typer.Option(help="auto, never, or a checkpoint of the run.")] = "auto",
    dry_run: Annotated[bool, typer.Option(help="Resolve and print the config, then stop.")] = False,
) -> None:
    """Train a model: one process, or every rank under torchrun.

    Example: torchrun --nproc-per-node 8 -m stepline.trainer train configs/dense-1b.yaml data.path=data/mine
    """
    from stepline.trainer.run.signals import StopSignal

    # before torch, which takes seconds to import
    stop, neighbours = None if dry_run else StopSignal.install(), slurm.neighbours()
    from stepline.trainer.config_io import load_config

    try:  # so that a mistake in it is told at once, not after torch's import
        load_config(config, overrides or [])
    except (UserError, OSError) as error:
        mistake = mistake_of(error)
        if not dry_run and speaks():
            from stepline.trainer.run.refusal import note_refusal

            note_refusal(config, overrides or [], mistake)
        raise mistake from error
    from stepline.trainer.run.launch import dry_run as show
    from stepline.trainer.run.launch import run_training

    if dry_run:
        raise typer.Exit(show(config, overrides or [], resume))
    try:
        code = run_training(config, overrides or [], resume, stop, neighbours)
    except Exception:
        traceback.print_exc()
        code = 1
    # At once: what waits for ranks that are gone would wait on, and torch's threads, on their way out with the
    # interpreter, have aborted a run that was done.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


app.command()(sweep)
app.command()(submit)
app.command()(doctor)
app.command()(export)
app.command(name="import")(import_folder)
app.command()(report)


@app.command(name="eval")
def evaluate(
    run: Annotated[Path, typer.Argument(help="A run's folder or one of its checkpoints.")],
    data: Annotated[
        list[Path],
        typer.Option(
            help="Prepared folder, or text as `prepare` takes it; repeatable. Default: the run's data."
        ),
    ] = [],  # noqa: B006
    split: Annotated[
        list[str] | None,
        typer.Option(help="Of prepared folders: val, tune or train; repeatable. \\[default: val]"),
    ] = None,
    text_key: Annotated[str, typer.Option(help="Field of .jsonl and .parquet rows with the text.")] = "text",
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Loss, perplexity and bits per byte of a trained model, for each source of text and together.

    Under torchrun the ranks share the text and the model.

    Example: stepline eval runs/mine --data data/mine --data notes.txt
    """
    from stepline.trainer.run.eval_command import run_eval

    run_eval(run, data, split or [], text_key, as_json, device)


@app.command()
def generate(
    run: Annotated[Path, typer.Argument(help="A run's folder or one of its checkpoints.")],
    prompt: Annotated[str, typer.Option(help="Text to continue.")],
    max_tokens: Annotated[int, typer.Option(help="Most tokens to add.", min=1)] = 128,
    temperature: Annotated[float, typer.Option(help="0: always the likeliest token.")] = 0.8,
    top_p: Annotated[float, typer.Option(help="Draw from the likeliest tokens up to this mass.")] = 0.95,
    seed: Annotated[int, typer.Option(help="Seed of the draws, 0 or more.")] = 0,
    device: Device = "auto",
) -> None:
    """Continue a text with a trained model.

    Once the text is as long as the windows of the training, the model reads its last half anew and goes on.

    Example: stepline generate runs/mine --prompt "def main("
    """
    from stepline.trainer.run.generate import generate_text

    for piece in generate_text(
        run, prompt, device, max_tokens=max_tokens, temperature=temperature, top_p=top_p, seed=seed
    ):
        print(piece, end="", flush=True)
    print()


app.add_typer(laws_app, name="laws")


OF_ALL_RANKS = ("train", "eval", "doctor")
"""Commands that ranks run together; of others each process has its own arguments, and says its own mistakes."""


def main() -> None:
    """Entry point of `stepline`: a user's mistake is one sentence on standard error, and exit code 2; what ranks find
    before they meet is said by one of each node."""

    def say(problem: object) -> None:
        if speaks() or not (sys.argv[1:2] and sys.argv[1] in OF_ALL_RANKS):
            print(f"error: {problem}", file=sys.stderr)

    try:
        sys.exit(app(standalone_mode=False))
    except UsageError as error:
        # Without arguments a group of commands has already shown its help.
        if type(error).__name__ != "NoArgsIsHelpError":
            say(usage_sentence(error, typer.main.get_command(app), sys.argv[1:]))
    except (UserError, OSError) as error:
        say(mistake_of(error))
    except typer.Abort:  # Ctrl-C, in older versions of typer
        sys.exit(130)
    sys.exit(USER_ERROR)
