"""What a check says, how the ranks' checks become one list, and how that is shown."""

import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from rich.console import Console
from rich.table import Table
from rich.text import Text

from stepline.trainer.run.sweep_slurm import array_of

Status = Literal["ok", "missing", "warning", "broken"]
WORST_FIRST: tuple[Status, ...] = ("broken", "warning", "missing", "ok")
COLORS = {"broken": "bold red", "warning": "yellow", "missing": "cyan", "ok": "green"}
NARROW = 80
"""Columns of the table where the output is no terminal."""


@dataclass(frozen=True)
class Check:
    """One thing that was looked at."""

    name: str
    status: Status
    """`missing`: optional and not there; `warning`: a training runs, but not as one would wish; `broken`: it does
    not run."""
    value: Any
    """What was found, in plain values; None where there was nothing."""
    says: str
    """One sentence: what was found, or what will not work and what to do."""


def look(name: str, check: Callable[..., Check], *arguments: Any) -> Check:
    """The result of a check; one that fails itself is a warning, no traceback."""
    try:
        return check(*arguments)
    except Exception as error:
        return Check(name, "warning", None, f"could not be looked at ({reason(error)})")


def reason(error: BaseException) -> str:
    """The first line of an error, without the place in C++ sources; its type where the text says little."""
    line = re.sub(r"^\[[^\]]*/[^\]]*\]\s*", "", (str(error).strip().splitlines() or [""])[0])
    line = line.strip().rstrip(".")[:160]
    return line if len(line) > 20 else f"{type(error).__name__}: {line}".removesuffix(": ")


def name_ranks(ranks: Sequence[int]) -> str:
    """`rank 3`, `ranks 0-7,9`."""
    return f"rank{'s' if len(ranks) > 1 else ''} {array_of(sorted(ranks), None)}"


def combine(reports: dict[int, list[Check]]) -> list[Check]:
    """One check of each name: the worst that a rank has, with the ranks that have it where not all do.

    reports: checks by rank. Ranks that did not look at something (another rank of their machine did) do not count.
    """
    names = dict.fromkeys(check.name for checks in reports.values() for check in checks)
    combined = []
    for name in names:
        seen = {rank: check for rank, checks in reports.items() for check in checks if check.name == name}
        status = min((check.status for check in seen.values()), key=WORST_FIRST.index)
        bad = [rank for rank, check in seen.items() if check.status == status]
        first = seen[min(bad)]
        says = first.says if len(bad) == len(seen) else f"on {name_ranks(bad)}: {first.says}"
        combined.append(Check(name, status, first.value, says))
    return combined


def is_broken(checks: Iterable[Check]) -> bool:
    """Whether something that a training needs is broken."""
    return any(check.status == "broken" for check in checks)


def show(checks: Sequence[Check], ranks: Sequence[dict], console: Console) -> None:
    """The table, and in one line what it comes to."""
    hosts: dict[tuple[str, str], list[int]] = {}
    for rank in ranks:
        hosts.setdefault((rank["host"], rank["device"]), []).append(rank["rank"])
    for (host, device), members in hosts.items():
        console.print(Text(f"{host}: {name_ranks(members)} on {device}"), highlight=False)
    table = Table("check", "", "what was found", width=min(console.width, 120))
    table.columns[0].no_wrap = table.columns[1].no_wrap = True
    for check in checks:
        table.add_row(Text(check.name), Text(check.status, COLORS[check.status]), Text(check.says))
    console.print(table)
    broken = [check.name for check in checks if check.status == "broken"]
    words = f"training will not work here: {', '.join(broken)}" if broken else "training works here"
    number = Counter(check.status for check in checks)
    counts = [f"{number['warning']} warning{'s' if number['warning'] > 1 else ''}"] * (number["warning"] > 0)
    counts += [f"{number['missing']} missing"] * (number["missing"] > 0)
    rest = f" ({', '.join(counts)})" if counts else ""
    console.print(Text(words + rest), highlight=False)


def to_json(checks: Sequence[Check], ranks: Sequence[dict]) -> dict[str, Any]:
    """{ok, checks: [{name, status, value, says}], ranks: [{rank, host, device, …, checks}]}."""
    return {
        "ok": not is_broken(checks),
        "checks": [asdict(check) for check in checks],
        "ranks": list(ranks),
    }
