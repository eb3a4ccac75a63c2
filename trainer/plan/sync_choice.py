"""Which `parallel.sync` a link between replicas asks for, in words, as a table and as JSON. Imports no torch."""

import math
from dataclasses import asdict, dataclass
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from stepline.models.flops import parameter_counts
from stepline.trainer.config import Config
from stepline.trainer.config_io import load_config
from stepline.trainer.errors import UserError
from stepline.trainer.plan.resolve import check_experts, check_layout
from stepline.trainer.plan.screen import short
from stepline.trainer.plan.sync_cost import HARMLESS, Exchange, SyncBytes, link_bytes, model_parameters

MBIT_RANGE = (1e-3, 1e7)
MOST_REPLICAS = 1_000_000
TYPICAL = "dense-1b"
"""The config whose model stands for others where none is asked for."""
QUALITY = "what each costs in loss is in benchmarks/RESULTS.md"


@dataclass(frozen=True)
class Link:
    """What joins the replicas, and what a step does beside."""

    mbit: float
    """Mbit/s of each replica's link in each direction; all ranks of the replica share it."""
    replicas: int
    shard: int
    """Ranks of a replica."""
    compute_s: float | None = None
    """Seconds that a step computes; None where not known."""
    backward_s: float | None = None
    """Of these, the backward of the last micro-batch, beside which HSDP's all-reduce runs on GPUs."""
    computed_on: str = ""
    """What `compute_s` stands on, in words."""


class Choice:
    """The methods on one link: their bytes, their times and the best of them."""

    def __init__(self, config: Config, link: Link) -> None:
        self.config, self.link = config, link
        self.ranks = SyncBytes(config, link.shard, link.replicas).every()
        self.whole = link_bytes(config, link.shard, link.replicas)
        self.reference = self.whole[0]

    def seconds(self, exchange: Exchange) -> float:
        """Of a step where its compute is known, of the exchange otherwise."""
        if self.link.compute_s is None:
            return exchange.seconds(self.link.mbit)
        return exchange.step_seconds(self.link.mbit, self.link.compute_s)

    @property
    def fastest(self) -> Exchange:
        """The one whose step takes least."""
        return min(self.whole, key=self.seconds)

    @property
    def best(self) -> Exchange:
        """The fastest, unless an all-reduce, which loses nothing, takes hardly longer."""
        if self.link.compute_s is None:
            return self.fastest
        limit = (1 + HARMLESS) * self.seconds(self.fastest)
        exact = [
            e for e in self.whole if "parallel.sync=all_reduce" in e.options and self.seconds(e) <= limit
        ]
        return exact[0] if exact else self.fastest

    def sentence(self) -> str:
        """Which wins, and by how much."""
        link, best, fastest, reference = self.link, self.best, self.fastest, self.reference
        name, at = " ".join(best.options), f"at {rate_text(link.mbit)} between {link.replicas:,} replicas"
        mine, other = seconds_text(self.seconds(best)), seconds_text(self.seconds(reference))
        less = f"{short(self.seconds(reference) / self.seconds(best))} times less than {reference.label}"
        second = min((e for e in self.whole if e is not best), key=self.seconds)
        then = f"next comes {second.label} with {seconds_text(self.seconds(second))}; {QUALITY}"
        if link.compute_s is None:
            enough = seconds_text(reference.seconds(link.mbit) / HARMLESS)
            return (
                f"{name} wins {at}: the exchange of a step takes {mine} instead of {other}, {less}, which adds less "
                f"than {HARMLESS:.0%} only to a step that computes for {enough} or more; {then}"
            )
        if "parallel.sync=all_reduce" in best.options:
            gain = seconds_text(self.seconds(best) - self.seconds(fastest))
            more = "nothing is faster" if fastest is best else f"{fastest.label} would save {gain} of it"
            return f"{name} is enough {at}: a step takes {mine}, and {more}"
        return f"{name} wins {at}: a step takes {mine} instead of {other}, {less}; {then}"

    def notes(self) -> list[str]:
        """What the numbers stand on, and what is not in them."""
        link, found = self.link, []
        if link.compute_s is not None:
            found.append(f"a step computes for {seconds_text(link.compute_s)} {link.computed_on}")
        if link.shard > 1:
            found.append(f"the link of a replica carries what all {link.shard} of its ranks exchange")
        most = "" if link.backward_s is None else f" (at most {seconds_text(link.backward_s)} of a step)"
        found.append(
            f"an all-reduce on GPUs can run beside the backward of the last micro-batch{most}: not counted here"
        )
        demo, diloco = self.whole[2], self.whole[4]
        if demo.overlapped:
            onward = ", what owners send on from after the first forward on" if demo.onward else ""
            found.append(f"demo's exchange runs beside the next forward and backward (delay 1){onward}")
        every, rounds = self.config.parallel.diloco.every, self.config.parallel.diloco.fragments
        burst = seconds_text(diloco.seconds(link.mbit) * every / rounds)
        found.append(f"diloco's is a mean: {rounds} x {burst} in every {every} steps")
        found.append("not in it: latency, headers, and the time to make and to read packets")
        return found

    def json(self) -> dict[str, Any]:
        """For `--json`: bytes of the busiest rank and of its replica's link, a step's means."""
        link = self.link
        methods = []
        for rank, whole in zip(self.ranks, self.whole, strict=True):
            known = link.compute_s is not None
            methods.append(
                {
                    "name": whole.label,
                    "options": list(whole.options),
                    "bytes_sent": rank.sent,
                    "bytes_received": rank.received,
                    "link_bytes_sent": whole.sent,
                    "link_bytes_received": whole.received,
                    "link_s": whole.seconds(link.mbit),
                    "of_all_reduce": whole.slower / self.reference.slower,
                    "overlapped_bytes": whole.overlapped + whole.onward,
                    "step_s": whole.step_seconds(link.mbit, link.compute_s) if known else None,
                    "harmless_mbit": whole.harmless_mbit(link.compute_s) if known else None,
                }
            )
        said = {"methods": methods, "best": list(self.best.options), "says": self.sentence()}
        return asdict(link) | said | {"notes": self.notes()}

    def show(self, console: Console) -> None:
        """The table and the sentences that a person reads."""
        link, known = self.link, self.link.compute_s is not None
        table = Table(
            title=f"How {link.replicas:,} replicas agree over {rate_text(link.mbit)}, per step",
            box=box.SIMPLE_HEAD,
            title_justify="left",
            pad_edge=False,
            collapse_padding=True,
        )
        more = ("a step", "enough") if known else ()
        for name in ("", "bytes", "on the link", "ratio", *more):
            table.add_column(name, justify="right" if name else "left", overflow="fold", no_wrap=not name)
        for e in self.whole:
            row = [bytes_text(e.slower), seconds_text(e.seconds(link.mbit))]
            row.append(short(e.slower / self.reference.slower))
            if known:
                row.append(seconds_text(e.step_seconds(link.mbit, link.compute_s)))
                row.append(rate_text(e.harmless_mbit(link.compute_s)))
            table.add_row(e.label, *row)
        console.print(table)
        legend = f"ratio: to {self.reference.label}"
        legend += (
            f"; enough: bandwidth at which a step is {HARMLESS:.0%} longer than its compute" if known else ""
        )
        for sentence in [legend, self.sentence(), *self.notes()]:
            console.print(sentence, soft_wrap=True, highlight=False)


def asked_layout(
    mbit: float | None, replicas: int | None, config: Config | None, world: int | None
) -> tuple[int, int] | None:
    """(replicas, shard) of --link-mbit and --replicas; None when no link is asked for. Raises UserError.

    world: --world-size. Without it each replica is one rank, or the `parallel.shard` ranks of the config.
    """
    if mbit is None:
        if replicas is not None:
            raise UserError("--replicas needs --link-mbit, the bandwidth of the link between them")
        return None
    low, high = MBIT_RANGE
    if not low <= mbit <= high:
        raise UserError(f"--link-mbit is {mbit:g}; it must be between {low:g} and {high:g} Mbit/s")
    if replicas is not None and not 2 <= replicas <= MOST_REPLICAS:
        raise UserError(f"--replicas is {replicas}; it must be between 2 and {MOST_REPLICAS}")
    if config is None:
        raise UserError("--link-mbit needs a config: what crosses the link depends on the model's shapes")
    known = sum(math.prod(shape) for shape, _ in model_parameters(config.model))
    if known != parameter_counts(config.model).total:
        raise UserError(
            "--link-mbit does not know all parameters of this model's layers yet (model.ffn, model.blocks)"
        )
    replicas, shard = _layout(replicas, config.parallel.shard, world)
    check_experts(config, shard)
    return replicas, shard


def _layout(replicas: int | None, shard: int | str, world: int | None) -> tuple[int, int]:
    if world is None or (shard == "auto" and replicas is None):
        if replicas is None:
            raise UserError("--link-mbit needs --replicas, or --world-size and parallel.shard")
        return replicas, 1 if shard == "auto" else shard
    if shard != "auto":
        check_layout(shard, world)
        if replicas not in (None, world // shard):
            raise UserError(
                f"parallel.shard {shard} makes {world // shard} replicas of {world} ranks, not the {replicas} of "
                "--replicas; leave that out"
            )
        replicas = world // shard
    if world % replicas:
        raise UserError(f"--replicas {replicas} does not divide the {world} ranks of --world-size")
    if replicas < 2:
        raise UserError("--link-mbit needs two replicas at least; lower parallel.shard or leave it out")
    return replicas, world // replicas


def rule(mbit: float, replicas: int, between: str) -> tuple[dict[str, Any], str]:
    """The doctor's value and sentence about a measured link. between: what it joins, in words."""
    config, _ = load_config(TYPICAL, [])
    choice = Choice(config, Link(mbit, replicas, 1))
    reference, best = choice.reference, choice.best
    size = short(parameter_counts(config.model).total, 2)
    compute_s = reference.seconds(mbit) / HARMLESS
    value = {
        "mbit": mbit,
        "replicas": replicas,
        "config": TYPICAL,
        "link_s": {e.label: e.seconds(mbit) for e in choice.whole},
        "best": list(best.options),
        "all_reduce_from_compute_s": compute_s,
    }
    says = (
        f"at {rate_text(mbit)} between {between} a step of {size} parameters spends "
        f"{seconds_text(reference.seconds(mbit))} in {reference.label}, {seconds_text(best.seconds(mbit))} in "
        f"{best.label}, other sizes in proportion: {' '.join(best.options)}, unless a step computes for "
        f"{seconds_text(compute_s)} or more"
    )
    return value, says


def seconds_text(seconds: float) -> str:
    """`14 ms`, `2.6 s`, `7.5 min`, `3.2 h` or `12 days`, three digits."""
    for size, unit in ((86400, "days"), (3600, "h"), (60, "min")):
        if seconds >= 2 * size:
            return f"{_digits(seconds / size)} {unit}"
    return f"{_digits(seconds)} s" if seconds >= 1 else f"{_digits(seconds * 1e3)} ms"


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
