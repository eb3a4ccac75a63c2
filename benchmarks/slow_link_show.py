"""Tables and plots of what benchmarks/slow_link.py has left in its folder, however far it came."""

import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

REFERENCE, FREE = "all-reduce fp32", "no network"


def show(output: Path, methods: Sequence[str]) -> None:
    """Tables on standard output; slow_link_loss.png and slow_link_time.png. methods: the order of the losses."""
    import matplotlib

    matplotlib.use("agg")

    times = read(output / "times.json") or {"rates_mbit": [], "methods": {}}
    final: dict[str, list[dict]] = {}
    for run in read(output / "losses.json") or []:
        if run["split"] == "val" and run["val"] is not None:
            final.setdefault(run["method"], []).append(run)
    if times["methods"]:
        show_times(times)
        plot_times(times, output / "slow_link_time.png")
    if final:
        runs = {m: sorted(final[m], key=lambda run: run["seed"]) for m in methods if m in final}
        show_losses(runs)
        plot_losses(runs, times["methods"], output / "slow_link_loss.png")
    if not times["methods"] and not final:
        print(f"nothing in {output} yet")


def read(path: Path) -> Any:
    """The JSON of a file; None where there is none."""
    return json.loads(path.read_text()) if path.exists() else None


def show_times(times: dict) -> None:
    """Seconds of a step by method and rate."""
    rates = [str(rate) for rate in times["rates_mbit"]]
    if free := times["methods"].get(FREE):
        print(f"Seconds of a step; without network {free['seconds']['unshaped']:.3f}\n")
    print(f"| method | bytes sent | counter / ledger | unshaped | {' | '.join(rates)} Mbit/s |")
    print("|---" * (4 + len(rates)) + "|")
    for method, entry in times["methods"].items():
        ledger = entry["sent_by_ledger"]
        ratio = f"{entry['sent_by_counter'] / ledger:.3f}" if ledger else "-"
        seconds = [entry["seconds"].get(rate) for rate in ("unshaped", *rates)]
        print(f"| {method} | {ledger:,.0f} | {ratio} | {' | '.join(map(number, seconds))} |")
    print()


def number(value: float | None) -> str:
    """Three digits, or a dash."""
    return "-" if value is None else f"{value:.3f}"


def show_losses(runs: dict[str, list[dict]]) -> None:
    """Losses at each method's best learning rate, against all-reduce's of the same seeds."""
    print("| method | best lr | bytes | loss on val by seed | mean | against all-reduce |")
    print("|---|---|---|---|---|---|")
    reference = {run["seed"]: run["val"] for run in runs.get(REFERENCE, [])}
    for method, final in runs.items():
        mean = statistics.mean(run["val"] for run in final)
        both = [(run["val"], reference[run["seed"]]) for run in final if run["seed"] in reference]
        against = "-"
        if both:
            mine, theirs = map(statistics.mean, zip(*both, strict=True))
            against = f"{mine / theirs - 1:+.2%}"
        said = ", ".join(f"{run['val']:.4f}" for run in final)
        print(
            f"| {method} | {final[0]['lr']:g} | {final[0]['bytes']:,.0f} | {said} | {mean:.4f} | {against} |"
        )


def plot_losses(runs: dict[str, list[dict]], timed: dict[str, dict], path: Path) -> None:
    """The first seed's curves by step and, where the method was timed at 100 Mbit/s, by seconds."""
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4.2))
    for i, (method, final) in enumerate(runs.items()):
        steps, curve = zip(*final[0]["curve"], strict=True)
        left.plot(steps, curve, f"C{i}", label=method)
        if step_s := timed.get(method, {"seconds": {}})["seconds"].get("100"):
            right.plot([step * step_s for step in steps], curve, f"C{i}")
    left.set(xlabel="step", ylabel="validation loss", title="1.4M parameters, two replicas")
    right.set(xlabel="seconds of the 3.4M model's steps at 100 Mbit/s")
    left.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def plot_times(times: dict, path: Path) -> None:
    """A step's time by bandwidth, over that without network where it was taken."""
    from matplotlib import pyplot

    free = times["methods"].get(FREE, {"seconds": {"unshaped": 1.0}})["seconds"]["unshaped"]
    what = "a step / the step without network" if FREE in times["methods"] else "seconds of a step"
    figure, axes = pyplot.subplots(figsize=(6.5, 4.2))
    for i, (method, entry) in enumerate(times["methods"].items()):
        there = [
            (rate, entry["seconds"][str(rate)] / free)
            for rate in times["rates_mbit"]
            if str(rate) in entry["seconds"]
        ]
        axes.plot(
            [rate for rate, _ in there],
            [ratio for _, ratio in there],
            "o-" if i < 10 else "s--",
            label=method,
        )
    axes.set(xscale="log", yscale="log", xlabel="Mbit/s", ylabel=what)
    axes.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
