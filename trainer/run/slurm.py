"""What every job for SLURM needs: options, quoting, templates, sbatch. Imports no torch."""

import re
import shlex
import shutil
import subprocess
from pathlib import Path

from stepline.trainer.errors import UserError

UNLIMITED = ("unlimited", "infinite")


def template(name: str) -> str:
    """A batch script that travels with the package, slurm/NAME."""
    return (Path(__file__).resolve().parent.parent.parent / "slurm" / name).read_text(encoding="utf-8")


def fill(text: str, values: dict[str, object]) -> str:
    """The template with `@name@` replaced; a line that becomes empty is left out."""
    lines = []
    for line in text.splitlines():
        new = re.sub(r"@([a-z_]+)@", lambda match: str(values[match[1]]), line)
        if new or not line:
            lines.append(new)
    return "\n".join(lines) + "\n"


def directive(value: object) -> str:
    """A value as sbatch reads it in an `#SBATCH` line: quoted, blanks and all. Raises UserError for a line break."""
    text = str(value)
    if "\n" in text or "\r" in text:
        raise UserError(f"SLURM takes no path or name with a line break: {text!r}")
    if re.fullmatch(r"[\w./%+:=,@-]+", text):
        return text
    return '"' + re.sub(r'(["\\])', r"\\\1", text) + '"'


def log_path(folder: Path, name: str) -> str:
    """The value of `--output`; name: with SLURM's patterns such as `%j`, which `folder` is kept free of."""
    return directive(f"{str(folder).replace('%', '%%')}/{name}")


def option_lines(options: str) -> str:
    """More `#SBATCH` lines from the options of a command line; raises UserError."""
    try:
        extra = shlex.split(options)
    except ValueError as error:
        raise UserError(f"--sbatch '{options}' cannot be read: {error}") from None
    lines = []
    for option in extra:
        name, equals, value = option.partition("=")
        if not re.fullmatch(r"--[a-z][a-z-]*", name):
            raise UserError(f"--sbatch has '{option}'; write options as --name=value")
        lines.append(f"#SBATCH {name}{equals}{directive(value) if value else ''}")
    return "\n".join(lines)


def seconds_of(limit: str) -> int | None:
    """Seconds of a time limit as sbatch takes it, None for no limit; raises UserError.

    `minutes`, `minutes:seconds`, `hours:minutes:seconds`, `days-hours`, `days-hours:minutes[:seconds]`, `UNLIMITED`.
    """
    if limit.lower() in UNLIMITED:
        return None
    match = re.fullmatch(r"(?:(\d{1,5})-)?(\d{1,8})(?::(\d{1,8}))?(?::(\d{1,8}))?", limit, re.ASCII)
    if match is None:
        raise UserError(
            f"--time is '{limit}'; write minutes, minutes:seconds, hours:minutes:seconds, days-hours or "
            "days-hours:minutes:seconds"
        )
    days, *parts = match.groups()
    numbers = [int(part) for part in parts if part is not None]
    if days is not None:
        hours, minutes, seconds = [*numbers, 0, 0][:3]
    elif len(numbers) == 3:
        hours, minutes, seconds = numbers
    else:
        hours, (minutes, seconds) = 0, [*numbers, 0][:2]
    total = ((int(days or 0) * 24 + hours) * 60 + minutes) * 60 + seconds
    if total == 0:
        raise UserError(f"--time is '{limit}', no time at all; UNLIMITED is no limit")
    return total


def find_sbatch() -> str:
    """The submit command; raises UserError on a machine without it."""
    found = shutil.which("sbatch")
    if found is None:
        raise UserError("there is no sbatch on this machine; run it where SLURM is, or take --print")
    return found


def hand_in(script: Path) -> str:
    """Gives a batch script to SLURM; returns the job's id. Raises UserError with what SLURM says."""
    told = subprocess.run(
        [find_sbatch(), "--parsable", str(script)], capture_output=True, text=True, check=False
    )
    if told.returncode != 0:
        reason = (told.stderr.strip().splitlines() or ["no message"])[-1]
        raise UserError(f"sbatch refused {script}: {reason.removeprefix('sbatch: error: ')}")
    return told.stdout.strip().split(";")[0]
