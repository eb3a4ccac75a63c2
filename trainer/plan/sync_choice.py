"""Which `parallel.sync` a link between replicas asks for, in words, as a table and as JSON. Imports no torch."""

import math
from dataclasses import asdict, dataclass, replace
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from stepline.models.flops import parameter_counts
from stepline.trainer.config import Config
from stepline.trainer.config_io import load_config
from stepline.trainer.errors import UserError
from stepline.trainer.plan.memory import slow_link_shard
from stepline.trainer.plan.resolve import check_experts, check_layout
from stepline.trainer.plan.screen import short
from stepline.trainer.plan.sync_cost import HARMLESS, Exchange, SyncBytes, link_bytes, model_parameters
from stepline.trainer.plan.sync_measured import MEASURED
from stepline.trainer.plan.units import bytes_text, rate_text, seconds_text

MBIT_RANGE = (1e-3, 1e7)
MOST_REPLICAS = 1_000_000
TYPICAL = "dense-1b"
"""The config whose model stands for others where none is asked for."""
EQUAL = 0.05
"""Difference of two times that is none: no estimate here is closer."""


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
    cpu: bool = False
    """Whether the ranks compute on CPUs, the only devices on which encoding and decoding were timed."""


class Choice:
    """The methods on one link: their bytes, their times, and the best of those whose loss was measured."""

    def __init__(self, config: Config, link: Link) -> None:
        self.config, self.link = config, link
        self.ranks = SyncBytes(config, link.shard, link.replicas).every()
        self.whole = link_bytes(config, link.shard, link.replicas)
        self.cpu = link.cpu or config.run.device == "cpu"
        self.codec_s = self.whole[2].codec_s
        if not self.cpu:
            self.whole = [replace(exchange, codec_s=0.0) for exchange in self.whole]
        self.reference = self.whole[0]

    def seconds(self, exchange: Exchange) -> float:
        """Of a step where its compute is known, of the exchange otherwise."""
        if self.link.compute_s is None:
            return exchange.codec_s + exchange.seconds(self.link.mbit)
        return exchange.step_seconds(self.link.mbit, self.link.compute_s)

    @property
    def fastest(self) -> Exchange:
        """Of those whose loss was measured, the one whose step takes least."""
        return min((e for e in self.whole if e.loss_percent is not None), key=self.seconds)

    @property
    def best(self) -> Exchange:
        """The fastest, unless an all-reduce, which loses nothing, takes hardly longer."""
        hardly = EQUAL if self.link.compute_s is None else HARMLESS
        limit = (1 + hardly) * self.seconds(self.fastest)
        exact = [e for e in self.whole if e.loss_percent == 0 and self.seconds(e) <= limit]
        return exact[0] if exact else self.fastest

    def sentence(self) -> str:
        """Which wins, by how much, and at what price."""
        link, best, fastest, reference = self.link, self.best, self.fastest, self.reference
        name, at = " ".join(best.options), f"at {rate_text(link.mbit)} between {link.replicas:,} replicas"
        mine, other = seconds_text(self.seconds(best)), seconds_text(self.seconds(reference))
        what = "the exchange of a step" if link.compute_s is None else "a step"
        if fastest is not best and self.seconds(best) <= (1 + EQUAL) * self.seconds(fastest):
            theirs = seconds_text(self.seconds(fastest))
            verdict = f"{name} and {fastest.label} are about equal {at}: {what} takes {mine} and {theirs}"
        elif link.compute_s is not None and best.loss_percent == 0:
            gain = seconds_text(self.seconds(best) - self.seconds(fastest))
            more = "nothing is faster" if fastest is best else f"{fastest.label} would save {gain} of it"
            verdict = f"{name} is enough {at}: a step takes {mine}, and {more}"
        else:
            less = f"{short(self.seconds(reference) / self.seconds(best))} times less than {reference.label}"
            verdict = f"{name} wins {at}: {what} takes {mine} instead of {other}, {less}"
            if best is self.whole[2] and not self.cpu:
                spare = min(self.seconds(e) for e in self.whole if e.loss_percent == 0) - self.seconds(best)
                verdict += f", while encoding and decoding, not counted, take less than {seconds_text(spare)}"
        if link.compute_s is None:
            enough = seconds_text(reference.seconds(link.mbit) / HARMLESS)
            verdict += (
                f"; {reference.label} adds less than {HARMLESS:.0%} if a step computes for {enough} or more"
            )
        return "; ".join([verdict, *self._prices()])

    def _prices(self) -> list[str]:
        """What is known of the loss of the methods that lose something."""
        found = []
        if self.fastest.loss_percent:
            worse = short(self.fastest.loss_percent)
            found.append(f"{self.fastest.label} had a loss {worse} % above all-reduce's, {MEASURED}")
        unknown = [e for e in self.whole if e.loss_percent is None]
        said = [
            f"{e.label} with {seconds_text(self.seconds(e))}"
            for e in unknown
            if self.seconds(e) < self.seconds(self.best)
        ]
        if said:
            found.append(f"faster, but loss not measured: {', '.join(said)}")
        return found

    def longest(self, exchange: Exchange) -> float:
        """Seconds of the step that sends most."""
        return self.seconds(exchange) + (exchange.burst - 1) * exchange.seconds(self.link.mbit)

    def patience(self) -> list[str]:
        """That a run needs a longer limit, where a step takes longer than one that hangs may."""
        limit = self.config.parallel.timeout_s
        late = [f"{math.ceil(s):,} for {e.label}" for e in self.whole if (s := self.longest(e)) > limit]
        why = f"a step that takes longer than it ({limit:g} s) ends the run"
        return [f"set parallel.timeout_s above {', '.join(late)}: {why}"] if late else []

    def notes(self) -> list[str]:
        """What the numbers stand on, and what is not in them."""
        link, found = self.link, self.patience()
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
        codec = f"demo's encoding and decoding, {seconds_text(self.codec_s)} by one thread of a CPU"
        if self.cpu:
            found.append(f"in it: {codec}")
            found.append("not in it: latency, headers, and the time in which others make and read packets")
        else:
            codec += " (run.device=cpu counts it), not measured on GPUs"
            found.append(f"not in it: latency, headers, and {codec}")
        return found

    def enough(self, exchange: Exchange) -> float | None:
        """Mbit/s from which on it hardly lengthens a step; None where that is not known, or where no link is enough."""
        if self.link.compute_s is None:
            return None
        mbit = exchange.harmless_mbit(self.link.compute_s)
        return mbit if math.isfinite(mbit) else None

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
                    "codec_s": whole.codec_s if self.cpu else None,
                    "loss_percent": whole.loss_percent,
                    "step_s": whole.step_seconds(link.mbit, link.compute_s) if known else None,
                    "harmless_mbit": self.enough(whole),
                }
            )
        said = {"methods": methods, "best": list(self.best.options), "says": self.sentence()}
        return asdict(link) | said | {"cpu": self.cpu, "notes": self.notes()}

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
                enough = self.enough(e)
                row.append("-" if enough is None else rate_text(enough))
            table.add_row(e.label + (" *" if e.loss_percent is None else ""), *row)
        console.print(table)
        legend = f"ratio: to {self.reference.label}"
        legend += (
            f"; enough: bandwidth at which a step is {HARMLESS:.0%} longer than its compute" if known else ""
        )
        if any(e.loss_percent is None for e in self.whole):
            legend += "; *: loss not measured"
        for sentence in [legend, self.sentence(), *self.notes()]:
            console.print(sentence, soft_wrap=True, highlight=False)


def asked_layout(
    mbit: float | None, replicas: int | None, config: Config | None, world: int | None
) -> tuple[int, int] | None:
    """(replicas, shard) of --link-mbit and --replicas; None when no link is asked for. Raises UserError.

    world: --world-size. Without it each replica is the `parallel.shard` ranks of the config, or the fewest that `auto`
    makes one of.
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
    replicas, shard = _layout(replicas, config, world)
    check_experts(config, replicas * shard, shard)
    return replicas, shard


def _layout(replicas: int | None, config: Config, world: int | None) -> tuple[int, int]:
    shard = config.parallel.shard
    if world is None or (shard == "auto" and replicas is None):
        if replicas is None:
            raise UserError("--link-mbit needs --replicas, or --world-size and parallel.shard")
        return replicas, slow_link_shard(config, world=1) if shard == "auto" else shard
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


def rule(mbit: float, replicas: int, between: str, *, cpu: bool = False) -> tuple[dict[str, Any], str]:
    """The doctor's value and sentence about a measured link. between: what it joins, in words; cpu: whether CPUs encode
    and decode, whose time is known and counted."""
    config, _ = load_config(TYPICAL, [])
    choice = Choice(config, Link(mbit, replicas, 1, cpu=cpu))
    reference, best = choice.reference, choice.best
    size = short(parameter_counts(config.model).total, 2)
    compute_s = reference.seconds(mbit) / HARMLESS
    value = {
        "mbit": mbit,
        "replicas": replicas,
        "config": TYPICAL,
        "link_s": {e.label: e.seconds(mbit) for e in choice.whole},
        "codec_s": {e.label: e.codec_s for e in choice.whole} if cpu else None,
        "best": list(best.options),
        "loss_percent": {e.label: e.loss_percent for e in choice.whole},
        "all_reduce_from_compute_s": compute_s,
    }
    counted = ", encoding and decoding counted" if cpu and best.codec_s else ""
    says = (
        f"at {rate_text(mbit)} between {between} a step of {size} parameters spends "
        f"{seconds_text(reference.seconds(mbit))} in {reference.label}, {seconds_text(choice.seconds(best))} in "
        f"{best.label}{counted}, other sizes in proportion: {' '.join(best.options)}, unless a step computes for "
        f"{seconds_text(compute_s)} or more"
    )
    return value, "; ".join([says, *choice.patience()])
