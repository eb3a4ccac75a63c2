"""What activation_memory.py compares, and its tables and picture, from the cells and times that it measures."""

from dataclasses import dataclass
from pathlib import Path

GROWTH, SLOWER = 1.02, 1.05
"""Targets: memory at the largest depth over the smallest; step over that of full recompute."""


@dataclass(frozen=True)
class Variant:
    """A row of the tables."""

    blocks: str
    recompute: str = "none"
    stored: bool = False
    """Two streams with stored activations, or with what `recompute` says."""
    anchor_every: int | None = None


VARIANTS = {
    "standard, stored": Variant("standard"),
    "standard, selective recompute": Variant("standard", "selective"),
    "standard, full recompute": Variant("standard", "full"),
    "RevFFN, anchor every 8": Variant("revffn", anchor_every=8),
    "RevFFN": Variant("revffn"),
    "two streams, full recompute": Variant("revffn", "full", stored=True),
}
DRAWN = list(VARIANTS)[:5]
TIMED = ("standard, full recompute", "two streams, full recompute", "RevFFN")


def show(cells: list[dict], times: list[dict], timed: tuple[str, ...]) -> None:
    """Markdown, and how the targets fare."""
    for ffn in dict.fromkeys(cell["ffn"] for cell in cells):
        of = {(c["variant"], c["depth"]): c for c in cells if c["ffn"] == ffn}
        depths = sorted({depth for _, depth in of})
        bare = {cell: (c["activations"] - c["routing_ids"]) / 2**20 for cell, c in of.items()}
        heads = " | ".join(f"L = {depth}" for depth in depths)
        print(f"\n| {ffn}: peak (after forward), MiB | {heads} | ids a layer |")
        print("|---|" + "---|" * (len(depths) + 1))
        for name in dict.fromkeys(variant for variant, _ in of):
            row = [f"{bare[name, d]:.2f} ({of[name, d]['after_forward'] / 2**20:.2f})" for d in depths]
            ids = of[name, depths[0]]["routing_ids"] / depths[0] / 2**20
            print(f"| {name} | {' | '.join(row)} | {ids:.3f} |")
        if ("RevFFN", depths[0]) not in bare:
            continue
        growth = bare["RevFFN", depths[-1]] / bare["RevFFN", depths[0]]
        equal = all(c.get("bit_equal", True) for c in of.values())
        print(f"\n{ffn}: RevFFN grows {growth - 1:+.2%} (target: at most {GROWTH - 1:.0%}, "
              f"{'met' if growth <= GROWTH else 'MISSED'}); gradients bit-equal: {equal}")  # fmt: skip
    if times:
        print(f"\n| a step of RevFFN, and over (target {SLOWER}) | s | {' | '.join(timed[:-1])} |")
        print("|---|" + "---|" * len(timed))
    for row in times:
        over = [f"{row['wall_over'][name]:.3f} (cpu {row['cpu_over'][name]:.3f})" for name in timed[:-1]]
        what = f"{row['ffn']}, pair {row['pair']}, d = {row['width']}, L = {row['depth']}"
        print(f"| {what} | {row['wall']['RevFFN']:.3f} | {' | '.join(over)} |")


def plot(cells: list[dict], drawn: list[str], path: Path) -> None:
    """Peak activations against depth, dense and mixture side by side."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    depths = sorted({c["depth"] for c in cells})
    titles = {"dense": "dense", "moe": "mixture of experts"}
    figure, axes = plt.subplots(1, len(titles), figsize=(9.2, 3.6), squeeze=False)
    for ax, (ffn, title) in zip(axes[0], titles.items(), strict=True):
        for name, marker in zip(drawn, "sv^Do", strict=True):
            row = [c for c in cells if (c["variant"], c["ffn"]) == (name, ffn)]
            sizes = [c["activations"] / 2**20 for c in row]
            ax.plot([c["depth"] for c in row], sizes, marker=marker, markersize=4, label=name)
        ax.set(xscale="log", yscale="log", ylim=(10, 1500), xlabel="blocks", title=title)
        ax.set_xticks(depths, labels=depths)
        ticks = (10, 20, 50, 100, 200, 500)
        ax.set_yticks(ticks, labels=ticks)
        ax.minorticks_off()
        ax.grid(alpha=0.3)
    axes[0][0].set_ylabel("peak activation memory, MiB")
    axes[0][0].legend(fontsize=7)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
