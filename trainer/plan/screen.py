"""Numbers and consoles for tables that fit 80 columns. Imports nothing heavy."""

import sys

from rich.console import Console

WIDE = 200
"""Columns where the output is no terminal: a file or a pipe has no width to keep to."""


def screen(stderr: bool = False) -> Console:
    """The console of standard output, or of standard error."""
    terminal = (sys.stderr if stderr else sys.stdout).isatty()
    return Console(stderr=stderr, width=None if terminal else WIDE)


def short(value: float, digits: int = 3) -> str:
    """So many digits, with k, M, B or T from a thousand on and without the zero of a fraction: `1.05M`, `.00039`."""
    for size, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        # Compared as it will be printed: 999,999 is 1M and not 1e+03k.
        if float(f"{value:.{digits}g}") >= size:
            return f"{float(f'{value / size:.{digits}g}'):g}{letter}"
    text = f"{value:.{digits}g}".replace("e-0", "e-")
    return text.removeprefix("0") if text.startswith("0.") else text
