"""Child processes of the benchmarks: their lines as they come, the last result that they printed, why they failed."""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import IO

EXCEPTION = re.compile(r"^(\[rank\d+\]: ?|E +)?(?P<text>[\w.]*(Error|Exception|Interrupt)\b.*)")
"""The line that names what was raised; torch marks it with the rank where there is a process group, pytest with E."""
LOGGED = re.compile(r"^\[rank\d+\]:?\[")
LONGEST = 200
RUNNING: set[subprocess.Popen] = set()
"""Children with process groups of their own."""


@dataclass(frozen=True)
class Ended:
    """How a child ended."""

    code: int
    stdout: str
    stderr: str
    seconds: float
    late: bool
    """It was ended by its limit."""


def reason(text: str) -> str:
    """Why a process failed, from its messages: the last line that names an exception, else the last line."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    for line in reversed(lines):
        if match := EXCEPTION.match(line):
            return match["text"][:LONGEST]
    said = [line for line in lines if not LOGGED.match(line)] or lines
    return said[-1][:LONGEST] if said else ""


def last_object(text: str) -> dict:
    """The last line that is a JSON object; libraries may print around it, and the last line may be cut."""
    for line in reversed(text.splitlines()):
        with contextlib.suppress(ValueError):
            found = json.loads(line)
            if isinstance(found, dict):
                return found
    return {}


def emit(result: dict) -> None:
    """Prints what is known so far as one line of JSON: a reader takes the last one."""
    print(json.dumps(result), flush=True)


def to_stderr(line: str) -> None:
    """Passes a child's message on."""
    sys.stderr.write(line)
    sys.stderr.flush()


def call(
    command: list[str], out: Callable[[str], object] = lambda line: None, err: Callable[[str], object] = to_stderr,
    seconds: float | None = None, environment: dict[str, str] | None = None, apart: bool = False,
) -> Ended:  # fmt: skip
    """Runs a command; out and err get its lines as they come.

    apart: in a process group of its own, which is ended as a whole after `seconds`, and when this process is
    interrupted.
    """
    begun, late = time.monotonic(), False
    child = subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        errors="replace", env=environment, start_new_session=apart,
    )  # fmt: skip
    if apart:
        RUNNING.add(child)
    texts: tuple[list[str], list[str]] = ([], [])
    pairs = zip((child.stdout, child.stderr), (out, err), texts, strict=True)
    readers = [threading.Thread(target=_read, args=pair, daemon=True) for pair in pairs]
    for reader in readers:
        reader.start()
    try:
        child.wait(seconds)
    except subprocess.TimeoutExpired:
        late = True
    finally:
        if apart:
            _end(child)
        elif child.poll() is None:
            child.kill()
        child.wait()
        RUNNING.discard(child)
    for reader in readers:
        reader.join(2)  # a process that left the group may hold the pipe
    return Ended(child.returncode, "".join(texts[0]), "".join(texts[1]), time.monotonic() - begun, late)


def _read(pipe: IO[str], told: Callable[[str], object], kept: list[str]) -> None:
    for line in pipe:
        kept.append(line)
        told(line)


def _end(child: subprocess.Popen) -> None:
    """Ends all processes of the child's group, those too that outlived it."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGKILL)


def end_all() -> None:
    """Ends every child that has a process group of its own."""
    for child in list(RUNNING):
        _end(child)
