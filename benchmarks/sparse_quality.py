"""2:4 sparse feed-forward layers against dense ones: validation loss, loss curves and flip rates, at a scale that CPUs
can train.

Dense; a hard threshold (the two largest of four kept as they are, gradients straight through); SR-STE (arXiv
2102.04010: the same, and what is cut off decays); S-STE; S-STE with the estimator for the weights' gradients; that in
FP8, simulated; and dense FP8. All are trained by the trainer on two ranks, each at its own best learning rate (chosen
on the `tune` split with one seed), and compared on `val` with three seeds. The hard threshold and SR-STE exist here
alone: they take the place of the threshold inside the trainer's layers.

    python benchmarks/sparse_quality.py DATA [--output DIR] [--steps N] [--lr X …] [--seeds N …] [--plot FILE.png]

DATA: a folder written by `stepline prepare` with a `tune` split and at most 2048 tokens in its vocabulary. What is in
DIR is not trained again.
"""

import argparse
import json
import statistics
import sys
from pathlib import Path

from slow_link import run

SHAPE = {"hidden_size": 128, "num_layers": 4, "num_heads": 4, "ffn_size": 384}
S_STE = ["sparse.mode=s-ste"]
MVUE = [*S_STE, "sparse.grad_weight=mvue"]
METHODS = {
    "dense": ("trainer", []),
    "hard threshold": ("hard", S_STE),
    "SR-STE": ("sr-ste", S_STE),
    "S-STE": ("trainer", S_STE),
    "S-STE, estimator": ("trainer", MVUE),
    "S-STE, estimator, FP8": ("trainer", [*MVUE, "precision.fp8=true"]),
    "dense FP8": ("trainer", ["precision.fp8=true"]),
}
"""By name: whose threshold, and what the trainer is told."""
LEARNING_RATES = (4e-3, 8e-3, 1.6e-2)
SEEDS = (0, 1, 2)
DECAY = 2e-4
"""SR-STE's lambda, on the gradient."""


def child(kind: str) -> None:
    """`stepline` with another threshold in the place of S-STE's, and beta 1."""
    replace_threshold()
    import torch

    from stepline.comm.fsdp import local
    from stepline.kernels.sparse24 import soft_threshold as hard
    from stepline.models import sparse_linear
    from stepline.trainer.__main__ import main as stepline
    from stepline.trainer.run import state

    if kind == "sr-ste":
        build = state.Trainee.build.__func__

        def build_with_decay(cls, *args, **more):
            made = build(cls, *args, **more)
            weights, step = (
                [w for _, w, _ in sparse_linear.sparse_weights(made.model)],
                made.synchronizer.step,
            )

            @torch.no_grad()
            def step_with_decay(*arguments):
                for weight in weights:
                    part = local(weight)
                    local(weight.grad).add_(DECAY * torch.where(hard(part) == 0, part, 0))
                return step(*arguments)

            made.synchronizer.step = step_with_decay
            return made

        state.Trainee.build = classmethod(build_with_decay)
    stepline()


def replace_threshold() -> None:
    """The two largest of four, as they are, and beta 1, in the place of S(W) and its beta: before anything else of
    stepline is imported, because who imports them binds them."""
    bound = [name for name in sys.modules if name.startswith("stepline.")]
    if bound:
        raise RuntimeError(f"{bound[0]} is imported: the threshold cannot be replaced any more")
    import torch

    from stepline.kernels import sparse24

    def hard(x: torch.Tensor) -> torch.Tensor:
        grouped = sparse24.groups(x)
        kept = grouped.abs().topk(2, dim=-1).indices
        return torch.zeros_like(grouped).scatter(-1, kept, grouped.gather(-1, kept)).flatten(-2)

    sparse24.soft_threshold = hard
    sparse24.scale_of = lambda sums: torch.ones_like(sums[..., 0])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--output", type=Path, default=Path("runs/sparse_quality"))
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--lr", type=float, nargs="+", default=LEARNING_RATES, help="one: nothing is chosen")
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS, help="compared on `val`")
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS), metavar="NAME")
    parser.add_argument("--plot", type=Path, help="loss curves and flip rates, as a picture")
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    path = args.output / "losses.json"
    found = json.loads(path.read_text()) if path.exists() else {}

    def trained(name: str, lr: float, seed: int, split: str) -> dict:
        """`val_loss`, and by step the loss and the flip rate."""
        key = f"{name}, lr {lr:g}, seed {seed}, {split}, {args.steps} steps"
        if key not in found:
            kind, own = METHODS[name]
            options = [
                f"optimizer.lr={lr}", f"run.seed={seed}", f"logging.eval_split={split}", f"budget.steps={args.steps}",
                "optimizer.weight_decay=0.1", "logging.every=5", "logging.eval_windows=64", *own,
            ]  # fmt: skip
            program = [sys.executable, "-m", "stepline.trainer"]
            program = program if kind == "trainer" else [sys.executable, __file__, "--child", kind]
            rows = run(args.data.resolve(), args.output / "trained", options, SHAPE, program=program)
            steps = [row for row in rows if "loss" in row]
            found[key] = {
                "val_loss": rows[-1]["val_loss"],
                "step": [row["step"] for row in steps],
                "loss": [row["loss"] for row in steps],
                "flip_rate": [row["flip_rate"] for row in steps if "flip_rate" in row],
            }
            path.write_text(json.dumps(found) + "\n")
            print(f"{key}: {found[key]['val_loss']:.4f}", flush=True)
        return found[key]

    print("| | best lr | loss on val by seed | mean | to dense | flip rate, first and last fifth |")
    print("|---|---|---|---|---|---|")
    curves, dense = {}, None
    for name in args.methods:
        lr, *others = args.lr
        if others:
            lr = min(args.lr, key=lambda lr: trained(name, lr, 0, "tune")["val_loss"])
        curves[name] = [trained(name, lr, seed, "val") for seed in args.seeds]
        losses = [curve["val_loss"] for curve in curves[name]]
        mean = statistics.mean(losses)
        dense = mean if name == "dense" else dense
        apart = "" if dense is None else f"{mean / dense - 1:+.2%}"
        spread = f" ± {statistics.stdev(losses):.4f}" if len(losses) > 1 else ""
        print(
            f"| {name} | {lr:g} | {', '.join(f'{loss:.4f}' for loss in losses)} | {mean:.4f}{spread} | {apart} | "
            f"{flips(curves[name])} |",
            flush=True,
        )
    if args.plot:
        plot(curves, args.plot)


def flips(curves: list[dict]) -> str:
    """Mean flip rate of a step in the first and in the last fifth of the runs; nothing for dense ones."""
    rates = [curve["flip_rate"] for curve in curves]
    if not rates[0]:
        return ""
    fifth = max(1, len(rates[0]) // 5)
    ends = [statistics.mean(r for rate in rates for r in part(rate)) for part in (
        lambda rate: rate[:fifth], lambda rate: rate[-fifth:],
    )]  # fmt: skip
    return " and ".join(f"{value:.3%}" for value in ends)


def plot(curves: dict[str, list[dict]], path: Path) -> None:
    """Means over the seeds: the loss over that of the dense run, and the flip rate."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    def mean(name: str, key: str) -> list[float]:
        return [statistics.mean(values) for values in zip(*(c[key] for c in curves[name]), strict=True)]

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 4))
    for i, name in enumerate(curves):
        steps, flips = curves[name][0]["step"], mean(name, "flip_rate")
        if name != "dense" and "dense" in curves:
            over = [a - b for a, b in zip(mean(name, "loss"), mean("dense", "loss"), strict=True)]
            left.plot(steps, over, color=f"C{i}", label=name)
        if flips:
            right.plot(steps[-len(flips) :], flips, color=f"C{i}", label=name)
    left.set(xlabel="step", ylabel="training loss, less that of dense", title="Loss")
    right.set(
        xlabel="step", ylabel="share of mask entries that a step flips", title="Flip rate", yscale="log"
    )
    left.legend(fontsize=8)
    for axes in (left, right):
        axes.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, dpi=100)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        kind = sys.argv[2]
        del sys.argv[1:3]
        child(kind)
    else:
        main()
