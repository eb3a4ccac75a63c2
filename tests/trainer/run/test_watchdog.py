"""A rank that hangs ends, whatever else hangs with it."""

import json
import subprocess
import sys
from unittest import mock

from stepline.trainer.run import checkpoint
from stepline.trainer.run.checkpoint import Checkpointer
from stepline.trainer.run.launch import run_training
from stepline.trainer.run.manifest import EPHEMERAL
from stepline.trainer.run.watchdog import Watchdog

HANGS = """
import fcntl, logging, os, sys, threading, time
from stepline.trainer.run import watchdog

watchdog.LAST_WORDS_S, watchdog.LOG_S, watchdog.GRACE_S = 0.5, 0.1, 0.0
handler = logging.StreamHandler(sys.stdout)
watchdog.log.addHandler(handler)
stacks, told = sys.stderr, lambda why: print(why, flush=True)
{fault}
with watchdog.Watchdog(0.2, stacks, told) as dog:
    {work}
"""
LOCKED = "handler.acquire()"  # as a thread that writes to a disk that hangs
PIPE = """
reading, writing = os.pipe()
os.set_blocking(writing, False)
while True:
    try:
        os.write(writing, bytes(65536))
    except BlockingIOError:
        break
os.set_blocking(writing, True)
stacks = os.fdopen(writing, "w")
"""  # what is written to it waits for ever


def hang(fault: str, work: str = "time.sleep(1000)") -> tuple[int, str, str]:
    done = subprocess.run(
        [sys.executable, "-c", HANGS.format(fault=fault, work=work)],
        capture_output=True,
        text=True,
        check=False,
    )
    return done.returncode, done.stdout, done.stderr


def test_a_rank_that_hangs_says_where():
    code, out, err = hang("")
    reason = "no progress for 0.2 s (parallel.timeout_s) after the start"
    assert (code, out) == (1, f"{reason}; the stacks of this rank's threads follow in its log\n{reason}\n")
    assert "most recent call first" in err


def test_a_log_that_another_thread_holds():
    code, out, err = hang(LOCKED)
    assert (code, out) == (1, "no progress for 0.2 s (parallel.timeout_s) after the start\n")
    assert "most recent call first" in err


def test_stacks_that_nothing_takes():
    """The interpreter waits in the write, so that no thread of Python could end the process."""
    code, out, _ = hang(PIPE)
    assert (code, out.count("\n")) == (1, 1)


def test_an_outcome_that_cannot_be_written():
    assert hang("told = lambda why: time.sleep(1000)")[0] == 1


LONGER = """
    with dog.longer(0.8, "writing a checkpoint"):
        time.sleep(0.4)
        print("alive", flush=True)
        time.sleep(1000)
"""


def test_what_may_take_longer_has_a_limit_of_its_own():
    code, out, _ = hang("", LONGER.strip())
    reason = "writing a checkpoint after the start takes longer than 0.8 s"
    said = ["alive", f"{reason}; the stacks of this rank's threads follow in its log", reason]
    assert (code, out.splitlines()) == (1, said)


def test_afterwards_the_limit_is_what_it_was():
    dog = Watchdog(0.2, sys.stderr, print)
    with dog.longer(5, "a save"):
        with dog.longer(0.1, "a second one"):  # never less than by itself
            assert dog._longer == (0.2, "a second one")
        assert dog._longer == (5, "a save")
    assert dog._longer is None


def test_the_time_for_a_checkpoint_grows_with_its_size(tmp_path):
    saver = object.__new__(Checkpointer)
    saver._pending = None
    assert saver.limit_s == 3600
    saver._pending = checkpoint._Pending(tmp_path, {}, EPHEMERAL, needed=10**11)
    assert saver.limit_s == 3600 + 10_000


def test_it_may_be_entered_again():
    work = "pass\nwith dog.longer(0.3, 'writing a checkpoint'), dog: time.sleep(1000)"
    code, out, _ = hang("", work)
    assert (code, out.splitlines()[-1]) == (1, "writing a checkpoint after the start takes longer than 0.3 s")


def test_the_heartbeat_gives_a_checkpoint_that_is_waited_for_its_limit(tiny_config, tmp_path):
    folder, seen, honest = tmp_path / "run", [], Checkpointer.finish

    def finish(saver: Checkpointer) -> bool:
        if saver._pending is not None:
            beat = json.loads((folder / "heartbeat.json").read_text())
            seen.append(
                (beat["step"], beat["status"], beat["stale_after_s"] == round(saver.limit_s, 1) > 3600)
            )
        return honest(saver)

    options = [f"run.folder={folder}", "budget.steps=4", "checkpoint.every=2"]
    with (
        mock.patch.object(Checkpointer, "finish", finish),
        mock.patch.object(Checkpointer, "poll"),  # which does not wait
    ):
        assert run_training(str(tiny_config), options, "never") == 0
    assert seen == [(4, "saving", True)] * 2
