"""Signals that ask a run to save and leave. Imports no torch: it is installed before anything slow."""

import ctypes
import os
import signal
import socket
import sys
import threading

STOPPING = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)
"""SIGHUP also tells a rank that the launcher which started it is gone."""
LEFT_AT_ONCE = 130
PR_SET_PDEATHSIG = 1


class StopSignal:
    """The first signal that this process received of those that end a run, or None.

    The numbers arrive through a pipe that a thread reads, so they count even while the main thread waits in a
    collective: a second SIGINT ends the process at once.
    """

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self.launcher = _name_of(os.getppid())
        """Whoever has started this process; taken down at the start, as it may die."""

    @classmethod
    def install(cls) -> "StopSignal":
        """Takes over the process's signals; call it once, in the main thread."""
        stop = cls()
        reading, writing = socket.socketpair()
        writing.setblocking(False)
        signal.set_wakeup_fd(writing.fileno(), warn_on_full_buffer=False)
        launched = "TORCHELASTIC_RUN_ID" in os.environ
        for number in STOPPING:
            # What nohup or a shell's background has switched off stays off.
            if signal.getsignal(number) != signal.SIG_IGN or (launched and number == signal.SIGHUP):
                signal.signal(number, lambda *_: None)  # the pipe has the number already
        threading.Thread(target=stop._listen, args=(reading, writing), daemon=True, name="signals").start()
        if launched:
            _end_with_launcher()
        return stop

    def _listen(self, reading: socket.socket, _kept_open: socket.socket) -> None:
        while True:
            for number in reading.recv(64):
                if number in STOPPING:
                    self.note(signal.Signals(number))

    @property
    def number(self) -> int:
        """Of the signal received, or 0."""
        return 0 if self.received is None else int(self.received)

    def note(self, number: signal.Signals) -> None:
        """Counts a signal; may not return."""
        # The second interrupt of a terminal reaches torchrun alone, which dies of it.
        again = number in (signal.SIGINT, signal.SIGHUP) and self.received == signal.SIGINT
        if again:
            print(f"{number.name} after SIGINT: leaving without saving", file=sys.stderr, flush=True)
            os._exit(LEFT_AT_ONCE)
        self.received = self.received or number


def _name_of(process: int) -> str:
    """Host, number and time of start: numbers are given again, and in a container mostly the same one."""
    try:
        with open(f"/proc/{process}/stat", encoding="utf-8", errors="replace") as file:
            began = file.read().rpartition(")")[2].split()[19]  # in ticks since the machine's
    except (OSError, IndexError):
        began = "0"
    return f"{socket.gethostname()}:{process}:{began}"


def _end_with_launcher() -> None:
    """SIGHUP when torchrun's agent dies: its ranks are in sessions of their own and would train on without it."""
    launcher = os.getppid()
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGHUP, 0, 0, 0)
    if os.getppid() != launcher:  # it died before the request
        os.kill(os.getpid(), signal.SIGHUP)
