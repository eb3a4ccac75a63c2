"""The commands between runs and folders of Hugging Face: `stepline export` and `stepline import`."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from stepline.trainer.cli_options import Json
from stepline.trainer.errors import UserError

UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9}


def export(
    run: Annotated[Path, typer.Argument(help="A run's folder or one of its checkpoints.")],
    output: Annotated[Path, typer.Option(help="Folder to write; must be new or empty.")],
    dtype: Annotated[
        str, typer.Option(help="fp32, the weights bit for bit; or bf16, half as large.")
    ] = "fp32",
    shard_size: Annotated[str, typer.Option(help="Largest size of one file of weights, e.g. 5GB.")] = "5GB",
    as_json: Json = False,
) -> None:
    """Write a trained model as a folder that `transformers` loads.

    Models that transformers has (Llama, Qwen3, Qwen3-MoE, Mixtral) need nothing of Stepline; others bring modelling
    code along, which `trust_remote_code=True` loads.

    Example: stepline export runs/mine --output hf/mine --dtype bf16
    """
    if dtype not in ("fp32", "bf16"):
        raise UserError(f"--dtype is {dtype!r}; it must be 'fp32' or 'bf16'")
    limit = _size(shard_size)
    from stepline.trainer.hf.export import export_run

    done = export_run(run, output, dtype, limit)
    if as_json:
        print(json.dumps(asdict(done) | {"folder": str(done.folder)}))
        return
    for note in done.notes:
        print(f"note: {note}")
    code = ", to be loaded with trust_remote_code=True" if done.remote_code else ""
    print(
        f"{done.architecture}, {done.bytes / 1e9:.3g} GB in {done.shards} files{code}, written to {done.folder}"
    )


def import_folder(
    folder: Annotated[Path, typer.Argument(help="Hugging Face folder: config.json and safetensors files.")],
    output: Annotated[Path, typer.Option(help="Run's folder to write; must be new or empty.")],
    as_json: Json = False,
) -> None:
    """Make a run of a Hugging Face folder, from whose weights training goes on.

    Llama, Qwen3, Qwen3-MoE, Mixtral, and what `stepline export` wrote. No code of the folder runs.

    Example: stepline import hf/Qwen3-0.6B --output runs/qwen3
    """
    from stepline.trainer.hf.importing import import_model

    done = import_model(folder, output)
    if as_json:
        print(json.dumps(asdict(done) | {"run": str(done.run)}))
        return
    for note in done.notes:
        print(f"note: {note}")
    print(f"{done.architecture}, {done.parameters:,} parameters, written to {done.run}")
    print("Prepare text with its tokenizer, and train on:")
    for line in done.next:
        print(f"  {line}")


def _size(text: str) -> int:
    """`5GB`, `500MB` in bytes."""
    number, unit = text[:-2], text[-2:].upper()
    try:
        size = int(float(number) * UNITS[unit])
    except (KeyError, ValueError):
        size = 0
    if size <= 0:
        raise UserError(f"--shard-size is {text!r}; write a number with KB, MB or GB, such as 5GB")
    return size
