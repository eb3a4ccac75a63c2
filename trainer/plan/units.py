"""Times, sizes and rates in words."""


def seconds_text(seconds: float) -> str:
    """`14 ms`, `2.6 s`, `7.5 min`, `3.2 h` or `12 days`, three digits."""
    for size, unit in ((86400, "days"), (3600, "h"), (60, "min")):
        if seconds >= 2 * size:
            return f"{_digits(seconds / size)} {unit}"
    return f"{_digits(seconds)} s" if seconds >= 1 or seconds == 0 else f"{_digits(seconds * 1e3)} ms"


def bytes_text(size: float) -> str:
    """`5.27 GB`, three digits."""
    for unit, letters in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if size >= unit:
            return f"{_digits(size / unit)} {letters}"
    return f"{size:.0f} B"


def rate_text(mbit: float) -> str:
    """`94 Mbit/s`, `1.2 Gbit/s`, three digits."""
    return f"{_digits(mbit)} Mbit/s" if mbit < 1000 else f"{_digits(mbit / 1e3)} Gbit/s"


def _digits(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
