"""A small pool of processes: ordered work in, finished indices out, no worker outlives its parent."""

import multiprocessing
from collections.abc import Iterable, Iterator
from multiprocessing.connection import Connection, wait
from pathlib import Path

from stepline.trainer.data.parts import encode_unit
from stepline.trainer.data.sources import ReadOptions, Span
from stepline.trainer.data.tokenizer import load_tokenizer
from stepline.trainer.errors import UserError

Work = tuple[int, tuple[Span, ...]]


class WorkerLost(Exception):
    """A worker process ended before its work was done."""


def _watch_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None and not parent.is_alive():
        raise SystemExit("the parent process has gone")


def _worker(connection: Connection, tokenizer_path: Path, options: ReadOptions, parts: Path) -> None:
    """Encode units as they arrive until None comes or the parent goes away."""
    tokenizer = load_tokenizer(tokenizer_path)
    try:
        while (work := connection.recv()) is not None:
            try:
                encode_unit(*work, options, tokenizer, parts, _watch_parent)
            except (UserError, OSError) as error:
                connection.send(error)
            else:
                connection.send(work[0])
    except (EOFError, BrokenPipeError, KeyboardInterrupt):
        return  # the parent stopped: nobody is left to tell


def run_pool(
    work: Iterable[Work], workers: int, tokenizer_path: Path, options: ReadOptions, parts: Path
) -> Iterator[int]:
    """Encode units in `workers` processes; yields the index of each unit when its part is written.

    One worker works in this process. Raises what a worker raised (UserError, OSError), and WorkerLost when
    a worker was killed.
    """
    if workers == 1:
        tokenizer = load_tokenizer(tokenizer_path)
        for index, spans in work:
            encode_unit(index, spans, options, tokenizer, parts)
            yield index
        return
    context = multiprocessing.get_context("spawn")
    pending = iter(work)
    processes, connections = [], []
    try:
        for _ in range(workers):
            here, there = context.Pipe()
            process = context.Process(
                target=_worker, args=(there, tokenizer_path, options, parts), daemon=True
            )
            process.start()
            there.close()
            processes.append(process)
            connections.append(here)
        busy = {c for c in connections if _give(c, next(pending, None))}
        while busy:
            for connection in wait(list(busy)):
                try:
                    result = connection.recv()
                except (EOFError, ConnectionResetError) as error:
                    raise WorkerLost from error
                if isinstance(result, Exception):
                    raise result
                if not _give(connection, next(pending, None)):
                    busy.discard(connection)
                yield result
        for process in processes:
            process.join()
    finally:
        for process in processes:
            process.terminate()
            process.join()


def _give(connection: Connection, work: Work | None) -> bool:
    """Send work (or None, the end) to a worker; whether it was work."""
    try:
        connection.send(work)
    except BrokenPipeError as error:
        raise WorkerLost from error
    return work is not None
