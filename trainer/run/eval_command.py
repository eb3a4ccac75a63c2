"""`stepline eval`: a trained model on prepared data or on text, in one process or on all ranks of torchrun."""

import contextlib
import json
import shutil
import signal
import sys
import tempfile
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from operator import add
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from stepline.comm.gather import gathered
from stepline.comm.mesh import World, build_mesh
from stepline.trainer.config import Config
from stepline.trainer.config_io import read_run_config
from stepline.trainer.data.dataset import check_held_out, load_meta, source_names
from stepline.trainer.data.discover import discover
from stepline.trainer.data.held_out import ValidationLoader
from stepline.trainer.data.prepare import prepare
from stepline.trainer.data.tokenizer import load_tokenizer
from stepline.trainer.errors import USER_ERROR, Unreadable, UserError
from stepline.trainer.run.evaluate import Score, evaluate
from stepline.trainer.run.infer import ALONE, device_for, load_run, must_fit, tokenizer_path
from stepline.trainer.run.manifest import find_checkpoint, run_of
from stepline.trainer.run.start import join, launched_world
from stepline.trainer.run.stored import check_by_all

TOKENS_AT_ONCE = 8192
"""Of a micro-batch."""


@dataclass(frozen=True)
class Source:
    """What one line of the result is about."""

    name: str
    path: Path
    split: str
    text: bool = False
    """Whether `path` is text, all of which is to be tokenised."""


def run_eval(
    path: Path, data: Sequence[Path], splits: Sequence[str], text_key: str, as_json: bool, asked: str = "auto"
) -> None:
    """Evaluates on all ranks, which FSDP2 shards the model over, and prints on rank 0.

    asked: the kind of device, or auto. Raises UserError; where other ranks of a node say the same, SystemExit.
    """
    world = launched_world()
    with _said_once(world):
        checkpoint = find_checkpoint(path, checksums=world.size == 1)
        config = read_run_config(run_of(checkpoint))
        sources = find_sources(config, data, splits)
        device, notes = device_for(asked, world)
        if world.size > 1:
            join(world, device, config.parallel.timeout_s, "--device ")
            checkpoint = _same_checkpoint(checkpoint, world)
    with must_fit(device, "use --device cpu, or more ranks (torchrun), which share the model"):
        scores = score(checkpoint, config, sources, device, world, text_key)
    if world.size > 1:  # after an error the other ranks may be gone
        dist.destroy_process_group()
    if world.rank:
        return
    for note in notes:
        print(f"note: {note}", file=sys.stderr)
    if as_json:
        print(json.dumps({"checkpoint": str(checkpoint), **report(scores)}))
        return
    read = dict.fromkeys("text" if source.text else f"split {source.split}" for source in sources)
    print(f"{checkpoint}, {', '.join(read)}")
    print(table(scores))


def evaluate_run(path: Path, data: Path, split: str = "val") -> dict[str, float]:
    """Loss and bits per byte of a run on one split of a prepared data folder, in this process."""
    checkpoint = find_checkpoint(path)
    config = read_run_config(run_of(checkpoint))
    device, _ = device_for("auto", ALONE)
    (one,) = score(checkpoint, config, find_sources(config, [data], [split]), device, ALONE).values()
    return one.row()


def find_sources(config: Config, data: Sequence[Path], splits: Sequence[str]) -> list[Source]:
    """What is to be evaluated: by default what the run was trained on. Raises UserError for what cannot be.

    data: prepared folders, of which each of `splits` is taken (val where there are none), and files or folders of
    text, taken whole.
    """
    paths = list(dict.fromkeys(data or [source.path for source in config.data.folders()]))
    if not paths:
        raise UserError("the run names no data; give --data a prepared folder, or text")
    sources, asked = [], splits or ["val"]
    for name, path in zip(source_names(paths), paths, strict=True):
        if data and not (path / "meta.json").is_file():
            _check_text(path)
            load_tokenizer(tokenizer_path(config))
            sources.append(Source(name, path, "train", text=True))
            continue
        _check_tokenizer(config, path)
        for split in dict.fromkeys(asked):
            check_held_out([path], [load_meta(path)], split)
            sources.append(Source(name if len(asked) == 1 else f"{name}:{split}", path, split))
    if splits and all(source.text for source in sources):
        raise UserError(
            f"--split {splits[0]} is of prepared folders, and text is taken whole; leave it out, or give --data a "
            "prepared folder"
        )
    return sources


def _check_text(path: Path) -> None:
    """Raises UserError where there is nothing to read."""
    try:
        files = discover([path], ())[0]
    except OSError as error:
        raise Unreadable(error.filename or path, error) from error
    if not any(file.size for file in files):
        raise UserError(f"{path} has no text; give --data files with text, or a prepared folder")


def _check_tokenizer(config: Config, path: Path) -> None:
    """Raises UserError where a prepared folder's tokens are no tokens of the run's model, as far as is known."""
    meta = load_meta(path)
    if meta.vocab_size > config.model.vocab_size:
        raise UserError(
            f"the tokenizer of {path} has {meta.vocab_size} tokens, the model {config.model.vocab_size}; "
            "evaluate on data prepared with the run's tokenizer"
        )
    try:
        own = tokenizer_path(config)
    except UserError:  # of which nothing is known
        return
    if load_tokenizer(own).sha256 != meta.tokenizer_sha256:
        raise UserError(
            f"{path} was prepared with another tokenizer than the run's data; prepare it with --tokenizer "
            f"{own}, or give --data the text itself"
        )


def score(
    checkpoint: Path,
    config: Config,
    sources: Sequence[Source],
    device: torch.device,
    world: World,
    text_key: str = "text",
) -> dict[str, Score]:
    """The score of each source by its name, alike on all ranks; a collective where there are several.

    checkpoint: one whose files have been read and found sound.
    """
    with tokenised(sources, config, world, text_key) as ready:
        mesh = build_mesh(device, world.size, shard=world.size) if world.size > 1 else None
        model, _, _ = load_run(checkpoint, device, mesh, checked=True)
        scores = {}
        for source in ready:
            loader = ValidationLoader(
                source.path,
                source.split,
                seq_len=config.data.seq_len,
                micro_batch=windows_at_once(config),
                rank=world.rank,
                world_size=world.size,
                confine_attention=config.data.confine_attention,
                after_eod=source.text,
            )
            scores[source.name] = evaluate(model, loader, device)
    return scores


def windows_at_once(config: Config) -> int:
    """Of a micro-batch. In FP8 that of the run: activations have one scale for all of it, which the loss depends on."""
    if config.precision.fp8:
        return config.parallel.micro_batch
    return max(1, TOKENS_AT_ONCE // config.data.seq_len)


@contextlib.contextmanager
def tokenised(
    sources: Sequence[Source], config: Config, world: World, text_key: str
) -> Iterator[list[Source]]:
    """The sources, texts as data folders, which one rank of each node prepares with the run's tokenizer; a collective.

    Raises what `_said_once` raises, on all ranks, where a text is not sound. Nothing of them is left after SIGTERM
    either. To be called in the main thread.
    """
    texts = [source for source in sources if source.text]
    if not texts:
        yield list(sources)
        return
    folder = Path(tempfile.gettempdir()) / _gather(f"stepline-eval-{uuid.uuid4().hex}", world)[0]
    places = {source.name: folder / str(i) for i, source in enumerate(texts)}
    before = signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))  # by way of `finally`
    try:
        problem = None
        try:
            for source in texts if world.local_rank == 0 else ():
                prepare(
                    [source.path], places[source.name], tokenizer=tokenizer_path(config), val_share=0.0,
                    text_key=text_key, may_lose=True, progress=sys.stderr.isatty(),
                )  # fmt: skip
        except UserError as error:
            problem = str(error)
        problems = [text for text in _gather(problem, world) if text is not None]
        with _said_once(world):
            if problems:
                raise UserError(problems[0])
        yield [replace(source, path=places[source.name]) if source.text else source for source in sources]
    finally:
        if world.local_rank == 0:
            shutil.rmtree(folder, ignore_errors=True)
        signal.signal(signal.SIGTERM, before)


def _same_checkpoint(found: Path, world: World) -> Path:
    """Rank 0's on all ranks, as a run that is still training makes new ones; its files read and found sound by all of
    them together. Raises UserError."""
    checkpoint = _gather(found, world)[0]
    check_by_all([checkpoint])
    return checkpoint


def _gather(value: Any, world: World) -> list[Any]:
    """Every rank's value."""
    return gathered(value) if world.size > 1 else [value]


@contextlib.contextmanager
def _said_once(world: World) -> Iterator[None]:
    """A mistake that all ranks find is said by one of each node; the others leave in silence."""
    try:
        yield
    except UserError:
        if world.local_rank == 0:
            raise
        sys.exit(USER_ERROR)


def report(scores: dict[str, Score]) -> dict[str, Any]:
    """All sources together, every token and every byte counting once, and each of them by its name."""

    def values(score: Score) -> dict[str, float]:
        return score.row() | {
            "perplexity": score.perplexity, "tokens": score.tokens, "bytes": round(score.bytes)
        }  # fmt: skip

    return values(reduce(add, scores.values())) | {"sources": {n: values(s) for n, s in scores.items()}}


def table(scores: dict[str, Score]) -> str:
    """A line for each source and one for all, where there are several."""
    shown = scores if len(scores) == 1 else scores | {"together": reduce(add, scores.values())}
    width = max(map(len, shown))
    return "\n".join(
        f"{name:{width}}  loss {score.loss:.4f} nats per token, perplexity {score.perplexity:.2f}, "
        f"{score.row()['val_bits_per_byte']:.4f} bits per byte ({score.tokens:,} tokens, {score.bytes:,.0f} bytes)"
        for name, score in shown.items()
    )
