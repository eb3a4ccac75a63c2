"""From text to a data folder: find, split, tokenise in parallel, join into shards. Resumable and atomic."""

import errno
import hashlib
import json
import os
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

from stepline.trainer.data.discover import InputFile, discover
from stepline.trainer.data.partial import (
    TOKENIZER_NAME,
    Refused,
    check_ours,
    only_one,
    removed_when_useless,
    start_or_resume,
)
from stepline.trainer.data.parts import SHARD_TOKENS, SPLITS, ShardWriter, token_dtype, write_json
from stepline.trainer.data.pool import WorkerLost, run_pool
from stepline.trainer.data.round_trip import RoundTrip, check_round_trip, samples
from stepline.trainer.data.sources import NULL, ReadOptions
from stepline.trainer.data.tokenizer import Tokenizer, load_tokenizer
from stepline.trainer.data.tokenizer_training import train_tokenizer
from stepline.trainer.data.units import Plan, has_words, large_whole, plan_units, sample_texts
from stepline.trainer.errors import UserError
from stepline.trainer.files import check_no_broken_link

FORMAT = 1
VOCAB_SIZE = 32_000
COMMIT_SECONDS = 2.0


def prepare(
    inputs: Sequence[Path],
    output: Path,
    *,
    tokenizer: Path | None = None,
    vocab_size: int | None = None,
    workers: int | None = None,
    exclude: Sequence[str] = (),
    text_key: str = "text",
    val_share: float = 0.01,
    tune_share: float = 0.0,
    seed: int = 0,
    shard_tokens: int = SHARD_TOKENS,
    may_lose: bool = False,
    progress: bool = True,
) -> dict:
    """Tokenise text files, folders, JSON lines and Parquet into the data folder `output`; returns its meta.

    Without `tokenizer` (a sentencepiece model, a tokenizer.json or a folder with one) a sentencepiece model
    of `vocab_size` pieces (default: VOCAB_SIZE) is trained on the training split. `val_share` and `tune_share`
    are the shares of documents (or of each file's tail, when there are only a few text files) held out as the
    splits `val` and `tune`. `exclude` holds glob patterns for paths; a shard file holds `shard_tokens` at most. With
    `may_lose` a given tokenizer that loses text is noted, not refused.
    The result does not depend on `workers` (default: the CPUs of this process). Everything is built in
    `output.partial`; after a kill the same call goes on there; after an error the folder stays where a part or a
    new tokenizer is done.

    Raises UserError for whatever the user can mend: missing or damaged input, a tokenizer that is none or is given
    together with `vocab_size` or loses text, a full disk, an `output` that exists.
    """
    if tokenizer is not None and vocab_size is not None:
        raise UserError(
            f"--vocab-size {vocab_size} is of a new tokenizer, but --tokenizer gives one; leave out one of the two"
        )
    vocab_size = VOCAB_SIZE if vocab_size is None else vocab_size
    output = Path(output)
    check_no_broken_link(output)
    if output.exists():
        raise UserError(f"{output} exists already; remove it or choose another --output")
    partial = output.with_name(output.name + ".partial")
    for name, share in (("val_share", val_share), ("tune_share", tune_share)):
        if not 0 <= share < 1 or val_share + tune_share >= 1:
            raise UserError(
                f"{name} {share} is out of range; the held-out shares are 0 or more, below 1 together"
            )
    given = load_tokenizer(tokenizer) if tokenizer is not None else None
    options = ReadOptions(
        text_key, val_share, tune_share, seed, whole=given is not None and not given.joinable
    )
    workers = workers if workers is not None else _cpus()
    if workers < 1:
        raise UserError(f"--workers {workers} is out of range; give 1 or more")
    try:
        prepared: list[Path] = []
        files, skipped = discover(inputs, exclude, (output.resolve(), partial.resolve()), prepared)
        if not any(file.size for file in files):
            raise UserError(f"{_names(inputs)} has no text (no documents); give files with text")
        if progress and skipped["binary"]:
            _say(f"left out {skipped['binary']} binary files found in folders")
        if progress and prepared:
            _say(f"left out what an earlier `stepline prepare` wrote: {_names(prepared)}")
        if note := large_whole(files, options):
            _say(note)
        request = _request(files, options, given.sha256 if given else vocab_size, shard_tokens)
        partial.mkdir(parents=True, exist_ok=True)
        check_ours(partial)
        with only_one(partial), removed_when_useless(partial, trains=given is None):
            start_or_resume(partial, request)
            finished = partial / "meta.json"  # from then on nothing is left but to clear up
            if not finished.exists():
                plan = plan_units(files, options)
                if not has_words(plan, options):
                    raise UserError(
                        f"{_names(inputs)} has no text (nothing but white space); give files with text"
                    )
                kept, note = RoundTrip(), None
                if given is not None:
                    sample = samples(plan, options)
                    kept, note = check_round_trip(given, str(tokenizer), sample, refuse=not may_lose)
                if note:
                    _say(note)
                used = _tokenizer(partial, given, plan, options, vocab_size, progress)
                writer = ShardWriter(partial, partial / "parts", token_dtype(used.vocab_size), shard_tokens)
                _encode(plan, writer, workers, partial, options, progress)
                if progress and writer.skipped[NULL]:
                    _say(f"left out {writer.skipped[NULL]:,} rows whose '{text_key}' is null")
                meta = _meta(writer, used, kept, plan, options, inputs, dict(skipped + writer.skipped))
                _check(meta, inputs, options)
                write_json(finished, meta)
            meta = json.loads(finished.read_text(encoding="utf-8"))
            shutil.rmtree(partial / "parts")
            for name in ("joined.json", TOKENIZER_NAME, "lock"):
                (partial / name).unlink(missing_ok=True)
        os.replace(partial, output)
        (output / "request.json").unlink()  # last: while it is there, the same call goes on in `partial`
    except WorkerLost:
        raise UserError(
            f"a worker that wrote to {partial} was killed (out of memory?); "
            "run the same command again, with fewer --workers, to go on"
        ) from None
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise UserError(
                f"{partial}: the disk is full; free some space and run the same command again to go on"
            ) from error
        where = error.filename or f"{_names(inputs)} or {partial}"  # a failed read or write names no file
        raise UserError(f"{where}: {error.strerror or error}; mend that and run the command again") from error
    return meta


def _cpus() -> int:
    """CPUs this process may use (all of them where the system cannot say)."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _names(inputs: Sequence[Path]) -> str:
    return ", ".join(map(str, inputs)) or "the input"


def _say(sentence: str) -> None:
    print(f"prepare: {sentence}", file=sys.stderr, flush=True)


def _request(files: Sequence[InputFile], options: ReadOptions, *rest: str | int) -> str:
    """Hash of everything that a half-done folder must agree on to be gone on with."""
    value = [FORMAT, [asdict(file) for file in files], asdict(options), rest]
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()


def _tokenizer(
    partial: Path, given: Tokenizer | None, plan: Plan, options: ReadOptions, vocab_size: int, progress: bool
) -> Tokenizer:
    """The tokenizer to use, saved in `partial`: the given one, a killed run's, or a newly trained one."""
    saved = partial / TOKENIZER_NAME  # written last
    if saved.exists():
        return load_tokenizer(partial / json.loads(saved.read_text()))
    texts = sample_texts(plan, options)
    used = given or train_tokenizer(_announced(texts, vocab_size) if progress else texts, vocab_size)
    write_json(saved, used.save(partial))
    return used


def _announced(texts: Iterator[str], vocab_size: int) -> Iterator[str]:
    """The texts; when all are read, which is when training begins, standard error says how much they are."""
    size = 0
    for text in texts:
        size += len(text.encode())
        yield text
    _say(
        f"training a tokenizer of {vocab_size:,} tokens on {size / 1e6:,.1f} MB of text; it may take minutes"
    )


def _encode(
    plan: Plan, writer: ShardWriter, workers: int, partial: Path, options: ReadOptions, progress: bool
) -> None:
    """Encode the units that are not done, appending finished ones to the shards in order."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    parts = writer.parts
    todo = [
        (index, unit)
        for index, unit in enumerate(plan.units)
        if index >= writer.next_unit and not (parts / f"{index:08d}.json").exists()
    ]
    tokenizer_path = partial / json.loads((partial / TOKENIZER_NAME).read_text())
    columns = (
        TextColumn("tokenize"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), disable=not progress) as bar:
        missing = sum(plan.weights[index] for index, _ in todo)
        total = sum(plan.weights)
        task = bar.add_task("tokenize", total=total, completed=total - missing)
        committed = time.monotonic()
        for index in run_pool(todo, min(workers, max(1, len(todo))), tokenizer_path, options, parts):
            bar.advance(task, plan.weights[index])
            while writer.ready():
                writer.append()
            if time.monotonic() - committed > COMMIT_SECONDS:
                writer.commit()
                committed = time.monotonic()
        while writer.ready():
            writer.append()
        writer.commit()


def _meta(
    writer: ShardWriter,
    used: Tokenizer,
    kept: RoundTrip,
    plan: Plan,
    options: ReadOptions,
    inputs: Sequence[Path],
    skipped: dict[str, int],
) -> dict:
    """The content of meta.json."""
    rule = {**asdict(options), "rule": plan.rule}
    content = {split: progress.content for split, progress in writer.splits.items()}
    identity = [FORMAT, content, used.sha256, used.vocab_size, used.eod_id, str(writer.dtype), rule]
    splits = {}
    for split in SPLITS:
        splits[split] = asdict(writer.splits[split])
        del splits[split]["content"]
    return {
        "format": FORMAT,
        "fingerprint": hashlib.sha256(json.dumps(identity).encode()).hexdigest(),
        "tokenizer": {
            "kind": used.kind,
            "file": json.loads((writer.folder / TOKENIZER_NAME).read_text()),
            "sha256": used.sha256,
            **asdict(kept),
        },
        "vocab_size": used.vocab_size,
        "eod_id": used.eod_id,
        "dtype": writer.dtype.name,
        "splits": splits,
        "held_out": rule,
        "skipped": skipped,
        "inputs": [str(path) for path in inputs],
    }


def _check(meta: dict, inputs: Sequence[Path], options: ReadOptions) -> None:
    """Refuse a result without training text, or without a split that was asked for."""
    splits = meta["splits"]
    if not any(split["tokens"] for split in splits.values()):
        raise Refused(f"{_names(inputs)} has no text (no documents); give files with text")
    for split, share in (("train", 1.0), ("val", options.val_share), ("tune", options.tune_share)):
        if share > 0 and not splits[split]["tokens"]:
            raise Refused(
                f"no document of {_names(inputs)} fell into the split '{split}'; "
                f"give more documents or a larger share (--val-share {options.val_share:g})"
            )
