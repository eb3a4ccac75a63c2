"""Freed memory is kept on CPUs: its pages are not faulted in again."""

import platform
import subprocess
import sys

import pytest

from stepline.trainer.run import malloc

PROGRAM = """
import resource, sys
import torch
from stepline.trainer.run.malloc import keep_freed_memory
told = keep_freed_memory() if sys.argv[1] == "keep" else None
def pages():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(12):
        torch.zeros(2**26, dtype=torch.uint8).add_(1)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
pages()
print(told, pages())
"""


def run(word: str) -> tuple[str, int]:
    """(what it answered, page faults of twelve buffers of 64 MiB after the first twelve)."""
    command = [sys.executable, "-c", PROGRAM, word]
    told, faults = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()
    return told, int(faults)


NEW = platform.libc_ver()[0] == "glibc" and tuple(map(int, platform.libc_ver()[1].split("."))) >= (2, 35)


@pytest.mark.skipif(not NEW, reason="an older or another C library gives larger buffers back")
def test_pages_of_freed_buffers_are_not_faulted_in_again():
    told, kept = run("keep")
    assert told == "True"
    _, given_back = run("leave")
    assert kept < given_back / 4


def test_an_older_glibc_is_told_what_it_takes(monkeypatch):
    """Which refuses more than 32 MiB; where it refuses that too, nothing is changed."""
    told = []

    def old(limit: int):
        def mallopt(option: int, value: int) -> int:
            told.append((option, value))
            return int(option != malloc.M_MMAP_THRESHOLD or value <= limit)

        return type("C", (), {"mallopt": staticmethod(mallopt)})

    monkeypatch.setattr(malloc.platform, "libc_ver", lambda: ("glibc", "2.34"))
    monkeypatch.setattr(malloc.ctypes, "CDLL", lambda _: old(2**25))
    assert malloc.keep_freed_memory()
    assert told[1:] == [(-3, 2**25), (-1, 2**31 - 1)]
    monkeypatch.setattr(malloc.ctypes, "CDLL", lambda _: old(0))
    assert not malloc.keep_freed_memory()
    assert told[3:] == [(-3, 2**31 - 1), (-3, 2**25)]


@pytest.mark.parametrize("name", ["MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "GLIBC_TUNABLES"])
def test_the_users_own_settings_stand(monkeypatch, name):
    monkeypatch.setenv(name, "131072")
    monkeypatch.setattr(malloc.ctypes, "CDLL", None)  # not asked
    assert not malloc.keep_freed_memory()
